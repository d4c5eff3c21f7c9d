"""Features: what the next layer reads, columns side by side."""

import pytest
import torch

from alexnet_mp import AlexNet, ModelConfig, preset
from alexnet_mp.model.four_layer import build_network


def network(columns: int = 2, **fields: object) -> AlexNet:
    small = {"kernels": (4, 6, 8, 6, 4), "hidden": (24, 20), "classes": 5, "image_size": 99}
    model = AlexNet(ModelConfig(columns=columns, **(small | fields)), seed=1).eval()
    with torch.no_grad():
        for column in model.columns.values():
            column.fc6.bias.fill_(0.5)
            column.fc7.bias.uniform_(-1, 1)
    return model


def images(size: int = 99) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_fc7_is_what_fc8_multiplies_columns_side_by_side(columns: int) -> None:
    model = network(columns)
    fc7, logits = model.features(images(), "fc7"), model(images())
    assert fc7.shape == (3, columns * 20) and not fc7.requires_grad
    assert (fc7 >= 0).all() and (fc7 == 0).any() and (fc7 > 0).any()
    weight = torch.cat([column.fc8.weight for column in model.columns.values()], 1)
    assert torch.allclose(fc7 @ weight.T + model.columns["0"].fc8.bias, logits, atol=1e-6)
    assert not any(column.fc8._forward_pre_hooks for column in model.columns.values())


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_each_layers_features_lead_to_the_next_layers(columns: int) -> None:
    model = network(columns, dropout="inverted")
    for layer, reader in (("conv5", "fc6"), ("fc6", "fc7")):
        features = model.features(images(), layer)
        weight = torch.cat([getattr(c, reader).weight for c in model.columns.values()])
        bias = torch.cat([getattr(c, reader).bias for c in model.columns.values()])
        expected = (features @ weight.T + bias).relu()
        assert torch.allclose(model.features(images(), reader), expected, atol=1e-5)
    assert model.features(images(), "conv5").shape == (3, columns * 4 * 2 * 2)


def test_what_has_no_features_is_refused() -> None:
    with pytest.raises(ValueError, match="layer fc8: features are those of conv5, fc6, fc7"):
        network().features(images(), "fc8")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        network().train().features(images())
    half = AlexNet(network().config, columns=(0,), link=network().link).eval()
    with pytest.raises(ValueError, match="on other ranks"):
        half.features(images())


def test_the_four_layer_nets_features_are_those_of_conv3() -> None:
    model = build_network(preset("four-layers").model).eval()
    assert model.features(images(32), "conv3").shape == (3, 64 * 4 * 4)
