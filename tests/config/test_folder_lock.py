"""Two runs never write into one folder, and a run that was killed locks nobody out."""

import os
import subprocess
import sys
import time

import pytest

from alexnet_mp.config import folder_lock
from alexnet_mp.config.folder_lock import FolderLock

HOLD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])        # without the package, whose torch takes seconds to import
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
lock.FolderLock(pathlib.Path(sys.argv[2])).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder_lock.__file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_with_the_first_ones_process_and_host(tmp_path, holder) -> None:
    with pytest.raises(
        OSError, match=rf"another run writes there: process {holder.pid} on .*, since 20"
    ):
        FolderLock(tmp_path).take()


def test_a_killed_runs_lock_is_stale_at_once(tmp_path, holder) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / folder_lock.NAME).exists()
    mine = FolderLock(tmp_path)
    mine.take()
    mine.release()
    assert not (tmp_path / folder_lock.NAME).exists()


def test_without_locks_of_the_file_system_the_named_process_is_looked_for(
    tmp_path, holder, monkeypatch
) -> None:
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with pytest.raises(OSError, match=f"process {holder.pid}"):
        FolderLock(tmp_path).take()
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).take()


def test_a_lock_file_of_rubbish_is_stale(tmp_path) -> None:
    (tmp_path / folder_lock.NAME).write_bytes(b"\xff\x00 rubbish")
    mine = FolderLock(tmp_path)
    mine.take()
    assert (
        str(os.getpid()) in (tmp_path / folder_lock.NAME).read_text()
        and time.strftime("%Y") in (tmp_path / folder_lock.NAME).read_text()
    )
    mine.release()


def test_a_released_lock_does_not_take_its_successors_file_along(tmp_path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    (tmp_path / folder_lock.NAME).unlink()  # somebody tidied up
    second.take()
    first.release()
    assert (tmp_path / folder_lock.NAME).exists()
    second.release()
