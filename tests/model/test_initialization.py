"""The start of the weights: the same at any placement, and as its configuration says."""

import functools

import numpy as np
import pytest
import torch
from tiny_networks import images, tiny

from alexnet_mp import AlexNet, build_network, preset
from alexnet_mp.config import LAYERS
from alexnet_mp.model.cross_column import LocalLink


@pytest.mark.parametrize("columns", [2, 4])
def test_a_column_starts_the_same_wherever_it_lives(columns: int) -> None:
    whole = AlexNet(tiny(columns=columns), seed=3).state_dict()
    parts = [
        AlexNet(tiny(columns=columns), (i,), LocalLink(), seed=3).state_dict()
        for i in range(columns)
    ]
    assert sorted(whole) == sorted(name for part in parts for name in part)
    assert all(torch.equal(value, whole[name]) for part in parts for name, value in part.items())


@pytest.mark.parametrize(
    "first, second",
    [
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0)),
        ((0, 0), (2**32, 0)),
        ((0, 0), (2**33, 1)),
        ((1, 0), (0, 1)),
    ],
)
def test_columns_and_seeds_start_unrelated(first: tuple, second: tuple) -> None:
    model = functools.partial(AlexNet, tiny(hidden=(60, 50)))
    a, b = (model(seed=s).columns[str(i)].state_dict() for s, i in (first, second))
    for layer in LAYERS:
        x, y = a[f"{layer}.weight"].flatten(), b[f"{layer}.weight"].flatten()
        # of n independent pairs: standard deviation 1/sqrt(n); five of them
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5, layer


# --- without a seed of its own the network follows torch's generator


def weights_and_masks(**arguments) -> list[torch.Tensor]:
    """All that the seed of a network draws: its weights, and the masks of its second pass."""
    model = AlexNet(tiny(), **arguments)
    model(images())
    return [*model.state_dict().values(), model(images())]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_manual_seed_repeats_a_network_and_two_in_a_row_differ() -> None:
    torch.manual_seed(1)
    first, second = weights_and_masks(), weights_and_masks()
    torch.manual_seed(1)
    assert equal(weights_and_masks(), first) and equal(weights_and_masks(), second)
    torch.manual_seed(2)
    assert not equal(weights_and_masks(), first) and not equal(first, second)


def test_a_network_without_seed_differs_from_another_in_its_masks_too() -> None:
    one, other = AlexNet(tiny()), AlexNet(tiny())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(images()), other.eval()(images()))
    assert not torch.equal(one.train()(images()), other.train()(images()))


def test_a_seed_counts_alone_and_leaves_torchs_generator_as_it_was() -> None:
    torch.manual_seed(1)
    first, state = weights_and_masks(seed=3), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert equal(weights_and_masks(seed=3), first)
    assert not equal(weights_and_masks(seed=4), first)


@pytest.mark.parametrize("name", ["demo", "four-layers"])
def test_build_network_passes_the_seed_on(name: str) -> None:
    config = preset(name).model
    if name == "demo":
        config = tiny()
    a, b, c = (build_network(config, seed=seed).state_dict() for seed in (5, 5, None))
    assert equal(list(a.values()), list(b.values()))
    assert not torch.equal(a["columns.0.conv1.weight"], c["columns.0.conv1.weight"])


def test_initialize_draws_all_weights_anew() -> None:
    model, expected = AlexNet(tiny(), seed=0), AlexNet(tiny(), seed=7)
    model(images())
    model.initialize(7)
    assert equal(list(model.state_dict().values()), list(expected.state_dict().values()))
    assert torch.equal(model(images()), expected(images()))  # the count of passes starts again


def test_the_default_dtype_does_not_change_what_is_drawn() -> None:
    expected = AlexNet(tiny(), seed=3).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = AlexNet(tiny(), seed=3).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(value.dtype == torch.float64 for value in found.values())
    assert all(torch.equal(value.float(), expected[name]) for name, value in found.items())


# --- the configured distributions


@pytest.mark.parametrize("name", ["paper", "original"])
def test_weights_and_biases_are_drawn_as_configured(name: str) -> None:
    expected = {"paper": [0.01] * 8, "original": [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]}[
        name
    ]
    fields = {"kernels": (16, 24, 24, 24, 16), "hidden": (128, 128), "image_size": 64}
    assert preset(name).model.initial_weights == tuple(expected)
    state = AlexNet(preset(name).with_fields(classes=20, **fields).model, seed=0).state_dict()
    for layer, deviation, bias in zip(LAYERS, expected, (0, 1, 0, 1, 1, 1, 1, 0), strict=True):
        for column in (0, 1):
            weight = state[f"columns.{column}.{layer}.weight"].double()
            # 2,048 at least: the relative error of a deviation is 1/sqrt(2n); five of them
            n = weight.numel()
            assert abs(weight.std() / deviation - 1) < 5 / (2 * n) ** 0.5, layer
            assert abs(weight.mean()) < 5 * deviation / n**0.5, layer
            if (layer, column) != ("fc8", 1):
                assert (state[f"columns.{column}.{layer}.bias"] == bias).all(), layer


FAN_IN = {
    "conv1": 363,
    "conv2": 400,
    "conv3": 2 * 216,
    "conv4": 216,
    "conv5": 216,
    "fc6": 32,
    "fc7": 256,
    "fc8": 256,
}


@pytest.mark.parametrize("rule, deviation", [("he", 2**0.5), ("torch", 3**-0.5)])
def test_the_fan_in_counts_all_columns_of_a_crossing(rule: str, deviation: float) -> None:
    fields = {"kernels": (16, 24, 24, 24, 16), "hidden": (128, 128), "classes": 20}
    config = tiny(initial_weights=(rule,) * 8, initial_biases=("torch",) * 8, **fields)
    state = AlexNet(config, seed=0).state_dict()
    for layer, fan_in in FAN_IN.items():
        weight, bias = state[f"columns.0.{layer}.weight"], state[f"columns.0.{layer}.bias"]
        error = 5 / (2 * weight.numel()) ** 0.5
        assert abs(weight.std() * fan_in**0.5 / deviation - 1) < error, layer
        assert 0.5 < bias.abs().max() * fan_in**0.5 <= 1, layer
