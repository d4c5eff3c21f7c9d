"""How good a network is: mean loss, top-1 and top-5 over images, never over batches; and an epoch's figures as a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

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
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device,
    criterion: nn.Module | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Scores:
    """Scores of `model` on batches (images, labels, ...), with no dropout and no augmentation of its own.

    `criterion` gives the mean loss of a batch (default: cross-entropy), or its sum where its `reduction` says so. `reduce`
    adds this rank's sums (float64, CPU) to those of the others and corrects for copies. ValueError if there are no images.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images
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
            loss = criterion(logits, labels) * (
                1 if getattr(criterion, "reduction", "mean") == "sum" else len(labels)
            )
        counts = [loss, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)]
        sums[:3] += (
            torch.stack([count.to(loss.dtype) for count in counts]).cpu().double()
        )  # one copy from the device
        sums[3] += len(labels)
    model.train(was_training)
    loss, top1, top5, images = reduce(sums).tolist()
    if not images:
        raise ValueError("nothing to evaluate: the loader gave no images")
    return Scores(loss / images, top1 / images, top5 / images, round(images))


EPOCH_HEADER = "epoch    step        lr   train loss  train top-1   val loss  val top-1  val top-5  grad norm  images/s  seconds"


def epoch_line(record: dict[str, Any]) -> str:
    """One object of history.jsonl as a line under EPOCH_HEAD."""
    return (
        f"{record['epoch']:5d} {record['step']:7d} {record['lr']:9.2g} {record['train_loss']:12.4f} {record['train_top1']:12.1%} "
        f"{record['val_loss']:10.4f} {record['val_top1']:10.1%} {record['val_top5']:10.1%} {record['grad_norm']:10.3f} "
        f"{record['images_per_second']:9.0f} {record['seconds']:8.1f}"
    )
