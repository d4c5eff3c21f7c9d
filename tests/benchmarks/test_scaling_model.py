"""The scaling model: its limits, its bytes and memory against what is counted, and its tables."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run

from alexnet_mp import AlexNet, ModelConfig, preset
from alexnet_mp.ops.cpu_library import unavailable_reason
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.parallel.exchange import GroupLink

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import published  # noqa: E402
import scaling_model  # noqa: E402
from step_model import Cluster, Device, Layout, Link, StepModel  # noqa: E402

PAPER = preset("paper").with_fields(classes=1000).model
ENDLESS = Link(float("inf"), 0.0)
COPIES, PAIRS = Layout(1, 8), Layout(2, 4)


def model(link: Link = ENDLESS, far: Link | None = None, size: int = 8, **changes) -> StepModel:
    cluster = Cluster(link, far or link, size)
    return StepModel(PAPER, Device(image=1e-3, update=4e-3), cluster, 4, **changes)


# ---- limits ----


@pytest.mark.parametrize("devices", [2, 8, 64, 1024])
def test_with_endless_bandwidth_and_no_latency_n_devices_are_n_times_as_fast(devices: int) -> None:
    """At 100 images for each copy; an update takes 4 of its 104 ms on one device."""
    free = model()
    one = free.rate(100, Layout(1, 1))
    assert free.rate(100 * devices, Layout(1, devices)) == pytest.approx(devices * one)
    # Two columns share the update too, so a pair with 200 images is level with 200 of one device.
    pairs = free.rate(100 * devices, Layout(2, devices // 2))
    assert pairs == pytest.approx(devices * free.rate(200, Layout(1, 1)))


def test_without_latency_a_wait_is_its_bytes_by_the_bandwidth() -> None:
    """With a work of no time there is nothing to hide behind."""
    link = Link(1e9, 0.0)
    idle = StepModel(PAPER, Device(0.0, 0.0), Cluster(link, link, 8), 4)
    assert idle.step(16, Layout(2, 1)).crossings == pytest.approx(idle.crossing_bytes(16, 2) / 1e9)
    for layout in (COPIES, PAIRS):
        assert idle.step(16, layout).gradients == pytest.approx(idle.gradient_bytes(layout) / 1e9)


def test_latency_counts_once_a_message() -> None:
    """7 crossings: 3 forward and 3 backward, and the logits; 8 layers' rings of 2 (n - 1) sends."""
    link = Link(float("inf"), 1.0)
    idle = StepModel(PAPER, Device(0.0, 0.0), Cluster(link, link, 8), 4)
    assert idle.step(16, Layout(2, 1)).crossings == 7
    assert idle.step(16, COPIES).gradients == 8 * 2 * 7
    # 4 nodes of 2: a ring of 2, and 2 log2(4) between the nodes
    idle.cluster = Cluster(link, link, 2)
    assert idle.step(16, COPIES).gradients == 8 * (2 + 4)


def test_a_slower_link_never_makes_a_step_shorter_and_overlap_never_longer() -> None:
    for layout in (COPIES, PAIRS, Layout(2, 64)):
        waits = [
            model(Link(rate, 1e-5), Link(rate / 8, 1e-5)).step(64, layout).total
            for rate in (1e8, 1e9, 1e10, 1e12)
        ]
        assert waits == sorted(waits, reverse=True)
        exposed = model(Link(1e9, 1e-5), overlap=False).step(64, layout)
        assert exposed.total >= model(Link(1e9, 1e-5)).step(64, layout).total


def test_gradients_wait_for_the_last_layers_sum_only_where_the_link_keeps_up() -> None:
    """conv1's gradient is ready at the end of the backward pass, and its sum hides behind
    nothing."""
    link = Link(1e12, 0.0)
    conv1 = 4 * model().parameters(1, "conv1")
    step = model(link).step(128, Layout(1, 2))
    assert step.gradients == pytest.approx(2 * conv1 / 2 / 1e12)


@pytest.mark.parametrize("devices", [2, 8, 64])
def test_at_the_level_batch_both_layouts_are_as_fast_and_columns_lead_below(devices: int) -> None:
    both = model(Link(1e10, 1e-5), Link(1e9, 1e-5))
    copies, pairs = Layout(1, devices), Layout(2, devices // 2)
    batch = both.level_batch(devices)
    assert both.rate(batch, pairs) == pytest.approx(both.rate(batch, copies), rel=1e-3)
    assert both.rate(batch / 2, pairs) > both.rate(batch / 2, copies)
    assert both.rate(batch * 2, pairs) < both.rate(batch * 2, copies)
    assert model().level_batch(devices) is None  # nothing travels, and pairs share the update


def test_one_device_has_the_rate_it_was_given_and_its_fixed_times_are_cut_at_half() -> None:
    slow = Device.of(rate=100.0, batch=50, update=0.1, overhead=0.05)
    assert slow.image * 50 + slow.update + slow.overhead == pytest.approx(0.5)
    cut = Device.of(rate=100.0, batch=1, update=0.1, overhead=0.1)
    assert (cut.image, cut.update + cut.overhead) == pytest.approx((0.005, 0.005))


# ---- against what is counted ----


def bytes_of_a_step(rank: int, config: ModelConfig, rows: int) -> int:
    """What a rank with one of two columns sends in a forward and a backward pass."""
    with process_group():
        link = GroupLink(dist.group.WORLD)
        network = AlexNet(config, (rank,), link, seed=0).train()
        images = torch.zeros(rows, 3, config.image_size, config.image_size)
        network(images, dropout_keys(0, 0, torch.arange(rows))).sum().backward()
        return link.meter.total_bytes()


@pytest.mark.ranks
def test_bytes_of_the_columns_are_those_that_the_meter_counts() -> None:
    config = ModelConfig(
        kernels=(4, 6, 8, 6, 4), hidden=(12, 10), classes=7, image_size=67, columns=2
    )
    predicted = StepModel(config, Device(0.0, 0.0), Cluster(ENDLESS, ENDLESS, 8), 4)
    assert run(bytes_of_a_step, 2, config, 3) == [predicted.crossing_bytes(3, 2)] * 2


def test_bytes_of_the_paper_are_those_that_exchange_py_measured() -> None:
    measured = json.loads((BENCHMARKS / "results/exchange-2-cores.json").read_text())
    batch = measured["batch_size"]
    assert model().crossing_bytes(batch, 2) == measured["bytes_per_step"]
    assert model().gradient_bytes(Layout(1, 2)) == measured["bytes_per_step_data_parallel"]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_rings_within_and_between_nodes_send_as_much_as_one_ring(size: int) -> None:
    """Both links have one byte per second, so that seconds are bytes."""
    link, count, nodes = Link(1.0, 0.0), 4096.0, 16 // size
    sent = Cluster(link, link, size).all_reduce(count, size, nodes)
    assert sent == pytest.approx(2 * 15 / 16 * count)


@pytest.mark.skipif(bool(unavailable_reason()), reason="the fused layers need a C++ compiler")
def test_activations_are_what_autograd_keeps_of_each_image() -> None:
    network = AlexNet(PAPER, seed=0).train().to(memory_format=torch.channels_last)
    parameters = {value.untyped_storage().data_ptr() for value in network.parameters()}
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    images = torch.zeros(2, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        logits = network(images, dropout_keys(0, 0, torch.arange(2)))
    assert model().activation_bytes(1) == sum(kept.values()) / 2
    assert logits.shape == (2, 1000)


def test_memory_is_weights_gradients_and_velocities_and_copies_have_buckets_too() -> None:
    weights = 4 * 60_965_224
    assert model().memory(0, Layout(1, 1)) == 3 * weights
    assert model().memory(0, Layout(1, 2)) == 4 * weights
    assert model().memory(0, Layout(2, 1)) == 3 * 4 * model().parameters(2)
    # of both columns, which differ by the 1,000 biases of fc8
    assert 2 * model().parameters(2) - 1000 == 60_965_224


# ---- published rows and the command ----


def test_the_published_rows_begin_at_their_own_rate_and_large_errors_have_a_reason() -> None:
    for machine in published.MACHINES:
        rows = published.compare(machine)
        assert rows[0]["predicted"] == pytest.approx(machine.rates[1])
        off = [row for row in rows if abs(row["error"]) > published.TOLERATED]
        assert bool(published.reason(machine, rows)) == bool(off)
    assert [row["devices"] for row in rows if row["error"] > 0] == [2, 4, 8]


def call(monkeypatch, capsys, *flags: str) -> tuple[str, dict]:
    """The printed text and the JSON of the command."""
    monkeypatch.setattr(sys, "argv", ["scaling_model.py", *flags])
    assert scaling_model.main() == 0
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


def test_the_command_prints_its_assumptions_and_reaches_1024_devices(
    monkeypatch, capsys, tmp_path
) -> None:
    picture = tmp_path / "scaling.png"
    text, found = call(monkeypatch, capsys, "--plot", str(picture))
    assert "Assumed:" in text and picture.stat().st_size > 10_000
    for scaling in ("strong", "weak"):
        rows = [row for row in found["rows"] if row["scaling"] == scaling]
        assert {row["devices"] for row in rows} == {2**k for k in range(11)}
        assert rows[0]["efficiency"] == 1.0 and len(rows) == 21
    assert found["level_batches"]["2"] > 0 and found["assumptions"]


def test_measured_rows_are_predicted_from_the_one_device_row(monkeypatch, capsys, tmp_path) -> None:
    results = BENCHMARKS / "results"
    text, found = call(
        monkeypatch,
        capsys,
        *("--check", str(results / "throughput-all-rows-2-cores.json")),
        *("--exchange", str(results / "exchange-2-cores.json")),
        *("--plot", str(tmp_path / "scaling.png")),
        *("--nodes", "1"),
    )
    rows = {row["row"]: row for row in found["check"]}
    assert set(rows) == {"two", "data-parallel"} and "off by" not in text
    assert all(abs(row["error"]) < 0.15 for row in found["check"])


def test_published_prints_both_machines_and_the_reason(monkeypatch, capsys) -> None:
    text, found = call(monkeypatch, capsys, "--published")
    assert "off by more than 15%" in text and len(found["published"]) == 8


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--images-per-second", "0"], "--images-per-second 0"),
        (["--check", "/none"], "/none"),
        (["--check", "pyproject.toml"], "not the JSON of throughput.py"),
        (["--exchange", "pyproject.toml"], "not the JSON of exchange.py"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, flags: list[str], words: str) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    monkeypatch.setattr(sys, "argv", ["scaling_model.py", *flags])
    with pytest.raises((ValueError, OSError), match=words) as caught:
        scaling_model.main()
    assert "\n" not in str(caught.value)
