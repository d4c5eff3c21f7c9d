"""ImageNet's own archives: a tar of a tar for each class, a flat tar for validation, the devkit."""

from __future__ import annotations

import importlib
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alexnet_mp.config.progress import progress
from alexnet_mp.data.archive_index import Problems, add_member, tar_members
from alexnet_mp.data.archive_tree import ArchiveTree
from alexnet_mp.data.contents import DAMAGE, open_tar_stream
from alexnet_mp.data.directory import Folder, image_names

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SYNSETS, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
"""The devkit's files: the synsets with their numbers, and a number for each validation image."""
_VAL_NUMBER = re.compile(r"_val_(\d{8})\.")


def is_tar_of_tars(file: Path) -> bool:
    """Whether the first file in the tar `file` is itself a tar, as in ILSVRC2012_img_train.tar."""
    try:
        with tarfile.open(file, "r:") as opened:
            while (info := opened.next()) is not None:
                if info.isfile():
                    return info.name.endswith(".tar")
    except (tarfile.ReadError, OSError):
        pass
    return False


def validation_tar(train: Path) -> Path | None:
    """ILSVRC2012_img_val.tar beside ILSVRC2012_img_train.tar, by whatever name both have."""
    path = train.with_name(train.name.replace("train", "val"))
    return path if path != train and path.is_file() else None


def read_archives(
    train: Path, val: Path | None, problems: Problems, show_progress: bool
) -> ArchiveTree:
    """Both archives as if they were unpacked: train/WNID/FILE and val/FILE."""
    archives = (train,) if val is None else (train, val)
    tree = ArchiveTree(train.parent, archives)
    with train.open("rb") as file:
        members = list(tar_members(file, str(train), problems))
        for member in progress(
            members, description=f"listing {train.name}", unit="classes", enabled=show_progress
        ):
            wnid, dot, kind = member.parts[-1].rpartition(".")
            if kind == "tar" and dot:
                _add_class(tree, _Part(file, member.offset, member.size), wnid, problems)
            else:
                problems.add(f"{train}: {member.parts[-1]} is not the tar of a class")
    if val is not None:
        with open_tar_stream(val) as file:
            for member in tar_members(file, str(val), problems):
                add_member(tree, member._replace(parts=member.parts[-1:]), 1, problems, "val")
    return tree


def _add_class(tree: ArchiveTree, part: _Part, wnid: str, problems: Problems) -> None:
    """Adds the members of a tar that lies within the train archive."""
    place = f"{tree.archives[0]}: {wnid}.tar"
    try:
        for member in tar_members(part, place, problems):
            moved = member._replace(offset=member.offset + part.offset, parts=member.parts[-1:])
            add_member(tree, moved, 0, problems, f"train/{wnid}")
    except ValueError as error:  # a tar that is none
        problems.add(str(error))


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        self.file.seek(self.offset + self.position)
        content = self.file.read(left if size < 0 else min(size, left))
        self.position += len(content)
        return content


# ---- the devkit ----


def validation_classes(devkit: Path, val: Folder) -> dict[str, str]:
    """The wnid of each validation image by its name, as the devkit says.

    The devkit's numbers, 1 to 1000, are those of its leaves: synsets without children. ValueError,
    naming the devkit, where it is none, or of other images.
    """
    synsets, truth = _devkit_files(devkit)
    wnids = _leaves(devkit, synsets)
    try:
        numbers = [int(line) for line in truth.split()]
    except ValueError:
        raise ValueError(f"--devkit {devkit}: {TRUTH} is not a number a line") from None
    if lacking := sorted(set(numbers) - set(wnids)):
        raise ValueError(f"--devkit {devkit}: {SYNSETS} has no leaf with number {lacking[0]}")
    names = image_names(val)
    found = {}
    for place, name in enumerate(names):
        number = int(match[1]) - 1 if (match := _VAL_NUMBER.search(name)) else place
        if not 0 <= number < len(numbers):
            raise ValueError(
                f"--devkit {devkit}: has the classes of {len(numbers):,} validation images, "
                f"and not of {name}"
            )
        found[name] = wnids[numbers[number]]
    return found


def _devkit_files(devkit: Path) -> tuple[bytes, bytes]:
    """The devkit's two files, of the archive as it is downloaded, or of the unpacked folder."""
    found: dict[str, bytes] = {}
    try:
        if devkit.is_dir():
            places = [devkit, *(path for path in devkit.iterdir() if path.is_dir())]
            for name in (SYNSETS, TRUTH):
                for place in places:
                    if (place / name).is_file():
                        found[name] = (place / name).read_bytes()
        else:
            with tarfile.open(devkit) as archive:
                for info in archive:
                    for name in (SYNSETS, TRUTH):
                        if info.name.endswith(name) and (content := archive.extractfile(info)):
                            found[name] = content.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"--devkit {devkit}: no such file; it is {DEVKIT}") from None
    except (tarfile.ReadError, OSError, *DAMAGE) as error:
        raise ValueError(f"--devkit {devkit}: damaged, or not {DEVKIT} ({error})") from None
    for name in (SYNSETS, TRUTH):
        if name not in found:
            raise ValueError(f"--devkit {devkit}: has no {name}; expected {DEVKIT}")
    return found[SYNSETS], found[TRUTH]


def _leaves(devkit: Path, content: bytes) -> dict[int, str]:
    """The wnid of each synset without children, by its number."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ValueError(
            f"--devkit {devkit}: meta.mat needs the package scipy: pip install scipy, or "
            "pip install 'alexnet_mp[imagenet]'; or name the classes with --val-labels FILE"
        ) from None
    try:
        rows: np.ndarray = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True)["synsets"])
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if not row["num_children"]
        }
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(
            f"--devkit {devkit}: {SYNSETS} cannot be read ({' '.join(str(error).split())})"
        ) from None


def devkit_beside(archives: Sequence[Path]) -> Path | None:
    """The devkit in the folder of the archives, if it lies there under its own name."""
    path = archives[0].with_name(DEVKIT)
    return path if path.is_file() else None
