"""A store: a set of labeled uint8 RGB images, in memory or memory-mapped from a folder.

All images are square, channels first, in arrays (count, 3, side, side). A packed set has an array
for each side in each shard; it has several sides only where images are smaller than 256, because a
store never enlarges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.data import store_statistics
from alexnet_mp.data.decode import resize
from alexnet_mp.data.mapping import release
from alexnet_mp.data.shard_arrays import ImageArray, open_image_arrays, stored_bytes
from alexnet_mp.data.statistics import Statistics
from alexnet_mp.data.store_format import blocks, open_array, read_header
from alexnet_mp.data.store_writer import StoreWriter

IN_MEMORY = 2 * 10**9
"""Bytes of a resized copy that may be kept in memory."""

ForEachRow = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]
"""Calls a function for each row, like `map`, perhaps on several threads; its result is to be
iterated to the end.
"""


class Store:
    """Images, their labels and the names of the classes."""

    def __init__(
        self,
        arrays: Sequence[ImageArray],
        labels: np.ndarray,
        classes: Sequence[str],
        places: np.ndarray | None = None,
        path: Path | None = None,
    ) -> None:
        """`places`, int64 (N, 2): each image's array and its row there; None: one array, in order.

        `path`: the folder that the store was opened from.
        """
        if places is None:
            places = np.stack([np.zeros(len(labels), np.int64), np.arange(len(labels))], 1)
        self.arrays, self.places, self.labels = list(arrays), places, np.asarray(labels, np.int64)
        self.classes, self.path = tuple(classes), path
        self._statistics: dict[int, Statistics] = {}

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Store:
        """The store in the folder `path`, memory-mapped.

        Sizes and labels are always checked; `verify` reads all pixels too. ValueError naming the
        file that is missing, damaged or not a store's.
        """
        path = Path(path)
        header = read_header(path)
        arrays = open_image_arrays(path, header, verify)
        total = sum(map(len, arrays))
        labels, places = (
            np.array(open_array(path, name, np.int64, shape, header["checksums"].get(name)))
            for name, shape in (("labels.npy", (total,)), ("places.npy", (total, 2)))
        )
        return Store(arrays, labels, header["classes"], places, path)

    def save(self, path: str | Path) -> None:
        """Writes the store as a new folder `path`. FileExistsError if there is one."""
        with StoreWriter(path, self.classes) as writer:
            for i in range(len(self)):
                writer.add(self.image(i), int(self.labels[i]))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """The sides of the images, ascending, each once."""
        return tuple(sorted({self.arrays[k].shape[-1] for k in np.unique(self.places[:, 0])}))

    @cached_property
    def paths(self) -> list[str] | None:
        """Each image's CLASS/FILE, without extension, if the store was packed; else None."""
        file = self.path / "paths.json" if self.path else None
        if file is None or not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return [found[number] for number in self.numbers().tolist()]

    def numbers(self) -> np.ndarray:
        """int64 (N,): each image's number among those of all arrays, which a subset has in part."""
        starts = np.cumsum([0, *map(len, self.arrays)])
        numbers: np.ndarray = starts[self.places[:, 0]] + self.places[:, 1]
        return numbers

    def image(self, index: int, side: int | None = None) -> np.ndarray:
        """uint8 (3, side, side), a view or a copy, not to be written to; None: at its own side."""
        array, row = self.places[index]
        image: np.ndarray = self.arrays[array][row]
        if side is None or side == image.shape[-1]:
            return image
        resized: np.ndarray = resize(torch.from_numpy(image.copy())[None], side)[0].numpy()
        return resized

    def subset(self, indices: np.ndarray | Sequence[int]) -> Store:
        """A view of the images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        labels, places = self.labels[chosen], self.places[chosen]
        return Store(self.arrays, labels, self.classes, places, self.path)

    def gather(
        self,
        indices: np.ndarray | Sequence[int],
        side: int | None = None,
        *,
        pinned: bool = False,
        for_each_row: ForEachRow = map,
    ) -> Tensor:
        """uint8 (N, 3, side, side), on the CPU. None: the images' own side; ValueError where they
        have several.

        `pinned`: in memory from which CUDA copies without waiting. `for_each_row` calls a function
        for each row, e.g. a thread pool's map.
        """
        if side is None and len(self.sides) > 1:
            raise ValueError(
                f"images of the sides {' '.join(map(str, self.sides))}: gather needs to know "
                "which one to resize them to"
            )
        numbers = np.asarray(indices, np.int64)
        side = side or (self.sides or (self.arrays[0].shape[-1],))[0]
        images = torch.empty((len(numbers), 3, side, side), dtype=torch.uint8, pin_memory=pinned)
        target, others = images.numpy(), dict[int, np.ndarray]()

        def copy(row: int) -> None:
            image = self.image(numbers[row])
            if image.shape[-1] == side:
                target[row] = image
            else:
                others[row] = image

        for _ in for_each_row(copy, range(len(numbers))):
            pass
        for own in {image.shape[-1] for image in others.values()}:
            rows = sorted(row for row, image in others.items() if image.shape[-1] == own)
            stack = torch.from_numpy(np.stack([others[row] for row in rows]))
            images[torch.tensor(rows)] = resize(stack, side)
        return images

    def resized(self, side: int) -> Store:
        """A copy in memory with all images at `side`.

        It is the store itself if they are so already, or if the copy would be too large.
        """
        if self.sides == (side,) or not len(self) or len(self) * 3 * side * side > IN_MEMORY:
            return self
        images = np.empty((len(self), 3, side, side), np.uint8)
        for rows in blocks(len(self)):
            images[rows.start : rows.stop] = self.gather(rows, side).numpy()
            self.release(rows)
        return Store([images], self.labels, self.classes)

    def release(self, indices: np.ndarray | Sequence[int]) -> None:
        """Gives back the memory of the shards that hold `indices`, if they are mapped files;
        nothing is lost.
        """
        for k in np.unique(self.places[np.asarray(indices), 0]):
            release(stored_bytes(self.arrays[k], 0, len(self.arrays[k])))

    def statistics(self, side: int) -> Statistics:
        """The statistics of the images at `side`.

        Smaller images are measured as they are, and their mean is enlarged.
        They are computed once an instance; for a store that was opened from a folder, once for all
        in that folder, if it can be written.
        """
        if side not in self._statistics:
            self._statistics[side] = store_statistics.measured_once(self, side)
        return self._statistics[side]
