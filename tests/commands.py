"""Starts the commands as people type them, in an environment without a launcher's variables."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "launch/train.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def clean_environment(**more: str) -> dict[str, str]:
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    return (
        {name: value for name, value in os.environ.items() if name not in names}
        | {"PYTHONPATH": str(ROOT)}
        | more
    )


def start(command: list[str], *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, *flags],
        cwd=ROOT,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


def own_lines(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
