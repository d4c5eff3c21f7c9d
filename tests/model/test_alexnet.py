"""The network on one device: its sizes, what each layer reads, and its own dropout masks.

Several ranks are in tests/parallel/test_parity.py, state dicts in test_cross_column.py.
"""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny_networks import images, tiny
from torch import Tensor

from alexnet_mp import PRESETS, AlexNet, build_network, preset
from alexnet_mp.config import LAYERS
from alexnet_mp.model.cross_column import LocalLink
from alexnet_mp.model.layer_table import layer_table
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.pooling import overlapping_max_pool


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- sizes


def test_the_papers_net_has_60965224_parameters() -> None:
    with torch.device("meta"):
        model = AlexNet(preset("paper").model)
        halves = [AlexNet(preset("paper").model, (i,), LocalLink()) for i in (0, 1)]
    assert parameters(model) == 60_965_224
    # The halves differ by the one bias of fc8.
    assert [parameters(column) for column in model.columns.values()] == [30_483_112, 30_482_112]
    assert [parameters(half) for half in halves] == [30_483_112, 30_482_112]


def test_an_image_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--image-size 66: too small .* the smallest that works is 67"
    ):
        tiny(image_size=66)
    with pytest.raises(ValueError, match="the smallest that works is 64"):
        tiny(image_size=63, conv1_padding=(0, 3, 0, 3))
    assert AlexNet(tiny(image_size=67))(images(1)).shape == (1, 5)


def test_the_settings_of_norms_and_dropout_reach_their_modules() -> None:
    net = AlexNet(
        tiny(
            lrn_size=3,
            lrn_k=1.5,
            lrn_alpha=0.01,
            lrn_beta=0.5,
            map_norm=True,
            map_norm_alpha=0.002,
            dropout_rate=0.25,
            dropout="inverted",
            dropout_after=("conv5",),
        )
    )
    assert (net.lrn.size, net.lrn.k, net.lrn.alpha, net.lrn.beta) == (3, 1.5, 0.01, 0.5)
    assert net.map_norm.alpha == 0.002
    for index, column in net.columns.items():
        (dropout,) = column.dropout.values()
        found = dropout.rate, dropout.kind, dropout.layer, dropout.column
        assert found == (0.25, "inverted", "conv5", int(index))


def test_each_dropout_drops_the_output_of_its_own_layer() -> None:
    units = {"conv5": 4, "fc6": 12, "fc7": 10}
    net = AlexNet(tiny(dropout_after=tuple(units)))
    seen = []
    for index, column in net.columns.items():
        for after, dropout in column.dropout.items():
            dropout.register_forward_hook(
                lambda module, args, output, place=(after, index): seen.append(
                    (*place, args[0].shape[1])
                )
            )
    net(images())
    assert seen == [(after, index, n) for after, n in units.items() for index in "01"]


def test_padding_of_each_side_is_added_to_its_own_axis() -> None:
    config = tiny(conv1_padding=(1, 3, 10, 14))  # left, right, top, bottom
    assert config.map_sizes()["conv1"] == (21, 16)  # height, width: (67 + 24 - 11) // 4 + 1, ...
    assert AlexNet(config).eval()(images(1)).shape == (1, 5)


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
def test_no_row_is_left_over_at_the_recommended_sizes(size: int, maps: tuple) -> None:
    for config in (tiny(image_size=size), tiny(image_size=size - 3, conv1_padding=(0, 3, 0, 3))):
        sizes = config.map_sizes()
        assert tuple(sizes[name] for name in ("conv1", "pool1", "pool2", "pool5")) == tuple(
            (n, n) for n in maps
        )
    edges = [(size - 11) % 4, *((n - 3) % 2 for n in maps[:3])]
    assert edges == [0, 0, 0, 0]


@pytest.mark.parametrize("columns", [(), (2,), (1, 0), (0, 0), (0, 1, 2), (-1,)])
def test_columns_that_the_network_does_not_have_are_refused(columns: tuple) -> None:
    with pytest.raises(ValueError, match="this network has columns 0 to 1"):
        AlexNet(tiny(), columns, LocalLink())


def test_a_part_of_the_columns_needs_a_link_to_the_others() -> None:
    with pytest.raises(ValueError, match="only 1 of 2, so a link to the others is needed"):
        AlexNet(tiny(), (1,))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_prints_and_runs_at_its_own_size(name: str) -> None:
    config = preset(name).model
    side = config.image_size
    with torch.device("meta"):
        model = build_network(config)
        assert model(torch.empty(2, 3, side, side)).shape == (2, config.classes or 1000)
    assert parameters(model) == sum(row["parameters"] for row in layer_table(config))
    assert all(layer in str(model) for layer in config.layers)
    if config.network == "alexnet":
        config = preset(name).with_fields(kernels=(4, 6, 8, 6, 4), hidden=(12, 10)).model
    assert torch.isfinite(build_network(config)(images(2, side))).all()


def test_the_tutorials_net_is_torchvisions_alexnet() -> None:
    ours = AlexNet(preset("tutorial").with_fields(classes=10).model).eval()
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    places = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            f"{place}.{kind}": state[f"columns.0.{layer}.{kind}"]
            for place, layer in zip(places, LAYERS, strict=True)
            for kind in ("weight", "bias")
        }
    )
    # float32: sums of up to 9,216 products, whose order the processor's library chooses
    logits = theirs(images(2, 224))
    atol = 1e-5 * logits.abs().max().item()
    torch.testing.assert_close(ours(images(2, 224)), logits, rtol=1e-5, atol=atol)
    drops = [
        name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Dropout)
    ]
    assert drops == ["classifier.0", "classifier.3"]
    assert list(ours.columns["0"].dropout) == ["conv5", "fc6"]


# --- what is computed


@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
def test_pooling_before_the_activation_is_the_same_as_after(activation) -> None:
    # different values: with ties two gradients could both be right
    x = images(4, 15).double().requires_grad_()
    first, second = activation(overlapping_max_pool(x)), overlapping_max_pool(activation(x))
    weights = torch.rand_like(first)
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (first, second))
    if activation is F.relu:  # values are chosen, not computed
        assert torch.equal(first, second) and torch.equal(a, b)
    else:  # tanh of a vector and of one number may round differently
        torch.testing.assert_close((first, a), (second, b), rtol=1e-13, atol=1e-15)


def outputs_of(model: AlexNet) -> dict[tuple[str, int], Tensor]:
    """What each layer of each column puts out, before its activation."""
    outputs: dict[tuple[str, int], Tensor] = {}
    hooks = [
        getattr(column, layer).register_forward_hook(
            lambda m, i, y, key=(layer, int(index)): outputs.update({key: y.detach().clone()})
        )
        for index, column in model.columns.items()
        for layer in LAYERS
    ]
    model(images())
    for hook in hooks:
        hook.remove()
    return outputs


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
    model = AlexNet(tiny(crossings=crossings)).eval()
    before = outputs_of(model)
    with torch.no_grad():
        model.columns["1"].conv1.bias.add_(1.0)
    after = outputs_of(model)
    same = [layer for layer in LAYERS if torch.equal(before[layer, 0], after[layer, 0])]
    # fc8's share, that is; the logits are the sum of both
    assert same == list(LAYERS[: LAYERS.index(first)] if first else LAYERS)
    assert not torch.equal(before["fc8", 1], after["fc8", 1])


class Mirror(LocalLink):
    """Gives, at one layer, each column its own output in place of the other's."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def start_exchange(self, layer: str, x: list[Tensor]):
        return (lambda: x) if layer == self.layer else super().start_exchange(layer, x)


@pytest.mark.parametrize("layer", ["conv3", "fc6", "fc7"])
def test_a_crossing_gets_the_other_columns_output_not_its_own(layer: str) -> None:
    right, wrong = AlexNet(tiny(), seed=0), AlexNet(tiny(), link=Mirror(layer), seed=0)
    logits = right.eval()(images())
    assert not torch.allclose(logits, wrong.eval()(images()), rtol=1e-2)


# --- dropout without keys


def test_own_passes_are_steps_of_training_counted_from_0() -> None:
    counting, told = AlexNet(tiny(), seed=3), AlexNet(tiny(), seed=3)
    passes = []
    for step in range(3):
        passes.append(counting.train()(images()))
        assert torch.equal(passes[-1], told(images(), dropout_keys(3, step, torch.arange(3))))
        counting.eval()(images())  # testing is no step
        counting.train()(images(), dropout_keys(3, 9, torch.arange(3)))  # nor is a pass with keys
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])


# --- adaptive pooling


def test_the_last_pool_is_left_out_where_nothing_is_to_be_pooled(monkeypatch) -> None:
    # Its gradient on CUDA is refused by torch.use_deterministic_algorithms.
    pooled = []
    plain = F.adaptive_avg_pool2d
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, n: pooled.append(n) or plain(x, n))
    fields = {"kernels": (4, 6, 8, 6, 4), "hidden": (12, 10), "classes": 5}
    model = AlexNet(preset("tutorial").with_fields(**fields).model).eval()
    assert model(images(1, 224)).shape == (1, 5) and not pooled
    assert model(images(1, 288)).shape == (1, 5) and pooled == [6]
