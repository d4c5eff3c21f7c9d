"""Reads files of labels and of class names: ImageNet's validation images, and Tiny-ImageNet's."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alexnet_mp.data.directory import Folder, flat_images, image_names

DEVKIT = (
    "the numbers of ILSVRC's devkit (1 to 1000) are its own, not the places of the sorted class "
    "names, and Caffe's (0 to 999) are others again; give --val-synsets FILE, whose line k names "
    "class k, or a file of names: `FILE CLASS` lines, or Kaggle's LOC_val_solution.csv"
)


def read_labels(
    file: Folder, folder: Folder, classes: Sequence[str], synsets: Path | None = None
) -> dict[str, str]:
    """The class of each image in `folder`, by the image's name as `file` has it.

    `file` holds one line for each image: a class (in the order of the sorted names), `FILE CLASS`,
    Tiny-ImageNet's `FILE CLASS x y w h`, or Kaggle's `FILE,CLASS x y x y ...`. Classes may be
    numbers where `synsets` says which class each is. ValueError naming the file and what is wrong.
    """
    rows = [row for row in _rows(file) if row]
    if rows and rows[0][-1] == "PredictionString":
        rows = rows[1:]
    known = set(classes)
    if all(len(row) == 1 or " ".join(row) in known for row in rows):
        names = image_names(flat_images(folder))
        if len(rows) != len(names):
            raise ValueError(
                f"--val-labels {file}: {len(rows):,} classes for {len(names):,} images in {folder}"
            )
        pairs = [(name, " ".join(row)) for name, row in zip(names, rows, strict=True)]
    else:
        pairs = [(row[0], _class(row[1:], known)) for row in rows]
    found = {Path(name).name: label for name, label in pairs}
    if len(found) != len(pairs):
        raise ValueError(f"--val-labels {file}: names a file twice")
    if not known.issuperset(found.values()) and all(label.isdecimal() for label in found.values()):
        if synsets is None:
            raise ValueError(f"--val-labels {file}: has numbers for classes, and {DEVKIT}")
        numbered = _numbered(synsets, {int(label) for label in found.values()})
        found = {name: numbered[int(label)] for name, label in found.items()}
    if unknown := sorted(set(found.values()) - known):
        raise ValueError(
            f"--val-labels {synsets or file}: {unknown[0]!r} is not a class of the training images "
            f"({classes[0]} ... {classes[-1]})"
        )
    return found


def class_names(file: Folder) -> tuple[str, ...]:
    """The classes, sorted, that the `FILE CLASS ...` lines of `file` name."""
    names = sorted({row[1] for row in _rows(file) if len(row) > 1})
    if not names:
        raise ValueError(f"--val-labels {file}: has no `FILE CLASS` lines")
    return tuple(names)


def read_words(file: Folder, classes: Sequence[str]) -> tuple[str, ...] | None:
    """The name of each class in `file`, lines of `CLASS<tab>word, synonym ...`.

    It is the first word, except where two classes share it. None where a class is not in `file`.
    """
    if not file.is_file():
        return None
    lines = (line.partition("\t") for line in _lines(file))
    wanted = set(classes)
    words = {name.strip(): text.strip() for name, _, text in lines if name.strip() in wanted}
    if not all(words.get(name) for name in classes):
        return None
    first = Counter(text.split(",")[0] for text in words.values())
    whole = Counter(words.values())

    def shown(name: str) -> str:
        text = words[name]
        short = text.split(",")[0]
        return short if first[short] == 1 else text if whole[text] == 1 else f"{text} ({name})"

    return tuple(map(shown, classes))


def _lines(file: Folder) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def _rows(file: Folder) -> list[list[str]]:
    """The words of each line; of a .csv, its first two fields."""
    lines = _lines(file)
    # In `n01440764 tench, Tinca tinca` the comma stands among words: this is no .csv.
    if lines and all(
        "," in line and not re.search(r"\s", line.split(",")[0].strip())
        for line in lines
        if line.strip()
    ):
        return [
            [cells[0].strip(), *cells[1].split()] for cells in csv.reader(lines) if len(cells) > 1
        ]
    return [line.split() for line in lines]


def _class(words: Sequence[str], known: set[str]) -> str:
    """A class name of several words, or Kaggle's class followed by boxes."""
    return whole if (whole := " ".join(words)) in known else words[0] if words else ""


def _numbered(file: Path, used: set[int]) -> dict[int, str]:
    """The class of each number: `NUMBER CLASS` lines, or one line for each class.

    The latter count from 1 or, where 0 is used, from 0.
    """
    rows = [row for row in _rows(file) if row]
    if all(len(row) > 1 and row[0].isdecimal() for row in rows):
        numbered = {int(row[0]): row[1] for row in rows}
    elif (0 in used) == (len(rows) in used):
        raise ValueError(
            f"--val-synsets {file}: {len(rows):,} lines, and the labels use {min(used)} to "
            f"{max(used)}: whether counting starts at 0 or 1 is not clear; "
            "write `NUMBER CLASS` lines"
        )
    else:
        numbered = {k + (0 not in used): row[0] for k, row in enumerate(rows)}
    if lacking := sorted(used - set(numbered)):
        raise ValueError(f"--val-synsets {file}: does not say what class {lacking[0]} is")
    return numbered
