"""What a run that goes wrong quietly looks like, said once: a loss that stays at a guess's, a column that no gradient reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from alexnet_mp.model.alexnet import AlexNet

NEAR_A_GUESS = 0.005
"""How near the loss is to ln(classes), relatively, where nothing has been learned."""


class Diagnostics:
    """Watches the epochs of one run."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.said: set[str] = set()
        self.classes = 0
        self._largest: tuple[list[str], Tensor] | None = None

    def record(self, names: list[str], norms: Tensor, classes: int) -> None:
        """The gradients' norms of one step, by parameter, which stay on their device, and the number of logits."""
        self.classes = classes
        if not isinstance(self.model, AlexNet) or len(names) != len(norms):
            return
        if self._largest is None or self._largest[0] != names:
            self._largest = (names, norms)
        else:
            self._largest = (names, torch.maximum(self._largest[1], norms))

    def dead_layers(self) -> dict[int, list[str]]:
        """Column here -> its layers whose parameters all had a zero gradient in every step since the last call: their units are all dead."""
        if self._largest is None:
            return {}
        (names, norms), self._largest = self._largest, None
        reached: dict[tuple[int, str], bool] = {}
        for name, norm in zip(names, norms.tolist(), strict=True):
            _, column, layer, _ = name.split(".")
            reached[int(column), layer] = reached.get((int(column), layer), False) or norm != 0
        dead: dict[int, list[str]] = {}
        for (column, layer), alive in reached.items():
            if not alive:
                dead.setdefault(column, []).append(layer)
        return dead

    def after_epoch(self, epoch: int, loss: float, dead: dict[int, list[str]]) -> list[str]:
        """Lines to print: `loss` is the training loss of `epoch`, `dead` the dead layers of all columns."""
        lines, classes = [], self.classes
        guess = math.log(classes) if classes > 1 else 0.0
        if guess and abs(loss - guess) <= NEAR_A_GUESS * guess:
            lines.append(
                (
                    "guess",
                    f"hint: the training loss of epoch {epoch} is {loss:.4f}, which guessing among {classes} classes gives too "
                    f"(ln {classes} = {guess:.4f}): nothing has been learned yet. Should it stay there: another --lr, larger "
                    "--initial-weights (he), labels that fit the images",
                )
            )
        lines += [
            (
                f"column {column}",
                f"hint: column {column} is dead in {', '.join(layers)}: no gradient reached a weight there in epoch {epoch}, "
                "as its units are all zero; a lower --lr, another --seed or positive --initial-biases keep units alive",
            )
            for column, layers in sorted(dead.items())
        ]
        new = [(key, line) for key, line in lines if key not in self.said]
        self.said |= {key for key, _ in new}
        return [line for _, line in new]
