"""Orders the images of an epoch, by seed and epoch alone, and announces what is read next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alexnet_mp.config.seeds import combine
from alexnet_mp.data.mapping import will_need
from alexnet_mp.data.shard_arrays import stored_bytes
from alexnet_mp.data.store import Store

BLOCK_SIZE = 64
"""Images of a block, neighbors in the store: 12.6 MB, a tenth of a second of a spinning disk."""
SHUFFLE_WINDOW = 128
"""Blocks whose images are mixed: 8,192 images, 1.6 GB. Two windows should fit into memory."""


def full_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (count,): any order of `count` images, all equally likely."""
    return np.random.default_rng(combine(seed, "order", epoch)).permutation(count)


def block_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (count,): blocks of BLOCK_SIZE in any order, mixed within each SHUFFLE_WINDOW of them.

    Reads are sequential within a block; each window is read once. Images that lie far apart in the
    store are seldom in one window: a store that is sorted by class gives batches of a window's
    classes, at most 128, not of all classes.
    """
    rng = np.random.default_rng(combine(seed, "blocks", epoch))
    windows = [
        rng.permutation(np.concatenate([np.arange(first, last) for first, last in blocks]))
        for blocks in _windows(count, rng)
    ]
    return np.concatenate([np.empty(0, np.int64), *windows])


def _windows(count: int, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
    """The first and last number plus 1 of each block, window by window."""
    starts = rng.permutation(np.arange(0, count, BLOCK_SIZE)).tolist()
    for first in range(0, len(starts), SHUFFLE_WINDOW):
        yield [
            (start, min(start + BLOCK_SIZE, count))
            for start in starts[first : first + SHUFFLE_WINDOW]
        ]


class ReadAhead:
    """Announces to the system which parts of a mapped store are read next, a window ahead."""

    def __init__(self, store: Store, order: np.ndarray) -> None:
        self.store, self.order, self.announced = store, order, 0

    def reach(self, position: int) -> None:
        """Announces the images of the window of `order[position]` and of the next window."""
        images = BLOCK_SIZE * SHUFFLE_WINDOW
        until = (position // images + 2) * images
        while self.announced < min(until, len(self.order)):
            # Sorted, the window's images are runs of neighbors again, in the order of the disk.
            numbers = np.sort(self.order[self.announced : self.announced + images])
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
                self._announce(run)
            self.announced += images

    def _announce(self, run: np.ndarray) -> None:
        places = self.store.places[run]
        for array in np.unique(places[:, 0]):
            rows = places[places[:, 0] == array, 1]
            will_need(stored_bytes(self.store.arrays[array], int(rows.min()), int(rows.max()) + 1))
