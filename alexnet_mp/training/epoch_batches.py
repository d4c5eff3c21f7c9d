"""The batches of one epoch, on the device, one of them prepared ahead, with progress shown."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from alexnet_mp.config.progress import progress
from alexnet_mp.training.input_checks import LabeledBatch, is_empty, length_of, unpack_batch

REFRESH = 1.0
"""Seconds between two looks at the loss for a progress bar: each waits for the device."""

_END, _NOT_ASKED = object(), object()  # a loader may give None


class EpochBatches:
    """Iterates over one epoch of `loader`, without its first `done` batches and empty ones.

        for batch in batches:
            ...                      # forward, backward
            batches.prefetch()       # prepares the next batch while flags are on their way
            ...                      # update

    `done` is 0 where the loader cannot leave out batches: then the epoch begins again. `length` is
    None where the loader has none, as over an IterableDataset. `describe` gives the text behind the
    progress.
    """

    def __init__(
        self,
        loader: Any,
        epoch: int,
        done: int,
        device: torch.device,
        describe: Callable[[], str],
        show: bool,
    ) -> None:
        self.length, self.device = length_of(loader), device
        whole = done == self.length
        skips = set_epoch(loader, epoch, done)
        self.done = done if skips or whole else 0
        self._describe, self._shown_at = describe, time.monotonic()
        self._progress = progress(
            () if whole and not skips else loader,
            total=self.length,
            description=f"epoch {epoch + 1}",
            unit="steps",
            enabled=show,
            initial=self.done,
        )
        self._progress.set_postfix(describe)
        self._iterator = iter(self._progress)
        self._next: Any = _NOT_ASKED
        self.prefetch()

    @property
    def upcoming(self) -> Any:
        """The next batch as the loader gave it, after `prefetch`."""
        return self._next

    @property
    def at_end(self) -> bool:
        """Whether there are no more batches, after `prefetch`."""
        return self._next is _END

    def fraction(self, batch: int) -> float:
        """The part of the epoch before its batch number `batch`; 0 if the length is not known."""
        return batch / self.length if self.length else 0.0

    def __iter__(self) -> Iterator[LabeledBatch]:
        """Images come on the device; labels as the loader gave them, to be checked on the CPU."""
        while self._next is not _END:
            batch, self._next = unpack_batch(self._next, "training"), _NOT_ASKED
            yield batch._replace(images=batch.images.to(self.device, non_blocking=True))
            if self._next is _NOT_ASKED:
                self.prefetch()

    def prefetch(self) -> None:
        """Gets the next batch from the loader."""
        self._next = next(self._iterator, _END)
        while self._next is not _END and is_empty(self._next):
            self._next = next(self._iterator, _END)
        if (now := time.monotonic()) - self._shown_at > REFRESH:
            self._shown_at = now
            self._progress.set_postfix(self._describe)

    def close(self) -> None:
        """Ends the progress and the loader's iterator."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()
        self._progress.close()


def set_epoch(loader: Any, epoch: int, skip: int) -> bool:
    """Tells `loader`, or its sampler, which epoch comes, as shuffling needs it.

    Returns whether it leaves out `skip` batches.
    """
    if callable(method := getattr(loader, "set_epoch", None)):
        skips = len(inspect.signature(method).parameters) > 1
        method(*(epoch, skip)[: 1 + skips])
        return skips
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if callable(method := getattr(sampler, "set_epoch", None)):
            method(epoch)
            break
    return False
