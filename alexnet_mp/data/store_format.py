"""The files of a store, a folder, written in an order that makes a kill at any moment harmless.

header.json         format, version, classes, encoding, what every shard holds, checksums; written last: without it there is no store
images-00000.npy    a shard, a flat array of bytes: up to SHARD images, those of one side behind each other, smaller sides first
labels.npy          int64 (N,), the images' classes
places.npy          int64 (N, 2), each image's shelf (all images of one side in one shard) and its row there
ends.npy            int64 (N,), JPEG only: where each image ends in its shard, shelf after shelf
paths.json          each image's file in the folder that was packed, if one was
sums.npz            exact sums over all images, from which statistics come without another pass, if they were taken
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from alexnet_mp.config.files import (
    atomic_writer,
    commit_folder,
    temporary_path,
    write_atomically,
)
from alexnet_mp.data.mapping import map_file, release

FORMAT, VERSION = "alexnet_mp store", 2
SHARD = 1024
"""Images in a shard: 200 MB at 256 pixels, held in memory until the shard is written."""
BLOCK = 256
"""Images that are worked on at once where a whole set is gone through."""


NPY_HEADER = 4096
"""Bytes in which the header of a .npy file ends; those of a store's arrays take 128."""


class EncodedImage(NamedTuple):
    """One image as it is stored."""

    side: int
    data: Any  # uint8 array (3, side, side), or the bytes of a JPEG


class StoreIndex:
    """What a header and its arrays say of the images: grows shard by shard, in the images' order."""

    def __init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.labels: list[int] = []
        self.places: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.shelves = 0

    def add(
        self,
        entry: dict[str, Any],
        order: np.ndarray,
        labels: Sequence[int],
        ends: np.ndarray | None = None,
    ) -> None:
        """The shard `entry`, whose k-th image is the `order[k]`-th of `labels`."""
        places = np.empty((len(labels), 2), np.int64)
        shelf = np.repeat(np.arange(len(entry["counts"])), entry["counts"])
        places[order, 0] = self.shelves + shelf
        places[order, 1] = np.concatenate(
            [np.arange(count) for count in entry["counts"]] or [np.arange(0)]
        )
        self.shards.append(entry)
        self.labels += labels
        self.places.append(places)
        self.shelves += len(entry["sides"])
        if ends is not None:
            self.ends.append(ends)

    def write(self, folder: Path, classes: Sequence[str], **more: Any) -> None:
        """Writes the arrays of the store `folder` and then its header, which also holds `more`; files named in `more["checksums"]` are there."""
        arrays = {
            "labels.npy": np.array(self.labels, np.int64),
            "places.npy": np.concatenate([np.empty((0, 2), np.int64), *self.places]),
        }
        if self.ends:
            arrays["ends.npy"] = np.concatenate(self.ends)
        checksums = dict(more.pop("checksums", {}))
        for name, values in arrays.items():
            write_atomically(folder / name, _npy(values))
            checksums[name] = zlib.crc32(values.tobytes())
        header = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(classes),
            "shards": self.shards,
            "checksums": checksums,
        } | more
        write_atomically(folder / "header.json", (json.dumps(header, indent=1) + "\n").encode())


class Writer:
    """Writes a store's folder image by image: `with Writer(path, classes) as writer: writer.add(image, label)`.

    The folder appears under its name when the block ends, and not at all if the block raises.
    """

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        self.path, self.classes = Path(path), list(classes)
        if self.path.exists():
            raise FileExistsError(f"{self.path}: exists already; delete it or choose another name")
        self.temporary = temporary_path(self.path)
        self.temporary.mkdir(parents=True)
        self.contents = StoreIndex()
        self.waiting: list[EncodedImage] = []
        self.labels: list[int] = []

    def add(self, image: np.ndarray, label: int) -> None:
        """One image, uint8 (3, side, side)."""
        side = image.shape[-1]
        if image.dtype != np.uint8 or image.shape != (3, side, side):
            raise ValueError(
                f"an image of {image.dtype} {image.shape}: a store takes uint8 (3, side, side)"
            )
        self.waiting.append(EncodedImage(side, image.copy()))
        self.labels.append(label)
        if len(self.waiting) == SHARD:
            self._flush()

    def _flush(self) -> None:
        self.contents.add(
            *write_shard(self.temporary / shard_name(len(self.contents.shards)), self.waiting)[:2],
            self.labels,
        )
        self.waiting, self.labels = [], []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self.waiting:
                    self._flush()
                self.contents.write(self.temporary, self.classes)
                commit_folder(self.temporary, self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)


def shard_name(number: int) -> str:
    return f"images-{number:05d}.npy"


def write_shard(
    path: Path, images: Sequence[EncodedImage]
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Writes `images` as the shard `path`: its entry in the header, which image stands at each place in it, and where it ends."""
    order = np.argsort([image.side for image in images], kind="stable")
    sides, counts = np.unique([image.side for image in images], return_counts=True)
    ends = np.cumsum([len(memoryview(images[i].data).cast("B")) for i in order], dtype=np.int64)
    checksum, total = 0, int(ends[-1]) if len(images) else 0
    with atomic_writer(path) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        )
        for i in order:
            data = memoryview(images[i].data).cast("B")
            file.write(data)
            checksum = zlib.crc32(data, checksum)
    return (
        {"sides": sides.tolist(), "counts": counts.tolist(), "bytes": total, "checksum": checksum},
        order,
        ends,
    )


def blocks(count: int) -> Iterator[range]:
    """The numbers below `count`, BLOCK at a time."""
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def read_header(path: Path) -> dict[str, Any]:
    """What header.json of the store `path` says. ValueError naming the file."""
    file = path / "header.json"
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise KeyError("format")
        if header["version"] != VERSION:
            raise ValueError(
                f"{file}: a store of version {header['version']}, this alexnet_mp reads version {VERSION}; pack the images again"
            )
        shards = header["shards"]
        if (
            isinstance(header["checksums"], dict)
            and isinstance(header["classes"], list)
            and all(
                len(shard["sides"]) == len(shard["counts"])
                and shard["bytes"] >= 0
                and "checksum" in shard
                for shard in shards
            )
        ):
            return header
        raise KeyError("shards")
    except FileNotFoundError:
        raise ValueError(
            f"{file}: not there, so {path} is not a store, or not a finished one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{file}: damaged, or not the header of a store") from None


def open_array(
    path: Path, name: str, dtype: type, shape: tuple[int, ...], checksum: int | None
) -> np.ndarray:
    """One array of the store, memory-mapped, of the type and shape that are expected. ValueError naming the file.

    `checksum`: what that of the bytes must be; None does not read them.
    """
    file = path / name
    try:
        content = map_file(file)
    except FileNotFoundError:
        raise ValueError(
            f"{file}: missing from the store; delete the folder and make it again"
        ) from None
    try:
        array = _array_in(content)
        release(content)  # the header's pages, and those that the system read along with them
    except Exception:  # NumPy raises many kinds for a damaged file, tokenize's among them
        raise ValueError(
            f"{file}: damaged (cut short, or not an array); delete the store's folder and make it again"
        ) from None
    if (
        array.dtype != dtype
        or array.shape != shape
        or (checksum is not None and checksum_of(array) != checksum)
    ):
        raise ValueError(
            f"{file}: damaged, it is not what the store's header says; delete the store's folder and make it again"
        )
    return array


def _array_in(content: np.ndarray) -> np.ndarray:
    """The array in the bytes of a .npy file, without a copy."""
    header = io.BytesIO(content[:NPY_HEADER].tobytes())
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
    if fortran_order or dtype.hasobject:
        raise ValueError("not an array of plain numbers in C order")
    return content[header.tell() :].view(dtype).reshape(shape)


def checksum_of(array: np.ndarray) -> int:
    """CRC-32 of the bytes of an array, which may be memory-mapped."""
    data, checksum = np.ascontiguousarray(array).reshape(-1).view(np.uint8), 0
    for start in range(0, len(data), 2**24):
        block = data[start : start + 2**24]
        checksum = zlib.crc32(block.data, checksum)
        release(block)
    return checksum
