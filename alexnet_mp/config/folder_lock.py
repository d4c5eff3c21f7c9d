"""One run at a time writes into a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


class FolderLock:
    """Held from `take` to `release`, or to the end of the process, however it ends: the system frees the lock, the file it leaves is stale."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._descriptor: int | None = None

    def take(self) -> None:
        """OSError, naming the process that holds it, where another run writes into the folder."""
        mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(descriptor, self._holder()):
                    holder = self._holder()
                    raise OSError(
                        f"another run writes there: process {holder.get('pid', '?')} on {holder.get('host', '?')}, since "
                        f"{holder.get('since', '?')}; wait for it, stop it, or name another folder"
                    )
                if _same_file(descriptor, self.path):  # else its holder removed it in between
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(mine).encode())
                    self._descriptor = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self) -> None:
        """Removes the file, while it is still ours."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if _same_file(descriptor, self.path):
                    self.path.unlink()
            os.close(descriptor)

    def _holder(self) -> dict[str, object]:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}


def _lock(descriptor: int, holder: dict[str, object]) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
    # A file system without locks: all that can be known is whether the process that the file names still runs on this host.
    return not (
        holder.get("host") == socket.gethostname()
        and isinstance(holder.get("pid"), int)
        and _runs(holder["pid"])
    )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return pid != os.getpid()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
