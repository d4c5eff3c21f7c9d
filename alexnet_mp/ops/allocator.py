"""The C library's memory allocator, told to keep what a training step frees for the next step."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep what this process frees; returns whether it does.

    Otherwise glibc gives large blocks back at once, and the system clears their pages when the next
    step asks again: a tenth of a step's time on a CPU. The process stays as large as it was at its
    largest. Other allocators, and one that the environment tunes, are left alone.
    """
    if (
        any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
        or platform.libc_ver()[0] != "glibc"
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Old versions refuse a threshold, which costs time only.
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) & bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
