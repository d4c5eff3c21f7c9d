"""Triton kernels for CUDA: ReLU + response norm + max pooling, the map norm, the crop of images,
and dropout.

They are the twins of csrc/response_norm.cpp, csrc/crop.cpp and dropout.py. Tensors are channels-
last, values are float32 inside and are rounded once, when they are stored. This module imports
Triton; `cuda_kernels` says whether it can be used.

Bytes that a kernel moves to and from a GPU's memory, for values of E bytes, P pixels and C maps; in
brackets the least possible. Values that a program reads twice come from the GPU's caches.

    relu_lrn_pool forward     E P C read, (E + 1) P C / 4 written             [the same]
    relu_lrn_pool backward    E P C + (E + 1) P C / 4 read, E P C written     [the same]
    map norm forward          E P C read, E P C written                       [the same]
    map norm backward         (4 E + 4) P C read, (E + 4) P C written         [2 E P C, E P C]
    crop of S x S             3 S S read, 3 E S S written, an image           [the same]

The map norm's backward has two passes, since one would compute each term 25 times.

"""

import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

POOL = 3
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PIXELS = 128  # of a program in the interpreter
VALUES, WARPS = 512, 4  # of a program on a GPU; with 16 values a thread or more it spills


def _block(maps: int) -> dict[str, int]:
    """Pixels and warps of a program that reads `maps` maps of each pixel.

    They are fixed, not found by trial: a trial compiles each kernel for each candidate, which took
    a minute before the first step.
    """
    if INTERPRETED:
        return {"BLOCK": PIXELS}
    return {"BLOCK": max(VALUES // triton.next_power_of_2(maps), 1), "num_warps": WARPS}


@triton.jit
def _load(pointer, base, channel, C: tl.constexpr, inside, RELU: tl.constexpr):
    """Values (BLOCK, CP) of maps `channel` at pixels that begin at `base`, zero beyond the first
    and last map."""
    mask = inside[:, None] & (channel >= 0)[None, :] & (channel < C)[None, :]
    x = tl.load(pointer + base[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # not a number stays that
    return x


@triton.jit
def _power(d):
    """d^-3/4."""
    root = tl.sqrt(d)
    return 1.0 / (root * tl.sqrt(root))


@triton.jit
def _norm_at(z, base, channel, C: tl.constexpr, inside, k, alpha, RELU: tl.constexpr):
    """The norm across five maps at pixels that begin at `base`: (BLOCK, CP)."""
    center = _load(z, base, channel, C, inside, RELU)
    total = center * center
    for shift in tl.static_range(1, 3):
        left = _load(z, base, channel - shift, C, inside, RELU)
        right = _load(z, base, channel + shift, C, inside, RELU)
        total += left * left + right * right
    return center * _power(k + alpha * total)


@triton.jit
def _relu_lrn_pool_forward(
    z,
    out,
    places,
    total,
    H,
    W,
    OH,
    OW,
    k,
    alpha,
    C: tl.constexpr,
    CP: tl.constexpr,
    RELU: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pooled pixels (or pixels, where STRIDE is 0) of all C maps."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CP)
    inside = pixel < total
    stored = pixel[:, None] * C + channel[None, :]
    keep = inside[:, None] & (channel < C)[None, :]
    if STRIDE == 0:
        value = _norm_at(z, pixel * C, channel, C, inside, k, alpha, RELU)
        tl.store(out + stored, value.to(out.dtype.element_ty), mask=keep)
    else:
        image = pixel // (OH * OW)
        row = pixel % (OH * OW) // OW * STRIDE
        column = pixel % OW * STRIDE
        best = tl.full((BLOCK, CP), float("-inf"), tl.float32)
        at = tl.zeros((BLOCK, CP), tl.int32)
        for place in tl.static_range(9):
            base = ((image * H + row + place // 3) * W + column + place % 3) * C
            value = _norm_at(z, base, channel, C, inside, k, alpha, RELU)
            larger = (value > best) | (value != value)  # the first of several; not a number wins
            best = tl.where(larger, value, best)
            at = tl.where(larger, place, at)
        tl.store(out + stored, best.to(out.dtype.element_ty), mask=keep)
        tl.store(places + stored, at.to(tl.uint8), mask=keep)


@triton.jit
def _gradient_at(
    gradient,
    places,
    image,
    row,
    column,
    channel,
    inside,
    OH,
    OW,
    C: tl.constexpr,
    CP: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient for the norm at pixels (row, column): that of each window whose maximum was
    there."""
    total = tl.zeros((BLOCK, CP), tl.float32)
    known = (channel >= 0)[None, :] & (channel < C)[None, :]
    for down in tl.static_range((3 + STRIDE - 1) // STRIDE):
        for across in tl.static_range((3 + STRIDE - 1) // STRIDE):
            oh, ow = row // STRIDE - down, column // STRIDE - across
            i, j = row - oh * STRIDE, column - ow * STRIDE
            covers = inside & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (i < 3) & (j < 3)
            mask = covers[:, None] & known
            where = ((image * OH + oh) * OW + ow)[:, None] * C + channel[None, :]
            at = tl.load(places + where, mask=mask, other=255).to(tl.int32)
            g = tl.load(gradient + where, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(at == (i * 3 + j)[:, None].to(tl.int32), g, 0.0)
    return total


@triton.jit
def _relu_lrn_pool_backward(
    z,
    gradient,
    places,
    dz,
    total,
    H,
    W,
    OH,
    OW,
    k,
    alpha,
    C: tl.constexpr,
    CP: tl.constexpr,
    RELU: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the gradient of BLOCK pixels of all C maps.

    dx_c = u_c - 2 alpha beta x_c (t_(c-2) + ... + t_(c+2)) with u = g d^-3/4 and t = u x / d. Each
    d needs two maps more on either side, so nine shifted reads of z serve all five terms.
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CP)
    inside = pixel < total
    base = pixel * C
    image, row, column = pixel // (H * W), pixel % (H * W) // W, pixel % W
    a4 = _load(z, base, channel - 4, C, inside, RELU)
    a3 = _load(z, base, channel - 3, C, inside, RELU)
    a2 = _load(z, base, channel - 2, C, inside, RELU)
    a1 = _load(z, base, channel - 1, C, inside, RELU)
    x = _load(z, base, channel, C, inside, RELU)
    b1 = _load(z, base, channel + 1, C, inside, RELU)
    b2 = _load(z, base, channel + 2, C, inside, RELU)
    b3 = _load(z, base, channel + 3, C, inside, RELU)
    b4 = _load(z, base, channel + 4, C, inside, RELU)
    middle = a1 * a1 + x * x + b1 * b1
    spread = tl.zeros((BLOCK, CP), tl.float32)
    u = tl.zeros((BLOCK, CP), tl.float32)
    for shift in tl.static_range(-2, 3):
        if shift == -2:
            other, d = a2, a4 * a4 + a3 * a3 + a2 * a2 + a1 * a1 + x * x
        elif shift == -1:
            other, d = a1, a3 * a3 + a2 * a2 + middle
        elif shift == 0:
            other, d = x, a2 * a2 + middle + b2 * b2
        elif shift == 1:
            other, d = b1, middle + b2 * b2 + b3 * b3
        else:
            other, d = b2, x * x + b1 * b1 + b2 * b2 + b3 * b3 + b4 * b4
        d = k + alpha * d
        if STRIDE == 0:
            g = _load(gradient, base, channel + shift, C, inside, False)
        else:
            g = _gradient_at(
                gradient,
                places,
                image,
                row,
                column,
                channel + shift,
                inside,
                OH,
                OW,
                C,
                CP,
                STRIDE,
                BLOCK,
            )
        scaled = g * _power(d)
        spread += scaled * other / d
        if shift == 0:
            u = scaled
    result = u - 1.5 * alpha * x * spread
    if RELU:
        result = tl.where(x > 0, result, 0.0)
    keep = inside[:, None] & (channel < C)[None, :]
    tl.store(dz + base[:, None] + channel[None, :], result.to(dz.dtype.element_ty), mask=keep)


@triton.jit
def _pixel_sum(
    x,
    image,
    row,
    column,
    channel,
    inside,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    SIZE: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of x, or of its squares, over SIZE x SIZE pixels around each; zeros beyond the
    edge."""
    total = tl.zeros((BLOCK, CP), tl.float32)
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            h, w = row + i - SIZE // 2, column + j - SIZE // 2
            known = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            value = _load(x, ((image * H + h) * W + w) * C, channel, C, known, False)
            total += value * value if SQUARE else value
    return total


@triton.jit
def _map_norm_forward(
    z,
    out,
    total,
    H,
    W,
    k,
    alpha,
    C: tl.constexpr,
    CP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CP)
    inside = pixel < total
    image, row, column = pixel // (H * W), pixel % (H * W) // W, pixel % W
    d = k + alpha * _pixel_sum(
        z, image, row, column, channel, inside, H, W, C, CP, SIZE, True, BLOCK
    )
    y = _load(z, pixel * C, channel, C, inside, False) * _power(d)
    keep = inside[:, None] & (channel < C)[None, :]
    tl.store(out + pixel[:, None] * C + channel[None, :], y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _map_norm_terms(
    z,
    gradient,
    terms,
    total,
    H,
    W,
    k,
    alpha,
    C: tl.constexpr,
    CP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of backward: t = g d^-7/4 x in float32."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CP)
    inside = pixel < total
    image, row, column = pixel // (H * W), pixel % (H * W) // W, pixel % W
    d = k + alpha * _pixel_sum(
        z, image, row, column, channel, inside, H, W, C, CP, SIZE, True, BLOCK
    )
    x = _load(z, pixel * C, channel, C, inside, False)
    g = _load(gradient, pixel * C, channel, C, inside, False)
    keep = inside[:, None] & (channel < C)[None, :]
    tl.store(terms + pixel[:, None] * C + channel[None, :], g * _power(d) * x / d, mask=keep)


@triton.jit
def _map_norm_backward(
    z,
    gradient,
    terms,
    dz,
    total,
    H,
    W,
    k,
    alpha,
    C: tl.constexpr,
    CP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass: dx = g d^-3/4 - 2 alpha beta x (sum of t over the pixels around)."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CP)
    inside = pixel < total
    image, row, column = pixel // (H * W), pixel % (H * W) // W, pixel % W
    d = k + alpha * _pixel_sum(
        z, image, row, column, channel, inside, H, W, C, CP, SIZE, True, BLOCK
    )
    spread = _pixel_sum(terms, image, row, column, channel, inside, H, W, C, CP, SIZE, False, BLOCK)
    x = _load(z, pixel * C, channel, C, inside, False)
    g = _load(gradient, pixel * C, channel, C, inside, False)
    result = g * _power(d) - 1.5 * alpha * x * spread
    keep = inside[:, None] & (channel < C)[None, :]
    tl.store(dz + pixel[:, None] * C + channel[None, :], result.to(dz.dtype.element_ty), mask=keep)


@triton.jit
def _crop(
    images,
    tops,
    mean,
    color,
    out,
    side,
    mean_side,
    constant,
    divisor,
    scale,
    SIZE: tl.constexpr,
    ROWS,
    MEAN: tl.constexpr,
    COLOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one image's crop, three colors. `tops` is int32 (3, N): top,
    left, flip."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    row, column = pixel // SIZE, pixel % SIZE
    top, left = tl.load(tops + image), tl.load(tops + ROWS + image)
    flip = tl.load(tops + 2 * ROWS + image) != 0
    source = tl.where(flip, SIZE - 1 - column, column)
    for c in tl.static_range(3):
        place = ((image.to(tl.int64) * 3 + c) * side + top + row) * side + left + source
        value = tl.load(images + place, mask=inside, other=0).to(tl.float32)
        if MEAN == 1:  # aligned: the mean image under the crop, mirrored with it
            at = (c * mean_side + top + row) * mean_side + left + source
            value -= tl.load(mean + at, mask=inside, other=0.0)
        elif MEAN == 2:  # always the center of the mean image, never mirrored
            value -= tl.load(mean + (c * SIZE + row) * SIZE + column, mask=inside, other=0.0)
        value -= constant
        if COLOR:
            value = (value + tl.load(color + image * 3 + c)) / divisor
        value = value / scale
        target = ((image.to(tl.int64) * SIZE + row) * SIZE + column) * 3 + c
        tl.store(out + target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hash_round(x, SHIFT: tl.constexpr, factor):
    """`_hash_round` of dropout.py: the shift is arithmetic, so the copies of the sign are
    cleared."""
    return (x ^ ((x >> SHIFT) & ((1 << (32 - SHIFT)) - 1))) * factor


@triton.jit
def _drop(x, keys, unit, out, units, threshold, keep, BLOCK: tl.constexpr):
    """One program: BLOCK units of one image. The hash is that of `dropout_mask`, int32 that
    wraps."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < units
    key = tl.load(keys + row)
    low, high = key.to(tl.int32), (key >> 32).to(tl.int32)
    h = tl.load(unit + column, mask=inside, other=0) ^ low
    h = _hash_round(h, 16, 0x7FEB352D) + high
    h = _hash_round(h, 15, -0x7B935975)  # 0x846CA68B as int32
    h = _hash_round(h, 16, -0x3D4D51CB)  # 0xC2B2AE35
    place = row.to(tl.int64) * units + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.where(h < threshold, 0.0, 1.0) / keep  # not a number stays that
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def _grid(total: int) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda meta: (triton.cdiv(total, meta["BLOCK"]),)


def forward(
    z: Tensor, k: float, alpha: float, relu: bool, stride: int
) -> tuple[Tensor, Tensor | None]:
    """The norm of z (N, C, H, W), channels-last, after a ReLU if `relu`; pooled 3x3 every `stride`
    pixels if that is not 0.

    Returns also the place 0 to 8 of each maximum in its window, uint8, if pooled.
    """
    images, maps, height, width = z.shape
    rows, columns = (
        ((n - POOL) // stride + 1 for n in (height, width)) if stride else (height, width)
    )
    shape = (images, maps, rows, columns)
    last = torch.channels_last
    out = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=last)
    places = None
    if stride:
        places = torch.empty(shape, dtype=torch.uint8, device=z.device, memory_format=last)
    total = images * rows * columns
    if total:
        _relu_lrn_pool_forward[_grid(total)](
            z,
            out,
            out if places is None else places,
            total,
            height,
            width,
            rows,
            columns,
            k,
            alpha,
            C=maps,
            CP=triton.next_power_of_2(maps),
            RELU=relu,
            STRIDE=stride,
            **_block(maps),
        )
    return out, places


def backward(
    z: Tensor,
    gradient: Tensor,
    places: Tensor | None,
    k: float,
    alpha: float,
    relu: bool,
    stride: int,
) -> Tensor:
    """The gradient for z, channels-last, from that for the result of `forward`, channels-last
    too."""
    images, maps, height, width = z.shape
    rows, columns = gradient.shape[2:]
    dz = torch.empty_like(z, memory_format=torch.channels_last)
    total = images * height * width
    if total:
        _relu_lrn_pool_backward[_grid(total)](
            z,
            gradient,
            gradient if places is None else places,
            dz,
            total,
            height,
            width,
            rows,
            columns,
            k,
            alpha,
            C=maps,
            CP=triton.next_power_of_2(maps),
            RELU=relu,
            STRIDE=stride,
            **_block(maps),
        )
    return dz


def map_norm_forward(z: Tensor, size: int, k: float, alpha: float) -> Tensor:
    """The norm of z (N, C, H, W), channels-last, over size x size pixels of the same map."""
    images, maps, height, width = z.shape
    out = torch.empty_like(z, memory_format=torch.channels_last)
    if total := images * height * width:
        _map_norm_forward[_grid(total)](
            z,
            out,
            total,
            height,
            width,
            k,
            alpha,
            C=maps,
            CP=triton.next_power_of_2(maps),
            SIZE=size,
            **_block(maps),
        )
    return out


def map_norm_backward(z: Tensor, gradient: Tensor, size: int, k: float, alpha: float) -> Tensor:
    """The gradient for z from that for the result of `map_norm_forward`, all channels-last."""
    images, maps, height, width = z.shape
    dz = torch.empty_like(z, memory_format=torch.channels_last)
    if total := images * height * width:
        terms = torch.empty_like(z, dtype=torch.float32, memory_format=torch.channels_last)
        sizes = {"C": maps, "CP": triton.next_power_of_2(maps), "SIZE": size, **_block(maps)}
        _map_norm_terms[_grid(total)](z, gradient, terms, total, height, width, k, alpha, **sizes)
        _map_norm_backward[_grid(total)](
            z, gradient, terms, dz, total, height, width, k, alpha, **sizes
        )
    return dz


def crop(
    images: Tensor,
    places: Tensor,
    size: int,
    dtype: torch.dtype,
    mean: Tensor | None = None,
    aligned: bool = False,
    constant: float = 0.0,
    color: Tensor | None = None,
    divisor: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """((crop of images - mean - constant) + color) / divisor / scale: (N, 3, size, size),
    channels-last, of type `dtype`.

    `images`: uint8 (N, 3, side, side), contiguous. `places`: int32 (3, N) of top, left and flip, on
    the device. `mean`: float32 (3, side, side), cut and mirrored as the image is (`aligned`), or
    (3, size, size), subtracted as it is. `color`: float32 (N, 3), in gray levels.
    """
    out = torch.empty(
        (len(images), 3, size, size),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    if out.numel():
        unused = places  # a pointer that is not read
        _crop[lambda meta: (triton.cdiv(size * size, meta["BLOCK"]), len(images))](
            images,
            places,
            unused if mean is None else mean,
            unused if color is None else color,
            out,
            images.shape[-1],
            0 if mean is None else mean.shape[-1],
            constant,
            divisor,
            scale,
            SIZE=size,
            ROWS=len(images),
            MEAN=0 if mean is None else 1 if aligned else 2,
            COLOR=color is not None,
            BLOCK=VALUES,
        )
    return out


def drop(x: Tensor, keys: Tensor, unit: Tensor, threshold: int, keep: float) -> Tensor:
    """`x` (N, units), contiguous, zero where the hash of an image's key and a unit is below
    `threshold`, the rest divided by `keep`.

    `keys`: int64 (N,). `unit`: int32 (units,), the units' part of the hash.
    """
    out = torch.empty_like(x)
    if out.numel():
        rows, units = x.shape
        block = 1024
        _drop[(triton.cdiv(units, block), rows)](
            x, keys, unit, out, units, threshold, keep, BLOCK=block
        )
    return out
