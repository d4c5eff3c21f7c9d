"""How good a network is: mean loss, top-1 and top-5 over images, never over batches; and the average of views and of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Scores:
    """Means over `images` images. Accuracies are fractions of 1; top5 is top-min(5, classes)."""

    loss: float
    top1: float
    top5: float
    images: int


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of (N, classes) rows have their label among the k largest; all of them if there are no more than k classes."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, device: torch.device, criterion: nn.Module | None = None,
             reduce: Callable[[Tensor], Tensor] = lambda sums: sums, precision: Callable[[], AbstractContextManager] = nullcontext) -> Scores:
    """Scores of `model` on batches (images, labels, ...), with no dropout and no augmentation of its own.

    `criterion` gives the mean loss of a batch (default: cross-entropy), or its sum where its `reduction` says so. `reduce`
    adds this rank's sums (float64, CPU) to those of the others and corrects for copies. ValueError if there are no images.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)      # loss, top-1, top-5, images
    for images, labels, *_ in loader:
        images, labels = images.to(device), labels.to(device)
        with precision():
            logits = model(images)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if not len(labels):
            continue
        if criterion is None:
            loss = F.cross_entropy(logits, labels, reduction="sum")
        else:
            loss = criterion(logits, labels) * (1 if getattr(criterion, "reduction", "mean") == "sum" else len(labels))
        counts = [loss, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)]
        sums[:3] += torch.stack([count.to(loss.dtype) for count in counts]).cpu().double()     # one copy from the device
        sums[3] += len(labels)
    model.train(was_training)
    loss, top1, top5, images = reduce(sums).tolist()
    if not images:
        raise ValueError("nothing to evaluate: the loader gave no images")
    return Scores(loss / images, top1 / images, top5 / images, round(images))


Views = Callable[[Tensor], Iterable[Tensor]]
"""Gives the views of a batch of images, uint8, one after another: `Augment.ten_views`, or one that is the centre crop."""


class Average(nn.Module):
    """Several networks, and several views of every image, as one network: `evaluate` takes it like any other.

    Each network's views are averaged, then the networks by their weights, as in 2012 (paper 4.1; `avg-test.py` of the source).
    Views go through a network one by one, so ten need no more memory than one.
    """

    def __init__(self, networks: Sequence[nn.Module], views: Sequence[Views], weights: Sequence[float] | None = None,
                 average: Literal["probabilities", "logits"] = "probabilities") -> None:
        """One of `views` for each network, which may crop and subtract its own mean. `average` is of a network's views."""
        super().__init__()
        self.networks, self.views, self.average = nn.ModuleList(networks), tuple(views), average
        self.weights = tuple(weights or [1.0] * len(networks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes), whose softmax is the average, of images (N, 3, s, s)."""
        answers = []
        for network, views in zip(self.networks, self.views, strict=True):
            outputs = [network(view) for view in views(images)]
            answers.append(blend(outputs, [1.0] * len(outputs), self.average))
        return blend(answers, self.weights)


def blend(outputs: Sequence[Tensor], weights: Sequence[float], average: Literal["probabilities", "logits"] = "probabilities") -> Tensor:
    """Logits whose softmax is the weighted mean of the `outputs`' softmaxes; or the weighted mean of the outputs themselves.

    Cross-entropy of these logits is minus the logarithm of the label's mean probability, also where that is too small for a float.
    Float64 where the device has it; a single output comes back as it is, bit for bit.
    """
    if len(outputs) == 1:
        return outputs[0]
    stacked = torch.stack(list(outputs))                                                   # outputs x N x classes
    stacked = stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)
    shares = stacked.new_tensor(weights)[:, None, None] / sum(weights)
    if average == "logits":
        return (stacked * shares).sum(0)
    return (stacked.log_softmax(2) + shares.log()).logsumexp(0)
