"""Puts what a run left behind, and its pictures, on one HTML page; names what is missing.

The sections stand in the order of SECTIONS. A part that cannot be made, such as predictions where
the images are gone, is named in its section with the reason, and the rest of the page is made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alexnet_mp.config.files import write_atomically
from alexnet_mp.inference.finished_run import FinishedRun, read_config, read_history
from alexnet_mp.inference.run_facts import (
    changed_fields,
    command_of,
    differences,
    fields,
    flag,
    read_json,
    readable,
    readable_result,
    result_rows,
)
from alexnet_mp.inference.run_pictures import TIMELINE, Drawing, Picture, named
from alexnet_mp.plotting.curves import ACCURACIES, AXIS_LABELS, compare_curves, errors_or_values
from alexnet_mp.plotting.report import Report, ReportPicture, ReportTable, Section, render
from alexnet_mp.plotting.timeline import readable_bytes

SECTIONS = {
    "curves": "Curves",
    "kernels": "First-layer kernels",
    "predictions": "Predictions",
    "neighbors": "Nearest neighbors",
    "confusion": "Confusion of the worst classes",
    "samples": "Training images",
}
"""Pictures with a section of their own, in the page's order."""
COMPARED = ("train_loss", "val_loss", "train_top1", "val_top1")
"""Numbers of history.jsonl whose curves lie over each other."""
HEADLINES = {
    "top1": "test accuracy",
    "top5": "top-5",
    "test_loss": "test loss",
    "epochs": "epochs",
    "images_per_second": "images/s",
    "seconds": "training time",
    "ranks": "ranks",
}


@dataclass
class Parts:
    """What there is of a run: its pictures by name, and why others are missing."""

    pictures: dict[str, Picture] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def draw(self, drawings: Iterable[Drawing]) -> Iterable[Picture]:
        """Draws what can be drawn, and yields each picture as it is ready."""
        for drawing in drawings:
            try:
                self.pictures[drawing.name] = drawing.draw()
            except (ValueError, OSError) as error:
                self.missing[drawing.name] = one_line(error)
                continue
            yield self.pictures[drawing.name]

    def section(self, name: str) -> Section:
        """A section with one picture, or with the reason why it is missing."""
        why = "no epoch has ended" if name == "curves" else "it was not drawn"
        missing = [] if name in self.pictures else [self.missing.get(name, why)]
        return Section(SECTIONS[name], pictures=self._pictures(name), missing=missing)

    def _pictures(self, name: str) -> list[ReportPicture]:
        if name not in self.pictures:
            return []
        picture = self.pictures[name]
        return [ReportPicture(picture.file.read_bytes(), picture.caption, name)]

    def step(self, folder: Path) -> tuple[list[ReportPicture], list[str]]:
        """The timeline, or why there is none."""
        if "timeline" in self.pictures:
            return self._pictures("timeline"), []
        if "timeline" in self.missing:
            return [], [self.missing["timeline"]]
        return [], [f"{folder / TIMELINE}: no step was recorded; train with --profile"]


def write_report(
    run: FinishedRun, parts: Parts, out: Path, others: Sequence[str] = ()
) -> tuple[Path, list[str]]:
    """Writes report.html into `out`. Returns its path, and the names of missing parts.

    `others` are folders of runs to compare with. Raises ValueError or OSError where config.json of
    one of them cannot be read.
    """
    config = _json_or_reason(run.folder, "config.json")
    result = _json_or_reason(run.folder, "result.json")
    environment = config.content.get("environment", {})
    sections = [_configuration(run, environment)]
    if others:
        sections.append(_comparison([run.folder, *map(Path, others)]))
    sections += [parts.section(name) for name in SECTIONS]
    sections.insert(len(sections) - 1, _exchange(run, parts, result))
    sections.append(_environment(config))
    figures = [
        (title, readable_result(key, result.content))
        for key, title in HEADLINES.items()
        if result.content.get(key) is not None
    ]
    if result.reason:
        why = f"{result.reason}; the run has not ended, so it was not tested"
        sections.insert(0, Section("Result", missing=[why]))
    settings = run.config
    page = Report(
        f"Run {run.folder.resolve().name}",
        f"preset {settings.preset}, {settings.data.data}, {settings.model.columns} "
        f"column{'s' * (settings.model.columns > 1)} at {settings.model.image_size} pixels",
        figures,
        sections,
    )
    path = out / "report.html"
    write_atomically(path, render(page))
    return path, [section.title for section in sections if section.missing]


@dataclass(frozen=True)
class _Json:
    content: Mapping[str, Any]
    reason: str = ""


def _json_or_reason(folder: Path, name: str) -> _Json:
    try:
        return _Json(read_json(folder, name))
    except (ValueError, OSError) as error:
        return _Json({}, one_line(error))


def one_line(error: BaseException) -> str:
    """The message of an error, without a line's end."""
    return " ".join(str(error).split()) or type(error).__name__


def _configuration(run: FinishedRun, environment: Mapping[str, Any]) -> Section:
    config = run.config
    every = [[name, readable(value)] for name, value in fields(config).items()]
    try:
        changed = changed_fields(config)
    except ValueError as error:  # a preset of the user's own, which is not here
        table = ReportTable(["field", "value"], every)
        return Section("Configuration", missing=[f"the command: {one_line(error)}"], tables=[table])
    rows = [
        [flag(name, value)[0], readable(value), readable(before)]
        for name, (value, before) in changed.items()
    ]
    differ = ReportTable(["flag", "this run", f"preset {config.preset}"], rows)
    return Section(
        "Configuration",
        "This command trains it again."
        + ("" if changed else f" Every field is as in the preset {config.preset}."),
        command_of(config, environment.get("ranks", 1)),
        tables=[
            *([differ] if rows else []),
            ReportTable(["field", "value"], every, f"all {len(every)} fields", folded=True),
        ],
    )


def _exchange(run: FinishedRun, parts: Parts, result: _Json) -> Section:
    pictures, missing = parts.step(run.folder)
    if result.reason:
        missing.insert(0, result.reason)
    exchange = result.content.get("exchange", {})
    forward, backward = (
        exchange.get(key, {}) for key in ("values_per_image", "values_per_image_backward")
    )
    tables, text = [], ""
    if forward:
        rows = [[name, readable(n), readable(backward.get(name, 0))] for name, n in forward.items()]
        total = [sum(values.values()) for values in (forward, backward)]
        rows.append(["together", *map(readable, total)])
        head = ["layer", "values an image, forward", "backward"]
        tables = [ReportTable(head, rows)]
        text = (
            f"One rank sends {readable_bytes(exchange['bytes_per_step'])} in a training step, as "
            "counted while it ran."
        )
    elif not result.reason:
        text = "Every rank holds all columns: no activation was exchanged."
    return Section("Exchange and timeline", text, "", missing, pictures, tables)


def _environment(config: _Json) -> Section:
    environment = config.content.get("environment")
    if not isinstance(environment, dict):
        reason = config.reason or "config.json has no environment"
        return Section("Environment", missing=[reason])
    data = config.content.get("data") or {}
    rows = [[name.replace("_", " "), readable(value)] for name, value in environment.items()]
    if "images" in data:
        rows.append(["images to train, validate, test", readable(data["images"])])
    return Section("Environment", tables=[ReportTable([], rows)])


def _comparison(folders: Sequence[Path]) -> Section:
    """Curves over each other; the fields that differ; the results."""
    runs = named(folders)
    names = list(runs)
    histories = {name: read_history(folder) for name, folder in runs.items()}
    configs = {name: fields(read_config(run)) | _placement(run) for name, run in runs.items()}
    results = [_json_or_reason(folder, "result.json") for folder in runs.values()]
    missing = [result.reason for result in results if result.reason]
    rows = differences(configs)
    return Section(
        "Comparison",
        "" if rows else "The configurations are the same.",
        missing=missing + [f"{n}: no epoch has ended" for n, h in histories.items() if not h],
        pictures=_overlaid({name: history for name, history in histories.items() if history}),
        tables=[
            *([ReportTable(["field", *names], rows, "what differs")] if rows else []),
            ReportTable(
                ["result", *names], result_rows([result.content for result in results]), "results"
            ),
        ],
    )


def _placement(folder: Path) -> dict[str, Any]:
    """Where a run was trained, as config.json says."""
    environment = _json_or_reason(folder, "config.json").content.get("environment", {})
    known = ("ranks", "column_ranks", "device_name", "torch")
    return {f"environment: {key}": environment[key] for key in known if key in environment}


def _overlaid(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[ReportPicture]:
    """A picture of each number that all runs have."""
    pictures: list[ReportPicture] = []
    if not histories:
        return pictures
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compare.png"
        for key in COMPARED:
            try:
                ends = {name: errors_or_values(h, key)[-1] for name, h in histories.items()}
            except ValueError:  # an older run without this number
                continue
            compare_curves(histories, key, path)
            form = ".2%" if key.endswith(ACCURACIES) else ".4g"
            last = ", ".join(f"{name} {value:{form}}" for name, value in ends.items())
            label = AXIS_LABELS[key]
            pictures.append(ReportPicture(path.read_bytes(), f"{label}; at the end {last}", label))
    return pictures
