"""Dropout as of 2012, whose masks no placement, device or resumed run can change.

A mask is no stream of random numbers but an integer hash: whether one unit is dropped for one image
depends on (seed, step, layer, column, row in the global batch) only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from alexnet_mp.config.seeds import combine
from alexnet_mp.ops import cuda_kernels
from alexnet_mp.ops.tracing import apply, needs_plain_operations, not_compiled

# Odd, so that every row and every unit has its own product.
_ROW, _UNIT = 0x9E3779B97F4A7C15 - 2**64, 0x85EBCA6B


def _signed(value: int) -> int:
    """A 32-bit pattern as the int32 that has it."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _hash_round(x: Tensor, shift: int, factor: int) -> Tensor:
    """A round of an integer hash on int32, in place: x ^= x >>> shift; x *= factor, which wraps."""
    high = x >> shift
    high &= (1 << (32 - shift)) - 1  # the shift is arithmetic: clear the copies of the sign
    return x.bitwise_xor_(high).mul_(_signed(factor))


@not_compiled  # compiled, products of integers are floating point or do not wrap
def dropout_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    """One int64 key per row of the global batch: rows (N,) -> (N,), on the device of `rows`."""
    keys = rows.long() * _ROW + combine(seed, "dropout", step)
    for shift in (30, 27):  # high bits into the low ones, which products do not do
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * 0x1CE4E5B9BF58476D
    return keys


@not_compiled  # compiled, it would be compiled again for every value of `step`
def batch_keys(images: Tensor, seed: int, step: int) -> Tensor:
    """The keys of a batch (N, ...) that is the whole global batch."""
    return dropout_keys(seed, step, torch.arange(images.shape[0], device=images.device))


@not_compiled
def dropout_mask(keys: Tensor, layer: str, column: int, units: int, rate: float) -> Tensor:
    """Which units are dropped: keys (N,) -> bool (N, units), True with probability `rate`."""
    # Only eager code may meet the remembered tensor: another would leave one of its own kind there.
    unit_hash = _unit_hash.__wrapped__ if needs_plain_operations(keys) else _unit_hash
    unit = unit_hash(layer, column, units, keys.device)
    low, high = keys.int(), (keys >> 32).int()  # .int() keeps the low 32 bits
    x = unit[None] ^ low[:, None]  # (N, units)
    x = _hash_round(_hash_round(x, 16, 0x7FEB352D).add_(high[:, None]), 15, 0x846CA68B)
    return _hash_round(x, 16, 0xC2B2AE35) < _threshold(rate)


def _threshold(rate: float) -> int:
    """The int32 below which a share `rate` of all hashes lies."""
    return min(round(rate * 2**32), 2**32 - 1) - 2**31


@functools.lru_cache(maxsize=64)  # layers, columns and devices of a process; 8 KB each
def _unit_hash(layer: str, column: int, units: int, device: torch.device) -> Tensor:
    """The part of the hash that is the same at every step and for every image: int32 (units,)."""
    unit = torch.arange(units, dtype=torch.int32, device=device)
    unit = unit.mul_(_signed(_UNIT)).add_(_signed(combine("dropout", layer, column)))
    return _hash_round(_hash_round(unit, 16, 0x7FEB352D), 15, 0x846CA68B)


def drop(
    x: Tensor, keys: Tensor | None, layer: str, column: int, rate: float, inverted: bool
) -> Tensor:
    """`x` (N, units), dropped units at zero, the others divided by 1 - rate if `inverted`."""
    if keys is None:
        raise ValueError("dropout in training: give one key per image, from `dropout_keys`")
    if _has_kernel(x):
        unit = _unit_hash(layer, column, x.shape[1], x.device)
        keep = 1 - rate if inverted else 1.0
        return apply(_DropKernel, x.contiguous(), keys, unit, _threshold(rate), keep)
    kept = ~dropout_mask(keys, layer, column, x.shape[1], rate)
    x = x * kept.to(x.dtype)  # several times as fast as masked_fill on a CPU
    return x / (1 - rate) if inverted else x


def _has_kernel(x: Tensor) -> bool:
    """Whether one Triton kernel does what `drop` does with some fifteen of torch's operations."""
    return (
        x.dtype in cuda_kernels.DTYPES
        and cuda_kernels.usable(x.device.type)
        and not needs_plain_operations(x)
    )


class _DropKernel(torch.autograd.Function):
    """`drop` by the Triton kernel, forward and backward; the hash is computed again, not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, unit: Tensor, threshold: int, keep: float
    ) -> Tensor:
        from alexnet_mp.ops import triton_kernels  # needs Triton

        ctx.save_for_backward(keys, unit)
        ctx.settings = threshold, keep
        return triton_kernels.drop(x, keys, unit, threshold, keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        keys, unit = ctx.saved_tensors
        dropped = apply(_DropKernel, gradient.contiguous(), keys, unit, *ctx.settings)
        return dropped, None, None, None, None


fx.wrap("batch_keys")  # torch.fx records a call of these, and does not look inside
fx.wrap("drop")


class Dropout(nn.Module):
    """Sets a random `rate` of the units (N, units) of one layer of one column to zero in training.

    kind "2012" (P 4.2): kept units unchanged in training, all multiplied by 1 - rate in testing.
    kind "inverted" (torch.nn.Dropout, the tutorial): kept units divided by 1 - rate in training,
    all unchanged in testing. ValueError in training without `keys`.
    """

    def __init__(self, rate: float, layer: str, column: int, kind: str = "2012") -> None:
        super().__init__()
        self.rate, self.layer, self.column, self.kind = rate, layer, column, kind

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        inverted = self.kind == "inverted"
        if self.training:
            return drop(x, keys, self.layer, self.column, self.rate, inverted)
        return x if inverted else x * (1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate:g}, after {self.layer}, kind={self.kind}"
