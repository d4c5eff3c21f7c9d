"""Records training steps on a rank, for `step_timeline.py`: when each layer's work begins.

The network does not know of it: hooks of its layers, and of the tensors between them, say which
layer's work begins. A layer's block reaches to the beginning of the next one's, so that its ReLU,
norm, pooling and dropout are part of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.gradient_buckets import time_buckets
from alexnet_mp.parallel.meter import TRAINING, Exchange, Timestamp
from alexnet_mp.training.step_timeline import (
    BACKWARD,
    BETWEEN,
    FORWARD,
    RankStep,
    Span,
    TimedExchange,
    cut,
    merge,
)
from alexnet_mp.training.wrapped_models import unwrap

LOSS, FLAGS, UPDATE, BATCH, GRADIENTS = "loss", "flags", "update", "next batch", "gradients"
"""Blocks that belong to no layer. `flags`: norms of the gradients, and the other ranks' flags.
`gradients`: waiting for the gradients of the other copies of the network."""


def why_no_timeline(replica: nn.Module | None) -> str:
    """Why no step of this model can be recorded, or ""."""
    network = None if replica is None else unwrap(replica)
    if not isinstance(network, AlexNet):
        return "only a network of columns has one"
    if getattr(network, "_compiled_call_impl", None) is not None:
        return "the layers of a compiled network run as one; leave --compile and --cuda-graphs out"
    return ""


class StepRecorder:
    """Records steps between `start` and `stop`. On CUDA, times are the device's, of events.

    `replica` is the network, or the network in DistributedDataParallel. `begin_step` and `end_step`
    are called where the device has been waited for; between them nothing waits for it.
    """

    def __init__(self, replica: nn.Module, context: ParallelContext) -> None:
        network = unwrap(replica)
        assert isinstance(network, AlexNet)
        self.replica, self.network = replica, network
        self.context, self.meter = context, context.meter
        self.on_device = context.device.type == "cuda"
        self.steps: list[RankStep] = []
        self._handles: list[Any] = []  # of the hooks
        self._marks: list[tuple[str, str, Timestamp]] = []  # layer, direction, begin of its work
        self._batches: list[tuple[float, float]] = []
        self._gradients_done: Timestamp | None = None

    # --- hooks

    def start(self) -> None:
        """Sets the hooks, between two steps."""
        network, layers = self.network, self.network.config.layers
        self._handles = [
            network.register_forward_pre_hook(lambda *_: self._mark(layers[0], FORWARD)),
            network.register_forward_hook(self._after_forward),
        ]
        for before, layer in pairwise(layers):
            for column in network.columns.values():
                module = column.get_submodule(layer)
                self._handles.append(module.register_forward_pre_hook(self._between(before, layer)))
        for parameter in network.parameters():
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook  # it has no types
                self._handles.append(register(self._after_gradient))
        if isinstance(self.replica, DistributedDataParallel):
            time_buckets(self.replica, self.context.data_group, self.meter)

    def stop(self) -> None:
        """Removes the hooks; DistributedDataParallel keeps its own, which then does no more than
        before.
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self.meter.exchanges = [], None

    def _between(self, before: str, layer: str) -> Callable[..., None]:
        """A hook for the call of `layer`, which reads what `before` gives."""

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._mark(layer, FORWARD)
            self._mark_backward(arguments[0], before)

        return hook

    def _after_forward(self, _: nn.Module, __: Any, logits: Tensor) -> None:
        self._mark(LOSS, FORWARD)
        self._mark_backward(logits, self.network.config.layers[-1])

    def _mark_backward(self, x: Tensor, layer: str) -> None:
        """Once the gradient of `x` is complete, backward works on `layer`, which gave `x`."""
        if x.requires_grad:
            register: Any = x.register_hook  # it has no types
            register(lambda _: self._mark(layer, BACKWARD))

    def _after_gradient(self, _: Tensor) -> None:
        self._gradients_done = self._now()

    def _mark(self, layer: str, direction: str) -> None:
        """From now on this rank works on `layer`. The work of its several columns is one block."""
        evaluates = direction == FORWARD and not torch.is_grad_enabled()
        if not evaluates and (not self._marks or self._marks[-1][:2] != (layer, direction)):
            self._marks.append((layer, direction, self._now()))

    def _now(self) -> Timestamp:
        return self.meter.timestamp(self.on_device)

    # --- steps

    def begin_step(self) -> None:
        """A step begins."""
        self._began, self._wall, self._base = time.perf_counter(), time.time(), self._now()
        self._marks, self._batches, self._gradients_done = [], [], None
        self._exposed = self.meter.exposed_seconds[TRAINING]
        self.meter.exchanges = []

    def add_input(self, asked: float, came: float) -> None:
        """This rank waited for its next batch."""
        self._batches.append((asked, came))

    def begin_update(self) -> None:
        """The optimizer's step begins."""
        self._mark(UPDATE, BETWEEN)

    def end_step(self, number: int) -> None:
        """A step has ended. Keeps its record."""
        seconds = time.perf_counter() - self._began
        exchanges = self.meter.exchanges or []
        crossings = [self._timed(x) for x in exchanges if x.group == "column"]
        buckets = [self._timed(x) for x in exchanges if x.group == "data"]
        waits = [Span(x.layer, x.direction, x.asked, x.received) for x in crossings]
        marks = [(layer, direction, self._seconds(at)) for layer, direction, at in self._marks]
        if self._gradients_done is not None:
            done = self._seconds(self._gradients_done)
            marks = sorted([*marks, (FLAGS, BETWEEN, done)], key=lambda mark: mark[2])
            last = max((x.arrived for x in buckets), default=done)
            if last > done:
                waits.append(Span(GRADIENTS, BACKWARD, done, last))
        ends = [begin for _, _, begin in marks[1:]] + [seconds]
        blocks = [
            Span(layer, direction, begin, end)
            for (layer, direction, begin), end in zip(marks, ends, strict=True)
        ]
        batches = [
            Span(BATCH, BETWEEN, self._seconds(asked), self._seconds(came))
            for asked, came in self._batches
        ]
        self.steps.append(
            RankStep(
                self.context.rank,
                self.context.columns,
                number,
                self._wall,
                seconds,
                self.meter.exposed_seconds[TRAINING] - self._exposed,
                sorted(
                    [*cut(blocks, crossings, [*waits, *batches]), *batches], key=lambda x: x.begin
                ),
                waits,
                [*crossings, *buckets],
            )
        )

    def _timed(self, x: Exchange) -> TimedExchange:
        times = [self._seconds(at) for at in (x.sent, x.asked, x.arrived, x.received)]
        return TimedExchange(x.layer, x.direction, self._peers(x.group), x.bytes, *times)

    def _peers(self, group: str) -> tuple[int, ...]:
        context = self.context
        ranks: Iterable[int] = range(context.column_rank, context.world_size, context.column_ranks)
        if group == "column":
            first = context.rank - context.column_rank
            ranks = range(first, first + context.column_ranks)
        return tuple(rank for rank in ranks if rank != context.rank)

    def _seconds(self, at: Timestamp) -> float:
        """Seconds since the step began on this rank."""
        if isinstance(at, float):
            return at - self._began
        assert not isinstance(self._base, float)
        return float(self._base.elapsed_time(at)) / 1000  # milliseconds

    def typical_step(self, batch: int) -> dict[str, Any] | None:
        """The recorded step whose length is the median, of all ranks; None if there is none.

        All ranks call it. `batch`: images of a step, over all ranks.
        """
        context = self.context
        everywhere: list[list[RankStep]] = context.gather(self.steps)
        if not everywhere[0]:
            return None
        lengths = [step.seconds for step in everywhere[0]]
        chosen = lengths.index(statistics.median_low(lengths))
        return {
            "step": everywhere[0][chosen].number,
            "device": context.device.type,
            "batch": batch,
            "column_ranks": context.column_ranks,
            "data_ranks": context.data_ranks,
        } | merge([steps[chosen] for steps in everywhere])
