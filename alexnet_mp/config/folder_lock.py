"""One process at a time writes into a folder.

`filelock` does not say who holds a lock and gives up where flock answers EBADF or ENOLCK, as
network file systems may.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from alexnet_mp.config.processes import host_identity, process_state

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"
CAN_LOCK = sys.platform != "win32"
POLL_SECONDS = 0.2
"""Between two looks at a lock that is waited for."""


class FolderLock:
    """Held from `take` to `release`, or to the end of the process: the system then frees the lock.

    The lock is a file in the folder, opened for writing, which NFS needs. It names its holder. A
    file that a killed process left does not lock anybody out.
    """

    def __init__(self, folder: Path, activity: str = "another run writes there") -> None:
        """`activity` begins the message of the OSError that a second process gets."""
        self.path, self.activity = folder / LOCK_NAME, activity
        self._descriptor: int | None = None

    def take(self, wait: bool = False) -> None:
        """Takes the lock. OSError, naming the process that holds it, unless it shall `wait`."""
        while not self._try():
            if not wait:
                holder = self._holder()
                raise OSError(
                    f"{self.activity}: process {holder.get('pid', '?')} on "
                    f"{str(holder.get('host', '?')).partition(' ')[0]}, since "
                    f"{holder.get('since', '?')}; wait for it, stop it, or name another folder"
                )
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Removes the file, while it is still this process's own."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _same_file(descriptor, self.path):
                    self.path.unlink()
            os.close(descriptor)

    @contextlib.contextmanager
    def held(self, wait: bool = False) -> Iterator[None]:
        """The lock for the length of a block. Raises as `take`."""
        self.take(wait)
        try:
            yield
        finally:
            self.release()

    def _try(self) -> bool:
        """One attempt at the lock."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(descriptor, self._holder()):
                    os.close(descriptor)
                    return False
                if _same_file(descriptor, self.path):  # else its holder removed it in between
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(_this_process()).encode())
                    self._descriptor = descriptor
                    return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _holder(self) -> dict[str, object]:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}


def _this_process() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": host_identity(), "since": since}


def _lock(descriptor: int, holder: dict[str, object]) -> bool:
    if CAN_LOCK:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
    # A file system without locks: at least the named process can be looked for.
    pid = holder.get("pid")
    return not (
        holder.get("host") == host_identity()
        and isinstance(pid, int)
        and pid != os.getpid()
        and process_state(pid)
    )


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
