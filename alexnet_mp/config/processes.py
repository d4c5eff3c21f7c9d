"""Whether another process of this host still runs."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def host_identity() -> str:
    """This host and its space of process numbers: containers may share the host's name only."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def process_state(pid: int) -> str:
    """The state of process `pid` of this host: a letter as in /proc, "" once it has ended.

    Where the system has no /proc, or does not show that process, "R" stands for all states.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return "" if state in "ZX" else state
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass
    except OSError:
        return "R"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except (PermissionError, OverflowError):
        pass
    return "R"
