"""The start of the weights, drawn column by column so that no placement can change it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from alexnet_mp.config.seeds import combine

if TYPE_CHECKING:
    from alexnet_mp.model.alexnet import AlexNet


@torch.no_grad()
def initialize_parameters(model: AlexNet, seed: int) -> None:
    """Draws all weights (paper, section 5): N(0, standard deviation), constant biases, as `initial_weights` and `_biases` say.

    Each column has its own generator and draws in float32 the whole tensors of the state dict, layer by layer, so two
    ranks start exactly as one device does, and the columns start different from each other.
    """
    config = model.config
    for column in model.columns.values():
        generator = torch.Generator().manual_seed(combine(seed, "column", column.index))
        values = {}
        for name, weight_rule, bias_rule in zip(
            config.layers, config.initial_weights, config.initial_biases, strict=True
        ):
            layer = getattr(column, name)
            weight = torch.empty(layer.state_dict()["weight"].shape)
            fan_in = weight[0].numel() * (config.columns if name == "fc8" else 1)
            if (
                weight_rule == "torch"
            ):  # torch.nn.Linear and Conv2d: uniform within 1 / sqrt(fan-in)
                weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
            else:
                weight.normal_(
                    0,
                    math.sqrt(2 / fan_in) if weight_rule == "he" else weight_rule,
                    generator=generator,
                )
            values[f"{name}.weight"] = weight
            if layer.bias is not None:
                bias = torch.empty_like(layer.bias, dtype=torch.float32)
                if bias_rule == "torch":
                    bias.uniform_(
                        -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator
                    )
                else:
                    bias.fill_(bias_rule)
                values[f"{name}.bias"] = bias
        column.load_state_dict(values)
