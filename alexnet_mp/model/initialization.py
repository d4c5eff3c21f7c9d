"""The start of the weights, drawn column by column so that no placement can change it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.model.cross_column import Crossing


@torch.no_grad()
def initialize_parameters(config: ModelConfig, columns: Mapping[int, nn.Module], seed: int) -> None:
    """Draws all weights of these columns: N(0, standard deviation), constant biases (P 5).

    `config.initial_weights` and `initial_biases` say which. Each column has its own generator and
    draws in float32 the whole tensors of the state dict, layer by layer, so two ranks start exactly
    as one device does, and the columns start different from each other. Columns on the meta device
    have nothing to be drawn.
    """
    for index, column in columns.items():
        if any(parameter.is_meta for parameter in column.parameters()):
            continue
        generator = torch.Generator("cpu").manual_seed(combine(seed, "column", index))
        values = {}
        for name, weight_rule, bias_rule in zip(
            config.layers, config.initial_weights, config.initial_biases, strict=True
        ):
            layer = getattr(column, name)
            shape = layer.weight_shape if isinstance(layer, Crossing) else layer.weight.shape
            weight = torch.empty(shape, dtype=torch.float32, device="cpu")
            fan_in = weight[0].numel() * (config.columns if name == "fc8" else 1)
            _draw(
                weight,
                math.sqrt(2 / fan_in) if weight_rule == "he" else weight_rule,
                fan_in,
                generator,
            )
            values[f"{name}.weight"] = weight
            if layer.bias is not None:
                bias = torch.empty(layer.bias.shape, dtype=torch.float32, device="cpu")
                if bias_rule == "torch":
                    _draw(bias, "torch", fan_in, generator)
                else:
                    bias.fill_(bias_rule)
                values[f"{name}.bias"] = bias
        column.load_state_dict(values)


def _draw(x: Tensor, rule: float | str, fan_in: int, generator: torch.Generator) -> None:
    """Normal with the standard deviation `rule`; "torch": uniform, as torch's own layers start."""
    if isinstance(rule, str):
        bound = 1 / math.sqrt(fan_in)
        x.uniform_(-bound, bound, generator=generator)
    else:
        x.normal_(0, rule, generator=generator)
