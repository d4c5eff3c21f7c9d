"""Finds out in which form an image set is, and lists it: folders, archives, shards, Parquet.

Whatever the form, the listings are the same: classes sorted by name, images by class and name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from alexnet_mp.data import folder_layout, ilsvrc
from alexnet_mp.data.archive_index import Problems, read_archive
from alexnet_mp.data.archive_tree import ArchivePath
from alexnet_mp.data.directory import image_names, listed, visible_folders
from alexnet_mp.data.folder_layout import EXPECTED, FolderLayout, Split
from alexnet_mp.data.labeled_samples import ListedSet, by_split
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.parquet_shards import read_parquet
from alexnet_mp.data.webdataset import is_shard, read_shards

ImageSet: TypeAlias = FolderLayout | ListedSet
ARCHIVES = (
    ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz", ".tar.zst", ".zip",
)  # fmt: skip
"""Ends of the names of archives."""
OTHERS = {
    "TFRecord": re.compile(r"\.tfrecords?(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$"),
    "FFCV's beton": re.compile(r"\.beton$"),
    "LMDB": re.compile(r"^(data|lock)\.mdb$|\.(mdb|lmdb)$"),
}
"""Forms that are not read, by the names of their files."""
LOOKED_AT = 4
"""Folders that are looked into, of those side by side."""


@dataclass(frozen=True)
class SetOptions:
    """What else is known about an image set, and how to speak about it."""

    labels_file: Path | None = None
    """A file with the classes of val's images, where these are not sorted into folders."""
    synsets_file: Path | None = None
    """A file that says which class each number in `labels_file` is."""
    devkit: Path | None = None
    """The devkit of ILSVRC 2012, which has the classes of val's images."""
    skip: bool = False
    """Whether what is wrong with an archive is left out, or refused."""
    progress: bool = False


Say = Callable[[str], None]


def list_source(
    source: Path,
    labels_file: Path | None = None,
    synsets_file: Path | None = None,
    say: Say = print,
    options: SetOptions | None = None,
) -> dict[Split, Listing]:
    """Lists all splits of `source`, to pack them. Raises as `find_image_set` and its `list` do."""
    options = options or SetOptions(labels_file, synsets_file)
    found = find_image_set(source, "SOURCE", options)
    if "train" not in found.folders:
        raise FileNotFoundError(
            f"{found.flag} {found.root}: no folder train in it; expected {EXPECTED}"
        )
    for note in found.notes:
        say(note)
    say("; ".join(f"{split}: {folder}" for split, folder in found.folders.items()))
    return {split: found.list(split) for split in found.folders}


def find_image_set(
    source: Path, flag: str = "--data-dir", options: SetOptions | None = None
) -> ImageSet:
    """The splits of the image set `source`: a folder, an archive, or a pattern of shards' names.

    Raises FileNotFoundError or ValueError, one line that begins with `flag` or the file, for what
    is not there, not known or damaged.
    """
    options = options or SetOptions()
    problems = Problems(options.skip)
    found = _find(source, flag, options, problems)
    return replace(found, notes=(*found.notes, *problems.check()))


def check_form(source: Path, flag: str = "--data-dir") -> None:
    """Raises as `find_image_set`, but reads no archive: of those it checks only the names."""
    if files := _files_of(source, flag):
        _refuse_others(files, source, flag)
    else:
        folder_layout.find_layout(source, flag)


def _find(source: Path, flag: str, options: SetOptions, problems: Problems) -> ImageSet:
    if files := _files_of(source, flag):
        root = source if source.exists() else source.parent
        return _of_files(files, root, flag, options, problems)
    if options.devkit is not None:
        return _with_devkit(folder_layout.find_layout(source, flag), options.devkit)
    return folder_layout.find_layout(source, flag, options.labels_file, options.synsets_file)


def _files_of(source: Path, flag: str) -> list[Path]:
    """The archives or Parquet files that are the image set; none for a folder of images."""
    if source.is_file():
        return [source]
    if not source.exists() and (files := _expand(source, flag)):
        return files
    source = folder_layout.existing_folder(source, flag)
    return [] if _has_image_folders(source) else _data_files(source)


def _of_files(
    files: Sequence[Path], root: Path, flag: str, options: SetOptions, problems: Problems
) -> ImageSet:
    """The image set in archives or Parquet files."""
    _refuse_others(files, root, flag)
    parquet = [file for file in files if _kind(file) == "parquet"]
    if parquet:
        return read_parquet(root, by_split(parquet, flag, root), flag, problems, options.progress)
    archives = [file for file in files if _kind(file) == "archive"]
    if trains := [file for file in archives if ilsvrc.is_tar_of_tars(file)]:
        return _ilsvrc(trains[0], flag, options, problems)
    if is_shard(archives[0]):
        return read_shards(root, by_split(archives, flag, root), flag, problems, options.progress)
    if len(archives) > 1:
        raise ValueError(
            f"{flag} {root}: has {len(archives)} archives, {listed([f.name for f in archives])}, "
            "which are not shards of webdataset; name one of them"
        )
    tree = read_archive(archives[0], problems, options.progress)
    return folder_layout.layout_of(
        ArchivePath(tree), flag, options.labels_file, options.synsets_file
    )


def _ilsvrc(train: Path, flag: str, options: SetOptions, problems: Problems) -> FolderLayout:
    """ImageNet's own archives, with the classes of val's images from the devkit or a file."""
    val = ilsvrc.validation_tar(train)
    tree = ilsvrc.read_archives(train, val, problems, options.progress)
    labels = options.labels_file
    devkit = options.devkit or (None if labels else ilsvrc.devkit_beside([train]))
    if val is not None and labels is None and devkit is None:
        raise ValueError(
            f"{val}: its images have no classes; name the devkit with --devkit {ilsvrc.DEVKIT}, "
            "or a file of classes with --val-labels FILE"
        )
    layout = folder_layout.layout_of(ArchivePath(tree), flag, labels, options.synsets_file)
    if val is None:
        note = f"{train}: trained on alone, no validation archive lies beside it"
        return replace(layout, notes=(*layout.notes, note))
    return _with_devkit(layout, devkit) if devkit else layout


def _with_devkit(layout: FolderLayout, devkit: Path) -> FolderLayout:
    if "val" not in layout.folders:
        raise ValueError(f"--devkit {devkit}: there is no folder {layout.root / 'val'}")
    val = layout.folders["val"]
    note = f"{val}: the classes are those of {devkit}"
    return replace(
        layout,
        val_classes=ilsvrc.validation_classes(devkit, val),
        labels_file=devkit,
        notes=(*layout.notes, note),
    )


# ---- which files ----


def _expand(pattern: Path, flag: str) -> list[Path]:
    """The files of a pattern like DIR/train-{0000..1023}.tar or DIR/train-*.tar; none without one.

    FileNotFoundError that names the first one that is missing.
    """
    text = str(pattern)
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", text):
        first, last = match[1], match[2]
        files = [
            Path(f"{text[: match.start()]}{k:0{len(first)}}{text[match.end() :]}")
            for k in range(int(first), int(last) + 1)
        ]
        missing = [file for file in files if not file.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"{flag} {pattern}: {len(missing):,} of {len(files):,} files are not there"
                + (f", the first of them {missing[0].name}" if missing else "")
            )
        return files
    if "*" in pattern.name or "?" in pattern.name:
        if not (files := sorted(pattern.parent.glob(pattern.name))):
            raise FileNotFoundError(f"{flag} {pattern}: no file has such a name")
        return files
    return []


def _has_image_folders(folder: Path, depth: int = 3) -> bool:
    """Whether images lie in folders of `folder`, which archives beside them were unpacked to."""
    for name in islice(visible_folders(folder), LOOKED_AT):
        inner = folder / name
        if image_names(inner) or (depth > 1 and _has_image_folders(inner, depth - 1)):
            return True
    return False


def _data_files(folder: Path, depth: int = 2) -> list[Path]:
    """The archives, Parquet and other data files in `folder`, or else in its folders."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _kind(path)]
    inner = visible_folders(folder)
    if depth and len(inner) <= LOOKED_AT:
        for name in inner:
            files += _data_files(folder / name, depth - 1)
    return [file for file in files if file.name != ilsvrc.DEVKIT]


def _kind(file: Path) -> str:
    """archive, parquet, or the name of a form that is not read; empty for other files."""
    name = file.name.lower()
    if name.startswith("."):
        return ""
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(ARCHIVES):
        return "archive"
    return next((form for form, pattern in OTHERS.items() if pattern.search(name)), "")


def _refuse_others(files: Sequence[Path], root: Path, flag: str) -> None:
    """Refuses forms that are not read, and files that are of no form."""
    if not any(map(_kind, files)):
        raise ValueError(
            f"{flag} {root}: a file, and neither an archive ({' '.join(ARCHIVES)}) nor Parquet; "
            f"expected one of these, or a folder with {EXPECTED}"
        )
    for file in files:
        if (form := _kind(file)) in OTHERS:
            raise ValueError(
                f"{flag} {file}: {form} is not read; pack the images that it was made from, or "
                "write its images with its own library as CLASS/FILE into a folder or a tar, or as "
                "webdataset shards or Parquet"
            )
