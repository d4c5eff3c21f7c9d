"""The layout of other programs: one tensor a layer, columns as the groups of a convolution.

Column i has the i-th part of each layer's outputs, and of its inputs where the layer reads its own
column only. Names are `conv1.weight` ... `fc8.bias`; convolutions (out, in / groups, h, w), fully
connected layers (out, in), fc6's inputs in the order channel, row, column.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.config import LAYERS, Config, ModelConfig

READERS = {"conv5": "fc6", "fc6": "fc7", "fc7": "fc8"}
"""The layer that reads the output of each layer that may be followed by dropout."""
CONVOLUTIONS = {"conv1": 11, "conv2": 5, "conv3": 3, "conv4": 3, "conv5": 3}
IMAGE_SIZES = {0: (227, 163, 131, 99, 67), 3: (224, 160, 128, 96, 64)}
"""By the pixels of padding, the image sizes at which no row is left over at any layer."""


def to_grouped(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a whole network, whose names begin with `columns.`, as one tensor a layer.

    A fully connected layer that reads its own column only becomes block-diagonal.
    """
    grouped = {}
    for layer in model.layers:
        weights = [tensors[f"columns.{i}.{layer}.weight"] for i in range(model.columns)]
        if layer == "fc8":
            grouped["fc8.weight"] = torch.cat(weights, 1)
            grouped["fc8.bias"] = tensors["columns.0.fc8.bias"].clone()
            continue
        if weights[0].dim() == 2 and not model.crosses(layer):
            grouped[f"{layer}.weight"] = _block_diagonal(weights)
        else:
            grouped[f"{layer}.weight"] = torch.cat(weights)
        biases = [tensors[f"columns.{i}.{layer}.bias"] for i in range(model.columns)]
        grouped[f"{layer}.bias"] = torch.cat(biases)
    return grouped


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    whole = blocks[0].new_zeros(rows, columns)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def from_grouped(
    grouped: Mapping[str, Tensor], model: ModelConfig, path: Path
) -> dict[str, Tensor]:
    """The inverse of `to_grouped`.

    Raises ValueError that names `path` and the tensor that is missing, has another shape, or
    connects columns that do not read each other.
    """
    for name, shape in grouped_shapes(model).items():
        if name not in grouped or tuple(grouped[name].shape) != shape:
            found = f"has {tuple(grouped[name].shape)}" if name in grouped else "lacks it"
            raise ValueError(f"{path}: {name} should be {shape}, the file {found}")
    tensors = {}
    for layer in model.layers:
        weight, bias = grouped[f"{layer}.weight"], grouped[f"{layer}.bias"]
        if layer == "fc8":
            parts = weight.chunk(model.columns, 1)
            tensors["columns.0.fc8.bias"] = bias.clone()
        else:
            parts = weight.chunk(model.columns)
            if weight.dim() == 2 and model.columns > 1 and not model.crosses(layer):
                parts = _diagonal_blocks(parts, layer, path)
            for i, part in enumerate(bias.chunk(model.columns)):
                tensors[f"columns.{i}.{layer}.bias"] = part.clone()
        for i, part in enumerate(parts):
            tensors[f"columns.{i}.{layer}.weight"] = part.contiguous().clone()
    return tensors


def _diagonal_blocks(rows: tuple[Tensor, ...], layer: str, path: Path) -> tuple[Tensor, ...]:
    blocks = []
    for i, row in enumerate(rows):
        parts = row.chunk(len(rows), 1)
        if any(part.count_nonzero() for j, part in enumerate(parts) if j != i):
            raise ValueError(f"{path}: {layer} connects columns, which this network's does not")
        blocks.append(parts[i])
    return tuple(blocks)


def grouped_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of `to_grouped`. `model.classes` must be set."""
    columns, sizes = model.columns, model.map_sizes()
    outputs = dict(zip(model.layers, (*model.kernels, *model.hidden), strict=False))
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for layer in model.layers:
        if layer in model.kernel_sizes:
            groups = 1 if layer == "conv1" or model.crosses(layer) else columns
            side = model.kernel_sizes[layer]
            total = columns * outputs[layer]
            shapes[f"{layer}.weight"] = (total, inputs // groups, side, side)
        else:
            if layer in sizes:  # the first fully connected layer reads maps
                inputs *= sizes[layer][0] * sizes[layer][1]
            total = model.classes if layer == "fc8" else columns * outputs[layer]
            shapes[f"{layer}.weight"] = (total, inputs)
        shapes[f"{layer}.bias"] = (total,)
        inputs = total
    return shapes


def scale_dropped_inputs(
    grouped: Mapping[str, Tensor], model: ModelConfig, inverse: bool = False
) -> dict[str, Tensor]:
    """`grouped` for a program whose dropout does nothing in testing, as inverted dropout.

    A network with dropout as of 2012 multiplies in testing by the keep rate; here the weights that
    read dropped units are multiplied instead. `inverse` divides: exact for a rate of 0.5.
    """
    scaled = dict(grouped)
    if model.dropout == "2012" and model.dropout_rate:
        keep = 1 - model.dropout_rate
        for layer in model.dropout_after:
            name = f"{READERS[layer]}.weight"
            scaled[name] = scaled[name] / keep if inverse else scaled[name] * keep
    return scaled


def architecture(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """The fields of a ModelConfig that follow from the shapes: columns, kernels, hidden, ...

    `spatial` is the side of the maps that fc6 reads. Raises ValueError that names `path` and the
    tensor that no AlexNet has.
    """
    for layer in LAYERS:
        dimensions = 4 if layer in CONVOLUTIONS else 2
        weight, bias = (shapes.get(f"{layer}.{part}") for part in ("weight", "bias"))
        side = CONVOLUTIONS.get(layer)
        if weight is None or bias is None:
            part = "weight" if weight is None else "bias"
            raise ValueError(f"{path}: there is no {layer}.{part} in it; is it an AlexNet?")
        if len(weight) != dimensions or min(weight) < 1 or (side and weight[2:] != (side, side)):
            wanted = f"(outputs, inputs, {side}, {side})" if side else "(outputs, inputs)"
            raise ValueError(f"{path}: {layer}.weight is {weight}, which should be {wanted}")
        if bias != weight[:1]:
            raise ValueError(f"{path}: {layer}.bias is {bias}, which should be {weight[:1]}")
    if shapes["conv1.weight"][1] != 3:
        raise ValueError(f"{path}: conv1 reads {shapes['conv1.weight'][1]} colors, not 3")
    outputs = {layer: shapes[f"{layer}.weight"][0] for layer in LAYERS}
    inputs = {layer: shapes[f"{layer}.weight"][1] for layer in LAYERS}
    groups = {}
    for before, layer in itertools.pairwise(list(CONVOLUTIONS)):
        groups[layer], rest = divmod(outputs[before], inputs[layer])
        if rest or outputs[layer] % groups[layer]:
            raise ValueError(
                f"{path}: {layer} reads {inputs[layer]} maps, but {before} has {outputs[before]}"
            )
    columns = max(groups.values())
    if not set(groups.values()) <= {1, columns}:
        raise ValueError(f"{path}: its layers have {groups} groups; only one number is possible")
    spatial = round((inputs["fc6"] / outputs["conv5"]) ** 0.5)
    expected = {
        "fc6": outputs["conv5"] * spatial**2,
        "fc7": outputs["fc6"],
        "fc8": outputs["fc7"],
    }
    for layer, values in expected.items():
        if inputs[layer] != values:
            raise ValueError(
                f"{path}: {layer} reads {inputs[layer]} values, which should be {values}"
            )
    for layer in (*CONVOLUTIONS, "fc6", "fc7"):
        if outputs[layer] % columns:
            raise ValueError(f"{path}: {layer} has {outputs[layer]} outputs for {columns} columns")
    crossings = [layer for layer, number in groups.items() if number == 1 and columns > 1]
    return {
        "columns": columns,
        "kernels": tuple(outputs[layer] // columns for layer in CONVOLUTIONS),
        "hidden": (outputs["fc6"] // columns, outputs["fc7"] // columns),
        "crossings": (*crossings, "fc6", "fc7", "fc8") if columns > 1 else ("fc8",),
        "classes": outputs["fc8"],
        "spatial": spatial,
    }


def config_for(base: Config, shapes: Mapping[str, tuple[int, ...]], path: Path) -> Config:
    """`base` with the architecture of `shapes` and an image size that fits them.

    Raises ValueError that names `path` where no image size gives fc6 as many inputs.
    """
    fields = architecture(shapes, path)
    spatial = fields.pop("spatial")
    padding = sum(base.model.conv1_padding[:2])
    for size in (base.model.image_size, *IMAGE_SIZES.get(padding, (224, 227))):
        try:
            config = base.with_fields(**fields, image_size=size)
        except ValueError:  # too small an image for this network
            continue
        if config.model.map_sizes()["fc6"] == (spatial, spatial):
            return config
    raise ValueError(f"{path}: fc6 reads maps of {spatial}x{spatial}, which no image size gives")
