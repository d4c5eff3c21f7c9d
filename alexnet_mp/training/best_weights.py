"""The weights of the best epoch, and the last ones, from which training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class BestWeights:
    """Keeps copies of a model's weights on the CPU.

    weights.keep()              # after an epoch that is the best so far
    weights.load_best()         # after training
    weights.put_back_last()     # before training goes on
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None  # while the model has the best ones

    def keep(self) -> None:
        """The weights that the model has now are the best so far."""
        self.best = copy_of_weights(self.model)

    def load_best(self) -> None:
        """Gives the model the best weights, if any, and keeps its last ones."""
        if self.best is not None:
            self.last = copy_of_weights(self.model)
            self.model.load_state_dict(self.best)

    def put_back_last(self) -> bool:
        """Gives the model its last weights, if `load_best` has taken them.

        False if it was changed meanwhile: then it stays so.
        """
        last, self.last = self.last, None
        if last is None or self.best is None:
            return True
        here = self.model.state_dict()
        unchanged = all(is_same(value, self.best.get(name)) for name, value in here.items())
        if unchanged:
            self.model.load_state_dict(last)
        return unchanged

    def state_dict(self) -> dict[str, Any]:
        """Both, for a checkpoint."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the model is restored by its own state."""
        self.best, self.last = state["best"], state["last"]


def copy_of_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict, copied to the CPU."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }


def is_same(value: Any, copied: Any) -> bool:
    """Whether an entry of a state dict is still what was copied.

    Entries that are no tensors always are.
    """
    if not isinstance(value, Tensor):
        return True
    return isinstance(copied, Tensor) and torch.equal(value.detach().cpu(), copied)
