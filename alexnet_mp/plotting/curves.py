"""Curves of a run. Figures are made without pyplot, so no window, no global state and no display is needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alexnet_mp.plotting.lettering import families, legible

TRAINING, VALIDATION = "tab:blue", "tab:orange"
ACCURACIES = ("_top1", "_top5")
NAMES = {
    "train_loss": "training loss (with dropout)",
    "val_loss": "validation loss",
    "train_top1": "training error (with dropout)",
    "val_top1": "validation error",
    "val_top5": "validation error, top-5",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "seconds": "seconds per epoch",
}
"""What history.jsonl's keys are called on an axis; accuracies are drawn as errors."""


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Means over `window` neighbors, len(values) - window + 1 of them; a window longer than the data takes what there is.

    Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window_size {window}: must be at least 1")
    window = min(window, len(values))
    return (
        np.convolve(values, np.ones(window) / window, mode="valid") if len(values) else np.empty(0)
    )


def plot_losses(
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    window: int = 1,
    path: str | Path | None = None,
) -> Figure:
    """Training and validation loss over epochs, each point the mean of the `window` epochs that end there."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for losses, label, color in (
        (train_losses, "training", TRAINING),
        (val_losses, "validation", VALIDATION),
    ):
        _line(axes, losses, label, color, window)
    axes.set(xlabel="epoch", ylabel="loss" + (f", mean of {window} epochs" if window > 1 else ""))
    axes.legend()
    return saved(figure, path)


def draw_curves(
    history: Sequence[dict[str, Any]], path: str | Path | None = None, window: int = 1
) -> Figure:
    """Loss and error over epochs, training and validation, with the learning rate's falls and the best epoch marked.

    `history` has the objects of history.jsonl. With a `window` of several epochs their mean is drawn, the epochs themselves pale
    behind it. Raises ValueError if the history is empty.
    """
    if not history:
        raise ValueError("no epoch has ended: there is nothing to draw")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for axes, train, val, unit in (
        (losses, "train_loss", "val_loss", "loss"),
        (errors, "train_top1", "val_top1", "error"),
    ):
        for key, label, color in (
            (train, "training (with dropout)", TRAINING),
            (val, "validation", VALIDATION),
        ):
            _line(axes, errors_or_values(history, key), label, color, window, pale=True)
        axes.set(xlabel="epoch", ylabel=unit + _of_epochs(window, history))
    _line(
        errors,
        errors_or_values(history, "val_top5"),
        "validation, top-5",
        "tab:green",
        window,
        pale=True,
    )
    for axes in (losses, errors):
        axes.set_ylim(bottom=0)
    errors.yaxis.set_major_formatter(PercentFormatter(1.0))
    best = min(history, key=lambda record: record["val_loss"])
    losses.axvline(
        best["epoch"],
        color="gray",
        linestyle=":",
        label=f"best: epoch {best['epoch']}, {best['val_loss']:.3f}",
    )
    falls = [after for before, after in itertools.pairwise(history) if after["lr"] < before["lr"]]
    for record in (
        falls if 2 * len(falls) < len(history) else ()
    ):  # a schedule that falls at every epoch needs no marks
        place = record["epoch"] - 0.5
        losses.axvline(place, color="lightgray", linestyle="--")
        losses.text(
            place,
            0.98,
            f" lr {record['lr']:.2g}",
            transform=losses.get_xaxis_transform(),
            va="top",
            fontsize=8,
            color="gray",
        )
    losses.legend()
    errors.legend()
    return saved(figure, path)


def compare_curves(
    runs: Mapping[str, Sequence[dict[str, Any]]],
    key: str,
    path: str | Path | None = None,
    *,
    target: float | None = None,
    window: int = 1,
) -> Figure:
    """One number of several runs over epochs: `compare_curves({"ReLU": history, "tanh": other}, "train_top1", target=0.25)`.

    `key` is one of history.jsonl's; accuracies are drawn as errors. `target` becomes a horizontal line, and the legend says after
    how many epochs each run's curve reached it. ValueError for no runs, a run without epochs, a key that a history lacks.
    """
    if not runs:
        raise ValueError("no runs: there is nothing to compare")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, history) in enumerate(runs.items()):
        if not history:
            raise ValueError(f"{label}: no epoch has ended: there is nothing to draw")
        values, label = errors_or_values(history, key), legible(label, inches=3, size=10)
        label = (
            " " + label if label.startswith("_") else label
        )  # a legend leaves out what begins so
        if target is not None:
            reached = epochs_to(values, target, window)
            label += (
                f": {reached} epoch{'s' * (reached > 1)} to the target"
                if reached
                else ": target not reached"
            )
        _line(axes, values, label, f"C{number}", window, pale=True)
        axes.lines[-1].set_linestyle(
            ("-", "--", "-.")[number % 3]
        )  # to be told apart in print, too
    is_error = key.endswith(ACCURACIES)
    if target is not None:
        axes.axhline(
            target,
            color="gray",
            linestyle=":",
            label=f"target: {100 * target:.4g}%" if is_error else f"target: {target:.4g}",
        )
    if is_error:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="epoch", ylabel=NAMES.get(key, key) + _of_epochs(window, *runs.values()))
    axes.set_ylim(bottom=0)
    axes.legend(prop={"family": families()})
    return saved(figure, path)


def errors_or_values(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    """What is drawn for `key`: 1 - accuracy for `..._top1` and `..._top5`, else the value. ValueError if an epoch has no such number."""
    if any(not isinstance(record.get(key), (int, float)) for record in history):
        raise ValueError(
            f"key {key}: not a number in every epoch; there are {', '.join(k for k in history[0] if k not in ('epoch', 'step'))}"
        )
    return [1 - record[key] if key.endswith(ACCURACIES) else record[key] for record in history]


def epochs_to(values: Sequence[float], target: float, window: int = 1) -> int | None:
    """After how many epochs the values, or their means over `window` epochs, first are at or below `target`; None: never."""
    smooth = moving_average(values, window)
    return next(
        (
            epoch
            for epoch, value in enumerate(smooth, len(values) - len(smooth) + 1)
            if value <= target
        ),
        None,
    )


def _of_epochs(window: int, *histories: Sequence[Any]) -> str:
    """For an axis: over how many epochs its means are, which a short history may make fewer than the window."""
    longest = min(window, max(map(len, histories)))
    return f", mean of {longest} epochs" if longest > 1 else ""


def _line(
    axes: Any, values: Sequence[float], label: str, color: str, window: int = 1, pale: bool = False
) -> None:
    smooth = moving_average(values, window)
    epochs = np.arange(
        len(values) - len(smooth) + 1, len(values) + 1
    )  # a mean stands at the last epoch of its window
    if pale and window > 1:
        axes.plot(np.arange(1, len(values) + 1), values, color=color, alpha=0.25, linewidth=1)
    axes.plot(
        epochs,
        smooth,
        label=label,
        color=color,
        marker="o" if len(smooth) < 30 else None,
        markersize=3,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to `path` unless that is None."""
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
