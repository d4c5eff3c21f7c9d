"""Checkpoints of a run: saved and read again at any placement. `weights/checkpoint_file.py` has the file's contents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from alexnet_mp.config import Config
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.sgd2012 import set_velocity, velocity_of
from alexnet_mp.weights.checkpoint_file import (
    FORMAT,
    KINDS,
    VERSION,
    link_atomically,
    load_model,
    read,
    write_atomically,
)

__all__ = [
    "FORMAT",
    "KINDS",
    "VERSION",
    "epoch_files",
    "link_and_prune",
    "link_atomically",
    "load_model",
    "load_velocity",
    "newest_good",
    "read",
    "read_to_resume",
    "save",
    "write_atomically",
]

EPOCH_FILE = re.compile(r"epoch-(\d{4,})\.pt")


def save(
    path: Path,
    context: ParallelContext,
    model: AlexNet,
    optimizer: torch.optim.Optimizer,
    config: Config,
    loop: dict[str, Any],
    data: dict[str, Any],
    *,
    links: tuple[Path, ...] = (),
    keep: int = 0,
) -> None:
    """Writes the checkpoint; every rank calls it. The same file is then to be found at each of `links` too.

    Written beside the target, synced and renamed: a kill or a full disk leaves the file that was there before. Of the folder's
    epoch-NNNN.pt the newest `keep` stay. Raises OSError, on all ranks alike, naming the path.
    """
    parts = {
        "model": model.canonical(lambda p: p.detach()),
        "velocity": model.canonical(lambda p: velocity_of(optimizer, p)),
    }
    whole = {name: context.gather_to_rank0(part) for name, part in parts.items()}

    def write() -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "config": config.to_dict(),
            **whole,
            "loop": loop,
            "data": data,
        }
        try:
            write_atomically(path, content)
            link_and_prune(path, links, keep)
        except OSError as error:
            raise OSError(
                f"{path}: the checkpoint could not be written ({error.strerror or error}); the one before it is intact"
            ) from None

    context.run_on_rank0(write)


def link_and_prune(path: Path, links: tuple[Path, ...], keep: int) -> None:
    """Makes each of `links` the same file as `path`; of its folder's epoch-NNNN.pt the newest `keep` stay, all where that is 0."""
    for link in links:
        link_atomically(path, link)
    for old in epoch_files(path.parent)[keep:] if keep else ():
        old.unlink(missing_ok=True)


def epoch_files(folder: Path) -> list[Path]:
    """The checkpoints of single epochs in `folder`, the newest first."""
    return sorted(
        (path for path in folder.glob("epoch-*.pt") if EPOCH_FILE.fullmatch(path.name)),
        reverse=True,
        key=lambda path: int(EPOCH_FILE.fullmatch(path.name)[1]),
    )


def newest_good(folder: Path) -> tuple[Path, int] | None:
    """The checkpoint of the most steps in `folder` that can be read, and its steps; None if there is none."""
    good = []
    for path in [folder / "last.pt", folder / "best.pt", *epoch_files(folder)]:
        try:
            good.append((int(read(path)["loop"]["step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    steps, path = max(good, default=(0, None), key=lambda found: found[0])
    return (path, steps) if path else None


def read_to_resume(path: Path) -> dict[str, Any]:
    """As `read`; where the file is damaged, the error names the newest good checkpoint beside it. Which one to take is the user's to say."""
    try:
        return read(path, usual="last.pt")
    except (OSError, ValueError) as error:
        found = newest_good(path.parent) if path.parent.is_dir() else None
        if not found:
            raise
        raise ValueError(
            f"{error}; the newest good one is {found[0]}, of step {found[1]}: continue from it with --resume {found[0]}"
        ) from None


def load_velocity(
    content: dict[str, Any],
    model: AlexNet,
    optimizer: torch.optim.Optimizer,
    source: str | Path = "checkpoint",
) -> None:
    """Gives the optimizer the velocities of the columns here. ValueError names the first one that is missing or does not fit."""
    velocity = content["velocity"]
    for name, mine in model.state_dict().items():
        if name not in velocity or velocity[name].shape != mine.shape:
            raise ValueError(
                f"{source}: the velocity of {name} is missing or not of shape {tuple(mine.shape)}"
            )
    for parameter, value in model.from_canonical(velocity).items():
        set_velocity(optimizer, parameter, value)
