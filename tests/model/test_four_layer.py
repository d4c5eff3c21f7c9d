"""The four-layer net of the paper's figure 1, which has AlexNet's interface."""

import pytest
import torch
from torch import nn

from alexnet_mp import preset
from alexnet_mp.config import ModelConfig
from alexnet_mp.model.four_layer import FourLayerNet, build_network
from alexnet_mp.ops.response_norm import LocalResponseNorm


def independent(config: ModelConfig, values: dict[str, torch.Tensor]) -> nn.Sequential:
    """Written down from layers-18pct.cfg, in torch's own layers."""
    act = {"relu": nn.ReLU, "tanh": nn.Tanh}[config.activation]
    norm = (lambda: LocalResponseNorm(5, 2.0, 1e-4, 0.75)) if config.lrn else nn.Identity
    k1, k2, k3 = config.kernels
    side = -(-config.image_size // 8)  # three pools that round up
    layers = nn.Sequential(
        nn.Conv2d(3, k1, 5, padding=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        act(),
        norm(),
        nn.Conv2d(k1, k2, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        norm(),
        nn.Conv2d(k2, k3, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(k3 * side * side, config.classes),
    )
    names = {"0": "conv1", "4": "conv2", "8": "conv3", "12": "fc8"}
    layers.load_state_dict(
        {
            f"{at}.{kind}": values[f"columns.0.{name}.{kind}"]
            for at, name in names.items()
            for kind in ("weight", "bias")
        }
    )
    return layers.double()


@pytest.mark.parametrize("changes", [{}, {"activation": "tanh"}, {"lrn": True}, {"image_size": 24}])
def test_it_computes_what_the_2012_file_describes(changes: dict) -> None:
    config = (
        preset("four-layers").with_fields(classes=10, initial_weights=("he",) * 4, **changes).model
    )
    model = build_network(config, seed=1).double()
    other = independent(config, model.state_dict())
    images = torch.randn(
        4, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)
    ).double()
    labels = torch.tensor([0, 3, 9, 3])
    logits = [net(images) for net in (model, other)]
    assert logits[0].shape == (4, 10)
    assert torch.allclose(*logits, rtol=1e-10, atol=1e-12)
    for values in logits:
        nn.functional.cross_entropy(values, labels).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_a_configuration_says_which_network_it_is() -> None:
    assert isinstance(build_network(preset("four-layers").model), FourLayerNet)
    assert not isinstance(build_network(preset("demo").model), FourLayerNet)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": 2}, "--columns 2"),
        ({"kernels": (1, 2)}, "3 positive numbers, conv1 to conv3"),
        ({"hidden": (5, 5)}, "--hidden"),
        ({"dropout_rate": 0.5}, "--dropout-rate 0.5"),
        ({"map_norm": True}, "--map-norm"),
        ({"conv1_padding": (0, 3, 0, 3)}, "--conv1-padding"),
        ({"initial_weights": ("he",) * 8}, "needs 4 values"),
    ],
)
def test_what_the_four_layer_net_lacks_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preset("four-layers").with_fields(**changes)
