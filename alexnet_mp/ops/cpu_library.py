"""Compiles csrc/*.cpp on first use, with the machine's own C++ compiler, and loads the library.

Without a compiler everything works and takes longer: response_norm.py does the same with torch's
operations, data/transforms.py with NumPy's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = tuple(
    Path(__file__).with_name("csrc") / name for name in ("response_norm.cpp", "crop.cpp")
)
ARCHITECTURE = "ALEXNET_MP_MARCH"
"""The environment variable with the compiler's -march; without it "native", this machine's."""
# No contraction and no relaxed arithmetic: a value comes out the same in a vector and behind the
# last one, and on any architecture. Only errno and traps are given up.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]


class Unavailable(Exception):
    """There is no compiled library; the message says why."""


def unavailable_reason() -> str:
    """Why there is no compiled library on this machine; empty where there is one."""
    found = _load()
    return "" if isinstance(found, ctypes.CDLL) else found


def library() -> ctypes.CDLL:
    """The compiled library. Unavailable where there is an `unavailable_reason`."""
    found = _load()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(compiled_file()))
    except (Unavailable, OSError) as error:
        return f"response normalization is not compiled and takes several times as long: {error}"


def compiled_file() -> Path:
    """The library's file, which the first process that needs it makes, beside Python's own.

    Its name has a digest of all that it was made from.
    """
    compiler = _compiler()
    flags = [*FLAGS, f"-march={os.environ.get(ARCHITECTURE) or 'native'}"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    made_from = [source.read_bytes() for source in SOURCES], compiler, flags, _processor()
    digest = hashlib.blake2b(repr(made_from).encode(), digest_size=8).hexdigest()
    for folder in (
        SOURCES[0].parents[1] / "__pycache__",
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alexnet_mp",
    ):
        target = folder / f"norm-{digest}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / target.name
                _compile([compiler, *flags, "-o", str(made), *map(str, SOURCES)])
                os.replace(made, target)  # whole or not at all: several ranks may be making it
            return target
        except OSError:  # an installation that is not ours to write to: next folder
            continue
    raise Unavailable("no folder to put it in can be written to")


def _compiler() -> str:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if found is None:
        raise Unavailable("no C++ compiler (c++, g++, clang++, or what CXX names)")
    return found


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than five minutes") from None
    if done.returncode:
        first_line = (done.stderr.strip().splitlines() or ["failed"])[0]
        raise Unavailable(f"{command[0]}: {first_line[:200]}")


def _processor() -> str:
    """This processor, as -march=native sees it: a home folder may be shared by different
    machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() + platform.machine()
    lines = cpuinfo.read_text().splitlines()
    return "\n".join(
        next((line for line in lines if line.startswith(word)), "")
        for word in ("model name", "flags", "Features")
    )
