"""The picture of the table of claims: each difference with its interval, beside the paper's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import CANNOT_TELL, HOLDS, OPPOSITE

from alexnet_mp.plotting.page import save_figure

COLORS = {HOLDS: "tab:blue", OPPOSITE: "tab:red", CANNOT_TELL: "tab:gray"}
PAPERS = re.compile(r"top-([15]) (-?[\d.]+)")  # "more than -1" is no figure
ERRORS = (("", "top-1", "o", 0.14), ("_top5", "top-5", "s", -0.14))
"""Of each error: how its fields end, its name, its marker, its place above the row's middle."""


def paper_figures(text: str) -> dict[str, float]:
    """The differences that the text "top-1 -1.4, top-5 -1.2" states, by error."""
    return {f"top-{top}": float(value) for top, value in PAPERS.findall(text)}


def rows_with_interval(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ablations.json that are differences of errors of two seeds or more."""
    return [row for row in rows if row["measure"] != "speed" and row["interval"]]


def draw_claims(rows: Sequence[dict[str, Any]], path: str | Path | None = None) -> Figure:
    """Draws `rows`, each of which has an interval.

    Raises ValueError for none.
    """
    drawn = rows_with_interval(rows)
    if not drawn:
        raise ValueError("no claim has two seeds: there is no interval to draw")
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for place, row in enumerate(reversed(drawn)):
        _draw_row(axes, place, row)
    names = [f"{row['text']}\n({len(row['seeds'])} seeds)" for row in reversed(drawn)]
    axes.set_yticks(range(len(drawn)), names, fontsize=9)
    axes.set_xlabel("difference of the error with and without it, points; left of 0: it helps")
    axes.grid(axis="x", alpha=0.3)
    _draw_legend(axes)
    return save_figure(figure, path)


def _draw_row(axes: Axes, place: int, row: dict[str, Any]) -> None:
    papers = paper_figures(row["paper"])
    for end, name, marker, above in ERRORS:
        mean, low, high = row[f"interval{end}"]
        color, y = COLORS[row[f"verdict{end}"]], place + above
        axes.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(mean, y, marker, color=color, markersize=6)
        if name in papers:
            axes.plot(papers[name], y, "D", markersize=6, markerfacecolor="none", color="black")


def _draw_legend(axes: Axes) -> None:
    """Says what markers and colors mean, beside the axes, where they cover nothing."""
    for _, name, marker, _ in ERRORS:
        axes.plot([], [], marker, color="black", label=f"{name}, 95 % interval")
    axes.plot([], [], "D", markerfacecolor="none", color="black", label="the paper's figure")
    for verdict, color in COLORS.items():
        axes.plot([], [], color=color, linewidth=3, label=verdict)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
