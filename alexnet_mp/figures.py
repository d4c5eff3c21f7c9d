"""Pictures of a run. Figures are made without pyplot, so no window, no global state and no display is needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TRAINING, VALIDATION = "tab:blue", "tab:orange"


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Means over `window` neighbours, len(values) - window + 1 of them; a window longer than the data takes what there is.

    Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window_size {window}: must be at least 1")
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid") if len(values) else np.empty(0)


def plot_losses(train_losses: Sequence[float], val_losses: Sequence[float], window: int = 1, path: str | Path | None = None) -> Figure:
    """Training and validation loss over epochs, each point the mean of the `window` epochs that end there."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for losses, label, colour in ((train_losses, "training", TRAINING), (val_losses, "validation", VALIDATION)):
        _line(axes, losses, label, colour, window)
    axes.set(xlabel="epoch", ylabel="loss" + (f", mean of {window} epochs" if window > 1 else ""))
    axes.legend()
    return _saved(figure, path)


def draw_curves(history: Sequence[dict[str, Any]], path: str | Path | None = None) -> Figure:
    """Loss and error over epochs, training and validation, with the learning rate's falls and the best epoch marked.

    `history` has the objects of history.jsonl. Raises ValueError if it is empty.
    """
    if not history:
        raise ValueError("no epoch has ended: there is nothing to draw")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for axes, train, val, unit in ((losses, "train_loss", "val_loss", "loss"), (errors, "train_top1", "val_top1", "top-1 error")):
        for key, label, colour in ((train, "training (with dropout)", TRAINING), (val, "validation", VALIDATION)):
            values = [record[key] if unit == "loss" else 1 - record[key] for record in history]
            _line(axes, values, label, colour)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.set_ylim(bottom=0)
    _line(errors, [1 - record["val_top5"] for record in history], "validation, top-5", "tab:green")
    errors.yaxis.set_major_formatter(PercentFormatter(1.0))
    best = min(history, key=lambda record: record["val_loss"])
    losses.axvline(best["epoch"], color="grey", linestyle=":", label=f"best: epoch {best['epoch']}, {best['val_loss']:.3f}")
    falls = [after for before, after in itertools.pairwise(history) if after["lr"] < before["lr"]]
    for record in falls if 2 * len(falls) < len(history) else ():      # a schedule that falls at every epoch needs no marks
        losses.axvline(record["epoch"] - 0.5, color="lightgrey", linestyle="--")
        losses.text(record["epoch"] - 0.5, losses.get_ylim()[1], f" lr {record['lr']:.2g}", va="top", fontsize=8, color="grey")
    losses.legend()
    errors.legend()
    return _saved(figure, path)


def _line(axes: Any, values: Sequence[float], label: str, colour: str, window: int = 1) -> None:
    smooth = moving_average(values, window)
    epochs = np.arange(len(values) - len(smooth) + 1, len(values) + 1)      # a mean stands at the last epoch of its window
    axes.plot(epochs, smooth, label=label, color=colour, marker="o" if len(smooth) < 30 else None, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
