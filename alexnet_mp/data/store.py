"""A store: a set of labelled uint8 RGB images, in memory or memory-mapped from a folder.

All images are square, channels first. Those of one side lie on one shelf, an array (count, 3, side, side); a set of large
images has a single shelf of 256, a folder of mixed small ones several, because a store never enlarges.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.data.files import Writer, beside, blocks, open_array, read_header

FITS = 2 * 10**9
"""Bytes of a resized copy that may be kept in memory."""


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, s, s) -> uint8 (N, 3, side, side): bilinear, with antialias where it reduces.

    Every image is resized on its own, in whole numbers on the CPU: the bits do not depend on the batch. CUDA has no such
    kernel; there it is done in float32 and rounded, which may differ by one grey level.
    """
    if images.shape[-1] == side:
        return images
    if not len(images):
        return images.new_empty((0, 3, side, side))
    if images.device.type == "mps":       # has no antialias
        return resize(images.cpu(), side).to(images.device)
    if images.device.type == "cpu":
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Statistics:
    """Of a training set, in grey levels (0 to 255)."""

    mean_image: Tensor
    """float32 (3, side, side)"""
    covariance: Tensor
    """float64 (3, 3): of a pixel's red, green and blue over all images, each image weighing the same."""


class Store:
    """Images, labels (int64) and class names; indexing is by `gather` only."""

    def __init__(self, shelves: Sequence[np.ndarray], labels: np.ndarray, classes: Sequence[str],
                 places: np.ndarray | None = None, path: Path | None = None) -> None:
        """`places` (N, 2) gives each image's shelf and row; None: one shelf, in order. `path`: the folder that it was opened from."""
        if places is None:
            places = np.stack([np.zeros(len(labels), np.int64), np.arange(len(labels))], 1)
        self.shelves, self.places, self.labels = list(shelves), places, np.asarray(labels, np.int64)
        self.classes, self.path = tuple(classes), path
        self._statistics: dict[int, Statistics] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the images that there are, ascending."""
        return tuple(sorted(self.shelves[k].shape[-1] for k in np.unique(self.places[:, 0])))

    def subset(self, indices: np.ndarray | Sequence[int]) -> Store:
        """A view of the images at `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        return Store(self.shelves, self.labels[indices], self.classes, self.places[indices], self.path)

    def gather(self, indices: np.ndarray | Sequence[int], side: int | None = None) -> Tensor:
        """uint8 (N, 3, side, side), on the CPU; None: the images' own side, ValueError where they have several."""
        places = self.places[np.asarray(indices, np.int64)]
        if len(self.shelves) == 1:
            images = torch.from_numpy(np.asarray(self.shelves[0])[places[:, 1]])
            return images if side is None else resize(images, side)
        if side is None and len(self.sides) > 1:
            raise ValueError(f"images of the sides {' '.join(map(str, self.sides))}: gather needs to know which one to resize them to")
        images = torch.empty((len(places), 3, *(side or self.sides[0],) * 2), dtype=torch.uint8)
        for k in np.unique(places[:, 0]):
            mine = np.flatnonzero(places[:, 0] == k)
            shelf = torch.from_numpy(np.asarray(self.shelves[k])[places[mine, 1]])
            images[torch.from_numpy(mine)] = resize(shelf, images.shape[-1])
        return images

    def resized(self, side: int) -> Store:
        """A copy in memory with all images at `side`; the store itself where they are so already or the copy would exceed FITS."""
        if self.sides == (side,) or not len(self) or len(self) * 3 * side * side > FITS:
            return self
        images = np.empty((len(self), 3, side, side), np.uint8)
        for rows in blocks(len(self)):
            images[rows.start:rows.stop] = self.gather(rows, side).numpy()
        return Store([images], self.labels, self.classes)

    def statistics(self, side: int) -> Statistics:
        """Of the images at `side`. Images below it are measured at their own side and their mean is enlarged.

        Computed once an instance; for a store that was opened from a folder, once for all in that folder, if it can be written.
        """
        if side not in self._statistics:
            digest = hashlib.blake2b(np.ascontiguousarray(self.places).tobytes() + str(side).encode(), digest_size=8).hexdigest()
            file = self.path / f"statistics-{digest}.npz" if self.path else None
            self._statistics[side] = _read_statistics(file, side) or self._measure(side)
            _write_statistics(file, self._statistics[side])
        return self._statistics[side]

    def _measure(self, side: int) -> Statistics:
        if not len(self):
            raise ValueError("no training images to take the mean image of")
        # Sums of whole numbers are exact in float64 below 2**53, so neither blocks nor threads can change them.
        mean_image, mean, moment = torch.zeros(3, side, side, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3).double()
        for k in np.unique(self.places[:, 0]):
            mine = np.flatnonzero(self.places[:, 0] == k)
            own = min(side, self.shelves[k].shape[-1])
            sums, products = torch.zeros(3, own, own, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
            for rows in blocks(len(mine)):
                images = self.gather(mine[rows.start:rows.stop], own).double()
                sums += images.sum(0)
                pixels = images.transpose(0, 1).reshape(3, -1)
                products += pixels @ pixels.T
            mean_image += F.interpolate(sums[None], (side, side), mode="bilinear", antialias=True)[0] if own != side else sums
            mean += sums.sum((1, 2)) / own**2
            moment += products / own**2
        mean = mean / len(self)
        return Statistics((mean_image / len(self)).float(), moment / len(self) - mean[:, None] * mean)

    def save(self, path: str | Path) -> None:
        """Writes the store as a new folder `path`. FileExistsError if there is one."""
        with Writer(path, self.classes) as writer:
            for i in range(len(self)):
                shelf, row = self.places[i]
                writer.add(self.shelves[shelf][row], int(self.labels[i]))

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Store:
        """The store in folder `path`, memory-mapped. ValueError naming the file that is missing, damaged or not a store's.

        Sizes and labels are always checked; `verify` reads all pixels too.
        """
        path = Path(path)
        header = read_header(path)
        shelves = [open_array(path, header, f"images-{side}.npy", np.uint8, (count, 3, side, side), verify)
                   for side, count in zip(header["sides"], header["counts"], strict=True)]
        total = sum(header["counts"])
        labels = open_array(path, header, "labels.npy", np.int64, (total,), True)
        places = open_array(path, header, "places.npy", np.int64, (total, 2), True)
        return Store(shelves, np.array(labels), header["classes"], np.array(places), path)


def _read_statistics(file: Path | None, side: int) -> Statistics | None:
    if file is None or not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as values:
            statistics = Statistics(torch.from_numpy(values["mean_image"]), torch.from_numpy(values["covariance"]))
        return statistics if statistics.mean_image.shape == (3, side, side) else None
    except Exception:        # numpy raises many kinds for a damaged file; measuring again mends it
        return None


def _write_statistics(file: Path | None, statistics: Statistics) -> None:
    if file is None or file.exists():
        return
    temporary = beside(file).with_suffix(".npz")
    with contextlib.suppress(OSError):       # a read-only store: measured again at the next start
        np.savez(temporary, mean_image=statistics.mean_image.numpy(), covariance=statistics.covariance.numpy())
        os.replace(temporary, file)
