"""What the classes with the most errors are taken for, a bar each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from alexnet_mp.plotting.fonts import fit_text, font_families, text_width
from alexnet_mp.plotting.page import Page, save_figure
from alexnet_mp.plotting.predictions import CORRECT_COLOR, OTHER_COLOR, class_name

REST_COLOR = "#e8e8e8"
NAMED = 4
"""Wrong classes that have a part of the bar each; all others share the last part."""
WIDTH, NAMES, ROW = 9.0, 1.9, 0.3  # inches
SIZE = 8.0  # points of the words on a bar


@dataclass(frozen=True)
class ClassErrors:
    """One class: its test images, how many are right, and what the others are taken for."""

    label: int
    images: int
    correct: int
    taken_for: dict[int, int]
    """Wrong class -> images, the most frequent first."""


def worst_classes(labels: Tensor, predicted: Tensor, count: int) -> list[ClassErrors]:
    """The `count` classes with the smallest share of right answers, the worst first.

    `labels` and `predicted` are class numbers (N,). Classes without images are left out; of equal
    ones the one with more images comes first, then the lower number.
    """
    found = []
    for label in sorted(set(labels.tolist())):
        answers = Counter(predicted[labels == label].tolist())
        images, correct = answers.total(), answers.pop(label, 0)
        pairs = sorted(answers.items(), key=lambda pair: (-pair[1], pair[0]))
        found.append(ClassErrors(label, images, correct, dict(pairs)))
    found.sort(key=lambda one: (one.correct / one.images, -one.images, one.label))
    return found[:count]


def draw_confusion(
    worst: Sequence[ClassErrors], classes: Sequence[str], path: str | Path | None = None
) -> Figure:
    """Draws a bar for each class: the share that is right in green, then the classes it becomes.

    Raises ValueError if there are no classes.
    """
    if not worst:
        raise ValueError("no images: there is nothing to draw")
    page = Page(WIDTH, 0.55 + len(worst) * ROW)
    title = "The classes with the most errors: right (green), and what the others are taken for"
    page.text(0.15, 0.28, title, size=10)
    axes = page.axes(NAMES, 0.45, WIDTH - NAMES - 0.2, len(worst) * ROW)
    for row, one in enumerate(worst):
        name = fit_text(class_name(classes, one.label), NAMES - 0.75, 9)
        y = 0.45 + (row + 0.62) * ROW
        page.text(0.15, y, name, size=9, family=font_families())
        images = f"{one.images:,} image{'s' * (one.images != 1)}"
        page.text(NAMES - 0.08, y, images, size=7, color="#555555", ha="right")
        _draw_bar(axes, row, one, classes)
    axes.set(xlim=(0, 1), ylim=(len(worst) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return save_figure(page.figure, path)


def _draw_bar(axes: Axes, row: int, one: ClassErrors, classes: Sequence[str]) -> None:
    """The parts of one class's bar, each with its name and share as far as they fit."""
    named = list(one.taken_for.items())[:NAMED]
    rest = sum(one.taken_for.values()) - sum(count for _, count in named)
    parts = [
        (one.correct, "right", CORRECT_COLOR),
        *((count, class_name(classes, label), OTHER_COLOR) for label, count in named),
        (rest, "others", REST_COLOR),
    ]
    left = 0.0
    for count, name, color in parts:
        share = count / one.images
        if not count:
            continue
        axes.barh(row, share, 0.82, left=left, color=color, edgecolor="white")
        text = _label(name, f"{share:.0%}", share * (WIDTH - NAMES - 0.2) - 0.06)
        middle: dict[str, Any] = {"ha": "center", "va": "center"}
        axes.text(left + share / 2, row, text, size=SIZE, family=font_families(), **middle)
        left += share


def _label(name: str, percent: str, inches: float) -> str:
    """As much of name and share as fits: both, the name, the share or nothing."""
    whole = fit_text(name, WIDTH, SIZE)
    for text in (f"{whole} {percent}", whole, percent):
        if text_width(text, SIZE) <= inches:
            return text
    return ""
