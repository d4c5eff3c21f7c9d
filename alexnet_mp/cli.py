"""The command line: every field of the configuration is a flag, made by tyro from the dataclasses."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from alexnet_mp.checkpoint import read
from alexnet_mp.config import Config
from alexnet_mp.presets import preset

LAST = "last"        # what `--resume` without a file stands for
FREE_ON_RESUME = {"epochs", "max_steps", "patience", "delta", "data_dir"}    # besides everything of the machine and placement

DESCRIPTION = """Trains AlexNet in columns: `torchrun --nproc_per_node=2 launch/train.py [flags]` puts one column on each of two
GPUs (or CPU processes); `python launch/train.py [flags]` runs all columns on one device. Without flags: the demo preset on
generated images, no download. A preset is a complete configuration; any flag below changes one field of it."""


class UsageError(ValueError):
    """A command line that cannot be; every rank sees the same one."""


def parse_train(argv: Sequence[str]) -> Config:
    """The configuration that `argv` asks for. UsageError with one line naming the flag; SystemExit(0) after --help."""
    argv = list(argv)
    if "--resume" in argv:                    # its value is optional, which tyro does not know
        at = argv.index("--resume") + 1
        if at == len(argv) or argv[at].startswith("--"):
            argv.insert(at, LAST)
    try:
        base, checkpoint = _base(argv)
        config = _tyro(argv, base)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    if checkpoint:
        _refuse_changes(config, base, checkpoint)
    return config


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` in `argv`, written `--flag value` or `--flag=value`."""
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1:]
    return value


def _base(argv: list[str]) -> tuple[Config, Path | None]:
    """What the flags change: a preset, or the configuration of the checkpoint that the run continues from."""
    name, resume, out = (value_of(argv, flag) for flag in ("--preset", "--resume", "--out"))
    if resume is None:
        return preset(name or "demo"), None
    if resume == LAST and not out:
        raise ValueError("--resume alone means OUT/last.pt: name the run's folder with --out, or the file with --resume FILE")
    path = Path(out or "", "last.pt") if resume == LAST else Path(resume)
    stored = Config.from_dict(read(path)["config"])
    if name is not None and name != stored.preset:
        raise ValueError(f"--preset {name}: {path} was trained with --preset {stored.preset}; leave the flag out to continue it")
    return stored.with_fields(resume=str(path), out=out or str(path.parent), device="auto", backend="auto", threads=0, column_ranks=0,
                              timeout=60.0, compile=False, deterministic=False, max_steps=0), path


def _refuse_changes(config: Config, stored: Config, path: Path) -> None:
    for part in ("model", "data", "recipe"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(stored, part), name)
            if value != before and name not in FREE_ON_RESUME:
                raise UsageError(f"--{name.replace('_', '-')} {value}: {path} was trained with {before}; leave the flag out to continue it, "
                                 "or start a new run without --resume")
    for name in ("seed", "precision"):
        value, before = getattr(config.run, name), getattr(stored.run, name)
        if value != before:
            raise UsageError(f"--{name} {value}: {path} was trained with {before}; leave the flag out to continue it")


def _tyro(argv: list[str], base: Config) -> Config:
    """Tyro's reading of `argv`; its boxed message becomes one line."""
    message = io.StringIO()
    # --resume has been read: what the flags change must not be changed back by it.
    try:
        with contextlib.redirect_stderr(message):
            config = tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=argv, default=base, prog=Path(sys.argv[0]).name, description=DESCRIPTION)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(message.getvalue())) from None
    return config.with_fields(resume=base.run.resume)


def _one_line(box: str) -> str:
    """The first paragraph of tyro's box, without its frame."""
    words = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╰╮╯─ \n")
        if not text:
            break
        words.append(text)
    return re.sub(r"^Error parsing \w+: ", "", " ".join(words)).replace("Error parsing ", "") + " (--help lists the flags)"


def is_main_process() -> bool:
    """Whether this process should say what all ranks know (before any group exists)."""
    return os.environ.get("RANK", "0") == "0"
