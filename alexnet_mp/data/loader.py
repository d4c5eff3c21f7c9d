"""Batches of a store for one data rank, prepared ahead by a thread."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.data.augment import Augment, Draw
from alexnet_mp.data.store import Store, resize
from alexnet_mp.seeds import combine

AHEAD = 2
"""Batches that wait, prepared, for the one that is being trained on."""


class Batch(NamedTuple):
    """One rank's rows of a global batch; `for images, labels, *_ in loader` works too."""

    images: Tensor       # float32 (N, 3, S, S), uint8 if raw, on the device; N is 0 where a short last batch has no row for this rank
    labels: Tensor       # int64 (N,), on the device
    first_row: int       # of this rank's rows in the global batch
    rows: int            # of the global batch


class Loader:
    """Iterates over one epoch's batches, the short last one included; every image comes once, on one data rank.

    In training the order is a permutation and every batch is augmented, both functions of seed and epoch alone: neither the
    number of ranks, nor a resume, nor the thread can change them. Otherwise: stored order and centre crops, or `raw` images, of
    the augmentation's side, for whoever takes views of them.
    """

    def __init__(self, store: Store, augment: Augment, batch_size: int, seed: int = 0, train: bool = False,
                 data_rank: int = 0, data_ranks: int = 1, device: torch.device | str = "cpu", raw: bool = False) -> None:
        self.raw = raw
        self.store, self.augment, self.batch_size, self.seed, self.training = store, augment, batch_size, seed, train
        self.data_rank, self.data_ranks, self.device = data_rank, data_ranks, torch.device(device)
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_size)

    @property
    def images(self) -> int:
        """How many images an epoch has, over all ranks."""
        return len(self.store)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next iterations are of this epoch, without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(ready, stop, self.epoch, self.skip), name="loader", daemon=True)

        def end() -> None:
            stop.set()
            thread.join()

        # A daemon thread inside torch while the interpreter is torn down can abort the process.
        atexit.register(end)
        thread.start()
        try:
            while (prepared := ready.get()) is not None:
                if isinstance(prepared, BaseException):
                    raise prepared
                yield self._finish(*prepared)
        finally:
            end()
            atexit.unregister(end)

    def order(self, epoch: int) -> np.ndarray:
        """The images' numbers in the order in which `epoch` takes them."""
        if not self.training:
            return np.arange(len(self.store))
        return np.random.default_rng(combine(self.seed, "order", epoch)).permutation(len(self.store))

    def _work(self, ready: queue.Queue[Any], stop: threading.Event, epoch: int, skip: int) -> None:
        """The thread: NumPy copies and small draws, nothing that would start torch's threads beside the trainer's own."""
        try:
            if self.device.type == "cuda":       # the current device is the thread's own; pinning on another would open a context there
                torch.cuda.set_device(self.device)
            order = self.order(epoch)
            for number in range(skip, len(self)):
                _put(ready, self._prepare(order, epoch, number), stop)
                if stop.is_set():
                    return
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _prepare(self, order: np.ndarray, epoch: int, number: int) -> tuple[Tensor, Tensor, Draw | None, int, int]:
        """This rank's images and labels of batch `number`, on the CPU, and the choices for them."""
        indices = order[number * self.batch_size:(number + 1) * self.batch_size]
        rows = len(indices)
        first, last = (rows * (self.data_rank + k) // self.data_ranks for k in (0, 1))
        draw = self.augment.draw(self.seed, epoch, number, rows).rows(first, last) if self.training else None
        mine = indices[first:last]
        images = self.store.gather(mine, self.augment.side if len(self.store.shelves) > 1 else None)
        labels = torch.from_numpy(self.store.labels[mine])
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        return images, labels, draw, first, rows

    def _finish(self, images: Tensor, labels: Tensor, draw: Draw | None, first: int, rows: int) -> Batch:
        """The device's part, in the consumer's thread: on its stream, and with its threads."""
        images, labels = (values.to(self.device, non_blocking=True) for values in (images, labels))
        if draw is not None:
            images = self.augment.train(images, draw)
        else:
            images = resize(images, self.augment.side) if self.raw else self.augment.test(images)
        return Batch(images, labels, first, rows)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Waits for room, but not longer than somebody wants what comes."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=0.05)
            return
