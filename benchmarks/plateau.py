"""When a loss leaves the plateau at ln(classes), at which a network knows nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WINDOW = 25  # steps whose mean loss is looked at
LEFT = 0.98  # of ln(classes): a mean below it has left the plateau


class RecordingLoss(nn.CrossEntropyLoss):
    """The summed loss, which remembers the mean of every batch that it saw in training.

    They stay on the device, so that no step waits for them, until `losses` is asked for.
    """

    def __init__(self, before: Sequence[float] = ()) -> None:
        """`before`: the losses of the steps before, in a run that goes on."""
        super().__init__(reduction="sum")
        self._known = list(before)
        self._recorded: list[Tensor] = []

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(logits, labels)
        if logits.requires_grad:
            self._recorded.append(loss.detach() / len(labels))
        return loss

    def losses(self) -> list[float]:
        """The mean loss of each training step so far."""
        if self._recorded:
            self._known += torch.stack(self._recorded).tolist()
            self._recorded = []
        return list(self._known)


def means_of_window(losses: Sequence[float]) -> list[float]:
    """The mean of each WINDOW losses in a row; of all, where there are fewer."""
    window = max(min(WINDOW, len(losses)), 1)
    return [sum(losses[last - window : last]) / window for last in range(window, len(losses) + 1)]


def left_plateau(losses: Sequence[float], classes: int) -> int | None:
    """The step, counted from 1, at which the mean of the last WINDOW losses is below LEFT *
    ln(classes); None if it never was."""
    means = means_of_window(losses)
    first = len(losses) - len(means) + 1
    return next(
        (first + k for k, mean in enumerate(means) if mean < LEFT * math.log(classes)), None
    )
