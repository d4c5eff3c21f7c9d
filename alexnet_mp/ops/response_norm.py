"""Local response normalization as the paper defines it, and overlapping max pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet_mp.ops import compile as compile_ops
from alexnet_mp.ops import cpu_kernels

CHUNK_BYTES = (
    512 * 1024
)  # of one operand on the CPU: a handful of them stay in the cache from one operation to the next


class _ResponseNorm(torch.autograd.Function):
    """y = x d^-beta with d = k + alpha * window_sum(x^2); `window_sum` is linear and its own transpose.

    backward    dx = g d^-beta - 2 alpha beta x window_sum(g x d^-(beta + 1))

    Only x is kept, which the layer below keeps anyway: d costs less to compute again than to fetch. Half precision is
    widened to float32 inside, x^2 would overflow in fp16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = settings
        return _computed(_norm, settings, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _computed(_norm_gradient, ctx.settings, x, gradient), *(None for _ in ctx.settings)


def _norm(
    x: Tensor,
    window_sum: Callable[[Tensor, int], Tensor],
    size: int,
    k: float,
    alpha: float,
    beta: float,
) -> Tensor:
    wide = _upcast(x)
    return (wide * _power(_denominator(wide, window_sum, size, k, alpha), beta)).to(x.dtype)


def _norm_gradient(
    x: Tensor,
    gradient: Tensor,
    window_sum: Callable[[Tensor, int], Tensor],
    size: int,
    k: float,
    alpha: float,
    beta: float,
) -> Tensor:
    wide = _upcast(x)
    d = _denominator(wide, window_sum, size, k, alpha)
    scaled = _upcast(gradient) * _power(d, beta)  # g d^-beta
    spread = window_sum((scaled * wide).div_(d), size).mul_(wide)
    return scaled.add_(spread, alpha=-2 * alpha * beta).to(x.dtype)


def _computed(
    function: Callable[..., Tensor], settings: tuple[Any, ...], x: Tensor, *others: Tensor
) -> Tensor:
    """`function` of these tensors of one shape: one kernel on CUDA, a cacheful of images at a time on the CPU."""
    if torch.compiler.is_compiling():
        return function(x, *others, *settings)
    if compile_ops.fuses(x.device.type):
        return compile_ops.compiled(function)(x, *others, *settings)
    if x.device.type != "cpu":
        return function(x, *others, *settings)
    result = torch.empty_like(x)
    images = max(1, CHUNK_BYTES // (4 * max(x[:1].numel(), 1)))
    for out, *parts in zip(*(tensor.split(images) for tensor in (result, x, *others)), strict=True):
        out.copy_(function(*parts, *settings))
    return result


class _AcrossMaps(torch.autograd.Function):
    """The norm across maps as native.py has it for CPUs, alone or between ReLU and pooling, as one node.

        forward     z -> x = max(z, 0), if `relu`;  y = norm(x);  max pool of y, if `stride`
        backward    the same way back, x and d computed again

    Only z is kept, and a byte for each maximum that says where it was: y and its gradient are never whole in memory.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: float, alpha: float, relu: bool, stride: int) -> Tensor:
        z = cpu_kernels.as_dense(z)
        ctx.settings = k, alpha, relu, stride
        result, where = cpu_kernels.forward(z, *ctx.settings)
        ctx.save_for_backward(z, where)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, where = ctx.saved_tensors
        memory_format = z if where is None else where
        return (
            cpu_kernels.backward(
                z, cpu_kernels.laid_out_like(gradient, memory_format), where, *ctx.settings
            ),
            None,
            None,
            None,
            None,
        )


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _denominator(
    x: Tensor, window_sum: Callable[[Tensor, int], Tensor], size: int, k: float, alpha: float
) -> Tensor:
    return window_sum(x * x, size).mul_(alpha).add_(k)


def _power(d: Tensor, beta: float) -> Tensor:
    """d^-beta. 0.75 is two square roots and a division, several times as fast as a power."""
    if beta == 0.75:
        root = d.sqrt()
        return root.sqrt().mul_(root).reciprocal_()
    return d.pow(-beta)


def sum_over_neighbors(x: Tensor, size: int) -> Tensor:
    """The sum over `size` neighboring kernel maps of (N, C, ...), cut off at the first and the last; the same shape."""
    channels, half = x.shape[1], size // 2
    padded = F.pad(x.flatten(2), (0, 0, half, half))  # (N, C + size - 1, pixels)
    if size != 5:
        total = padded[:, :channels].clone()
        for shift in range(1, size):
            total += padded[:, shift : channels + shift]
        return total.view_as(x)
    pairs = padded[:, : channels + 2] + padded[:, 1 : channels + 3]  # five terms in three additions
    return (pairs[:, :channels] + pairs[:, 2:]).add_(padded[:, 4:]).view_as(x)


def sum_over_pixels(x: Tensor, size: int) -> Tensor:
    """The sum over size x size pixels of the same map, zeros beyond its edge; (N, C, H, W) -> the same."""
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, divisor_override=1)


class LocalResponseNorm(nn.Module):
    """Local response normalization across kernel maps (paper, section 3.3): (N, C, H, W) -> the same.

    `alpha` multiplies the plain SUM of the squares, as the paper prints it: torch.nn.LocalResponseNorm divides it by
    `size` first. The window is cut off at the first and last map, so it never reaches into another column.
    """

    def __init__(
        self, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
    ) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size {size}: must be odd, the window is centered")
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        if self._compiled(x):
            return _AcrossMaps.apply(x, self.k, self.alpha, False, 0)
        return _ResponseNorm.apply(x, sum_over_neighbors, self.size, self.k, self.alpha, self.beta)

    def relu_lrn_pool(self, x: Tensor, size: int, stride: int, relu: bool) -> Tensor:
        """`overlapping_max_pool` of the norm of x (N, C, H, W), or of its ReLU (which may then overwrite x)."""
        if not self._compiled(x):
            return overlapping_max_pool(self(F.relu_(x) if relu else x), size, stride)
        if size == cpu_kernels.POOL and cpu_kernels.is_last(x):
            return _AcrossMaps.apply(x, self.k, self.alpha, relu, stride)
        return overlapping_max_pool(_AcrossMaps.apply(x, self.k, self.alpha, relu, 0), size, stride)

    def _compiled(self, x: Tensor) -> bool:
        return not torch.compiler.is_compiling() and cpu_kernels.supports(x, self.size, self.beta)

    def extra_repr(self) -> str:
        return f"{self.size} maps, k={self.k:g}, alpha={self.alpha:g}, beta={self.beta:g}"


class MapNorm(LocalResponseNorm):
    """The second norm of layer 2 in the 2012 source: over size x size pixels of the same map, k = 1. Not in the paper."""

    def __init__(
        self, size: int = 5, k: float = 1.0, alpha: float = 4e-5, beta: float = 0.75
    ) -> None:
        super().__init__(size, k, alpha, beta)

    def forward(self, x: Tensor) -> Tensor:
        return _ResponseNorm.apply(x, sum_over_pixels, self.size, self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        return f"{self.size}x{self.size} pixels, k={self.k:g}, alpha={self.alpha:g}, beta={self.beta:g}"


def slow_norm(device: str) -> str:
    """Why norms of tensors on `device` ("cpu", "cuda", ...) take several times as long as they could; empty where nothing faster is known."""
    return (
        cpu_kernels.unavailable_reason()
        if device == "cpu"
        else compile_ops.unavailable_reason(device)
        if device in compile_ops.DEVICES
        else ""
    )


def overlapping_max_pool(x: Tensor, size: int = 3, stride: int = 2) -> Tensor:
    """Max pooling whose windows overlap where stride < size (paper, section 3.4): (N, C, H, W) -> (N, C, H', W')."""
    return F.max_pool2d(x, size, stride)
