"""--profile: where a step's time goes, and a trace that a browser opens."""

import json
import re

from ranks import run as on_ranks

from alexnet_mp import preset
from alexnet_mp.training.profiler import TIMED, TRACED, WARM_UP, Times, table
from alexnet_mp.training.run import run

STEPS = WARM_UP + TIMED + TRACED


def config(out: str, steps: int):
    return preset("demo").with_fields(
        kernels=(4, 6, 8, 6, 4),
        hidden=(24, 20),
        batch_size=4,
        limit_train=72,
        limit_val=8,
        limit_test=8,
        device="cpu",
        threads=1,
        max_steps=steps,
        profile=True,
        out=out,
    )


def profiled(rank: int, out: str, steps: int) -> None:
    run(config(out, steps))


def columns(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+\.\d+", line)]


def test_two_ranks_print_each_step_and_write_a_trace_each(tmp_path, capfd) -> None:
    out = tmp_path / "run"
    on_ranks(profiled, 2, str(out), STEPS)
    lines = capfd.readouterr().out.splitlines()
    steps = [columns(line) for line in lines if re.search(r"step +\d+ ", line)]
    assert len(steps) == TIMED
    for whole, compute, exposed, _, flags, waiting, optimizer in steps:
        assert (
            abs(whole - (compute + exposed + flags + waiting + optimizer)) < 0.05
        )  # each is rounded to a hundredth
        assert min(compute, exposed, waiting, optimizer) > 0
    assert sum("median, rank" in line for line in lines) == 2
    for name in ("trace.json", "trace-rank1.json"):
        names = {
            event.get("name", "") for event in json.loads((out / name).read_text())["traceEvents"]
        }
        assert {"wait for conv3", "wait for fc8", "aten::conv2d"} <= names


def test_a_run_that_is_too_short_says_so_and_ends_well(tmp_path, capsys) -> None:
    run(config(str(tmp_path / "run"), WARM_UP))
    printed = capsys.readouterr().out
    assert f"nothing to show, the run had {WARM_UP} steps" in printed and "test: loss" in printed


def test_shares_are_of_the_main_ranks_median_step() -> None:
    ranks = [
        [Times(4.0, 2.0, 1.0, 0.5, 0.0, 0.5, 0.5)] * 3,
        [Times(9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0)],
    ]
    assert columns(table(ranks).splitlines()[-1]) == [100.0, 50.0, 25.0, 12.5, 0.0, 12.5, 12.5]
