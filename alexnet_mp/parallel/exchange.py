"""The only module that moves activations between ranks.

A crossing sends this rank's columns to every other rank of its model group and receives theirs. It is a pair of
autograd functions, so that the transfer and the product of the layer's own half overlap:

    forward    Start: send, return at once      own half's product      Finish: wait, hand over the peers' part
    backward   Start: wait, add the peers'      own half's gradients    Finish: send the gradient for the peers

Backward needs no code of its own for this order: autograd runs nodes latest first, and Finish, created after the own
half's product, comes before it. The peers compute DIFFERENT things with what they got, so their gradients are summed.
fc8 is different: its partial logits are summed and every rank computes the SAME loss from them, so the gradient of
the sum is already everywhere and nothing is sent back; an all-reduce there would double every gradient below.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TRAINING, EVALUATION = "training", "evaluation"


class Meter:
    """Counts what this rank sends: values and bytes, by phase, crossing and direction; and how long it waits for its peers.

    `waited` and `under_way` are seconds by phase on the host's clock: inside wait, and from each send to the end of its wait. The
    first is the exchange that is exposed, the rest of the second has work beside it. NCCL lets the GPU wait, not the host: there only
    a trace tells.
    """

    def __init__(self) -> None:
        self.phase = TRAINING
        self.values: dict[tuple[str, str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str, str], int] = defaultdict(int)
        self.exposed_seconds: dict[str, float] = defaultdict(float)
        self.in_flight_seconds: dict[str, float] = defaultdict(float)

    def count(self, crossing: str, direction: str, sent: Tensor, copies: int) -> None:
        """`copies` of `sent` leave this rank; direction is forward or backward."""
        key = (self.phase, crossing, direction)
        self.values[key] += copies * sent.numel()
        self.bytes[key] += copies * sent.numel() * sent.element_size()

    def total_bytes(self, phase: str = TRAINING) -> int:
        """All bytes sent so far in `phase`, both directions."""
        return sum(count for (where, _, _), count in self.bytes.items() if where == phase)

    def total_values(self, crossing: str, direction: str, phase: str = TRAINING) -> int:
        """Values sent so far for one crossing in one direction."""
        return self.values.get((phase, crossing, direction), 0)

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Within it, what is sent is counted under `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


class Transfer:
    """One exchange under way: a tensor to every peer, one of the same shape from every peer.

    Maps travel channels-last, whatever their format on either side: in the format that is fast on most devices nothing is
    copied before it is sent, and one order on the wire can never be taken for another. They arrive in the format of
    what was sent, so that the layer that reads them computes as it would on one device.

    The work objects and the buffers are kept together until `wait`: a buffer that is freed or reused while
    its transfer is under way would be sent, or arrive, as garbage.
    """

    def __init__(self, outgoing: list[Tensor], link: GroupLink, narrow: bool = True) -> None:
        self.like = outgoing[0]
        self.sent = [link.to_wire_format(tensor, narrow) for tensor in outgoing]
        self.received = [
            torch.empty(
                tensor.shape,
                dtype=tensor.dtype,
                device=tensor.device,
                pin_memory=tensor.is_pinned(),
            )
            for tensor in self.sent
        ]
        self.works: list[Any] = []
        if self.sent[
            0
        ].numel():  # a data rank without rows at a short tail: its whole model group has none
            # One batch, so that with NCCL the sends and receives are one group and no order of them can deadlock.
            self.works = dist.batch_isend_irecv(
                [
                    dist.P2POp(operation, tensor, group=link.group, group_peer=peer)
                    for tensors, operation in ((self.sent, dist.isend), (self.received, dist.irecv))
                    for peer, tensor in zip(link.peers, tensors, strict=True)
                ]
            )

    def wait(self) -> list[Tensor]:
        """What the peers sent, in rank order, on the device and in the type and format of what went out."""
        for work in self.works:
            work.wait()
        received = [
            tensor.to(self.like.device, non_blocking=True).to(self.like.dtype)
            for tensor in self.received
        ]
        if self.like.ndim > 2:
            received = [tensor.movedim(-1, 1) for tensor in received]
            received = (
                [tensor.contiguous() for tensor in received]
                if self.like.is_contiguous()
                else received
            )
        self.works, self.sent, self.received = [], [], []
        return received


class _PendingExchange:
    """What the two halves of one crossing share: the transfer under way, first of activations, then of gradients."""

    def __init__(self, link: GroupLink, layer: str) -> None:
        self.link, self.layer = link, layer
        self.transfer: Transfer | None = None
        self.sent_at = 0.0

    def send(self, outgoing: list[Tensor], direction: str, narrow: bool = True) -> None:
        self.sent_at = time.perf_counter()
        self.transfer = Transfer(outgoing, self.link, narrow)
        for tensor in self.transfer.sent:
            self.link.meter.count(self.layer, direction, tensor, 1)

    def wait(self) -> list[Tensor]:
        assert self.transfer is not None
        meter, asked_at = self.link.meter, time.perf_counter()
        with torch.profiler.record_function(f"wait for {self.layer}"):
            received, self.transfer = self.transfer.wait(), None
        arrived_at = time.perf_counter()
        meter.exposed_seconds[meter.phase] += arrived_at - asked_at
        meter.in_flight_seconds[meter.phase] += arrived_at - self.sent_at
        return received


class _Start(torch.autograd.Function):
    """Forward: (N, c, ...) to every peer. Backward: the sum of the gradients that the peers send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _PendingExchange) -> Tensor:
        ctx.flight = flight
        flight.send([x] * len(flight.link.peers), "forward")
        return x.new_empty(0)  # ties Finish to this node in the graph; carries nothing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        first, *others = ctx.flight.wait()
        for gradient in others:
            first = first + gradient
        return first, None


class _Finish(torch.autograd.Function):
    """Forward: what the peers sent. Backward: the gradient for each peer leaves."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _PendingExchange) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return tuple(flight.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.flight.send(list(gradients), "backward")
        return gradients[0].new_empty(0), None


class _SumOfShares(torch.autograd.Function):
    """Forward: the sum over ranks, in rank order on each of them. Backward: identity, the loss is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _PendingExchange) -> Tensor:
        flight.send([x] * len(flight.link.peers), "forward", narrow=False)
        parts = flight.wait()
        parts.insert(
            flight.link.rank, x
        )  # one order of addition, so that all ranks have the same logits bit for bit
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GroupLink:
    """Reaches the columns that live on the other ranks of a process group, each of which holds as many as this one.

    `group` is the model group, its ranks in column order. CUDA tensors go through pinned host memory
    where the group's backend is gloo, which does not send them. `wire` is a narrower type for what travels, but
    for logits, of which every rank must have the same sum; None: as it is.
    """

    def __init__(
        self, group: dist.ProcessGroup, meter: Meter | None = None, wire: torch.dtype | None = None
    ) -> None:
        self.group, self.meter, self.wire = group, meter or Meter(), wire
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.peers = [rank for rank in range(self.size) if rank != self.rank]
        self.through_host = dist.get_backend(group) == "gloo"

    def to_wire_format(self, x: Tensor, narrow: bool = True) -> Tensor:
        """`x` as it travels: (N, c) or (N, H, W, c), and contiguous (gloo sends slices and transposed tensors WRONG, without an error)."""
        x = (x if x.ndim <= 2 else x.movedim(1, -1)).detach()
        x = x.to(self.wire if self.wire and narrow else x.dtype).contiguous()
        if x.is_cuda and self.through_host:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return host.copy_(
                x
            )  # blocking: gloo reads the memory from a thread that knows no stream
        return x

    @torch.compiler.disable  # a compiled graph would be free to move the wait before the own half's product
    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Forward: sends these columns, gives each column here all others. Backward: gradients come back, summed."""
        flight = _PendingExchange(self, layer)
        token = _Start.apply(x[0] if len(x) == 1 else torch.cat(x, 1), flight)

        @torch.compiler.disable
        def arrive() -> list[Tensor]:
            ranks = [list(part.chunk(len(x), 1)) for part in _Finish.apply(token, flight)]
            ranks.insert(self.rank, x)
            columns = [column for rank in ranks for column in rank]
            others = [
                columns[:i] + columns[i + 1 :]
                for i in range(self.rank * len(x), (self.rank + 1) * len(x))
            ]
            return [other[0] if len(other) == 1 else torch.cat(other, 1) for other in others]

        return arrive

    @torch.compiler.disable
    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        """Forward: the sum over all columns, the same on every rank. Backward: identity."""
        share = x[0]
        for part in x[1:]:
            share = share + part
        return _SumOfShares.apply(share, _PendingExchange(self, layer))
