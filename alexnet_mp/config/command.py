"""The command that a person typed, for messages that name it."""

from __future__ import annotations

import sys
from pathlib import Path


def typed_program(name: str | None = None) -> str:
    """The words behind `python` or `torchrun`, e.g. `launch/train.py` or `-m alexnet_mp train`.

    `name` is another command ("pack"), in the spelling in which this one was typed. Inside a
    notebook or a test, where nothing was typed, the spelling is `-m alexnet_mp`, which needs no
    particular folder.
    """
    script = Path(sys.argv[0])
    if script.name == "__main__.py" and script.parent.name == "alexnet_mp":
        typed = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].isalpha() else "train"
        return f"-m alexnet_mp {name or typed}"
    if script.suffix == ".py" and script.resolve().parent.name == "launch":
        return str(script.with_name(f"{name}.py") if name else script)
    if script.suffix == ".py" and script.is_file() and name is None:
        return str(script)
    return f"-m alexnet_mp {name or 'train'}"


def typed_command(name: str | None = None) -> str:
    """The command line of one process: `python launch/train.py`. `name` as in `typed_program`."""
    return f"python {typed_program(name)}"


def torchrun_command(name: str | None = None, ranks: int = 2) -> str:
    """The command line of several ranks, e.g. `torchrun --nproc_per_node=2 launch/train.py`.

    `name` is as in `typed_program`.
    """
    return f"torchrun --nproc_per_node={ranks} {typed_program(name)}"


def how_to_start() -> str:
    """The way out of an environment that no launcher set, or not wholly."""
    return (
        f"start with `{torchrun_command()}`, "
        f"or with `{typed_command()}` after `unset RANK WORLD_SIZE`"
    )
