"""The only module that moves activations between ranks.

A crossing sends this rank's columns to every other rank of its model group and receives theirs. It
is a pair of autograd functions, Start and Finish, so that a transfer and the product of the layer's
own half overlap. Time runs from left to right in both rows:

    forward     Start: send     ->  own product     ->  Finish: wait  ->  peers' product
    backward    peers' gradient ->  Finish: send    ->  own gradient  ->  Start: wait, add

Backward needs no code of its own for this order: among the nodes that are ready, autograd runs the
one that was created last. Finish was created after the own half's product, so its gradient leaves
before the own half's gradients are computed.

The peers compute DIFFERENT things with the activations they receive, so their gradients are summed.
fc8 is different: its partial logits are summed and every rank computes the SAME loss from them, so
the gradient of the sum is already everywhere and nothing is sent back; an all-reduce there would
double every gradient below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from alexnet_mp.parallel.meter import Exchange, Meter, Timestamp

Method = TypeVar("Method", bound=Callable[..., Any])


class Transfer:
    """One exchange in flight: a tensor to every peer, and one of the same shape from every peer.

    Maps travel channels-last, whatever their format on either side: in the format that is fast on
    most devices nothing is copied before it is sent, and no rank can take one order for another.
    They arrive in the format of what was sent, so that the layer that reads them computes as it
    would on one device.

    The work objects and the buffers are kept together until `wait`: a buffer that is freed or
    reused while its transfer is in flight would be sent, or arrive, as garbage.
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
        self.arrival: Future[float] | None = None
        # At a short tail a data rank may have no rows; then its whole model group has none.
        if self.sent[0].numel():
            # One batch: with NCCL all sends and receives are one group, and no order can deadlock.
            self.works = dist.batch_isend_irecv(
                [
                    dist.P2POp(operation, tensor, group=link.group, group_peer=peer)
                    for tensors, operation in ((self.sent, dist.isend), (self.received, dist.irecv))
                    for peer, tensor in zip(link.peers, tensors, strict=True)
                ]
            )

    def watch(self) -> None:
        """Notes when the peers' tensors arrive, while this rank computes. For gloo."""
        watcher = ThreadPoolExecutor(1, "arrival")
        self.arrival = watcher.submit(self._wait_for_works)
        watcher.shutdown(wait=False)  # the thread ends with its one task

    def _wait_for_works(self) -> float:
        """Waits for all that was received and sent; when the last tensor of a peer was there."""
        half = len(self.works) // 2
        for work in self.works[half:]:
            work.wait()
        arrived = time.perf_counter()
        for work in self.works[:half]:
            work.wait()
        return arrived

    def wait(self) -> list[Tensor]:
        """The peers' tensors, in rank order, as what was sent: device, type, memory format."""
        if self.arrival is not None:
            self.arrival.result()
        else:
            for work in self.works:
                work.wait()
        received = [
            tensor.to(self.like.device, non_blocking=True).to(self.like.dtype)
            for tensor in self.received
        ]
        if self.like.ndim > 2:
            received = [tensor.movedim(-1, 1) for tensor in received]
            if self.like.is_contiguous():
                received = [tensor.contiguous() for tensor in received]
        self.works, self.sent, self.received = [], [], []
        return received


class _PendingExchange:
    """The state that both functions of a crossing share: its transfer, then the gradients'."""

    def __init__(self, link: GroupLink, layer: str) -> None:
        self.link, self.layer, self.direction = link, layer, ""
        self.transfer: Transfer | None = None
        self.sent_at: Timestamp = 0.0

    def send(self, outgoing: list[Tensor], direction: str, narrow: bool = True) -> None:
        self.direction, self.sent_at = direction, self._timestamp(outgoing[0])
        self.transfer = Transfer(outgoing, self.link, narrow)
        if self.link.meter.exchanges is not None and self.link.through_host:
            self.transfer.watch()
        for tensor in self.transfer.sent:
            self.link.meter.count(self.layer, direction, tensor)

    def wait(self) -> list[Tensor]:
        assert self.transfer is not None
        like, arrival = self.transfer.like, self.transfer.arrival
        size = self.transfer.sent[0].nbytes
        asked_at = self._timestamp(like)
        with torch.profiler.record_function(f"wait for {self.layer}"):
            received, self.transfer = self.transfer.wait(), None
        received_at, meter = self._timestamp(like), self.link.meter
        meter.add_wait(self.sent_at, asked_at, received_at)
        if meter.exchanges is not None:
            arrived_at = received_at if arrival is None else arrival.result()
            times = (self.sent_at, asked_at, arrived_at, received_at)
            meter.exchanges.append(Exchange(self.layer, self.direction, "column", size, *times))
        return received

    def _timestamp(self, x: Tensor) -> Timestamp:
        return self.link.meter.timestamp(x.is_cuda and not self.link.through_host)


class _Start(torch.autograd.Function):
    """Forward: sends (N, c, ...) to every peer. Backward: the sum of the gradients they return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _PendingExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.send([x] * len(exchange.link.peers), "forward")
        return x.new_empty(0)  # ties Finish to this node in the graph; carries nothing

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        first, *others = ctx.exchange.wait()
        for gradient in others:
            first = first + gradient
        return first, None


class _Finish(torch.autograd.Function):
    """Forward: the tensors that the peers sent. Backward: sends each peer its gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: _PendingExchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send(list(gradients), "backward")
        return gradients[0].new_empty(0), None


class _SumOfShares(torch.autograd.Function):
    """Forward: the sum over ranks, in rank order. Backward: identity, as all have the same loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _PendingExchange) -> Tensor:
        exchange.send([x] * len(exchange.link.peers), "forward", narrow=False)
        parts = exchange.wait()
        # One order of addition, so that all ranks have the same logits bit for bit.
        parts.insert(exchange.link.rank, x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _not_compiled(method: Method) -> Method:
    """Keeps torch.compile out: it could move the wait before the own half's product."""
    return cast(Method, cast(Any, torch.compiler).disable(method))


class GroupLink:
    """Reaches the columns on the other ranks of a process group, which hold as many as this one.

    `group` is the model group, its ranks in column order. CUDA tensors go through pinned host
    memory where the group's backend is gloo, which does not send them. `wire` is a narrower type
    for what travels, but for logits, of which every rank must have the same sum; None: as it is.

    Gradients through a link can be taken once: a second derivative over ranks raises RuntimeError.

        link = GroupLink(dist.group.WORLD)  # on both ranks, each with a column
        half = AlexNet(preset("paper").model, columns=(dist.get_rank(),), link=link)
    """

    def __init__(
        self, group: dist.ProcessGroup, meter: Meter | None = None, wire: torch.dtype | None = None
    ) -> None:
        self.group, self.meter, self.wire = group, meter or Meter(), wire
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.peers = [rank for rank in range(self.size) if rank != self.rank]
        self.through_host = dist.get_backend(group) == "gloo"

    def to_wire_format(self, x: Tensor, narrow: bool = True) -> Tensor:
        """`x` (N, c, ...) as it travels: (N, c) or (N, H, W, c), detached and contiguous.

        gloo sends slices and transposed tensors WRONG, without an error.
        """
        x = (x if x.ndim <= 2 else x.movedim(1, -1)).detach()
        x = x.to(self.wire if self.wire and narrow else x.dtype).contiguous()
        if x.is_cuda and self.through_host:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            return host.copy_(x)  # blocking: gloo's thread, which reads it, knows no stream
        return x

    @_not_compiled
    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends the columns `x`, each (N, c, ...), and returns at once, before the peers' arrive.

        The callable waits for them. It returns for each column here all other columns,
        (N, c * (columns - 1), ...), in column order. Backward: gradients go back the same way and
        are summed.
        """
        exchange = _PendingExchange(self, layer)
        token = _Start.apply(x[0] if len(x) == 1 else torch.cat(x, 1), exchange)

        @_not_compiled
        def arrive() -> list[Tensor]:
            ranks = [list(part.chunk(len(x), 1)) for part in _Finish.apply(token, exchange)]
            ranks.insert(self.rank, x)
            columns = [column for rank in ranks for column in rank]
            others = [
                columns[:i] + columns[i + 1 :]
                for i in range(self.rank * len(x), (self.rank + 1) * len(x))
            ]
            return [other[0] if len(other) == 1 else torch.cat(other, 1) for other in others]

        return arrive

    @_not_compiled
    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        """The sum of all columns' shares, here `x`, each (N, classes): the same on every rank.

        Backward: identity.
        """
        share = x[0]
        for part in x[1:]:
            share = share + part
        total: Tensor = _SumOfShares.apply(share, _PendingExchange(self, layer))
        return total
