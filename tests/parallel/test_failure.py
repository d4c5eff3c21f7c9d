"""NCCL's errors become one line, and torchrun finds the cause."""

import json
import os

import pytest

from alexnet_mp.cli.process import run_main
from alexnet_mp.parallel import heartbeat
from alexnet_mp.parallel.failure import explain_nccl_error, is_backend_error, tell_torchrun

HEAD = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {kind}, NCCL version "
    "2.21.5\n{name}: This usually reflects a problem.\nLast error:\n"
)
SHARED_MEMORY = (
    HEAD.format(kind="unhandled system error", name="ncclSystemError")
    + "Error while creating shared memory segment /dev/shm/nccl-NzwJ7O (size 9637888)\n"
)
DUPLICATE = (
    HEAD.format(kind="invalid usage", name="ncclInvalidUsage")
    + "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\n"
    + "Exception raised from create at NCCLUtils.cpp:77 (most recent call first):\nframe #0: ...\n"
)
NETWORK = (
    HEAD.format(kind="internal error", name="ncclInternalError")
    + "Bootstrap : no socket interface found\n"
)
NO_REASON = (
    HEAD.format(kind="remote process exited", name="ncclRemoteError")
    + "\nException raised from create at NCCLUtils.cpp:77 (most recent call first):\n"
)


@pytest.mark.parametrize(
    ("text", "reason", "way_out"),
    [
        (SHARED_MEMORY, "shared memory segment /dev/shm/nccl-NzwJ7O", "--shm-size=1g"),
        (DUPLICATE, "Duplicate GPU detected : rank 1 and rank 0", "a GPU of its own"),
        (NETWORK, "no socket interface found", "NCCL_DEBUG=WARN"),
    ],
)
def test_nccls_last_error_is_one_line_with_a_way_out(text: str, reason: str, way_out: str) -> None:
    line = explain_nccl_error(RuntimeError(text))
    assert line is not None and reason in line and way_out in line
    assert "\n" not in line and "Exception raised" not in line
    assert is_backend_error(RuntimeError(text))


@pytest.mark.parametrize("text", ["Connection reset by peer", "x Last error:", NO_REASON])
def test_an_error_without_nccls_reason_is_not_explained(text: str) -> None:
    assert explain_nccl_error(text) is None


class Heart:
    """A heartbeat of ranks that are all alive: nobody has posted a cause."""

    interval, store_lost, own_store = 0.0, False, True

    def wait_for_cause(self, seconds: float) -> None:
        return None

    def post(self, message: str) -> tuple[bool, str]:
        return True, message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (SHARED_MEMORY, "NCCL: Error while creating shared memory segment"),
        ("Connection closed by peer", "lost another rank, or it did not answer within --timeout"),
    ],
)
def test_a_failed_set_up_of_nccl_is_told_from_a_lost_rank(
    monkeypatch, capsys, text: str, line: str
) -> None:
    monkeypatch.setattr(heartbeat, "_current", [Heart()])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main() -> int:
        raise RuntimeError(text)

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        run_main(main)
    printed = capsys.readouterr().err
    assert f"error: rank 0: {line}" in printed and printed.count("\n") == 1


def test_torchrun_finds_the_cause_where_it_looks(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    tell_torchrun("no file: nothing is written")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_torchrun("rank 1 died")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "rank 1 died"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    tell_torchrun("a folder that is gone is no error")
