"""Reduced precision: autocast for the layers, and a loss scale for the gradients of fp16."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which layers compute in `precision` on `device`; weights stay in float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


class LossScale:
    """The factor on the loss in fp16; 1 in other precisions.

    It is halved at an overflow, and doubled after 2,000 steps without one. torch.amp.GradScaler
    decides on each rank by that rank's gradients; this one is told the norm over all ranks.
    """

    GROWTH_INTERVAL = 2000  # torch.amp.GradScaler's own

    def __init__(self, precision: str) -> None:
        self.active = precision == "fp16"
        self.scale, self.good_steps = (2.0**16 if self.active else 1.0), 0

    def update(self, squared_norm: float) -> bool:
        """Reads the squared gradient norm over all ranks; False if this step must be skipped.

        That is so where its gradients overflowed.
        """
        if not self.active:
            return True
        if not math.isfinite(squared_norm):
            self.scale, self.good_steps = self.scale / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether halving has not helped: the loss itself is not finite."""
        return self.active and self.scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]
