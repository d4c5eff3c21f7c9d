"""One or several trained networks, and one or ten views of each image, as one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.config.arguments import Networks
from alexnet_mp.data import Augment, Loader, Store
from alexnet_mp.inference.load_network import TrainedNetwork, class_difference, read_network
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.ops.allocator import keep_freed_memory
from alexnet_mp.ops.precision import autocast
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.meter import EVALUATION

Average = Literal["probabilities", "logits"]

Views = Callable[[Tensor], Iterable[Tensor]]
"""Yields the views of a batch of uint8 images, e.g. `Augment.ten_views`, or the center alone."""


class EnsembleModel(nn.Module):
    """Averages several networks and several views of every image; used like any other network.

    The views of a network are averaged first, then the networks by their weights, as in 2012
    (P 4.1; `avg-test.py` of the source). Views go through a network one by one, so that ten need no
    more memory than one.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        views: Sequence[Views],
        weights: Sequence[float] | None = None,
        average: Average = "probabilities",
    ) -> None:
        """`views` has one entry for each network, since each crops and subtracts its own mean.

        `average` says what is averaged over the views of one network; over networks it is always
        the probabilities.
        """
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.views, self.average = tuple(views), average
        self.weights = tuple(weights or [1.0] * len(networks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes), whose softmax is the average, of uint8 images (N, 3, s, s)."""
        averages = []
        for network, views in zip(self.networks, self.views, strict=True):
            outputs = [network(view) for view in views(images)]
            averages.append(average_outputs(outputs, [1.0] * len(outputs), self.average))
        return average_outputs(averages, self.weights)


def average_outputs(
    outputs: Sequence[Tensor], weights: Sequence[float], average: Average = "probabilities"
) -> Tensor:
    """Logits whose softmax is the weighted mean of the softmaxes of `outputs`, each (N, classes).

    With `average="logits"`, the weighted mean of the outputs themselves. Cross-entropy of the
    result is minus the logarithm of the label's mean probability, even where that probability is
    too small for a float. float64 where the device has it; a single output is returned unchanged.
    """
    if len(outputs) == 1:
        return outputs[0]
    stacked = torch.stack(list(outputs))  # outputs x N x classes
    stacked = stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)
    shares = stacked.new_tensor(weights)[:, None, None] / sum(weights)
    if average == "logits":
        return (stacked * shares).sum(0)
    return (stacked.log_softmax(2) + shares.log()).logsumexp(0)


class EnsembleRunner:
    """The networks of a request, averaged, on this rank. Every rank makes one.

    Each network has its own crops and mean image. All have the same classes, and cut their crops
    from images of the same side.
    """

    def __init__(self, request: Networks, **changes: Any) -> None:
        """Reads the checkpoints and builds this rank's columns.

        The first checkpoint's configuration, with the fields in `changes`, holds where the request
        leaves something open. Raises ValueError or FileNotFoundError for files that cannot be used.
        """
        self.request = request
        self.members = [read_network(path) for path in request.checkpoint]
        self.first = self.members[0]
        for other in self.members[1:]:
            _check_same(self.first, other)
        # The number of column ranks has to divide every network's number of columns.
        columns = math.gcd(*(member.config.model.columns for member in self.members))
        self.config = self.first.config.with_fields(
            columns=columns,
            precision=request.precision or self.first.config.run.precision,
            **request.machine(),
            **changes,
        )
        self.context = init_parallel(self.config)
        self.precision = self.config.run.precision
        if self.context.device.type == "cpu":
            keep_freed_memory()
        augments = [member.augment(self.context.device) for member in self.members]
        self.augment = augments[0]
        self.model = EnsembleModel(
            [self._build(member) for member in self.members],
            [
                augment.ten_views if request.ten_crop else _center_view(augment)
                for augment in augments
            ],
            request.shares,
            request.average,
        ).eval()

    def _build(self, member: TrainedNetwork) -> AlexNet:
        """This rank's columns of `member`, which may have more of them than other members."""

        def build(model: ModelConfig) -> AlexNet:
            share = model.columns // self.context.column_ranks
            first = self.context.column_rank * share
            placed = replace(self.context, columns=tuple(range(first, first + share)))
            return placed.build_model(model, member.config.run.seed)

        return member.build(build)

    @property
    def views(self) -> int:
        """The number of views of each image that are averaged."""
        return 10 if self.request.ten_crop else 1

    def print_rank0(self, text: str) -> None:
        """Prints on rank 0 only."""
        if self.context.is_rank0:
            print(text, flush=True)

    def introduction(self) -> str:
        """One line for people: the networks, the views, the ranks, the precision."""
        if len(self.members) > 1:
            networks = f"{len(self.members)} networks"
        else:
            networks = f"preset {self.first.config.preset}"
        if self.views > 1:
            views = f"ten views, their {self.request.average} averaged"
        else:
            views = "the center view"
        ranks = self.context.world_size
        where = f"{ranks} rank{'s' * (ranks > 1)} on {self.context.device.type}"
        return f"alexnet_mp: {networks}, {views}, {where}, {self.precision}"

    def loader(self, store: Store, batch_size: int) -> Loader:
        """This rank's images of `store`, uint8, at the side that crops are cut from."""
        return Loader(
            store.resized(self.first.side),
            self.augment,
            batch_size,
            data_rank=self.context.data_rank,
            data_ranks=self.context.data_ranks,
            device=self.context.device,
            raw=True,
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """float64 (N, classes), on the CPU, of uint8 images (N, 3, side, side)."""
        with self.context.meter.counting(EVALUATION), autocast(self.context.device, self.precision):
            logits: Tensor = self.model(images.to(self.context.device))
        return logits.cpu().double().softmax(1)


def _center_view(augment: Augment) -> Views:
    return lambda images: (augment.test(images),)


def _check_same(first: TrainedNetwork, other: TrainedNetwork) -> None:
    """Raises ValueError, naming `other`, where the two cannot be averaged."""
    if other.classes != first.classes:
        difference = class_difference(other.classes, first.classes)
        reason = f"{difference}, unlike in {first.path}"
    elif other.config.model.classes != first.config.model.classes:
        logits = other.config.model.classes, first.config.model.classes
        reason = f"has {logits[0]} logits, {first.path} {logits[1]}"
    elif other.side != first.side:
        reason = f"takes its crops from images of {other.side} pixels, {first.path} of {first.side}"
    else:
        return
    raise ValueError(f"{other.path}: {reason}, so they cannot be averaged")
