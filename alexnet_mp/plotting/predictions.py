"""Test images with the network's answers, as figure 4 of the paper, and samples of a data set.

Images are uint8 RGB tensors (N, 3, s, s). Each function returns the figure, and writes it to `path`
if that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_mp.plotting.fonts import fit_text, font_families
from alexnet_mp.plotting.page import grid_page, save_figure

CORRECT_COLOR, OTHER_COLOR = "#7bc47f", "#b9c9de"
"""Colors of the true class and of the others."""
BAR_HEIGHT = 0.19  # inches


def draw_predictions(
    images: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    classes: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """Draws each image, its class and bars of the five most probable classes, as figure 4 (left).

    The bar of the true class is green. `labels` (N,), `probabilities` (N, classes). Raises
    ValueError if there are no images.
    """
    side, gap = 1.7, 0.25
    best = probabilities.detach().cpu().double().sort(dim=1, descending=True, stable=True)
    count = min(5, probabilities.shape[1])
    page, places = grid_page(
        len(images),
        4,
        side + gap,
        side + 0.28 + count * BAR_HEIGHT + 0.2,
        "Test images and the most probable classes (green: the true class)",
    )
    for n, (x, y) in enumerate(places):
        label = int(labels[n])
        page.image(x, y, side, images[n], class_name(classes, label), size=9)
        axes = page.axes(x, y + side + 0.28, side, count * BAR_HEIGHT)
        found = best.indices[n, :count].tolist()
        colors = [CORRECT_COLOR if k == label else OTHER_COLOR for k in found]
        names = [fit_text(class_name(classes, k), inches=side - 0.45, size=8) for k in found]
        _draw_bars(axes, best.values[n, :count].tolist(), colors, names)
    return save_figure(page.figure, path)


def _draw_bars(
    axes: Axes, values: Sequence[float], colors: Sequence[str], names: Sequence[str]
) -> None:
    """Draws horizontal bars from the top down, each with its name and its per cent on it."""
    axes.barh(range(len(values)), values, height=0.86, color=colors)
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        axes.text(0.02, row, name, va="center", size=8, family=font_families())
        axes.text(0.98, row, f"{value:.0%}", va="center", ha="right", size=7, color="#333333")
    axes.set(xlim=(0, 1), ylim=(len(values) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_color("lightgray")


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
    """Draws a row for each test image: the image, then its nearest training images.

    As figure 4 (right) of the paper.

    `queries` (N, 3, s, s), `neighbors` (N, K, 3, t, t), nearest first, `distances` (N, K). With
    labels (N,) and (N, K) the classes stand below, and neighbors of the query's class have a green
    frame. Raises ValueError if there are no images.
    """
    side, gap = 1.25, 0.12
    page, places = grid_page(
        len(queries),
        1,
        (side + gap) * (1 + neighbors.shape[1]) + 2 * gap,
        side + 0.45,
        "Test images (left), and the nearest training images by fc7, with their distances",
    )
    for n, (x, y) in enumerate(places):
        label = None if query_labels is None else int(query_labels[n])
        page.image(
            x, y, side, queries[n], "" if label is None else class_name(classes, label), size=8
        )
        for k in range(neighbors.shape[1]):
            theirs = None if neighbor_labels is None else int(neighbor_labels[n, k])
            axes = page.image(
                x + 2 * gap + (side + gap) * (k + 1),
                y,
                side,
                neighbors[n, k],
                "" if theirs is None else class_name(classes, theirs),
                f"{distances[n, k]:#.3g}".rstrip("."),
                size=8,
            )
            if theirs is not None and theirs == label:
                axes.spines[:].set(visible=True, color=CORRECT_COLOR, linewidth=3)
    return save_figure(page.figure, path)


def draw_samples(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    path: str | Path | None = None,
    per_row: int = 8,
) -> Figure:
    """Draws a grid of images and their class names, and saves it where `path` is given.

    `images` are uint8 (N, 3, side, side), `labels` class numbers (N,). Raises ValueError if there
    are no images.

        images, labels = splits.train.gather(range(16)), splits.train.labels[:16]
        draw_samples(images, torch.as_tensor(labels), splits.train.classes, "samples.png")
    """
    side = 1.25
    page, places = grid_page(
        len(images), per_row, side + 0.12, side + 0.3, "Training images and their classes"
    )
    for n, (x, y) in enumerate(places):
        page.image(x, y, side, images[n], class_name(classes, int(labels[n])), size=8)
    return save_figure(page.figure, path)


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of class `label`, or its number where the network has more classes than the data."""
    return classes[label] if label < len(classes) else f"class {label}"
