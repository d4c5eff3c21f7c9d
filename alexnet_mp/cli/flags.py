"""Flags are made by tyro from the fields of dataclasses; every mistake becomes one line.

`parse_request` is all that most commands need. `parser.py` has those of this package.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tyro

from alexnet_mp.config.command import torchrun_command, typed_command

DESCRIPTION_MARK = "@description@"

Request = TypeVar("Request")


class UsageError(ValueError):
    """A command line that cannot be run; every rank sees the same one."""


def parse_request(kind: type[Request], argv: Sequence[str], description: str) -> Request:
    """The request of type `kind`, which has a field `json`, that `argv` makes.

    Raises as `parse_train`.
    """
    with usage_errors():
        request = parse_dataclass(kind, argv, description)
        if is_main_process():
            _check_writable(getattr(request, "json", ""))
    return request


def described(text: str, command: str) -> str:
    text = text.format(torchrun=torchrun_command(command), python=typed_command(command))
    return textwrap.fill(" ".join(text.split()), help_width(), break_on_hyphens=False)


def help_width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 100))


def is_main_process() -> bool:
    """Whether this process prints what all ranks know (before any group exists)."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns an error inside the block into a UsageError: it is a mistake in the command line."""
    try:
        yield
    except BrokenPipeError:  # the reader of the help has gone; `run_main` ends quietly
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _check_writable(target: str) -> None:
    """Raises ValueError before the work, not after it, where its result could not be written to
    `target`.
    """
    path = Path(target).absolute()
    if target in ("", "-"):
        return
    if path.is_dir():
        raise ValueError(f"--json {target}: a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        missing = "" if path.parent.is_dir() else f", there is no folder {path.parent}"
        raise ValueError(f"--json {target}: cannot be written{missing}")


def split_flags(kind: type[Request], argv: Sequence[str]) -> tuple[Request, list[str]]:
    """The flags of `kind` in `argv`, and the words that are left."""
    with one_line_errors():
        options: dict[str, Any] = {"return_unknown_args": True, "add_help": False}
        found, rest = tyro.cli(kind, args=list(argv), **options)
        return found, list(rest)


def parse_dataclass(
    kind: type[Request], argv: Sequence[str], description: str, default: Request | None = None
) -> Request:
    """Tyro's reading of `argv` as a `kind`, whose fields are `default`'s where no flag changes
    them.
    """
    # A flag of a nested dataclass does not begin with the dataclass's name.
    options: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes,)}
    if default is not None:
        options["default"] = default
    with one_line_errors(), _help_with(description):
        result: Request = tyro.cli(
            kind,
            args=list(argv),
            prog=typed_command(),
            description=DESCRIPTION_MARK,
            **options,
        )
        return result


class _HelpScreen(io.StringIO):
    """Receives tyro's help, in color where a terminal shows it and NO_COLOR does not forbid it."""

    def __init__(self, screen: TextIO) -> None:
        super().__init__()
        self._color = screen.isatty() and not os.environ.get("NO_COLOR")
        self._screen_encoding = screen.encoding

    def isatty(self) -> bool:
        return self._color

    @property
    def encoding(self) -> str:  # type: ignore[override]  # tyro draws frames that it can hold
        return self._screen_encoding


@contextlib.contextmanager
def _help_with(description: str) -> Iterator[None]:
    """Prints the help that tyro writes inside the block, with `description` in it, on the first
    rank only.

    Tyro would put the description on one line, however long.
    """
    text = _HelpScreen(sys.stdout)
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        if is_main_process():
            sys.stdout.write(text.getvalue().replace(DESCRIPTION_MARK, description))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns tyro's boxed message and exit into a ValueError of one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_first_paragraph(message.getvalue())) from None


def _first_paragraph(box: str) -> str:
    """The first paragraph of tyro's box, without its frame."""
    words = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╰╮╯─ \n")
        if not text:
            break
        words.append(text)
    text = re.sub(r"^Error parsing \w+: ", "", " ".join(words)).replace("Error parsing ", "")
    return f"{text} (--help lists the flags)"
