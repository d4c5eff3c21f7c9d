"""Measures the mean image and the colors of a set of images.

They come from sums of whole numbers, so no block size, thread, order or interruption changes a bit
of them.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.ops import cpu_kernels

EXACT_PRODUCTS = 1024
"""Products of two centered gray levels, at most 128 * 128, that float32 adds up without rounding:
2**14 * 2**10 = 2**24.
"""
UINT32_IMAGES = (2**32 - 1) // 255
"""Images whose gray levels, 255 each at most, surely add up within 32 bits."""


@dataclass(frozen=True)
class Statistics:
    """The statistics of a training set, in gray levels (0 to 255)."""

    mean_image: Tensor
    """float32 (3, side, side)."""
    covariance: Tensor
    """float64 (3, 3): of a pixel's red, green and blue over all images, each image weighing the
    same.
    """


class Sums:
    """Exact sums over images, for each side: their number, the images (3, side, side), products of
    colors (3, 3).

    Several threads may add to one object: sums of whole numbers are the same in any order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: dict[int, int] = {}
        self.images: dict[int, np.ndarray] = {}  # uint32, int64 once merged or nearly full
        # float64 that holds whole numbers, exact below 2**53: 10**12 images.
        self.products: dict[int, np.ndarray] = {}

    def add(self, image: np.ndarray) -> None:
        """Adds one image, uint8 (3, side, side)."""
        side, products = image.shape[-1], _color_products(image)
        with self._lock:
            if side not in self.counts:
                self._start(side, np.uint32)
            if self.counts[side] >= UINT32_IMAGES and self.images[side].dtype == np.uint32:
                self.images[side] = self.images[side].astype(np.int64)
            self.counts[side] += 1
            np.add(self.images[side], image, out=self.images[side])
            self.products[side] += products

    def merge(self, other: Sums, sign: int = 1) -> None:
        """Adds the sums of other images, or with `sign` -1 takes away those of images that were
        added.
        """
        for side in other.counts:
            if side not in self.counts:
                self._start(side, np.int64)
            theirs = sign * other.images[side].astype(np.int64)
            self.counts[side] += sign * other.counts[side]
            self.images[side] = self.images[side].astype(np.int64) + theirs
            self.products[side] += sign * other.products[side]

    @property
    def count(self) -> int:
        """Images of all sides."""
        return sum(self.counts.values())

    def statistics(self, side: int) -> Statistics:
        """The statistics of the images at `side`; every image weighs the same.

        The mean of smaller images is enlarged; there must be no larger ones. ValueError if there
        are no images.
        """
        if not self.count:
            raise ValueError("no training images to take the mean image of")
        mean_image = torch.zeros(3, side, side, dtype=torch.float64)
        mean = torch.zeros(3, dtype=torch.float64)
        moment = torch.zeros(3, 3, dtype=torch.float64)
        for own in sorted(self.counts):
            sums = torch.from_numpy(self.images[own].astype(np.float64))
            mean += sums.sum((1, 2)) / own**2
            moment += torch.from_numpy(self.products[own]) / own**2
            if own != side:
                sums = F.interpolate(sums[None], (side, side), mode="bilinear", antialias=True)[0]
            mean_image += sums
        mean = mean / self.count
        covariance = moment / self.count - mean[:, None] * mean
        return Statistics((mean_image / self.count).float(), covariance)

    def to_bytes(self) -> bytes:
        """A .npz file, the same bytes for the same sums."""
        sides = sorted(side for side, count in self.counts.items() if count)
        arrays: dict[str, np.ndarray] = {
            "sides": np.array(sides, np.int64),
            "counts": np.array([self.counts[side] for side in sides], np.int64),
        }
        arrays |= {f"products{side}": self.products[side] for side in sides}
        arrays |= {f"images{side}": self.images[side] for side in sides}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]  # the stubs see allow_pickle in **
        return content.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Sums:
        """The inverse of `to_bytes`; raises several kinds of errors for damaged content."""
        sums = Sums()
        with np.load(io.BytesIO(content), allow_pickle=False) as values:
            counts = values["counts"].tolist()
            for side, count in zip(values["sides"].tolist(), counts, strict=True):
                sums.counts[side] = count
                sums.images[side] = values[f"images{side}"]
                sums.products[side] = values[f"products{side}"]
        return sums

    def _start(self, side: int, dtype: type[np.generic]) -> None:
        self.counts[side] = 0
        self.images[side] = np.zeros((3, side, side), dtype)
        self.products[side] = np.zeros((3, 3))


def sums_of(images: Iterable[np.ndarray]) -> Sums:
    """The sums over uint8 images (3, side, side), also of several sides."""
    sums = Sums()
    for image in images:
        sums.add(image)
    return sums


def _color_products(image: np.ndarray) -> np.ndarray:
    """float64 (3, 3), whole numbers: the sum over the pixels of the product of each two colors."""
    if image.flags.c_contiguous and not cpu_kernels.unavailable_reason():
        return cpu_kernels.color_products(image)
    pixels = image.shape[1] * image.shape[2]
    centered = _scratch(3, -(-pixels // EXACT_PRODUCTS) * EXACT_PRODUCTS)
    centered[:, pixels:] = 0
    np.subtract(image.reshape(3, -1), np.float32(128), out=centered[:, :pixels], dtype=np.float32)
    parts, products = centered.reshape(3, -1, EXACT_PRODUCTS), np.empty((3, 3))
    for i in range(3):
        for j in range(i, 3):
            sums = np.einsum("ij,ij->i", parts[i], parts[j])
            products[i, j] = products[j, i] = sums.sum(dtype=np.float64)
    total = np.einsum("kij->ki", parts).sum(1, dtype=np.float64)
    # ab = (a - 128)(b - 128) + 128 (a - 128) + 128 (b - 128) + 128**2
    whole: np.ndarray = products + 128 * (total[:, None] + total) + 128.0**2 * pixels
    return whole


_thread = threading.local()


def _scratch(*shape: int) -> np.ndarray:
    """float32 with arbitrary values, the calling thread's own until its next call.

    New memory for each image would take longer than the sums.
    """
    kept: np.ndarray | None = getattr(_thread, "array", None)
    if kept is None or kept.shape != shape:
        kept = _thread.array = np.empty(shape, np.float32)
    return kept
