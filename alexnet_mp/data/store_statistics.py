"""Measures the statistics of a store, from the sums in its folder if it can, and keeps them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from alexnet_mp.config.files import write_atomically
from alexnet_mp.data.statistics import Statistics, Sums, sums_of
from alexnet_mp.data.store_format import blocks, read_header

if TYPE_CHECKING:
    from alexnet_mp.data.store import Store


def measured_once(store: Store, side: int) -> Statistics:
    """The statistics of `store` at `side`, from a file in its folder, which is written if there is
    none.
    """
    file = None
    if store.path is not None:
        content = np.ascontiguousarray(store.places).tobytes() + str(side).encode()
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        file = store.path / f"statistics-{digest}.npz"
    if file is not None and (found := _read(file, side)) is not None:
        return found
    statistics = measure(store, side)
    if file is not None:
        _write(file, statistics)
    return statistics


def measure(store: Store, side: int) -> Statistics:
    """The statistics of `store` at `side`: of all its images, or what the stored sums lack."""
    whole = _stored_sums(store) if side >= max(store.sides, default=0) else None
    if whole is not None:
        others = np.ones(whole.count, bool)
        others[store.numbers()] = False
        # To take away what was held out is less work, if that is the smaller part.
        if len(store) + others.sum() == whole.count < 2 * len(store):
            whole.merge(sum_images(_images_at(store, np.flatnonzero(others)), side), -1)
            return whole.statistics(side)
    return sum_images(store, side).statistics(side)


def sum_images(store: Store, side: int) -> Sums:
    """The sums over all images of `store`; those above `side` are reduced to it."""
    sums = Sums()
    own_sides = np.array([array.shape[-1] for array in store.arrays], np.int64)
    own_sides = own_sides[store.places[:, 0]]  # of each image
    for own in store.sides:
        mine = np.flatnonzero(own_sides == own)
        for block in blocks(len(mine)):
            rows = mine[block.start : block.stop]
            images: Iterable[np.ndarray] = map(store.image, rows)
            if own > side:
                images = store.gather(rows, side).numpy()
            sums.merge(sums_of(images))
            store.release(rows)
    return sums


def _images_at(store: Store, numbers: np.ndarray) -> Store:
    """The images with these numbers among all of the store's arrays, with any labels."""
    starts = np.cumsum([0, *map(len, store.arrays)])
    array = np.searchsorted(starts, numbers, side="right") - 1
    places = np.stack([array, numbers - starts[array]], 1)
    labels = np.zeros(len(numbers), np.int64)
    return type(store)(store.arrays, labels, store.classes, places)


def _stored_sums(store: Store) -> Sums | None:
    """The sums over all images in the store's folder, taken when it was packed; None if they are
    missing or damaged.
    """
    if store.path is None:
        return None
    with contextlib.suppress(OSError, KeyError, ValueError):
        content = (store.path / "sums.npz").read_bytes()
        if zlib.crc32(content) == read_header(store.path)["checksums"]["sums.npz"]:
            sums = Sums.from_bytes(content)
            return sums if sums.count == sum(map(len, store.arrays)) else None
    return None


def _read(file: Path, side: int) -> Statistics | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as values:
            mean_image = torch.from_numpy(values["mean_image"])
            covariance = torch.from_numpy(values["covariance"])
    except Exception:  # NumPy raises many kinds for a damaged file; measuring again replaces it
        return None
    return Statistics(mean_image, covariance) if mean_image.shape == (3, side, side) else None


def _write(file: Path, statistics: Statistics) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        mean_image=statistics.mean_image.numpy(),
        covariance=statistics.covariance.numpy(),
    )
    with contextlib.suppress(OSError):  # a read-only store: measured again at the next start
        write_atomically(file, content.getvalue())
