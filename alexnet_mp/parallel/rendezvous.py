"""Ranks meet before any process group: the store, the handshake, hosts, and the backend."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from alexnet_mp.config import Config
from alexnet_mp.config.command import how_to_start
from alexnet_mp.config.processes import host_identity
from alexnet_mp.parallel.devices import gpu_identity, is_mig_slice
from alexnet_mp.parallel.heartbeat import STORE_GRACE, Heartbeat, process_identity
from alexnet_mp.parallel.launcher import Environment, launcher_keeps_store, started_by_torchrun
from alexnet_mp.parallel.network import own_address_toward, use_interface_toward

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PREFIX = "alexnet_mp"
"""Before every key in a store, which torchrun may use as well."""
POLL_SECONDS = 0.02
"""Between two looks at the store."""
MAY_DIFFER = ("device", "threads", "workers", "data_dir", "cache_dir")
"""Fields that each rank may have otherwise; the device's type and the images are compared.

All others must agree: one rank would wait for what another does not do.
"""


@dataclass
class Meeting:
    """The ranks of a job once they have found each other; they have no process groups yet."""

    environment: Environment
    store: Store | None = None
    """None for a single rank."""
    heart: Heartbeat | None = None
    hosts: tuple[str, ...] = ("",)
    """Of each rank, `host_identity` of its host."""
    start: int = 1
    """How often the job has been started with the same store, from 1."""

    def ask_rank0(self, work: Callable[[], Any]) -> Any:
        """The result of `work` on rank 0, on every rank, however long it takes.

        It is what JSON can hold. A ValueError or OSError of `work` is raised on all ranks alike.
        Every rank calls it, once.
        """
        if self.store is None:
            return work()
        if self.environment.rank == 0:
            try:
                result = work()
            except (OSError, ValueError) as error:
                self.store.set("rank 0's answer", json.dumps({"error": _first_line(error)}))
                self._until_all_have_heard()
                raise
            self.store.set("rank 0's answer", json.dumps({"result": result}))
            return result
        self.store.wait(["rank 0's answer"], timedelta(days=30))  # should it die, the heart tells
        answer = json.loads(self.store.get("rank 0's answer"))
        self.store.add("heard", 1)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def _until_all_have_heard(self) -> None:
        """Rank 0 may keep the store, which would end with it."""
        assert self.store is not None
        deadline = time.monotonic() + STORE_GRACE
        while self.store.add("heard", 0) < self.environment.world_size - 1:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)


def meet(timeout: float, environment: Environment | None = None) -> Meeting:
    """Waits until all ranks of the job are there; from then on they watch each other.

    `environment` is the launcher's by default. Raises ValueError as `Environment.read` and
    `rendezvous` do.
    """
    environment = environment or Environment.read()
    if environment.world_size == 1:
        # A rank of torchrun's watches its launcher.
        heart = start_heartbeat(environment, timeout, None) if started_by_torchrun() else None
        return Meeting(environment, heart=heart)
    store = rendezvous(environment, timeout)
    who = store.multi_get([f"who/{rank}" for rank in range(environment.world_size)])
    hosts = tuple(str(json.loads(process)["host"]) for process in who)
    environment = number_local_ranks(environment, hosts)
    elsewhere = [rank for rank, host in enumerate(hosts) if host != hosts[environment.rank]]
    if elsewhere:
        theirs = store.get(f"address/{elsewhere[0]}").decode()
        use_interface_toward([theirs, environment.address])
    start = int(store.get("start"))
    own_client = prefixed(f"{PREFIX}/{start}", _connect(environment, timeout, master=False))
    heart = start_heartbeat(environment, timeout, own_client)
    return Meeting(environment, store, heart, hosts, start)


def rendezvous(environment: Environment, timeout: float) -> Store:
    """The store through which ranks find each other; all of them have arrived when it returns.

    Its keys are of this start of the job alone. torchrun may keep one store while it starts the
    ranks again, of other numbers and on other hosts, so rank 0 counts the starts: each other rank
    draws a ticket, and rank 0 answers it with the number. ValueError, after `timeout` seconds,
    names the ranks that did not start.
    """
    rank, size = environment.rank, environment.world_size
    try:
        master = rank == 0 and not launcher_keeps_store()
        job = prefixed(PREFIX, _connect(environment, timeout, master))
        start = job.add("starts", 1) if rank == 0 else _ask_for_start(job, timeout)
        store = prefixed(str(start), job)
        store.set("start", str(start))
        store.set(f"who/{rank}", process_identity())
        store.set(f"address/{rank}", own_address_toward(environment.address))
        store.set(f"arrived/{rank}", str(size))
        store.add("arrivals", 1)
    except (dist.DistError, RuntimeError) as error:
        missing = (
            f"rank 0 did not answer at {environment.address}:{environment.port}"
            if rank
            else f"port {environment.port} cannot be opened; another MASTER_PORT may be free"
        )
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s: {missing} ({_first_line(error)}); "
            + how_to_start()
        ) from None
    try:
        if rank == 0:
            _answer_tickets(job, store, start, size, timeout)
        # Before the wait for all: a rank that expects more of them would wait for those.
        _check_world_size(store, [0, rank])
        patience = timedelta(seconds=timeout if rank else 0.1)  # rank 0 has waited for all already
        store.wait([f"arrived/{other}" for other in range(size)], patience)
    except (dist.DistError, RuntimeError):
        absent = [str(other) for other in range(size) if not store.check([f"arrived/{other}"])]
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s for rank {', '.join(absent)}, "
            f"which did not start; {how_to_start()}"
        ) from None
    _check_world_size(store, list(range(size)))
    return store


def _ask_for_start(job: Store, timeout: float) -> int:
    """Which start of the job this is, from rank 0."""
    ticket = job.add("tickets", 1)
    job.wait([f"answer/{ticket}"], timedelta(seconds=timeout))
    return int(job.get(f"answer/{ticket}"))


def _answer_tickets(job: Store, store: Store, start: int, size: int, timeout: float) -> None:
    """Rank 0 answers all tickets until all ranks have arrived, or for `timeout` seconds.

    A ticket of an earlier start is answered as well: the rank that drew it has ended.
    """
    answered, deadline = 0, time.monotonic() + timeout
    while store.add("arrivals", 0) < size and time.monotonic() < deadline:
        drawn = job.add("tickets", 0)
        for ticket in range(answered + 1, drawn + 1):
            job.set(f"answer/{ticket}", str(start))
        answered = drawn
        time.sleep(POLL_SECONDS)


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
        raise RuntimeError(_why_no_store(environment)) from None
    if isinstance(found, dist.DistError) and not master:
        raise RuntimeError(_why_no_store(environment)) from None
    if isinstance(found, Exception):
        raise found
    return cast("Store", found)


def _why_no_store(environment: Environment) -> str:
    """Why a store that did not answer in time did not."""
    try:
        socket.create_connection((environment.address, environment.port), timeout=1).close()
    except OSError as error:
        return f"{error.strerror or error}: is rank 0 running there?"
    return "another program seems to have this port"


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


def number_local_ranks(environment: Environment, hosts: Sequence[str]) -> Environment:
    """`environment` with the place among the ranks of this host, where the launcher did not say it.

    `hosts` has the host of each rank. Ranks share a host if they see the same host name and process
    numbers: containers of one machine are hosts of their own, and so are the pods of a cluster.
    """
    if environment.knows_host:
        return environment
    here = [rank for rank, host in enumerate(hosts) if host == hosts[environment.rank]]
    return dataclasses.replace(
        environment,
        local_rank=here.index(environment.rank),
        local_world_size=len(here),
        knows_host=True,
    )


def start_heartbeat(environment: Environment, timeout: float, store: Store | None) -> Heartbeat:
    """Starts the thread that shows to the other ranks what this one does, and watches them.

    `store` is a client of its own: a call that blocks would stall all others that use the same one.
    """
    heart = Heartbeat(
        store,
        environment.rank,
        environment.world_size,
        timeout,
        lambda: "starting",
        own_store=not launcher_keeps_store(),
        local_rank=environment.local_rank,
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
    fields = parts["model"] | parts["data"] | parts["recipe"] | parts["run"]
    return {name: fields[name] for name in fields if name not in MAY_DIFFER} | {
        "preset": config.preset
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:120]
