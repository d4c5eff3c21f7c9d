"""The files of a store: a folder of `header.json`, `labels.npy`, `places.npy` and one `images-SIDE.npy` a shelf.

A folder is written beside its name, synced and renamed, so that one of that name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

FORMAT, VERSION = "alexnet_mp store", 1
BLOCK = 256
"""Images that are worked on at once where a whole set is gone through."""


class Writer:
    """Writes a store's folder image by image: `with Writer(path, classes) as writer: writer.add(image, label)`.

    The folder appears under its name when the block ends, and not at all if the block raises.
    """

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        self.path, self.classes = Path(path), list(classes)
        if self.path.exists():
            raise FileExistsError(f"{self.path}: exists already; delete it or choose another name")
        self.temporary = beside(self.path)
        self.temporary.mkdir(parents=True)
        self.files: dict[int, IO[bytes]] = {}        # by side, in the order of the shelves
        self.counts: dict[int, int] = {}
        self.checksums: dict[str, int] = {}
        self.labels: list[int] = []
        self.places: list[tuple[int, int]] = []

    def add(self, image: np.ndarray, label: int) -> None:
        """One image, uint8 (3, side, side)."""
        side = image.shape[-1]
        if image.dtype != np.uint8 or image.shape != (3, side, side):
            raise ValueError(f"an image of {image.dtype} {image.shape}: a store takes uint8 (3, side, side)")
        name = f"images-{side}.npy"
        if side not in self.files:
            self.files[side] = (self.temporary / name).open("wb")
            self.files[side].write(_array_header(0, side))
            self.counts[side] = self.checksums[name] = 0
        data = np.ascontiguousarray(image).data
        self.files[side].write(data)
        self.checksums[name] = zlib.crc32(data, self.checksums[name])
        self.places.append((list(self.files).index(side), self.counts[side]))
        self.labels.append(label)
        self.counts[side] += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self.files.values():
                file.close()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _finish(self) -> None:
        for side, file in self.files.items():
            file.seek(0)
            file.write(_array_header(self.counts[side], side))
            file.close()
        for name, values in (("labels.npy", np.array(self.labels, np.int64)), ("places.npy", np.array(self.places, np.int64).reshape(-1, 2))):
            np.save(self.temporary / name, values)
            self.checksums[name] = zlib.crc32(values.tobytes())
        header = {"format": FORMAT, "version": VERSION, "classes": self.classes, "sides": list(self.files),
                  "counts": list(self.counts.values()), "checksums": self.checksums}
        (self.temporary / "header.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        publish(self.temporary, self.path)


def beside(path: Path) -> Path:
    """A name in the same folder for what is to become `path`; hidden, and this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Syncs everything in folder `temporary` and gives it its name, which must not exist."""
    for entry in [*temporary.rglob("*"), temporary]:
        _sync(entry)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":        # only there can a folder be opened
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def blocks(count: int) -> Iterator[range]:
    """The numbers below `count`, BLOCK at a time."""
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _array_header(count: int, side: int) -> bytes:
    """The .npy header of (count, 3, side, side), always 128 bytes long, so that it can be rewritten when the count is known."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 3, {side}, {side}), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


def read_header(path: Path) -> dict[str, Any]:
    """What header.json of the store `path` says. ValueError naming the file."""
    file = path / "header.json"
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise KeyError("format")
        if header["version"] != VERSION:
            raise ValueError(f"{file}: a store of version {header['version']}, this alexnet_mp reads version {VERSION}; pack the images again")
        if len(header["sides"]) == len(header["counts"]) and isinstance(header["checksums"], dict) and isinstance(header["classes"], list):
            return header
        raise KeyError("sides")
    except FileNotFoundError:
        raise ValueError(f"{file}: not there, so {path} is not a store") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{file}: damaged, or not the header of a store") from None


def open_array(path: Path, header: dict[str, Any], name: str, dtype: type, shape: tuple[int, ...], verify: bool) -> np.ndarray:
    """One array of the store, memory-mapped, of the type and shape that are expected. ValueError naming the file."""
    file = path / name
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False) if 0 not in shape else np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{file}: missing from the store; delete the folder and make it again") from None
    except (ValueError, EOFError, SyntaxError):
        raise ValueError(f"{file}: damaged (cut short, or not an array); delete the store's folder and make it again") from None
    if array.dtype != dtype or array.shape != shape or (verify and _checksum(array) != header["checksums"].get(name)):
        raise ValueError(f"{file}: damaged, it is not what the store's header says; delete the store's folder and make it again")
    return array


def _checksum(array: np.ndarray) -> int:
    checksum = 0
    for rows in blocks(len(array)):
        checksum = zlib.crc32(np.ascontiguousarray(array[rows.start:rows.stop]).data, checksum)
    return checksum
