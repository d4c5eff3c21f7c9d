"""Figures without pyplot (no window, no global state, no display), and pages measured in inches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_mp.plotting.fonts import fit_text, font_families


def save_figure(figure: Figure, path: str | Path | None, pixels_per_inch: int = 120) -> Figure:
    """Returns `figure` and writes it to `path`, unless that is None."""
    if path is not None:
        figure.savefig(path, dpi=pixels_per_inch, pil_kwargs={"optimize": True})
    return figure


class Page:
    """A figure whose parts are placed in inches from its upper left corner.

    Every part has its own place, so that nothing can overlap however long a name is.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Adds axes whose upper left corner is at (x, y)."""
        left, bottom = x / self.width, 1 - (y + height) / self.height
        return self.figure.add_axes((left, bottom, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Writes `text` with its left end at x and its baseline at y."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **options)

    def image(
        self, x: float, y: float, side: float, image: Tensor, *lines: str, size: int = 9
    ) -> Axes:
        """Draws `image`, uint8 (3, s, s), its upper left corner at (x, y), and `lines` below it."""
        axes = self.axes(x, y, side, side)
        axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        for number, line in enumerate(filter(None, lines)):
            self.text(
                x + side / 2,
                y + side + 0.16 + 0.14 * number,
                fit_text(line, side, size),
                ha="center",
                size=size,
                family=font_families(),
            )
        return axes


def grid_page(
    count: int, per_row: int, width: float, height: float, title: str
) -> tuple[Page, list[tuple[float, float]]]:
    """A page with `count` cells of width x height under a title, and each cell's upper left corner.

    Raises ValueError if `count` is 0.
    """
    if not count:
        raise ValueError("no images: there is nothing to draw")
    margin, head = 0.15, 0.45
    columns = min(per_row, count)
    rows = -(-count // columns)
    page = Page(2 * margin + max(columns * width, len(title) * 0.075), head + rows * height)
    page.text(margin, 0.28, title, size=10)
    return page, [
        (margin + n % columns * width, head + n // columns * height) for n in range(count)
    ]
