"""Starts the commands as people type them, in an environment without a launcher's variables."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import ranks

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


def start_warm(command: list[str], *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """As `start`, for `python launch/NAME.py`: in a process of its own that is forked from the
    server of ranks.py, which has torch imported. A start takes a tenth of a second, not three."""
    python, script = command
    assert python == sys.executable and script.startswith("launch/")
    ranks.start_server()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_script, args=([script, *flags], clean_environment(**environment), streams)
        )
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([*command, *flags], 120)
        texts = [stream.read_text() for stream in streams]
    return subprocess.CompletedProcess([*command, *flags], process.exitcode, *texts)


def _run_script(argv: list[str], environment: dict[str, str], streams: list[Path]) -> None:
    """In the forked process: what Python does with `argv`."""
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def own_lines(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
