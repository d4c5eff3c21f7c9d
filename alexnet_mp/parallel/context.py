"""This rank's place: its device, its columns, its groups, its part of the model.

Adjacent ranks form a model group (one copy of the network); ranks that hold the same columns of different copies form
a data group. Ranks r = data * column_ranks + column, the row-major order of a device mesh ("data", "column").
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp.config import Config, ModelConfig
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.ops.precision import DTYPES
from alexnet_mp.parallel.exchange import GroupLink, Meter
from alexnet_mp.parallel.heartbeat import Heartbeat
from alexnet_mp.parallel.rendezvous import (
    Environment,
    agree,
    choose_column_ranks,
    choose_device,
    launcher,
    rendezvous,
    set_threads,
    start_heartbeat,
)


@dataclass
class ParallelContext:
    """Where this rank stands. One rank is the degenerate case: no groups, all columns."""

    environment: Environment
    device: torch.device
    columns: tuple[int, ...]
    column_ranks: int = 1
    backend: str = "none"
    timeout: float = 60.0
    threads: int = 1
    mesh: Any = None
    store: dist.Store | None = None
    control: dist.ProcessGroup | None = (
        None  # gloo over all ranks: flags, sums, checkpoints; never activations
    )
    heart: Heartbeat | None = None
    meter: Meter = field(default_factory=Meter)
    no_timeout_group: dist.ProcessGroup | None = None  # the same without a time limit
    status: str = "starting"  # what this rank does, for its peers to say should it fall silent
    wire: torch.dtype | None = (
        None  # what activations travel as, where that is narrower than they are
    )

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

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.column_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.column_ranks

    @property
    def column_rank(self) -> int:
        return self.rank % self.column_ranks

    def build_model(self, config: ModelConfig, seed: int) -> AlexNet:
        """This rank's columns of the network, linked to the others', on this rank's device, channels-last.

        In that format CPUs pool several times as fast, GPUs convolve faster in half precision, and a crossing's maps leave uncopied.
        """
        link = (
            GroupLink(self.mesh["column"].get_group(), self.meter, self.wire)
            if self.column_ranks > 1
            else None
        )
        return build_network(config, self.columns, link, seed).to(
            self.device, memory_format=torch.channels_last
        )

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over the data group; itself where there is one copy only."""
        if self.data_ranks == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            process_group=self.mesh["data"].get_group(),
        )

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begins to add up `values` (any shape, on the CPU) over all ranks; the callable waits for the sum, the same on each."""
        values = values.clone()
        if self.control is None:
            return lambda: values
        with self.meter.counting("control"):
            self.meter.count("control", "forward", values, 1)
        work = dist.all_reduce(values, group=self.control, async_op=True)

        def arrive() -> Tensor:
            asked_at = time.perf_counter()
            work.wait()
            self.meter.exposed_seconds["control"] += time.perf_counter() - asked_at
            return values

        return arrive

    def sum_on_device(self, values: Tensor) -> None:
        """Adds up `values` over all ranks in place, on their device, without waiting for it; with one rank, or through NCCL."""
        if self.control is None:
            return
        with self.meter.counting("control"):
            self.meter.count("control", "forward", values, 1)
        dist.all_reduce(values)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` (any shape, on the CPU) over all ranks, the same on each."""
        return self.start_sum(values)()

    def all_reduce_replicas(self, values: Tensor) -> Tensor:
        """`values` of this rank's rows, added to the other copies' of the network; the ranks of one copy have the same and count once."""
        return self.sum(values) / self.column_ranks

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), in rank order, on every rank."""
        return self._gather(value, self.control)

    def _gather(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def gather_to_rank0(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the main rank: the union of all columns' `tensors`, on the CPU. On the others: their own.

        Only the first copy of the network sends; what travels is metered as "checkpoint".
        """
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if self.control is None or self.column_ranks == 1:
            return tensors
        shapes = self.gather({name: tensor.shape for name, tensor in tensors.items()})
        with self.meter.counting("checkpoint"):
            for sender in range(1, self.column_ranks):
                for name, shape in shapes[sender].items():
                    if self.rank == sender:
                        self.meter.count("weights", "forward", tensors[name], 1)
                        dist.send(tensors[name].contiguous(), group=self.control, group_dst=0)
                    elif self.is_rank0:
                        tensors[name] = torch.empty(shape, dtype=next(iter(tensors.values())).dtype)
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
                    value = tensors[name].cpu().contiguous()  # gloo sends a slice wrong, unsaid
                    self.meter.count("weights", "forward", value, self.world_size - 1)
                else:
                    value = torch.empty(shape, dtype=dtype)
                dist.broadcast(value, src=0, group=self.control)
                if name in wanted:
                    received[name] = value
        return received

    def run_once_per_host(self, work: Callable[[], None]) -> None:
        """`work` on the first rank of each host while the others wait; its failure is raised on all ranks.

        The wait has no time limit: a download may take hours.
        """
        if self.control is None:
            return work()
        message = self._attempt(work) if self.environment.local_rank == 0 else None
        failures = [m for m in self.gather_no_timeout(message) if m]
        if failures:
            raise ValueError(failures[0])

    @staticmethod
    def _attempt(work: Callable[[], None]) -> str | None:
        try:
            work()
        except (OSError, ValueError, RuntimeError) as error:
            return str(error) or repr(error)
        return None

    def gather_no_timeout(self, value: Any) -> list[Any]:
        """As `gather`, without a time limit: whoever is waited for may download, pack or save for hours.

        Peers that die or freeze meanwhile are noticed by their heartbeat.
        """
        return self._gather(value, self.no_timeout_group)

    def run_on_rank0(self, work: Callable[[], None]) -> None:
        """`work` on the main rank while the others wait, however long; its OSError or ValueError is raised on all ranks alike."""
        failure = None
        if self.is_rank0:
            try:
                work()
            except (OSError, ValueError) as error:
                failure = (
                    "OSError" if isinstance(error, OSError) else "ValueError",
                    str(error) or repr(error),
                )
        failure = self.gather_no_timeout(failure)[0]
        if failure:
            raise (OSError if failure[0] == "OSError" else ValueError)(failure[1])

    def close(self) -> None:
        """Leaves the process group; without it torch warns and some backends hang at exit."""
        if self.heart is not None:
            self.heart.stop()
            self.heart = None
        if self.control is not None:
            dist.destroy_process_group()
            self.control = self.no_timeout_group = None


def init_parallel(config: Config, environment: Environment | None = None) -> ParallelContext:
    """Finds this rank's place and, with more than one rank, makes the groups. ValueError where that cannot be.

    All that can be refused is refused before the first collective, and nothing waits longer than `--timeout`.
    """
    environment = environment or Environment.read()
    columns, run = config.model.columns, config.run
    column_ranks = choose_column_ranks(columns, environment.world_size, run.column_ranks)
    device = choose_device(run.device, environment)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before any group: NCCL binds to the current device
    threads = set_threads(
        run.threads, environment, device
    )  # before any thread of gloo's, which then keeps to the same cores
    share = columns // column_ranks
    first = environment.rank % column_ranks * share
    context = ParallelContext(
        environment,
        device,
        tuple(range(first, first + share)),
        column_ranks,
        timeout=run.timeout,
        threads=threads,
        wire=None if run.exchange_precision == "same" else DTYPES[run.exchange_precision],
    )
    if environment.world_size == 1:
        if run.backend == "nccl" and device.type != "cuda":
            raise ValueError(
                f"--backend nccl: needs CUDA devices, this rank runs on {device.type}; use gloo or auto"
            )
        context.heart = start_heartbeat(environment, run.timeout, lambda: context.status)
        return context
    store = context.store = rendezvous(environment, run.timeout)
    context.heart = start_heartbeat(environment, run.timeout, lambda: context.status)
    context.backend = agree(store, environment, device, config)
    limit = timedelta(seconds=run.timeout)
    dist.init_process_group(
        context.backend,
        store=dist.PrefixStore("world", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=limit,
    )
    context.mesh = dist.init_device_mesh(
        "cuda" if context.backend == "nccl" else "cpu",
        (context.data_ranks, column_ranks),
        mesh_dim_names=("data", "column"),
    )
    context.control = dist.new_group(backend="gloo", timeout=limit)
    context.no_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return context


def describe(context: ParallelContext) -> dict[str, Any]:
    """Versions, devices and placement for config.json."""
    device = (
        torch.cuda.get_device_name(context.device)
        if context.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(context.device),
        "device_name": device,
        "backend": context.backend,
        "ranks": context.world_size,
        "column_ranks": context.column_ranks,
        "data_ranks": context.data_ranks,
        "threads": context.threads,
        "launcher": launcher(),
        "tf32": tf32(context.device),
    }


def tf32(device: torch.device) -> dict[str, bool] | None:
    """Whether a GPU may multiply float32 with ten bits of mantissa; torch's defaults are no in products and yes in convolutions."""
    if device.type != "cuda":
        return None
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
    }
