"""One file holds the whole network, its velocities and the loop's state, whatever the placement that wrote it.

Contents (plain containers and tensors, read back with `weights_only=True`):
    format, version   what this file is
    config            the configuration, as `Config.to_dict` gives it
    model, velocity   canonical names of the state dict -> tensors of the whole network
    loop              the trainer's state: epoch, step, batches done in the epoch, sums, schedule, early stopping, ...
    data              what the run was fed: classes, the number of images, and, where preprocessing needs them, the `statistics` of
                      the training images (mean_image, at the side that batches are resized to, and covariance; else None)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from alexnet_mp.config import Config
from alexnet_mp.distributed import Placement
from alexnet_mp.model import AlexNet
from alexnet_mp.optim import set_velocity, velocity_of

FORMAT, VERSION = "alexnet_mp checkpoint", 1
KEYS = {"format", "version", "config", "model", "velocity", "loop", "data"}


def save(path: Path, placement: Placement, model: AlexNet, optimizer: torch.optim.Optimizer, config: Config,
         loop: dict[str, Any], data: dict[str, Any], best_path: Path | None = None) -> None:
    """Writes the checkpoint; every rank calls it. With `best_path` the same file is to be found there too.

    Written beside the target, synced and renamed: a kill or a full disk leaves the file that was there before.
    Raises OSError, on all ranks alike, naming the path.
    """
    parts = {"model": model.canonical(lambda p: p.detach()), "velocity": model.canonical(lambda p: velocity_of(optimizer, p))}
    whole = {name: placement.collect(part) for name, part in parts.items()}
    failure = None
    if placement.main:
        content = {"format": FORMAT, "version": VERSION, "config": config.to_dict(), **whole, "loop": loop, "data": data}
        try:
            write_atomically(path, content)
            if best_path is not None:
                link_atomically(path, best_path)
        except (OSError, RuntimeError) as error:      # torch reports a failed write as RuntimeError
            failure = f"{path}: the checkpoint could not be written ({str(error).strip().splitlines()[0]}); the one before it is intact"
    failure = placement.gather(failure)[0]
    if failure:
        raise OSError(failure)


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """torch.save to a temporary beside `path`, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def link_atomically(path: Path, target: Path) -> None:
    """Makes `target` the same file as `path`. Safe, since a checkpoint is only ever replaced, never changed in place."""
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:                      # a file system without hard links
        write_atomically(target, torch.load(path, weights_only=True))
        return
    os.replace(temporary, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut (where the system can)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. FileNotFoundError, or ValueError naming the file and what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a checkpoint; did you mean {path / 'last.pt'}?")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:       # not memory-mapped: reading checks the file's checksums, and a file that changes under a map kills the process
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:           # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a readable checkpoint, damaged or of another program ({reason[0][:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not set(content) >= KEYS:
        raise ValueError(f"{path}: not a checkpoint of alexnet_mp")
    if content["version"] != VERSION:
        raise ValueError(f"{path}: a checkpoint of version {content['version']}; this program reads version {VERSION}")
    return content


def load_model(content: dict[str, Any], model: AlexNet, source: str | Path = "checkpoint") -> None:
    """Gives `model` its columns' weights. ValueError names the first tensor that is missing or does not fit."""
    for name, mine in model.state_dict().items():
        theirs = content["model"].get(name)
        if theirs is None or theirs.shape != mine.shape:
            found = "lacks it" if theirs is None else f"has {tuple(theirs.shape)}"
            raise ValueError(f"{source}: {name} should be {tuple(mine.shape)}, the file {found}; is this another network?")
    model.load_state_dict({name: content["model"][name] for name in model.state_dict()})


def load_velocity(content: dict[str, Any], model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimiser the velocities of the columns here."""
    for parameter, value in model.from_canonical(content["velocity"]).items():
        set_velocity(optimizer, parameter, value)

