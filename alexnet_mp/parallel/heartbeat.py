"""How ranks know that the others are alive, and who says why all of them end.

Every rank has a thread that writes a beat to the store about once a second and reads the others'. A rank whose process is gone is
noticed at once where it ran on this host, one that is frozen (stopped, stuck in the kernel, on a machine that has gone) once it has
been silent for three quarters of `--timeout`, before any collective gives up. A rank that works long is not silent: its thread beats.
The first cause that is posted is the only one that is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

SILENCE = 0.75  # of --timeout, after which a silent rank counts as frozen
GRACE = 5.0  # seconds that the main thread has to end by itself once a peer is known to be lost, e.g. to finish writing a file
ORPHANED = 30.0  # seconds that a rank has to save and end once its launcher is gone: what torchrun itself gives

WITHOUT_STORE = "rank 0 died, and with it the connection between the ranks"

_current: list[Heartbeat] = []


def current() -> Heartbeat | None:
    """This process's heartbeat, while it is connected to others."""
    return _current[-1] if _current else None


def identity() -> str:
    """This process, for ranks of the same host to look for."""
    return json.dumps({"pid": os.getpid(), "host": _host()})


def _host() -> str:
    """This host and its space of process numbers: containers may share a host's name, but not its processes."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def state_of(pid: int) -> str:
    """One letter as in /proc ("R" where the system has no /proc), "" for a process that has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return "" if state in "ZX" else state
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass
    except OSError:
        return "R"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "R"


class Heartbeat(threading.Thread):
    """Beats and watches until `stop`. With no store (one rank) it only watches the launcher."""

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        timeout: float,
        status: Callable[[], str],
        own_store: bool,
    ) -> None:
        """`store` is this thread's own client: one that waits holds up all that use it. `own_store`: rank 0 keeps it, not the launcher."""
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world_size, self.status, self.own_store = (
            store,
            rank,
            world_size,
            status,
            own_store,
        )
        self.interval, self.limit = min(1.0, timeout / 10), SILENCE * timeout
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._ended, self._store_lock = threading.Event(), threading.Lock()
        self.store_lost = self._said = False
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when it was new
        self._who: dict[int, dict[str, object]] = {}

    def start(self) -> None:
        _current.append(self)
        super().start()

    def stop(self) -> None:
        """Leaves without alarm. Rank 0, where it keeps the store, waits for the others to have left it."""
        self._ended.set()
        with contextlib.suppress(RuntimeError, ValueError):
            if self.store is not None:
                with self._store_lock:
                    self.store.set(f"left/{self.rank}", "1")
                deadline = time.monotonic() + 5
                while (
                    self.rank == 0
                    and self.own_store
                    and time.monotonic() < deadline
                    and not self._have_left(range(self.world_size))
                ):
                    time.sleep(0.02)
        with contextlib.suppress(ValueError):
            _current.remove(self)

    def run(self) -> None:
        number, last = 0, time.monotonic()
        while not self._ended.wait(self.interval):
            if self.launcher is not None and os.getppid() != self.launcher:
                return self._orphaned()
            if self.store is None:
                continue
            started, number = time.monotonic(), number + 1
            try:
                with self._store_lock:
                    self.store.set(f"beat/{self.rank}", f"{number} {self.status()}")
                    others = [rank for rank in range(self.world_size) if rank != self.rank]
                    there = [rank for rank in others if self.store.check([f"beat/{rank}"])]
                    beats = (
                        dict(
                            zip(
                                there,
                                self.store.multi_get([f"beat/{rank}" for rank in there]),
                                strict=True,
                            )
                        )
                        if there
                        else {}
                    )
            except (RuntimeError, ValueError) as error:
                return self._store_lost(error)
            now = time.monotonic()
            if (
                now - last > 5 * self.interval + 2
            ):  # this process, or the store, stood still itself: the others' silence says nothing
                self._seen = {}
            last = started
            for rank in others:
                beat = beats.get(rank, b"").decode(errors="replace")
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
                if (
                    (reason := self._lost(rank, now))
                    and not self._ended.is_set()
                    and not self._has_left(rank)
                ):
                    return self._end(f"rank {rank} {reason}")

    def _lost(self, rank: int, now: float) -> str | None:
        """Why `rank` counts as lost; None while it is well."""
        if rank not in self._who:
            with self._store_lock:
                self._who[rank] = json.loads(self.store.get(f"who/{rank}"))
        who, (beat, when) = self._who[rank], self._seen[rank]
        doing = beat.partition(" ")[2] or "starting"
        state = state_of(int(who["pid"])) if who["host"] == _host() else "R"
        if not state:
            return f"died: its process {who['pid']} ended without a word (killed, or out of memory); last seen: {doing}"
        if now - when > self.limit:
            frozen = (
                "its process is stopped"
                if state in "Tt"
                else "it is frozen, or its machine or network is gone"
            )
            return f"has been silent for {now - when:.0f} s: {frozen} (process {who['pid']}); last seen: {doing}"
        return None

    def _has_left(self, rank: int) -> bool:
        """Whether `rank` ended as it should.

        A posted cause does not count: that rank is gone all the same, and a main thread that waits for it in NCCL never returns.
        """
        time.sleep(min(0.3, self.interval))  # it may be about to say so
        with contextlib.suppress(RuntimeError):
            return self._have_left([rank])
        return False

    def _have_left(self, ranks: range | list[int]) -> bool:
        with self._store_lock:
            return bool(self.store.check([f"left/{rank}" for rank in ranks]))

    def cause(self) -> str | None:
        """What has been posted by whichever rank was first."""
        if self.store is None or self.store_lost:
            return None
        try:
            with self._store_lock:
                return (
                    self.store.get("cause").decode(errors="replace")
                    if self.store.check(["cause"])
                    else None
                )
        except (RuntimeError, ValueError):
            self.store_lost = True
            return None

    def post(self, message: str) -> tuple[bool, str]:
        """Posts why this rank ends: (whether it is the first and so should say it, the cause)."""
        if self.store is not None and not self.store_lost:
            mine = f"{message}\n{self.rank} {os.getpid()}"
            try:
                with self._store_lock:
                    first = self.store.compare_set("cause", "", mine).decode(errors="replace")
                return first == mine, first.partition("\n")[0]
            except (RuntimeError, ValueError):
                self.store_lost = True
        said, self._said = self._said, True  # by this rank: the others are beyond reach
        return not said, message

    def wait_for_cause(self, seconds: float) -> str | None:
        """The posted cause, should there be one within `seconds`."""
        deadline = time.monotonic() + seconds
        while (
            (cause := self.cause()) is None and not self.store_lost and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        return cause.partition("\n")[0] if cause else None

    def _end(self, message: str, grace: float = GRACE) -> None:
        """Says why, if no other rank has, and ends this process, whose main thread may be waiting for the lost rank."""
        first, cause = self.post(message)
        if first:
            print(f"error: {message}", file=sys.stderr, flush=True)
        tell_torchrun(cause)
        if not self._ended.wait(grace if "died" in message else 0.0):
            _leave(1)

    def _store_lost(self, error: Exception) -> None:
        """The store is gone: with the launcher that kept it, or with rank 0."""
        self.store_lost = True
        if self._ended.wait(self.interval):
            return
        if self.own_store and self.rank != 0:
            self._end(WITHOUT_STORE)
        elif not self.own_store:
            self._orphaned()

    def _orphaned(self) -> None:
        """The launcher is gone. As at a SIGTERM: finish the step, save, end; but not for long."""
        print("the launcher is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._ended.wait(ORPHANED):
            _leave(128 + signal.SIGTERM)


def _leave(code: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def tell_torchrun(message: str) -> None:
    """Leaves the cause where torchrun looks for it, so that its own last lines end with the cause too."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {
            "message": {
                "message": message,
                "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))},
            }
        }
        with (
            contextlib.suppress(OSError),
            open(path, "w", encoding="utf-8") as file,
        ):  # without it torchrun says where to look
            json.dump(content, file)
