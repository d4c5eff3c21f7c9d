"""Ranks meet before any process group: the store, the handshake, hosts, and the backend."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from alexnet_mp.config import Config
from alexnet_mp.config.command import how_to_start
from alexnet_mp.config.processes import host_identity
from alexnet_mp.parallel.devices import gpu_identity, is_mig_slice
from alexnet_mp.parallel.heartbeat import Heartbeat, process_identity
from alexnet_mp.parallel.launcher import (
    Environment,
    launcher_keeps_store,
    restarts,
    started_by_torchrun,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MAY_DIFFER = ("device", "threads", "workers")
"""Fields of RunConfig that each rank may have otherwise (of the device only the type is compared).

All others must agree: one rank would wait for what another does not do.
"""


def rendezvous(environment: Environment, timeout: float) -> Store:
    """The store through which ranks find each other; all of them have arrived when it returns.

    ValueError, after `timeout` seconds, names the ranks that did not start.
    """
    rank, size = environment.rank, environment.world_size
    try:
        store = _connect(environment, timeout, master=rank == 0 and not launcher_keeps_store())
        store.set(f"who/{rank}", process_identity())
        store.set(f"arrived/{rank}", str(size))
    except (dist.DistError, RuntimeError) as error:
        missing = (
            f"rank 0 did not answer at {environment.address}:{environment.port}"
            if rank
            else f"port {environment.port} cannot be opened"
        )
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s: {missing} ({_first_line(error)}); "
            + how_to_start()
        ) from None
    try:
        store.wait(["arrived/0"], timedelta(seconds=timeout))
        # Before the wait for all: a rank that expects more of them would wait for those.
        _check_world_size(store, [0, rank])
        store.wait([f"arrived/{other}" for other in range(size)], timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError):
        absent = [str(other) for other in range(size) if not store.check([f"arrived/{other}"])]
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s for rank {', '.join(absent)}, "
            f"which did not start; {how_to_start()}"
        ) from None
    _check_world_size(store, list(range(size)))
    return store


def _connect(environment: Environment, timeout: float, master: bool) -> Store:
    """Opens or joins the store. RuntimeError where that takes longer than `timeout` seconds.

    torch waits without a limit for the first answer, which never comes if another program has the
    port. So a thread waits for it.
    """
    answer: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            store = cast(Any, dist).TCPStore(  # torch's types lack it
                environment.address,
                environment.port,
                environment.world_size,
                is_master=master,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
            answer.put(store)
        except Exception as error:
            answer.put(error)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        found = answer.get(timeout=timeout + 1)
    except queue.Empty:
        raise RuntimeError("another program seems to have this port") from None
    if isinstance(found, Exception):
        raise found
    return prefixed(f"alexnet_mp/{restarts()}", found)


def prefixed(prefix: str, store: Store) -> Store:
    """A view of `store` whose keys meet no others."""
    return cast("Store", cast(Any, dist).PrefixStore(prefix, store))  # torch's types lack it


def _check_world_size(store: Store, ranks: list[int]) -> None:
    sizes = {rank: store.get(f"arrived/{rank}").decode() for rank in ranks}
    for rank, size in sizes.items():
        if size != sizes[0]:
            raise ValueError(
                f"rank {rank} was started with WORLD_SIZE={size}, rank 0 with {sizes[0]}; "
                + how_to_start()
            )


def number_local_ranks(store: Store, environment: Environment) -> Environment:
    """`environment` with the place among the ranks of this host, where the launcher did not say it.

    Ranks share a host if they see the same host name and process numbers: containers of one machine
    are hosts of their own, and so are the pods of a cluster.
    """
    if environment.knows_host:
        return environment
    hosts = [json.loads(store.get(f"who/{rank}"))["host"] for rank in range(environment.world_size)]
    here = [rank for rank, host in enumerate(hosts) if host == hosts[environment.rank]]
    return dataclasses.replace(
        environment,
        local_rank=here.index(environment.rank),
        local_world_size=len(here),
        knows_host=True,
    )


def start_heartbeat(
    environment: Environment, timeout: float, status: Callable[[], str]
) -> Heartbeat | None:
    """Starts the thread that shows `status()` to the other ranks and watches them.

    A single rank has none, but for one of torchrun's, which watches its launcher.
    """
    if environment.world_size == 1 and not started_by_torchrun():
        return None
    # A client of its own: a call that blocks would stall all others that use the same one.
    store = _connect(environment, timeout, master=False) if environment.world_size > 1 else None
    heart = Heartbeat(
        store,
        environment.rank,
        environment.world_size,
        timeout,
        status,
        own_store=not launcher_keeps_store(),
    )
    heart.start()
    return heart


@functools.cache
def code_version() -> str:
    """A digest of the package's sources, which may differ between two hosts."""
    digest = hashlib.blake2b(digest_size=6)
    package = Path(__file__).parents[1]
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def shake_hands(
    store: Store, environment: Environment, device: torch.device, config: Config
) -> str:
    """Compares what all ranks must have in common; returns the backend for all, "nccl" or "gloo".

    ValueError, the same on all ranks, names the first rank that differs from rank 0, and in what.
    """
    mine: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "code": code_version(),
        "host": host_identity(),
        "gpu": gpu_identity(device),
        "mig": is_mig_slice(device),
        "config": common_fields(config),
    }
    store.set(f"here/{environment.rank}", json.dumps(mine))
    ranks = [
        _parse_handshake(rank, store.get(f"here/{rank}"), mine)
        for rank in range(environment.world_size)
    ]
    for rank, other in enumerate(ranks):
        _check_alike(rank, other, ranks[0])
    return _choose_backend(config.run.backend, device, ranks, environment.rank == 0)


def _parse_handshake(rank: int, message: bytes, like: dict[str, Any]) -> dict[str, Any]:
    try:
        handshake = json.loads(message)
        if isinstance(handshake, dict) and handshake.keys() == like.keys():
            return dict(handshake)
    except ValueError:
        pass
    raise ValueError(
        f"rank {rank} sent an invalid handshake; check that all ranks run the same version"
    )


def _check_alike(rank: int, handshake: dict[str, Any], of_rank0: dict[str, Any]) -> None:
    for name, hint in (
        ("device", " (is a GPU hidden from one of them? see CUDA_VISIBLE_DEVICES)"),
        ("torch", ""),
        ("code", " (digests of alexnet_mp's sources: is it installed twice?)"),
        ("config", ""),
    ):
        here, there = of_rank0[name], handshake[name]
        if here == there:
            continue
        if name == "config":
            names = [*here, *(other for other in there if other not in here)]
            name = next(field for field in names if here.get(field) != there.get(field))
            here, there = here.get(name), there.get(name)
            name = f"--{name.replace('_', '-')}"
        raise ValueError(
            f"rank {rank} differs from rank 0 in {name}: "
            f"{here} on rank 0, {there} on rank {rank}{hint}"
        )


def _choose_backend(
    asked: str, device: torch.device, ranks: list[dict[str, Any]], prints: bool
) -> str:
    """NCCL where every rank has a whole GPU of its own, else gloo."""
    on_cuda = device.type == "cuda"
    gpus = {(rank["host"], rank["gpu"]) for rank in ranks}
    shared = on_cuda and len(gpus) < len(ranks)
    sliced = on_cuda and any(rank["mig"] for rank in ranks)
    if asked == "nccl" and (not on_cuda or shared or sliced):
        reason = (
            f"the ranks run on {device.type}"
            if not on_cuda
            else "two ranks share one GPU, which NCCL refuses"
            if shared
            else "the ranks run on slices of GPUs (MIG), which NCCL refuses"
        )
        raise ValueError(f"--backend nccl: {reason}; use --backend gloo or auto")
    if prints and (shared or sliced):
        print(
            (
                f"{len(ranks)} ranks share {len(gpus)} GPU"
                if shared
                else "the ranks run on slices of GPUs (MIG)"
            )
            + ": exchanging through gloo and host memory"
        )
    if asked != "auto":
        return asked
    return "nccl" if on_cuda and not shared and not sliced else "gloo"


def common_fields(config: Config) -> dict[str, Any]:
    """The fields of `config` that all ranks must have in common, by name."""
    parts: dict[str, Any] = config.to_dict()
    run = {name: value for name, value in parts["run"].items() if name not in MAY_DIFFER}
    return dict(parts["model"] | parts["data"] | parts["recipe"] | run, preset=config.preset)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:120]
