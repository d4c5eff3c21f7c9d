"""A rank that is gone or frozen is noticed, one that has left is not, and one cause is printed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from alexnet_mp.config.processes import host_identity, process_state
from alexnet_mp.parallel import heartbeat
from alexnet_mp.parallel.heartbeat import Heartbeat

TIMEOUT = 1.0  # so beats are 0.1 s apart, and a rank is frozen after 0.75 s


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=20),
    )


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def heart(store: dist.TCPStore | None, rank: int = 0) -> Heartbeat:
    return Heartbeat(store, rank, 2, TIMEOUT, lambda: "step 3", own_store=False)


class Exits:
    """Stands in for the end of the process: when, and with which code."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    exits = Exits()
    monkeypatch.setattr(heartbeat, "_exit", exits)
    monkeypatch.setattr(heartbeat, "GRACE", 0.2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return exits


def watch(
    store: dist.TCPStore, exits: Exits, pid: int, host: str = "", seconds: float = 10
) -> None:
    """Watches a rank 1 whose process is `pid` until this rank would end, `seconds` at most."""
    store.set("who/1", json.dumps({"pid": pid, "host": host or host_identity()}))
    watching = heart(store)
    watching.start()
    exits.happened.wait(seconds)
    watching.stop()
    watching.join(5)
    assert not watching.is_alive()


def ended_child() -> subprocess.Popen:
    """A process that has ended and that nobody has waited for yet: a zombie."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def test_a_zombie_counts_as_ended(child) -> None:
    process = ended_child()
    assert process_state(process.pid) == ""
    assert process_state(child.pid) != ""
    process.wait()
    assert process_state(process.pid) == ""


def test_a_rank_whose_process_has_died_ends_this_one_and_is_named(store, exits, capsys) -> None:
    process = ended_child()
    store.set("beat/1", "7 saving after step 3")
    watch(store, exits, process.pid)
    process.wait()
    assert exits.codes == [1]
    assert capsys.readouterr().err == (
        f"error: rank 1 died: its process {process.pid} ended without a word (killed, or out of "
        "memory); last seen: saving after step 3\n"
    )


def test_a_rank_that_raised_ends_this_one_whose_main_thread_waits(store, exits, capsys) -> None:
    """Under NCCL that thread never returns; the raising rank's cause has been printed already."""
    process = ended_child()
    assert heart(store, 1).post("rank 1: ValueError: x.jpg")[0]
    watch(store, exits, process.pid)
    process.wait()
    assert exits.codes == [1] and capsys.readouterr().err == ""


def test_a_rank_that_has_left_may_be_gone(store, exits, capsys) -> None:
    process = ended_child()
    store.set("left/1", "1")
    watch(store, exits, process.pid, seconds=1)
    process.wait()
    assert exits.codes == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("stopped", [True, False])
def test_a_silent_rank_is_frozen(store, exits, capsys, child, monkeypatch, stopped: bool) -> None:
    monkeypatch.setattr(heartbeat, "GRACE", 60.0)  # it has had its time
    if stopped:
        child.send_signal(signal.SIGSTOP)
    watch(store, exits, child.pid)
    assert exits.codes == [1]
    said = capsys.readouterr().err
    assert "rank 1 has been silent for 1 s" in said and said.count("\n") == 1
    assert ("its process is stopped" if stopped else "its machine or network is gone") in said


def test_a_process_of_another_host_is_not_looked_for_here(store, exits, capsys) -> None:
    process = ended_child()
    watch(store, exits, process.pid, host="another host")
    process.wait()
    assert "rank 1 has been silent" in capsys.readouterr().err


def test_a_rank_that_beats_is_well_however_long_it_works(store, exits, child) -> None:
    store.set("who/0", json.dumps({"pid": child.pid, "host": host_identity()}))
    other = heart(store, 1)
    other.start()
    watch(store, exits, child.pid, seconds=1.5)
    other.stop()
    assert exits.codes == []


def test_the_first_cause_is_every_ranks(store) -> None:
    first, second = heart(store, 0), heart(store, 1)
    assert second.cause() is None
    assert second.post("rank 1: no space left") == (True, "rank 1: no space left")
    assert first.post("rank 0: connection closed") == (False, "rank 1: no space left")
    assert second.post("rank 1: again") == (False, "rank 1: no space left")
    assert first.cause() == second.wait_for_cause(0) == "rank 1: no space left"


def test_of_ranks_with_the_same_cause_one_prints_it(store) -> None:
    assert heart(store, 0).post("step 5: the loss is not finite")[0] is True
    assert heart(store, 1).post("step 5: the loss is not finite")[0] is False


def test_without_a_store_a_cause_is_printed_once() -> None:
    alone = heart(None)
    assert alone.post("lost") == (True, "lost")
    assert alone.post("lost again")[0] is False


@pytest.mark.parametrize(
    ("host_of_rank0", "local_rank", "prints"),
    [("here", 1, True), ("here", 2, False), ("elsewhere", 0, True), ("elsewhere", 1, False)],
)
def test_of_a_host_one_living_rank_says_that_rank_0_took_the_store_with_it(
    store, host_of_rank0: str, local_rank: int, prints: bool
) -> None:
    host = host_identity() if host_of_rank0 == "here" else "node0 1"
    for rank in range(4):
        store.set(f"who/{rank}", json.dumps({"pid": os.getpid(), "host": host}))
    orphan = Heartbeat(store, 3, 4, TIMEOUT, lambda: "", own_store=True, local_rank=local_rank)
    orphan.start()
    time.sleep(2 * orphan.interval)
    orphan.stop()
    orphan.store_lost = True
    assert orphan.post(heartbeat.WITHOUT_STORE) == (prints, heartbeat.WITHOUT_STORE)


def test_a_report_is_printed_by_the_first_rank_only(store, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(heartbeat, "_current", [heart(store, 1)])
    details = lambda: print("traceback", file=sys.stderr)  # noqa: E731
    assert heartbeat.report("rank 1: KeyError", details) == "rank 1: KeyError"
    assert capsys.readouterr().err == "traceback\nerror: rank 1: KeyError\n"
    monkeypatch.setattr(heartbeat, "_current", [heart(store, 0)])
    assert heartbeat.report("rank 0: connection closed", details) == "rank 1: KeyError"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(heartbeat, "_current", [])
    assert heartbeat.report("one rank: KeyError") == "one rank: KeyError"
    assert capsys.readouterr().err == "error: one rank: KeyError\n"


def test_a_launcher_that_is_gone_asks_for_a_save_then_ends_the_rank(
    exits, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(heartbeat, "ORPHANED", 0.2)
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number))
    watching = heart(None)
    watching.launcher = -1  # not the parent of this process any more
    watching.start()
    assert exits.happened.wait(10)
    watching.stop()
    assert signals == [signal.SIGTERM] and exits.codes == [128 + signal.SIGTERM]
    assert capsys.readouterr().err == "the launcher is gone: stopping\n"


def test_rank_0_waits_until_the_others_have_left_the_store_that_it_keeps(store) -> None:
    keeper = Heartbeat(store, 0, 2, TIMEOUT, lambda: "", own_store=True)
    timer = threading.Timer(0.3, store.set, ("left/1", "1"))
    timer.start()
    started = time.monotonic()
    keeper.stop()
    assert 0.2 < time.monotonic() - started < 4
