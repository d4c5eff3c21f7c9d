"""Finds the splits in a folder of images: the layouts that data sets are unpacked and exported to.

Known are DIR/train/CLASS/* with val and test likewise or one of them, DIR/CLASS/*, a single folder
around either, ImageNet's ILSVRC/Data/CLS-LOC and Tiny-ImageNet. Other folders are named and left.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from alexnet_mp.data import image_folder, val_labels
from alexnet_mp.data.directory import Folder, flat_images, image_names, listed, visible_folders
from alexnet_mp.data.listing import Ignored, Listing

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPELLINGS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of a split's folder, in upper or lower case."""
EXPECTED = "train/CLASS/ and val/CLASS/ or test/CLASS/ with images in them, or CLASS/ alone"
ILSVRC = ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
"""Places of train and val in what ImageNet's archives unpack to."""
WRAPPERS = 3
"""Folders around the set, each with one folder in it, that are looked through."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny-ImageNet's classes of the images in val/images: file, class, box, separated by tabs."""
WORDS = "words.txt"
"""Tiny-ImageNet's words for its class folders, WordNet numbers: number, tab, words."""
_SPLIT_WORD = re.compile(r"(^|[^a-z])(train|training|test|testing|val|valid|validation)([^a-z]|$)")

Say = Callable[[str], None]


@dataclass(frozen=True)
class FolderLayout:
    """Which folder is which split of an image set."""

    root: Folder
    """The folder that holds the splits, or all classes."""
    folders: Mapping[Split, Folder]
    """The splits that have labeled images. With bare classes, train is the root itself."""
    notes: tuple[str, ...] = ()
    """Lines for the screen about what was left out."""
    flag: str = "--data-dir"
    labels_file: Folder | None = None
    """A file with the classes of val's images, where these are not sorted into folders."""
    synsets_file: Path | None = None
    """A file that says which class each number in `labels_file` is."""
    val_classes: Mapping[str, str] | None = None
    """The class of each of val's images by its name, where that is known already."""

    def list(self, split: Split) -> Listing:
        """The images of `split`. Raises ValueError as `image_folder.list_split` does."""
        folder = self.folders[split]
        classes = None
        if split != "train" and "train" in self.folders:
            classes = tuple(image_folder.class_folders(self.folders["train"], self.flag))
        if split == "val" and self.labels_file is not None:
            if classes is None:
                classes = val_labels.class_names(self.labels_file)
            labels = self.val_classes or val_labels.read_labels(
                self.labels_file, folder, classes, self.synsets_file
            )
            if unknown := sorted(set(labels.values()) - set(classes)):
                raise ValueError(
                    f"{self.labels_file}: {unknown[0]} is not a class of the training images "
                    f"({classes[0]} ... {classes[-1]})"
                )
            listing = image_folder.list_flat(folder, classes, labels, self.labels_file)
        else:
            listing = image_folder.list_split(folder, classes, self.flag)
        if words := val_labels.read_words(self.root / WORDS, listing.classes):
            listing = replace(listing, classes=words)
        return listing


def find_layout(
    directory: Path,
    flag: str = "--data-dir",
    labels_file: Path | None = None,
    synsets_file: Path | None = None,
) -> FolderLayout:
    """Looks for the splits of the image set in `directory`, without listing its images.

    `labels_file` gives the classes of val's images where they lie in one folder. Raises
    FileNotFoundError or ValueError, one line that begins with `flag`, for a folder that is not
    there or whose layout is not known.
    """
    return layout_of(existing_folder(directory, flag), flag, labels_file, synsets_file)


def layout_of(
    directory: Folder,
    flag: str = "--data-dir",
    labels_file: Path | None = None,
    synsets_file: Path | None = None,
) -> FolderLayout:
    """The same for a folder that is there, on the disk or in an archive."""
    root = _root(directory, flag)
    notes = [f"{directory}: the images are those of {root}"] if root != directory else []
    annotations: Folder | None = labels_file
    folders = _split_folders(root, flag)
    if not folders:
        _check_bare(root, flag)
        folders = {"train": root}
    elif unknown := [name for name in visible_folders(root) if root / name not in folders.values()]:
        _check_train_is_no_class(folders, unknown, flag)
        notes.append(f"{root}: ignored the folder{'s' * (len(unknown) > 1)} {listed(unknown)}")
    if labels_file is not None:
        if "val" not in folders:
            raise ValueError(f"--val-labels {labels_file}: there is no folder {root / 'val'}")
    elif synsets_file is not None:
        raise ValueError(
            f"--val-synsets {synsets_file}: says what the numbers in --val-labels FILE mean, "
            "which is not given"
        )
    elif "val" in folders and (folders["val"] / ANNOTATIONS).is_file():
        annotations = folders["val"] / ANNOTATIONS
    if "test" in folders and len(folders) > 1 and (count := _unlabeled(folders)):
        notes.append(f"{folders.pop('test')}: left out, its {count:,} images have no labels")
    return FolderLayout(root, folders, tuple(notes), flag, annotations, synsets_file)


def report(listings: Mapping[Split, Listing], say: Say) -> None:
    """Says what may surprise about the listed classes, and what was left out."""
    ignored = Ignored()
    for listing in listings.values():
        ignored.add(listing.ignored)
        for note in listing.notes:
            say(f"note: {note}")
    if str(ignored):
        place = os.path.commonpath([listing.folder for listing in listings.values()])
        say(f"{place}: ignored {ignored}")


def existing_folder(directory: Path, flag: str, expected: str = EXPECTED) -> Path:
    """`directory`, or the same in the other encoding of its accents; else FileNotFoundError."""
    encodings = [unicodedata.normalize(form, str(directory)) for form in ("NFC", "NFD")]
    for found in (directory, *map(Path, encodings)):
        if found.is_dir():
            return found
    if directory.exists():
        raise ValueError(f"{flag} {directory}: a file, and a folder is expected")
    raise FileNotFoundError(
        f"{flag} {directory}: no such folder{_similar(directory)}; expected one with {expected}"
    )


def _similar(directory: Path) -> str:
    """Which folder may have been meant by one that does not exist."""
    typed = str(directory)
    candidates = [typed.strip("'\""), typed.replace("\\ ", " "), os.path.expandvars(typed)]
    if directory.parent.is_dir():
        names = [entry.name for entry in os.scandir(directory.parent) if entry.is_dir()]
        near = difflib.get_close_matches(directory.name, names, 1, 0.8)
        candidates += [str(directory.parent / name) for name in near]
    found = [name for name in candidates if name != typed and name and Path(name).is_dir()]
    return f" (did you mean {found[0]}?)" if found else ""


def _root(directory: Folder, flag: str) -> Folder:
    """The folder that holds the splits: `directory`, or one in it where known sets have them."""
    place = directory
    for _ in range(WRAPPERS + 1):
        if _split_folders(place, flag):
            return place
        for name in ILSVRC:
            if "train" in _split_folders(place / name, flag):
                return place / name
        inner = visible_folders(place)
        if len(inner) != 1:
            break
        place = place / inner[0]
    return directory


def _split_folders(root: Folder, flag: str) -> dict[Split, Folder]:
    """The folders in `root` that are named as splits. ValueError where two are the same split."""
    found: dict[Split, Folder] = {}
    names = visible_folders(root) if root.is_dir() else []
    for split in SPLITS:
        mine = [name for name in names if name.lower() in SPELLINGS[split]]
        if len(mine) > 1:
            raise ValueError(
                f"{flag} {root}: has both {' and '.join(mine)}, and each may be the {split} split; "
                "rename or remove one of them"
            )
        if mine:
            found[split] = root / mine[0]
    return found


def _check_bare(root: Folder, flag: str) -> None:
    """Refuses a folder without splits whose folders are not classes either."""
    names = visible_folders(root)
    if not names and not image_names(root):
        raise FileNotFoundError(f"{flag} {root}: no folder train in it; expected {EXPECTED}")
    for name in names:
        runs = visible_folders(root / name)
        if any((root / name / run / "history.jsonl").is_file() for run in runs):
            raise ValueError(
                f"{flag} {root}: {name} holds training runs, whose pictures would pass for a "
                "class; "
                "move it, and name another folder with --out"
            )
    named = [
        name
        for name in names
        if _SPLIT_WORD.search(name.lower()) and len(visible_folders(root / name)) > 1
    ]
    if named:
        raise ValueError(
            f"{flag} {root}: {listed(named)} look like splits, not like classes; rename them to "
            "train, val and test"
        )


def _check_train_is_no_class(
    folders: Mapping[Split, Folder], others: Sequence[str], flag: str
) -> None:
    """Refuses a set of vehicles, one class of which is called train."""
    train = folders.get("train")
    if train is None or visible_folders(train) or not image_names(train):
        return
    if classes := [name for name in others if image_names(train.parent / name)]:
        raise ValueError(
            f"{flag} {train.parent}: train has images like {listed(classes)} beside it; if it is a "
            f"class of its own, move all of them into a folder: {train}/{train.name}, "
            f"{train}/{classes[0]}"
        )


def _unlabeled(folders: Mapping[Split, Folder]) -> int:
    """Returns the number of test images that are not sorted into classes."""
    test = folders["test"]
    place = flat_images(test)
    classes = [name for name in visible_folders(test) if test / name != place]
    return 0 if classes or visible_folders(place) else len(image_names(place))
