"""What a run's files say in words and tables: its command, its configuration, its result."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet_mp.config import Config
from alexnet_mp.config.presets import preset

NOT_OF_THE_RUN = ("out", "resume", "classes")
"""Fields that say where a run is and how it was continued, or that the images decided."""
PARTS = ("model", "data", "recipe", "run")

RESULTS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "test_loss": "test loss",
    "best_epoch": "best epoch",
    "epochs": "epochs",
    "steps": "steps",
    "seconds": "training time",
    "images_per_second": "images/s",
    "ranks": "ranks",
    "device": "device",
    "precision": "precision",
    "validation": "validation images",
}
"""Keys of result.json, and what they are called."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a run. OSError or ValueError, in one line, names the file."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def fields(config: Config) -> dict[str, Any]:
    """Every field of `config` by its flat name, but those of NOT_OF_THE_RUN."""
    return {"preset": config.preset} | {
        field.name: getattr(getattr(config, part), field.name)
        for part in PARTS
        for field in dataclasses.fields(getattr(config, part))
        if field.name not in NOT_OF_THE_RUN
    }


def changed_fields(config: Config) -> dict[str, tuple[Any, Any]]:
    """Field -> (its value, its preset's), where they differ. ValueError for an unknown preset."""
    own, named = fields(config), fields(preset(config.preset))
    return {name: (own[name], named[name]) for name in own if own[name] != named[name]}


def flag(name: str, value: Any) -> list[str]:
    """The words that set a field on the command line."""
    words = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [words if value else words.replace("--", "--no-", 1)]
    values = value if isinstance(value, tuple) else (value,)
    return [words, *map(str, values)]


def command_of(config: Config, ranks: int) -> str:
    """A command line that starts the run again, in a new folder."""
    start = f"torchrun --nproc_per_node={ranks}" if ranks > 1 else "python"
    words = [] if config.preset == "demo" else ["--preset", config.preset]
    changed = {name: value for name, (value, _) in changed_fields(config).items()}
    if "data_dir" in changed:  # a folder that is named alone decides what kind of data it is
        changed = {"data": config.data.data} | changed
    for name, value in changed.items():
        words += flag(name, value)
    return " ".join([start, "launch/train.py", shlex.join(words)]).rstrip()


def differences(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows (field, value in each run) of the fields in which the `runs` differ."""
    names = dict.fromkeys(name for values in runs.values() for name in values)
    rows = []
    for name in names:
        values = [values.get(name) for values in runs.values()]
        if any(value != values[0] for value in values):
            rows.append([name, *map(readable, values)])
    return rows


def result_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows (name, value of each result) of result.json; a result that lacks one has a dash."""
    rows = [
        [title, *(readable_result(key, result) for result in results)]
        for key, title in RESULTS.items()
    ]
    sent = [result.get("exchange", {}).get("bytes_per_step") for result in results]
    rows.append(["bytes that a rank sends a step", *map(readable, sent)])
    return rows


def readable_result(key: str, result: Mapping[str, Any]) -> str:
    """One value of result.json for people."""
    value = result.get(key)
    if value is None:
        return "–"
    if key in ("top1", "top5"):
        return f"{value:.2%}"
    if key == "seconds":
        return readable_seconds(value)
    return f"{value:,.4g}" if isinstance(value, float) else readable(value)


def readable_seconds(seconds: float) -> str:
    """0:42, 12:05 or 3:10:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def readable(value: Any) -> str:
    """A configuration's value for people."""
    if value is None:
        return "–"
    if isinstance(value, (tuple, list)):
        return " ".join(map(readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
