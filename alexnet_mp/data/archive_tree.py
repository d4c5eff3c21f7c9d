"""An archive as a tree of folders, so that its layout is found as that of a folder on the disk."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from alexnet_mp.data.contents import ArchiveMembers, CompressedTarMembers, TarMembers, ZipMembers

Node: TypeAlias = "dict[str, Node | int]"
SPECIAL = -1
"""The number of a pipe or a device, which is no file."""
MEMBER_KINDS: dict[str, type[ArchiveMembers]] = {
    "zip": ZipMembers,
    "gzip": CompressedTarMembers,
    "bzip2": CompressedTarMembers,
    "xz": CompressedTarMembers,
    "": TarMembers,
}
"""How the members of an archive are read, by its compression."""


class Status(NamedTuple):
    """As much of `os.stat_result` as listings need."""

    st_size: int
    st_mtime_ns: int


class ArchiveEntry(NamedTuple):
    """A folder or member, as `os.DirEntry` is one."""

    name: str
    path: str
    tree: ArchiveTree
    content: Node | int

    def is_dir(self) -> bool:
        return isinstance(self.content, dict)

    def is_file(self) -> bool:
        return isinstance(self.content, int) and self.content != SPECIAL

    @property
    def number(self) -> int:
        """The number of the member in the tree."""
        assert isinstance(self.content, int)
        return self.content

    def stat(self) -> Status:
        return Status(self.tree.sizes[self.number], self.tree.time)


@dataclass
class ArchiveTree:
    """The folders and members of one archive, or of several as if they were one.

    Names take about 250 bytes a member, until the splits are listed.
    """

    place: Path
    """The archive, which messages name."""
    archives: tuple[Path, ...]
    compression: str = ""
    root: Node = field(default_factory=dict)
    texts: dict[int, bytes] = field(default_factory=dict)
    """Small text members, by number: they were read along with the names."""
    which: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        self.time = max(archive.stat().st_mtime_ns for archive in self.archives)

    def add(self, parts: list[str], which: int, offset: int, size: int) -> bool:
        """Adds a member; False where one of that name is replaced."""
        self.which.append(which)
        self.offsets.append(offset)
        self.sizes.append(size)
        return self.put(parts, len(self.sizes) - 1)

    def put(self, parts: list[str], number: int) -> bool:
        """Puts a member, or SPECIAL, under its name; False where one is replaced."""
        node = self.folder(parts[:-1])
        new = parts[-1] not in node
        node[parts[-1]] = number
        return new

    def folder(self, parts: list[str]) -> Node:
        """The folder `parts`, made if it is not there."""
        node = self.root
        for part in parts:
            inner = node.setdefault(part, {})
            if isinstance(inner, int):  # a member of that name: the folder replaces it
                inner = node[part] = {}
            node = inner
        return node

    def find(self, parts: tuple[str, ...]) -> Node | int | None:
        """The folder or the number of the member `parts`; None where there is none."""
        node: Node | int | None = self.root
        for part in parts:
            if not isinstance(node, dict):
                return None
            node = node.get(part)
        return node

    def contents(self, numbers: np.ndarray) -> ArchiveMembers:
        """The contents of the members `numbers`, in that order."""
        columns = (np.array(values, kind)[numbers] for values, kind in self._columns())
        return MEMBER_KINDS[self.compression](self.archives, *columns)

    def _columns(self) -> tuple[tuple[array[int], type], ...]:
        return ((self.which, np.int32), (self.offsets, np.int64), (self.sizes, np.int64))


@dataclass(frozen=True)
class ArchivePath:
    """A folder or member of an archive, with as much of Path's interface as layouts need."""

    tree: ArchiveTree
    parts: tuple[str, ...] = ()

    def __truediv__(self, name: str) -> ArchivePath:
        return ArchivePath(self.tree, (*self.parts, *name.split("/")))

    def __str__(self) -> str:
        return str(self.tree.place.joinpath(*self.parts))

    def __fspath__(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return self.parts[-1] if self.parts else self.tree.place.name

    @property
    def parent(self) -> ArchivePath:
        return ArchivePath(self.tree, self.parts[:-1])

    def is_dir(self) -> bool:
        return isinstance(self.tree.find(self.parts), dict)

    def is_file(self) -> bool:
        return isinstance(self.tree.find(self.parts), int)

    def read_text(self, encoding: str) -> str:
        """A small text. OSError where there is none."""
        number = self.tree.find(self.parts)
        if not isinstance(number, int) or number == SPECIAL:
            raise FileNotFoundError(2, "No such file", str(self))
        if number not in self.tree.texts:
            file = self.tree.contents(np.array([number])).file(0)
            self.tree.texts[number] = file.read_bytes()
        return self.tree.texts[number].decode(encoding)

    def entries(self) -> list[ArchiveEntry]:
        """The entries of the folder, in no order."""
        node = self.tree.find(self.parts)
        assert isinstance(node, dict)
        place = str(self)
        return [
            ArchiveEntry(name, os.path.join(place, name), self.tree, content)
            for name, content in node.items()
        ]
