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

import errno
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from alexnet_mp.config import Config
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.sgd2012 import set_velocity, velocity_of

FORMAT, VERSION = "alexnet_mp checkpoint", 1
KINDS = {
    "format": str,
    "version": int,
    "config": dict,
    "model": dict,
    "velocity": dict,
    "loop": dict,
    "data": dict,
}
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


class _Watched:
    """A file that remembers why a write failed: torch only says that it did."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.failure = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """torch.save to a temporary beside `path`, fsync, rename. OSError with the system's own reason where that fails.

    Beside it, since a rename does not cross file systems. A temporary that a kill has left is overwritten; nothing ever reads it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            watched = _Watched(file)
            try:
                torch.save(content, watched)
            except RuntimeError as error:
                raise watched.failure or OSError(
                    errno.EIO, str(error).strip().splitlines()[0]
                ) from None
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
    except OSError:  # a file system without hard links
        write_atomically(target, read(path))
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
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path}: not a file")
    try:  # not memory-mapped: a file that changes under a map kills the process
        _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what torch has to say of a foreign file is said in one line below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise ValueError(f"{path}: may not be read (permissions)") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for a damaged file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: not a readable checkpoint, damaged or of another program ({reason[0][:100]})"
        ) from None
    named = content.get("format") if isinstance(content, dict) else None
    if not isinstance(named, str) or named != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of alexnet_mp")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        found = " ".join(repr(content.get("version")).split())[:40]
        raise ValueError(
            f"{path}: a checkpoint of version {found}; this program reads version {VERSION}"
        )
    wrong = [name for name, kind in KINDS.items() if not isinstance(content.get(name), kind)]
    tensors = [*content["model"].items(), *content["velocity"].items()] if not wrong else []
    if wrong or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors
    ):
        raise ValueError(
            f"{path}: a checkpoint whose {' '.join(wrong) or 'tensors'} cannot be; written by another program?"
        )
    if not {"classes", "images"} <= content["data"].keys() or not all(
        isinstance(content["data"][name], list) for name in ("classes", "images")
    ):
        raise ValueError(
            f"{path}: a checkpoint that does not say what data it is of; written by another program?"
        )
    return content


def _verify(path: Path) -> None:
    """Compares every checksum in the file, which torch.load does not do: it takes a flipped bit in the weights as it is.

    Nothing in the file may be compressed, as nothing that torch.save writes is: reading needs no more memory than the file is long.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("its members are longer than the file")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")


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
        return read(path)
    except (OSError, ValueError) as error:
        found = newest_good(path.parent) if path.parent.is_dir() else None
        if not found:
            raise
        raise ValueError(
            f"{error}; the newest good one is {found[0]}, of step {found[1]}: continue from it with --resume {found[0]}"
        ) from None


def load_model(content: dict[str, Any], model: AlexNet, source: str | Path = "checkpoint") -> None:
    """Gives `model` its columns' weights. ValueError names the first tensor that is missing or does not fit."""
    for name, mine in model.state_dict().items():
        theirs = content["model"].get(name)
        if theirs is None or theirs.shape != mine.shape:
            found = "lacks it" if theirs is None else f"has {tuple(theirs.shape)}"
            raise ValueError(
                f"{source}: {name} should be {tuple(mine.shape)}, the file {found}; is this another network?"
            )
    model.load_state_dict({name: content["model"][name] for name in model.state_dict()})


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
