"""Stand-ins for sbatch, srun, scontrol and mpirun: they start a job's ranks on this host, with the
variables that the real ones set.

`install` puts them into a folder for PATH. A node has TASKS_PER_NODE tasks, whatever is asked for.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

JOB = "4711"


def install(folder: Path) -> dict[str, str]:
    """Writes the programs into `folder`; returns the environment in which they are found."""
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "mpirun"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        program.chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CLUSTER": str(folder),
        "TASKS_PER_NODE": "1",
    }


def sbatch(argv: list[str]) -> int:
    """Runs the script, one process on the first node, with its variables."""
    script = Path(argv[0]).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))
    variables = {
        "SLURM_JOB_ID": JOB,
        "SLURM_NNODES": asked["nodes"],
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": str(int(asked["nodes"]) * int(asked["ntasks-per-node"])),
    }
    return subprocess.run(["bash", *argv], env=os.environ | variables).returncode


def scontrol(argv: list[str]) -> int:
    """Notes what it was asked for."""
    Path(os.environ["CLUSTER"], "scontrol.txt").write_text(" ".join(argv))
    return 0


def srun(argv: list[str]) -> int:
    options, command = split(argv, with_value=())
    nodes = int(options.get("--nodes") or os.environ["SLURM_NNODES"])
    here = int(os.environ["TASKS_PER_NODE"])
    step = {
        "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID", JOB),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(nodes * here),
        "SLURM_STEP_NUM_TASKS": str(nodes * here),
        "SLURM_STEP_TASKS_PER_NODE": f"{here}(x{nodes})",
        "SLURM_STEP_NODELIST": "localhost,other",
    }
    tasks = [
        step
        | {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % here),
            "SLURM_NODEID": str(rank // here),
        }
        for rank in range(nodes * here)
    ]
    return start(command, tasks)


def mpirun(argv: list[str]) -> int:
    """Open MPI's."""
    options, command = split(argv, with_value=("-np", "-H", "-x"))
    here = int(os.environ["TASKS_PER_NODE"])
    count = len(options["-H"].split(",")) * here
    name, value = options["-x"].split("=")
    tasks = [
        {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(count),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % here),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(here),
            "PMIX_NAMESPACE": f"prterun-host-{os.getpid()}@1",
            name: value,
        }
        for rank in range(count)
    ]
    return start(command, tasks)


def split(argv: list[str], with_value: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The options before the command, and the command."""
    options, rest = dict[str, str](), list(argv)
    while rest[0].startswith("-"):
        name, _, value = rest.pop(0).partition("=")
        options[name] = rest.pop(0) if name in with_value else value
    return options, rest


def start(command: list[str], tasks: list[dict[str, str]]) -> int:
    """Runs `command` once for each task, hands signals on, and returns the largest exit code."""
    processes = [subprocess.Popen(command, env=os.environ | task) for task in tasks]
    signal.signal(signal.SIGUSR1, lambda number, _: [p.send_signal(number) for p in processes])
    Path(os.environ["CLUSTER"], "step.pid").write_text(str(os.getpid()))
    codes = [process.wait() for process in processes]
    return max(128 - code if code < 0 else code for code in codes)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
