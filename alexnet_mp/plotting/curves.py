"""Curves of a run over its epochs: loss, error, and one number of several runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from alexnet_mp.plotting.fonts import fit_text, font_families
from alexnet_mp.plotting.page import save_figure

Record = Mapping[str, Any]
"""An epoch, as a line of history.jsonl has it."""

TRAINING_COLOR, VALIDATION_COLOR, TOP5_COLOR = "tab:blue", "tab:orange", "tab:green"
ACCURACIES = ("_top1", "_top5")
"""Ends of the keys whose values are accuracies; they are drawn as errors."""
AXIS_LABELS = {
    "train_loss": "training loss (in training mode)",
    "val_loss": "validation loss",
    "train_top1": "training error (in training mode)",
    "val_top1": "validation error",
    "val_top5": "validation error, top-5",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "seconds": "seconds per epoch",
}


def moving_average(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """Means over `window` neighbors: len(values) - window + 1 of them.

    A window longer than the data is cut to its length. Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window_size {window}: must be at least 1")
    if not len(values):
        return np.empty(0)
    window = min(window, len(values))
    return np.asarray(np.convolve(values, np.ones(window) / window, mode="valid"), np.float64)


def plot_losses(
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    window: int = 1,
    path: str | Path | None = None,
) -> Figure:
    """Draws training and validation loss over epochs, each point the mean of `window` epochs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _line(axes, train_losses, "training", TRAINING_COLOR, window)
    _line(axes, val_losses, "validation", VALIDATION_COLOR, window)
    axes.set(xlabel="epoch", ylabel="loss" + (f", mean of {window} epochs" if window > 1 else ""))
    axes.legend()
    return save_figure(figure, path)


def draw_curves(
    history: Sequence[Record],
    path: str | Path | None = None,
    window: int = 1,
    classes: int | None = None,
) -> Figure:
    """Draws loss and error over epochs, with the best epoch and the drops of the learning rate.

    `history` has the objects of history.jsonl. With a `window` of several epochs their mean is
    drawn, the single epochs pale behind it. Top-5 is drawn unless the number of `classes` is known
    to be at most five, where it is always right. Raises ValueError if the history is empty.
    """
    if not history:
        raise ValueError("no epoch has ended: there is nothing to draw")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for axes, kind, name in ((losses, "loss", "loss"), (errors, "top1", "error")):
        for split, label, color in (
            ("train", "training (with dropout)", TRAINING_COLOR),
            ("val", "validation", VALIDATION_COLOR),
        ):
            values = errors_or_values(history, f"{split}_{kind}")
            _line(axes, values, label, color, window, pale=True)
        axes.set(xlabel="epoch", ylabel=name + _window_note(window, history))
    if classes is None or classes > 5:
        values = errors_or_values(history, "val_top5")
        _line(errors, values, "validation, top-5", TOP5_COLOR, window, pale=True)
    errors.yaxis.set_major_formatter(PercentFormatter(1.0))
    best = min(history, key=lambda record: float(record["val_loss"]))
    label = f"best: epoch {best['epoch']}, {best['val_loss']:.3f}"
    losses.axvline(best["epoch"], color="gray", linestyle=":", label=label)
    _mark_lr_drops(losses, history)
    for axes in (losses, errors):
        _start_at_zero(axes)
        axes.legend()
    return save_figure(figure, path)


def compare_curves(
    runs: Mapping[str, Sequence[Record]],
    key: str,
    path: str | Path | None = None,
    *,
    target: float | None = None,
    window: int = 1,
) -> Figure:
    """Draws one number of several runs over epochs.

    `key` is one of history.jsonl's; accuracies are drawn as errors. `target` is a horizontal line,
    and the legend says after how many epochs each run reached it. Raises ValueError for no runs, a
    run without epochs, or a key that a history lacks.

        compare_curves({"ReLU": history, "tanh": other}, "train_top1", target=0.25)
    """
    if not runs:
        raise ValueError("no runs: there is nothing to compare")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, history) in enumerate(runs.items()):
        if not history:
            raise ValueError(f"{name}: no epoch has ended: there is nothing to draw")
        values = errors_or_values(history, key)
        label = _legend_label(name, values, target, window)
        _line(axes, values, label, f"C{number}", window, pale=True)
        axes.lines[-1].set_linestyle(("-", "--", "-.")[number % 3])  # differs in gray print too
    is_error = key.endswith(ACCURACIES)
    if target is not None:
        label = f"target: {100 * target:.4g}%" if is_error else f"target: {target:.4g}"
        axes.axhline(target, color="gray", linestyle=":", label=label)
    if is_error:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    label = AXIS_LABELS.get(key, key) + _window_note(window, *runs.values())
    axes.set(xlabel="epoch", ylabel=label)
    _start_at_zero(axes)
    axes.legend(prop={"family": font_families()})
    return save_figure(figure, path)


def errors_or_values(history: Sequence[Record], key: str) -> list[float]:
    """The numbers drawn for `key`: 1 - accuracy for `..._top1` and `..._top5`, else the value.

    Raises ValueError if an epoch has no such number.
    """
    if any(not isinstance(record.get(key), (int, float)) for record in history):
        names = ", ".join(name for name in history[0] if name not in ("epoch", "step"))
        raise ValueError(f"key {key}: not a number in every epoch; there are {names}")
    return [1 - record[key] if key.endswith(ACCURACIES) else record[key] for record in history]


def epochs_to(values: Sequence[float], target: float, window: int = 1) -> int | None:
    """The first epoch at whose end the mean over `window` values is at most `target`, or None."""
    smooth = moving_average(values, window)
    first = len(values) - len(smooth) + 1
    return next((first + i for i, value in enumerate(smooth) if value <= target), None)


def _legend_label(name: str, values: Sequence[float], target: float | None, window: int) -> str:
    label = fit_text(name, inches=3, size=10)
    if label.startswith("_"):
        label = " " + label  # matplotlib leaves out of a legend the labels that begin with _
    if target is None:
        return label
    reached = epochs_to(values, target, window)
    if reached is None:
        return f"{label}: target not reached"
    return f"{label}: {reached} epoch{'s' * (reached > 1)} to the target"


def _mark_lr_drops(axes: Axes, history: Sequence[Record]) -> None:
    drops = [after for before, after in itertools.pairwise(history) if after["lr"] < before["lr"]]
    if 2 * len(drops) >= len(history):
        return  # a schedule that falls at every epoch needs no marks
    for record in drops:
        place = record["epoch"] - 0.5
        axes.axvline(place, color="lightgray", linestyle="--")
        axes.text(
            place,
            0.98,
            f" lr {record['lr']:.2g}",
            transform=axes.get_xaxis_transform(),
            va="top",
            fontsize=8,
            color="gray",
        )


def _window_note(window: int, *histories: Sequence[Record]) -> str:
    """The end of an axis label: how many epochs a mean covers, at most those that there are."""
    longest = min(window, max(map(len, histories)))
    return f", mean of {longest} epochs" if longest > 1 else ""


def _start_at_zero(axes: Axes) -> None:
    """Lets the y axis begin at 0 and end a little above the highest value."""
    highest = float(axes.dataLim.y1)
    axes.set_ylim(0, 1.05 * highest if highest > 0 else 1.0)


def _line(
    axes: Axes, values: Sequence[float], label: str, color: str, window: int, pale: bool = False
) -> None:
    """Draws the means of `values` over `window` epochs and, if `pale`, the values behind them."""
    smooth = moving_average(values, window)
    last = len(values)
    epochs = np.arange(last - len(smooth) + 1, last + 1)  # a mean stands at its window's last epoch
    if pale and window > 1:
        axes.plot(np.arange(1, last + 1), values, color=color, alpha=0.25, linewidth=1)
    marker = "o" if len(smooth) < 30 else None
    axes.plot(epochs, smooth, label=label, color=color, marker=marker, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
