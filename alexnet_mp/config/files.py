"""Files that are either whole or as they were before, also after a kill, a full disk or a power
cut.

A file is written under a temporary name in its own folder (a rename does not cross file systems),
synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alexnet_mp.config.processes import host_identity, process_state

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
FOREIGN_LEFTOVER_AGE = 24 * 3600.0
"""Seconds without a change after which a temporary of another host counts as left over."""


class WriteError(OSError):
    """A file could not be written; the message names it, and `errno` and `strerror` are the
    system's.
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename}: could not be written ({self.strerror})"


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """`with atomic_writer(path) as file:` replaces `path` by what is written to the binary `file`.

    The replacement happens when the block ends; if the block raises, `path` stays as it was. Raises
    WriteError, an OSError that names `path`, where the system refuses.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces `path` by `content`; text is written as UTF-8. Raises as `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that no other process, host or container uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_host_digest()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporaries in `folder` of processes that have ended.

    Those of a process that still runs on this host stay, and so do recent ones of other hosts.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            pid, _, host = path.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
            if host == _host_digest() and pid.isdigit():
                left_over = not process_state(int(pid))
            else:
                left_over = time.time() - path.stat().st_mtime > FOREIGN_LEFTOVER_AGE
            if left_over:
                path.unlink()


def commit_folder(temporary: Path, path: Path) -> None:
    """Syncs everything in the folder `temporary` and renames it to `path`, which must not exist."""
    for entry in temporary.rglob("*"):
        if entry.is_dir():
            sync_folder(entry)
        else:
            sync_file(entry)
    sync_folder(temporary)
    temporary.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Waits until the content of the file `path` is on the disk. Raises WriteError."""
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise WriteError(path, error) from None
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk, where the file system can do that.

    Shares and FUSE file systems answer EINVAL and the like; they keep their own promise, and
    nothing is lost by going on. Raises WriteError where the disk itself fails or is full.
    """
    if os.name != "posix":  # only there can a folder be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno == errno.EIO or error.errno in OUT_OF_SPACE:
            raise WriteError(folder, error) from None
    finally:
        os.close(descriptor)


def _host_digest() -> str:
    """Eight hex digits for this host and its process numbers, which fit into any file name."""
    return hashlib.blake2b(host_identity().encode(), digest_size=4).hexdigest()
