"""The table of commands, for `python -m alexnet_mp NAME` and for `launch/NAME.py`.

A command is a function `NAME(argv) -> exit code` in the module that the table names. It is imported
only when it is run, so that `--help` does not wait for torch. To add a command, write the function,
a line here, and a launch/NAME.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from alexnet_mp.parallel.schedulers import adopt

COMMANDS = {
    # name: (module, what it does)
    "train": ("alexnet_mp.cli.train", "train a network, under torchrun on several ranks"),
    "evaluate": ("alexnet_mp.cli.evaluate", "measure trained networks on a split's images"),
    "predict": ("alexnet_mp.cli.predict", "name what is on images"),
    "pack": ("alexnet_mp.cli.pack", "pack an image folder for fast training"),
    "figures": ("alexnet_mp.cli.figures", "draw kernels, curves and predictions of a finished run"),
    "convert": ("alexnet_mp.cli.convert", "convert a network from or to other programs' files"),
    "features": ("alexnet_mp.cli.features", "write a network's activations for a folder of images"),
    "check": ("alexnet_mp.cli.check", "tell whether training will work on this machine"),
}


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the command that `argv` begins with, or lists the commands, and ends the process."""
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if name not in COMMANDS:
        problem = f"{name}: no such command" if name else "name a command"
        _fail(f"python -m alexnet_mp: {problem}; one of {', '.join(COMMANDS)} (--help lists them)")
    run_command(name, argv[1:])


def run_command(name: str, argv: Sequence[str]) -> NoReturn:
    """Runs the command `name` with the flags `argv`, and ends the process with its exit code."""
    adopt()  # all that asks for RANK finds it, whoever started this process
    # A lost rank is one line of ours, not that and torch's C++ frames. torch reads this at import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        command = load_command(name)
        from alexnet_mp.cli.process import run_main
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "alexnet_mp"):
            raise
        _fail(f"{package} is not installed: pip install {package}")
    run_main(lambda: command(argv))


def load_command(name: str) -> Callable[[Sequence[str]], int]:
    """The function of the command `name`, imported now."""
    command: Callable[[Sequence[str]], int] = getattr(
        importlib.import_module(COMMANDS[name][0]), name
    )
    return command


def overview() -> str:
    """The text of `python -m alexnet_mp --help`."""
    lines = [
        "usage: python -m alexnet_mp COMMAND [flags]",
        "       torchrun --nproc_per_node=2 -m alexnet_mp COMMAND [flags]",
        "",
        "AlexNet as it ran in 2012: one column on each of two GPUs, or CPU processes.",
        "",
        *(f"  {name:9s} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "COMMAND --help lists the flags of a command. A first run, without a download:",
        "  python -m alexnet_mp train",
    ]
    return "\n".join(lines)


def _fail(message: str) -> NoReturn:
    """Ends the process with code 2 and one line, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
