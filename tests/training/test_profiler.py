"""--profile: where a step's time goes, and a trace that a browser opens."""

import json
import re

import torch
from ranks import run as on_ranks

from alexnet_mp import preset
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training.profiler import STEPS, TIMED, WARM_UP, Profiler, Times, table
from alexnet_mp.training.run import run


def config(out: str, steps: int):
    return preset("demo").with_fields(
        kernels=(4, 6, 8, 6, 4),
        hidden=(24, 20),
        batch_size=4,
        limit_train=80,
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
    steps = [columns(line) for line in lines if re.search(r"(^|\] )step +\d+ ", line)]
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


def test_the_table_says_that_hidden_is_no_part_beside_compute() -> None:
    text = table([[Times(4.0, 2.0, 1.0, 0.5, 0.0, 0.5, 0.5)]])
    assert "hidden lies inside compute" in text and max(map(len, text.splitlines())) < 115


class FakeDevice:
    """Counts how often the device is waited for, and when."""

    def __init__(self, monkeypatch) -> None:
        self.waits = 0
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self, device) -> None:
        self.waits += 1


def test_on_cuda_a_batch_is_timed_between_two_waits_for_the_device(monkeypatch) -> None:
    context = ParallelContext(Environment(), torch.device("cuda"), (0,))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    device = FakeDevice(monkeypatch)
    profiler = Profiler(optimizer, context)
    assert context.meter.times_device
    batches, seen = iter(profiler.watching([1, 2])), []
    for _ in batches:
        seen.append(device.waits)
    assert (
        seen == [3, 5] and device.waits == 7
    )  # one as the step began, two a batch, two at the end
    profiler._end()
    next(iter(profiler.watching([1])))
    assert device.waits == 7 and not context.meter.times_device


def test_a_loader_that_gives_none_is_not_at_its_end() -> None:
    context = ParallelContext(Environment(), torch.device("cpu"), (0,))
    profiler = Profiler(torch.optim.SGD([torch.zeros(1)], lr=0.1), context)
    assert list(profiler.watching([1, None, 2])) == [1, None, 2]
