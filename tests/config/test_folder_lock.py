"""Two runs never write into one folder, and a run that was killed locks nobody out."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from alexnet_mp.config import folder_lock
from alexnet_mp.config.folder_lock import FolderLock

HOLD = """
import pathlib, sys, time
from alexnet_mp.config.folder_lock import FolderLock
FolderLock(pathlib.Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
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
    assert (tmp_path / folder_lock.LOCK_NAME).exists()
    mine = FolderLock(tmp_path)
    mine.take()
    mine.release()
    assert not (tmp_path / folder_lock.LOCK_NAME).exists()


def test_without_locks_of_the_file_system_the_named_process_is_looked_for(
    tmp_path, holder, monkeypatch
) -> None:
    monkeypatch.setattr(folder_lock, "CAN_LOCK", False)
    with pytest.raises(OSError, match=f"process {holder.pid}"):
        FolderLock(tmp_path).take()
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).take()


def test_a_lock_file_of_rubbish_is_stale(tmp_path) -> None:
    (tmp_path / folder_lock.LOCK_NAME).write_bytes(b"\xff\x00 rubbish")
    mine = FolderLock(tmp_path)
    mine.take()
    assert (
        str(os.getpid()) in (tmp_path / folder_lock.LOCK_NAME).read_text()
        and time.strftime("%Y") in (tmp_path / folder_lock.LOCK_NAME).read_text()
    )
    mine.release()


def test_a_released_lock_does_not_take_its_successors_file_along(tmp_path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    (tmp_path / folder_lock.LOCK_NAME).unlink()  # somebody tidied up
    second.take()
    first.release()
    assert (tmp_path / folder_lock.LOCK_NAME).exists()
    second.release()


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_locks_still_names_the_holder(
    tmp_path, holder, monkeypatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with pytest.raises(OSError, match=f"process {holder.pid}"):
        FolderLock(tmp_path).take()


def test_the_lock_is_a_file_opened_for_writing(tmp_path, monkeypatch) -> None:
    """NFS answers EBADF to flock on a descriptor that is open for reading only, as a folder's
    is."""
    modes = []
    monkeypatch.setattr(
        folder_lock.fcntl,
        "flock",
        lambda descriptor, operation: modes.append(
            (fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE, os.fstat(descriptor).st_mode)
        ),
    )
    with FolderLock(tmp_path).held():
        pass
    assert modes == [(os.O_RDWR, modes[0][1])] and stat.S_ISREG(modes[0][1])


def test_a_lock_that_is_waited_for_is_taken_when_its_holder_ends(tmp_path, holder) -> None:
    threading.Timer(0.3, holder.kill).start()
    with FolderLock(tmp_path).held(wait=True):
        assert holder.poll() is not None or holder.wait(5) is not None
    assert not (tmp_path / folder_lock.LOCK_NAME).exists()
