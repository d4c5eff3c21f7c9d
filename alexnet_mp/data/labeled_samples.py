"""Lists samples that carry their labels with them, as webdataset shards and Parquet rows do.

Classes are sorted by name and images by class and name, as in a folder CLASS/FILE, so that the
same images give the same store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alexnet_mp.data.contents import Contents
from alexnet_mp.data.directory import as_text, name_order
from alexnet_mp.data.folder_layout import SPELLINGS, SPLITS, Split
from alexnet_mp.data.listing import Ignored, Listing

Label = int | str
UNLABELED = -1
"""The label of an image that has none, as in ImageNet's test split."""
SHOWN = 3
"""Labels that one message names."""
_WNID = re.compile(r"^(n\d{8})_|_(n\d{8})$")
"""In the names of ImageNet's files: n01440764_18.JPEG, ILSVRC2012_val_00000293_n01440764.JPEG."""
_WORD = re.compile(r"[a-z]+")


@dataclass
class Samples:
    """The samples of one split, in the order of their files."""

    keys: list[str] = field(default_factory=list)
    """The name of each image, with its folders; empty for none."""
    labels: list[Label] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """The shard of each sample, without the extension."""
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """The number of each sample among the contents of the split."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ListedSet:
    """An image set whose splits have been listed."""

    root: Path
    folders: Mapping[Split, Path]
    """What messages call the splits."""
    listings: Mapping[Split, Listing]
    notes: tuple[str, ...] = ()
    flag: str = "--data-dir"

    def list(self, split: Split) -> Listing:
        return self.listings[split]


def split_of(file: Path) -> Split | None:
    """The split that the name of a file says, or that of its folder; None where neither does."""
    for name in (file.name, file.parent.name):
        for word in _WORD.findall(name.lower()):
            for split in SPLITS:
                if word in SPELLINGS[split]:
                    return split
    return None


def by_split(files: Sequence[Path], flag: str, source: Path) -> dict[Split, list[Path]]:
    """The files of each split, sorted by name; all are train's where no name says a split."""
    found: dict[Split, list[Path]] = {}
    named = {file: split_of(file) for file in sorted(files)}
    if not any(named.values()):
        return {"train": list(named)}
    for file, split in named.items():
        if split is None:
            raise ValueError(
                f"{flag} {source}: {file.name} does not say of which split it is, as others do; "
                "rename it, or move it elsewhere"
            )
        found.setdefault(split, []).append(file)
    return found


def list_samples(
    root: Path,
    samples: Mapping[Split, Samples],
    contents: Mapping[Split, Callable[[np.ndarray], Contents]],
    names: Sequence[str] | None,
    flag: str,
) -> ListedSet:
    """The listings of `samples`, sorted.

    `contents` gives the contents of a split's samples by their rows. `names`: the class that each
    numeric label means; None where it is not known. ValueError for labels that do not fit.
    """
    notes: list[str] = []
    listed: dict[Split, Samples] = {}
    for split in SPLITS:
        if split in samples:
            some = _labeled(samples[split], f"{root}: {split}", notes)
            if some.keys:
                listed[split] = some
    if not listed:
        raise ValueError(f"{flag} {root}: no image in it has a label")
    classes = _class_names(listed, names, root, flag, notes)
    order = tuple(sorted(set(classes.values())))
    if len(order) < 2:
        raise ValueError(f"{flag} {root}: has 1 class ({order[0]}), and training needs two or more")
    if len(order) < len(classes):
        raise ValueError(f"{flag} {root}: two labels mean the same class; class names must differ")
    return ListedSet(
        root,
        {split: root / split for split in listed},
        {
            split: _listing(root / split, some, classes, order, contents[split])
            for split, some in listed.items()
        },
        tuple(notes),
        flag,
    )


def _labeled(samples: Samples, place: str, notes: list[str]) -> Samples:
    """The samples that have a label."""
    notes += samples.notes
    kept = [k for k, label in enumerate(samples.labels) if label != UNLABELED]
    missing = len(samples.labels) - len(kept)
    if not missing:
        return samples
    notes.append(
        f"{place}: left out, its {missing:,} images have no labels"
        if not kept
        else f"{place}: left out {missing:,} images without labels"
    )
    columns = ("keys", "labels", "places", "sizes", "times", "rows")
    return Samples(*([getattr(samples, column)[k] for k in kept] for column in columns))


def _class_names(
    samples: Mapping[Split, Samples],
    names: Sequence[str] | None,
    root: Path,
    flag: str,
    notes: list[str],
) -> dict[Label, str]:
    """The class that each label means: the wnid in ImageNet's file names, else its name."""
    labels: set[Label] = {label for some in samples.values() for label in some.labels}
    if wnids := _wnids(samples, labels):
        return wnids
    numbers = sorted(label for label in labels if isinstance(label, int))
    if len(numbers) < len(labels):
        if numbers:
            raise ValueError(
                f"{flag} {root}: some labels are numbers ({numbers[0]}) and some are names; "
                "make them one or the other"
            )
        return {label: str(label) for label in labels}
    if names is None:
        width = len(str(numbers[-1]))
        notes.append(
            f"{root}: its classes have no names but numbers, {numbers[0]} to {numbers[-1]}; "
            "classes.txt beside the shards, line k for class k - 1, would name them"
        )
        return {number: f"{number:0{width}}" for number in numbers}
    if numbers[0] < 0 or numbers[-1] >= len(names):
        raise ValueError(
            f"{flag} {root}: has label {numbers[0] if numbers[0] < 0 else numbers[-1]}, and "
            f"{len(names):,} classes are named, 0 to {len(names) - 1}"
        )
    return {number: names[number] for number in numbers}


def _wnids(samples: Mapping[Split, Samples], labels: set[Label]) -> dict[Label, str]:
    """The wnid of each label, where the files' names say it alike for all labels; else nothing."""
    some = samples.get("train") or next(iter(samples.values()))
    found: dict[Label, str] = {}
    for key, label in zip(some.keys, some.labels, strict=True):
        match = _WNID.search(stem_of(key))
        if match is None or found.setdefault(label, match[1] or match[2]) != (match[1] or match[2]):
            return {}
    return found if set(found) == labels and len(set(found.values())) == len(found) else {}


def stem_of(key: str) -> str:
    """The name of a file without folders and extension."""
    return os.path.splitext(key.rpartition("/")[2])[0]


def _listing(
    folder: Path,
    samples: Samples,
    classes: Mapping[Label, str],
    order: tuple[str, ...],
    contents: Callable[[np.ndarray], Contents],
) -> Listing:
    numbers = {label: order.index(name) for label, name in classes.items()}
    labels = np.array([numbers[label] for label in samples.labels], np.int32)
    by_class = np.argsort(labels, kind="stable")
    borders = np.searchsorted(labels[by_class], np.arange(1, len(order)))
    groups = [rows.tolist() for rows in np.split(by_class, borders)]
    file_of = _file_names(samples, [(order[k], rows) for k, rows in enumerate(groups)])
    # Sorted class by class: the keys of all images at once would take gigabytes.
    ranked: list[int] = []
    names: list[bytes] = []
    for name, rows in zip(order, groups, strict=True):
        files = {k: file_of(k, name) for k in rows}
        rows.sort(key=lambda k: [name_order(part) for part in files[k].split("/")])
        ranked += rows
        names += [os.fsencode(f"{name}/{files[k]}") for k in rows]
    return Listing(
        folder,
        order,
        labels[ranked],
        np.array(samples.sizes, np.int64)[ranked],
        np.array(samples.times, np.int64)[ranked],
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        contents(np.array(samples.rows, np.int64)[ranked]),
        Ignored(),
    )


FileName = Callable[[int, str], str]
"""The name of a sample, given its number and its class."""


def _file_names(samples: Samples, groups: Sequence[tuple[str, Sequence[int]]]) -> FileName:
    """Names that are unique within each class of `groups`: as short as that allows."""

    def short(k: int, name: str) -> str:
        stem, extension = os.path.splitext(samples.keys[k].rpartition("/")[2])
        return as_text(stem.removesuffix(f"_{name}") + extension)

    def whole(k: int, name: str) -> str:
        return as_text(samples.keys[k])

    def with_shard(k: int, name: str) -> str:
        return as_text(f"{samples.places[k]}/{samples.keys[k]}")

    named = [short, whole] if all(samples.keys) else []
    for candidate in (*named, with_shard):
        if all(
            len({os.path.splitext(candidate(k, name))[0] for k in rows}) == len(rows)
            for name, rows in groups
        ):
            return candidate
    width = len(str(len(samples.keys)))
    return lambda k, name: f"{samples.places[k]}/{k:0{width}}"
