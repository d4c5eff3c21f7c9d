"""Where the bytes of a listing's images are: files of a folder, or members of archives."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from alexnet_mp.data.decode import Readable

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile)
"""What Python's decompressors raise for damaged content, beside OSError."""


class Contents:
    """The bytes of the images of a listing, by the images' numbers in it. Safe to use in threads.

    Images whose contents are `in_order` are read fast only by `stream`, in the order of the
    archive: a compressed stream has no way to the middle.
    """

    in_order = False

    def file(self, number: int) -> Readable:
        """Image `number`. Slow where contents are `in_order`."""
        raise NotImplementedError

    def stream(self, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """The images `numbers` with their bytes, in the order in which they are read fastest."""
        return ((number, self.file(number).read_bytes()) for number in numbers.tolist())

    def sample(self, count: int, total: int) -> list[Readable]:
        """About `count` of `total` images that can be read soon, for an estimate."""
        rows = np.linspace(0, total - 1, min(count, total)).astype(int)
        return [self.file(row) for row in rows.tolist()]

    def location(self, number: int, name: str) -> str:
        """Where image `number`, which the listing calls `name`, is, for messages."""
        return str(self.file(number))

    def reordered(self, order: np.ndarray) -> Contents:
        """The contents of the images `order`, in that order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bytes:
    """Content that has been read already."""

    content: bytes

    def read_bytes(self) -> bytes:
        return self.content


@dataclass(frozen=True)
class FolderFiles(Contents):
    """Files of a folder."""

    folder: Path
    names: bytes  # the files' paths in the folder, one after another
    ends: np.ndarray  # int64 (N,), the end of each in `names`

    def file(self, number: int) -> Path:
        start = int(self.ends[number - 1]) if number else 0
        return self.folder / os.fsdecode(self.names[start : int(self.ends[number])])

    def location(self, number: int, name: str) -> str:
        return os.fsencode(self.file(number)).decode("utf-8", "backslashreplace")

    def reordered(self, order: np.ndarray) -> FolderFiles:
        names, ends = reordered_names(self.names, self.ends, order)
        return replace(self, names=names, ends=ends)


@dataclass(frozen=True)
class Slice:
    """Part of a file: a member of an archive that is not compressed."""

    archive: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.archive.open("rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(self.size)
            while len(content) < self.size:
                if not (more := file.read(self.size - len(content))):
                    raise OSError(f"{self.archive} ends within it")
                content += more
        return content


@dataclass(frozen=True)
class ArchiveMembers(Contents):
    """Members of archives, by archive, place and size."""

    archives: tuple[Path, ...]
    which: np.ndarray  # int32 (N,), the archive of each image
    offsets: np.ndarray  # int64 (N,), in bytes; of a zip, the place in its list of members
    sizes: np.ndarray  # int64 (N,), bytes

    def location(self, number: int, name: str) -> str:
        return f"{self.archives[self.which[number]]}: {name}"

    def reordered(self, order: np.ndarray) -> ArchiveMembers:
        return replace(
            self, which=self.which[order], offsets=self.offsets[order], sizes=self.sizes[order]
        )

    def _address(self, number: int) -> tuple[Path, int, int]:
        archive = self.archives[self.which[number]]
        return archive, int(self.offsets[number]), int(self.sizes[number])


class TarMembers(ArchiveMembers):
    """Members of tar files that are not compressed: read in any order."""

    def file(self, number: int) -> Slice:
        return Slice(*self._address(number))


class CompressedTarMembers(ArchiveMembers):
    """Members of compressed tar files; offsets are those after decompression."""

    in_order = True

    def file(self, number: int) -> Bytes:
        return Bytes(next(self.stream(np.array([number])))[1])

    def stream(self, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
        order = numbers[np.lexsort((self.offsets[numbers], self.which[numbers]))]
        for which in np.unique(self.which[order]).tolist():
            mine = order[self.which[order] == which]
            yield from self._stream_one(self.archives[which], mine)

    def _stream_one(self, archive: Path, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
        try:
            with open_tar_stream(archive) as file:
                for number in numbers.tolist():
                    file.seek(int(self.offsets[number]))
                    yield number, file.read(int(self.sizes[number]))
        except DAMAGE as error:
            raise ValueError(f"{archive}: damaged, or cut short ({error})") from None

    def sample(self, count: int, total: int) -> list[Readable]:
        order = np.lexsort((self.offsets, self.which))[:count]
        return [Bytes(content) for _, content in self.stream(order)]


class ZipMembers(ArchiveMembers):
    """Members of one zip file."""

    def file(self, number: int) -> Bytes:
        archive, place, _ = self._address(number)
        try:
            return Bytes(self._zip.read(self._zip.infolist()[place]))
        except DAMAGE as error:
            raise OSError(f"damaged in {archive} ({error})") from None

    def location(self, number: int, name: str) -> str:
        return f"{self.archives[0]}: {name}"

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.archives[0])


def compression_of(archive: Path) -> str:
    """gzip, bzip2 or xz as the first bytes say, and zip and zstd; empty for none of these."""
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, name in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"PK\x03\x04", "zip"),
        (b"PK\x05\x06", "zip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        if start.startswith(magic):
            return name
    return ""


def open_tar_stream(archive: Path) -> IO[bytes]:
    """The tar in `archive`, decompressed; seeking forward decompresses what is skipped."""
    kind = compression_of(archive)
    if kind == "gzip":
        return gzip.open(archive, "rb")  # type: ignore[return-value]
    if kind == "bzip2":
        return bz2.open(archive)
    if kind == "xz":
        return lzma.open(archive)
    return archive.open("rb")


def reordered_names(
    names: bytes, ends: np.ndarray, order: Sequence[int] | np.ndarray
) -> tuple[bytes, np.ndarray]:
    """Names that lie one after another, and their ends, put in another order."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    moved = b"".join(names[int(starts[k]) : int(ends[k])] for k in order)
    lengths: np.ndarray = (ends - starts)[np.asarray(order)]
    return moved, np.cumsum(lengths, dtype=np.int64)
