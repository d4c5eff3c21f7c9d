"""The network is the same on several ranks, on one device, and as reference.py writes it again.

Between placements the aim is bit for bit: own half plus peers' half, in the same order everywhere.
Both sides run the same operations on tensors of the same sizes and formats, so that holds on any
processor. It holds with one thread, since threads divide a sum as they like, and for two columns,
whose two terms may be added either way round.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from ranks import process_group, run
from torch import Tensor, nn

from alexnet_mp.config import LAYERS, ModelConfig, RecipeConfig
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.parallel.exchange import GroupLink
from alexnet_mp.training.sgd2012 import build_optimizer

pytestmark = pytest.mark.ranks

STEPS, CLASSES = 20, 5


def small(**changes) -> ModelConfig:
    """A net of some thousand weights whose signals neither vanish nor explode."""
    fields = {
        "kernels": (4, 6, 8, 6, 4),
        "hidden": (12, 10),
        "classes": CLASSES,
        "image_size": 67,
        "initial_weights": ("he",) * 8,
        "initial_biases": (0.1,) * 8,
    }
    return ModelConfig(**fields | changes)


@dataclass
class Batch:
    """A global batch of `rows`."""

    images: Tensor
    labels: Tensor
    rows: int = 0

    def __getitem__(self, index: int) -> Tensor:
        return (self.images, self.labels)[index]


def batches(sizes: list[int], dtype: torch.dtype, image_size: int = 67) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    return [
        Batch(
            torch.randn(n, 3, image_size, image_size, generator=generator).to(dtype),
            torch.randint(CLASSES, (n,), generator=generator),
            rows=n,
        )
        for n in sizes
    ]


@dataclass
class Outcome:
    """The results of one placement."""

    logits: list[Tensor] = field(default_factory=list)  # of every step
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, canonical
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last


def train(model: AlexNet, data: list[Batch], recipe: RecipeConfig) -> Outcome:
    """Steps with dropout over `data`, the rate dropping to a tenth half-way."""
    optimizer, outcome = build_optimizer(model, recipe), Outcome()
    for step, batch in enumerate(data):
        if step == len(data) // 2:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        optimizer.zero_grad()
        logits = model(batch.images, dropout_keys(4, step, torch.arange(len(batch.labels))))
        (nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / batch.rows).backward()
        if step == 0:
            outcome.gradients = {
                name: value.clone() for name, value in model.canonical(lambda p: p.grad).items()
            }
        outcome.logits.append(logits.detach())
        optimizer.step()
    outcome.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return outcome


def train_a_part(
    rank: int,
    config: ModelConfig,
    dtype: torch.dtype,
    sizes: list[int],
    recipe: RecipeConfig,
    channels_last: bool = False,
):
    with process_group():
        share = config.columns // dist.get_world_size()
        link = GroupLink(dist.group.WORLD)
        model = AlexNet(config, range(rank * share, (rank + 1) * share), link, seed=0).to(dtype)
        model = model.to(memory_format=torch.channels_last) if channels_last else model
        return train(model, batches(sizes, dtype, config.image_size), recipe), dict(
            link.meter.values
        )


RECIPE = RecipeConfig(lr=0.01)


def both(
    config: ModelConfig,
    dtype: torch.dtype,
    sizes: list[int],
    ranks: int = 2,
    recipe: RecipeConfig = RECIPE,
    channels_last: bool = False,
):
    """The whole network on one device, and the union of its ranks (channels-last, if asked)."""
    parts = [
        outcome
        for outcome, _ in run(train_a_part, ranks, config, dtype, sizes, recipe, channels_last)
    ]
    whole = train(
        AlexNet(config, seed=0).to(dtype), batches(sizes, dtype, config.image_size), recipe
    )
    for other in parts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parts[0].logits, other.logits, strict=True)), (
            "the ranks' own logits differ"
        )
    union = Outcome(parts[0].logits)
    for part in parts:
        union.gradients |= part.gradients
        union.weights |= part.weights
    return whole, union


def assert_equal(a: Outcome, b: Outcome, tolerance: float = 0.0, after_steps: float = 0.0) -> None:
    """Compares logits, gradients with the ratio of their norms, and weights.

    Tolerances are relative to the largest value of each tensor.
    """
    assert a.gradients.keys() == b.gradients.keys() and a.weights.keys() == b.weights.keys()
    close(a.logits[0], b.logits[0], tolerance, "logits")
    for name, gradient in a.gradients.items():
        assert gradient.norm() > 0, f"{name} has no gradient, so nothing is compared"
        ratio = (b.gradients[name].norm() / gradient.norm()).item()
        assert abs(ratio - 1) <= tolerance, (
            f"{name}: gradient {ratio:.6f} times as large"
        )  # 0.5, 2: dropped or doubled
        close(gradient, b.gradients[name], tolerance, f"gradient of {name}")
    for step, (x, y) in enumerate(zip(a.logits, b.logits, strict=True)):
        close(x, y, after_steps, f"logits of step {step}")
    for name, weight in a.weights.items():
        close(weight, b.weights[name], after_steps, f"{name} after {len(a.logits)} steps")


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, what
    distance, largest = (a - b).abs().max().item(), a.abs().max().item()
    assert distance <= tolerance * largest, (
        f"{what}: {distance:.1e} apart, where the largest is {largest:.1e}"
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """As the ranks have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ORIGINAL = {"layer1_order": "lrn-pool-relu", "map_norm": True, "lrn_alpha": 2e-5}
VARIANTS = {
    "paper": {},
    "tanh": {"activation": "tanh"},
    "original": ORIGINAL,
    "no norm": {"lrn": False},
    "inverted": {"dropout": "inverted"},
    "padded": {"image_size": 64, "conv1_padding": (0, 3, 0, 3)},
    "99 pixels": {"image_size": 99},
    "isolated": {"crossings": ("fc8",)},
    "all cross": {"crossings": LAYERS[1:]},
    "odd sizes": {"kernels": (3, 5, 7, 5, 3), "hidden": (11, 9)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_compute_bit_for_bit_what_one_device_does(
    variant: str, dtype: torch.dtype
) -> None:
    assert_equal(*both(small(**VARIANTS[variant]), dtype, [4] * STEPS))


@pytest.mark.parametrize(
    "sizes",
    [[1] * STEPS, [4, 4, 4, 3], [2, 1, 5, 1]],
    ids=["batches of 1", "a short last batch", "changing batches"],
)
def test_two_ranks_compute_what_one_device_does_at_any_batch_size(sizes: list[int]) -> None:
    assert_equal(*both(small(), torch.float64, sizes))


def test_two_ranks_equal_one_device_with_the_rates_of_the_2012_source() -> None:
    assert_equal(
        *both(
            small(**ORIGINAL),
            torch.float64,
            [4] * STEPS,
            recipe=RecipeConfig(lr=0.01, bias_lr=0.02, bias_decay=False),
        )
    )


def test_two_ranks_in_channels_last_equal_one_device_in_the_default_format() -> None:
    # other convolution kernels, so other sums: rounding (DESIGN: 1e-12, after 20 steps 1e-10)
    assert_equal(
        *both(small(image_size=99), torch.float64, [4] * STEPS, channels_last=True),
        tolerance=1e-12,
        after_steps=1e-10,
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", ["paper", "isolated", "all cross"])
def test_four_columns_compute_the_same_on_four_ranks_on_two_and_on_one(
    variant: str, ranks: int
) -> None:
    # three peers' gradients are added to a fourth in another order: rounding, no more
    assert_equal(
        *both(small(columns=4, **VARIANTS[variant]), torch.float64, [3] * STEPS, ranks),
        tolerance=1e-12,
        after_steps=1e-10,
    )


@pytest.mark.parametrize("crossings", [("fc8",), ("conv3", "fc6", "fc7", "fc8"), LAYERS[1:]])
def test_something_is_sent_at_the_configured_crossings_and_only_there(crossings: tuple) -> None:
    for _, values in run(train_a_part, 2, small(crossings=crossings), torch.float32, [2], RECIPE):
        assert {layer for _, layer, direction in values if direction == "forward"} == set(crossings)
        assert {layer for _, layer, direction in values if direction == "backward"} == set(
            crossings
        ) - {"fc8"}


def dropped_by_rank(rank: int, layer: str) -> Tensor:
    with process_group():
        model = AlexNet(small(activation="tanh"), (rank,), GroupLink(dist.group.WORLD), seed=0)
        return dropped_by(model, layer)[0]


def dropped_by(model: AlexNet, layer: str) -> list[Tensor]:
    """The dropped units of each column in one training pass: tanh is never exactly zero itself."""
    seen: list[Tensor] = []
    for column in model.columns.values():
        column.dropout[layer].register_forward_hook(
            lambda module, inputs, output: seen.append(output == 0)
        )
    model(batches([8], torch.float32)[0].images, dropout_keys(0, 5, torch.arange(8)))
    return seen


@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_two_ranks_drop_the_units_that_one_device_drops(layer: str) -> None:
    whole, ranks = (
        dropped_by(AlexNet(small(activation="tanh"), seed=0), layer),
        run(dropped_by_rank, 2, layer),
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, ranks, strict=True)) and len(whole) == 2
    assert not torch.equal(*whole)  # the columns' masks are not one


# --- against the reference


def settings(config: ModelConfig) -> reference.Settings:
    return reference.Settings(
        config.columns,
        config.conv1_padding,
        config.layer1_order == "lrn-pool-relu",
        config.activation,
        config.lrn_size,
        config.lrn_k,
        config.lrn_alpha,
        config.lrn_beta,
        config.map_norm_alpha if config.map_norm else 0.0,
        config.dropout == "inverted",
        config.dropout_rate,
    )


def arrays(state: dict[str, Tensor], columns: int) -> reference.Arrays:
    return reference.convert({name: value.numpy() for name, value in state.items()}, columns)


def drawn(config: ModelConfig, step: int, rows: int) -> reference.Arrays:
    """The masks that train() draws at `step`, by NumPy's hash; all columns side by side."""
    return {
        layer: np.concatenate(
            [
                reference.dropped_units(
                    4, step, np.arange(rows), layer, column, units, config.dropout_rate
                )
                for column in range(config.columns)
            ],
            1,
        )
        for layer, units in zip(("fc6", "fc7"), config.hidden, strict=True)
    }


def assert_close(ours: reference.Arrays, theirs: reference.Arrays, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(value).max() > 0, name
        assert np.abs(ours[name] - value).max() <= tolerance * np.abs(value).max(), name


REFERENCED = {
    "paper": {"image_size": 99},
    "one column": {"columns": 1},
    "four columns": {"columns": 4},
} | {
    name: VARIANTS[name]
    for name in ("tanh", "original", "inverted", "padded", "isolated", "all cross")
}


@pytest.mark.parametrize("variant", REFERENCED)
def test_the_network_equals_the_reference_written_from_the_formulas(
    variant: str,
) -> None:
    config = small(
        lrn_alpha=0.01,
        map_norm_alpha=0.02,
        **{k: v for k, v in REFERENCED[variant].items() if k != "lrn_alpha"},
    )
    recipe = (
        RecipeConfig(lr=0.01, bias_lr=0.02, bias_decay=False) if variant == "original" else RECIPE
    )
    data, model = (
        batches([4] * STEPS, torch.float64, config.image_size),
        AlexNet(config, seed=0).double(),
    )
    theirs = reference.Network(arrays(model.state_dict(), config.columns), settings(config))
    descent = reference.Descent(theirs, bias_decay=None if recipe.bias_decay else 0.0)

    model.eval()  # testing: no masks, 2012's factor
    np.testing.assert_allclose(
        model(data[0].images).detach(), theirs.logits(data[0].images.numpy()).detach(), rtol=1e-10
    )
    ours = train(model.train(), data, recipe)
    for step, batch in enumerate(data):
        gradients, logits = theirs.gradients(
            batch.images.numpy(), batch.labels.numpy(), drawn(config, step, 4)
        )
        np.testing.assert_allclose(ours.logits[step], logits, rtol=1e-10)
        if step == 0:
            assert_close(arrays(ours.gradients, config.columns), gradients, 1e-10)
        drop = 1 if step < STEPS // 2 else 10
        descent.step(
            gradients, recipe.lr / drop, None if recipe.bias_lr is None else recipe.bias_lr / drop
        )
    # relative to each tensor's largest; sums of other orders, float64's 1e-16 grown over 20 steps
    assert_close(
        arrays(ours.weights, config.columns),
        {name: w.detach().numpy() for name, w in theirs.weights.items()},
        1e-10,
    )


def test_in_float32_the_network_is_the_reference_within_rounding() -> None:
    config = small(image_size=99)
    model, batch = AlexNet(config, seed=0), batches([4], torch.float32, 99)
    theirs = reference.Network(arrays(model.state_dict(), 2), settings(config))
    ours = train(model, batch, RECIPE)
    gradients, logits = theirs.gradients(
        batch[0].images.numpy(), batch[0].labels.numpy(), drawn(config, 0, 4)
    )
    np.testing.assert_allclose(ours.logits[0], logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    assert_close(arrays(ours.gradients, 2), gradients, 1e-5)
