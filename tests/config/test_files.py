"""A file is whole or as it was; what a killed process left is cleared away, and nothing else."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_mp.config import files
from alexnet_mp.config.files import (
    WriteError,
    atomic_writer,
    commit_folder,
    remove_leftovers,
    sync_folder,
    temporary_path,
    write_atomically,
)


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"first", "zweite: 二"):
        write_atomically(tmp_path / "file", content)
        whole = content if isinstance(content, bytes) else content.encode()
        assert (tmp_path / "file").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_block_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"before")
    with pytest.raises(TypeError), atomic_writer(tmp_path / "file") as file:
        file.writelines([b"half of", None])
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        write_atomically(tmp_path / "file", b"content")
    assert (
        str(caught.value) == f"{tmp_path / 'file'}: could not be written (No space left on device)"
    )
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "file").exists()


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"none/file: could not be written \(No such file"):
        write_atomically(tmp_path / "none" / "file", b"content")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_share_that_cannot_sync_a_folder_is_no_error(
    tmp_path: Path, monkeypatch, number: int
) -> None:
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomically(tmp_path / "file", b"content")
    (tmp_path / "begun").mkdir()
    write_atomically(tmp_path / "begun" / "file", b"content")
    commit_folder(tmp_path / "begun", tmp_path / "whole")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole" / "file").read_bytes()


def test_a_disk_that_fails_is_an_error_of_its_folder(tmp_path: Path, monkeypatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=f"{tmp_path}: could not be written"):
        sync_folder(tmp_path)


def test_only_temporaries_of_ended_processes_are_removed(tmp_path: Path) -> None:
    mine = temporary_path(tmp_path / "file")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}-", f".{ended.pid}-"))
    foreign = mine.with_name(f".file.{ended.pid}-00000000.tmp")
    old = mine.with_name(".old.123.tmp")  # a name of an earlier version
    for path in (mine, dead, foreign, old, tmp_path / "file.tmp"):
        path.write_bytes(b"")
    before = time.time() - files.FOREIGN_LEFTOVER_AGE - 1
    os.utime(old, (before, before))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, foreign.name, "file.tmp"}
