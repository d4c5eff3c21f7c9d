"""What srun and mpirun tell a process of its place, under the names that torchrun uses.

torchrun and Kubernetes' PyTorchJob set RANK and WORLD_SIZE themselves; then nothing is changed.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PORTS = range(20_000, 29_000)
"""Ports for jobs that name none: below those that systems give to clients, and not torchrun's."""
TORCHRUNS_PORT = 29_500


@dataclass(frozen=True)
class Launcher:
    """A program that starts a process for each rank, and the variables that it sets for them."""

    name: str
    place: tuple[str, str, str, str]
    """Its names of rank, world size, local rank and local world size."""
    job: tuple[str, ...]
    """Variables that tell one job from another, the first one that is set."""
    example: str
    """How a variable is given to all ranks."""


OPEN_MPI = Launcher(
    "mpirun",
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "mpirun -x MASTER_ADDR=HOST ...",
)
MPICH = Launcher(  # Intel MPI, too
    "mpirun",
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_JOBID",),
    "mpirun -genv MASTER_ADDR HOST ...",
)
SLURM = Launcher(
    "srun",
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ("SLURM_JOB_ID",),
    "MASTER_ADDR=HOST srun ...",
)
IN_A_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
"""srun sets them. The batch script, which has SLURM_PROCID and SLURM_NTASKS as well, lacks them."""


def adopt(variables: MutableMapping[str, str] = os.environ) -> None:
    """Gives a process that srun or mpirun started the variables that torchrun would give it."""
    variables.update(translated(variables))


def translated(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables`, and torchrun's names for what srun or mpirun says of several ranks.

    What is set already stays. MASTER_ADDR is added where it is certain: all ranks share this host,
    or srun placed them in the order of its list of hosts.
    """
    launcher = launcher_of(variables)
    if launcher is None:
        return dict(variables)
    place = dict(zip(PLACE, map(variables.get, launcher.place), strict=True))
    if launcher is SLURM:
        place["WORLD_SIZE"] = _slurm_tasks(variables)
        place["LOCAL_WORLD_SIZE"] = _slurm_tasks_here(variables)
    found = {name: value for name, value in place.items() if value is not None}
    if found["WORLD_SIZE"] == "1":
        return dict(variables)
    if found.get("LOCAL_WORLD_SIZE") == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    elif (
        launcher is SLURM
        and variables.get("SLURM_DISTRIBUTION") != "arbitrary"
        and (host := first_host(variables.get("SLURM_STEP_NODELIST", "")))
    ):
        found["MASTER_ADDR"] = host
    found["MASTER_PORT"] = str(_port(launcher, variables))
    return found | dict(variables)


def launcher_of(variables: Mapping[str, str]) -> Launcher | None:
    """The program that started this process as one of several; None for torchrun, or a person.

    mpirun may itself have been started by srun, whose variables then describe mpirun's helpers.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return None
    if {*OPEN_MPI.place[:2]} <= variables.keys():
        return OPEN_MPI
    by_pmi = {*MPICH.place[:2]} <= variables.keys()
    in_a_step = "SLURM_PROCID" in variables and any(name in variables for name in IN_A_STEP)
    by_slurm = in_a_step and _slurm_tasks(variables) is not None
    if by_pmi and by_slurm:  # srun --mpi=pmi2 says the same twice
        own = (variables["SLURM_PROCID"], _slurm_tasks(variables))
        return SLURM if own == (variables["PMI_RANK"], variables["PMI_SIZE"]) else MPICH
    return MPICH if by_pmi else SLURM if by_slurm else None


def first_host(hosts: str) -> str:
    """The first of `hosts` in SLURM's notation: "gpu[03-05,9],login" begins with gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts)
    return re.sub(r"\[([^]\-,]*)[^]]*\]", r"\1", first[0]) if first else ""


def _slurm_tasks(variables: Mapping[str, str]) -> str | None:
    return variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS")


def _slurm_tasks_here(variables: Mapping[str, str]) -> str | None:
    """The step's tasks on this host; None where the list of them, such as "2(x3),1", has no such
    entry.
    """
    counts: list[str] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [match[1]] * int(match[2] or 1)
    node = variables.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def _port(launcher: Launcher, variables: Mapping[str, str]) -> int:
    """A port that is the same for all ranks of a job, and another for most other jobs."""
    job = next((variables[name] for name in launcher.job if name in variables), "")
    if not job:
        return TORCHRUNS_PORT
    step = variables.get("SLURM_STEP_ID", "") if launcher is SLURM else ""
    return PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(PORTS)]
