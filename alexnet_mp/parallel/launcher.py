"""The environment that the launcher sets: torchrun's variables, a scheduler's, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from alexnet_mp.config.command import how_to_start
from alexnet_mp.parallel import schedulers


@dataclass(frozen=True)
class Environment:
    """This process's rank, on its host and in the job, and where rank 0 can be reached."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    knows_host: bool = True
    """Whether both local numbers are known; else `rendezvous.number_local_ranks` finds them."""

    @staticmethod
    def read(variables: Mapping[str, str] = os.environ) -> Environment:
        """The environment that `variables` describe: torchrun's, srun's or mpirun's.

        ValueError names a variable that is missing or no number. LOCAL_RANK and LOCAL_WORLD_SIZE
        may be missing, as in a Kubernetes PyTorchJob or with `RANK=$SLURM_PROCID`.
        """
        variables = schedulers.translated(variables)
        if "RANK" not in variables and "WORLD_SIZE" not in variables:
            return Environment()

        def number(name: str, default: str | None = None) -> int:
            value = variables.get(name, default)
            if value is None or not value.isdigit():
                raise ValueError(
                    f"the environment has {name}={value!r} but not all that a launcher sets; "
                    + how_to_start()
                )
            return int(value)

        rank, world_size, port = number("RANK"), number("WORLD_SIZE"), number("MASTER_PORT", "0")
        if rank >= world_size:
            raise ValueError(
                f"the environment has RANK={rank} but WORLD_SIZE={world_size}; {how_to_start()}"
            )
        address = variables.get("MASTER_ADDR", "")
        if world_size > 1 and not (address and port):
            raise ValueError(_nobody_names_rank0(world_size, address, variables))
        return Environment(
            rank,
            world_size,
            number("LOCAL_RANK", "0"),
            number("LOCAL_WORLD_SIZE", "1"),
            address,
            port,
            world_size == 1 or {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= variables.keys(),
        )


def _nobody_names_rank0(world_size: int, address: str, variables: Mapping[str, str]) -> str:
    """Why ranks cannot meet without MASTER_ADDR and MASTER_PORT, and how these are set."""
    others = {name: variables[name] for name in variables if name not in schedulers.PLACE}
    launcher = schedulers.launcher_of(others)
    if launcher is None or address:
        return (
            f"the environment has WORLD_SIZE={world_size} but no MASTER_ADDR and MASTER_PORT; "
            + how_to_start()
        )
    return (
        f"{launcher.name} started {world_size} ranks and does not say on which host rank 0 runs: "
        f"set MASTER_ADDR to the name of that host (`{launcher.example}`)"
    )


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, whose launcher then is watched."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_keeps_store() -> bool:
    """Whether the launcher keeps the store, so that it outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> int:
    """Returns the number of times that torchrun has restarted this job's ranks."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def names_job() -> bool:
    """Whether torchrun was given a name for the job (--rdzv-id, --standalone)."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"


def launcher() -> str:
    """The torchrun job that this rank belongs to, the same after a restart; "" without torchrun."""
    if names_job():
        return os.environ["TORCHELASTIC_RUN_ID"]
    return f"process {os.getppid()}" if started_by_torchrun() else ""
