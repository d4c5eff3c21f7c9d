"""Mean image and colors of a set, from sums of whole numbers: no block, thread, order or interruption can change a bit of them."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.ops import cpu_kernels

EXACT = 1024
"""Products of two centered gray levels, at most 128 * 128, that float32 adds up without rounding: 2**14 * 2**10 = 2**24."""


@dataclass(frozen=True)
class Statistics:
    """Of a training set, in gray levels (0 to 255)."""

    mean_image: Tensor
    """float32 (3, side, side)"""
    covariance: Tensor
    """float64 (3, 3): of a pixel's red, green and blue over all images, each image weighing the same."""


class Sums:
    """Exact sums over images of each side: how many, the images (3, side, side), and the products of colors (3, 3).

    Threads may add to the same one: sums of whole numbers are the same in any order.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[int, int] = {}
        self.images: dict[int, np.ndarray] = {}  # uint32, int64 once merged
        self.products: dict[
            int, np.ndarray
        ] = {}  # float64 holding whole numbers, exact below 2**53: a million million images

    def add(self, image: np.ndarray) -> None:
        """One image, uint8 (3, side, side)."""
        side, products = image.shape[-1], _products(image)
        with self.lock:
            if side not in self.counts:
                self._start(side, np.uint32)
            if self.counts[side] == 2**24:  # 2**24 * 255 just fits into 32 bits
                self.images[side] = self.images[side].astype(np.int64)
            self.counts[side] += 1
            np.add(self.images[side], image, out=self.images[side])
            self.products[side] += products

    def _start(self, side: int, kind: type) -> None:
        self.counts[side], self.images[side], self.products[side] = (
            0,
            np.zeros((3, side, side), kind),
            np.zeros((3, 3)),
        )

    def merge(self, other: Sums, sign: int = 1) -> None:
        """Adds the sums of other images, or with `sign` -1 takes those away that were in."""
        for side in other.counts:
            if side not in self.counts:
                self._start(side, np.int64)
            self.counts[side] += sign * other.counts[side]
            self.images[side] = self.images[side].astype(np.int64) + sign * other.images[
                side
            ].astype(np.int64)
            self.products[side] += sign * other.products[side]

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def statistics(self, side: int) -> Statistics:
        """Every image weighs the same. The mean of images below `side` is enlarged; there must be none above. ValueError if there are none."""
        if not self.count:
            raise ValueError("no training images to take the mean image of")
        mean_image, mean, moment = (
            torch.zeros(3, side, side, dtype=torch.float64),
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(3, 3).double(),
        )
        for own in sorted(self.counts):
            sums = torch.from_numpy(self.images[own].astype(np.float64))
            mean_image += (
                F.interpolate(sums[None], (side, side), mode="bilinear", antialias=True)[0]
                if own != side
                else sums
            )
            mean += sums.sum((1, 2)) / own**2
            moment += torch.from_numpy(self.products[own]) / own**2
        mean = mean / self.count
        return Statistics(
            (mean_image / self.count).float(), moment / self.count - mean[:, None] * mean
        )

    def to_bytes(self) -> bytes:
        """A .npz file, the same for the same sums."""
        content = io.BytesIO()
        sides = sorted(side for side, count in self.counts.items() if count)
        counts = np.array([self.counts[side] for side in sides], np.int64)
        np.savez(
            content,
            sides=np.array(sides, np.int64),
            counts=counts,
            **{f"products{side}": self.products[side] for side in sides},
            **{f"images{side}": self.images[side] for side in sides},
        )
        return content.getvalue()

    @staticmethod
    def read(file: Path | io.BytesIO) -> Sums:
        """The inverse of `to_bytes`; raises several kinds of errors for a damaged file."""
        sums = Sums()
        with np.load(file, allow_pickle=False) as values:
            for side, count in zip(
                values["sides"].tolist(), values["counts"].tolist(), strict=True
            ):
                sums.counts[side], sums.images[side], sums.products[side] = (
                    count,
                    values[f"images{side}"],
                    values[f"products{side}"],
                )
        return sums


def sums_of(images: Iterable[np.ndarray]) -> Sums:
    """Of uint8 images (3, side, side), also of several sides."""
    sums = Sums()
    for image in images:
        sums.add(image)
    return sums


def _products(image: np.ndarray) -> np.ndarray:
    """float64 (3, 3), whole numbers: for each two colors the sum of their products over the pixels."""
    if image.flags.c_contiguous and not cpu_kernels.unavailable_reason():
        return cpu_kernels.color_products(image)
    pixels = image.shape[1] * image.shape[2]
    centered = _scratch(3, -(-pixels // EXACT) * EXACT)
    centered[:, pixels:] = 0
    np.subtract(image.reshape(3, -1), np.float32(128), out=centered[:, :pixels], dtype=np.float32)
    parts, products = centered.reshape(3, -1, EXACT), np.empty((3, 3))
    for i in range(3):
        for j in range(i, 3):
            products[i, j] = products[j, i] = np.einsum("ij,ij->i", parts[i], parts[j]).sum(
                dtype=np.float64
            )
    total = np.einsum("kij->ki", parts).sum(1, dtype=np.float64)
    # ab = (a - 128)(b - 128) + 128 (a - 128) + 128 (b - 128) + 128**2
    return products + 128 * (total[:, None] + total) + 128.0**2 * pixels


_kept = threading.local()


def _scratch(*shape: int) -> np.ndarray:
    """float32, its values arbitrary, the thread's own until it asks again: new memory for each image would take longer than the sums."""
    if getattr(_kept, "array", np.empty(0)).shape != shape:
        _kept.array = np.empty(shape, np.float32)
    return _kept.array
