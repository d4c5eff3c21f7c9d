"""The first layer's kernels, as figure 3 of the paper, and how selective they are for color."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from alexnet_mp.plotting.page import Page, save_figure

PIXELS_PER_WEIGHT = 6
"""Pixels a side that a weight is drawn with."""
GAP = 3
"""Pixels of white between two kernels: fewer than a weight has."""
RANDOM_SELECTIVITY = 2 / 3
"""Color selectivity of random weights: two of their three color directions are not gray."""
EXPLANATION = (
    "Color selectivity: the share of a kernel's energy that is not gray "
    f"(gray edge 0, random weights {RANDOM_SELECTIVITY:.2f}, color alone 1)."
)
WIDTH = 9.0  # inches of a row of kernels


def color_selectivity(kernels: Tensor) -> Tensor:
    """How much each kernel (K, 3, h, w) responds to color, not brightness: float64 (K,), 0 to 1.

    It is the share of a kernel's energy that is not along gray: 1 - 3 * sum(m^2) / sum(w^2), where
    m is the mean of the red, green and blue weight at each place. 0: all three weights are equal
    everywhere, as in a gray edge. 1: they cancel everywhere, as red against green; a gray image
    then gives no response. Random weights have RANDOM_SELECTIVITY. A kernel of zeros counts as 0.
    """
    kernels = kernels.detach().cpu().double()
    gray = 3 * kernels.mean(1).square().sum((1, 2))
    total = kernels.square().sum((1, 2, 3))
    share = 1 - gray / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, share, 0.0).clamp(0, 1)


def kernel_colors(kernels: Tensor) -> NDArray[np.float64]:
    """(K, h, w, 3) from 0 to 1: each kernel scaled by its own largest weight; 0 is mid-gray."""
    kernels = kernels.detach().cpu().double()
    largest = kernels.abs().amax((1, 2, 3), keepdim=True)
    colors = 0.5 + 0.5 * kernels / torch.where(largest > 0, largest, 1.0)
    return np.asarray(colors.permute(0, 2, 3, 1).numpy())


def kernel_sheet(kernels: Tensor, per_row: int = 16) -> NDArray[np.float64]:
    """(height, width, 3) from 0 to 1: the kernels (K, 3, h, w) in rows of `per_row` on white."""
    colors = kernel_colors(kernels).repeat(PIXELS_PER_WEIGHT, 1).repeat(PIXELS_PER_WEIGHT, 2)
    count, height, width, _ = colors.shape
    per_row = min(per_row, count)
    rows = -(-count // per_row)
    sheet = np.ones((rows * (height + GAP) - GAP, per_row * (width + GAP) - GAP, 3))
    for k, kernel in enumerate(colors):
        top, left = k // per_row * (height + GAP), k % per_row * (width + GAP)
        sheet[top : top + height, left : left + width] = kernel
    return sheet


def draw_kernels(
    columns: Sequence[Tensor],
    path: str | Path | None = None,
    per_row: int = 16,
    note: str = "",
) -> Figure:
    """Draws the first layer's kernels, a block a column, column 0 on top, as figure 3 of the paper.

    `columns` has each column's conv1 weight (K, 3, 11, 11). The mean `color_selectivity` stands
    below each block, its explanation and `note` (lines) below all. Raises ValueError if there are
    no kernels.
    """
    if not columns or not min(map(len, columns)):
        raise ValueError("no kernels: there is nothing to draw")
    sheets = [kernel_sheet(kernels, per_row) for kernels in columns]
    scale = WIDTH / max(sheet.shape[1] for sheet in sheets)  # inches a pixel
    sizes = [(sheet.shape[1] * scale, sheet.shape[0] * scale) for sheet in sheets]
    foot = [EXPLANATION, *filter(None, note.split("\n"))]
    page = Page(WIDTH + 0.3, sum(height + 0.7 for _, height in sizes) + 0.2 * len(foot))
    top = 0.0
    for number, (sheet, kernels, (width, height)) in enumerate(
        zip(sheets, columns, sizes, strict=True)
    ):
        kind = f"kernel{'s' * (len(kernels) != 1)} of {' × '.join(map(str, kernels.shape[2:]))}"
        page.text(0.15, top + 0.22, f"column {number}: {len(kernels)} {kind}", weight="bold")
        axes = page.axes(0.15, top + 0.3, width, height)
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        mean = color_selectivity(kernels).mean()
        page.text(0.15, top + height + 0.5, f"color selectivity {mean:.2f} on average", size=9)
        top += height + 0.7
    for number, line in enumerate(foot):
        page.text(0.15, top + 0.05 + 0.2 * number, line, size=9, color="#555555")
    return save_figure(page.figure, path)
