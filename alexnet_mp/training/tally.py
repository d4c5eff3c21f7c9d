"""What one epoch of training has come to so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Tally:
    """Sums over the steps of an epoch, kept on the device so that no step waits for them: this rank's rows only."""

    def __init__(self, device: torch.device) -> None:
        self.steps, self.grad_norm, self.seconds = 0, 0.0, 0.0
        # float64 sums lose nothing over an epoch; MPS has no float64
        self.sums = torch.zeros(
            3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )  # loss, correct, images

    def counts(self, loss_sum: Tensor, correct: Tensor, images: int) -> Tensor:
        """The sums of a step that is not yet known to count."""
        values = (loss_sum, correct, torch.full((), images, device=self.sums.device))
        return torch.stack([value.detach().to(self.sums.dtype) for value in values])

    def confirm(self, counts: Tensor, grad_norm: float) -> None:
        """The step of these `counts` counts."""
        self.sums += counts
        self.steps, self.grad_norm = self.steps + 1, self.grad_norm + grad_norm

    def mean_loss(self) -> float:
        """Of this rank's rows so far."""
        return float(self.sums[0] / self.sums[2].clamp(min=1))

    def state_dict(self, all_copies: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """`all_copies` adds the sums of the other copies of the network."""
        return {
            "steps": self.steps,
            "grad_norm": self.grad_norm,
            "seconds": self.seconds,
            "sums": all_copies(self.sums.cpu().double()),
        }

    def load_state_dict(self, state: dict[str, Any], first_copy: bool) -> None:
        """The sums of all copies go on as the first one's."""
        self.steps, self.grad_norm, self.seconds = (
            state["steps"],
            state["grad_norm"],
            state["seconds"],
        )
        self.sums.zero_()
        if first_copy:
            self.sums += state["sums"].to(self.sums)
