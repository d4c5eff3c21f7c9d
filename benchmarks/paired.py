"""Pairs of measurements that differ in one thing: mean difference, 95 % interval, verdict.

The intervals are Student's t over the seeds' own differences. The quantiles stand here as a table,
for scipy is no dependency; beyond 30 degrees of freedom the value of 30 is used, which is a little
too wide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""0.975 quantiles of Student's t for 1, 2, ... 30 degrees of freedom."""

HOLDS, OPPOSITE, CANNOT_TELL = "holds", "opposite", "cannot tell"


@dataclass(frozen=True)
class Interval:
    """The mean of some values, and the interval that has the true one with 95 % confidence."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval | None:
    """The interval of the mean of `values`; None for fewer than two, which have none."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    t = T_975[min(degrees, len(T_975)) - 1]
    mean = statistics.mean(values)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(ratios: Sequence[float]) -> Interval | None:
    """The same for positive ratios: their geometric mean, with the interval of their logarithms."""
    found = interval([math.log(ratio) for ratio in ratios])
    return found and Interval(*(math.exp(value) for value in (found.mean, found.low, found.high)))


def verdict(found: Interval | None, nothing: float = 0.0, claimed_below: bool = True) -> str:
    """What an interval says of a claim that its value lies below `nothing` (or above).

    holds: the whole interval lies on the claim's side; opposite: on the other side; else it cannot
    be told, and never from fewer than two values.
    """
    if found is None or found.low <= nothing <= found.high:
        return CANNOT_TELL
    return HOLDS if (found.high < nothing) == claimed_below else OPPOSITE
