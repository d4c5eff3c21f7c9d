"""Pictures of what a network has learned and how it answers, as in the paper: kernels, best classes, nearest images, samples.

Images are uint8 RGB tensors (N, 3, s, s); every function returns the figure and writes it to `path`, if that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_mp.plotting.curves import saved
from alexnet_mp.plotting.lettering import families, legible

RIGHT, OTHER = "#7bc47f", "#b9c9de"
"""Of the true class and of the others."""
ZOOM = 6
"""Pixels a side that a weight is drawn with."""
GAP = 3
"""Pixels of white between two kernels: thinner than a weight."""
WHITE_NOISE = 2 / 3
"""The color selectivity of a kernel whose weights are independent draws: two of its three color directions are not gray."""


def color_selectivity(kernels: Tensor) -> Tensor:
    """float64 (K,): how much each kernel (K, 3, h, w) looks at color rather than at brightness, from 0 to 1.

    The share of a kernel's energy that is not along gray: 1 - 3 * sum(m^2) / sum(w^2), m being the mean of its red, green and blue
    weight at each place. 0: all three weights equal everywhere, as for a gray edge. 1: they cancel everywhere, as for red against
    green; a gray image leaves such a kernel cold. Random weights have WHITE_NOISE. A kernel of zeros counts as 0.
    """
    kernels = kernels.detach().cpu().double()
    gray = 3 * kernels.mean(1).square().sum((1, 2))
    total = kernels.square().sum((1, 2, 3))
    return torch.where(
        total > 0, 1 - gray / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0
    ).clamp(0, 1)


def kernel_colors(kernels: Tensor) -> np.ndarray:
    """float64 (K, h, w, 3) from 0 to 1: each kernel scaled by its own largest weight, so that 0 is mid-gray (0.5), the largest 0 or 1."""
    kernels = kernels.detach().cpu().double()
    largest = kernels.abs().amax((1, 2, 3), keepdim=True)
    return (
        (0.5 + 0.5 * kernels / torch.where(largest > 0, largest, 1.0)).permute(0, 2, 3, 1).numpy()
    )


def kernel_sheet(kernels: Tensor, per_row: int = 16) -> np.ndarray:
    """float64 (height, width, 3): the kernels in rows of `per_row`, each weight ZOOM pixels a side, on white."""
    colors = kernel_colors(kernels).repeat(ZOOM, 1).repeat(ZOOM, 2)
    count, height, width, _ = colors.shape
    per_row = min(per_row, count)
    rows = -(-count // per_row)
    sheet = np.ones((rows * (height + GAP) - GAP, per_row * (width + GAP) - GAP, 3))
    for k, kernel in enumerate(colors):
        top, left = k // per_row * (height + GAP), k % per_row * (width + GAP)
        sheet[top : top + height, left : left + width] = kernel
    return sheet


def draw_kernels(
    columns: Sequence[Tensor], path: str | Path | None = None, per_row: int = 16
) -> Figure:
    """The first layer's kernels, one block a column, column 0 on top, as in figure 3 of the paper; each kernel scaled by itself.

    `columns` has each column's conv1 weight (K, 3, 11, 11). Under a block stands the mean of its `color_selectivity`.
    ValueError if there are no kernels.
    """
    if not columns or not min(map(len, columns)):
        raise ValueError("no kernels: there is nothing to draw")
    sheets = [kernel_sheet(kernels, per_row) for kernels in columns]
    width = 9.0  # inches
    scale = width / max(sheet.shape[1] for sheet in sheets)  # inches a pixel
    sizes = [(sheet.shape[1] * scale, sheet.shape[0] * scale) for sheet in sheets]
    page = _Page(width + 0.3, sum(height + 0.7 for _, height in sizes))
    top = 0.0
    for number, (sheet, kernels, (w, h)) in enumerate(zip(sheets, columns, sizes, strict=True)):
        kind = f"kernel{'s' * (len(kernels) != 1)} of {' × '.join(map(str, kernels.shape[2:]))}"
        page.text(0.15, top + 0.22, f"column {number}: {len(kernels)} {kind}", weight="bold")
        axes = page.axes(0.15, top + 0.3, w, h)
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        page.text(
            0.15,
            top + h + 0.5,
            f"color selectivity {color_selectivity(kernels).mean():.2f} on average"
            f"  (gray 0, random weights {WHITE_NOISE:.2f}, color alone 1)",
            size=9,
        )
        top += h + 0.7
    return saved(page.figure, path)


def draw_predictions(
    images: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """Each image, its class beneath, and the (up to) five classes that the network finds likeliest as bars, the right one green.

    As figure 4 (left) of the paper. `labels` (N,), `probabilities` (N, classes). ValueError if there are no images.
    """
    side, bar, gap = 1.7, 0.19, 0.25
    best = probabilities.detach().cpu().double().sort(dim=1, descending=True, stable=True)
    count = min(5, probabilities.shape[1])
    height = side + 0.28 + count * bar + 0.2
    page, places = _grid(
        len(images),
        4,
        side + gap,
        height,
        "Test images, and the classes that the network finds likeliest (green: the right one)",
    )
    for n, (x, y) in enumerate(places):
        page.image(x, y, side, images[n], _name(classes, int(labels[n])), size=9)
        axes = page.axes(x, y + side + 0.28, side, count * bar)
        values, found = best.values[n, :count].tolist(), best.indices[n, :count].tolist()
        axes.barh(
            range(count),
            values,
            height=0.86,
            color=[RIGHT if label == int(labels[n]) else OTHER for label in found],
        )
        for k, (label, value) in enumerate(zip(found, values, strict=True)):
            axes.text(
                0.02,
                k,
                legible(_name(classes, label), inches=side - 0.45, size=8),
                va="center",
                size=8,
                family=families(),
            )
            axes.text(0.98, k, f"{value:.0%}", va="center", ha="right", size=7, color="#555555")
        axes.set(xlim=(0, 1), ylim=(count - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    return saved(page.figure, path)


def draw_neighbors(
    queries: Tensor,
    neighbors: Tensor,
    distances: Tensor,
    path: str | Path | None = None,
    *,
    query_labels: Tensor | None = None,
    neighbor_labels: Tensor | None = None,
    classes: Sequence[str] = (),
) -> Figure:
    """In each row a test image and, right of it, the training images nearest to it, nearest first: figure 4 (right) of the paper.

    `queries` (N, 3, s, s), `neighbors` (N, K, 3, t, t), `distances` (N, K). With labels (N,) and (N, K) the classes stand beneath,
    and neighbors of the query's class have a green frame. ValueError if there are no images.
    """
    side, gap = 1.25, 0.12
    page, places = _grid(
        len(queries),
        1,
        (side + gap) * (1 + neighbors.shape[1]) + 2 * gap,
        side + 0.45,
        "Test images (left), and the training images whose fc7 activations are nearest to theirs, with the distance",
    )
    for n, (x, y) in enumerate(places):
        label = None if query_labels is None else int(query_labels[n])
        page.image(x, y, side, queries[n], "" if label is None else _name(classes, label), size=8)
        for k in range(neighbors.shape[1]):
            theirs = None if neighbor_labels is None else int(neighbor_labels[n, k])
            axes = page.image(
                x + 2 * gap + (side + gap) * (k + 1),
                y,
                side,
                neighbors[n, k],
                "" if theirs is None else _name(classes, theirs),
                f"{distances[n, k]:#.3g}".rstrip("."),
                size=8,
            )
            if theirs is not None and theirs == label:
                axes.spines[:].set(visible=True, color=RIGHT, linewidth=3)
    return saved(page.figure, path)


def draw_samples(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    path: str | Path | None = None,
    per_row: int = 8,
) -> Figure:
    """A grid of images with the names of their classes. ValueError if there are no images."""
    side = 1.25
    page, places = _grid(
        len(images), per_row, side + 0.12, side + 0.3, "Training images and their classes"
    )
    for n, (x, y) in enumerate(places):
        page.image(x, y, side, images[n], _name(classes, int(labels[n])), size=8)
    return saved(page.figure, path)


class _Page:
    """A figure measured in inches from its upper left corner, so that nothing can overlap whatever is written."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at (x, y)."""
        return self.figure.add_axes(
            (
                x / self.width,
                1 - (y + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )

    def text(self, x: float, y: float, text: str, **how: Any) -> None:
        """`text` with its left end at x, standing on y."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **how)

    def image(
        self,
        x: float,
        y: float,
        side: float,
        image: Tensor,
        name: str,
        note: str = "",
        size: int = 9,
    ) -> Axes:
        """`image` with its upper left corner at (x, y), `name` beneath it, and `note` beneath that."""
        axes = self.axes(x, y, side, side)
        axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        for n, line in enumerate(filter(None, (name, note))):
            self.text(
                x + side / 2,
                y + side + 0.16 + 0.14 * n,
                legible(line, side, size),
                ha="center",
                size=size,
                family=families(),
            )
        return axes


def _grid(
    count: int, per_row: int, width: float, height: float, title: str
) -> tuple[_Page, list[tuple[float, float]]]:
    """A page with room for `count` cells under a title, and the upper left corner of each. ValueError if there are none."""
    if not count:
        raise ValueError("no images: there is nothing to draw")
    margin, head = 0.15, 0.45
    columns = min(per_row, count)
    page = _Page(
        2 * margin + max(columns * width, len(title) * 0.075), head + -(-count // columns) * height
    )
    page.text(margin, 0.28, title, size=10)
    return page, [
        (margin + n % columns * width, head + n // columns * height) for n in range(count)
    ]


def _name(classes: Sequence[str], label: int) -> str:
    """The class's name, or its number where the network has more classes than the data."""
    return classes[label] if label < len(classes) else f"class {label}"
