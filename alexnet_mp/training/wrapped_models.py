"""Modules as users bring them: wrapped, partly in evaluation mode, with a forward of their own."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from alexnet_mp.model.alexnet import AlexNet


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def takes_dropout_keys(network: nn.Module) -> bool:
    """Whether it is called as an AlexNet: a subclass may have a forward without keys."""
    return isinstance(network, AlexNet) and "keys" in inspect.signature(network.forward).parameters


def notes_on(model: nn.Module, seed: int | None) -> list[str]:
    """Notes on how this model will be trained; `seed` is the one that the user gave, if any."""
    notes = []
    if isinstance(model, DistributedDataParallel):
        notes.append(
            "the model came in DistributedDataParallel: each rank prints, stops and keeps its best "
            "weights by its own validation loss, so give all ranks the same validation images"
        )
    network = unwrap(model)
    if seed is not None and not takes_dropout_keys(network):
        notes.append(
            f"seed {seed} changes nothing: {type(network).__name__} has dropout of its own"
        )
    return notes


class TrainingMode:
    """Training mode, but for the submodules that the user has put into evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._evaluating: list[nn.Module] = []

    def set(self) -> None:
        """If the whole model evaluates, the modes of the last training return."""
        if self.model.training:
            self._evaluating = [module for module in self.model.modules() if not module.training]
            return
        self.model.train()
        for module in self._evaluating:
            module.training = False
