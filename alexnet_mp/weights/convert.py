"""Reads a network from a file of any known format, and writes it in any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alexnet_mp.config import Config
from alexnet_mp.weights import (
    caffe,
    caffe_tensorflow,
    checkpoint_file,
    onnx_file,
    safetensors_file,
    torch_file,
)
from alexnet_mp.weights.network_file import NetworkFile


@dataclass(frozen=True)
class Format:
    """The functions that read and write one kind of file."""

    name: str
    """What the file is called in messages."""
    read: Callable[[Path, Config | None], NetworkFile]
    """Reads a file; the configuration, or None, says what the network computes."""
    write: Callable[[NetworkFile, Path], None]
    suffix: str = ""
    """The end of names that are written in this format if no other is asked for."""


FORMATS: dict[str, Format] = {
    "checkpoint": Format(
        "a checkpoint of alexnet_mp",
        lambda path, _: checkpoint_file.read_network(path),
        checkpoint_file.write_network,
        ".pt",
    ),
    "safetensors": Format(
        "a safetensors file",
        lambda path, _: safetensors_file.read(path),
        safetensors_file.write,
        ".safetensors",
    ),
    "grouped": Format(
        "a plain state dict", torch_file.read_grouped, torch_file.write_grouped, ".pth"
    ),
    "torchvision": Format(
        "torchvision's state dict", torch_file.read_torchvision, torch_file.write_torchvision
    ),
    "onnx": Format("an ONNX model", onnx_file.read, onnx_file.write, ".onnx"),
    "caffe": Format("a .caffemodel", caffe.read, caffe.write, ".caffemodel"),
    "npy": Format(
        "a .npy of caffe-tensorflow", caffe_tensorflow.read, caffe_tensorflow.write, ".npy"
    ),
}


def read_network_file(
    path: str | Path, kind: str | None = None, base: Config | None = None
) -> NetworkFile:
    """Reads the network in `path`, in the format `kind`, or in that which the content shows.

    `base` says what the network computes, for formats that do not say it. Raises FileNotFoundError,
    or ValueError that names the file and says why it cannot be used.
    """
    path = Path(path)
    checkpoint_file.check_is_file(path)
    return FORMATS[kind or detect(path)].read(path, base)


def write_network_file(network: NetworkFile, path: str | Path, kind: str | None = None) -> None:
    """Writes `network` to `path`, in the format `kind`, or in that of the name's end.

    Raises ValueError where the format cannot say what the network computes, OSError where the file
    cannot be written.
    """
    path = Path(path)
    if kind is None:
        kinds = {format.suffix: kind for kind, format in FORMATS.items() if format.suffix}
        kind = kinds.get(path.suffix.lower())
        if kind is None:
            raise ValueError(
                f"{path}: no format has names with this end; name one with --to "
                f"({', '.join(FORMATS)}), or end the name in {', '.join(kinds)}"
            )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"{path}: " + ("a folder" if path.is_dir() else f"there is no folder {path.parent}")
        )
    FORMATS[kind].write(network, path)


def detect(path: Path) -> str:
    """The format of the file at `path`, by its content. Raises ValueError that says what it is."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not start:
        raise ValueError(f"{path}: an empty file")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: not the weights but a Git LFS pointer; fetch the file with `git lfs pull`"
        )
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_torch_file(path)
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if start.startswith(caffe_tensorflow.MAGIC):
        return "npy"
    content = path.read_bytes()
    if onnx_file.is_onnx(content):  # first: a field of it looks like Caffe's layers
        return "onnx"
    if caffe.is_caffe(content):
        return "caffe"
    if start.startswith(b"\x80\x02"):
        raise ValueError(
            f"{path}: a file of torch before version 1.6; save it anew with torch.save("
            "torch.load(FILE, weights_only=True), FILE)"
        )
    raise ValueError(f"{path}: not weights of a known format ({', '.join(FORMATS)})")


def _kind_of_torch_file(path: Path) -> str:
    content = checkpoint_file.load_torch(path)
    if isinstance(content, dict) and isinstance(content.get("format"), str):
        return "checkpoint"
    state = torch_file.state_dict_of(content, path)
    return "torchvision" if torch_file.is_torchvision(state) else "grouped"


def with_classes(network: NetworkFile, file: str | Path) -> NetworkFile:
    """`network` with the class names in `file`, one a line, in the order of the logits.

    Raises ValueError or OSError that names the file.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--classes {file}: cannot be read ({reason})") from None
    names = tuple(line.strip() for line in lines if line.strip())
    logits = network.config.model.classes
    if len(names) != logits:
        raise ValueError(f"--classes {file}: {len(names)} names for {logits} logits")
    return dataclasses.replace(network, classes=names)
