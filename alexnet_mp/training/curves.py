"""A trainer's record, by the tutorial's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Curves:
    """What can be read off `history`, one dictionary per epoch."""

    history: list[dict[str, Any]]

    @property
    def train_losses(self) -> list[float]:
        return [record["train_loss"] for record in self.history]

    @property
    def val_losses(self) -> list[float]:
        return [record["val_loss"] for record in self.history]

    @property
    def gradient_norms(self) -> list[float]:
        return [record["grad_norm"] for record in self.history]

    def plot_losses(self, window_size: int = 1, path: str | None = None) -> Any:
        """Training and validation loss over epochs, smoothed over `window_size`; a matplotlib figure, saved to `path` if given."""
        from alexnet_mp.plotting.curves import plot_losses  # matplotlib takes a second to import

        return plot_losses(self.train_losses, self.val_losses, window_size, path)

    @staticmethod
    def moving_average(data: list[float], window_size: int) -> np.ndarray:
        """Means over `window_size` neighbors; a window longer than the data takes what there is."""
        from alexnet_mp.plotting.curves import moving_average

        return moving_average(data, window_size)
