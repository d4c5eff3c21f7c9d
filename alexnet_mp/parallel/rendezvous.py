"""Before any process group: what the launcher said, which device and how many columns are this rank's, and whether all ranks agree."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from alexnet_mp.config import Config
from alexnet_mp.config.command import how_to_start
from alexnet_mp.parallel.heartbeat import Heartbeat, identity

HOW_TO_START = how_to_start()


@dataclass(frozen=True)
class Environment:
    """What the launcher said: torchrun's variables, or one process of its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    @staticmethod
    def read(variables: Mapping[str, str] = os.environ) -> Environment:
        """Raises ValueError, naming the variable, where they are incomplete or not numbers."""
        if "RANK" not in variables and "WORLD_SIZE" not in variables:
            return Environment()
        numbers = {}
        for name, default in (
            ("RANK", None),
            ("WORLD_SIZE", None),
            ("LOCAL_RANK", variables.get("RANK")),
            ("LOCAL_WORLD_SIZE", variables.get("WORLD_SIZE")),
            ("MASTER_PORT", "0"),
        ):
            value = variables.get(name, default)
            if value is None or not value.isdigit():
                raise ValueError(
                    f"the environment has {name}={value!r} but not all that a launcher sets; {HOW_TO_START}"
                )
            numbers[name] = int(value)
        rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
        if rank >= world_size:
            raise ValueError(
                f"the environment has RANK={rank} but WORLD_SIZE={world_size}; {HOW_TO_START}"
            )
        address = variables.get("MASTER_ADDR", "")
        if world_size > 1 and not (address and numbers["MASTER_PORT"]):
            raise ValueError(
                f"the environment has WORLD_SIZE={world_size} but no MASTER_ADDR and MASTER_PORT; {HOW_TO_START}"
            )
        return Environment(
            rank,
            world_size,
            numbers["LOCAL_RANK"],
            numbers["LOCAL_WORLD_SIZE"],
            address,
            numbers["MASTER_PORT"],
        )


def choose_column_ranks(columns: int, world_size: int, asked: int = 0) -> int:
    """How many ranks share one copy of a network of `columns` columns.

    Default: the largest divisor of `columns` that divides `world_size`, but never 1 in a larger world with two or more
    columns: that is data parallelism, which has to be asked for. Raises ValueError naming the sizes that work.
    """
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    if asked:
        if asked not in divisors:
            raise ValueError(
                f"--column-ranks {asked}: {columns} columns divide among {', '.join(map(str, divisors))} ranks"
            )
        if world_size % asked:
            raise ValueError(
                f"--column-ranks {asked}: {world_size} ranks do not divide into groups of {asked}; "
                f"--nproc_per_node must be a multiple of {asked}"
            )
        return asked
    best = max(n for n in divisors if world_size % n == 0)
    if best == 1 and world_size > 1 and columns > 1:
        raise ValueError(
            f"{world_size} ranks cannot share {columns} columns: --nproc_per_node must be 1 or a multiple of "
            f"{' or '.join(str(n) for n in divisors[1:])} (or --column-ranks 1 for pure data parallelism)"
        )
    return best


def choose_device(asked: str, environment: Environment) -> torch.device:
    """This rank's device: its own GPU, the one GPU that all share, MPS for a single rank, or the CPU. ValueError if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not count:
        raise ValueError(
            "--device cuda: this rank sees no CUDA device (CUDA_VISIBLE_DEVICES, driver); --device cpu works without one"
        )
    if count and asked in ("auto", "cuda"):
        if count > 1 and count < environment.local_world_size:
            raise ValueError(
                f"{environment.local_world_size} ranks on this host but {count} GPUs: use --nproc_per_node={count}, "
                "CUDA_VISIBLE_DEVICES=0 to let all share one, or --device cpu"
            )
        return torch.device("cuda", environment.local_rank if count > 1 else 0)
    mps = torch.backends.mps.is_available()
    if asked == "mps" and (not mps or environment.world_size > 1):
        raise ValueError(
            "--device mps: "
            + (
                "MPS serves one rank only; start one, or use --device cpu"
                if mps
                else "this machine has no MPS"
            )
        )
    return torch.device(
        "mps" if mps and asked in ("auto", "mps") and environment.world_size == 1 else "cpu"
    )


def by_torchrun() -> bool:
    """Whether the launcher keeps the store, so that it outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """How often torchrun has started this job's ranks again."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def launcher() -> str:
    """The job of torchrun's that this rank belongs to, the same after a restart; "" without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"process {os.getppid()}" if job == "none" else job


def _client(environment: Environment, timeout: float, master: bool) -> dist.Store:
    store = dist.TCPStore(
        environment.address,
        environment.port,
        environment.world_size,
        is_master=master,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"alexnet_mp/{restarts()}", store)


def rendezvous(environment: Environment, timeout: float) -> dist.Store:
    """The store through which ranks find each other; all of them have arrived when it returns."""
    rank, size = environment.rank, environment.world_size
    try:
        store = _client(environment, timeout, master=rank == 0 and not by_torchrun())
        store.set(f"who/{rank}", identity())
        store.set(f"arrived/{rank}", str(size))
    except (dist.DistError, RuntimeError) as error:
        missing = (
            f"rank 0 did not answer at {environment.address}:{environment.port}"
            if rank
            else f"port {environment.port} cannot be opened"
        )
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s: {missing} ({_first_line(error)}); {HOW_TO_START}"
        ) from None
    try:
        store.wait(["arrived/0"], timedelta(seconds=timeout))
        _check_size(
            store, [0, rank]
        )  # first, since a rank that expects more of them would wait for those
        store.wait([f"arrived/{other}" for other in range(size)], timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError):
        absent = [str(other) for other in range(size) if not store.check([f"arrived/{other}"])]
        raise ValueError(
            f"rank {rank} of {size} waited {timeout:g} s for rank {', '.join(absent)}, which did not start; {HOW_TO_START}"
        ) from None
    _check_size(store, list(range(size)))
    return store


def _check_size(store: dist.Store, ranks: list[int]) -> None:
    sizes = {rank: store.get(f"arrived/{rank}").decode() for rank in ranks}
    for rank, size in sizes.items():
        if size != sizes[0]:
            raise ValueError(
                f"rank {rank} was started with WORLD_SIZE={size}, rank 0 with {sizes[0]}; {HOW_TO_START}"
            )


def start_heartbeat(
    environment: Environment, timeout: float, status: Callable[[], str]
) -> Heartbeat | None:
    """The thread that tells the others what this rank does, and watches them; with one rank of torchrun's, the launcher only."""
    if environment.world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    store = _client(environment, timeout, master=False) if environment.world_size > 1 else None
    heart = Heartbeat(
        store,
        environment.rank,
        environment.world_size,
        timeout,
        status,
        own_store=not by_torchrun(),
    )
    heart.start()
    return heart


@functools.cache
def code_version() -> str:
    """A digest of the package's sources: ranks of two hosts may have two versions of them."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(
        path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".cpp")
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def agree(store: dist.Store, environment: Environment, device: torch.device, config: Config) -> str:
    """Compares what all ranks must have in common and picks the backend. ValueError, the same on all ranks, names who differs."""
    mine = {
        "device": device.type,
        "torch": torch.__version__,
        "code": code_version(),
        "host": socket.gethostname(),
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        "seed": config.run.seed,
        "config": flat(config),
    }
    store.set(f"here/{environment.rank}", json.dumps(mine))
    ranks = [
        _understood(rank, store.get(f"here/{rank}"), mine) for rank in range(environment.world_size)
    ]
    for name, hint in (
        ("device", " (is a GPU hidden from one of them? see CUDA_VISIBLE_DEVICES)"),
        ("torch", ""),
        ("code", " (digests of alexnet_mp's sources: is it installed twice?)"),
        ("seed", ""),
        ("config", ""),
    ):
        for rank, other in enumerate(ranks):
            if other[name] != ranks[0][name]:
                here, there = ranks[0][name], other[name]
                if name == "config":
                    field = next(field for field in here if here[field] != there[field])
                    name, here, there = f"--{field.replace('_', '-')}", here[field], there[field]
                raise ValueError(
                    f"rank {rank} differs from rank 0 in {name}: {here} on rank 0, {there} on rank {rank}{hint}"
                )
    gpus = [(rank["host"], rank["gpu"]) for rank in ranks]
    shared = device.type == "cuda" and len(set(gpus)) < len(gpus)
    asked = config.run.backend
    if asked == "nccl" and (shared or device.type != "cuda"):
        reason = (
            "two ranks share one GPU, which NCCL refuses"
            if shared
            else f"the ranks run on {device.type}"
        )
        raise ValueError(f"--backend nccl: {reason}; use --backend gloo or auto")
    if shared and environment.rank == 0:
        print(
            f"{environment.world_size} ranks share {len(set(gpus))} GPU: exchanging through gloo and host memory"
        )
    return asked if asked != "auto" else "nccl" if device.type == "cuda" and not shared else "gloo"


def _understood(rank: int, message: bytes, like: dict[str, object]) -> dict[str, object]:
    try:
        there = json.loads(message)
        if there.keys() == like.keys():
            return there
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"rank {rank} says of itself what no rank of this program says; do all ranks run the same version of it?"
    )


ALIKE = (
    "precision",
    "compile",
    "cuda_graphs",
    "deterministic",
    "column_ranks",
    "backend",
    "resume",
    "out",
    "save_every",
    "keep_checkpoints",
    "timeout",
)
"""Fields of the run that must agree: what one rank does by them, another waits for."""


def flat(config: Config) -> dict[str, object]:
    """The fields that all ranks must have in common, by name."""
    parts = config.to_dict()
    return (
        {"preset": config.preset}
        | parts["model"]
        | parts["data"]
        | parts["recipe"]
        | {name: parts["run"][name] for name in ALIKE}
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:120]


def set_threads(asked: int, environment: Environment, device: torch.device) -> int:
    """CPU threads of this rank: as asked, or as OMP_NUM_THREADS says, or the cores of this process shared by the ranks of this host.

    torchrun sets OMP_NUM_THREADS=1 where the user set nothing, so with several ranks it says nothing. Ranks that compute on
    the CPU and share out all of its cores each keep to their own: otherwise the system moves them about at every message.
    """
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    ranks = environment.local_world_size
    if not asked and ranks == 1 and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        asked = int(os.environ["OMP_NUM_THREADS"])
    threads = asked or max(1, len(cores) // ranks)
    torch.set_num_threads(threads)
    if (
        device.type == "cpu"
        and ranks > 1
        and threads * ranks == len(cores)
        and hasattr(os, "sched_setaffinity")
    ):
        os.sched_setaffinity(0, cores[environment.local_rank * threads :][:threads])
    return threads
