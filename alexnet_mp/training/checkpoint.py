"""Saves and resumes a run, at any placement; `weights/checkpoint_file.py` describes the file.

A checkpoint holds the whole network, its velocities and the loop's state, whichever ranks wrote it:
each rank takes the parts of its columns. `last.pt` is the newest one; `best.pt` and `epoch-NNNN.pt`
are the file of the end of an epoch, velocities included, so that training can go on from each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from alexnet_mp.training.trainer import Trainer

__all__ = [
    "FORMAT",
    "KINDS",
    "VERSION",
    "epoch_files",
    "link_and_prune",
    "link_atomically",
    "link_best",
    "load_model",
    "load_velocity",
    "newest_good",
    "read",
    "read_for_all",
    "read_to_resume",
    "restore",
    "save",
    "write_atomically",
]

EPOCH_FILE = re.compile(r"epoch-(\d{4,})\.pt")
LOOP_KINDS = {
    "epoch": int,
    "step": int,
    "batch": int,
    "history": list,
    "best": dict,
    "schedule": dict,
    "loss_scale": dict,
    "tally": dict,
}
"""Keys and types that the loop's state must have before a trainer is given it."""


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
    """Writes the checkpoint `path` and makes each of `links` the same file. Every rank calls it.

    A kill or a full disk leaves the file that was there before. Of the folder's epoch-NNNN.pt the
    newest `keep` stay; 0 keeps all. Raises OSError that names the path, on all ranks alike.
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
                f"{path}: the checkpoint could not be written ({error.strerror or error}); "
                "the one before it is intact"
            ) from None

    context.run_on_rank0(write)


def read_for_all(
    path: Path,
    context: ParallelContext,
    names: Collection[str],
    parts: tuple[str, ...] = ("model", "velocity"),
) -> dict[str, Any]:
    """On every rank, the checkpoint `path` with the tensors in `names` of its `parts`.

    Rank 0 reads the file and sends to each other rank what that one has `names` for: it may be on
    another host, which lacks the file. Raises as `read`, on all ranks alike.
    """
    whole: dict[str, Any] = {}

    def read_loop() -> dict[str, Any]:
        whole.update(read(path))
        return {name: whole[name] for name in whole if name not in ("model", "velocity")}

    content = context.run_on_rank0(read_loop)
    return content | {
        part: context.broadcast_from_rank0(whole.get(part, {}), names) for part in parts
    }


def link_and_prune(path: Path, links: Iterable[Path], keep: int) -> None:
    """Makes each of `links` the same file as `path`; the newest `keep` epochs stay (0: all)."""
    for link in links:
        link_atomically(path, link)
    for old in epoch_files(path.parent)[keep:] if keep else ():
        old.unlink(missing_ok=True)


def link_best(best: Path, epoch: int, resumed: Path) -> None:
    """Makes `best` the checkpoint of the best epoch so far, `epoch`, if it is not that already.

    It is searched beside `resumed`, the checkpoint that a run continues, since that may be another
    folder's, or an older epoch's, or the last that a kill left before best.pt was linked. Raises
    ValueError where no file has it.
    """
    reasons = []
    beside = (resumed, resumed.with_name("best.pt"), resumed.with_name(f"epoch-{epoch:04}.pt"))
    for path in (best, *beside):
        try:
            loop = read(path)["loop"]
            if (loop["epoch"], loop["batch"]) == (epoch, 0):
                if path != best:
                    link_atomically(path, best)
                return
        except (OSError, ValueError, KeyError) as error:
            reasons.append(str(error))
    raise ValueError(
        f"--resume: the best weights so far, of epoch {epoch}, should be beside the checkpoint as "
        "best.pt" + (f" ({reasons[0]})" if reasons else "")
    )


def epoch_files(folder: Path) -> list[Path]:
    """The checkpoints of single epochs in `folder`, the newest first."""
    found = [(match, path) for path in folder.glob("epoch-*.pt") if (match := _epoch(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _epoch(path: Path) -> int:
    """The number in epoch-NNNN.pt; 0 for other names."""
    match = EPOCH_FILE.fullmatch(path.name)
    return int(match[1]) if match else 0


def newest_good(folder: Path) -> tuple[Path, int] | None:
    """The readable checkpoint of the most steps in `folder`, and its steps; None without one."""
    best: tuple[Path, int] | None = None
    for path in [folder / "last.pt", folder / "best.pt", *epoch_files(folder)]:
        try:
            steps = int(read(path)["loop"]["step"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if best is None or steps > best[1]:
            best = (path, steps)
    return best


def read_to_resume(path: Path) -> dict[str, Any]:
    """Reads `path`; where it is damaged, the error names the newest good checkpoint beside it.

    Which one to continue from is for the user to decide. Raises as `read`.
    """
    try:
        return read(path, usual="last.pt")
    except (OSError, ValueError) as error:
        found = newest_good(path.parent) if path.parent.is_dir() else None
        if not found:
            raise
        raise ValueError(
            f"{error}; the newest good one is {found[0]}, of step {found[1]}: "
            f"continue from it with --resume {found[0]}"
        ) from None


def restore(content: dict[str, Any], model: AlexNet, trainer: Trainer, source: str | Path) -> None:
    """Sets `trainer` and its `model` to the point at which the checkpoint `content` was written.

    Raises ValueError that names `source` and what does not fit.
    """
    loop = content["loop"]
    wrong = [
        name
        for name, kind in LOOP_KINDS.items()
        if type(loop.get(name)) is not kind or (kind is int and loop[name] < 0)
    ]
    refusal = f"{source}: the state of the loop in it cannot be continued"
    if wrong or not all(isinstance(record, dict) for record in loop["history"]):
        raise ValueError(f"{refusal} ({', '.join(wrong) or 'history'})")
    load_model(content, model, source)
    load_velocity(content, model, trainer.optimizer, source)
    try:
        trainer.load_state_dict(loop)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{refusal} ({reason})") from None


def load_velocity(
    content: dict[str, Any],
    model: AlexNet,
    optimizer: torch.optim.Optimizer,
    source: str | Path = "checkpoint",
) -> None:
    """Gives `optimizer` the velocities of the columns of `model`.

    Raises ValueError that names the first velocity that is missing or has another shape.
    """
    velocity = content["velocity"]
    for name, mine in model.state_dict().items():
        if name not in velocity or velocity[name].shape != mine.shape:
            raise ValueError(
                f"{source}: the velocity of {name} is missing or not of shape {tuple(mine.shape)}"
            )
    for parameter, value in model.from_canonical(velocity).items():
        set_velocity(optimizer, parameter, value)
