"""Decodes listed image files on all cores, a shard ahead of the one that is written."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch

from alexnet_mp.config.progress import Progress
from alexnet_mp.data import store_format
from alexnet_mp.data.decode import decode_jpeg, encode_jpeg, try_read
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.statistics import Sums
from alexnet_mp.data.store_writer import EncodedImage
from alexnet_mp.ops.cpu_cores import available_cores

CHUNK = 16
"""Files that a thread decodes before it hands them over."""


@dataclass(frozen=True)
class Packing:
    """Settings of packing: encoding, errors, threads, progress."""

    encode: Literal["raw", "jpeg"] = "raw"
    """raw: pixels as they are; jpeg: smaller, and decoded again at each epoch."""
    on_error: Literal["stop", "skip"] = "stop"
    """At files that cannot be read: fail at the end and name them, or leave them out and list them.
    """
    workers: int = 0
    """Threads; 0: one for each core."""
    progress: bool = False
    """Whether this process shows how far it is."""


class DecodedShard(NamedTuple):
    """The images of one shard, decoded, before they are written."""

    number: int
    images: list[EncodedImage | str]
    """Each image, or the reason why it cannot be read."""
    sums: Sums | None
    sizes: list[int]
    """Bytes of each image's file."""


@contextlib.contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silences Pillow's warnings of odd metadata, one a file, and gives torch one thread.

    Torch's operations are called on all cores at once here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def decoded(
    listing: Listing,
    shards: Mapping[int, range],
    packing: Packing,
    with_sums: bool,
    progress: Progress[None],
) -> Iterator[DecodedShard]:
    """The images of `shards`, in order, with their sums if `with_sums`.

    `shards` gives the rows of the listing that each holds. Threads work a shard ahead.
    """
    workers = packing.workers or available_cores()
    sums = {number: Sums() if with_sums else None for number in shards}

    def work(number: int, rows: range) -> list[EncodedImage | str]:
        # One image after another: it is summed while it is still in the processor's cache.
        return [encoded(try_read(listing.file(row)), packing.encode, sums[number]) for row in rows]

    chunks = (
        (number, range(start, min(start + CHUNK, rows.stop)))
        for number, rows in shards.items()
        for start in range(rows.start, rows.stop, CHUNK)
    )
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[EncodedImage | str]]] = deque(
            pool.submit(work, *chunk)
            for chunk in islice(chunks, max(store_format.SHARD // CHUNK, 2 * workers))
        )
        try:
            for number, rows in shards.items():
                images: list[EncodedImage | str] = []
                while len(images) < len(rows):
                    some = ahead.popleft().result()
                    ahead.extend(pool.submit(work, *chunk) for chunk in islice(chunks, 1))
                    images += some
                    progress.update(len(some))
                sizes = listing.sizes[rows.start : rows.stop].tolist()
                yield DecodedShard(number, images, sums.pop(number), sizes)
        finally:
            for future in ahead:
                future.cancel()


def encoded(image: np.ndarray | str, encode: str, sums: Sums | None) -> EncodedImage | str:
    """The image as it is stored, added to `sums` with the pixels that training will see."""
    if isinstance(image, str):
        return image
    side = image.shape[-1]
    stored: np.ndarray | bytes = image
    if encode == "jpeg":
        stored = encode_jpeg(image)
        if sums is not None:
            image = np.ascontiguousarray(decode_jpeg(stored).numpy())
    if sums is not None:
        sums.add(image)
    return EncodedImage(side, stored)
