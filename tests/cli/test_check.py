"""`check` on CPU ranks: what it reports, and what it says of machines that are broken."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from ranks import run

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
FLAGS = ["--device", "cpu", "--seconds", "0.2", "--timeout", "10"]


def checked(rank: int, fault: str, target: str, environment: dict[str, str]) -> int:
    """Runs the command with `fault` put in, and returns its exit code."""
    os.environ.update(environment)
    from alexnet_mp.cli import check as command
    from alexnet_mp.parallel.exchange import GroupLink
    from alexnet_mp.training import machine_check

    if fault == "wrong activations" and rank == 1:
        sent = GroupLink.to_wire_format
        GroupLink.to_wire_format = lambda self, x, *args: sent(self, x * 2, *args)
    if fault == "no compiler":
        machine_check.slow_norm = lambda device: "the norm is slow: no C++ compiler"
    flags = list(FLAGS)
    if fault == "fewer GPUs than ranks":
        torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 3)
        flags[1] = "cuda"
    return command.check([*flags, "--json", target if rank == 0 else ""])


def report(tmp_path: Path, ranks: int, fault: str = "", **environment: str) -> tuple[int, dict]:
    """The exit code of all ranks, and rank 0's report."""
    target = tmp_path / "check.json"
    codes = run(checked, ranks, fault, str(target), environment, timeout=120)
    assert len(set(codes)) == 1, codes
    return codes[0], json.loads(target.read_text())


def failing(found: dict) -> dict:
    return next(row for row in found["rows"] if row["status"] == "FAIL")


def test_two_ranks_pass_and_report_every_part_of_the_machine(tmp_path) -> None:
    code, found = report(tmp_path, 2)
    assert code == 0 and found["ok"]
    rows = {row["name"]: row for row in found["rows"]}
    assert {"versions", "rank 0", "rank 1", "device", "kernels", "open files", "cache"} <= set(rows)
    assert rows["rank 1"]["values"]["columns"] == [1]
    for precision in ("fp64", "fp32", "bf16"):
        crossings = [
            row["crossing"] for row in rows[f"exchange {precision}"]["values"]["crossings"]
        ]
        assert crossings == ["logits", "conv3", "fc6", "fc7", "fc8"]
    assert rows["exchange fp64"]["values"]["largest_error"] <= 1e-12
    assert rows["link"]["values"]["bytes_per_second"] > 0
    assert rows["speed"]["values"]["images_per_second_one_rank"] > 0


def test_one_rank_reports_its_speed_and_no_exchange(tmp_path) -> None:
    code, found = report(tmp_path, 1)
    assert code == 0
    names = {row["name"] for row in found["rows"]}
    assert "speed" in names and not any(name.startswith("exchange") for name in names)


def test_a_rank_that_sends_wrong_values_is_named_with_a_remedy(tmp_path) -> None:
    code, found = report(tmp_path, 2, "wrong activations")
    assert code == 1 and not found["ok"]
    row = failing(found)
    assert row["name"] == "exchange fp64" and "rank" in row["detail"]
    assert "times as large" in row["detail"] or "logits differ" in row["detail"]
    assert "NCCL_P2P_DISABLE=1" in row["remedy"]


def test_without_a_compiler_a_note_says_what_to_install(tmp_path) -> None:
    code, found = report(tmp_path, 1, "no compiler")
    row = next(row for row in found["rows"] if row["name"] == "kernels")
    assert code == 0 and row["status"] == "note" and "C++ compiler" in row["remedy"]


def test_fewer_gpus_than_ranks_is_one_line_with_its_remedy(tmp_path) -> None:
    code, found = report(tmp_path, 4, "fewer GPUs than ranks")
    row = failing(found)
    assert code == 1 and "4 ranks" in row["detail"] and "3 GPUs" in row["detail"]
    assert "--nproc_per_node" in row["remedy"]


def test_a_port_that_is_taken_is_one_line_with_its_remedy(tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, found = report(tmp_path, 2, MASTER_PORT=str(taken.getsockname()[1]))
    assert code == 1 and "port" in failing(found)["detail"] and failing(found)["remedy"]
