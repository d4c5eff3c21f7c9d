"""Writes the files of a store: shard by shard, the header last."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
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
from alexnet_mp.data import store_format
from alexnet_mp.data.store_format import FORMAT, VERSION, shard_name


class EncodedImage(NamedTuple):
    """One image as it is stored."""

    side: int
    data: np.ndarray | bytes
    """uint8 (3, side, side), or the bytes of a JPEG."""


class WrittenShard(NamedTuple):
    """Name, checksum and contents of a written shard."""

    entry: dict[str, Any]
    """Its entry in the header: sides, counts, bytes and checksum."""
    order: np.ndarray
    """int64 (N,): which of the images stands at each place, smaller sides first."""
    ends: np.ndarray
    """int64 (N,): where the image at each place ends, in bytes."""


def write_shard(path: Path, images: Sequence[EncodedImage]) -> WrittenShard:
    """Writes `images` as the shard `path`. OSError that names it where the system refuses."""
    sides = [image.side for image in images]
    order = np.argsort(sides, kind="stable")
    parts = [memoryview(images[k].data).cast("B") for k in order]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    checksum, total = 0, int(ends[-1]) if len(images) else 0
    with atomic_writer(path) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        )
        for part in parts:
            file.write(part)
            checksum = zlib.crc32(part, checksum)
    found, counts = np.unique(sides, return_counts=True)
    entry = {
        "sides": found.tolist(),
        "counts": counts.tolist(),
        "bytes": total,
        "checksum": checksum,
    }
    return WrittenShard(entry, order, ends)


class StoreIndex:
    """Collects what a store's header and arrays say of its images, in the images' order."""

    def __init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self._labels: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._arrays = 0

    def add(
        self,
        entry: Mapping[str, Any],
        order: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        ends: np.ndarray | None = None,
    ) -> None:
        """Adds the next shard: its `entry` in the header, and the labels of its images.

        The image at its k-th place is the `order[k]`-th of `labels`. `ends`: as in WrittenShard, of
        JPEGs only.
        """
        counts = entry["counts"]
        places = np.empty((len(labels), 2), np.int64)
        places[order, 0] = self._arrays + np.repeat(np.arange(len(counts)), counts)
        rows = [np.arange(count) for count in counts]
        places[order, 1] = np.concatenate([np.empty(0, np.int64), *rows])
        self.shards.append(dict(entry))
        self._labels.append(np.asarray(labels, np.int64))
        self._places.append(places)
        self._arrays += len(counts)
        if ends is not None:
            self._ends.append(ends)

    def write(
        self,
        folder: Path,
        classes: Sequence[str],
        checksums: Mapping[str, int] | None = None,
        **more: Any,
    ) -> None:
        """Writes the arrays of the store `folder`, then its header, which also holds `more`.

        `checksums`: of other files of the store, which are written already.
        """
        arrays = {
            "labels.npy": np.concatenate([np.empty(0, np.int64), *self._labels]),
            "places.npy": np.concatenate([np.empty((0, 2), np.int64), *self._places]),
        }
        if self._ends:
            arrays["ends.npy"] = np.concatenate(self._ends)
        sums = dict(checksums or {})
        for name, values in arrays.items():
            content = io.BytesIO()
            np.save(content, values)
            write_atomically(folder / name, content.getvalue())
            sums[name] = zlib.crc32(values.tobytes())
        header = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(classes),
            "shards": self.shards,
            "checksums": sums,
        } | more
        write_atomically(folder / "header.json", json.dumps(header, indent=1) + "\n")


class StoreWriter:
    """Writes a new store image by image.

        with StoreWriter(path, classes) as writer:
            writer.add(image, label)

    The folder appears under its name when the block ends, and not at all if the block raises.
    """

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        """FileExistsError if there is a `path`."""
        self.path, self.classes = Path(path), list(classes)
        if self.path.exists():
            raise FileExistsError(f"{self.path}: exists already; delete it or choose another name")
        self._temporary = temporary_path(self.path)
        self._temporary.mkdir(parents=True)
        self._index = StoreIndex()
        self._images: list[EncodedImage] = []  # of the next shard
        self._labels: list[int] = []

    def add(self, image: np.ndarray, label: int) -> None:
        """Adds one image, uint8 (3, side, side). ValueError for another type or shape."""
        side = image.shape[-1]
        if image.dtype != np.uint8 or image.shape != (3, side, side):
            raise ValueError(
                f"an image of {image.dtype} {image.shape}: a store takes uint8 (3, side, side)"
            )
        self._images.append(EncodedImage(side, image.copy()))
        self._labels.append(label)
        if len(self._images) == store_format.SHARD:
            self._write_shard()

    def _write_shard(self) -> None:
        path = self._temporary / shard_name(len(self._index.shards))
        shard = write_shard(path, self._images)
        self._index.add(shard.entry, shard.order, self._labels)
        self._images, self._labels = [], []

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self._images:
                    self._write_shard()
                self._index.write(self._temporary, self.classes)
                commit_folder(self._temporary, self.path)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
