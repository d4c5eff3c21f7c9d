"""The order in which an epoch takes the images, a function of seed and epoch alone, and what a disk is told of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alexnet_mp.config.seeds import combine
from alexnet_mp.data.mapping import will_need
from alexnet_mp.data.shard_arrays import stored_bytes
from alexnet_mp.data.store import Store

BLOCK_SIZE = 64
"""Images of a block, which lie behind each other in the store: 12.6 MB at 256 pixels, a tenth of a second of a spinning disk."""
SHUFFLE_WINDOW = 128
"""Blocks whose images are mixed: 8,192 images, 1.6 GB at 256 pixels. Two windows at a time should fit into memory."""


def full_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Any order of `count` images, all equally likely."""
    return np.random.default_rng(combine(seed, "order", epoch)).permutation(count)


def block_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Blocks of TOGETHER images in any order, and within WINDOW of these, one after another, all images in any order.

    A disk reads a block at once and a window one time. What is far apart in the order may not be near in the store; a store that
    is sorted by class gives batches of all of a window's classes, at most 128, not of all there are.
    """
    rng = np.random.default_rng(combine(seed, "blocks", epoch))
    windows = [
        rng.permutation(np.concatenate([np.arange(first, last) for first, last in blocks]))
        for blocks in _windows(count, rng)
    ]
    return np.concatenate([np.empty(0, np.int64), *windows])


def _windows(count: int, rng: np.random.Generator) -> Iterator[list[tuple[int, int]]]:
    starts = rng.permutation(np.arange(0, count, BLOCK_SIZE)).tolist()
    for first in range(0, len(starts), SHUFFLE_WINDOW):
        yield [
            (start, min(start + BLOCK_SIZE, count))
            for start in starts[first : first + SHUFFLE_WINDOW]
        ]


class ReadAhead:
    """Tells the system which parts of a memory-mapped store come next, while they are still a window away."""

    def __init__(self, store: Store, order: np.ndarray) -> None:
        self.store, self.order, self.told = store, order, 0

    def reach(self, position: int) -> None:
        """The images up to `order[position]` are taken now; announces those of this window and the next one."""
        images = BLOCK_SIZE * SHUFFLE_WINDOW
        until = (position // images + 2) * images
        while self.told < min(until, len(self.order)):
            # From one thing that is known, the window's images, back to runs of neighbors, in the order of the disk.
            numbers = np.sort(self.order[self.told : self.told + images])
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
                self._announce(run)
            self.told += images

    def _announce(self, run: np.ndarray) -> None:
        places = self.store.places[run]
        for shelf in np.unique(places[:, 0]):
            rows = places[places[:, 0] == shelf, 1]
            will_need(stored_bytes(self.store.shelves[shelf], int(rows.min()), int(rows.max()) + 1))
