"""Runs a function on several ranks: a process each, forked from one server that has torch imported.

    def sum_of_ranks(rank, world_size):                      # at the top level of a test module
        with process_group(rank, world_size):
            x = torch.tensor([rank])
            dist.all_reduce(x)
            return x

    def test_ranks_add_up():
        assert run(sum_of_ranks, 2, 2) == [1, 1]

The first `run` of a session starts the server (a few seconds of imports); a later one takes about a
fifth of a second. Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in its environment, as under torchrun, runs torch on one thread, and has the caller's
folder, sys.path, other environment and warning filters: a warning that is an error here is one
there. A rank's failure is the caller's exception, `RanksFailed`: tracebacks, deaths by signal, and,
when the time is up, which ranks were still running and at which line. No process of a rank outlives
`run`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_work import Work, can_be_imported

TESTS = Path(__file__).resolve().parent
GRACE = 3.0
"""Seconds that other ranks have, once one has failed, to fail as well before they are killed."""

_FOLDER = "RANKS_FOLDER"
"""Environment variable of a rank: the run's own folder, where process groups meet."""
_CONTEXT = multiprocessing.get_context("forkserver")
_LIBRARIES = (
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "numpy",
    "pytest",
)  # the first optimizer imports torch._dynamo: 2 s
_PACKAGE = ("", ".config", ".training.run", ".training.checkpoint", ".cli.train")
_group_numbers = itertools.count()
_failed_at: list[float] = []


class RanksFailed(AssertionError):
    """Some ranks raised, died or hung; the message tells all. Other ranks are in no dictionary."""

    def __init__(self, message: str, failed: dict[int, str], running: dict[int, str]) -> None:
        super().__init__(message)
        self.failed = failed
        """Rank -> its traceback, or how it died; the first cause first."""
        self.running = running
        """Rank -> the stack where it was when its time was up."""


def run(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    grace: float = GRACE,
    nodes: int = 1,
) -> list[Any]:
    """Runs `function(rank, *args)` on `world_size` ranks; returns its results by rank.

    `function` stands at the top level of a module. Arguments and results are copied by pickle,
    tensors too (no memory is shared); `args` are the same on every rank. Nothing is connected yet:
    see `process_group`. With several `nodes` each has as many ranks, and their environment says so,
    as under one torchrun a node. Raises RanksFailed if a rank raises, dies, or has not returned
    `timeout` seconds after all have been started; after a first failure the others have `grace`
    seconds.
    """
    __tracebackhide__ = True
    work = Work.of(function, args)
    start_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _reserved_port() as port:
        places = [
            _Place(rank, world_size, folder, port, timeout + grace + 30, world_size // nodes)
            for rank in range(world_size)
        ]
        processes = []
        try:
            for place in places:
                processes.append(
                    _CONTEXT.Process(
                        target=_rank_main, args=(place, work), name=f"rank {place.rank}"
                    )
                )
                processes[-1].start()
            results, failed, running = _watch(places, processes, timeout, grace)
        finally:
            for place, process in zip(places, processes, strict=False):
                _end(place, process)
        for place in places:
            for line in (
                place.output.read_text(errors="replace").splitlines()
                if place.output.exists()
                else ()
            ):
                print(f"[rank {place.rank}] {line}")
    if failed or running:
        raise RanksFailed(_report(work, world_size, failed, running, timeout), failed, running)
    return results


@contextlib.contextmanager
def process_group(
    rank: int | None = None,
    world_size: int | None = None,
    backend: str = "gloo",
    timeout: float = 30.0,
) -> Iterator[None]:
    """Inside a rank: the default process group of all ranks, destroyed at the end of the block.

    Rank and size are the environment's by default. The ranks meet through a file of this run alone,
    so that no port can be taken. Ranks enter their blocks in the same order.
    """
    meeting = Path(os.environ[_FOLDER]) / f"group{next(_group_numbers)}"
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        timeout=timedelta(seconds=timeout),
        rank=int(os.environ["RANK"]) if rank is None else rank,
        world_size=int(os.environ["WORLD_SIZE"]) if world_size is None else world_size,
    )
    try:
        yield
    except BaseException:
        _failed_at.append(time.monotonic())  # before leaving the group makes the peers fail too
        raise
    finally:
        dist.destroy_process_group()


def start_server() -> None:
    """Starts the server, unless it runs. It dies with this process.

    It is told where the tests and the package are (in Python 3.11 a fork server does not get
    sys.path), and gets no warning options: an import that warns would otherwise end it.
    """
    for path in (str(TESTS.parent), str(TESTS)):
        if path not in sys.path:
            sys.path.insert(0, path)
    if forkserver._forkserver._forkserver_pid is None:
        _CONTEXT.set_forkserver_preload(
            [
                *_LIBRARIES,
                __name__,
                *filter(can_be_imported, ("alexnet_mp" + name for name in _PACKAGE)),
                "rank_warmup",
            ]
        )
    outside = dict(os.environ)
    options, sys.warnoptions = sys.warnoptions, []
    try:
        os.environ.pop("PYTHONWARNINGS", None)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        forkserver.ensure_running()
    finally:
        sys.warnoptions = options
        for name in ("PYTHONWARNINGS", "PYTHONPATH"):
            os.environ.pop(name, None)
        os.environ.update(outside)


@dataclass(frozen=True)
class _Place:
    """One rank's place in a run, and the files through which it speaks to the caller."""

    rank: int
    world_size: int
    folder: str
    port: int
    limit: float
    ranks_per_node: int

    @property
    def outcome(self) -> Path:
        """Pickled (returned?, value or traceback, when); it appears whole or not at all."""
        return Path(self.folder) / f"rank{self.rank}.outcome"

    @property
    def output(self) -> Path:
        """The rank's output."""
        return Path(self.folder) / f"rank{self.rank}.output"

    @property
    def stack(self) -> Path:
        """Where the rank was when it crashed or was asked."""
        return Path(self.folder) / f"rank{self.rank}.stack"

    def read_stack(self) -> str:
        return self.stack.read_text(errors="replace").strip() if self.stack.exists() else ""

    def environment(self) -> dict[str, str]:
        loopback = (
            {"GLOO_SOCKET_IFNAME": "lo"}
            if "lo" in (name for _, name in socket.if_nameindex())
            else {}
        )
        return loopback | {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank % self.ranks_per_node),
            "GROUP_RANK": str(self.rank // self.ranks_per_node),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            # A rank that is killed while it compiles leaves half a file in torch's cache.
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self.folder) / "compiled"),
            _FOLDER: self.folder,
        }


def _rank_main(place: _Place, work: Work) -> None:
    """The process of one rank. It leads a process group of its own, which ends with it."""
    os.setsid()
    with open(place.stack, "w") as stack, open(place.output, "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)
        faulthandler.enable(stack)  # a crash in C says where
        faulthandler.register(signal.SIGUSR1, stack)  # so does a rank that is asked
        faulthandler.dump_traceback_later(
            place.limit, exit=True, file=stack
        )  # should the caller be killed, this ends too
        try:
            os.environ.clear()
            os.environ.update(work.environment | place.environment())
            torch.set_num_threads(1)
            function, args = work.load()
            outcome = pickle.dumps((True, function(place.rank, *args), time.monotonic()))
        except BaseException as error:  # SystemExit too: an argument parser's refusal
            lines = traceback.format_exception(
                type(error), error, error.__traceback__.tb_next or error.__traceback__
            )
            outcome = pickle.dumps((False, "".join(lines), min([*_failed_at, time.monotonic()])))
        unfinished = place.outcome.with_suffix(".part")
        unfinished.write_bytes(outcome)
        unfinished.rename(place.outcome)
        sys.stdout.flush()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)  # nothing that the function started stays


def _watch(
    places: list[_Place], processes: list[Any], timeout: float, grace: float
) -> tuple[list[Any], dict[int, str], dict[int, str]]:
    """Waits for all ranks: (results by rank, failed rank -> how, still running rank -> where)."""
    results: list[Any] = [None] * len(places)
    failures: list[
        tuple[bool, float, int, str]
    ] = []  # sorted, a rank that died without a word comes first: its peers' errors follow from it
    running = dict(enumerate(processes))
    deadline = time.monotonic() + timeout
    while running and (left := deadline - time.monotonic()) > 0:
        ended = connection.wait([process.sentinel for process in running.values()], left)
        for rank in [rank for rank, process in running.items() if process.sentinel in ended]:
            process = running.pop(rank)
            process.join()
            if not places[rank].outcome.exists():
                failures.append(
                    (
                        False,
                        time.monotonic(),
                        rank,
                        f"{_how_it_ended(process.exitcode)}\n{places[rank].read_stack()}".strip(),
                    )
                )
                continue
            returned, value, when = pickle.loads(places[rank].outcome.read_bytes())
            if returned:
                results[rank] = value
            else:
                failures.append((True, when, rank, value.strip()))
        if failures:
            deadline = min(deadline, min(when for _, when, _, _ in failures) + grace)
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    asked = time.monotonic()
    while any(not places[rank].read_stack() for rank in running) and time.monotonic() < asked + 1:
        time.sleep(0.02)
    time.sleep(0.05 if running else 0)  # the stack is not written in one piece
    return (
        results,
        {rank: text for _, _, rank, text in sorted(failures)},
        {rank: places[rank].read_stack() for rank in running},
    )


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"the process ended with exit code {exitcode} before the function had returned"
    name = signal.Signals(-exitcode).name
    return f"the process was killed by {name}" + (
        " (out of memory, perhaps)" if name == "SIGKILL" else ""
    )


def _end(place: _Place, process: Any) -> None:
    """Ends a rank and, if it could not do so itself, the processes that it had started."""
    if process.pid is None:
        return
    if not place.outcome.exists():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():
            process.kill()
    process.join()
    process.close()


def _report(
    work: Work, world_size: int, failed: dict[int, str], running: dict[int, str], timeout: float
) -> str:
    where = f"{work.name} ({Path(work.file).name})"
    parts = [
        f"rank {rank} of {world_size} failed in {where}:\n{text}" for rank, text in failed.items()
    ]
    if running:
        ranks = ", ".join(map(str, running))
        when = "after another rank had failed" if failed else f"after {timeout:g} seconds"
        parts.append(f"still running {when}, and killed: rank {ranks} of {world_size} in {where}")
        parts += [
            f"rank {rank} was here:\n{stack or '(it could not say)'}"
            for rank, stack in running.items()
        ]
    return "\n\n".join(parts)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port, held by a socket that does not listen: no other process gets it, a store may."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
