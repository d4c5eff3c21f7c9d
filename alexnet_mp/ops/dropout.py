"""Dropout as of 2012, whose masks are a function of seed, step, layer, column and row: no placement can change them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alexnet_mp.config.seeds import combine

# Dropout masks are an integer hash, not a stream of random numbers: the bit of one unit for one image depends on
# (seed, step, layer, column, row in the global batch) only, so no placement, device or resumed run can change it.
_ROW, _UNIT = (
    0x9E3779B97F4A7C15 - 2**64,
    0x85EBCA6B,
)  # odd, so that every row and unit has its own product


def _signed(value: int) -> int:
    """A 32-bit pattern as the int32 that has it."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _mixed(x: Tensor, shift: int, factor: int) -> Tensor:
    """One round of an integer hash on int32 (products wrap), in place: x ^= x >>> shift; x *= factor."""
    high = x >> shift
    high &= (1 << (32 - shift)) - 1  # the shift is arithmetic: clear the copies of the sign
    return x.bitwise_xor_(high).mul_(_signed(factor))


@torch.compiler.disable  # compiled, products of integers are floating point or do not wrap
def dropout_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    """One int64 key per row of the global batch: rows (N,) -> (N,), on the device of `rows`."""
    keys = rows.long() * _ROW + combine(seed, "dropout", step)
    for shift in (30, 27):  # high bits into the low ones, which products do not do
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * 0x1CE4E5B9BF58476D
    return keys


@torch.compiler.disable
def dropout_mask(keys: Tensor, layer: str, column: int, units: int, rate: float) -> Tensor:
    """Which units are dropped: keys (N,) -> bool (N, units), True with probability `rate`."""
    base = _signed(combine("dropout", layer, column))
    unit = (
        torch.arange(units, dtype=torch.int32, device=keys.device).mul_(_signed(_UNIT)).add_(base)
    )
    unit = _mixed(_mixed(unit, 16, 0x7FEB352D), 15, 0x846CA68B)
    low, high = keys.int(), (keys >> 32).int()  # .int() keeps the low 32 bits
    x = unit[None] ^ low[:, None]  # (N, units)
    x = _mixed(_mixed(x, 16, 0x7FEB352D).add_(high[:, None]), 15, 0x846CA68B)
    return _mixed(x, 16, 0xC2B2AE35) < min(round(rate * 2**32), 2**32 - 1) - 2**31


class Dropout(nn.Module):
    """Sets a random `rate` of the units (N, units) of one layer of one column to zero in training.

    kind "2012" (paper, section 4.2): kept units unchanged in training, all multiplied by 1 - rate in testing.
    kind "inverted" (torch.nn.Dropout, the tutorial): kept units divided by 1 - rate in training, unchanged in testing.
    """

    def __init__(self, rate: float, layer: str, column: int, kind: str = "2012") -> None:
        super().__init__()
        self.rate, self.layer, self.column, self.kind = rate, layer, column, kind

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keep = 1 - self.rate
        if not self.training:
            return x * keep if self.kind == "2012" else x
        kept = ~dropout_mask(keys, self.layer, self.column, x.shape[1], self.rate)
        x = x * kept.to(x.dtype)  # several times as fast as masked_fill on a CPU
        return x if self.kind == "2012" else x / keep

    def extra_repr(self) -> str:
        return f"{self.rate:g}, after {self.layer}, kind={self.kind}"
