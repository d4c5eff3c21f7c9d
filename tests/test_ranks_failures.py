"""The helper of several ranks misses no exception, hang, death or process left behind."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, process_group, run

pytestmark = pytest.mark.ranks


def nothing(rank: int) -> None:
    pass


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("the reason")


def test_an_exception_fails_the_test_with_its_traceback_and_rank() -> None:
    with pytest.raises(RanksFailed) as caught:
        run(raise_on_one, 2)
    message = str(caught.value)
    assert message.startswith("rank 1 of 2 failed in raise_on_one (test_ranks_failures.py):")
    assert (
        "KeyError: 'the reason'" in message
        and "in raise_on_one" in message
        and 'raise KeyError("the reason")' in message
    )
    assert list(caught.value.failed) == [1] and not caught.value.running


def raise_before_a_collective(rank: int) -> None:
    with process_group():
        if rank == 1:
            raise ValueError("rank 1 leaves")
        dist.all_reduce(torch.zeros(1))


def test_the_first_cause_comes_first_when_the_peers_fail_because_of_it() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run(raise_before_a_collective, 2)
    assert next(iter(caught.value.failed)) == 1 and "rank 1 leaves" in str(caught.value)
    assert time.monotonic() - start < 10  # gloo's own limit would be 30 seconds


def raise_and_leave_the_peer_asleep(rank: int) -> None:
    if rank == 0:
        raise ValueError("no use in waiting")
    time.sleep(600)


def test_a_failure_is_not_kept_waiting_by_a_rank_that_hangs() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run(raise_and_leave_the_peer_asleep, 2, grace=0.5)
    assert time.monotonic() - start < 10
    assert list(caught.value.failed) == [0] and list(caught.value.running) == [1]
    assert "still running after another rank had failed, and killed: rank 1 of 2" in str(
        caught.value
    )


def sleep_on_one(rank: int, process_ids: Path) -> None:
    (process_ids / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)


def test_a_rank_that_hangs_is_named_with_its_line_and_killed(tmp_path: Path) -> None:
    run(nothing, 1)
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run(sleep_on_one, 2, tmp_path, timeout=3)
    assert 3 <= time.monotonic() - start < 10
    assert "still running after 3 seconds, and killed: rank 1 of 2 in sleep_on_one" in str(
        caught.value
    )
    assert (
        "test_ranks_failures.py" in caught.value.running[1]
        and "in sleep_on_one" in caught.value.running[1]
    )
    assert_gone([int((tmp_path / str(rank)).read_text()) for rank in range(2)])


def wait_for_a_message_that_nobody_sends(rank: int) -> None:
    with process_group():
        dist.recv(torch.zeros(1), src=1 - rank)


def test_ranks_that_wait_for_each_other_in_gloo_are_both_named() -> None:
    with pytest.raises(
        RanksFailed, match="still running after 3 seconds, and killed: rank 0, 1 of 2"
    ) as caught:
        run(wait_for_a_message_that_nobody_sends, 2, timeout=3)
    assert all(
        "in wait_for_a_message_that_nobody_sends" in stack
        for stack in caught.value.running.values()
    )


def kill_one(rank: int, number: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), number)
    with process_group():
        pass


@pytest.mark.parametrize(
    ("number", "sign"),
    [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSEGV, "killed by SIGSEGV")],
)
def test_a_rank_that_is_killed_is_named_with_the_signal(number: int, sign: str) -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        run(kill_one, 2, number, grace=0.5)
    assert time.monotonic() - start < 10
    assert next(iter(caught.value.failed)) == 1 and sign in caught.value.failed[1]
    if number == signal.SIGSEGV:
        assert "in kill_one" in caught.value.failed[1]  # faulthandler's stack


def leave(rank: int, how: str) -> None:
    if how == "exit":
        os._exit(0)
    argparse.ArgumentParser().parse_args(["--no-such-flag"])


def test_a_rank_that_leaves_without_returning_has_failed() -> None:
    with pytest.raises(RanksFailed, match="exit code 0 before the function had returned"):
        run(leave, 1, "exit")
    with pytest.raises(RanksFailed, match="SystemExit: 2"):
        run(leave, 1, "parser")


def unpicklable(rank: int):
    return lambda: rank


def test_a_result_or_a_function_that_cannot_travel_is_an_error() -> None:
    with pytest.raises(RanksFailed, match="pickle"):
        run(unpicklable, 1)
    with pytest.raises(ValueError, match="top level of a module"):
        run(lambda rank: rank, 1)


def start_a_child(rank: int, process_ids: Path, how: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (process_ids / f"{rank}-child").write_text(str(child.pid))
    (process_ids / f"{rank}").write_text(str(os.getpid()))
    if how == "hangs":
        time.sleep(600)
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise ValueError


@pytest.mark.parametrize("how", ["returns", "raises", "hangs", "is killed"])
def test_no_process_outlives_the_run(tmp_path: Path, how: str) -> None:
    run(nothing, 1)
    if how == "returns":
        run(start_a_child, 2, tmp_path, how)
    else:
        with pytest.raises(RanksFailed):
            run(start_a_child, 2, tmp_path, how, timeout=2, grace=0.5)
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert_gone([int(file.read_text()) for file in files])


def assert_gone(process_ids: list[int]) -> None:
    """Waits two seconds at most until no process is left: a killed orphan is a zombie at first."""
    limit = time.monotonic() + 2
    while left := [pid for pid in process_ids if is_alive(pid)]:
        assert time.monotonic() < limit, f"still there: {left}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if sys.platform == "linux"
            else ""
        )
        os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
