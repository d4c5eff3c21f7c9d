"""The network under PyTorch's own tools: hooks, torch.func, tracing, meta device, pruning, copies.

Each tool is compared with the network as it computes without it. Both sides are float64, so that
kernels and torch's operations, which round differently, agree to 1e-9.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_networks import images, tiny
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from alexnet_mp import AlexNet, build_network, preset
from alexnet_mp.ops.dropout import dropout_keys

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
LABELS = torch.tensor([0, 3, 4])


def network(**changes) -> AlexNet:
    return AlexNet(tiny(**changes), seed=0).double().eval()


def pictures() -> Tensor:
    return images().double()


def loss_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="sum")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def gradients_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


# --- hooks


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if not list(m.children())}


@pytest.mark.parametrize("changes", [{}, {"activation": "tanh"}, {"map_norm": True}], ids=str)
def test_a_forward_hook_fires_once_for_every_layer(changes: dict) -> None:
    model, seen = network(**changes), []
    for name, layer in layers_of(model).items():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(pictures())
    own = [name for name in layers_of(model) if name.startswith("columns")]
    assert sorted(name for name in seen if name.startswith("columns")) == sorted(own)
    assert seen.count("lrn") == 4 and seen.count("map_norm") == 2 * ("map_norm" in changes)


def test_what_a_forward_hook_saw_is_not_changed_later() -> None:
    model, seen = network(), []
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda m, i, y: seen.append((y, y.detach().clone())))
    model.train()(pictures()).sum().backward()
    assert len(seen) == 24 and all(torch.equal(y, then) for y, then in seen)
    assert any((y < 0).any() for y, _ in seen)  # before the ReLU


def test_full_backward_hooks_see_every_layers_gradient() -> None:
    model, seen = network(), []
    for name, layer in layers_of(model).items():
        layer.register_full_backward_hook(lambda m, i, o, name=name: seen.append((name, o[0])))
    expected = gradients_of(network(), pictures(), LABELS)
    found = gradients_of(model, pictures().requires_grad_(), LABELS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {name for name, _ in seen} == set(layers_of(model))
    assert all(gradient.abs().sum() > 0 for _, gradient in seen)


def test_a_crossing_alone_says_that_it_needs_the_other_columns() -> None:
    layer = network().columns["0"].fc6
    with pytest.raises(TypeError, match=r"CrossingLinear\(.*reads 2 columns: call the whole net"):
        layer(torch.zeros(2, 4))
    assert layer(torch.zeros(2, 4).double(), lambda: torch.zeros(2, 4).double()).shape == (2, 12)


# --- torch.func and gradients of gradients


@pytest.mark.parametrize("changes", [{}, {"map_norm": True}, {"lrn_size": 3}], ids=str)
def test_torch_func_grad_is_backwards_gradient(changes: dict) -> None:
    model = network(**changes)
    found = grad(lambda p: loss_of(model, p, pictures(), LABELS))(parameters_of(model))
    torch.testing.assert_close(found, gradients_of(model, pictures(), LABELS), **CLOSE)


def test_vmap_of_grad_gives_each_images_own_gradient() -> None:
    model = network()
    each = vmap(grad(lambda p, x, y: loss_of(model, p, x[None], y[None])), (None, 0, 0))
    found = each(parameters_of(model), pictures(), LABELS)
    for i in range(3):
        expected = gradients_of(model, pictures()[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close({k: v[i] for k, v in found.items()}, expected, **CLOSE)


def test_vmap_in_training_drops_the_units_that_its_keys_name() -> None:
    model, keys = network().train(), dropout_keys(0, 5, torch.arange(3))
    found = vmap(lambda x, key: model(x[None], key[None])[0])(pictures(), keys)
    torch.testing.assert_close(found, model(pictures(), keys), **CLOSE)


def test_vmap_over_the_weights_of_an_ensemble_gives_each_members_logits() -> None:
    members = [AlexNet(tiny(), seed=seed).double().eval() for seed in range(3)]
    state = stack_module_state(members)
    x = pictures()
    found = vmap(lambda *s: functional_call(members[0], s, (x,)))(*state)
    for logits, member in zip(found, members, strict=True):
        torch.testing.assert_close(logits, member(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch's own formulas
@pytest.mark.parametrize("mode", ["torch.func", "dual numbers"])
def test_a_directional_derivative_is_the_limit_of_differences(mode: str) -> None:
    model, x, direction = network(), pictures(), images(seed=1).double()
    if mode == "torch.func":
        found = jvp(model, (x,), (direction,))[1]
    else:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    differences = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    torch.testing.assert_close(found, differences.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"map_norm": True}, {"lrn_size": 3}], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_penalty_has_the_gradient_of_its_values(changes: dict, memory_format) -> None:
    model = network(**changes).to(memory_format=memory_format)

    def penalty(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0].square().sum()

    weight = model.columns["1"].conv1.weight
    found = torch.autograd.grad(penalty(pictures()), weight)[0]
    direction, step = torch.randn_like(weight), 1e-7
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(penalty(pictures()).item())
        with torch.no_grad():
            weight -= sign * step * direction
    expected = (values[0] - values[1]) / (2 * step)
    assert (found * direction).sum().item() == pytest.approx(expected, rel=1e-4)


# --- tracing and export


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch.jit itself is
@pytest.mark.parametrize("name", ["paper", "original", "tutorial", "four-layers"])
def test_a_traced_network_is_saved_and_reads_any_number_of_images(name: str, tmp_path) -> None:
    config = preset(name).model if name == "four-layers" else small_preset(name)
    model = build_network(config, seed=0).double().eval()
    example = images(2, config.image_size).double()
    torch.jit.save(torch.jit.trace(model, example), tmp_path / "traced.pt")
    more = images(3, config.image_size, seed=1).double()
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(more), model(more), **CLOSE)


def small_preset(name: str):
    fields = {"kernels": (4, 6, 8, 6, 4), "hidden": (12, 10), "classes": 5}
    return preset(name).with_fields(**fields).model


def test_an_exported_network_reads_any_number_of_images() -> None:
    model, number = network(), torch.export.Dim("number", min=2)
    exported = torch.export.export(model, (pictures(),), dynamic_shapes={"images": {0: number}})
    more = images(5).double()
    torch.testing.assert_close(exported.module()(more), model(more), **CLOSE)


@pytest.mark.parametrize("name", ["paper", "original", "tutorial", "four-layers"])
def test_torchvision_names_the_nodes_and_extracts_features(name: str) -> None:
    config = preset(name).model if name == "four-layers" else small_preset(name)
    model = build_network(config, seed=0).double().eval()
    names = get_graph_node_names(model, suppress_diff_warning=True)[1]
    first = next(name for name in names if name.startswith("columns.0.conv2"))
    extract = create_feature_extractor(model, [first], suppress_diff_warning=True)
    seen = []
    model.columns["0"].conv2.register_forward_hook(lambda m, i, y: seen.append(y))
    x = images(2, config.image_size).double()
    model(x)
    torch.testing.assert_close(extract(x)[first], seen[0], **CLOSE)


# --- devices, copies, surgery


@pytest.mark.parametrize("name", ["demo", "original", "four-layers"])
def test_a_network_on_the_meta_device_has_shapes_and_no_values(name: str) -> None:
    config = preset(name).model
    with torch.device("meta"):
        model = build_network(config)
        logits = model(torch.empty(2, 3, config.image_size, config.image_size))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert logits.is_meta and logits.shape == (2, config.classes or 1000)


def test_a_network_from_the_meta_device_takes_values_either_way() -> None:
    expected = AlexNet(tiny(), seed=3).eval()
    with torch.device("meta"):
        loaded, drawn = AlexNet(tiny()), AlexNet(tiny())
    loaded.load_state_dict(expected.state_dict(), assign=True)
    drawn.to_empty(device="cpu").initialize(3)
    for model in (loaded, drawn):
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        assert torch.equal(model.eval()(images()), expected(images()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_network_computes_the_same_and_is_another(how: str) -> None:
    model = network()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(pictures()), model(pictures()))
    copied.load_state_dict(AlexNet(tiny(), seed=1).state_dict())
    assert not torch.equal(copied(pictures()), model(pictures()))
    assert torch.equal(network()(pictures()), model(pictures()))


def test_a_crossing_is_pruned_by_its_halves() -> None:
    model = network()
    layer = model.columns["1"].fc6
    for half in ("weight_own", "weight_peers"):
        prune.l1_unstructured(layer, half, amount=0.5)
    pruned = model(pictures())
    for half in ("weight_own", "weight_peers"):
        prune.remove(layer, half)
    weight = model.state_dict()["columns.1.fc6.weight"]
    assert (weight == 0).double().mean() == 0.5
    again = network()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(pictures()), pruned)


def test_torch_save_of_a_whole_network_loads_again() -> None:
    file = io.BytesIO()
    torch.save(network(), file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    assert torch.equal(model(pictures()), network()(pictures()))
