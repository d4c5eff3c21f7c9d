"""The network on one device: its sizes, its start, its names, and what each layer reads. Several ranks are in test_parity.py."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from alexnet_mp.config import LAYERS, ModelConfig
from alexnet_mp.config.presets import PRESETS, preset
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.cross_column import LocalLink
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.model.layer_table import layer_table, summary
from alexnet_mp.ops.pooling import overlapping_max_pool


def small(**changes) -> ModelConfig:
    """A net of some thousand weights whose signals neither vanish nor explode."""
    fields = {
        "kernels": (4, 6, 8, 6, 4),
        "hidden": (12, 10),
        "classes": 5,
        "image_size": 67,
        "initial_weights": ("he",) * 8,
        "initial_biases": (0.1,) * 8,
    }
    return ModelConfig(**fields | changes)


def images(number: int = 3, size: int = 67, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def papers_net() -> AlexNet:
    return AlexNet(preset("paper").model)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Recording(AlexNet):
    """Keeps what each layer of each column put out, before its activation."""

    def _layer(self, name: str, x: list[Tensor]) -> list[Tensor]:
        outputs = super()._layer(name, x)
        for column, y in zip(self.columns, outputs, strict=True):
            self.__dict__.setdefault("outputs", {})[name, int(column)] = y.detach().clone()
        return outputs


# --- sizes


def test_the_papers_net_has_60965224_parameters_a_thousand_classes_and_the_halves_differ_by_the_one_bias_of_fc8() -> (
    None
):
    model = papers_net()
    assert parameters(model) == 60_965_224
    assert [parameters(column) for column in model.columns.values()] == [30_483_112, 30_482_112]
    assert (
        sum(row["parameters"] for row in layer_table(ModelConfig())) == 60_965_224
    )  # 227 pixels without padding: the same


def test_a_rank_holds_the_parameters_of_its_own_column_only() -> None:
    assert [parameters(AlexNet(preset("paper").model, (i,), LocalLink())) for i in (0, 1)] == [
        30_483_112,
        30_482_112,
    ]


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crossings": ("fc8",)},
        {"crossings": LAYERS[1:]},
        {"image_size": 99},
        {"image_size": 64, "conv1_padding": (0, 3, 0, 3)},
    ],
    ids=["paper", "isolated", "all cross", "99 pixels", "padded"],
)
def test_the_summary_tells_the_shapes_and_parameters_that_the_module_has(
    columns: int, changes: dict
) -> None:
    config = small(columns=columns, **changes)
    model = Recording(config)
    model.eval()(images(2, config.image_size))
    rows = layer_table(config)
    for row in rows:
        layer = getattr(model.columns[str(row["column"])], row["layer"])
        assert model.outputs[row["layer"], row["column"]].shape == (2, *row["output"])
        assert row["parameters"] == parameters(layer)
        weights = parameters(layer) - (0 if layer.bias is None else layer.bias.numel())
        assert row["multiply_adds"] == weights * (
            row["output"][1] * row["output"][2] if len(row["output"]) == 3 else 1
        )
    assert len(rows) == len(model.outputs) == 8 * columns
    assert f"{parameters(model):,}" in model.summary().splitlines()[
        -1
    ] and model.summary() == summary(config)


def test_conv3_and_the_fully_connected_layers_read_all_columns_the_others_their_own() -> None:
    for column in (0, 1):
        reads = {
            row["layer"]: row["reads"]
            for row in layer_table(ModelConfig())
            if row["column"] == column
        }
        assert reads == {
            "conv1": "the image",
            "conv2": "its own column",
            "conv3": "all columns",
            "conv4": "its own column",
            "conv5": "its own column",
            "fc6": "all columns",
            "fc7": "all columns",
            "fc8": "its own column",
        }
    assert {row["reads"] for row in layer_table(small(columns=1))} == {
        "the image",
        "its own column",
    }


def test_an_image_that_is_too_small_is_refused_and_the_smallest_that_works_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"--image-size 66: too small .* the smallest that works is 67"
    ):
        small(image_size=66)
    with pytest.raises(ValueError, match="the smallest that works is 64"):
        small(image_size=63, conv1_padding=(0, 3, 0, 3))
    assert AlexNet(small(image_size=67))(images(1)).shape == (1, 5)


@pytest.mark.parametrize(
    "size, maps",
    [
        (227, (55, 27, 13, 6)),
        (163, (39, 19, 9, 4)),
        (131, (31, 15, 7, 3)),
        (99, (23, 11, 5, 2)),
        (67, (15, 7, 3, 1)),
    ],
)
def test_no_row_is_left_over_at_the_recommended_image_sizes(size: int, maps: tuple) -> None:
    for config in (small(image_size=size), small(image_size=size - 3, conv1_padding=(0, 3, 0, 3))):
        sizes = config.map_sizes()
        assert tuple(sizes[name] for name in ("conv1", "pool1", "pool2", "pool5")) == tuple(
            (n, n) for n in maps
        )
    edges = [(size - 11) % 4, *((n - 3) % 2 for n in maps[:3])]
    assert edges == [0, 0, 0, 0]


@pytest.mark.parametrize("columns", [(), (2,), (1, 0), (0, 0), (0, 1, 2), (-1,)])
def test_columns_that_the_network_does_not_have_are_refused(columns: tuple) -> None:
    with pytest.raises(ValueError, match="this network has columns 0 to 1"):
        AlexNet(small(), columns, LocalLink())


def test_a_part_of_the_columns_needs_a_link_to_the_others() -> None:
    with pytest.raises(ValueError, match="only 1 of 2, so a link to the others is needed"):
        AlexNet(small(), (1,))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_prints_and_runs_at_its_own_image_size(name: str) -> None:
    config = preset(name).model
    model = papers_net() if name == "paper" else build_network(config)
    model.eval()
    with torch.no_grad():
        assert model(images(1, config.image_size)).shape == (1, 1000)
    assert parameters(model) == sum(row["parameters"] for row in layer_table(config))
    assert all(layer in str(model) for layer in config.layers)
    model.train()


def test_the_tutorials_net_is_torchvisions_alexnet() -> None:
    ours, theirs = (
        AlexNet(preset("tutorial").with_fields(classes=10).model).eval(),
        torchvision.models.alexnet(num_classes=10).eval(),
    )
    state, places = (
        ours.state_dict(),
        [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)],
    )
    theirs.load_state_dict(
        {
            f"{place}.{kind}": state[f"columns.0.{layer}.{kind}"]
            for place, layer in zip(places, LAYERS, strict=True)
            for kind in ("weight", "bias")
        }
    )
    torch.testing.assert_close(
        ours(images(2, 224)), theirs(images(2, 224)), rtol=1e-5, atol=1e-7
    )  # float32; seen equal
    drops = [
        name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Dropout)
    ]
    assert drops == ["classifier.0", "classifier.3"] and list(ours.columns["0"].dropout) == [
        "conv5",
        "fc6",
    ]


# --- the start


@pytest.mark.parametrize("columns", [2, 4])
def test_a_column_starts_the_same_wherever_it_lives(columns: int) -> None:
    whole = AlexNet(small(columns=columns), seed=3).state_dict()
    parts = [
        AlexNet(small(columns=columns), (i,), LocalLink(), seed=3).state_dict()
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
    model = functools.partial(AlexNet, small(hidden=(60, 50)))
    (seed_a, a), (seed_b, b) = first, second
    a, b = (
        model(seed=seed_a).columns[str(a)].state_dict(),
        model(seed=seed_b).columns[str(b)].state_dict(),
    )
    for layer in LAYERS:
        x, y = a[f"{layer}.weight"].flatten(), b[f"{layer}.weight"].flatten()
        # of n independent pairs: standard deviation 1/sqrt(n); five of them
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5, layer


@pytest.mark.parametrize("name", ["paper", "original"])
def test_weights_are_drawn_with_the_configured_deviation_and_biases_are_the_configured_constants(
    name: str,
) -> None:
    config = preset(name).model
    expected = {"paper": [0.01] * 8, "original": [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01]}[
        name
    ]
    model = AlexNet(
        preset(name)
        .with_fields(kernels=(16, 24, 24, 24, 16), hidden=(128, 128), image_size=64, classes=20)
        .model
    )
    assert config.initial_weights == tuple(expected)
    state = model.state_dict()
    for layer, deviation, bias in zip(LAYERS, expected, (0, 1, 0, 1, 1, 1, 1, 0), strict=True):
        for column in (0, 1):
            weight = state[f"columns.{column}.{layer}.weight"].double()
            n = (
                weight.numel()
            )  # 2,048 at least: the relative error of a deviation is 1/sqrt(2n); five of them
            assert abs(weight.std() / deviation - 1) < 5 / (2 * n) ** 0.5, layer
            assert abs(weight.mean()) < 5 * deviation / n**0.5, layer
            if (layer, column) != ("fc8", 1):
                assert (state[f"columns.{column}.{layer}.bias"] == bias).all(), layer


@pytest.mark.parametrize("rule, deviation", [("he", 2**0.5), ("torch", 3**-0.5)])
def test_initial_weights_by_fan_in_count_all_columns_of_a_crossing(
    rule: str, deviation: float
) -> None:
    config = small(
        kernels=(16, 24, 24, 24, 16), hidden=(128, 128), classes=20, initial_weights=(rule,) * 8
    )
    state = AlexNet(config).state_dict()
    fan_in = {
        "conv1": 363,
        "conv2": 400,
        "conv3": 2 * 216,
        "conv4": 216,
        "conv5": 216,
        "fc6": 32,
        "fc7": 256,
        "fc8": 256,
    }
    for layer in LAYERS:
        weight = state[f"columns.0.{layer}.weight"]
        assert (
            abs(weight.std() * fan_in[layer] ** 0.5 / deviation - 1)
            < 5 / (2 * weight.numel()) ** 0.5
        ), layer


# --- names


def test_the_state_dict_has_the_papers_layers_in_the_papers_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in papers_net().state_dict().items()}
    weights = {
        "conv1": (48, 3, 11, 11),
        "conv2": (128, 48, 5, 5),
        "conv3": (192, 256, 3, 3),
        "conv4": (192, 192, 3, 3),
        "conv5": (128, 192, 3, 3),
        "fc6": (2048, 9216),
        "fc7": (2048, 4096),
        "fc8": (1000, 2048),
    }
    expected = {
        f"columns.{i}.{layer}.weight": shape for i in (0, 1) for layer, shape in weights.items()
    }
    expected |= {
        f"columns.{i}.{layer}.bias": shape[:1]
        for i in (0, 1)
        for layer, shape in weights.items()
        if (layer, i) != ("fc8", 1)
    }
    assert shapes == expected


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_weights_saved_and_loaded_give_the_same_network(columns: int) -> None:
    saved, loaded = (
        AlexNet(small(columns=columns), seed=1).eval(),
        AlexNet(small(columns=columns), seed=2).eval(),
    )
    assert not torch.equal(saved(images()), loaded(images()))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(images()), loaded(images()))


TENSORS = [
    "columns.0.conv3.weight",
    "columns.1.fc6.weight",
    "columns.1.fc7.bias",
    "columns.0.fc8.bias",
    "columns.1.conv1.weight",
]


def refused(state: dict[str, Tensor]) -> list[str]:
    """The lines that say why `state` cannot be loaded, but for the heading."""
    with pytest.raises(RuntimeError) as caught:
        AlexNet(small()).load_state_dict(state)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_tensor_of_the_wrong_shape_is_refused_in_one_line_that_names_it(tensor: str) -> None:
    state = AlexNet(small()).state_dict()
    for broken in (state[tensor][:-1], state[tensor][..., :-1], state[tensor].flatten()[:3]):
        assert [tensor in line for line in refused(state | {tensor: broken})] == [True]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_missing_tensor_is_refused_in_one_line_that_names_it(tensor: str) -> None:
    state = AlexNet(small()).state_dict()
    assert refused({key: value for key, value in state.items() if key != tensor}) == [
        f'Missing key(s) in state_dict: "{tensor}".'
    ]


@pytest.mark.parametrize(
    "tensor",
    [*(f"{tensor}_own" for tensor in TENSORS), "columns.1.fc8.bias", "columns.2.fc7.weight"],
)
def test_an_unknown_tensor_is_refused_in_one_line_that_names_it(tensor: str) -> None:
    assert refused(AlexNet(small()).state_dict() | {tensor: torch.zeros(5)}) == [
        f'Unexpected key(s) in state_dict: "{tensor}".'
    ]


def test_canonical_names_are_those_of_the_state_dict_and_from_canonical_undoes_them() -> None:
    model = AlexNet(small())
    model(images()).sum().backward()
    state, weights, gradients = (
        model.state_dict(),
        model.canonical(lambda p: p.detach()),
        model.canonical(lambda p: p.grad),
    )
    assert list(weights) == list(gradients) == list(state)
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert all(torch.equal(part, p.grad) for p, part in model.from_canonical(gradients).items())
    assert set(model.from_canonical(gradients)) == set(model.parameters())
    with pytest.raises(KeyError, match=r"columns\.1\.fc6\.weight"):
        model.from_canonical(
            {name: value for name, value in gradients.items() if name != "columns.1.fc6.weight"}
        )


# --- what is computed


@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
def test_pooling_before_the_activation_is_the_same_as_after_it(activation) -> None:
    x = (
        images(4, 15).double().requires_grad_()
    )  # different values: with ties two gradients could both be right
    first, second = activation(overlapping_max_pool(x)), overlapping_max_pool(activation(x))
    weights = torch.rand_like(first)
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (first, second))
    if activation is F.relu:  # a window of negatives only has no gradient either way
        assert torch.equal(first, second) and torch.equal(a, b)
    else:  # tanh of a vector and of one number may round differently
        torch.testing.assert_close((first, a), (second, b), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "crossings, first",
    [
        (("conv3", "fc6", "fc7", "fc8"), "conv3"),
        (("fc6", "fc8"), "fc6"),
        (("conv2", "fc8"), "conv2"),
        (("fc8",), None),
    ],
)
def test_a_column_learns_of_the_other_at_the_crossings_only(
    crossings: tuple, first: str | None
) -> None:
    model = Recording(small(crossings=crossings)).eval()
    model(images())
    before = dict(model.outputs)
    with torch.no_grad():
        model.columns["1"].conv1.bias.add_(1.0)
    model(images())
    after = model.outputs
    same = [layer for layer in LAYERS if torch.equal(before[layer, 0], after[layer, 0])]
    assert same == list(
        LAYERS[: LAYERS.index(first)] if first else LAYERS
    )  # fc8's share, that is; the logits are the sum of both
    assert not torch.equal(before["fc8", 1], after["fc8", 1])


class Mirror(LocalLink):
    """Gives, at one layer, each column its own output in place of the other's."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def start_exchange(self, layer: str, x: list[Tensor]):
        return (lambda: x) if layer == self.layer else super().start_exchange(layer, x)


@pytest.mark.parametrize("layer", ["conv3", "fc6", "fc7"])
def test_it_matters_that_a_crossing_gets_the_other_columns_output_and_not_its_own(
    layer: str,
) -> None:
    right, wrong = (
        AlexNet(small(), seed=0).eval(),
        AlexNet(small(), link=Mirror(layer), seed=0).eval(),
    )
    assert not torch.allclose(right(images()), wrong(images()), rtol=1e-2)


def test_without_keys_the_network_counts_its_own_training_passes_so_that_masks_change() -> None:
    model = AlexNet(small(), seed=0)
    passes = [model(images()) for _ in range(2)]
    assert not torch.equal(*passes)
    again = AlexNet(small(), seed=0)
    assert torch.equal(again(images()), passes[0]) and torch.equal(
        again.eval()(images()), model.eval()(images())
    )
