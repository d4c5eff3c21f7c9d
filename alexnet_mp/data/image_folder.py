"""A folder of image files, SPLIT/CLASS/FILE: what counts as an image, which class it is of, and what is left out."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

EXTENSIONS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jif",
    ".pjpeg",
    ".pjpg",
    ".mpo",
    ".png",
    ".apng",
    ".bmp",
    ".dib",
    ".webp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".avifs",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".j2k",
    ".jpx",
    ".heic",
    ".heif",
}
SPLITS = ("train", "val", "test")
DEPTH = 64
"""Folders within each other, from the root on."""


@dataclass
class Ignored:
    """What was left out of a split, counted by reason."""

    hidden: int = 0  # files and folders; also what archives of a Mac leave behind
    special: int = 0  # pipes, devices, links to nothing, links to a folder above
    other: Counter[str] = field(
        default_factory=Counter
    )  # files whose names are not an image's, by extension

    def add(self, more: Ignored) -> None:
        self.hidden, self.special, self.other = (
            self.hidden + more.hidden,
            self.special + more.special,
            self.other + more.other,
        )

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{name or 'no extension'} {count:,}" for name, count in self.other.most_common(5)
        )
        parts = [f"{self.hidden:,} hidden files or folders"] if self.hidden or self.other else []
        if self.hidden or self.other:
            parts.append(
                f"{self.other.total():,} files whose names are not an image's"
                + (f" ({kinds})" if kinds else "")
            )
        if self.special:
            parts.append(f"{self.special:,} pipes, devices, broken or circular links")
        return ", ".join(parts)


@dataclass(frozen=True)
class Listing:
    """The images of one split, by class and name, before any is opened."""

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]
    stamps: list[tuple[int, int]]  # of each file: bytes, nanoseconds of change
    ignored: Ignored
    notes: tuple[str, ...] = ()

    def name(self, number: int) -> str:
        """The file's path in the folder, with / on every system."""
        return text(self.files[number].relative_to(self.folder).as_posix())

    def digest(self, numbers: range | None = None) -> str:
        """Of names, classes, sizes and times of change."""
        digest = hashlib.blake2b(digest_size=16)
        for i in range(len(self.files)) if numbers is None else numbers:
            digest.update(
                repr((self.classes[self.labels[i]], self.name(i), *self.stamps[i])).encode()
            )
        return digest.hexdigest()


def list_split(
    folder: Path, classes: tuple[str, ...] | None = None, flag: str = "--data-dir"
) -> Listing:
    """Lists FOLDER/CLASS/*, also within subfolders of a class. Classes are the folders' names, sorted as text.

    ValueError naming the folder: no class folders, a class without images, or other classes than `classes`.
    """
    entries = _entries(folder)
    folders = {
        text(entry.name): entry.name
        for entry in entries
        if not is_hidden(entry.name) and _is_folder(entry)
    }
    names = tuple(sorted(folders))
    if not names:
        loose = sum(is_image(entry.name) for entry in entries)
        raise ValueError(
            f"{flag}: {folder} has no class folders"
            + (
                f", but {loose:,} images: sort them into {folder}/CLASS/, or name them with launch/pack.py --val-labels FILE"
                if loose
                else f"; expected {folder}/CLASS/ with images in it"
            )
        )
    if classes is not None and names != classes:
        odd = sorted(set(names) ^ set(classes))[0]
        have, lack = (
            ("is not a class of the training images", "has it")
            if odd in names
            else ("is a class of the training images", "lacks it")
        )
        raise ValueError(
            f"{flag}: {folder} and its neighbor train must have the same classes: {odd} {have}, {folder} {lack}"
        )
    listing = Listing(folder, names, [], [], [], Ignored(), () if classes else _notes(names))
    for entry in entries:
        if text(entry.name) not in folders:
            _take(entry, listing, None)
    for label, name in enumerate(names):
        before = len(listing.files)
        for entry in _below(folder / folders[name]):
            _take(entry, listing, label)
        if len(listing.files) == before:
            raise ValueError(
                f"{flag}: {folder / name} has no images ({' '.join(sorted(EXTENSIONS))}); add some or delete the folder"
            )
    return listing


def list_flat(
    folder: Path, classes: tuple[str, ...], classes_of: Mapping[str, str], labels_file: Path
) -> Listing:
    """Lists FOLDER/*, whose classes `classes_of` names by file, with or without extension. ValueError for an image without one."""
    listing = Listing(folder, classes, [], [], [], Ignored())
    for entry in _entries(folder):
        file = text(entry.name)
        name = classes_of.get(file, classes_of.get(os.path.splitext(file)[0]))
        if name is None and is_image(entry.name) and not is_hidden(entry.name):
            raise ValueError(f"--val-labels {labels_file}: does not name the class of {entry.path}")
        _take(entry, listing, classes.index(name) if name is not None else None)
    if not listing.files:
        raise ValueError(f"{folder}: has no images ({' '.join(sorted(EXTENSIONS))})")
    return listing


def _take(entry: os.DirEntry[str], listing: Listing, label: int | None) -> None:
    """Adds a file to the listing, or to what was ignored."""
    if is_hidden(entry.name):
        listing.ignored.hidden += 1
    elif not _is_file(entry):  # opening a pipe would wait for ever
        listing.ignored.special += 1
    elif label is None or not is_image(entry.name):
        listing.ignored.other[os.path.splitext(entry.name)[1].lower()] += 1
    else:
        status = entry.stat()
        listing.files.append(Path(entry.path))
        listing.labels.append(label)
        listing.stamps.append((status.st_size, status.st_mtime_ns))


def _notes(names: tuple[str, ...]) -> tuple[str, ...]:
    """What may surprise about the classes' names."""
    notes = []
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        notes.append(
            f"the classes are numbers, sorted as text ({', '.join(names[:3])} ...), as torchvision does: class k of the network "
            "is not folder k; names of one length (001, 002) would keep the order"
        )
    folded = Counter(name.casefold() for name in names)
    if twice := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(
            f"classes that differ only in upper and lower case are different classes: {', '.join(twice[:4])}"
        )
    return tuple(notes)


def text(name: str) -> str:
    """A file's name as text that can be printed and stored, the same in every locale: UTF-8, other bytes as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: text(entry.name))


def is_hidden(name: str) -> bool:
    """Hidden ones, which include AppleDouble's `._photo.jpg`, and a Mac archive's shadow folder."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[os.DirEntry[str]]:
    """The files in `folder` and below, in the order of their names; as one: a hidden folder, a link to a folder that it is in."""
    # A link to the split's own folder would bring images of other classes.
    folders = [folder] if above else [*folder.resolve().parents, folder]
    above = (*above, *((status.st_dev, status.st_ino) for status in map(os.stat, folders)))
    for entry in _entries(folder):
        if not is_hidden(entry.name) and _is_folder(entry) and not _is_above(entry, above):
            if len(above) > DEPTH:
                raise ValueError(f"{entry.path}: more than {DEPTH} folders within each other")
            yield from _below(Path(entry.path), above)
        else:
            yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        return entry.is_file()
    return False


def _is_above(entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> bool:
    status = entry.stat()
    return (status.st_dev, status.st_ino) in above
