"""A store: a set of labeled uint8 RGB images, in memory or memory-mapped from a folder.

All images are square, channels first. They lie on shelves, arrays (count, 3, side, side): a packed set has one for each side
in each shard, and several sides only where images are smaller than 256, because a store never enlarges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.config.files import temporary_path
from alexnet_mp.data.decode import resize
from alexnet_mp.data.mapping import release
from alexnet_mp.data.shard_arrays import open_shelves, stored_bytes
from alexnet_mp.data.statistics import Statistics, Sums, sums_of
from alexnet_mp.data.store_format import (
    blocks,
    open_array,
    read_header,
)
from alexnet_mp.data.store_writer import StoreWriter

FITS = 2 * 10**9
"""Bytes of a resized copy that may be kept in memory."""


ForEachRow = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""Calls a function for each row, like `map`, perhaps on several threads; its result is to be iterated to the end."""


class Store:
    """Images, labels (int64) and class names; indexing is by `gather` only."""

    def __init__(
        self,
        shelves: Sequence[Any],
        labels: np.ndarray,
        classes: Sequence[str],
        places: np.ndarray | None = None,
        path: Path | None = None,
    ) -> None:
        """`places` (N, 2) gives each image's shelf and row; None: one shelf, in order. `path`: the folder that it was opened from."""
        if places is None:
            places = np.stack([np.zeros(len(labels), np.int64), np.arange(len(labels))], 1)
        self.shelves, self.places, self.labels = list(shelves), places, np.asarray(labels, np.int64)
        self.classes, self.path = tuple(classes), path
        self._statistics: dict[int, Statistics] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """The sides of the images that there are, ascending."""
        return tuple(sorted({self.shelves[k].shape[-1] for k in np.unique(self.places[:, 0])}))

    @cached_property
    def paths(self) -> list[str] | None:
        """Each image's file in the folder that was packed; None where the store was not made from one."""
        file = self.path / "paths.json" if self.path else None
        if file is None or not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        starts = np.cumsum([0, *map(len, self.shelves)])
        return [
            found[number] for number in (starts[self.places[:, 0]] + self.places[:, 1]).tolist()
        ]

    def image(self, index: int, side: int | None = None) -> np.ndarray:
        """uint8 (3, side, side); None: at its own side. It may be a view of memory or a file, which must not be written to."""
        shelf, row = self.places[index]
        image = self.shelves[shelf][row]
        return (
            image
            if side in (None, image.shape[-1])
            else resize(torch.from_numpy(image.copy())[None], side)[0].numpy()
        )

    def subset(self, indices: np.ndarray | Sequence[int]) -> Store:
        """A view of the images at `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        return Store(
            self.shelves, self.labels[indices], self.classes, self.places[indices], self.path
        )

    def gather(
        self,
        indices: np.ndarray | Sequence[int],
        side: int | None = None,
        *,
        pinned: bool = False,
        for_each_row: ForEachRow = map,
    ) -> Tensor:
        """uint8 (N, 3, side, side), on the CPU; None: the images' own side, ValueError where they have several.

        `pinned`: in memory from which CUDA copies without waiting. `run`: what calls a function of a row for each, e.g. a thread pool's map.
        """
        indices = np.asarray(indices, np.int64)
        if side is None and len(self.sides) > 1:
            raise ValueError(
                f"images of the sides {' '.join(map(str, self.sides))}: gather needs to know which one to resize them to"
            )
        side = side or (self.sides or (self.shelves[0].shape[-1],))[0]
        images = torch.empty((len(indices), 3, side, side), dtype=torch.uint8, pin_memory=pinned)
        target, others = images.numpy(), {}

        def copy(row: int) -> None:
            image = self.image(indices[row])
            if image.shape[-1] == side:
                target[row] = image
            else:
                others[row] = image

        for _ in for_each_row(copy, range(len(indices))):
            pass
        for own in {image.shape[-1] for image in others.values()}:
            rows = sorted(row for row, image in others.items() if image.shape[-1] == own)
            images[torch.tensor(rows)] = resize(
                torch.from_numpy(np.stack([others[row] for row in rows])), side
            )
        return images

    def resized(self, side: int) -> Store:
        """A copy in memory with all images at `side`; the store itself where they are so already or the copy would exceed FITS."""
        if self.sides == (side,) or not len(self) or len(self) * 3 * side * side > FITS:
            return self
        images = np.empty((len(self), 3, side, side), np.uint8)
        for rows in blocks(len(self)):
            images[rows.start : rows.stop] = self.gather(rows, side).numpy()
        return Store([images], self.labels, self.classes)

    def statistics(self, side: int) -> Statistics:
        """Of the images at `side`. Images below it are measured at their own side and their mean is enlarged.

        Computed once an instance; for a store that was opened from a folder, once for all in that folder, if it can be written.
        """
        if side not in self._statistics:
            digest = hashlib.blake2b(
                np.ascontiguousarray(self.places).tobytes() + str(side).encode(), digest_size=8
            ).hexdigest()
            file = self.path / f"statistics-{digest}.npz" if self.path else None
            self._statistics[side] = _read_statistics(file, side) or self._measure(side)
            _write_statistics(file, self._statistics[side])
        return self._statistics[side]

    def _measure(self, side: int) -> Statistics:
        whole = self._stored_sums() if side >= max(self.sides, default=0) else None
        if whole is not None:
            starts = np.cumsum([0, *map(len, self.shelves)])
            mine = np.zeros(starts[-1], bool)
            mine[starts[self.places[:, 0]] + self.places[:, 1]] = True
            if (
                mine.sum() == len(self) > len(mine) / 2
            ):  # what was held out or left is less work than what is in
                shelf = np.searchsorted(starts, others := np.flatnonzero(~mine), side="right") - 1
                rest = Store(
                    self.shelves,
                    np.zeros(len(others)),
                    self.classes,
                    np.stack([shelf, others - starts[shelf]], 1),
                )
                whole.merge(rest._sum(side), -1)
                return whole.statistics(side)
        return self._sum(side).statistics(side)

    def _sum(self, side: int) -> Sums:
        """Of the images, those above `side` reduced to it."""
        sums = Sums()
        own_sides = (
            np.array([shelf.shape[-1] for shelf in self.shelves])[self.places[:, 0]]
            if len(self)
            else np.empty(0)
        )
        for own in self.sides:
            mine = np.flatnonzero(own_sides == own)
            for rows in blocks(len(mine)):
                images = (
                    map(self.image, mine[rows.start : rows.stop])
                    if own <= side
                    else self.gather(mine[rows.start : rows.stop], side).numpy()
                )
                sums.merge(sums_of(images))
                self._release(mine[rows.start : rows.stop])
        return sums

    def _release(self, indices: np.ndarray) -> None:
        """Gives back the memory of the shards that hold `indices`, where they are mapped files."""
        for shelf in np.unique(self.places[indices, 0]):
            release(stored_bytes(self.shelves[shelf], 0, len(self.shelves[shelf])))

    def _stored_sums(self) -> Sums | None:
        """Those that were taken of all images in the store's folder when it was packed."""
        if self.path is None:
            return None
        with contextlib.suppress(
            OSError, KeyError, ValueError
        ):  # missing or damaged: measuring mends it
            content = (self.path / "sums.npz").read_bytes()
            if zlib.crc32(content) == read_header(self.path)["checksums"]["sums.npz"]:
                sums = Sums.from_bytes(content)
                return sums if sums.count == sum(map(len, self.shelves)) else None
        return None

    def save(self, path: str | Path) -> None:
        """Writes the store as a new folder `path`. FileExistsError if there is one."""
        with StoreWriter(path, self.classes) as writer:
            for i in range(len(self)):
                writer.add(self.image(i), int(self.labels[i]))

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Store:
        """The store in folder `path`, memory-mapped. ValueError naming the file that is missing, damaged or not a store's.

        Sizes and labels are always checked; `verify` reads all pixels too.
        """
        path = Path(path)
        header = read_header(path)
        shelves = open_shelves(path, header, verify)
        total = sum(map(len, shelves))
        labels, places = (
            np.array(open_array(path, name, np.int64, shape, header["checksums"].get(name)))
            for name, shape in (("labels.npy", (total,)), ("places.npy", (total, 2)))
        )
        return Store(shelves, labels, header["classes"], places, path)


def _read_statistics(file: Path | None, side: int) -> Statistics | None:
    if file is None or not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as values:
            statistics = Statistics(
                torch.from_numpy(values["mean_image"]), torch.from_numpy(values["covariance"])
            )
        return statistics if statistics.mean_image.shape == (3, side, side) else None
    except Exception:  # numpy raises many kinds for a damaged file; measuring again mends it
        return None


def _write_statistics(file: Path | None, statistics: Statistics) -> None:
    if file is None or file.exists():
        return
    temporary = temporary_path(file).with_suffix(".npz")
    with contextlib.suppress(OSError):  # a read-only store: measured again at the next start
        np.savez(
            temporary,
            mean_image=statistics.mean_image.numpy(),
            covariance=statistics.covariance.numpy(),
        )
        os.replace(temporary, file)
