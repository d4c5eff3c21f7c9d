"""Lists a folder of image files, CLASS/FILE: what is an image, its class, and what is left out."""

from __future__ import annotations

import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from alexnet_mp.data.archive_tree import ArchiveEntry, ArchivePath
from alexnet_mp.data.contents import Contents, FolderFiles
from alexnet_mp.data.directory import (
    EXTENSIONS,
    SHOWN,
    Entry,
    Folder,
    as_text,
    files_below,
    flat_images,
    image_names,
    is_file,
    is_folder,
    is_hidden,
    is_image,
    listed,
    sorted_entries,
    visible_folders,
)
from alexnet_mp.data.listing import Ignored, Listing, in_class_order

_WNID = re.compile(r"n\d{8}(?=_)")


class _ListingBuilder:
    """Collects the files of a listing in compact arrays."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.ignored = folder, Ignored()
        self.members = array("q")  # numbers of members, in an archive
        self.labels, self.ends, self.sizes, self.times = (
            array("i"),
            array("q"),
            array("q"),
            array("q"),
        )
        self.names = bytearray()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, entries: Sequence[Entry], inside: str, label: int | None) -> None:
        """Adds `entries`, files of the subfolder `inside` ("cat/"), or counts them as ignored."""
        images = []
        for entry in entries:
            if is_hidden(entry.name):
                self.ignored.hidden += 1
            elif not is_file(entry):  # opening a pipe would wait forever
                self.ignored.special += 1
            elif label is None or not is_image(entry.name):
                self.ignored.other[os.path.splitext(entry.name)[1].lower()] += 1
            else:
                images.append(entry)
        if label is not None:
            self._add(images, os.fsencode(inside), label)

    def _add(self, images: Sequence[Entry], inside: bytes, label: int) -> None:
        """Lists instead of a loop's body: of a million files these lines are half of the time."""
        states = [entry.stat() for entry in images]
        names = [inside + os.fsencode(entry.name) for entry in images]
        ends = accumulate(map(len, names), initial=len(self.names))
        self.ends.extend(islice(ends, 1, None))
        self.names += b"".join(names)
        self.labels.extend([label] * len(images))
        self.sizes.extend([state.st_size for state in states])
        self.times.extend([state.st_mtime_ns for state in states])
        self.members.extend([entry.number for entry in images if isinstance(entry, ArchiveEntry)])

    def finish(self, classes: Sequence[str], notes: Sequence[str] = ()) -> Listing:
        names, ends = bytes(self.names), np.array(self.ends, np.int64)
        contents: Contents
        if isinstance(self.folder, ArchivePath):
            contents = self.folder.tree.contents(np.array(self.members, np.int64))
        else:
            contents = FolderFiles(self.folder, names, ends)
        return Listing(
            Path(self.folder),
            tuple(classes),
            np.array(self.labels, np.int32),
            np.array(self.sizes, np.int64),
            np.array(self.times, np.int64),
            names,
            ends,
            contents,
            self.ignored,
            tuple(notes),
        )


def class_folders(folder: Folder, flag: str = "--data-dir") -> dict[str, str]:
    """The classes of FOLDER/CLASS/*, sorted as text, and the name of each one's folder on disk.

    ValueError naming the folder where there are none, only one, or two whose names look alike.
    """
    entries = sorted_entries(folder)
    classes: dict[str, str] = {}
    for entry in entries:
        if is_hidden(entry.name) or not is_folder(entry):
            continue
        # The same letters may be stored composed (Linux) or decomposed (a Mac's archives).
        name = unicodedata.normalize("NFC", as_text(entry.name))
        if name in classes:
            raise ValueError(
                f"{flag}: {folder} has two folders whose names look alike ({name}): their letters "
                "are composed in one and decomposed in the other; merge them"
            )
        classes[name] = entry.name
    if not classes:
        raise ValueError(f"{flag}: {folder} has no class folders{_loose_images(folder, entries)}")
    if len(classes) == 1:
        (name,) = classes
        raise ValueError(f"{flag}: {folder} has {_one_class(folder / classes[name], name)}")
    return dict(sorted(classes.items()))


def list_split(
    folder: Folder, classes: Sequence[str] | None = None, flag: str = "--data-dir"
) -> Listing:
    """Lists FOLDER/CLASS/*, also within subfolders of a class.

    Without class folders, files that all have ImageNet's names (n01440764_tench.JPEG) are of the
    classes that these begin with. ValueError naming the folder: no class folders or only one, a
    class without images, or other classes than `classes`, those of the training images.
    """
    if classes is None and (wnids := _wnids(folder)):
        return list_flat(folder, sorted(set(wnids.values())), wnids, folder, flag)
    folders = class_folders(folder, flag)
    names = tuple(folders)
    if classes is not None and names != tuple(classes):
        odd = sorted(set(names) ^ set(classes))[0]
        reason = (
            f"{odd} is not a class of the training images, {folder} has it"
            if odd in folders
            else f"{odd} is a class of the training images, {folder} lacks it"
        )
        raise ValueError(
            f"{flag}: {folder} and its neighbor train must have the same classes: {reason}"
        )
    listing = _ListingBuilder(folder)
    own = set(folders.values())
    others = [entry for entry in sorted_entries(folder) if entry.name not in own]
    listing.take(others, "", None)
    nested = []
    for label, (name, disk_name) in enumerate(folders.items()):
        before = len(listing)
        subfolders = set()
        for entries, inside in files_below(folder / disk_name, f"{disk_name}/"):
            listing.take(entries, inside, label)
            if entries:
                subfolders.add(inside.split("/")[1])
        if len(listing) == before:
            raise ValueError(
                f"{flag}: {folder / disk_name} has no images ({' '.join(sorted(EXTENSIONS))}); "
                f"add some or delete the folder{_nested_hint(folder)}"
            )
        if len(subfolders - {""}) > 1:
            nested.append(name)
    return listing.finish(names, () if classes else (*_name_notes(names), *_nested_notes(nested)))


def _wnids(folder: Folder) -> dict[str, str]:
    """The wnid of each image that lies in `folder` itself, if all have one; else nothing."""
    if visible_folders(folder):
        return {}
    found = {name: _WNID.match(name) for name in map(as_text, image_names(folder))}
    wnids = {name: match[0] for name, match in found.items() if match}
    return wnids if len(wnids) == len(found) and len(set(wnids.values())) > 1 else {}


def list_flat(
    folder: Folder,
    classes: Sequence[str],
    classes_of: Mapping[str, str],
    labels_file: Folder,
    flag: str = "--val-labels",
) -> Listing:
    """Lists FOLDER/*, or FOLDER/images/*, whose classes `classes_of` gives by file name.

    It is in the order of the classes, as if each had its folder. The names in `classes_of` may
    lack the extension. ValueError for an image without a class.
    """
    listing = _ListingBuilder(folder)
    numbers = {name: label for label, name in enumerate(classes)}
    place = flat_images(folder)
    inside = "" if place == folder else f"{place.name}/"
    for entry in sorted_entries(place):
        file = as_text(entry.name)
        name = classes_of.get(file, classes_of.get(os.path.splitext(file)[0]))
        if name is None and is_image(entry.name) and not is_hidden(entry.name):
            raise ValueError(f"{flag} {labels_file}: does not name the class of {entry.path}")
        listing.take([entry], inside, numbers[name] if name is not None else None)
    if not len(listing):
        raise ValueError(f"{folder}: has no images ({' '.join(sorted(EXTENSIONS))})")
    return in_class_order(listing.finish(classes))


# ---- messages ----


def _one_class(folder: Folder, name: str) -> str:
    """Why one class is refused: there is nothing to learn, or the folder is a level too high."""
    if len(inner := visible_folders(folder)) > 1:
        return (
            f"1 class ({name}), which has folders {listed(inner)} in it: did you mean {folder}? "
            f"Name that folder, or move its folders up, into {folder.parent}"
        )
    return (
        f"1 class ({name}), and training needs two or more: with one, the softmax is 1 whatever "
        "the network says, and nothing is learned"
    )


def _loose_images(folder: Folder, entries: Sequence[Entry]) -> str:
    """Returns the advice for a folder that has images but no class folders."""
    images = [as_text(entry.name) for entry in entries if is_image(entry.name)]
    if not images:
        return f"; expected {folder}/CLASS/ with images in it"
    hint = ""
    tables = [as_text(entry.name) for entry in entries if entry.name.lower().endswith(".csv")]
    guessed = Counter(
        os.path.splitext(name)[0].rstrip("0123456789()").rstrip(" _.-") for name in images
    )
    guessed.pop("", None)
    if tables:
        hint = f" ({tables[0]} seems to say which class each is of)"
    elif 1 < len(guessed) <= len(images) / 2:
        hint = f" (by their names they are of {len(guessed):,} classes: {listed(sorted(guessed))})"
    if isinstance(folder, ArchivePath):
        return f", but {len(images):,} images, whose classes nothing says: repack as CLASS/FILE"
    return (
        f", but {len(images):,} images: sort them into {folder}/CLASS/{hint}, "
        "or name them with launch/pack.py --val-labels FILE"
    )


def _nested_hint(folder: Folder) -> str:
    """Names a folder in `folder` that has class folders itself, where a class lacks images."""
    for name in visible_folders(folder):
        place = folder / name
        inner = [below for below in visible_folders(place) if image_names(place / below)]
        if len(inner) > 1:
            return f"; or did you mean {place}, which has folders {listed(inner)}?"
    if (folder / "labels").is_dir() and (folder / "images").is_dir():
        return "; images beside labels are a detection set's, and this one classifies"
    return ""


def _nested_notes(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"images in folders within a class are of that class: {listed(names)}",)


def _name_notes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Notes on class names that may surprise."""
    notes = []
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        notes.append(
            f"the classes are numbers, sorted as text ({', '.join(names[:3])} ...), as torchvision "
            "does: class k of the network is not folder k; names of one length (001, 002) would "
            "keep the order"
        )
    folded = Counter(name.casefold() for name in names)
    if twice := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(
            "classes that differ only in upper and lower case are different classes: "
            + ", ".join(twice[:SHOWN])
        )
    if background := [name for name in names if name in ("BACKGROUND_Google", "257.clutter")]:
        notes.append(
            f"{background[0]} is trained as a class; results on Caltech's sets usually leave it out"
        )
    return tuple(notes)
