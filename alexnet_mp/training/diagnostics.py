"""One-time hints about silent failures: a loss stuck at ln(classes), layers without gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from alexnet_mp.model.alexnet import AlexNet

NEAR_A_GUESS = 0.005
"""A loss within this share of ln(classes) counts as nothing learned."""
FEW_CORRECT = 1.5
"""Times the share of right answers that guessing gives: a network with more has learned something.
"""


class Diagnostics:
    """Watches the epochs of one run. Says nothing about modules other than AlexNet.

    `command_line`: the hints name the flags of the command line.
    """

    def __init__(self, model: nn.Module, command_line: bool = False) -> None:
        self.is_ours, self.command_line = isinstance(model, AlexNet), command_line
        self.said: set[str] = set()
        self.classes = 0  # how many logits the model gives
        self._largest: tuple[list[str], Tensor] | None = None

    def record(self, names: list[str], norms: Tensor) -> None:
        """Notes the norms of one step's gradients, by parameter; they stay on their device."""
        if not self.is_ours or len(names) != len(norms):
            return
        if self._largest is None or self._largest[0] != names:
            self._largest = (names, norms)
        else:
            self._largest = (names, torch.maximum(self._largest[1], norms))

    def dead_layers(self) -> dict[int, list[str]]:
        """Column here -> its layers that no gradient has reached in any step since the last call.

        All units of such a layer are dead. Parameters that do not lie in `columns.<i>.<layer>` are
        passed over.
        """
        if self._largest is None:
            return {}
        (names, norms), self._largest = self._largest, None
        reached: dict[tuple[int, str], bool] = {}
        for name, norm in zip(names, norms.tolist(), strict=True):
            root, *place = name.split(".")
            if root == "columns" and len(place) > 2 and place[0].isdigit():
                key = (int(place[0]), place[1])
                reached[key] = reached.get(key, False) or norm != 0
        dead: dict[int, list[str]] = {}
        for (column, layer), alive in reached.items():
            if not alive:
                dead.setdefault(column, []).append(layer)
        return dead

    def after_epoch(
        self, epoch: int, loss: float, top1: float, dead: dict[int, list[str]]
    ) -> list[str]:
        """Lines to print.

        `loss` and `top1` are those of training in `epoch`, `dead` the dead layers of all columns.
        """
        classes = self.classes
        if not self.is_ours or classes < 2:  # one class alone has no gradient anywhere
            return []
        lines = {}
        guess = math.log(classes)
        if abs(loss - guess) <= NEAR_A_GUESS * guess and top1 < FEW_CORRECT / classes:
            lines["guess"] = (
                f"hint: the training loss of epoch {epoch} is {loss:.4f}, which guessing among "
                f"{classes} classes gives too (ln {classes} = {guess:.4f}): nothing has been "
                "learned yet. If it stays "
                f"there, try another learning rate{self._flag('--lr')} or larger initial "
                f"weights{self._flag('--initial-weights he')}, and see whether the labels fit the "
                "images"
            )
        for column, layers in sorted(dead.items()):
            lines[f"column {column}"] = (
                f"hint: column {column} is dead in {', '.join(layers)}: no gradient reached a "
                f"weight there in epoch {epoch}, as its units are all zero; a lower learning "
                f"rate{self._flag('--lr')}, "
                f"another seed{self._flag('--seed')} or positive initial "
                f"biases{self._flag('--initial-biases')} keep units alive"
            )
        new = {key: line for key, line in lines.items() if key not in self.said}
        self.said |= set(new)
        return list(new.values())

    def _flag(self, flag: str) -> str:
        return f" ({flag})" if self.command_line else ""
