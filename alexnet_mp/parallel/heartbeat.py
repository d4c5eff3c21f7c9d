"""Ranks watch each other; when one is lost, all end and one cause is printed.

Every rank has a thread that writes a beat to the store about once a second and reads the others'.
A rank whose process is gone is noticed at once where it ran on this host, and on other hosts by
its connection, which the system closes (`lifeline.py`); one that is frozen (stopped, stuck in the
kernel, on a machine without power or network) once it has been silent for three quarters of
`--timeout`. A rank that works long is not silent: its thread beats. The first cause that a rank
posts is the only one that is printed (`report`), and all ranks end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from alexnet_mp.config.processes import host_identity, process_state
from alexnet_mp.parallel.failure import tell_torchrun
from alexnet_mp.parallel.launcher import started_by_torchrun

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SILENCE = 0.75
"""Share of `--timeout` after which a silent rank is frozen: before any collective gives up."""

GRACE = 5.0
"""Seconds that the main thread has to end by itself once a peer has died, e.g. to finish a file."""

ORPHANED = 30.0
"""Seconds that a rank has to save and end once its launcher is gone, as torchrun itself gives."""

STORE_GRACE = 5.0
"""Seconds that rank 0 keeps its store for the others to leave it."""

WITHOUT_STORE = "rank 0 died, and with it the connection between the ranks"

_current: list[Heartbeat] = []


def current() -> Heartbeat | None:
    """This process's heartbeat, while it is connected to others."""
    return _current[-1] if _current else None


def report(message: str, details: Callable[[], None] | None = None) -> str:
    """Prints "error: `message`", after `details()`, unless another rank has posted its cause first.

    Returns the cause that all ranks share, which torchrun is told as well.
    """
    heart = current()
    first, cause = heart.post(message) if heart else (True, message)
    if first:
        if details is not None:
            details()
        print(f"error: {message}", file=sys.stderr, flush=True)
    tell_torchrun(cause)
    return cause


def process_identity() -> str:
    """This process, for ranks of the same host to look for."""
    return json.dumps({"pid": os.getpid(), "host": host_identity()})


class Heartbeat(threading.Thread):
    """Beats and watches until `stop`. With no store (one rank) it only watches the launcher."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        timeout: float,
        status: Callable[[], str],
        own_store: bool,
        local_rank: int = 0,
    ) -> None:
        """`store` is a client of this thread's own: a blocking call would stall other users.

        `status` tells what this rank does. `own_store`: rank 0 keeps the store, not the launcher.
        """
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.status, self.own_store, self.local_rank = status, own_store, local_rank
        self.interval, self.limit = min(1.0, timeout / 10), SILENCE * timeout
        self.launcher = os.getppid() if started_by_torchrun() else None
        self._ended, self._store_lock = threading.Event(), threading.Lock()
        self.store_lost = self._said = False
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when it was new
        self._who: dict[int, dict[str, Any]] = {}  # rank -> its process and host
        self._closed: set[int] = set()  # ranks whose connection has closed

    def start(self) -> None:
        _current.append(self)
        super().start()

    def stop(self) -> None:
        """Leaves without alarm. Rank 0, if it keeps the store, waits until the others have left."""
        self._ended.set()
        with contextlib.suppress(RuntimeError, ValueError):
            if self.store is not None:
                with self._store_lock:
                    self.store.set(f"left/{self.rank}", "1")
                deadline = time.monotonic() + STORE_GRACE
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
        if self.store is not None and self.rank != 0:
            with contextlib.suppress(RuntimeError, ValueError):
                self._process(0)  # later, its store may be gone
        while not self._ended.wait(self.interval):
            if self.launcher is not None and os.getppid() != self.launcher:
                return self._orphaned()
            if self.store is None:
                continue
            started, number = time.monotonic(), number + 1
            try:
                beats = self._exchange_beats(number)
            except (RuntimeError, ValueError):
                return self._lost_store()
            now = time.monotonic()
            if now - last > 5 * self.interval + 2:
                # This process, or the store, stood still itself: the others' silence tells nothing.
                self._seen = {}
            last = started
            if (cause := self.cause()) is not None:
                return self._follow(cause)
            for rank, beat in beats.items():
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = (beat, now)
                reason = self._reason_lost(rank, now)
                if reason and not self._ended.is_set() and not self._has_left(rank):
                    return self._end(f"rank {rank} {reason}", grace=self._grace(rank))

    def notice_closed(self, rank: int) -> None:
        """Another thread tells that the connection to `rank` has closed."""
        self._closed.add(rank)

    def _exchange_beats(self, number: int) -> dict[int, str]:
        """Writes this rank's beat and reads the others', "" of a rank that has none yet."""
        assert self.store is not None
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        with self._store_lock:
            self.store.set(f"beat/{self.rank}", f"{number} {self.status()}")
            here = [rank for rank in others if self.store.check([f"beat/{rank}"])]
            values = self.store.multi_get([f"beat/{rank}" for rank in here]) if here else []
        beats = dict(zip(here, values, strict=True))
        return {rank: beats.get(rank, b"").decode(errors="replace") for rank in others}

    def _reason_lost(self, rank: int, now: float) -> str | None:
        """Why `rank` counts as lost; None while it is well."""
        beat, new_at = self._seen[rank]
        doing = beat.partition(" ")[2] or "starting"
        pid, state = self._process(rank)["pid"], self._state(rank)
        elsewhere = self._elsewhere(rank)
        if not state or (elsewhere and rank in self._closed):
            return (
                f"died: its process {pid}{elsewhere} ended without a word (killed, or out of "
                f"memory); last seen: {doing}"
            )
        if now - new_at > self.limit:
            frozen = (
                "its process is stopped"
                if state in "Tt"
                else "it is frozen, or its machine or network is gone"
            )
            return (
                f"has been silent for {now - new_at:.0f} s: {frozen} (process {pid}{elsewhere}); "
                f"last seen: {doing}"
            )
        return None

    def _process(self, rank: int) -> dict[str, Any]:
        if rank not in self._who:
            assert self.store is not None
            with self._store_lock:
                self._who[rank] = json.loads(self.store.get(f"who/{rank}"))
        return self._who[rank]

    def _state(self, rank: int) -> str:
        """The state of the rank's process as in /proc, "" if it has ended; "R" on another host."""
        process = self._process(rank)
        return process_state(int(process["pid"])) if process["host"] == host_identity() else "R"

    def _elsewhere(self, rank: int) -> str:
        """ " on HOST" where the rank runs on another host than this one."""
        host = str(self._process(rank)["host"])
        return "" if host == host_identity() else f" on {host.partition(' ')[0]}"

    def _grace(self, rank: int) -> float:
        """A frozen rank has used up the time already."""
        return 0.0 if self._state(rank) and rank not in self._closed else GRACE

    def _has_left(self, rank: int) -> bool:
        """Whether `rank` ended as it should.

        A posted cause does not count: that rank is gone all the same, and a main thread that waits
        for it in NCCL never returns.
        """
        time.sleep(min(0.3, self.interval))  # it may be about to say so
        with contextlib.suppress(RuntimeError):
            return self._have_left([rank])
        return False

    def _have_left(self, ranks: Iterable[int]) -> bool:
        assert self.store is not None
        with self._store_lock:
            return bool(self.store.check([f"left/{rank}" for rank in ranks]))

    def cause(self) -> str | None:
        """The cause that a rank has posted; None if there is none, or the store is gone."""
        if self.store is None or self.store_lost:
            return None
        try:
            with self._store_lock:
                if not self.store.check(["cause"]):
                    return None
                return str(self.store.get("cause").decode(errors="replace").partition("\n")[0])
        except (RuntimeError, ValueError):
            self.store_lost = True
            return None

    def post(self, message: str) -> tuple[bool, str]:
        """Posts why this rank ends: (whether it is the first, which prints it; the first cause)."""
        if self.store is not None and not self.store_lost:
            mine = f"{message}\n{self.rank} {os.getpid()}"
            try:
                with self._store_lock:
                    first = self.store.compare_set("cause", "", mine).decode(errors="replace")
                return first == mine, first.partition("\n")[0]
            except (RuntimeError, ValueError):
                self.store_lost = True
        # The others are out of reach: print it, but once.
        said, self._said = self._said, True
        alike = not self._speaks_for_host() and message == self.why_store_is_lost()
        return not said and not alike, message

    def _speaks_for_host(self) -> bool:
        """Whether this is the first rank of its host that lives when the store is gone."""
        beside_rank0 = 0 in self._who and self._who[0]["host"] == host_identity()
        first = 1 if self.own_store and beside_rank0 else 0
        return self.local_rank == first

    def wait_for_cause(self, seconds: float) -> str | None:
        """The posted cause, should there be one within `seconds`."""
        deadline = time.monotonic() + seconds
        while (
            (cause := self.cause()) is None and not self.store_lost and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        return cause

    def _end(self, message: str, grace: float) -> None:
        """Reports `message` and ends this process: its main thread may wait for the lost rank."""
        report(message)
        if not self._ended.wait(grace):
            _exit(1)

    def _follow(self, cause: str) -> None:
        """Ends with the other ranks: one of them has posted the cause and printed it."""
        tell_torchrun(cause)
        if not self._ended.wait(GRACE):
            _exit(1)

    def why_store_is_lost(self) -> str:
        """What is gone together with the store, which another rank or host kept; "" if none did."""
        if self.own_store:
            return WITHOUT_STORE if self.rank != 0 else ""
        if self.launcher is None or os.getppid() != self.launcher:
            return ""  # this host's launcher kept it
        host = str(self._who[0]["host"]).partition(" ")[0] if 0 in self._who else "another host"
        return (
            f"the connection between the ranks is gone: {host}, where rank 0 and its launcher ran, "
            "died or cannot be reached"
        )

    def _lost_store(self) -> None:
        """The store is gone: with the launcher that kept it, or with rank 0."""
        self.store_lost = True
        if self._ended.wait(self.interval):
            return
        if reason := self.why_store_is_lost():
            self._end(reason, GRACE)
        elif not self.own_store:
            self._orphaned()

    def _orphaned(self) -> None:
        """The launcher is gone. As at a SIGTERM: finish the step, save, end; but not for long."""
        print("the launcher is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._ended.wait(ORPHANED):
            _exit(128 + signal.SIGTERM)


def _exit(code: int) -> None:
    """Ends the process at once: its main thread may be inside a collective that never returns."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
