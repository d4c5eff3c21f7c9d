"""Crossings: their two halves as one weight, in state dicts and as an attribute."""

import math

import pytest
import torch
from tiny_networks import images, tiny
from torch import Tensor, nn

from alexnet_mp import AlexNet
from alexnet_mp.model.cross_column import Crossing, CrossingConv2d, CrossingLinear, LocalLink


def layers() -> list[Crossing]:
    """Of column 1 of 3, so that peers are on both sides."""
    made = [CrossingLinear(4, 6, 1, 3), CrossingConv2d(2, 5, 3, 1, 3)]
    for layer in made:
        layer.reset_parameters()
    return made


def whole(layer: Crossing, seed: int = 0) -> Tensor:
    return torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", layers(), ids=["linear", "convolution"])
def test_the_weight_is_both_halves_in_column_order(layer: Crossing) -> None:
    n, weight = layer.inputs, layer.weight
    assert tuple(weight.shape) == layer.weight_shape == tuple(layer.state_dict()["weight"].shape)
    assert torch.equal(weight[:, n : 2 * n], layer.weight_own)
    assert torch.equal(weight[:, :n], layer.weight_peers[:, :n])
    assert torch.equal(weight[:, 2 * n :], layer.weight_peers[:, n:])


def put_by_init(layer: Crossing, values: Tensor) -> None:
    nn.init.zeros_(layer.weight)
    assert not layer.weight_own.any() and not layer.weight_peers.any()
    with torch.no_grad():
        layer.weight.copy_(values)


def put_by_data(layer: Crossing, values: Tensor) -> None:
    layer.weight.data.zero_().add_(values)


def put_by_rows(layer: Crossing, values: Tensor) -> None:
    with torch.no_grad():
        for i, row in enumerate(values):
            layer.weight[i] = row


def put_by_views(layer: Crossing, values: Tensor) -> None:
    for i, row in enumerate(values):
        layer.weight.data[i].copy_(row)


def put_by_assignment(layer: Crossing, values: Tensor) -> None:
    layer.weight = values


@pytest.mark.parametrize(
    "put", [put_by_init, put_by_data, put_by_rows, put_by_views, put_by_assignment]
)
@pytest.mark.parametrize("layer", layers(), ids=["linear", "convolution"])
def test_what_is_put_into_the_weight_reaches_the_halves(layer: Crossing, put) -> None:
    put(layer, whole(layer))
    own, peers = layer.split(whole(layer))
    assert torch.equal(layer.weight_own, own) and torch.equal(layer.weight_peers, peers)
    assert layer.weight_own.requires_grad and layer.weight_own.is_leaf


def test_initialization_sees_the_fan_in_of_all_columns() -> None:
    layer = CrossingLinear(500, 400, 0, 2)
    nn.init.kaiming_normal_(layer.weight)
    for half in (layer.weight_own, layer.weight_peers):  # five standard errors of 200,000 draws
        assert half.std().item() == pytest.approx(math.sqrt(2 / 1000), rel=5 / math.sqrt(400_000))


def test_a_penalty_on_the_weight_has_a_gradient_in_the_halves() -> None:
    layer = layers()[0]
    penalty = layer.weight.square().sum()
    penalty *= 0.5
    penalty.backward()
    assert torch.equal(layer.weight_own.grad, layer.weight_own.detach())
    assert torch.equal(layer.weight_peers.grad, layer.weight_peers.detach())
    assert type(layer.weight * 2) is Tensor


def test_a_weight_that_cannot_be_taken_is_refused_in_one_line() -> None:
    layer = layers()[0]
    with pytest.raises(TypeError, match=r"no parameter can take its place.*layer\.weight\.copy_"):
        layer.weight = nn.Parameter(whole(layer))
    with pytest.raises(ValueError, match=r"weight: got \(6, 4\), this layer needs \(6, 12\)"):
        layer.weight = torch.zeros(6, 4)


@pytest.mark.parametrize("layer", layers(), ids=["linear", "convolution"])
def test_reset_parameters_draws_as_torchs_own_layers(layer: Crossing) -> None:
    bound = 1 / math.sqrt(math.prod(layer.weight_shape[1:]))
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    for parameter in layer.parameters():
        assert 0.3 * bound < parameter.abs().max() <= bound


def test_resetting_every_layer_leaves_none_as_it_was() -> None:
    model = AlexNet(tiny(), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    after = model.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]


# --- state dicts


def test_the_state_dict_has_the_papers_layers_in_the_papers_shapes() -> None:
    with torch.device("meta"):
        model = AlexNet()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
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
    saved, loaded = (AlexNet(tiny(columns=columns), seed=seed).eval() for seed in (1, 2))
    assert not torch.equal(saved(images()), loaded(images()))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(images()), loaded(images()))


def test_a_state_dict_with_variables_lets_gradients_through() -> None:
    layer = layers()[0]
    layer.state_dict(keep_vars=True)["weight"].sum().backward()
    assert (layer.weight_own.grad == 1).all() and (layer.weight_peers.grad == 1).all()
    assert not layer.state_dict()["weight"].requires_grad


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
        AlexNet(tiny()).load_state_dict(state)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_tensor_of_the_wrong_shape_is_refused_in_one_line(tensor: str) -> None:
    state = AlexNet(tiny()).state_dict()
    for broken in (state[tensor][:-1], state[tensor][..., :-1], state[tensor].flatten()[:3]):
        assert [tensor in line for line in refused(state | {tensor: broken})] == [True]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_missing_tensor_is_refused_in_one_line(tensor: str) -> None:
    state = AlexNet(tiny()).state_dict()
    assert refused({key: value for key, value in state.items() if key != tensor}) == [
        f'Missing key(s) in state_dict: "{tensor}".'
    ]


@pytest.mark.parametrize(
    "tensor",
    [*(f"{tensor}_own" for tensor in TENSORS), "columns.1.fc8.bias", "columns.2.fc7.weight"],
)
def test_an_unknown_tensor_is_refused_in_one_line(tensor: str) -> None:
    assert refused(AlexNet(tiny()).state_dict() | {tensor: torch.zeros(5)}) == [
        f'Unexpected key(s) in state_dict: "{tensor}".'
    ]


def test_loading_that_is_not_strict_reports_whole_names() -> None:
    model, state = AlexNet(tiny()), AlexNet(tiny(), seed=1).state_dict()
    state["columns.0.fc6.weight_own"] = state.pop("columns.0.fc6.weight")
    before = model.columns["0"].fc6.weight.detach().clone()
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["columns.0.fc6.weight"]
    assert result.unexpected_keys == ["columns.0.fc6.weight_own"]
    assert torch.equal(model.columns["0"].fc6.weight, before)
    assert torch.equal(model.columns["1"].fc6.weight, state["columns.1.fc6.weight"])


def test_canonical_names_are_those_of_the_state_dict_and_undone() -> None:
    model = AlexNet(tiny())
    model(images()).sum().backward()
    weights, gradients = model.canonical(lambda p: p.detach()), model.canonical(lambda p: p.grad)
    state = model.state_dict()
    assert list(weights) == list(gradients) == list(state)
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert all(torch.equal(part, p.grad) for p, part in model.from_canonical(gradients).items())
    assert set(model.from_canonical(gradients)) == set(model.parameters())
    del gradients["columns.1.fc6.weight"]
    with pytest.raises(KeyError, match=r"columns\.1\.fc6\.weight"):
        model.from_canonical(gradients)


# --- the order of the layer's work


def test_a_crossing_waits_after_its_own_product_and_once_for_all() -> None:
    log: list[str] = []

    class Logging(LocalLink):
        def start_exchange(self, layer: str, x: list[Tensor]):
            arrive = super().start_exchange(layer, x)
            log.append(f"{layer} start")
            return lambda: log.append(f"{layer} wait") or arrive()

    model = AlexNet(tiny(crossings=("conv3", "fc8")), link=Logging()).eval()
    for index, column in model.columns.items():
        layer = column.conv3
        for half in ("own", "peers"):
            product, what = getattr(layer, half), f"{half} {index}"
            setattr(layer, half, lambda x, p=product, what=what: log.append(what) or p(x))
    model(images())
    assert log == ["conv3 start", "own 0", "conv3 wait", "peers 0", "own 1", "peers 1"]
