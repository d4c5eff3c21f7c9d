"""Starts jobs of several ranks that a fault strikes, and tells how they ended.

Ranks are forked from the tests' fork server, which has torch imported (tests/ranks.py), and run the
real launch/train.py. The parent plays torchrun's agent: it keeps the store and takes no part
otherwise; what torchrun adds is tested in test_torchrun.py.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FAULTS = Path(__file__).resolve().parent
ROOT = FAULTS.parents[1]
sys.path[:0] = [str(path) for path in (ROOT, FAULTS.parent, FAULTS) if str(path) not in sys.path]

import ranks  # noqa: E402  (found by the line above)

_processes_lock = threading.Lock()
"""multiprocessing's starts and joins look at the children of all threads."""

TINY = (
    "--kernels 4 4 4 4 4 --hidden 6 5 --batch-size 8 --limit-train 24 --limit-val 16 "
    "--limit-test 16 --epochs 2 --threads 1 --lr 0.01"
).split()  # three steps, two batches of validation, an epoch


@dataclass(frozen=True)
class Scenario:
    """A job, the fault that strikes one of its ranks, and what must come of it."""

    name: str
    fault: str = ""  # KIND@POINT: see inject.py
    rank: int | None = 1  # whom it strikes; None: every rank
    peers_fault: str = ""  # another fault, which strikes all other ranks
    codes: tuple[int, ...] = (
        1,
        -9,
    )  # exit code of each rank; None: still stopped when the others had ended
    words: str = ""  # a part of the last line that says "error:", or of the output
    once: bool = True  # whether there is exactly one such line
    within: float = 10.0  # seconds from the fault to the end of the last rank
    flags: tuple[str, ...] = ()
    rank_flags: dict[int, tuple[str, ...]] = field(default_factory=dict)  # more flags of one rank
    differs: str = ""  # how `rank` differs: see inject.differ
    world: int = 2
    hosts: int = 1  # over which the ranks are spread, in order; more than one have other names
    whole_host: bool = False  # the fault strikes all ranks of the host of `rank`
    keeps_store: bool = True  # whether the launcher keeps the store, as torchrun does; else rank 0
    last: int | None = (
        None  # the step of the last.pt that must be there and whole; None: not looked at
    )
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How it ended."""

    codes: tuple[int | None, ...]
    screen: str
    seconds: float  # from the fault, or the start, to the end of the last rank that was not stopped
    left: list[int]  # processes of the job that were there afterwards

    @property
    def errors(self) -> list[str]:
        return [line for line in self.screen.splitlines() if line.startswith("error: ")]

    @property
    def last_line(self) -> str:
        return (self.errors or self.screen.strip().splitlines() or [""])[-1]


@functools.cache
def _start_server() -> None:
    """Starts the fork server and waits until it has imported all: no scenario's clock runs then."""
    ranks.start_server()
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()


def run(scenario: Scenario, out: Path, timeout: float = 120.0) -> Outcome:
    """Runs the job in the folder `out` (its files) and beside it (what it says).

    Several threads may do so at once: most scenarios wait most of the time.
    """
    with _processes_lock:
        _start_server()
    note, screen = out.with_name(f"{out.name}.fault"), out.with_name(f"{out.name}.screen")
    screen.write_bytes(b"")
    note.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        store = (
            dist.TCPStore(
                "127.0.0.1",
                0,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=30),
            )
            if scenario.keeps_store
            else None
        )
        port = store.port if store else stack.enter_context(ranks._reserved_port())
        context = multiprocessing.get_context("forkserver")
        started = time.monotonic()
        processes = [
            context.Process(
                target=_rank, args=(scenario, rank, str(out), port, str(screen), str(note))
            )
            for rank in range(scenario.world)
        ]
        try:
            for process in processes:
                with _processes_lock:
                    process.start()
            ended = _wait(processes, started + timeout)
            struck = float(note.read_text()) if note.exists() and note.read_text() else started
            codes = tuple(process.exitcode for process in processes)
            left = [
                pid
                for process in processes
                for pid in session(process.pid)
                if process.exitcode is not None
            ]
        finally:
            for process in processes:
                if process.pid:
                    for pid in session(process.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    _join(process)
        del store
    return Outcome(codes, screen.read_text(errors="replace"), ended - struck, left)


def _wait(processes: list[Any], deadline: float) -> float:
    """Until all have ended but those that are stopped; the time at which the last one did."""
    running, ended = list(processes), time.monotonic()
    while running and time.monotonic() < deadline:
        done = connection.wait([process.sentinel for process in running], 0.2)
        for process in [process for process in running if process.sentinel in done]:
            _join(process)
            running.remove(process)
            ended = time.monotonic()
        if (
            running
            and len(running) < len(processes)
            and all(stopped(process.pid) for process in running)
        ):
            break
    return ended


def _join(process: Any) -> None:
    connection.wait([process.sentinel])
    with _processes_lock:
        process.join()


def stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def session(leader: int) -> list[int]:
    """The processes that run in the session of `leader`: itself and all that it started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, _, its_session = (
                    (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
                )
                if int(its_session) == leader and state not in "ZX":
                    found.append(int(entry.name))
    return found


def _rank(scenario: Scenario, rank: int, out: str, port: int, screen: str, note: str) -> None:
    """One rank: launch/train.py, with all ranks' output on one screen."""
    os.setsid()
    descriptor = os.open(screen, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    local = scenario.world // scenario.hosts
    if scenario.hosts > 1:
        socket.gethostname = lambda: f"node{rank // local}"
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "WORLD_SIZE": str(scenario.world),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        | scenario.environment
    )
    if scenario.keeps_store:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if scenario.world == 1:
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    os.chdir(ROOT)
    torch.set_num_threads(1)
    import inject

    struck = scenario.rank in (None, rank) or (
        scenario.whole_host and scenario.rank // local == rank // local
    )
    if scenario.fault and struck:
        inject.install(scenario.fault.replace("OUT", out), Path(note))
    elif scenario.peers_fault:
        inject.install(scenario.peers_fault, Path(f"{note}-of-peers"))
    if scenario.differs and scenario.rank == rank:
        inject.differ(scenario.differs)
    if f"RANK{rank}_WORLD_SIZE" in scenario.environment:
        os.environ["WORLD_SIZE"] = scenario.environment[f"RANK{rank}_WORLD_SIZE"]
    sys.argv = [
        "launch/train.py",
        *TINY,
        "--timeout",
        "6",
        "--out",
        out,
        *scenario.flags,
        *scenario.rank_flags.get(rank, ()),
    ]
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
