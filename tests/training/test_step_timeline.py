"""timeline.json: what one step of --profile says of blocks, messages and waits."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import run as on_ranks
from small_nets import TINY

from alexnet_mp import AlexNet, preset
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training.profiler import RECORDED, STEPS, TIMED, WARM_UP
from alexnet_mp.training.run import run
from alexnet_mp.training.step_recorder import StepRecorder, why_no_timeline
from alexnet_mp.training.step_timeline import RankStep, Span, TimedExchange, cut, merge

BATCH = 4
LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
ROUNDING = 2e-6  # of a difference of two times in the file


def train(rank: int, out: str, column_ranks: int, profile: bool) -> dict:
    return run(
        preset("demo").with_fields(
            kernels=(4, 6, 8, 6, 4),
            hidden=(24, 20),
            batch_size=BATCH,
            limit_train=BATCH * STEPS,
            limit_val=8,
            limit_test=8,
            epochs=1,
            threads=1,
            column_ranks=column_ranks,
            profile=profile,
            out=out,
        )
    )


@pytest.fixture(scope="module")
def columns(tmp_path_factory) -> tuple[dict, dict]:
    """The timeline and the result of a run with a column on each of two ranks."""
    out = tmp_path_factory.mktemp("columns") / "run"
    result = on_ranks(train, 2, str(out), 2, True)[0]
    return json.loads((out / "timeline.json").read_text()), result


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> tuple[dict, Path]:
    """The timeline and the folder of a run with both columns on each of two ranks."""
    out = tmp_path_factory.mktemp("copies") / "run"
    on_ranks(train, 2, str(out), 1, True)
    return json.loads((out / "timeline.json").read_text()), out


def of(spans: list[dict], layer: str, direction: str) -> list[dict]:
    return [span for span in spans if (span["layer"], span["pass"]) == (layer, direction)]


def test_each_crossing_has_one_message_to_each_peer_and_pass_but_fc8_none_backward(columns) -> None:
    timeline, _ = columns
    found = Counter((m["layer"], m["pass"], m["from"], m["to"]) for m in timeline["messages"])
    both_ways = [(0, 1), (1, 0)]
    assert found == Counter(
        [(c, "forward", *way) for c in ("conv3", "fc6", "fc7", "fc8") for way in both_ways]
        + [(c, "backward", *way) for c in ("conv3", "fc6", "fc7") for way in both_ways]
    )


def test_messages_have_the_bytes_that_the_run_counted_and_arrive_after_they_are_sent(
    columns,
) -> None:
    timeline, result = columns
    sent = sum(m["bytes"] for m in timeline["messages"] if m["from"] == 0)
    assert sent == result["exchange"]["bytes_per_step"]
    for message in timeline["messages"]:
        rank = timeline["ranks"][message["from"]]
        assert message["sent"] < message["arrived"] < message["sent"] + rank["seconds"]


def test_the_waits_add_up_to_the_meters_exposed_seconds(columns) -> None:
    for rank in columns[0]["ranks"]:
        waits = [wait["end"] - wait["begin"] for wait in rank["waits"]]
        assert len(waits) == 7 and min(waits) > 0
        assert sum(waits) == pytest.approx(rank["exposed_seconds"], abs=7 * ROUNDING)


@pytest.mark.parametrize("run_of", ["columns", "copies"])
def test_layers_go_forward_in_order_and_backward_in_reverse_and_nothing_overlaps(
    run_of: str, request
) -> None:
    timeline, _ = request.getfixturevalue(run_of)
    for rank in timeline["ranks"]:
        order = list(dict.fromkeys((span["layer"], span["pass"]) for span in rank["blocks"]))
        assert [place for place in order if place[0] != "next batch"] == [
            *((layer, "forward") for layer in [*LAYERS, "loss"]),
            *((layer, "backward") for layer in reversed(LAYERS)),
            ("flags", "between"),
            ("update", "between"),
        ]
        spans = sorted([*rank["blocks"], *rank["waits"]], key=lambda span: span["begin"])
        assert all(before["end"] <= after["begin"] + ROUNDING for before, after in pairwise(spans))
        shares = sum(span["end"] - span["begin"] for span in spans) / rank["seconds"]
        assert 0.5 < shares <= 1.01  # the rest: clearing gradients, before the first layer


def test_a_crossing_multiplies_its_own_half_then_waits_then_the_peers_half(columns) -> None:
    for rank in columns[0]["ranks"]:
        (wait,) = of(rank["waits"], "conv3", "forward")
        own, peers = of(rank["blocks"], "conv3", "forward")
        assert (own["half"], peers["half"]) == ("own", "peers")
        assert own["end"] == wait["begin"] and wait["end"] == peers["begin"]


def test_backward_the_gradient_for_the_peer_leaves_before_the_own_halfs(columns) -> None:
    timeline, _ = columns
    for message in of(timeline["messages"], "fc6", "backward"):
        peers, own, *_ = of(timeline["ranks"][message["from"]]["blocks"], "fc6", "backward")
        assert (peers["half"], own["half"]) == ("peers", "own")
        assert peers["end"] == message["sent"] == own["begin"]


def test_copies_send_the_gradient_of_every_layer_and_nothing_forward(copies) -> None:
    timeline, out = copies
    parameters = torch.load(out / "last.pt", weights_only=True)["model"].values()
    for way in ((0, 1), (1, 0)):
        messages = [m for m in timeline["messages"] if (m["from"], m["to"]) == way]
        assert {m["pass"] for m in messages} == {"backward"}
        assert {layer for m in messages for layer in m["layer"].split(", ")} == set(LAYERS)
        assert sum(m["bytes"] for m in messages) == 4 * sum(p.numel() for p in parameters)


def test_the_wait_for_gradients_ends_with_the_last_ones_arrival(copies) -> None:
    timeline, _ = copies
    for rank in timeline["ranks"]:
        (wait,) = rank["waits"]
        assert wait["layer"] == "gradients" and wait["begin"] < wait["end"]
        arrivals = [m["arrived"] for m in timeline["messages"] if m["to"] == rank["rank"]]
        assert wait["end"] == pytest.approx(max(arrivals), abs=ROUNDING)


def test_copies_that_are_recorded_train_as_others_do(copies, tmp_path) -> None:
    _, out = copies
    on_ranks(train, 2, str(tmp_path / "plain"), 1, False)
    recorded, plain = (
        torch.load(folder / "last.pt", weights_only=True)["model"]
        for folder in (out, tmp_path / "plain")
    )
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)


def test_what_cannot_be_recorded_says_why() -> None:
    network = AlexNet(TINY)
    assert not why_no_timeline(network)
    assert "columns" in why_no_timeline(torch.nn.Linear(1, 1))
    network.compile()
    assert "--compile" in why_no_timeline(network)


# ---- records made by hand ----


def test_a_block_is_cut_where_its_rank_waited() -> None:
    exchange = TimedExchange("conv3", "forward", (1,), 8, 0.5, 2.0, 2.5, 3.0)
    wait = Span("conv3", "forward", 2.0, 3.0)
    assert cut([Span("conv3", "forward", 1.0, 4.0)], [exchange], [wait]) == [
        Span("conv3", "forward", 1.0, 2.0, "own"),
        Span("conv3", "forward", 3.0, 4.0, "peers"),
    ]


def step(rank: int, wall: float, *exchanges: TimedExchange) -> RankStep:
    return RankStep(rank, (rank,), 14, wall, 1.0, 0.0, exchanges=list(exchanges))


def test_ranks_that_began_at_different_times_are_put_on_one_clock() -> None:
    early = step(0, 100.0, TimedExchange("fc6", "forward", (1,), 8, 0.1, 0.2, 0.6, 0.6))
    late = step(1, 100.25, TimedExchange("fc6", "forward", (0,), 8, 0.3, 0.3, 0.4, 0.4))
    messages = merge([early, late])["messages"]
    assert [(m["from"], m["sent"], m["arrived"]) for m in messages] == [
        (0, 0.1, 0.65),
        (1, 0.55, 0.6),
    ]


def test_buckets_of_one_name_are_paired_in_the_order_in_which_they_were_sent() -> None:
    def bucket(peer: int, sent: float, arrived: float) -> TimedExchange:
        return TimedExchange("fc6", "backward", (peer,), 8, sent, arrived, arrived, arrived)

    one = step(0, 0.0, bucket(1, 0.1, 0.5), bucket(1, 0.2, 0.6))
    other = step(1, 0.0, bucket(0, 0.2, 0.61), bucket(0, 0.1, 0.51))  # noted in another order
    arrivals = [m["arrived"] for m in merge([one, other])["messages"] if m["from"] == 0]
    assert arrivals == [0.51, 0.61]


class Event:
    """A CUDA event of a device that takes a second between any two of them."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1000.0
        self.at = Event.clock

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_on_cuda_the_times_are_the_devices(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    context = ParallelContext(Environment(), torch.device("cuda"), (0, 1))
    context.meter.times_device = True
    network = AlexNet(TINY)
    recorder = StepRecorder(network, context)
    recorder.start()
    recorder.begin_step()
    network(torch.randn(2, 3, 67, 67)).sum().backward()
    recorder.begin_update()
    recorder.end_step(1)
    recorder.stop()
    (found,) = recorder.steps
    blocks = [block for block in found.blocks if block.layer in LAYERS]
    assert [block.begin for block in blocks if block.direction == "forward"] == list(range(1, 9))
    assert all(block.end - block.begin >= 1 for block in blocks)


def test_no_hook_is_left_behind() -> None:
    network = AlexNet(TINY)
    recorder = StepRecorder(network, ParallelContext(Environment(), torch.device("cpu"), (0, 1)))
    recorder.start()
    recorder.stop()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())


def test_the_recorded_step_is_one_of_those_between_timing_and_tracing(columns) -> None:
    assert WARM_UP + TIMED < columns[0]["step"] <= WARM_UP + TIMED + RECORDED
    assert (columns[0]["batch"], columns[0]["column_ranks"], columns[0]["data_ranks"]) == (
        BATCH,
        2,
        1,
    )
