"""A rank whose connection closes without a goodbye is noticed; one that leaves is not."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import RanksFailed, process_group, run

from alexnet_mp.parallel.lifeline import Lifeline

pytestmark = pytest.mark.ranks


def watch(rank: int, killed: int, folder: str) -> None:
    """Writes which ranks' connections closed, and after how many seconds; -1: none is killed."""
    with process_group():
        group = dist.new_group([0, 1, 2], timeout=timedelta(days=30), backend="gloo")
        closed: list[int] = []
        line = Lifeline(group, rank, 3, closed.append)
        line.start()
        dist.barrier()
        if rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        if killed < 0:
            line.stop()
        line.join(0.5 if rank == 0 and killed > 0 else 5)
        outcome = [closed, line.is_alive(), time.monotonic() - started]
        Path(folder, str(rank)).write_text(json.dumps(outcome))
        if rank == 1 and killed > 0:
            time.sleep(1)  # rank 0 watches this one


def test_the_rank_before_a_killed_one_notices_it_at_once(tmp_path) -> None:
    with pytest.raises(RanksFailed):
        run(watch, 3, 2, str(tmp_path))
    closed, waits, seconds = json.loads((tmp_path / "1").read_text())
    assert closed == [2] and not waits and seconds < 1
    closed, waits, _ = json.loads((tmp_path / "0").read_text())
    assert closed == [] and waits  # its next rank is well


def test_ranks_that_say_goodbye_are_not_noticed(tmp_path) -> None:
    run(watch, 3, -1, str(tmp_path))
    for rank in range(3):
        closed, waits, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert closed == [] and not waits and seconds < 1
