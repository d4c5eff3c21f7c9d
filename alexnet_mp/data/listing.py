"""The images of a split before any is opened: names, classes, sizes, and where the bytes are."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from alexnet_mp.data.contents import Contents, reordered_names
from alexnet_mp.data.decode import Readable
from alexnet_mp.data.directory import is_image

UNKNOWN = -1
"""The size of an image that is not known before it is read."""


@dataclass
class Ignored:
    """Counts what was left out of a listing, by reason."""

    hidden: int = 0  # files and folders, among them those that a Mac adds to its archives
    special: int = 0  # pipes, devices, broken links, links to a folder above
    other: Counter[str] = field(default_factory=Counter)  # not an image's extension

    def add(self, more: Ignored) -> None:
        """Adds the counts of another listing."""
        self.hidden += more.hidden
        self.special += more.special
        self.other += more.other

    def __str__(self) -> str:
        parts = []
        if self.hidden or self.other:
            kinds = ", ".join(
                f"{extension or 'no extension'} {count:,}"
                for extension, count in self.other.most_common(5)
            )
            parts.append(f"{self.hidden:,} hidden files or folders")
            parts.append(
                f"{self.other.total():,} files whose names are not an image's"
                + (f" ({kinds})" if kinds else "")
            )
        if self.special:
            parts.append(f"{self.special:,} pipes, devices, broken or circular links")
        return ", ".join(parts)


@dataclass(frozen=True)
class Listing:
    """The images of one split, by class and name, before any is opened.

    An ImageNet has 1.3 million: names lie in one block of bytes and numbers in arrays, about 60
    bytes an image, because a Python object for each would take gigabytes.
    """

    folder: Path
    """The folder of the split, also one within an archive."""
    classes: tuple[str, ...]
    labels: np.ndarray  # int32 (N,), ascending
    sizes: np.ndarray  # int64 (N,), bytes; UNKNOWN where only reading tells
    times: np.ndarray  # int64 (N,), of the last change, in nanoseconds
    names: bytes  # CLASS/FILE of each image, one after another; CLASS as its folder is called
    ends: np.ndarray  # int64 (N,), the end of each in `names`
    contents: Contents
    ignored: Ignored
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, number: int) -> Readable:
        """The file of image `number`, or the member of an archive."""
        return self.contents.file(number)

    def name(self, number: int) -> str:
        """CLASS/FILE of image `number` as text, with / on every system."""
        return self._name(number).decode("utf-8", "backslashreplace")

    def location(self, number: int) -> str:
        """Where image `number` is, for messages."""
        return self.contents.location(number, self.name(number))

    def stored_name(self, number: int) -> str:
        """CLASS/FILE without the extension, in which the forms of a data set differ."""
        name = self.name(number)
        return os.path.splitext(name)[0] if is_image(name) else name

    def identity(self) -> str:
        """A digest of classes and stored names: the same for a data set in whatever form."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        digest.update(self.labels.astype("<i8").tobytes())
        for row in range(len(self)):
            digest.update(self.stored_name(row).encode() + b"\n")
        return digest.hexdigest()

    def _name(self, number: int) -> bytes:
        return self.names[self._end(number - 1) : self._end(number)]

    def _end(self, number: int) -> int:
        return int(self.ends[number]) if number >= 0 else 0

    def digest(self, numbers: range | None = None, times: bool = True) -> str:
        """A digest of names, classes, sizes and times of change, of all images or of some.

        Without `times`, a copy of the folder has the same.
        """
        rows = range(len(self)) if numbers is None else numbers
        start, stop = rows.start, rows.stop
        first, last = self._end(start - 1), self._end(stop - 1)
        labels = self.labels[start:stop]
        changes = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist()] if len(labels) else []
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.names[first:last])
        numbers_of = [self.ends[start:stop] - first, self.sizes[start:stop]]
        for values in [*numbers_of, self.times[start:stop]] if times else numbers_of:
            digest.update(values.astype("<i8").tobytes())
        # Classes are named where they change: a class that is added before others renumbers
        # those, but does not change their images.
        digest.update(repr([(k, self.classes[labels[k]]) for k in changes]).encode())
        return digest.hexdigest()


def in_class_order(listing: Listing) -> Listing:
    """A listing of flat files as it would be with a folder for each class: the same bytes follow.

    The names, FOLDER/FILE or FILE, become CLASS/FILE.
    """
    order = np.argsort(listing.labels, kind="stable")
    labels = listing.labels[order]
    names, ends = reordered_names(listing.names, listing.ends, order)
    starts = [0, *ends[:-1].tolist()]
    files = [
        os.fsencode(listing.classes[label]) + b"/" + names[start:end].rpartition(b"/")[2]
        for label, start, end in zip(labels.tolist(), starts, ends.tolist(), strict=True)
    ]
    return replace(
        listing,
        labels=labels,
        sizes=listing.sizes[order],
        times=listing.times[order],
        names=b"".join(files),
        ends=np.cumsum([len(file) for file in files], dtype=np.int64),
        contents=listing.contents.reordered(order),
    )
