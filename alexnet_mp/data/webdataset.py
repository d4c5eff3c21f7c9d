"""webdataset: tar shards in which adjacent members with one key are a sample.

A sample is an image, `KEY.jpg`, and its label, `KEY.cls` or a field of `KEY.json`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_mp.config.progress import progress
from alexnet_mp.data.archive_index import Member, Problems, tar_members
from alexnet_mp.data.contents import (
    ArchiveMembers,
    CompressedTarMembers,
    TarMembers,
    compression_of,
    open_tar_stream,
)
from alexnet_mp.data.directory import is_hidden, is_image
from alexnet_mp.data.folder_layout import Split
from alexnet_mp.data.labeled_samples import (
    UNLABELED,
    Label,
    ListedSet,
    Samples,
    list_samples,
    stem_of,
)

CLASS_LISTS = ("classes.txt", "classnames.txt", "class_names.txt")
"""Files beside the shards, line k for class k - 1."""
NAME_KEYS = ("wnid", "synset", "class_name", "classname", "label_name")
LABEL_KEYS = ("cls", "label", "class", "class_id", "class_index", "target")
FILE_KEYS = ("filename", "file_name")
"""What a sample's json calls its class's name, its label, and its file."""
TEXT_BYTES = 2**20
"""A larger .cls or .json is not a label."""
LOOKED_AT = 64
"""Members by which an archive is told to be a shard."""
_WNID = re.compile(r"(n\d{8})\b")


def is_shard(archive: Path) -> bool:
    """Whether the first members of a tar are samples with labels, not files in class folders."""
    problems = Problems(skip=True)
    with open_tar_stream(archive) as file:
        try:
            members = tar_members(file, str(archive), problems, _wants_label)
            for member in islice(members, LOOKED_AT):
                kind = member.parts[-1].rpartition(".")[2].lower()
                if kind == "cls" or (kind == "json" and _label_in(_read_json(member)) != UNLABELED):
                    return True
        except ValueError:
            pass
    return False


def read_shards(
    root: Path,
    shards: Mapping[Split, Sequence[Path]],
    flag: str,
    problems: Problems,
    show_progress: bool,
) -> ListedSet:
    """Lists all shards. ValueError where their classes cannot be told."""
    splits = {split: _Shards(tuple(files), problems) for split, files in shards.items()}
    for split, some in splits.items():
        for _ in progress(
            some.read(),
            total=len(some.archives),
            description=f"listing {split}",
            unit="shards",
            enabled=show_progress,
        ):
            pass
    return list_samples(
        root,
        {split: some.samples for split, some in splits.items()},
        {split: partial(some.contents) for split, some in splits.items()},
        class_list(root),
        flag,
    )


@dataclass
class _Shards:
    """The shards of one split."""

    archives: tuple[Path, ...]
    problems: Problems
    samples: Samples = field(default_factory=Samples)
    which: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))

    def read(self) -> Any:
        """Reads the names and labels of all shards, and yields after each."""
        for number, archive in enumerate(self.archives):
            before, time = len(self.which), archive.stat().st_mtime_ns
            keys: set[str] = set()
            with open_tar_stream(archive) as file:
                key, members = "", list[Member]()
                for member in tar_members(file, str(archive), self.problems, _wants_label):
                    if is_hidden(member.parts[-1]):
                        continue
                    folders, name = member.parts[:-1], member.parts[-1]
                    own = "/".join([*folders, name.partition(".")[0]])
                    if own != key:
                        self._take(key, members, number, keys)
                        key, members = own, []
                    members.append(member)
                self._take(key, members, number, keys)
            count = len(self.which) - before
            self.samples.places += [stem_of(archive.name)] * count
            self.samples.times += [time] * count
            yield archive

    def _take(self, key: str, members: Sequence[Member], number: int, keys: set[str]) -> None:
        """Adds the sample of the adjacent `members` with one key."""
        images = [member for member in members if is_image(member.parts[-1])]
        if not images:
            return
        place = f"{self.archives[number]}: {key}"
        if key in keys:
            self.problems.add(f"{place} is in it twice, not as neighbors")
            return
        keys.add(key)
        if len(images) > 1:
            self.problems.add(f"{place} has {len(images)} images, and a sample has one")
            return
        (image,) = images
        found: Label = UNLABELED
        name = f"{key}.{image.parts[-1].rpartition('.')[2]}"
        for member in members:
            kind = member.parts[-1].rpartition(".")[2].lower()
            if kind == "json":
                about = _read_json(member)
                found = _label_in(about) if found == UNLABELED else found
                name = next((str(about[k]) for k in FILE_KEYS if about.get(k)), name)
            elif kind == "cls" and member.text is not None:
                found = _label(member.text.decode("utf-8", "replace"))
        samples = self.samples
        samples.keys.append(name)
        samples.labels.append(found)
        samples.sizes.append(image.size)
        samples.rows.append(len(samples.rows))
        self.which.append(number)
        self.offsets.append(image.offset)

    def contents(self, rows: np.ndarray) -> ArchiveMembers:
        """The images `rows`, in that order."""
        compressed = any(compression_of(archive) for archive in self.archives)
        kind = CompressedTarMembers if compressed else TarMembers
        return kind(
            self.archives,
            np.array(self.which, np.int32)[rows],
            np.array(self.offsets, np.int64)[rows],
            np.array(self._sizes, np.int64)[rows],
        )

    @property
    def _sizes(self) -> list[int]:
        return self.samples.sizes


def class_list(root: Path) -> list[str] | None:
    """The classes that a file beside the shards names, one a line; None where there is none."""
    folder = root if root.is_dir() else root.parent
    for name in CLASS_LISTS:
        for file in (folder / name, folder.parent / name):
            if file.is_file():
                lines = file.read_text(encoding="utf-8-sig").splitlines()
                names = [line.strip() for line in lines if line.strip()]
                wnids = [_WNID.match(name) for name in names]
                return [match[1] for match in wnids if match] if all(wnids) else names
    return None


def _wants_label(name: str, size: int) -> bool:
    return size <= TEXT_BYTES and name.rpartition(".")[2].lower() in ("cls", "json")


def _label(text: str) -> Label:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else text or UNLABELED


def _read_json(member: Member) -> dict[str, Any]:
    try:
        content = json.loads(member.text or b"")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _label_in(about: Mapping[str, Any]) -> Label:
    """The class that a sample's json says, by name if it can."""
    for key in (*NAME_KEYS, *LABEL_KEYS):
        value = about.get(key)
        if isinstance(value, str) and value.strip():
            return _label(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return UNLABELED
