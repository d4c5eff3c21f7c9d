"""What the compiled library does on a CPU: response normalization, the crop of an image, its sums.

A norm is some thirty operations on each value. As tensors every one of them goes through memory,
whose fresh pages alone cost more than all the arithmetic; compiled, ReLU, norm and pooling together
take about as long as ReLU and pooling do. An image's crop likewise.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_mp.ops.cpu_library import library
from alexnet_mp.ops.cpu_library import unavailable_reason as unavailable_reason

SIZE, BETA, POOL = 5, 0.75, 3  # what is written into the loops of csrc/response_norm.cpp
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class NormSettings(ctypes.Structure):
    """The structure of this name in csrc/response_norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "maps", "height", "width")),
        *((name, ctypes.c_int64) for name in ("channels_last", "relu", "pool_stride")),
        *((name, ctypes.c_double) for name in ("k", "alpha")),
    ]


class CropSettings(ctypes.Structure):
    """The structure of this name in csrc/crop.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "channel_step", "row_step", "pixel_step")),
        *((name, ctypes.c_int64) for name in ("flip", "mean_channel_step", "mean_row_step")),
        ("mean_flip", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("constant", "divisor", "scale")),
    ]


def supports(z: Tensor, size: int, beta: float) -> bool:
    """Whether `forward` can compute a norm of `size` maps and exponent `beta` of z."""
    return (
        z.device.type == "cpu"
        and z.dtype in DTYPES
        and size == SIZE
        and beta == BETA
        and z.ndim >= 3
        and z.numel() > 0
        and not unavailable_reason()
    )


def forward(
    z: Tensor, k: float, alpha: float, relu: bool, pool_stride: int
) -> tuple[Tensor, Tensor | None]:
    """The norm of z (N, C, ...), dense and on the CPU, after a ReLU if `relu`; see `supports`.

    If `pool_stride` is not 0, the result is max-pooled 3x3 at that stride, and comes with the place
    of each maximum in its window, uint8. z must then be channels-last.
    """
    if not pool_stride:
        result, where = torch.empty_like(z), None
    else:
        height, width = ((n - POOL) // pool_stride + 1 for n in z.shape[2:])
        result, where = (
            torch.empty(*z.shape[:2], height, width, dtype=dtype, memory_format=torch.channels_last)
            for dtype in (z.dtype, torch.uint8)
        )
    _call("forward", [z, result, where], k, alpha, relu, pool_stride)
    return result, where


def backward(
    z: Tensor,
    gradient: Tensor,
    where: Tensor | None,
    k: float,
    alpha: float,
    relu: bool,
    pool_stride: int,
) -> Tensor:
    """The gradient for z from that for the result, which is laid out as the result was."""
    dz = torch.empty_like(z)
    _call("backward", [z, gradient, where, dz], k, alpha, relu, pool_stride)
    return dz


class Mean(NamedTuple):
    """What is subtracted from a crop: `values`, float32 (3, s, s), contiguous, from (top, left) on.

    It is mirrored if `flip`.
    """

    values: NDArray[np.float32]
    top: int
    left: int
    flip: bool


def crop(
    image: NDArray[np.uint8],
    top: int,
    left: int,
    flip: bool,
    mean: Mean | None,
    constant: float,
    color: NDArray[np.float32] | None,
    divisor: float,
    scale: float,
    out: NDArray[np.float32],
) -> None:
    """out = ((crop of image - mean - constant) + color) / divisor / scale.

    `image` is uint8 (3, side, side), `out` float32 (3, size, size), `color` float32 (3,), dense.
    None, 0 and 1 leave their step out. ValueError for a crop that is not inside the image;
    Unavailable where `unavailable_reason` has one.
    """
    size, (_, row, pixel) = out.shape[-1], image.strides
    if not (0 <= top <= image.shape[1] - size and 0 <= left <= image.shape[2] - size):
        raise ValueError(  # C would read what lies beside the image
            f"a crop of {size} pixels at ({top}, {left}) is not inside an image of "
            f"{image.shape[1]} x {image.shape[2]}"
        )
    first, mean_steps = None, (0, 0)
    if mean is not None:
        mean_steps = mean.values.strides[0] // 4, mean.values.strides[1] // 4
        first = mean.values.ctypes.data + 4 * (mean.top * mean_steps[1] + mean.left)
    mean_flip = mean is not None and mean.flip
    settings = CropSettings(
        size, *image.strides, flip, *mean_steps, mean_flip, constant, divisor, scale
    )
    _function("crop")(
        ctypes.byref(settings),
        ctypes.c_void_p(image.ctypes.data + top * row + left * pixel),
        ctypes.c_void_p(first),
        ctypes.c_void_p(None if color is None else color.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
    )


def color_products(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """For each two colors the sum of their products over the pixels: float64 (3, 3), whole numbers.

    `image` is uint8 (3, side, side), contiguous. Unavailable where `unavailable_reason` has one.
    """
    products = np.empty((3, 3))
    _function("color_products")(
        ctypes.c_void_p(image.ctypes.data),
        ctypes.c_int64(image[0].size),
        ctypes.c_void_p(products.ctypes.data),
    )
    return products


def as_dense(x: Tensor) -> Tensor:
    """`x`, or a copy of it, in the default format or channels-last."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x`, or a copy of it, in the format of `other`, which is dense."""
    return x.contiguous(
        memory_format=torch.channels_last if is_channels_last(other) else torch.contiguous_format
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is dense with its maps last, and not just as well in the default format."""
    return (
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    )


def _call(
    name: str, tensors: list[Tensor | None], k: float, alpha: float, relu: bool, pool_stride: int
) -> None:
    """Calls a function on tensors of as many images, the first of them z, divided among threads.

    There are as many threads as torch has; ctypes lets go of the interpreter meanwhile.
    """
    z = tensors[0]
    assert z is not None
    function = _function(f"{name}_{str(z.dtype).removeprefix('torch.')}")
    images, maps = z.shape[:2]
    height, width = z.shape[2:] if z.ndim == 4 else (1, z[0, 0].numel())
    threads = min(torch.get_num_threads(), images)
    bounds = [images * i // threads for i in range(threads + 1)]

    def work(first: int, last: int) -> None:
        settings = NormSettings(
            last - first, maps, height, width, is_channels_last(z), relu, pool_stride, k, alpha
        )
        pointers = [
            None if x is None else x.data_ptr() + first * x.stride(0) * x.element_size()
            for x in tensors
        ]
        function(ctypes.byref(settings), *map(ctypes.c_void_p, pointers))

    if threads == 1:
        work(0, images)
        return
    others = [_helpers().submit(work, *part) for part in itertools.pairwise(bounds[1:])]
    work(0, bounds[1])
    for other in others:
        other.result()


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    """A function of the library, whose structures are compared with ours first."""
    found = library()
    for structure, prefix in ((NormSettings, "norm"), (CropSettings, "crop")):
        size = getattr(found, f"{prefix}_settings_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(
                f"{structure.__name__}: {ctypes.sizeof(structure)} bytes in cpu_kernels.py, "
                f"{size()} in csrc; both must have the same fields"
            )
    return cast(Callable[..., Any], getattr(found, name))


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="norm")


# Threads do not live on in a forked process.
os.register_at_fork(after_in_child=_helpers.cache_clear)
