"""Reads which members an archive has, and where, without unpacking it: tar, compressed tar, zip."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

from alexnet_mp.config.progress import progress
from alexnet_mp.data.archive_tree import MEMBER_KINDS, SPECIAL, ArchiveTree
from alexnet_mp.data.contents import DAMAGE, compression_of, open_tar_stream
from alexnet_mp.data.directory import DEPTH, as_text, is_hidden, is_image

SHOWN = 3
"""Problems that one message names."""
TEXTS = ("val_annotations.txt", "words.txt")
"""Members that are read along with the names: layouts need them."""
TEXT_BYTES = 2**24
"""Larger members are not texts."""
LOST = "it ends there, or cannot be decompressed further"
"""Why the member before may not be whole."""
END = bytes(512)
"""The block after the last member of a tar."""


class Member(NamedTuple):
    """A file in an archive."""

    parts: list[str]
    offset: int
    """Where its content begins; SPECIAL for a pipe or device."""
    size: int
    text: bytes | None = None
    """The content, if it was wanted."""
    link: list[str] | None = None
    """The member whose content it shares, of a hard link."""


@dataclass
class Problems:
    """What is wrong with an archive, one line each: refused, or left out with --on-error skip."""

    skip: bool
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line.replace("\n", " "))

    def check(self) -> tuple[str, ...]:
        """Notes on what was left out. ValueError that names the first ones, unless `skip`."""
        if self.lines and not self.skip:
            more = f" (and {len(self.lines) - SHOWN:,} more)" if len(self.lines) > SHOWN else ""
            raise ValueError(
                f"{'; '.join(self.lines[:SHOWN])}{more}; mend or download the archive again, or "
                "go on without what is wrong with --on-error skip"
            )
        return tuple(f"left out: {line}" for line in self.lines)


Seekable: TypeAlias = IO[bytes] | io.RawIOBase
Wants = Callable[[str, int], bool]
"""Whether a member of this name and size is read along with the names."""


def wants_texts(name: str, size: int) -> bool:
    return size <= TEXT_BYTES and name.rpartition("/")[2] in TEXTS


def tar_members(
    file: Seekable, place: str, problems: Problems, wants: Wants = wants_texts
) -> Iterator[Member]:
    """The files of the tar `file`, which messages call `place`.

    What is damaged, leads out of the archive or is a symbolic link goes to `problems`. ValueError
    where it is no tar.
    """
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
    except (tarfile.ReadError, OSError, *DAMAGE) as error:
        raise ValueError(f"{place}: neither tar nor zip, or damaged ({error})") from None
    held: Member | None = None  # until it is certain that the archive does not end within it
    reason: str | None = ""
    while reason == "":
        info, reason = _next(tar, file)
        if held is not None and reason != LOST:
            yield held
            held = None
        if info is None or info.isdir():
            continue
        if (parts := _parts(info.name, place, problems)) is None:
            continue
        if info.issym():
            problems.add(f"{place}: {as_text(info.name)} is a symbolic link")
        elif info.islnk():
            held = Member(parts, 0, 0, link=_parts(info.linkname, place, problems))
        elif info.isfile():
            text = None
            if wants(info.name, info.size) and (content := tar.extractfile(info)):
                text = content.read()
            held = Member(parts, info.offset_data, info.size, text)
        else:
            held = Member(parts, SPECIAL, 0)
    if reason:
        at = tar.offset
        problems.add(f"{place}: cut short or damaged at byte {at:,} ({reason}), nothing after it")


def _next(tar: tarfile.TarFile, file: Seekable) -> tuple[tarfile.TarInfo | None, str | None]:
    """The next member, and what is wrong if there is none; None at the end as it should be."""
    try:
        info = tar.next()
        tar.members.clear()  # type: ignore[attr-defined]  # of ImageNet they would take gigabytes
        if info is not None:
            return info, ""
        # tarfile takes a damaged header for the end.
        file.seek(tar.offset)
        block = file.read(len(END))
        while file.read(2**20):  # a compressed stream has its checksum at the end
            pass
    except (tarfile.ReadError, OSError, *DAMAGE):
        return None, LOST
    if block == END:
        return None, None
    return None, "no end marker" if len(block) < len(END) else "a damaged header"


def _parts(name: str, place: str, problems: Problems) -> list[str] | None:
    """The folders and the name of a member; None for one that leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or len(parts) > DEPTH:
        problems.add(f"{place}: {as_text(name)!r} is no name within an archive")
        return None
    return parts


# ---- whole archives ----


def read_archive(archive: Path, problems: Problems, show_progress: bool = False) -> ArchiveTree:
    """The folders and members of `archive`. ValueError where it is of no kind that is read."""
    compression = compression_of(archive)
    if compression not in MEMBER_KINDS:
        raise ValueError(
            f"{archive}: compressed with {compression}; decompress it first: {compression} -d"
        )
    tree = ArchiveTree(archive, (archive,), compression)
    if compression == "zip":
        _add_zip(tree, problems)
        return tree
    with open_tar_stream(archive) as file:
        members = tar_members(file, str(archive), problems)
        for member in progress(
            members, description=f"listing {archive.name}", unit="members", enabled=show_progress
        ):
            add_member(tree, member, 0, problems)
    return tree


def add_member(
    tree: ArchiveTree, member: Member, which: int, problems: Problems, inside: str = ""
) -> None:
    """Adds a member of archive number `which` to the folder `inside` of the tree."""
    parts = [*inside.split("/"), *member.parts] if inside else member.parts
    name = "/".join(parts)
    place = tree.archives[which]
    if member.link is not None:
        target = tree.find(tuple(member.link))
        if not isinstance(target, int):
            problems.add(f"{place}: {as_text(name)} is a link to what is not in it")
            return
        new = tree.put(parts, target)
    elif member.offset == SPECIAL:
        new = tree.put(parts, SPECIAL)
    else:
        new = tree.add(parts, which, member.offset, member.size)
        if member.text is not None:
            tree.texts[len(tree.sizes) - 1] = member.text
    if not new and is_image(name) and not is_hidden(parts[-1]):
        problems.add(f"{place}: {as_text(name)} is in it twice, the first of them")


def _add_zip(tree: ArchiveTree, problems: Problems) -> None:
    try:
        with zipfile.ZipFile(tree.place) as opened:
            infos = opened.infolist()
    except (OSError, *DAMAGE) as error:
        raise ValueError(f"{tree.place}: damaged, or cut short ({error})") from None
    for number, info in enumerate(infos):
        if info.is_dir() or (parts := _parts(info.filename, str(tree.place), problems)) is None:
            continue
        if info.flag_bits & 1:
            problems.add(f"{tree.place}: {info.filename} is encrypted")
        else:
            add_member(tree, Member(parts, number, info.file_size), 0, problems)
