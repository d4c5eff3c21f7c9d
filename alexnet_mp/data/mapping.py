"""Memory-mapped files that hold no file descriptor, and advice on which of their pages matter.

A store has a file for each 1,024 images. `numpy.memmap` and `mmap.mmap` keep a descriptor for each
mapping, and ImageNet's 1,301 shards would exceed the usual limit of 1,024 (256 on macOS). Python
3.13's `mmap.mmap(trackfd=False)` does what `map_file` does.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

DONT_NEED, WILL_NEED = 4, 3
"""MADV_DONTNEED and MADV_WILLNEED: the same numbers on Linux, macOS and the BSDs."""
READ, SHARED = 1, 1
"""PROT_READ and MAP_SHARED, likewise."""
FAILED = ctypes.c_void_p(-1).value
"""The address that mmap returns when it fails."""
_mappings: set[int] = set()
"""Addresses of the mappings that `map_file` made and that are still in use."""


def map_file(file: Path) -> np.ndarray:
    """The bytes of `file`, uint8 (N,), read-only; they are read as they are touched.

    FileNotFoundError, or ValueError with the way out where the system's limits on files or mappings
    are reached.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if not size:  # an empty file cannot be mapped
                return np.empty(0, np.uint8)
            return np.frombuffer(_mapped(opened.fileno(), size), np.uint8)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ValueError(
                f"{file}: {error.strerror} (errno {error.errno}); "
                "raise the limit with `ulimit -n 4096`"
            ) from None
        if error.errno == errno.ENOMEM:
            raise ValueError(
                f"{file}: cannot be mapped into memory (errno {error.errno}); raise `ulimit -v`, "
                "or the number of mappings, `sysctl vm.max_map_count`"
            ) from None
        raise


def will_need(array: np.ndarray) -> None:
    """Starts reading a part of a mapped file, and returns at once; nothing for other memory."""
    _advise(array, WILL_NEED)


def release(array: np.ndarray) -> None:
    """Gives back the memory of a part of a mapped file; it is read again when it is touched.

    Without this a pass over a large store counts as this process's memory, page by page. Does
    nothing for other memory, whose contents it would destroy.
    """
    _advise(array, DONT_NEED)


def _mapped(descriptor: int, size: int) -> Any:
    """A buffer of `size` bytes, unmapped when nothing refers to it any more."""
    libc = _libc()
    if libc is None:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    address = libc.mmap(None, size, READ, SHARED, descriptor, 0)
    if address == FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    buffer = (ctypes.c_ubyte * size).from_address(address)
    _mappings.add(address)
    # At the interpreter's end a thread may still read; the system unmaps then.
    weakref.finalize(buffer, _unmap, address, size).atexit = False
    return memoryview(buffer).toreadonly()


def _unmap(address: int, size: int) -> None:
    _mappings.discard(address)
    _libc().munmap(address, size)


def _advise(array: np.ndarray, advice: int) -> None:
    if array.nbytes and _is_mapped(array):
        address = array.ctypes.data
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(start, address + array.nbytes - start, advice)


def _is_mapped(array: np.ndarray) -> bool:
    """Whether the memory of `array` is one of `map_file`'s mappings."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    buffer = owner.obj if isinstance(owner, memoryview) else None
    return isinstance(buffer, ctypes.Array) and ctypes.addressof(buffer) in _mappings


@cache
def _libc() -> Any:
    """The C library; None on Windows, where open files are not counted so strictly."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,  # off_t; always 0 here
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
