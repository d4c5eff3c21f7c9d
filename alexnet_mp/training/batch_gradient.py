"""The gradient of one global batch, computed in parts one after the other: gradient accumulation.

Parts change the memory that a step takes, never its result beyond rounding: the loss is a sum over
rows divided by the whole batch, the dropout mask of a row belongs to its place in the global batch,
and crops are drawn for the whole batch before it is divided.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.precision import LossScale, autocast
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.input_checks import LabeledBatch, check_labels
from alexnet_mp.training.metrics import (
    EpochMetrics,
    first_loss_of,
    in_float32,
    is_summed,
    logits_of,
    loss_of,
)
from alexnet_mp.training.wrapped_models import takes_dropout_keys

Criterion: TypeAlias = Callable[[Any, Tensor], Tensor]
"""Takes (output, labels) and gives the loss of a batch: its mean, or its sum if `reduction` is."""


class BatchLoss(NamedTuple):
    """The loss of this rank's rows of a batch, without its graph."""

    loss: Tensor  # a number: the criterion's over all rows
    sums: Tensor  # (4,): what the rows add to the epoch's sums (see EpochMetrics)
    classes: int  # logits of the network


class BatchGradient:
    """Adds up the gradient of a global batch in the parameters of `network`, part by part.

    `parts`: into how many parts each rank divides its rows; a short last batch has fewer, none of
    them empty.
    """

    def __init__(
        self,
        network: nn.Module,
        context: ParallelContext,
        loss_scale: LossScale,
        precision: str,
        seed: int,
        parts: int = 1,
    ) -> None:
        if parts < 1:
            raise ValueError(f"accumulate {parts}: one part or more")
        self.context, self.loss_scale = context, loss_scale
        self.precision, self.seed, self.parts = precision, seed, parts
        self._takes_keys = takes_dropout_keys(network)
        self._loss_checked = False

    def check(self, criterion: Criterion) -> None:
        """ValueError where a `criterion` that gives a mean meets a batch that is divided.

        Its parts may differ in size: the mean of their means is not the mean over the batch.
        """
        if not is_summed(criterion) and (self.context.data_ranks > 1 or self.parts > 1):
            ranks = f"{self.context.data_ranks} data ranks"
            raise ValueError(
                "the criterion gives a mean over the batch; "
                f"{f'{self.parts} parts' if self.parts > 1 else ranks} need its sum "
                '(reduction="sum"), as their parts of a batch may differ in size'
            )

    def compute(
        self,
        replica: nn.Module,
        criterion: Criterion,
        batch: LabeledBatch,
        step: int,
        metrics: EpochMetrics,
    ) -> BatchLoss:
        """Forward and backward of this rank's rows; `replica` is the network or its DDP.

        The images lie on the device. `step` counts from 0 over the whole run. Raises as `check`.
        """
        self.check(criterion)

        def add(part: LabeledBatch) -> BatchLoss:
            with autocast(part.images.device, self.precision):
                output = replica(part.images, *self._dropout_keys(part, step))
            return self._backward(criterion, output, part, metrics)

        *first, last = divide(batch, self.parts)
        found = []
        for part in first:
            with without_all_reduce(replica):
                found.append(add(part))
        # The copies' gradients are added up once, when those of all parts are there.
        found.append(add(last))
        loss, sums = found[0].loss, found[0].sums
        for part_loss in found[1:]:
            loss, sums = loss + part_loss.loss, sums + part_loss.sums
        return BatchLoss(loss, sums, found[0].classes)

    def _backward(
        self, criterion: Criterion, output: Any, part: LabeledBatch, metrics: EpochMetrics
    ) -> BatchLoss:
        """Adds the gradient of the part that the model's `output` belongs to."""
        output = in_float32(output)
        logits = logits_of(output)  # (N, classes)
        check_labels(part.labels, logits.shape[1], "training", criterion)
        labels = part.labels.to(logits.device, non_blocking=True)
        loss = (loss_of if self._loss_checked else first_loss_of)(criterion, output, labels)
        self._loss_checked = True
        share = self._share(loss, part.rows) if is_summed(criterion) else loss
        torch.autograd.backward(share * self.loss_scale.scale)
        sums = metrics.batch(criterion, loss, logits, labels)
        return BatchLoss(loss.detach(), sums, logits.shape[1])

    def _dropout_keys(self, part: LabeledBatch, step: int) -> tuple[Tensor, ...]:
        """The dropout keys of the part's rows, for our own network only."""
        if not self._takes_keys:
            return ()
        end = part.first_row + len(part.images)
        rows = torch.arange(part.first_row, end, device=part.images.device)
        return (dropout_keys(self.seed, step, rows),)

    def _share(self, loss: Tensor, rows: int) -> Tensor:
        """The share that a part with this summed `loss` has in the mean over the global batch.

        It is divided by all `rows` of that batch: right for uneven parts too. DDP averages its
        ranks' gradients, so that is undone.
        """
        return loss / rows * self.context.data_ranks


def divide(batch: LabeledBatch, parts: int) -> list[LabeledBatch]:
    """`batch` in `parts` parts, or in as many as it has rows, whose sizes differ by one at most.

    A batch without rows is one part. The ranks of a model group have the same rows, and so exchange
    the same parts; data ranks may have more parts than others, which exchange nothing but their
    gradients, once.
    """
    count = len(batch.images)
    parts = max(1, min(parts, count))
    if parts == 1:
        return [batch]
    edges = [count * k // parts for k in range(parts + 1)]
    return [
        batch._replace(
            images=batch.images[start:end],
            labels=batch.labels[start:end],
            first_row=batch.first_row + start,
        )
        for start, end in itertools.pairwise(edges)
    ]


def without_all_reduce(replica: nn.Module) -> AbstractContextManager[object]:
    """A block in which DistributedDataParallel leaves each rank's gradients its own."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()
