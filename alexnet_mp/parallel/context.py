"""This rank's place in the job: its device, its columns, its groups, and its part of the model.

Adjacent ranks form a model group (one copy of the network), so that exchanges stay on the fastest
links; ranks that hold the same columns of different copies form a data group. Rank r is data rank
r // column_ranks and column rank r % column_ranks: the row-major order of a device mesh ("data",
"column").
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp.config import Config, ModelConfig
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.ops.precision import DTYPES
from alexnet_mp.parallel.collectives import Collectives
from alexnet_mp.parallel.devices import choose_device, device_name, set_threads, tf32
from alexnet_mp.parallel.exchange import GroupLink
from alexnet_mp.parallel.heartbeat import Heartbeat
from alexnet_mp.parallel.launcher import launcher
from alexnet_mp.parallel.lifeline import Lifeline
from alexnet_mp.parallel.placement import choose_column_ranks, describe_copy, spanning_copy
from alexnet_mp.parallel.rendezvous import Meeting, meet, prefixed, shake_hands

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

GROUP_TIMEOUT = 600.0
"""Seconds, at least, that the groups of activations and gradients wait.

NCCL counts from the moment at which an operation is enqueued, while the host runs ahead: a slow
disk or a cold compilation on one rank must not end the others. A lost rank is noticed by its
heartbeat long before.
"""


@dataclass
class ParallelContext(Collectives):
    """Where this rank stands. One rank is the degenerate case: no groups, all columns."""

    device: torch.device
    columns: tuple[int, ...]
    backend: str = "none"
    timeout: float = 60.0
    threads: int = 1
    mesh: DeviceMesh | None = None
    heart: Heartbeat | None = None
    lifeline: Lifeline | None = None
    """To the next rank, where ranks run on several hosts."""
    hosts: tuple[str, ...] = ("",)
    """Of each rank, the host."""
    status: str = "starting"
    """The current activity. The peers print it if this rank falls silent."""
    wire: torch.dtype | None = None
    """A narrower type in which activations travel; None: as they are."""

    @property
    def data_ranks(self) -> int:
        """Copies of the network."""
        return self.world_size // self.column_ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.column_ranks

    @property
    def column_rank(self) -> int:
        return self.rank % self.column_ranks

    @property
    def model_group(self) -> dist.ProcessGroup:
        """The ranks that hold this copy of the network, in column order."""
        return self._group("column")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same columns as this one."""
        return self._group("data")

    def _group(self, name: str) -> dist.ProcessGroup:
        if self.mesh is None:
            raise RuntimeError("one rank has no groups")
        return self.mesh[name].get_group()

    def build_model(self, config: ModelConfig, seed: int) -> AlexNet:
        """This rank's columns of the network on its device, channels-last, linked to the others.

        In that format CPUs pool several times as fast, GPUs convolve faster in half precision, and
        a crossing's maps leave uncopied.
        """
        link = GroupLink(self.model_group, self.meter, self.wire) if self.column_ranks > 1 else None
        model = build_network(config, self.columns, link, seed).to(self.device)
        return model.to(memory_format=torch.channels_last)

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over the data group; `model` itself without copies."""
        if self.data_ranks == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            process_group=self.data_group,
        )

    def close(self) -> None:
        """Leaves the process group; without it torch warns and some backends hang at exit."""
        if self.lifeline is not None:
            self.lifeline.stop()
        if self.heart is not None:
            self.heart.stop()
            self.heart = None
        if self.control is not None:
            dist.destroy_process_group()
            self.control = self.no_timeout_group = None


def init_parallel(config: Config, meeting: Meeting | None = None) -> ParallelContext:
    """Finds this rank's place and, with more than one rank, makes the groups.

    The ranks meet first, unless they have done so: then `meeting` is theirs. ValueError where a
    place cannot be. All that can be refused is refused before the first collective, and nothing
    before it waits longer than `--timeout`.
    """
    columns, run = config.model.columns, config.run
    meeting = meeting or meet(run.timeout)
    environment, store = meeting.environment, meeting.store
    column_ranks = choose_column_ranks(
        columns, environment.world_size, run.column_ranks, meeting.hosts
    )
    context = ParallelContext(
        environment,
        torch.device("cpu"),
        (),
        column_ranks=column_ranks,
        timeout=run.timeout,
        heart=meeting.heart,
        hosts=meeting.hosts,
        wire=None if run.exchange_precision == "same" else DTYPES[run.exchange_precision],
    )
    if context.heart is not None:
        context.heart.status = lambda: context.status
    share = columns // column_ranks
    first = context.column_rank * share
    context.columns = tuple(range(first, first + share))
    context.device = choose_device(run.device, environment)
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)  # before any group: NCCL binds to the current device
    # Before any thread of gloo's, which then keeps to the same cores.
    context.threads = set_threads(run.threads, environment, context.device)
    if store is None:
        if run.backend == "nccl" and context.device.type != "cuda":
            raise ValueError(
                f"--backend nccl: needs CUDA devices, this rank runs on {context.device.type}; "
                "use gloo or auto"
            )
        return context
    context.backend = shake_hands(store, environment, context.device, config)
    _make_groups(context, prefixed("world", store))
    if context.heart is not None and len(set(context.hosts)) > 1:
        assert context.no_timeout_group is not None
        context.lifeline = Lifeline(
            context.no_timeout_group,
            context.rank,
            context.world_size,
            context.heart.notice_closed,
        )
        context.lifeline.start()
    return context


def _make_groups(context: ParallelContext, store: Store) -> None:
    """Makes the default group, both axes of the mesh and the control groups, with their limits.

    Every rank makes every group, in one order. `init_device_mesh` would leave the axes torch's own
    limits: in torch 2.6 those of new groups, later those of the default group.
    """
    if context.backend == "nccl":
        # Else the exchange's kernel may queue behind the own half's, and nothing overlaps.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    limit = timedelta(seconds=max(context.timeout, GROUP_TIMEOUT))
    dist.init_process_group(
        context.backend,
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        timeout=limit,
    )
    ranks = torch.arange(context.world_size, dtype=torch.int).view(-1, context.column_ranks)
    data_groups = [_new_group(column, limit) for column in ranks.t().tolist()]
    model_groups = [_new_group(copy, limit) for copy in ranks.tolist()]
    context.mesh = DeviceMesh.from_group(
        [data_groups[context.column_rank], model_groups[context.data_rank]],
        "cuda" if context.backend == "nccl" else "cpu",
        ranks,
        mesh_dim_names=("data", "column"),
    )
    everyone = list(range(context.world_size))
    context.control = _new_group(everyone, timedelta(seconds=context.timeout), "gloo")
    context.no_timeout_group = _new_group(everyone, timedelta(days=30), "gloo")


def _new_group(
    ranks: list[int], timeout: timedelta, backend: str | None = None
) -> dist.ProcessGroup:
    """A group of `ranks`. Every rank calls it; those outside get a stand-in that no one uses."""
    return cast(dist.ProcessGroup, dist.new_group(ranks, timeout=timeout, backend=backend))


def note_on_hosts(context: ParallelContext) -> str:
    """A line for people where a copy of the network spans hosts, or ""."""
    ranks = spanning_copy(context.hosts, context.column_ranks)
    if not ranks:
        return ""
    return (
        f"note: {describe_copy(context.hosts, ranks)}, so its activations cross the network at "
        "each step (--column-ranks 1 sends gradients instead)"
    )


def describe(context: ParallelContext) -> dict[str, Any]:
    """Versions, devices and placement for config.json."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(context.device),
        "device_name": device_name(context.device),
        "backend": context.backend,
        "ranks": context.world_size,
        "hosts": len(set(context.hosts)),
        "column_ranks": context.column_ranks,
        "data_ranks": context.data_ranks,
        "threads": context.threads,
        "launcher": launcher(),
        "tf32": tf32(context.device),
    }
