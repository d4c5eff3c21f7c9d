"""The files of a store, which is a folder, and how they are read.

header.json       format, version, classes, encoding, the shards' contents, checksums; written last
images-00000.npy  a shard, a flat array of bytes: up to SHARD images, smaller sides first
labels.npy        int64 (N,), the images' classes
places.npy        int64 (N, 2), each image's array (one side of one shard) and its row there
ends.npy          int64 (N,), JPEG only: where each image ends in its shard, array after array
paths.json        each image's name in the set that was packed, if one was: CLASS/FILE, without the
                  extension, in which the forms of a set differ
sums.npz          exact sums over all images, if they were taken: statistics then need no other pass

A folder without a header is no store, so a kill while one is written does no harm.
"""

from __future__ import annotations

import functools
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_mp.data.mapping import map_file, release

FORMAT, VERSION = "alexnet_mp store", 2
SHARD = 1024
"""Images in a shard: 200 MB at 256 pixels, held in memory until the shard is written."""
BEGUN = ".begun-"
"""Begins the name of a file with images of a shard that come out of order."""
BLOCK = 256
"""Images that are worked on at once in a pass over a whole set."""
NPY_HEADER = 4096
"""Bytes in which the header of a .npy file ends; those of a store's arrays take 128."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"images-{number:05d}.npy"


def blocks(count: int) -> Iterator[range]:
    """The numbers below `count`, BLOCK at a time."""
    return (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def read_header(path: Path) -> dict[str, Any]:
    """The content of header.json of the store `path`. ValueError naming the file."""
    file = path / "header.json"
    try:
        header: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise KeyError("format")
        if header["version"] != VERSION:
            raise ValueError(
                f"{file}: a store of version {header['version']}, this alexnet_mp reads version "
                f"{VERSION}; pack the images again"
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
            f"{file}: not there, so {path} is no store, or not a finished one"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{file}: damaged, or not the header of a store") from None


def open_array(
    path: Path, name: str, dtype: type, shape: tuple[int, ...], checksum: int | None
) -> np.ndarray:
    """An array of the store `path`, memory-mapped, whose type and shape must be `dtype` and
    `shape`.

    `checksum`: that of its bytes, which are then all read; None reads nothing. ValueError naming
    the file.
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
            f"{file}: damaged (cut short, or not an array); "
            "delete the store's folder and make it again"
        ) from None
    if (
        array.dtype != dtype
        or array.shape != shape
        or (checksum is not None and checksum_of(array) != checksum)
    ):
        raise ValueError(
            f"{file}: damaged, it is not what the store's header says; "
            "delete the store's folder and make it again"
        )
    return array


def _array_in(content: np.ndarray) -> np.ndarray:
    """The array in the bytes of a .npy file, without a copy."""
    magic, length = np.lib.format.MAGIC_LEN, 2
    size = int.from_bytes(content[magic : magic + length].tobytes(), "little")
    start = magic + length + min(size, NPY_HEADER)
    shape, dtype = _parsed_header(content[:start].tobytes())
    return content[start:].view(dtype).reshape(shape)


@functools.lru_cache(16)  # most shards of a store have the same header, and parsing is slow
def _parsed_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type in the header of a .npy file. ValueError for other than plain numbers."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype.hasobject:
        raise ValueError("not an array of plain numbers in C order")
    return shape, dtype


def checksum_of(array: np.ndarray) -> int:
    """CRC-32 of the bytes of an array, which may be memory-mapped."""
    data, checksum = np.ascontiguousarray(array).reshape(-1).view(np.uint8), 0
    for start in range(0, len(data), 2**24):
        block = data[start : start + 2**24]
        checksum = zlib.crc32(block.data, checksum)
        release(block)
    return checksum
