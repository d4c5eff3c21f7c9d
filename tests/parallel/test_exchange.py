"""The exchange between ranks: its values, its gradients, its bytes, and its order."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import process_group, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_mp.config import Config, ModelConfig, RunConfig
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.cross_column import Crossing, LocalLink
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.parallel import exchange
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.exchange import GroupLink
from alexnet_mp.training.trainer import Trainer

pytestmark = pytest.mark.ranks

CROSSINGS = ("conv3", "fc6", "fc7", "fc8")
SIZES = {
    "conv3": 6 * 3 * 3,
    "fc6": 4,
    "fc7": 12,
    "fc8": 5,
}  # values that a column of the small net sends for each image


def small(columns: int = 2) -> ModelConfig:
    return ModelConfig(
        columns,
        kernels=(4, 6, 8, 6, 4),
        hidden=(12, 10),
        classes=5,
        image_size=67,
        initial_weights=("he",) * 8,
        initial_biases=(0.1,) * 8,
    )


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(device)


# --- any layout in memory, both ways


def laid_out(layout: str, x: Tensor) -> Tensor:
    """The values of `x`, (N, c) or (N, c, H, W), otherwise in memory."""
    if layout == "sliced":
        return (
            torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
            if x.ndim == 2
            else torch.cat([x + 1, x, x + 2], 1)[:, x.shape[1] : 2 * x.shape[1]]
        )
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last":
        return (
            x.contiguous(memory_format=torch.channels_last)
            if x.ndim == 4
            else x.t().contiguous().t()
        )
    return x


class LaidOut(torch.autograd.Function):
    """Identity whose gradient is laid out as asked."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: str) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.layout == "expanded":
            return gradient[:1].expand(gradient.shape), None
        return laid_out(ctx.layout, gradient), None


def crossed(
    link,
    here: range,
    columns: int,
    layer: str,
    layout: str,
    gradient_layout: str,
    device: str = "cpu",
) -> list[tuple[Tensor, Tensor]]:
    """(Received, gradient of what was given) of each column `here` at one crossing.

    Each column computes something of its own.
    """
    shape = (3, 4, 5, 6) if layer.startswith("conv") else (3, 8)
    leaves = [random(*shape, seed=i, device=device).requires_grad_() for i in here]
    given = [laid_out(layout, leaf) for leaf in leaves]
    assert layout == "contiguous" or not given[0].is_contiguous()
    if layer == "fc8":
        total = link.sum(layer, given)
        LaidOut.apply(total, gradient_layout).mul(
            random(*total.shape, seed=99, device=device)
        ).sum().backward()  # one loss, everywhere
        return [(total.detach(), leaf.grad) for leaf in leaves]
    arrived = link.start_exchange(layer, given)()
    weights = [
        random(*y.shape, seed=10 + i, device=device) for i, y in zip(here, arrived, strict=True)
    ]
    sum(
        (LaidOut.apply(y, gradient_layout) * w).sum() for y, w in zip(arrived, weights, strict=True)
    ).backward()
    return [(y.detach(), leaf.grad) for y, leaf in zip(arrived, leaves, strict=True)]


LAYOUTS = ["contiguous", "sliced", "transposed", "channels last"]
CASES = [(a, b) for a in LAYOUTS for b in [*LAYOUTS, "expanded"]]


def all_layouts_crossed(
    rank: int, columns: int, layer: str, backend: str = "gloo", device: str = "cpu"
) -> list:
    if device == "own":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    with process_group(backend=backend):
        share = columns // dist.get_world_size()
        here, link = range(rank * share, (rank + 1) * share), GroupLink(dist.group.WORLD)
        outcomes = [crossed(link, here, columns, layer, *case, device) for case in CASES]
        return [[(y.cpu(), gradient.cpu()) for y, gradient in outcome] for outcome in outcomes]


def assert_as_on_one_device(by_rank: list, columns: int, layer: str) -> None:
    for number, case in enumerate(CASES):
        expected = crossed(LocalLink(), range(columns), columns, layer, *case)
        found = [column for outcomes in by_rank for column in outcomes[number]]
        assert len(found) == columns
        for (y, gradient), (y0, gradient0) in zip(found, expected, strict=True):
            # More than two gradients, or shares of fc8, are added in another order: rounding.
            rounding = 0 if columns == 2 else 1e-14
            torch.testing.assert_close(
                y, y0, rtol=0, atol=rounding if layer == "fc8" else 0, msg=str(case)
            )
            torch.testing.assert_close(gradient, gradient0, rtol=0, atol=rounding, msg=str(case))


@pytest.mark.parametrize("layer", CROSSINGS)
@pytest.mark.parametrize("columns, ranks", [(2, 2), (4, 2), (4, 4)])
def test_an_exchange_gives_what_concatenation_gives_in_any_memory_layout(
    columns: int, ranks: int, layer: str
) -> None:
    assert_as_on_one_device(run(all_layouts_crossed, ranks, columns, layer), columns, layer)


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device: two ranks share one, through gloo and host memory",
)
@pytest.mark.parametrize("layer", CROSSINGS)
def test_two_ranks_on_one_gpu_exchange_through_gloo(layer: str) -> None:
    assert_as_on_one_device(run(all_layouts_crossed, 2, 2, layer, "gloo", "cuda:0"), 2, layer)


@pytest.mark.cuda
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one for each rank"
)
@pytest.mark.parametrize("layer", CROSSINGS)
def test_two_ranks_on_two_gpus_exchange_through_nccl(layer: str) -> None:
    assert_as_on_one_device(run(all_layouts_crossed, 2, 2, layer, "nccl", "own"), 2, layer)


def step_on_gpus(rank: int, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    device = f"cuda:{rank if backend == 'nccl' else 0}"
    torch.cuda.set_device(device)
    with process_group(backend=backend):
        return one_step(
            AlexNet(small(), (rank,), GroupLink(dist.group.WORLD), seed=0).double().to(device), 4
        )


def one_step(model: AlexNet, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training pass over `number` images."""
    device = next(model.parameters()).device
    images = random(number, 3, model.config.image_size, model.config.image_size).to(
        next(model.parameters())
    )
    logits = model(images, dropout_keys(0, 0, torch.arange(number, device=device)))
    F.cross_entropy(logits, torch.arange(number, device=device) % 5, reduction="sum").backward()
    return logits.detach().cpu(), {
        name: value.cpu() for name, value in model.canonical(lambda p: p.grad).items()
    }


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            "gloo",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
        pytest.param(
            "nccl",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() < 2, reason="needs two CUDA devices"
            ),
        ),
    ],
)
def test_two_ranks_on_gpus_compute_what_the_cpu_does(backend: str) -> None:
    logits, gradients = one_step(AlexNet(small(), seed=0).double(), 4)
    for rank_logits, part in run(step_on_gpus, 2, backend):
        torch.testing.assert_close(
            rank_logits, logits, rtol=1e-10, atol=1e-12
        )  # float64, other sums
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-10, atol=1e-12)


# --- how much


def papers_traffic(rank: int, number: int) -> tuple[dict, dict, Tensor]:
    with process_group():
        link = GroupLink(dist.group.WORLD)
        model = AlexNet(ModelConfig(), (rank,), link, seed=0)
        images = torch.randn(number, 3, 227, 227, generator=torch.Generator().manual_seed(0))
        logits = model(images)
        logits.square().sum().backward()
        return dict(link.meter.values), dict(link.meter.bytes), logits.detach()


def test_each_rank_of_the_papers_net_sends_57576_values_an_image() -> None:
    forward = {
        "conv3": 21_632,
        "fc6": 4_608,
        "fc7": 2_048,
        "fc8": 1_000,
    }  # 128x13x13, 128x6x6, half of 4096, the partial logits
    backward = {
        "conv3": 21_632,
        "fc6": 4_608,
        "fc7": 2_048,
    }  # the gradient of the summed logits is everywhere
    expected = {("training", layer, "forward"): 2 * count for layer, count in forward.items()}
    expected |= {("training", layer, "backward"): 2 * count for layer, count in backward.items()}
    ranks = run(papers_traffic, 2, 2)
    for values, size, _ in ranks:
        assert values == expected
        assert sum(values.values()) == 2 * 57_576
        assert size == {key: 4 * count for key, count in values.items()}
    assert torch.equal(ranks[0][2], ranks[1][2])  # the logits, bit for bit


def traffic(rank: int, number: int, columns: int = 2) -> dict:
    with process_group():
        link = GroupLink(dist.group.WORLD)
        one_step(AlexNet(small(columns), (rank,), link, seed=0), number)
        return dict(link.meter.values)


def test_what_is_sent_per_image_does_not_depend_on_the_batch() -> None:
    for number in (1, 7):
        sent = {("training", layer, "forward"): number * size for layer, size in SIZES.items()}
        sent |= {
            ("training", layer, "backward"): number * size
            for layer, size in SIZES.items()
            if layer != "fc8"
        }
        assert run(traffic, 2, number) == [sent] * 2


def test_on_four_ranks_three_peers_get_a_copy_each() -> None:
    sent = {("training", layer, "forward"): 3 * 2 * size for layer, size in SIZES.items()}
    sent |= {
        ("training", layer, "backward"): 3 * 2 * size
        for layer, size in SIZES.items()
        if layer != "fc8"
    }
    assert run(traffic, 4, 2, 4) == [sent] * 4


class Calls(TorchDispatchMode):
    """Notes every operation that reaches a process group's backend, whoever calls it."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.log.append(func._schema.name.partition("::")[2])
        return func(*args, **kwargs or {})


def calls_of_a_step(rank: int, images: int) -> list[str]:
    with process_group():
        model, calls = AlexNet(small(), (rank,), GroupLink(dist.group.WORLD), seed=0), []
        with Calls(calls):
            dist.barrier()  # shows that a stray call would be seen
            one_step(model, images)
        return calls


def test_a_training_step_sends_at_the_crossings_and_nowhere_else() -> None:
    for calls in run(calls_of_a_step, 2, 2):  # four crossings forward, three of them backward
        assert calls == ["barrier"] + ["send", "recv_"] * 7


def test_without_images_no_message_is_sent() -> None:
    assert run(calls_of_a_step, 2, 0) == [["barrier"]] * 2


def training_and_evaluation(rank: int) -> tuple[dict, int]:
    context = init_parallel(Config(model=small(), run=RunConfig(device="cpu")))
    try:
        model = context.build_model(small(), seed=0)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            torch.optim.SGD(model.parameters(), lr=0.01),
            "cpu",
            0,
            context=context,
            verbose=False,
        )
        images, labels = random(6, 3, 67, 67).float(), torch.arange(6) % 5
        trainer.train([(images[:4], labels[:4])], [(images, labels)], 2)
        return dict(context.meter.values), trainer.images_seen
    finally:
        context.close()


def test_evaluation_is_metered_apart_and_sends_nothing_back() -> None:
    for values, seen in run(training_and_evaluation, 2):
        assert seen == 8
        for layer, size in SIZES.items():
            assert values["training", layer, "forward"] == 8 * size
            assert values["evaluation", layer, "forward"] == 12 * size
        assert {
            layer for phase, layer, way in values if (phase, way) == ("training", "backward")
        } == {"conv3", "fc6", "fc7"}
        assert {
            (phase, layer)
            for phase, layer, way in values
            if phase not in ("training", "evaluation")
        } == {("control", "control")}
        assert not any(way == "backward" for phase, _, way in values if phase == "evaluation")


# --- in which order


def order_of_a_step(rank: int) -> list[str]:
    log: list[str] = []
    with process_group():
        model = AlexNet(small(), (rank,), GroupLink(dist.group.WORLD), seed=0).double()
        start, wait = exchange.dist.batch_isend_irecv, exchange.Transfer.wait
        patch = pytest.MonkeyPatch()
        patch.setattr(
            exchange.dist,
            "batch_isend_irecv",
            lambda operations: log.append("send") or start(operations),
        )
        patch.setattr(exchange.Transfer, "wait", lambda self: log.append("wait") or wait(self))
        for name, layer in model.columns[str(rank)].named_children():
            if isinstance(layer, Crossing):
                for half in ("own", "peers"):
                    product, what = getattr(layer, half), f"{name} {half}"
                    patch.setattr(
                        layer,
                        half,
                        lambda x, product=product, what=what: log.append(what) or product(x),
                    )
                    getattr(layer, f"weight_{half}").register_hook(
                        lambda gradient, what=what: log.append(f"{what} gradient")
                    )
        try:
            one_step(model, 2)
        finally:
            patch.undo()
    return log


def test_a_transfer_is_in_flight_while_the_own_half_is_computed() -> None:
    expected = []
    for layer in ("conv3", "fc6", "fc7"):
        expected += ["send", f"{layer} own", "wait", f"{layer} peers"]
    expected += ["send", "wait"]  # fc8's sum, which has nothing to do meanwhile
    for layer in ("fc7", "fc6", "conv3"):
        expected += [f"{layer} peers gradient", "send", f"{layer} own gradient", "wait"]
    assert run(order_of_a_step, 2) == [expected] * 2


# --- the ends of the range


def pass_without_images(rank: int) -> tuple[tuple[int, ...], dict, bool]:
    with process_group():
        link = GroupLink(dist.group.WORLD)
        logits, gradients = one_step(AlexNet(small(), (rank,), link, seed=0), 0)
        return (
            tuple(logits.shape),
            dict(link.meter.values),
            all((gradient == 0).all() for gradient in gradients.values()),
        )


def test_a_batch_without_images_sends_nothing_and_has_zero_gradients() -> None:
    for shape, values, zero in run(pass_without_images, 2):
        assert shape == (0, 5) and zero
        assert set(values.values()) == {0}


def logits_of(rank: int, columns: int) -> Tensor:
    with process_group():
        share = columns // dist.get_world_size()
        model = AlexNet(
            small(columns),
            range(rank * share, (rank + 1) * share),
            GroupLink(dist.group.WORLD),
            seed=0,
        )
        return one_step(model, 5)[0]


@pytest.mark.parametrize("columns, ranks", [(2, 2), (4, 2), (4, 4)])
def test_all_ranks_have_the_same_logits_bit_for_bit(columns: int, ranks: int) -> None:
    first, *others = run(logits_of, ranks, columns)
    assert all(torch.equal(first, other) for other in others)


# --- when a message arrives


def late_reader(rank: int) -> tuple[float, float, float]:
    """Both ranks send at once and compute for long; when was what: sent, arrived, asked for?"""
    with process_group():
        link = GroupLink(dist.group.WORLD)
        dist.barrier()
        link.meter.exchanges = []
        arrive = link.start_exchange("fc6", [torch.zeros(4, 3)])
        time.sleep(0.5)
        arrive()
        (found,) = link.meter.exchanges
        return found.sent, found.arrived, found.asked


def test_a_message_that_comes_while_a_rank_computes_is_known_to_have_come_then() -> None:
    for sent, arrived, asked in run(late_reader, 2):
        assert sent < arrived < asked - 0.1
