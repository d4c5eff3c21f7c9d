"""Response normalization as the paper defines it (P 3.3), and the one that the 2012 source adds.

One formula is computed in three ways. A compiled kernel does ReLU, norm and pooling in one pass:
C++ on a CPU, Triton on CUDA. Where there is none, torch's operations do it, in a function that
keeps nothing but its input. Where torch has to see each operation, as in torch.func, they stand
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from alexnet_mp.ops import cpu_kernels, cuda_kernels
from alexnet_mp.ops.pooling import overlapping_max_pool
from alexnet_mp.ops.tracing import apply, needs_plain_operations

CHUNK_BYTES = 512 * 1024
"""Of one operand on the CPU: a handful of them stay in the cache from one operation to the next."""


class Norm(NamedTuple):
    """y = x d^-beta with d = k + alpha * window_sum(x^2, size).

    `window_sum` is linear and its own transpose.
    """

    window_sum: Callable[[Tensor, int], Tensor]
    size: int
    k: float
    alpha: float
    beta: float


class ResponseNorm(nn.Module):
    """Base of the two norms, whose windows differ: (N, C, H, W) -> the same.

    ValueError for an even `size`.
    """

    def __init__(self, size: int, k: float, alpha: float, beta: float) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size {size}: must be odd, the window is centered")
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def extra_repr(self) -> str:
        return f"size={self.size}, k={self.k:g}, alpha={self.alpha:g}, beta={self.beta:g}"


class LocalResponseNorm(ResponseNorm):
    """Local response normalization across kernel maps (P 3.3): (N, C, H, W) -> the same.

    `alpha` multiplies the plain SUM of the squares, as the paper prints it:
    torch.nn.LocalResponseNorm divides it by `size` first. The window is cut off at the first and
    the last map, so it never reaches into another column.

        norm = LocalResponseNorm(size=5, k=2.0, alpha=1e-4, beta=0.75)
        norm(torch.randn(8, 48, 55, 55))  # equals torch's with alpha=5e-4
    """

    def __init__(
        self, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
    ) -> None:
        super().__init__(size, k, alpha, beta)

    def forward(
        self, x: Tensor, *, relu: bool = False, pool: tuple[int, int] | None = None
    ) -> Tensor:
        """The norm of `x`, or of its ReLU; max-pooled if `pool`, a pair (size, stride), is given.

        The three are one call because what lies between them is the network's largest tensor.
        """
        return relu_lrn_pool(x, self.size, self.k, self.alpha, self.beta, relu, pool)


class MapNorm(ResponseNorm):
    """The second norm of layer 2 in the 2012 source, which the paper does not have.

    Its window is size x size pixels of the same map, with zeros beyond the edge. (N, C, H, W) ->
    the same.
    """

    def __init__(
        self, size: int = 5, k: float = 1.0, alpha: float = 4e-5, beta: float = 0.75
    ) -> None:
        super().__init__(size, k, alpha, beta)

    def forward(self, x: Tensor) -> Tensor:
        return map_norm(x, self.size, self.k, self.alpha, self.beta)


def relu_lrn_pool(
    x: Tensor,
    size: int,
    k: float,
    alpha: float,
    beta: float,
    relu: bool = False,
    pool: tuple[int, int] | None = None,
) -> Tensor:
    """See LocalResponseNorm.forward."""
    kernels = None if needs_plain_operations(x) else _kernels_for(x, size, beta)
    if kernels is None:
        x = _by_operations(F.relu(x) if relu else x, Norm(sum_over_neighbors, size, k, alpha, beta))
        return overlapping_max_pool(x, *pool) if pool else x
    x = cpu_kernels.as_dense(x) if kernels is cpu_kernels else _channels_last(x)
    if pool and pool[0] == cpu_kernels.POOL and cpu_kernels.is_channels_last(x):
        return apply(_FusedKernel, x, kernels, k, alpha, relu, pool[1])
    x = apply(_FusedKernel, x, kernels, k, alpha, relu, 0)
    return overlapping_max_pool(x, *pool) if pool else x


def map_norm(x: Tensor, size: int, k: float, alpha: float, beta: float) -> Tensor:
    """See MapNorm."""
    if not needs_plain_operations(x) and cuda_kernels.supports(x, size, beta):
        return apply(_MapNormKernel, _channels_last(x), size, k, alpha)
    return _by_operations(x, Norm(sum_over_pixels, size, k, alpha, beta))


fx.wrap("relu_lrn_pool")  # torch.fx records a call of these, and does not look inside
fx.wrap("map_norm")


def _kernels_for(x: Tensor, size: int, beta: float) -> ModuleType | None:
    """The module whose `forward` and `backward` compute the norm of `x` across maps, if any
    does."""
    if cpu_kernels.supports(x, size, beta):
        return cpu_kernels
    if cuda_kernels.supports(x, size, beta):
        from alexnet_mp.ops import triton_kernels  # needs Triton

        return triton_kernels
    return None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _by_operations(x: Tensor, norm: Norm) -> Tensor:
    # torch.compile reads a function and its backward, and so keeps nothing but x as well.
    if torch.compiler.is_compiling() or not needs_plain_operations(x):
        return apply(_ResponseNorm, x, norm)
    return _norm(x, norm)


class _ResponseNorm(torch.autograd.Function):
    """The norm, by torch's operations.

        backward    dx = g d^-beta - 2 alpha beta x window_sum(g x d^-(beta + 1))

    Only x is kept, which the layer below keeps anyway: d costs less to compute again than to fetch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return _computed(_norm, norm, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            return _differentiable_gradient(_norm(x, ctx.norm), x, gradient), None
        return _computed(_norm_gradient, ctx.norm, x, gradient), None


class _FusedKernel(torch.autograd.Function):
    """The norm across maps by a compiled kernel, alone or between ReLU and pooling, as one node.

        forward     z -> x = max(z, 0), if `relu`;  y = norm(x);  max pool of y, if `stride`
        backward    the same way back, x and d computed again

    Only z is kept, and a byte for each maximum that says where it was: y and its gradient are never
    whole in memory. `kernels` is cpu_kernels or triton_kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, kernels: ModuleType, k: float, alpha: float, relu: bool, stride: int
    ) -> Tensor:
        ctx.kernels, ctx.settings = kernels, (k, alpha, relu, stride)
        result, where = kernels.forward(z, *ctx.settings)
        ctx.save_for_backward(z, where)
        return result  # type: ignore[no-any-return]  # of a module, whose functions have no types

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, where = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            y = _relu_norm_pool(z, *ctx.settings)
            return _differentiable_gradient(y, z, gradient), None, None, None, None, None
        gradient = cpu_kernels.laid_out_like(gradient, z if where is None else where)
        dz = ctx.kernels.backward(z, gradient, where, *ctx.settings)
        return dz, None, None, None, None, None


class _MapNormKernel(torch.autograd.Function):
    """The norm within maps by the Triton kernels; only z is kept."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, size: int, k: float, alpha: float) -> Tensor:
        from alexnet_mp.ops import triton_kernels

        ctx.save_for_backward(z)
        ctx.settings = size, k, alpha
        return triton_kernels.map_norm_forward(z, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        from alexnet_mp.ops import triton_kernels

        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            size, k, alpha = ctx.settings
            y = _norm(z, Norm(sum_over_pixels, size, k, alpha, cuda_kernels.BETA))
            return _differentiable_gradient(y, z, gradient), None, None, None
        gradient = _channels_last(gradient)
        return triton_kernels.map_norm_backward(z, gradient, *ctx.settings), None, None, None


def _relu_norm_pool(z: Tensor, k: float, alpha: float, relu: bool, stride: int) -> Tensor:
    """The same as _FusedKernel, by torch's operations."""
    norm = Norm(sum_over_neighbors, cpu_kernels.SIZE, k, alpha, cpu_kernels.BETA)
    y = _norm(F.relu(z) if relu else z, norm)
    return overlapping_max_pool(y, cpu_kernels.POOL, stride) if stride else y


def _differentiable_gradient(y: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, gradient, create_graph=True)[0]


def _computed(function: Callable[..., Tensor], norm: Norm, *tensors: Tensor) -> Tensor:
    """`function` of tensors of one shape; on a CPU some images at a time, which stay in its
    cache."""
    x = tensors[0]
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return function(*tensors, norm)
    result = torch.empty_like(x)
    images = max(1, CHUNK_BYTES // (4 * max(x[:1].numel(), 1)))
    chunks = (torch.split(tensor, images) for tensor in (result, *tensors))
    for out, *parts in zip(*chunks, strict=True):
        out.copy_(function(*parts, norm))
    return result


def _norm(x: Tensor, norm: Norm) -> Tensor:
    wide = _upcast(x)
    return (wide * _power(_denominator(wide, norm), norm.beta)).to(x.dtype)


def _norm_gradient(x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    wide = _upcast(x)
    d = _denominator(wide, norm)
    scaled = _upcast(gradient) * _power(d, norm.beta)  # g d^-beta
    spread = norm.window_sum((scaled * wide).div_(d), norm.size).mul_(wide)
    return scaled.add_(spread, alpha=-2 * norm.alpha * norm.beta).to(x.dtype)


def _upcast(x: Tensor) -> Tensor:
    """Half precision as float32: x^2 would overflow in fp16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _denominator(x: Tensor, norm: Norm) -> Tensor:
    return norm.window_sum(x * x, norm.size).mul_(norm.alpha).add_(norm.k)


def _power(d: Tensor, beta: float) -> Tensor:
    """d^-beta. 0.75 is two square roots and a division, several times as fast as a power."""
    if beta == 0.75:
        root = d.sqrt()
        return (root.sqrt() * root).reciprocal_()  # a root's gradient needs it: not overwritten
    return d.pow(-beta)


def sum_over_neighbors(x: Tensor, size: int) -> Tensor:
    """The sum over `size` neighboring kernel maps, cut off at the first and the last.

    (N, C, ...) -> the same.
    """
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
    """The sum over size x size pixels of the same map, with zeros beyond its edge.

    (N, C, H, W) -> the same.
    """
    if x.device.type != "cpu":
        # In channels-last its gradient is wrong near the edges, silently: seen on CUDA with torch
        # 2.11 (pytorch#188344), reported for MPS (pytorch#175190).
        x = x.contiguous()
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, divisor_override=1)


def slow_norm(device: str) -> str:
    """Why norms of tensors on `device` ("cpu", "cuda", ...) are slower than they could be.

    Empty where nothing faster is known.
    """
    if device == "cpu":
        return cpu_kernels.unavailable_reason()
    return cuda_kernels.unavailable_reason(device) if device in cuda_kernels.DEVICE_TYPES else ""
