"""The wire format: memory order, type, copies; and the seconds that a rank waits for it."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run
from torch import Tensor

from alexnet_mp.config import Config, ModelConfig, RunConfig
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.layer_table import layer_table
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.exchange import GroupLink, Transfer
from alexnet_mp.parallel.meter import TRAINING

pytestmark = pytest.mark.ranks


def small(**changes) -> ModelConfig:
    return ModelConfig(
        kernels=(4, 6, 8, 6, 4),
        hidden=(12, 10),
        classes=5,
        image_size=67,
        initial_weights=("he",) * 8,
        initial_biases=(0.1,) * 8,
        **changes,
    )


# No ReLU and no maximum: one that falls to the other side changes a small net's gradient by 5 %.
SMOOTH = {"activation": "tanh", "pool_size": 1}


def maps(rank: int, channels_last: bool) -> Tensor:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5) + 1000 * rank
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def swapped(rank: int, formats: tuple[bool, bool]) -> tuple[Tensor, bool, bool]:
    """(What arrives, whether it is channels-last, whether the tensor itself was sent)."""
    with process_group():
        x = maps(rank, formats[rank])
        transfer = Transfer([x], GroupLink(dist.group.WORLD))
        itself = transfer.sent[0].data_ptr() == x.data_ptr()
        (y,) = transfer.wait()
        return y, y.is_contiguous(memory_format=torch.channels_last), itself


@pytest.mark.parametrize(
    "formats",
    [(False, False), (True, True), (True, False)],
    ids=["contiguous", "channels last", "one of each"],
)
def test_maps_arrive_in_the_format_of_what_was_sent(
    formats,
) -> None:
    for rank, (y, last, itself) in enumerate(run(swapped, 2, formats)):
        assert torch.equal(y, maps(1 - rank, False))
        assert last == itself == formats[rank]


def step(
    rank: int, wire: torch.dtype | None, precision: str = "fp32", columns: int = 2
) -> tuple[Tensor, dict, dict, dict]:
    with process_group():
        link = GroupLink(dist.group.WORLD, wire=wire)
        model = AlexNet(small(columns=columns, **SMOOTH), (rank,), link, seed=0).to(
            memory_format=torch.channels_last
        )
        images = torch.randn(4, 3, 67, 67, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images, dropout_keys(0, 0, torch.arange(4)))
        logits.float().square().sum().backward()
        return (
            logits.detach(),
            {k: v.clone() for k, v in model.canonical(lambda p: p.grad).items()},
            dict(link.meter.bytes),
            dict(link.meter.values),
        )


def test_bf16_on_the_wire_halves_the_bytes_but_the_logits_and_stays_close() -> None:
    wide, narrow = run(step, 2, None), run(step, 2, torch.bfloat16)
    assert torch.equal(narrow[0][0], narrow[1][0])  # all ranks have the same logits all the same
    for (logits, gradients, size, values), (logits2, gradients2, size2, values2) in zip(
        wide, narrow, strict=True
    ):
        assert values == values2
        assert {key: (1 if key[1] == "fc8" else 2) * count for key, count in size2.items()} == size
        # bfloat16 has 8 bits, 2^-9 relative for what crosses; 2e-2 is for reduced precision
        assert 0 < (logits2 - logits).abs().max() < 2e-2 * logits.abs().max()
        for name, gradient in gradients.items():
            assert (gradients2[name] - gradient).norm() < 2e-2 * gradient.norm(), name


def test_under_autocast_what_crosses_is_bf16_already() -> None:
    for _, _, size, values in run(step, 2, None, "bf16"):
        assert size == {key: 2 * count for key, count in values.items()}


@pytest.mark.parametrize(
    ("ranks", "precision", "exchange"),
    [(2, "fp32", "same"), (2, "bf16", "same"), (2, "fp32", "bf16"), (4, "fp32", "same")],
)
def test_the_table_of_layers_has_the_bytes_that_the_meter_counts(
    ranks: int, precision: str, exchange: str
) -> None:
    wire = torch.bfloat16 if exchange == "bf16" else None
    table = layer_table(small(columns=ranks, **SMOOTH), precision, exchange)
    expected = {(row["layer"], row["column"]): row["bytes"] for row in table if row["bytes"]}
    for rank, (_, _, size, _) in enumerate(run(step, ranks, wire, precision, ranks)):
        for (_, layer, direction), count in size.items():  # of 4 images, to each of the peers
            assert count == 4 * (ranks - 1) * expected[layer, rank], (layer, direction)
        forward = {layer for _, layer, direction in size if direction == "forward"}
        backward = {layer for _, layer, direction in size if direction == "backward"}
        assert forward == {layer for layer, _ in expected} == backward | {"fc8"}


def wire_of(rank: int, flag: str) -> torch.dtype | None:
    context = init_parallel(
        Config(model=small(), run=RunConfig(device="cpu", exchange_precision=flag))
    )
    try:
        return context.build_model(small(), seed=0).link.wire
    finally:
        context.close()


def test_the_flag_decides_what_the_link_sends() -> None:
    assert run(wire_of, 2, "same") == [None] * 2 and run(wire_of, 2, "bf16") == [torch.bfloat16] * 2


def late_peer(rank: int) -> tuple[float, float]:
    with process_group():
        link = GroupLink(dist.group.WORLD)
        if rank == 1:
            time.sleep(0.3)
        arrive = link.start_exchange("conv3", [torch.ones(2, 3)])
        if rank == 1:
            time.sleep(0.2)  # work beside the transfer
        arrive()
        return link.meter.exposed_seconds[TRAINING], link.meter.in_flight_seconds[TRAINING]


def test_the_meter_tells_waiting_from_what_is_hidden_behind_work() -> None:
    (waited, under_way), (waited_late, under_way_late) = run(late_peer, 2)
    assert 0.2 < waited <= under_way  # its peer was 0.3 s late, and it had nothing else to do
    assert waited_late < 0.15 and under_way_late >= 0.2  # all was there when it asked


def late_peer_on_gpus(rank: int) -> tuple[float, float]:
    torch.cuda.set_device(rank)
    with process_group(backend="nccl"):
        link = GroupLink(dist.group.WORLD)
        link.start_exchange("conv3", [torch.ones(2, 3, device="cuda")])()  # connects
        torch.cuda.synchronize()
        link.meter.times_device = True
        if rank == 1:
            time.sleep(0.3)
        link.start_exchange("conv3", [torch.ones(2, 3, device="cuda")])()
        torch.cuda.synchronize()
        link.meter.resolve_device_times()
        return link.meter.exposed_seconds[TRAINING], link.meter.in_flight_seconds[TRAINING]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_under_nccl_the_meter_sees_the_gpu_wait_for_a_late_peer() -> None:
    (waited, in_flight), (waited_late, _) = run(late_peer_on_gpus, 2)
    assert 0.2 < waited <= in_flight and waited_late < 0.15
