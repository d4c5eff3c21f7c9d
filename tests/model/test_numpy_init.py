"""The tutorial's initialization in NumPy."""

import math

import numpy as np
import pytest
import torch

from alexnet_mp import AlexNet, preset
from alexnet_mp.model.numpy_init import (
    ALEXNET_SHAPES,
    describe_layers,
    initialize_biases,
    initialize_weights,
)


def test_convolutions_have_a_hundredth_and_other_layers_hes_deviation() -> None:
    shapes = [(64, 3, 11, 11), (192, 64, 5, 5), (512, 2304), (100, 512)]
    weights = initialize_weights(shapes, seed=3)
    for weight, shape, deviation in zip(
        weights, shapes, (0.01, 0.01, math.sqrt(2 / 2304), math.sqrt(2 / 512)), strict=True
    ):
        n = weight.size
        assert weight.shape == shape and weight.dtype == np.float64
        # Five standard errors: of the deviation's estimate, and of the mean's.
        assert weight.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n))
        assert abs(weight.mean()) < 5 * deviation / math.sqrt(n)


def test_a_seed_repeats_the_draw_and_none_does_not() -> None:
    shapes = [(4, 3, 2, 2), (5, 16)]
    same, again, other = (initialize_weights(shapes, seed) for seed in (1, 1, None))
    assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(same, other, strict=True))


def test_biases_are_one_behind_a_relu_and_zero_behind_the_image() -> None:
    biases = initialize_biases()
    assert [bias.shape for bias in biases] == [(shape[0],) for shape in ALEXNET_SHAPES]
    assert [np.unique(bias).tolist() for bias in biases] == [[0.0]] + [[1.0]] * 7
    assert [bias[0] for bias in initialize_biases([(2, 3), (2, 2)], [True, False])] == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1, 2, 3, 4, 5), (), (0, 3)])
def test_a_shape_that_is_no_layers_is_refused(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"must be 4-d .* or 2-d"):
        initialize_weights([(4, 3, 5, 5), shape])
    with pytest.raises(ValueError, match=r"must be 4-d .* or 2-d"):
        initialize_biases([shape])


def test_a_wrong_number_of_layers_behind_a_relu_is_refused() -> None:
    with pytest.raises(ValueError, match="1 entries for 2 layers"):
        initialize_biases([(2, 3), (2, 2)], [True])


def test_each_layer_is_described_in_a_line() -> None:
    weights = [np.array([[1.0, 3.0]]), np.zeros((2, 1, 1, 1))]
    lines = describe_layers(weights, initialize_biases([(1, 2), (2, 1, 1, 1)])).splitlines()
    assert (
        lines[0].split()
        == "layer 1: weights 1 x 2 mean 2.000000 standard deviation 1.000000 bias 0".split()
    )
    assert (
        lines[1].split()
        == "layer 2: weights 2 x 1 x 1 x 1 mean 0.000000 standard deviation 0.000000 bias 1".split()
    )


def test_the_same_rules_as_flags_start_a_network_alike() -> None:
    rules = {"initial_weights": (0.01,) * 5 + ("he",) * 3, "initial_biases": (0.0,) + (1.0,) * 7}
    model = AlexNet(
        preset("tutorial")
        .with_fields(image_size=67, kernels=(8, 8, 8, 8, 8), hidden=(64, 64), **rules)
        .model
    )
    state = model.state_dict()
    names = [name.removesuffix(".weight") for name in state if name.endswith("weight")]
    weights = initialize_weights([tuple(state[f"{name}.weight"].shape) for name in names], seed=0)
    biases = initialize_biases([weight.shape for weight in weights])
    for name, weight, bias in zip(names, weights, biases, strict=True):
        theirs = state[f"{name}.weight"]
        # Two estimates of one deviation, each with an error of 1 / sqrt(2 n) of it; five errors of
        # their difference.
        assert theirs.std().item() == pytest.approx(weight.std(), rel=5 / math.sqrt(weight.size)), (
            name
        )
        assert torch.equal(state[f"{name}.bias"], torch.from_numpy(bias).float()), name
