"""The file of a checkpoint: one file holds the whole network, its velocities and the loop's state.

Contents (plain containers and tensors, read back with `weights_only=True`):
    format, version   mark the file as a checkpoint of this program
    config            the configuration, as `Config.to_dict` gives it
    model, velocity   canonical names of the state dict -> tensors of the whole network
    loop              the trainer's state: epoch, step, batches done in the epoch, sums, schedule,
                      early stopping, ... (empty in a network that was converted)
    data              classes, the number of images of each split and, where preprocessing needs
                      them, the `statistics` of the training images (mean_image, at the side that
                      batches are resized to, and covariance; else None)
"""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from alexnet_mp.config import Config
from alexnet_mp.config.errors import first_line
from alexnet_mp.config.files import atomic_writer, sync_folder, temporary_path
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.weights.network_file import NetworkFile, checked_statistics

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


def read(path: str | Path, usual: str = "best.pt") -> dict[str, Any]:
    """The contents of the checkpoint at `path`, on the CPU.

    `usual` is the file that the error suggests where `path` is the folder of a run. Raises
    FileNotFoundError, or ValueError that names the file and says why it cannot be used.
    """
    path = Path(path)
    check_is_file(path, usual)
    return checked(load_torch(path), path)


def load_torch(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU: containers and tensors, nothing else.

    Raises ValueError that names `path`.
    """
    try:  # not memory-mapped: a file that changes under a map kills the process
        _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says in one line what torch warns of
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise ValueError(f"{path}: may not be read (permissions)") from None
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        raise ValueError(
            f"{path}: not a readable checkpoint, damaged or of another program "
            f"({first_line(error)[:100]})"
        ) from None


def read_network(path: Path) -> NetworkFile:
    """The network in the checkpoint at `path`. Raises as `read`, and for what is not a network."""
    content = read(path)
    try:
        config = Config.from_dict(content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    statistics = content["data"].get("statistics")
    if statistics is not None and not isinstance(statistics, dict):
        raise ValueError(f"{path}: its statistics are not those of training images")
    return NetworkFile(
        path,
        config,
        content["model"],
        tuple(map(str, content["data"]["classes"])),
        checked_statistics(statistics, config, path),
    )


def write_network(network: NetworkFile, path: Path) -> None:
    """Writes `network` as a checkpoint without a run's state: it cannot be resumed."""
    data = {"classes": list(network.classes), "images": [], "statistics": network.statistics}
    write_atomically(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "config": network.config.to_dict(),
            "model": network.tensors,
            "velocity": {},
            "loop": {},
            "data": data,
        },
    )


def check_is_file(path: Path, usual: str = "best.pt") -> None:
    """FileNotFoundError or ValueError, naming `path`, where it is not a file."""
    if path.is_dir():
        names = [name for name in (usual, "best.pt", "last.pt") if (path / name).is_file()]
        raise ValueError(
            f"{path}: a folder, not a checkpoint"
            + (f"; did you mean {path / names[0]}?" if names else "; name a file, such as best.pt")
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError(f"{path}: not a file")


def checked(content: Any, path: Path) -> dict[str, Any]:
    """Returns `content`, read from `path`, if it is a checkpoint of this version, or ValueError."""
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
            f"{path}: a checkpoint whose {' '.join(wrong) or 'tensors'} cannot be; "
            "written by another program?"
        )
    if not {"classes", "images"} <= content["data"].keys() or not all(
        isinstance(content["data"][name], list) for name in ("classes", "images")
    ):
        raise ValueError(
            f"{path}: a checkpoint that does not say what data it is of; "
            "written by another program?"
        )
    return dict(content)


def _verify(path: Path) -> None:
    """Compares every checksum in the file: torch.load takes a flipped bit in the weights as it is.

    Nothing in the file may be compressed, and torch.save compresses nothing: reading then needs no
    more memory than the file is long.
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


def load_model(content: dict[str, Any], model: AlexNet, source: str | Path = "checkpoint") -> None:
    """`load_tensors` of the weights in the checkpoint `content`."""
    load_tensors(content["model"], model, source)


def load_tensors(
    tensors: Mapping[str, Tensor], model: AlexNet, source: str | Path = "checkpoint"
) -> None:
    """Copies the `tensors` of a whole network into `model`, which may hold only some columns.

    Raises ValueError that names the first tensor that is missing or has another shape.
    """
    for name, mine in model.state_dict().items():
        theirs = tensors.get(name)
        if theirs is None or theirs.shape != mine.shape:
            found = "lacks it" if theirs is None else f"has {tuple(theirs.shape)}"
            raise ValueError(
                f"{source}: {name} should be {tuple(mine.shape)}, the file {found}; "
                "is this another network?"
            )
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})


class _RecordingFile:
    """A file that keeps the error of a failed write: torch.save hides the system's reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Saves `content` to a temporary file beside `path`, syncs it, and renames it to `path`.

    Raises OSError with the system's own reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        recording = _RecordingFile(file)
        try:
            torch.save(content, cast("IO[bytes]", recording))
        except RuntimeError as error:
            raise recording.failure or OSError(
                errno.EIO, str(error).strip().splitlines()[0]
            ) from None


def link_atomically(path: Path, target: Path) -> None:
    """Makes `target` the same file as `path`, by a hard link where the file system has them.

    This is safe, since a checkpoint is only ever replaced, never changed in place.
    """
    temporary = temporary_path(target)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        write_atomically(target, read(path))
        return
    os.replace(temporary, target)
    sync_folder(target.parent)
