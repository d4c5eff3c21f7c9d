"""Gives the batches of a store to one data rank; a thread prepares them ahead."""

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
from alexnet_mp.data.shard_arrays import JpegArray
from alexnet_mp.data.store import ForEachRow, Store
from alexnet_mp.data.transforms import Augment

PREFETCH = 2
"""Batches that are prepared while another one is trained on."""


class Batch(NamedTuple):
    """One rank's rows of a global batch; `for images, labels, *_ in loader` works too."""

    images: Tensor
    """float32 (N, 3, S, S), uint8 if raw, on the device; N is 0 where no row is this rank's."""
    labels: Tensor
    """int64 (N,), on the device."""
    first_row: int
    """The number of this rank's first row in the global batch."""
    rows: int
    """Rows of the global batch."""


class _Prepared(NamedTuple):
    """A batch on the CPU, and what is still to be done with its images on the device."""

    images: Tensor
    labels: Tensor
    finish: Callable[[Tensor], Tensor]
    first_row: int
    rows: int


class Loader:
    """Iterates over one epoch's batches, a short last one too; each image comes once, on one rank.

    In training the order is a permutation and every batch is augmented. Both are functions of seed
    and epoch alone: neither the number of ranks, nor a resume, nor threads change them. Otherwise
    images come in stored order, as center crops.
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
        """`batch_size` counts the rows of all `data_ranks` together; `seed` is that of order and
        augmentation.

        `raw`: uint8 images at the augmentation's side, from which the caller takes views; not with
        `train`. `workers`: threads that prepare one batch together; 0: one, or as many as torch has
        if the images are JPEGs.
        """
        self.store, self.augment, self.batch_size = store, augment, batch_size
        self.seed, self.training, self.raw = seed, train, raw
        self.data_rank, self.data_ranks, self.device = data_rank, data_ranks, torch.device(device)
        decodes = any(isinstance(array, JpegArray) for array in store.arrays)
        self.workers = workers or (torch.get_num_threads() if decodes else 1)
        self.buffers = Buffers()
        self.epoch = self.skip = 0
        self.stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_size)

    @property
    def images(self) -> int:
        """Images of an epoch, over all ranks."""
        return len(self.store)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Makes the next iterations those of `epoch`, without its first `skip` batches."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[_Prepared | BaseException | None] = queue.Queue(PREFETCH)
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
                yield self._finish(prepared)
        finally:
            end()
            atexit.unregister(end)

    def order(self, epoch: int) -> np.ndarray:
        """int64 (images,): the numbers of the images in the order of `epoch`."""
        if not self.training:
            return np.arange(len(self.store))
        shuffle = block_order if self._in_blocks else full_order
        return shuffle(len(self.store), self.seed, epoch)

    @property
    def _in_blocks(self) -> bool:
        return self.training and self.augment.config.shuffle == "blocks"

    def _work(self, ready: queue.Queue[Any], stop: threading.Event, epoch: int, skip: int) -> None:
        """Runs in the thread: NumPy copies and small draws, nothing that starts torch's threads
        beside the trainer's.
        """
        try:
            if self.device.type == "cuda":
                # Each thread has its own current device; pinning on another one would open a
                # context there.
                torch.cuda.set_device(self.device)
            order = self.order(epoch)
            ahead = ReadAhead(self.store, order) if self._in_blocks else None
            with _row_threads(self.workers) as for_each_row:
                for number in range(skip, len(self)):
                    if ahead:
                        ahead.reach(number * self.batch_size)
                    _put(ready, self._prepare(order, epoch, number, for_each_row), stop)
                    if stop.is_set():
                        return
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _prepare(
        self, order: np.ndarray, epoch: int, number: int, for_each_row: ForEachRow
    ) -> _Prepared:
        """This rank's part of batch `number` of `epoch`."""
        indices = order[number * self.batch_size : (number + 1) * self.batch_size]
        rows, augment = len(indices), self.augment
        first, last = (rows * (self.data_rank + k) // self.data_ranks for k in (0, 1))
        mine = indices[first:last]
        labels = torch.from_numpy(self.store.labels[mine])
        params = None
        if self.training:
            params = augment.draw(self.seed, epoch, number, rows).rows(first, last)

        if self.device.type == "cpu" and not self.raw and augment.side in self.store.sides:
            images = augment.on_cpu(
                lambda row: self.store.image(mine[row], augment.side),
                params or augment.center(len(mine)),
                self.buffers.take(len(mine), (3, augment.size, augment.size)),
                for_each_row,
            )
            return _Prepared(images, labels, lambda images: images, first, rows)

        pinned = self.device.type == "cuda"
        side = augment.side if len(self.store.sides) > 1 else None
        images = self.store.gather(mine, side, pinned=pinned, for_each_row=for_each_row)
        if pinned:
            labels = labels.pin_memory()
        if self.raw:
            return _Prepared(
                images, labels, lambda images: resize(images, augment.side), first, rows
            )
        if params is None:
            return _Prepared(images, labels, augment.test, first, rows)
        drawn = params
        return _Prepared(images, labels, lambda images: augment.train(images, drawn), first, rows)

    def _finish(self, prepared: _Prepared) -> Batch:
        """Does the device's part in the consumer's thread, which asks for a batch while a step
        still runs.

        On CUDA the images travel and are cropped on a stream of their own, beside that step.
        """
        if self.device.type != "cuda":
            return self._to_device(prepared)
        computing = torch.cuda.current_stream(self.device)
        self.stream = self.stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch gives no type
        with torch.cuda.stream(self.stream):
            batch = self._to_device(prepared)
        computing.wait_stream(self.stream)
        for tensor in (batch.images, batch.labels):
            # Else their memory could be given to the next batch while the step still reads it.
            tensor.record_stream(computing)
        return batch

    def _to_device(self, prepared: _Prepared) -> Batch:
        images = prepared.finish(prepared.images.to(self.device, non_blocking=True))
        labels = prepared.labels.to(self.device, non_blocking=True)
        return Batch(images, labels, prepared.first_row, prepared.rows)


class Buffers:
    """Reuses the memory of batches that nobody holds any more.

    For new memory the system has to clear pages, which takes half of a batch's time.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        probe = [np.empty(1)]
        self.free = sys.getrefcount(probe[0])
        # Without the interpreter's lock, counts of references are not exact.
        self.counted = getattr(sys, "_is_gil_enabled", lambda: True)()

    def take(self, rows: int, shape: tuple[int, ...]) -> Tensor:
        """float32 (rows, *shape) with arbitrary values. A tensor or view of it keeps its memory
        from being taken again.
        """
        for k in range(len(self.arrays)):
            if (
                sys.getrefcount(self.arrays[k]) == self.free
                and self.counted
                and len(self.arrays[k]) >= rows
                and self.arrays[k].shape[1:] == shape
            ):
                return torch.from_numpy(self.arrays[k][:rows])
        array = np.empty((rows, *shape), np.float32)
        # Keep only the newest buffers; older batches still belong to the consumer.
        self.arrays = [*self.arrays[-PREFETCH - 2 :], array]
        return torch.from_numpy(array[:rows])


@contextlib.contextmanager
def _row_threads(count: int) -> Iterator[ForEachRow]:
    """A function that calls another one for each row, on `count` threads."""
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count, thread_name_prefix="loader") as pool:

        def for_each_row(work: Callable[[int], None], rows: Iterable[int]) -> Iterator[None]:
            def do(part: list[int]) -> None:
                for row in part:
                    work(row)

            numbers = list(rows)
            yield from pool.map(do, (numbers[k::count] for k in range(count)))

        yield for_each_row


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Waits for room in the queue, but not longer than somebody wants the item."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=0.05)
            return
