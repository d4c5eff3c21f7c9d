"""Nearest neighbors of activations, and samples of images to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def nearest(queries: Tensor, batches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The rows nearest to each of `queries` (Q, F): distances (Q, count), row numbers (Q, count).

    The rows come in `batches` (N, F) and are numbered through; only the best are kept in memory.
    Nearest first; of equally near rows the first comes first; fewer rows than `count` give fewer
    columns.
    """
    distances = queries.new_empty((len(queries), 0))
    numbers = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    seen = 0
    for rows in batches:
        # A matrix product would lose small distances to rounding.
        new = torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist")
        rows_seen = torch.arange(seen, seen + len(rows), device=queries.device)
        numbers = torch.cat([numbers, rows_seen.expand(len(queries), -1)], 1)
        distances, order = torch.cat([distances, new], 1).sort(dim=1, stable=True)
        distances, numbers = distances[:, :count], numbers.gather(1, order[:, :count])
        seen += len(rows)
    return distances.cpu(), numbers.cpu()


def class_balanced_sample(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Up to `count` random places in `labels`, each class once before any class a second time."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen: Counter[int] = Counter()
    turns = []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    return order[np.argsort(turns, kind="stable")][:count]
