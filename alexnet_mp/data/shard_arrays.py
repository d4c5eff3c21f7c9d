"""Array backends of a store: in memory, memory-mapped, or behind a JPEG decoder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_mp.data.decode import decode_jpeg
from alexnet_mp.data.store_format import open_array, shard_name


class JpegArray:
    """Images of one side as JPEGs behind each other, decoded one by one as they are asked for, in
    the thread that asks.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray, side: int, name: Path) -> None:
        """`data`: uint8 (bytes,); image k ends at `ends[k + 1]`, where the next one starts. `name`:
        for messages.
        """
        self.data, self.ends, self.name = data, ends, name
        self.shape = (len(ends) - 1, 3, side, side)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """uint8 (3, side, side), channels last in memory."""
        with contextlib.suppress(RuntimeError):
            image = decode_jpeg(self.data[self.ends[row] : self.ends[row + 1]]).numpy()
            if image.shape == self.shape[1:]:
                return image
        raise ValueError(
            f"{self.name}: damaged at image {row}; delete the store's folder and make it again"
        )


ImageArray = np.ndarray | JpegArray
"""All images of one side in one shard: uint8 (count, 3, side, side), or JPEGs that read as such."""


def stored_bytes(array: ImageArray, first: int, last: int) -> np.ndarray:
    """The memory in which images `first` to `last` - 1 of a array lie, as they are stored."""
    if isinstance(array, JpegArray):
        return array.data[array.ends[first] : array.ends[last]]
    return array[first:last]


def open_image_arrays(path: Path, header: dict[str, Any], verify: bool) -> list[ImageArray]:
    """The arrays of the store in `path`, memory-mapped; `verify` reads all their bytes.

    ValueError naming the file that is missing or damaged.
    """
    ends = None
    if header.get("encode", "raw") == "jpeg":
        total = sum(sum(shard["counts"]) for shard in header["shards"])
        checksum = header["checksums"].get("ends.npy")
        ends = np.array(open_array(path, "ends.npy", np.int64, (total,), checksum))
    arrays: list[ImageArray] = []
    images = 0
    for number, shard in enumerate(header["shards"]):
        name = shard_name(number)
        checksum = shard["checksum"] if verify else None
        data = open_array(path, name, np.uint8, (shard["bytes"],), checksum)
        start = 0
        for side, count in zip(shard["sides"], shard["counts"], strict=True):
            if ends is not None:
                own = np.concatenate([[start], ends[images : images + count]])
                arrays.append(JpegArray(data, own, side, path / name))
                start = int(own[-1])
            elif (stop := start + count * 3 * side * side) <= len(data):
                arrays.append(data[start:stop].reshape(count, 3, side, side))
                start = stop
            images += count
        if start != len(data):
            raise ValueError(
                f"{path / name}: damaged, it is not what the store's header says; "
                "delete the store's folder and make it again"
            )
    return arrays
