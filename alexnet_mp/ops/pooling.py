"""Pooling: the paper's overlapping maximum, and the average that the tutorial's net ends with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.ops.tracing import has_symbolic_shape


def overlapping_max_pool(x: Tensor, size: int = 3, stride: int = 2) -> Tensor:
    """Max pooling whose windows overlap where stride < size (P 3.4).

    (N, C, H, W) -> (N, C, (H - size) // stride + 1, ...).
    """
    return F.max_pool2d(x, size, stride)


def adaptive_average_pool(x: Tensor, side: int) -> Tensor:
    """The averages of side x side parts of each map: (N, C, H, W) -> (N, C, side, side).

    Maps of that size stay as they are: F.adaptive_avg_pool2d would copy them, and its gradient on
    CUDA is refused by torch.use_deterministic_algorithms.
    """
    if has_symbolic_shape(x) or x.shape[2:] != (side, side):
        return F.adaptive_avg_pool2d(x, side)
    return x
