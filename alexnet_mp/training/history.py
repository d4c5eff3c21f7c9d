"""What the tutorial asks of a trainer after training: losses of all epochs, and their curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


class TrainingHistory:
    """The columns of `history`, which has one record per epoch, and their curves."""

    history: list[dict[str, Any]]

    @property
    def train_losses(self) -> list[float]:
        """The mean training loss of each epoch."""
        return [record["train_loss"] for record in self.history]

    @property
    def val_losses(self) -> list[float]:
        """The mean validation loss of each epoch."""
        return [record["val_loss"] for record in self.history]

    @property
    def gradient_norms(self) -> list[float]:
        """The mean norm of the gradient over each epoch's steps."""
        return [record["grad_norm"] for record in self.history]

    def plot_losses(self, window_size: int = 1, path: str | Path | None = None) -> Figure:
        """Training and validation loss over epochs, smoothed over `window_size` of them.

        Returns a matplotlib figure, which is saved to `path` if given.
        """
        from alexnet_mp.plotting.curves import plot_losses  # matplotlib takes a second to import

        return plot_losses(self.train_losses, self.val_losses, window_size, path)

    @staticmethod
    def moving_average(data: list[float], window_size: int) -> np.ndarray:
        """Means over `window_size` neighbors; a window longer than the data takes what there is."""
        from alexnet_mp.plotting.curves import moving_average

        return moving_average(data, window_size)
