"""Walks folders of image files, in the order of their names, without hidden and circular ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from alexnet_mp.data.archive_tree import ArchiveEntry, ArchivePath

Folder: TypeAlias = Path | ArchivePath
"""A folder on the disk, or in an archive."""
Entry: TypeAlias = os.DirEntry[str] | ArchiveEntry
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .pjpeg .pjpg .mpo .png .apng .bmp .dib .webp .gif .tif .tiff .avif "
    ".avifs .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .heic .heif".split()
)
DEPTH = 64
"""Deepest nesting of folders, counted from the root of the file system."""
SHOWN = 4
"""Names that one message lists."""


def as_text(name: str) -> str:
    """A file's name as text that can be printed and stored: UTF-8, other bytes as \\xff.

    It is the same in every locale.
    """
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def name_order(name: str) -> tuple[str, str]:
    """What names are sorted by: an image's extension counts last.

    The forms of a data set differ in the extension (.JPEG, .jpg), and must not differ in the order.
    """
    text = as_text(name)
    stem, _, extension = text.rpartition(".")
    # As `is_image`, which would part the name again: a large folder has a million.
    return (stem, extension) if stem and f".{extension.lower()}" in EXTENSIONS else (text, "")


def sorted_entries(folder: Folder) -> list[Entry]:
    """Returns the entries of `folder`, sorted by name."""
    if isinstance(folder, ArchivePath):
        return sorted(folder.entries(), key=lambda entry: name_order(entry.name))
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: name_order(entry.name))


def visible_folders(folder: Folder) -> list[str]:
    """The names of the folders in `folder`, sorted, without hidden ones."""
    return [e.name for e in sorted_entries(folder) if not is_hidden(e.name) and is_folder(e)]


def is_hidden(name: str) -> bool:
    """Whether a name is hidden: .name, among them AppleDouble's `._photo.jpg`, or __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a name has an image's extension."""
    stem, _, extension = name.rpartition(".")  # os.path.splitext takes twice as long
    return bool(stem) and f".{extension.lower()}" in EXTENSIONS


def is_folder(entry: Entry) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:  # contextlib.suppress takes longer than all else here
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: Entry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def files_below(
    folder: Folder, inside: str, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[list[Entry], str]]:
    """The files in `folder` and below, in the order of their names: neighbors in one subfolder as
    a list, and that subfolder.

    Hidden folders and links to a folder above come as if they were files, to be counted.
    """
    if isinstance(folder, Path):  # archives have no links to a folder
        # A link to the split's own folder would bring images of other classes.
        folders = [folder] if above else [*folder.resolve().parents, folder]
        above = (*above, *((status.st_dev, status.st_ino) for status in map(os.stat, folders)))
    files: list[Entry] = []
    for entry in sorted_entries(folder):
        if not is_folder(entry) or is_hidden(entry.name) or (above and _is_above(entry, above)):
            files.append(entry)
        elif len(above) > DEPTH:
            raise ValueError(f"{entry.path}: more than {DEPTH} folders within each other")
        else:
            yield files, inside
            files = []
            yield from files_below(folder / entry.name, f"{inside}{entry.name}/", above)
    yield files, inside


def _is_above(entry: Entry, above: tuple[tuple[int, int], ...]) -> bool:
    status = os.stat(entry.path)
    return (status.st_dev, status.st_ino) in above


def image_names(folder: Folder) -> list[str]:
    """The names of the images that lie in `folder` itself, sorted, as text."""
    return sorted(
        as_text(entry.name)
        for entry in sorted_entries(folder)
        if is_image(entry.name) and not is_hidden(entry.name)
    )


def flat_images(folder: Folder) -> Folder:
    """FOLDER/images where all images of `folder` are there, as in Tiny-ImageNet; else `folder`."""
    inner = folder / "images"
    return inner if inner.is_dir() and not any(image_names(folder)) else folder


def listed(names: Sequence[str]) -> str:
    """The first of `names`, for a message."""
    return ", ".join(map(as_text, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
