"""csrc/response_norm.cpp and csrc/crop.cpp, compiled on first use by the machine's own C++ compiler; without one, response_norm.py does the same with torch's operations
and data/transforms.py with NumPy's.

A norm is some thirty operations on each value. As tensors every one of them goes through memory, whose fresh pages alone cost more than
all the arithmetic; compiled, ReLU, norm and pooling together take about as long as ReLU and pooling do. An image's crop likewise.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SOURCES = tuple(
    Path(__file__).with_name("csrc") / name for name in ("response_norm.cpp", "crop.cpp")
)
SIZE, BETA, POOL = 5, 0.75, 3  # what is written into the loops
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# No contraction and no relaxed arithmetic: a value comes out the same in a vector and behind the last one. Only errno and traps are given up.
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]


class Unavailable(Exception):
    """There is no compiled norm; the message says why."""


def unavailable_reason() -> str:
    """Why there is no compiled norm on this machine; empty where there is one."""
    found = _library()
    return "" if isinstance(found, ctypes.CDLL) else found


def forward(
    z: Tensor, k: float, alpha: float, relu: bool, stride: int
) -> tuple[Tensor, Tensor | None]:
    """The norm of z (N, C, ...), dense and on the CPU, after a ReLU if `relu`; pooled 3x3 every `stride` pixels if that is not 0.

    Returns also where each maximum was, uint8, if pooled, which needs channels-last. See `supports`.
    """
    if not stride:
        result, where = torch.empty_like(z), None
    else:
        height, width = ((n - POOL) // stride + 1 for n in z.shape[2:])
        result, where = (
            torch.empty(*z.shape[:2], height, width, dtype=dtype, memory_format=torch.channels_last)
            for dtype in (z.dtype, torch.uint8)
        )
    _call("forward", z, k, alpha, relu, stride, [z, result, where])
    return result, where


def backward(
    z: Tensor,
    gradient: Tensor,
    where: Tensor | None,
    k: float,
    alpha: float,
    relu: bool,
    stride: int,
) -> Tensor:
    """The gradient for z from that for the result, laid out as the result was."""
    dz = torch.empty_like(z)
    _call("backward", z, k, alpha, relu, stride, [z, gradient, where, dz])
    return dz


def supports(z: Tensor, size: int, beta: float) -> bool:
    """Whether `forward` can do it."""
    return (
        z.device.type == "cpu"
        and z.dtype in DTYPES
        and size == SIZE
        and beta == BETA
        and z.ndim >= 3
        and z.numel() > 0
        and not unavailable_reason()
    )


class Mean(NamedTuple):
    """What is subtracted from a crop: float32 (3, s, s), contiguous, from this place on, mirrored with the crop or not."""

    values: np.ndarray
    top: int
    left: int
    flip: bool


def crop(
    image: np.ndarray,
    top: int,
    left: int,
    flip: bool,
    mean: Mean | None,
    constant: float,
    color: np.ndarray | None,
    divisor: float,
    scale: float,
    out: np.ndarray,
) -> None:
    """out (3, size, size), float32 = ((crop of image - mean - constant) + color) / divisor / scale, for one uint8 image (3, side, side).

    `color`: float32 (3,), contiguous. None, 0 and 1 leave their step out. Call it only where nothing is `unavailable_reason`.
    """
    size, (_, row, pixel) = out.shape[-1], image.strides
    if not (
        0 <= top <= image.shape[1] - size and 0 <= left <= image.shape[2] - size
    ):  # C would read what lies beside it
        raise ValueError(
            f"a crop of {size} pixels at ({top}, {left}) is not inside an image of {image.shape[1]} x {image.shape[2]}"
        )
    first, mean_steps = None, (0, 0)
    if mean is not None:
        mean_steps = mean.values.strides[0] // 4, mean.values.strides[1] // 4
        first = mean.values.ctypes.data + 4 * (mean.top * mean_steps[1] + mean.left)
    _library().crop(
        (ctypes.c_long * 8)(
            size, *image.strides, flip, *mean_steps, mean is not None and mean.flip
        ),
        ctypes.c_void_p(image.ctypes.data + top * row + left * pixel),
        ctypes.c_void_p(first),
        ctypes.c_float(constant),
        ctypes.c_void_p(None if color is None else color.ctypes.data),
        ctypes.c_float(divisor),
        ctypes.c_float(scale),
        ctypes.c_void_p(out.ctypes.data),
    )


def color_products(image: np.ndarray) -> np.ndarray:
    """float64 (3, 3), whole numbers: for each two colors of `image`, uint8 (3, side, side), contiguous, the sum of their products over the pixels.

    Call it only where nothing is `unavailable_reason`.
    """
    products = np.empty((3, 3))
    _library().color_products(
        ctypes.c_void_p(image.ctypes.data),
        ctypes.c_long(image[0].size),
        ctypes.c_void_p(products.ctypes.data),
    )
    return products


def keep_freed_memory() -> bool:
    """Makes glibc keep what this process frees for its next step; whether it does.

    Otherwise it gives large blocks back at once, and the system clears their pages when the next step asks again: a tenth of a step's
    time on a CPU. The process stays as large as it was at its largest. Other allocators, and one that the environment tunes, are left alone.
    """
    if (
        any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
        or platform.libc_ver()[0] != "glibc"
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) & bool(
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )  # refused by old ones, which cost time only


def as_dense(x: Tensor) -> Tensor:
    """`x`, or a copy of it, in the default format or channels-last."""
    return x if x.is_contiguous() or is_last(x) else x.contiguous()


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x`, or a copy of it, in the format of `other`, which is dense."""
    return x.contiguous(
        memory_format=torch.channels_last if is_last(other) else torch.contiguous_format
    )


def is_last(x: Tensor) -> bool:
    """Whether `x` is dense with its maps last, and not just as well in the default format."""
    return (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    )


def _call(
    name: str,
    z: Tensor,
    k: float,
    alpha: float,
    relu: bool,
    stride: int,
    tensors: list[Tensor | None],
) -> None:
    """Images are divided among torch's number of threads; ctypes lets go of the interpreter meanwhile."""
    function = getattr(_library(), f"{name}_{str(z.dtype).removeprefix('torch.')}")
    images, maps = z.shape[:2]
    height, width = z.shape[2:] if z.ndim == 4 else (1, z[0, 0].numel())
    threads = min(torch.get_num_threads(), images)
    bounds = [images * i // threads for i in range(threads + 1)]

    def work(first: int, last: int) -> None:
        shape = (ctypes.c_long * 8)(
            last - first, maps, height, width, is_last(z), relu, bool(stride), stride
        )
        pointers = [
            None
            if x is None
            else ctypes.c_void_p(x.data_ptr() + first * x.stride(0) * x.element_size())
            for x in tensors
        ]
        function(shape, ctypes.c_double(k), ctypes.c_double(alpha), *pointers)

    if threads == 1:
        work(0, images)
        return
    others = [_helpers().submit(work, *part) for part in itertools.pairwise(bounds[1:])]
    work(0, bounds[1])
    for other in others:
        other.result()


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="norm")


os.register_at_fork(
    after_in_child=_helpers.cache_clear
)  # threads do not live on in a forked process


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled norm, or why there is none."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (Unavailable, OSError) as error:
        return f"response normalization is not compiled and takes several times as long: {error}"


def _compiled() -> Path:
    """The library's file, made by the first process that needs it; it is beside Python's own compiled files."""
    compiler = next(
        filter(
            None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))
        ),
        None,
    )
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++, clang++, or what CXX names)")
    flags = FLAGS + ["-mprefer-vector-width=512"] * (platform.machine() in ("x86_64", "AMD64"))
    key = hashlib.blake2b(
        repr(([source.read_bytes() for source in SOURCES], compiler, flags, _processor())).encode(),
        digest_size=8,
    ).hexdigest()
    for folder in (
        SOURCES[0].parents[1] / "__pycache__",
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alexnet_mp",
    ):
        target = folder / f"norm-{key}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / target.name
                done = subprocess.run(
                    [compiler, *flags, "-o", str(made), *map(str, SOURCES)],
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                if done.returncode:
                    raise Unavailable(
                        f"{compiler}: {(done.stderr.strip().splitlines() or ['failed'])[0][:200]}"
                    )
                os.replace(made, target)  # whole or not at all: several ranks may be making it
            return target
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler} took more than five minutes") from None
        except OSError:  # an installation that is not ours to write to: next folder
            continue
    raise Unavailable("no folder to put it in can be written to")


def _processor() -> str:
    """What -march=native means here: a home folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() + platform.machine()
    lines = cpuinfo.read_text().splitlines()
    return "\n".join(
        next((line for line in lines if line.startswith(word)), "")
        for word in ("model name", "flags", "Features")
    )
