"""Communication between the steps: sums, gathered values, and work that one rank does for all.

It uses gloo groups on the CPU and is metered apart from the activations, which travel elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_mp.parallel.devices import all_cores
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.meter import Meter

Result = TypeVar("Result")


@dataclass
class Collectives:
    """The control groups of all ranks. One rank is the degenerate case: no groups."""

    environment: Environment
    column_ranks: int = field(default=1, kw_only=True)
    """Ranks that hold one copy of the network."""
    control: dist.ProcessGroup | None = field(default=None, kw_only=True)
    """gloo over all ranks, limited by `--timeout`: flags, sums, checkpoints; never activations."""
    no_timeout_group: dist.ProcessGroup | None = field(default=None, kw_only=True)
    """The same without a time limit: one rank may download, pack or save for hours."""
    meter: Meter = field(default_factory=Meter, kw_only=True)

    @property
    def rank(self) -> int:
        return self.environment.rank

    @property
    def world_size(self) -> int:
        return self.environment.world_size

    @property
    def is_rank0(self) -> bool:
        """Whether this rank speaks for all: prints, shows progress, writes files."""
        return self.rank == 0

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begins to add up `values` (any shape, on the CPU) over all ranks.

        The callable waits for the sum, the same on each rank; `values` stay as they are.
        """
        values = values.clone()
        if self.control is None:
            return lambda: values
        with self.meter.counting("control"):
            self.meter.count("control", "forward", values)
        work = dist.all_reduce(values, group=self.control, async_op=True)

        def arrive() -> Tensor:
            asked_at = time.perf_counter()
            work.wait()
            self.meter.exposed_seconds["control"] += time.perf_counter() - asked_at
            return values

        return arrive

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` (any shape, on the CPU) over all ranks, the same on each."""
        return self.start_sum(values)()

    def sum_on_device(self, values: Tensor) -> None:
        """Adds up `values` over all ranks in place, on their device, without waiting for the sum.

        For one rank, or for NCCL.
        """
        if self.control is None:
            return
        with self.meter.counting("control"):
            self.meter.count("control", "forward", values)
        dist.all_reduce(values)

    def all_reduce_replicas(self, values: Tensor) -> Tensor:
        """The sum of `values` over the copies of the network; the ranks of a copy have the same."""
        return self.sum(values) / self.column_ranks

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), in rank order, on every rank."""
        return self._gather(value, self.control)

    def gather_no_timeout(self, value: Any) -> list[Any]:
        """As `gather`, without a time limit: a lost rank is still noticed by the heartbeat."""
        return self._gather(value, self.no_timeout_group)

    def _gather(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def gather_to_rank0(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On rank 0: the union of all columns' `tensors`, on the CPU. On the others: their own.

        Only the first copy of the network sends; what travels is metered as "checkpoint".
        """
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.control is None or self.column_ranks == 1:
            return tensors
        kinds = self.gather(
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        )
        with self.meter.counting("checkpoint"):
            for sender in range(1, self.column_ranks):
                for name, (shape, dtype) in kinds[sender].items():
                    if self.rank == sender:
                        self.meter.count("weights", "forward", tensors[name])
                        dist.send(tensors[name].contiguous(), group=self.control, group_dst=0)
                    elif self.is_rank0:
                        tensors[name] = torch.empty(shape, dtype=dtype)
                        dist.recv(tensors[name], group=self.control, group_src=sender)
        return tensors

    def broadcast_from_rank0(
        self, tensors: dict[str, Tensor], wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """On every rank: those of rank 0's `tensors` that this rank has `wanted`, on the CPU.

        One tensor at a time, so that no rank but 0 holds all of them. `tensors` of other ranks are
        ignored; what travels is metered as "checkpoint".
        """
        if self.control is None:
            return {name: tensor for name, tensor in tensors.items() if name in wanted}
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        received = {}
        with self.meter.counting("checkpoint"):
            for name, (shape, dtype) in self.gather(kinds)[0].items():
                if self.is_rank0:
                    value = (
                        tensors[name].cpu().contiguous()
                    )  # gloo sends a slice wrong, without an error
                    self.meter.count("weights", "forward", value, self.world_size - 1)
                else:
                    value = torch.empty(shape, dtype=dtype)
                dist.broadcast(value, src=0, group=self.control)
                if name in wanted:
                    received[name] = value
        return received

    def run_on_rank0(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on rank 0 while the others wait, however long; every rank gets its result.

        The result is picklable. An OSError or ValueError of `work` is raised on all ranks alike.
        Ranks that do not see rank 0's files get their content: `run_on_rank0(lambda: read(path))`.
        """
        if self.no_timeout_group is None:
            return work()
        outcome: list[Any] = [None]  # (result, kind of failure, its message)
        if self.is_rank0:
            try:
                outcome = [(work(), None, "")]
            except (OSError, ValueError) as error:
                kind = OSError if isinstance(error, OSError) else ValueError
                outcome = [(None, kind, str(error) or repr(error))]
        dist.broadcast_object_list(outcome, src=0, group=self.no_timeout_group)
        result, kind, message = outcome[0]
        if kind is not None:
            # Rank 0 would end at once, and its connections with it, before the others have read.
            self.gather_no_timeout(None)
            raise kind(message)
        return result  # type: ignore[no-any-return]  # rank 0's, of the type that `work` returns

    def run_once_per_host(
        self,
        work: Callable[[], Result],
        usable: Callable[[Result], bool] = lambda result: False,
    ) -> Result:
        """Runs `work` on the first rank of each host while the others wait, however long.

        That rank's new threads may use all cores of the host, not only its own share.
        Then the others take its result, which is picklable, where it is `usable` to them, and else
        run `work` too: where they see the first rank's files nothing is left to do, and where they
        do not (containers of one host) they make their own. A failure is raised on all ranks, as
        ValueError.
        """
        if self.control is None:
            return work()
        host, known, mine = socket.gethostname(), list[Result](), list[Result]()
        for first in (True, False):
            failure = ""
            if (self.environment.local_rank == 0) == first:
                mine = known if known and usable(known[0]) else []
                if not mine:
                    with all_cores() if first else contextlib.nullcontext():
                        failure, mine = _attempt(work)
            outcomes = self.gather_no_timeout((failure, host, mine if first else []))
            failures = [message for message, *_ in outcomes if message]
            if failures:
                raise ValueError(failures[0])
            # The first rank of this host is the last one before this rank.
            before = [found for _, place, found in outcomes[: self.rank + 1] if place == host]
            known = next((found for found in reversed(before) if found), [])
        return mine[0]


def _attempt(work: Callable[[], Result]) -> tuple[str, list[Result]]:
    """The message of `work`'s failure, or an empty one and its result."""
    try:
        return "", [work()]
    except (OSError, ValueError, RuntimeError) as error:
        return str(error) or repr(error), []
