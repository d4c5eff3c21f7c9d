"""Estimates how large a store will be, from the headers of some images, before it is packed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alexnet_mp.data.decode import SIDE, stored_side
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.store_format import BEGUN

SAMPLE = 400
"""Image files of a split that are looked at; their headers take a second."""
JPEG_BYTES_PER_PIXEL = 0.7
"""Of a photograph at quality 95, rather too many: 45 kB at 256 pixels."""


def estimated_bytes(listings: Iterable[Listing], encode: str) -> int:
    """About how many bytes the images of `listings` will take in a store; exact if raw and few.

    Files that cannot be read count as large as the others.
    """
    total = 0.0
    for listing in listings:
        if not len(listing):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sides = [stored_side(file) for file in listing.contents.sample(SAMPLE, len(listing))]
        pixels = [side**2 for side in sides if side] or [SIDE**2]
        each = 3 if encode == "raw" else JPEG_BYTES_PER_PIXEL
        total += each * len(listing) * float(np.mean(pixels))
    return round(total)


def packed_bytes(folder: Path) -> int:
    """The bytes of the shards that are in `folder` and below already, finished or begun."""
    kinds = ("images-*.npy", f"{BEGUN}*")
    return sum(path.stat().st_size for kind in kinds for path in folder.rglob(kind))


def free_bytes(folder: Path) -> int:
    """The room on the disk of `folder`, which need not exist yet."""
    parents = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(parent for parent in parents if parent.is_dir())).free


def size_text(count: float) -> str:
    """Bytes for people: 1.38 GB, 48 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.0f} kB"
