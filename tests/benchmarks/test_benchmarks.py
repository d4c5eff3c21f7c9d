"""The benchmarks at toy sizes: they end with the promised JSON, and their figures agree."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = "--batch-size 4 --image-size 64 --classes 10 --device cpu --threads 2".split()


def start(script: str, *flags: str) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    } | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def result(script: str, *flags: str) -> dict:
    done = start(script, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def throughput(tmp_path_factory) -> tuple[dict, Path]:
    path = tmp_path_factory.mktemp("benchmarks") / "throughput.json"
    return result(
        "throughput",
        *TINY,
        "--quick",
        "--rows",
        "torchvision",
        "one",
        "two",
        "plain",
        "--json",
        str(path),
    ), path


def test_throughput_times_each_row_and_carries_the_headline_ratios(throughput) -> None:
    found, path = throughput
    assert json.loads(path.read_text()) == found
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["torchvision", "one", "two", "plain"]
    assert found["ratio_to_torchvision"] == rows["one"]["ratio_to_torchvision"] > 0
    assert found["ratio_two_ranks_to_one"] == rows["two"]["ratio_to_one_device"] > 0
    assert found["ratio_to_plain_transcription"] == rows["one"]["ratio_to_plain_transcription"] > 0
    for row in rows.values():
        low, high = row["spread"]
        assert 0 < low <= row["images_per_second"] <= high and row["rounds"] >= 2
        assert (
            row["memory_format"] in ("contiguous", "channels_last")
            and row["memory_bytes_per_rank"] > 2**27
        )
    # conv3 128 x 3 x 3, fc6 128, fc7 2048, both ways, and 10 logits; float32, four images
    assert rows["two"]["bytes_per_step"] == 4 * 4 * (2 * (128 * 9 + 128 + 2048) + 10)
    assert 0 < rows["two"]["exposed_share"] < 1 and rows["one"]["exposed_share"] is None


def test_a_row_that_was_not_asked_for_has_no_ratio_and_one_that_cannot_be_is_named() -> None:
    found = result(
        "throughput",
        *TINY,
        "--rows",
        "one",
        "plain",
        "--precision",
        "bf16",
        "--mode",
        "inference",
        "--rounds",
        "1",
        "--steps",
        "1",
    )
    rows = {row["row"]: row for row in found["rows"]}
    assert found["ratio_to_torchvision"] is None and rows["one"]["images_per_second"] > 0
    assert (
        "failed" not in rows["plain"] or "not implemented" in rows["plain"]["failed"]
    )  # torch's norm in bfloat16 on a CPU


def test_the_exchange_sends_the_least_that_the_layout_allows() -> None:
    found = result("exchange", *TINY, "--rounds", "1")
    assert (
        found["bytes_per_step"]
        == found["least_bytes_per_step"]
        == 4 * 4 * (2 * (128 * 9 + 128 + 2048) + 10)
    )
    assert found["bytes_per_step_data_parallel"] > found["bytes_per_step"]
    assert all(row["ours_seconds"] > 0 and row["raw_seconds"] > 0 for row in found["transfers"])


def test_the_norm_is_timed_in_both_formats_and_precisions() -> None:
    found = result("lrn", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--device", "cpu")
    assert found["ratio_to_torch_lrn"] > 0
    assert len(found["rows"]) == 8 and all(row["ours_seconds"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("throughput", ["--image-size", "32"], "--image-size 32"),
        ("exchange", ["--batch-size", "0"], "--batch-size 0"),
        ("lrn", ["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, script: str, flags: list[str], words: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(ValueError, match=words) as caught:
        importlib.import_module(script).main()
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_a_benchmark_with_one_line_and_exit_code_2() -> None:
    done = start("throughput", "--batch-size", "1")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and "--batch-size (1,)" in lines[0]
