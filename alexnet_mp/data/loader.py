"""Batches of a store for one data rank, prepared ahead by a thread."""

from __future__ import annotations

import atexit
import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.data.decode import resize
from alexnet_mp.data.epoch_order import ReadAhead, block_order, full_order
from alexnet_mp.data.shard_arrays import JpegShelf
from alexnet_mp.data.store import Run, Store
from alexnet_mp.data.transforms import Augment, AugmentParams

PREFETCH = 2
"""Batches that wait, prepared, for the one that is being trained on."""


DONE = AugmentParams(*[torch.empty(0)] * 3, None)
"""Stands for the choices of a batch that needs nothing more."""


class Batch(NamedTuple):
    """One rank's rows of a global batch; `for images, labels, *_ in loader` works too."""

    images: Tensor  # float32 (N, 3, S, S), uint8 if raw, on the device; N is 0 where a short last batch has no row for this rank
    labels: Tensor  # int64 (N,), on the device
    first_row: int  # of this rank's rows in the global batch
    rows: int  # of the global batch


class Loader:
    """Iterates over one epoch's batches, the short last one included; every image comes once, on one data rank.

    In training the order is a permutation and every batch is augmented, both functions of seed and epoch alone: neither the
    number of ranks, nor a resume, nor the threads can change them. Otherwise: stored order and center crops, or `raw` images, of
    the augmentation's side, for whoever takes views of them. `workers`: threads that prepare a batch together; 0: one, or as many
    as torch has where the store's images are JPEGs.
    """

    def __init__(
        self,
        store: Store,
        augment: Augment,
        batch_size: int,
        seed: int = 0,
        train: bool = False,
        data_rank: int = 0,
        data_ranks: int = 1,
        device: torch.device | str = "cpu",
        raw: bool = False,
        workers: int = 0,
    ) -> None:
        self.raw, self.buffers = raw, Buffers()
        decodes = any(isinstance(shelf, JpegShelf) for shelf in store.shelves)
        self.workers = workers or (torch.get_num_threads() if decodes else 1)
        self.store, self.augment, self.batch_size, self.seed, self.training = (
            store,
            augment,
            batch_size,
            seed,
            train,
        )
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
        ready: queue.Queue[Any] = queue.Queue(PREFETCH)
        stop = threading.Event()
        thread = threading.Thread(
            target=self._work, args=(ready, stop, self.epoch, self.skip), name="loader", daemon=True
        )

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
        return (block_order if self.augment.config.shuffle == "blocks" else full_order)(
            len(self.store), self.seed, epoch
        )

    def _work(self, ready: queue.Queue[Any], stop: threading.Event, epoch: int, skip: int) -> None:
        """The thread: NumPy copies and small draws, nothing that would start torch's threads beside the trainer's own."""
        try:
            if (
                self.device.type == "cuda"
            ):  # the current device is the thread's own; pinning on another would open a context there
                torch.cuda.set_device(self.device)
            order = self.order(epoch)
            ahead = (
                ReadAhead(self.store, order)
                if self.training and self.augment.config.shuffle == "blocks"
                else None
            )
            with _threads(self.workers) as run:
                for number in range(skip, len(self)):
                    if ahead:
                        ahead.reach(number * self.batch_size)
                    _put(ready, self._prepare(order, epoch, number, run), stop)
                    if stop.is_set():
                        return
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _prepare(
        self, order: np.ndarray, epoch: int, number: int, run: Run
    ) -> tuple[Tensor, Tensor, AugmentParams | None, int, int]:
        """This rank's images and labels of batch `number`, on the CPU, and what is still to be done with them."""
        indices = order[number * self.batch_size : (number + 1) * self.batch_size]
        rows, augment = len(indices), self.augment
        first, last = (rows * (self.data_rank + k) // self.data_ranks for k in (0, 1))
        draw = (
            augment.draw(self.seed, epoch, number, rows).rows(first, last)
            if self.training
            else None
        )
        mine = indices[first:last]
        labels = torch.from_numpy(self.store.labels[mine])
        on_gpu = self.device.type == "cuda"
        if self.device.type == "cpu" and not self.raw and augment.side in self.store.sides:
            draw, target = (
                draw or augment.center(len(mine)),
                self.buffers.take(len(mine), (3, augment.size, augment.size)),
            )
            return (
                augment.on_cpu(
                    lambda row: self.store.image(mine[row], augment.side), draw, target, run
                ),
                labels,
                DONE,
                first,
                rows,
            )
        images = self.store.gather(
            mine, augment.side if len(self.store.sides) > 1 else None, pinned=on_gpu, run=run
        )
        return images, labels.pin_memory() if on_gpu else labels, draw, first, rows

    def _finish(
        self, images: Tensor, labels: Tensor, draw: AugmentParams | None, first: int, rows: int
    ) -> Batch:
        """The device's part, in the consumer's thread: on its stream, and with its threads."""
        images, labels = (values.to(self.device, non_blocking=True) for values in (images, labels))
        if draw is None:
            images = resize(images, self.augment.side) if self.raw else self.augment.test(images)
        elif draw is not DONE:
            images = self.augment.train(images, draw)
        return Batch(images, labels, first, rows)


class Buffers:
    """Memory of batches that nobody holds any more: for new memory the system would have to clear pages, half of a batch's time."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        probe = [np.empty(1)]
        self.free = sys.getrefcount(probe[0])
        self.counted = getattr(
            sys, "_is_gil_enabled", lambda: True
        )()  # without the lock, counts of references are not exact

    def take(self, rows: int, shape: tuple[int, ...]) -> Tensor:
        """float32 (rows, *shape), its values arbitrary. A tensor of it, or a view of one, keeps its memory from being taken again."""
        array = None
        for k in range(len(self.arrays)):
            if (
                sys.getrefcount(self.arrays[k]) == self.free
                and self.counted
                and len(self.arrays[k]) >= rows
                and self.arrays[k].shape[1:] == shape
            ):
                array = self.arrays[k]
                break
        if array is None:
            array = np.empty((rows, *shape), np.float32)
            # Beyond these the consumer keeps its batches, and what it keeps need not be remembered.
            self.arrays = [*self.arrays[-PREFETCH - 2 :], array]
        return torch.from_numpy(array[:rows])


@contextlib.contextmanager
def _threads(count: int) -> Iterator[Run]:
    """What calls a function of a row for every row, on `count` threads."""
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count, thread_name_prefix="loader") as pool:

        def run(work: Callable[[int], None], rows: Iterable[int]) -> Iterator[None]:
            rows = list(rows)
            yield from pool.map(
                lambda part: [None for row in part if work(row)],
                (rows[k::count] for k in range(count)),
            )

        yield run


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Waits for room, but not longer than somebody wants what comes."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=0.05)
            return
