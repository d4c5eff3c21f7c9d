"""The flags of train, evaluate, predict, pack and figures become a configuration or a request."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from alexnet_mp.cli.flags import (
    UsageError,
    described,
    help_width,
    is_main_process,
    parse_dataclass,
    parse_request,
    split_flags,
    usage_errors,
)
from alexnet_mp.config import PRESETS, Config, RunConfig
from alexnet_mp.config.arguments import (
    EvaluateRequest,
    FiguresRequest,
    PackRequest,
    PredictRequest,
)
from alexnet_mp.config.presets import preset
from alexnet_mp.config.renamed import refuse_old_spellings
from alexnet_mp.data.dataset_packer import unfinished
from alexnet_mp.data.image_sets import check_form
from alexnet_mp.parallel.launcher import Environment, launcher, names_job, restarts
from alexnet_mp.parallel.rendezvous import Meeting
from alexnet_mp.training.checkpoint import read_to_resume

LAST = "last"
"""The value of `--resume` without a file."""
FREE_ON_RESUME = {"epochs", "max_steps", "patience", "delta", "data_dir", "cache_dir"}
"""Fields that may change when a run is resumed, besides those of the machine and the placement."""
MACHINE_DEFAULTS = {
    "device": "auto",
    "backend": "auto",
    "threads": 0,
    "workers": 0,
    "column_ranks": 0,
    "timeout": 60.0,
    "compile": False,
    "cuda_graphs": False,
    "deterministic": False,
    "max_steps": 0,
    "profile": False,
}
"""Fields that a resumed run does not take over: it may go on at another placement."""

TRAIN = """Trains AlexNet in columns: `{torchrun} [flags]` puts one column on each of two GPUs (or
CPU processes); `{python} [flags]` runs all columns on one device. Without flags: the demo preset
on generated images, no download. A preset is a complete configuration; any flag below changes one
field of it. The defaults that are shown are those of the preset that is named beside --help. Your
own photographs: --preset photos --data folder --data-dir DIR, with a folder for each class in
DIR."""

EVALUATE = """Measures trained networks: loss, top-1 and top-5 over a split's images. `{python}
--checkpoint RUN/best.pt` repeats the test of the run in RUN, on one device or, under torchrun as
for training, on several, whatever the placement that trained it. --ten-crop averages ten views of
each image, as the paper's figures do; several --checkpoint are averaged as one network."""

PREDICT = """Names what is on images: `{python} --checkpoint RUN/best.pt cat.jpg dog.png` shows
the most probable classes of each. Files that cannot be read are named, the others are shown, and
the exit code is then 2."""

PACK = """Packs images for fast training: `{python} SOURCE STORE`, then train with
`--data store --data-dir STORE`. Shorter side 256, center 256x256, upright, RGB; images that are
smaller keep their size. An interrupted command is repeated: it goes on where it was, and the
store is the same to the byte."""

FIGURES = """Draws what a run has learned: kernels.png (the first layer, column above column, with
its color selectivity), curves.png, timeline.png (one step of a run with --profile), samples.png
(training images), predictions.png (test images with their likeliest classes), confusion.png (what
the worst classes are taken for) and neighbors.png (the training images nearest to test images by
fc7), into RUN or --out. --html puts them with all else on one page. One process on one device,
whatever the placement that trained it."""


def _optional_file(words: list[str]) -> str:
    if len(words) > 1:
        raise ValueError(f"one checkpoint, not {' '.join(words)}")
    return words[0] if words else LAST


OptionalFile = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FILE]",
        instance_from_str=_optional_file,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    ),
]
"""A flag whose value may be left out."""


@dataclass(frozen=True)
class _Resume:
    """The flag that decides which configuration the other flags change."""

    resume: OptionalFile = ""


@dataclass(frozen=True)
class _Peek:
    """Flags that must be known before the others can be read; None where they are not given."""

    preset: str | None = None
    out: str | None = None
    data: str | None = None
    data_dir: str | None = None
    timeout: float | None = None


def parse_timeout(argv: Sequence[str]) -> float:
    """How long ranks wait for each other before any other flag of `argv` is read, in seconds."""
    with usage_errors():
        asked = split_flags(_Peek, argv)[0].timeout
    return asked if asked and asked > 0 else RunConfig.timeout


def parse_train(argv: Sequence[str], meeting: Meeting | None = None) -> Config:
    """The configuration that `argv` asks for, on one rank or on those of `meeting`.

    Rank 0 alone looks for a checkpoint to continue and reads it: other hosts may not have it.
    Raises UsageError with one line that names the flag, and SystemExit(0) after --help.
    """
    meeting = meeting or Meeting(Environment())
    # torch.distributed.launch adds this flag; it is in the environment too.
    words = [word for word in argv if not re.fullmatch("--local[-_]rank=[0-9]+", word)]
    with usage_errors():
        refuse_old_spellings(words)
        resumed, words = split_flags(_Resume, words)
        peek, _ = split_flags(_Peek, words)
        found = meeting.ask_rank0(lambda: _find_checkpoint(peek, resumed.resume, meeting))
        _refuse_another_resume(resumed.resume, found["asked"])
        base, checkpoint = _base(peek, found)
        config = parse_dataclass(Config, words, _train_help(), base)
        if checkpoint is None:
            config = _with_found_data(config, peek)
        else:
            _refuse_changes(config, base, checkpoint)
    return config


def parse_evaluate(argv: Sequence[str]) -> EvaluateRequest:
    """The request that `argv` makes; `--checkpoint A B` is `--checkpoint A --checkpoint B`.

    Raises as `parse_train`.
    """
    words = _repeat_flags(argv, ("--checkpoint", "--weights"))
    return parse_request(EvaluateRequest, words, described(EVALUATE, "evaluate"))


def parse_predict(argv: Sequence[str]) -> PredictRequest:
    """The request that `argv` makes; words behind a flag's value are images.

    Raises as `parse_train`.
    """
    return parse_request(PredictRequest, argv, described(PREDICT, "predict"))


def parse_pack(argv: Sequence[str]) -> PackRequest:
    """The request that `argv` makes. Raises as `parse_train`."""
    return parse_request(PackRequest, argv, described(PACK, "pack"))


def parse_figures(argv: Sequence[str]) -> FiguresRequest:
    """The request that `argv` makes. Raises as `parse_train`."""
    return parse_request(FiguresRequest, argv, described(FIGURES, "figures"))


def stored_config(path: Path) -> Config:
    """The configuration of the run that wrote the checkpoint `path`. ValueError names the file."""
    content = read_to_resume(path)
    try:
        return Config.from_dict(content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _find_checkpoint(peek: _Peek, asked: str, meeting: Meeting) -> dict[str, Any]:
    """The checkpoint that the run continues ("" for a new run) and the configuration in it."""
    path = _after_restart(peek.out, meeting.start)
    if path is None and asked:
        if asked == LAST and not peek.out:
            raise ValueError(
                "--resume alone means OUT/last.pt: name the run's folder with --out, "
                "or the file with --resume FILE"
            )
        path = Path(peek.out or "", "last.pt") if asked == LAST else Path(asked)
    if path is None:
        return {"asked": asked, "checkpoint": "", "config": {}}
    try:
        stored = stored_config(path)
    except FileNotFoundError as error:
        if len(set(meeting.hosts)) == 1:
            raise
        host = meeting.hosts[0].partition(" ")[0]
        raise FileNotFoundError(f"{error} on {host}, where rank 0 reads it") from None
    return {"asked": asked, "checkpoint": str(path), "config": stored.to_dict()}


def _refuse_another_resume(mine: str, of_rank0: str) -> None:
    if mine != of_rank0:
        raise ValueError(
            f"this rank differs from rank 0 in --resume: {of_rank0 or 'not given'} on rank 0, "
            f"{mine or 'not given'} here"
        )


def _base(peek: _Peek, found: dict[str, Any]) -> tuple[Config, Path | None]:
    """The configuration that the flags change, and the checkpoint that it comes from, if it is not
    a preset's.
    """
    if not found["checkpoint"]:
        return preset(peek.preset or "demo"), None
    path, stored = Path(found["checkpoint"]), Config.from_dict(found["config"])
    if peek.preset is not None and peek.preset != stored.preset:
        raise ValueError(
            f"--preset {peek.preset}: {path} was trained with --preset {stored.preset}; "
            "leave the flag out to continue it"
        )
    out = peek.out or str(path.parent)
    return stored.with_fields(resume=str(path), out=out, **MACHINE_DEFAULTS), path


def _after_restart(out: str | None, start: int) -> Path | None:
    """OUT/last.pt where torchrun starts the ranks of a job again that has written it.

    It does so after a failure (--max-restarts), and when a node joins, which it does not count as a
    restart: there the job's --rdzv-id tells, or `start`, counted from 1.
    """
    again = restarts() > 0 or start > 1
    if not again and not names_job():
        return None
    if not out or not Path(out, "last.pt").exists():
        if again:
            missing = f"{Path(out, 'last.pt')} is not there" if out else "no --out is named"
            print(f"started again by torchrun, from the beginning: {missing}", flush=True)
        return None
    try:
        content = json.loads(Path(out, "config.json").read_text(encoding="utf-8"))
        same_job = content["environment"]["launcher"] == launcher()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Another run's folder is not continued; the first start has refused it too.
    return Path(out, "last.pt") if same_job else None


def _with_found_data(config: Config, peek: _Peek) -> Config:
    """`config`; where --data-dir is given without --data, with the kind of data in that folder.

    Generated images need no folder, so a folder that is named is meant to be trained on. A preset
    for folders takes a packed one, too.
    """
    preset_data = config.data.data
    if peek.data_dir is None or peek.data is not None or preset_data not in ("shapes", "folder"):
        return config
    path = Path(peek.data_dir).expanduser()
    packed = any(path.glob("*/header.json")) or unfinished(path) is not None
    kind = "store" if packed else "folder"
    if kind == preset_data:
        return config
    if kind == "folder":
        try:
            check_form(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error} (--data says what else it may be)") from None
    if is_main_process():
        print(f"--data-dir {path}: taken as --data {kind}", flush=True)
    return config.with_fields(data=kind)


def _refuse_changes(config: Config, stored: Config, path: Path) -> None:
    """UsageError where a flag would make the resumed run another one than `stored`."""
    for part in ("model", "data", "recipe"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(stored, part), name)
            if value != before and name not in FREE_ON_RESUME:
                other = (
                    f"; for other images or classes (fine-tuning): --init-from {path} --reset fc8"
                    if part == "data" or name == "classes"
                    else ", or start a new run without --resume"
                )
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: {path} was trained with {before}; "
                    f"leave the flag out to continue it{other}"
                )
    for name in ("seed", "precision"):
        value, before = getattr(config.run, name), getattr(stored.run, name)
        if value != before:
            raise UsageError(
                f"--{name} {value}: {path} was trained with {before}; "
                "leave the flag out to continue it"
            )


def _train_help() -> str:
    """The text above the flags of train: how to start, and every preset that exists, a user's own
    too.
    """
    margin = max(map(len, PRESETS)) + 4
    presets = [
        textwrap.fill(
            " ".join((PRESETS[name].__doc__ or "").partition("\n\n")[0].split()),
            max(help_width(), margin + 20),
            initial_indent=f"  {name}".ljust(margin),
            subsequent_indent=" " * margin,
        )
        for name in PRESETS
    ]
    return "\n".join([described(TRAIN, "train"), "", "Presets (--preset NAME):", *presets])


def _repeat_flags(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`argv` with each of `flags` before every one of its values:

    `--checkpoint A B` becomes `--checkpoint A --checkpoint B`.
    """
    words: list[str] = []
    flag = None
    for before, word in zip(["", *argv], argv, strict=False):
        if word.startswith("--"):
            flag = name if (name := word.partition("=")[0]) in flags else None
        elif flag and before != flag:
            words.append(flag)
        words.append(word)
    return words
