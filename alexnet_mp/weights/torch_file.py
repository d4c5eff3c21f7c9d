"""State dicts of plain PyTorch: the grouped layout, and torchvision's `alexnet` (`tutorial`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.config import LAYERS, Config
from alexnet_mp.config.presets import preset
from alexnet_mp.weights import checkpoint_file
from alexnet_mp.weights.grouped import config_for, from_grouped, scale_dropped_inputs, to_grouped
from alexnet_mp.weights.network_file import METADATA, NetworkFile, from_metadata, to_metadata

TORCHVISION = dict(
    zip(
        LAYERS,
        (
            "features.0",
            "features.3",
            "features.6",
            "features.8",
            "features.10",
            "classifier.1",
            "classifier.4",
            "classifier.6",
        ),
        strict=True,
    )
)
"""torchvision's name of each layer."""
IMAGENET_MEANS = (123.675, 116.28, 103.53)
"""Gray levels of red, green, blue: 255 * (0.485, 0.456, 0.406)."""
IMAGENET_DEVIATIONS = (58.395, 57.12, 57.375)
"""255 * (0.229, 0.224, 0.225)."""


def state_dict_of(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file's `content`, which may lie in `state_dict` or `model`.

    `module.`, which DataParallel puts before names, is left out. ValueError where there is none.
    """
    state = content
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: not a state dict, whose values are tensors with names")
    plain: OrderedDict[str, Tensor] = OrderedDict(
        (name.removeprefix("module."), value) for name, value in state.items()
    )
    plain._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]  # as torch's
    return plain


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of torchvision's `alexnet`."""
    return "features.0.weight" in state and "classifier.6.weight" in state


def read_torchvision(path: Path, base: Config | None = None) -> NetworkFile:
    """Reads the state dict of torchvision's `alexnet`, with its preprocessing."""
    state = state_dict_of(checkpoint_file.load_torch(path), path)
    grouped = {
        f"{layer}.{part}": _float_tensor(state, f"{name}.{part}", path)
        for layer, name in TORCHVISION.items()
        for part in ("weight", "bias")
    }
    base = base or preset("tutorial").with_fields(
        preset="tutorial",
        stored_side=256,
        crop_of=224,
        mean="values",
        mean_values=IMAGENET_MEANS,
        deviations=IMAGENET_DEVIATIONS,
    )
    return _from_grouped(grouped, base, path)


def write_torchvision(network: NetworkFile, path: Path) -> None:
    """Writes the state dict of torchvision's `alexnet`.

    Raises ValueError where that network computes something else than this one.
    """
    theirs = preset("tutorial").model
    for field in ("columns", "lrn", "activation", "conv1_padding", "map_norm", "network"):
        mine, wanted = getattr(network.config.model, field), getattr(theirs, field)
        if mine != wanted:
            flag = field.replace("_", "-")
            raise ValueError(
                f"{network.path}: torchvision's alexnet has --{flag} {wanted}, this network "
                f"{mine}; --preset tutorial is the network that both have"
            )
    if network.config.model.map_sizes()["fc6"] != (6, 6):
        raise ValueError(f"{network.path}: torchvision's alexnet pools its last maps to 6x6")
    grouped = _to_inverted(network)
    state = OrderedDict(
        (f"{name}.{part}", grouped[f"{layer}.{part}"])
        for layer, name in TORCHVISION.items()
        for part in ("weight", "bias")
    )
    checkpoint_file.write_atomically(path, state)


def read_grouped(path: Path, base: Config | None = None) -> NetworkFile:
    """Reads a plain state dict `conv1.weight` ... `fc8.bias`, with or without our metadata.

    `base` says what the network computes where the file does not; without it ValueError is raised.
    """
    state = state_dict_of(checkpoint_file.load_torch(path), path)
    grouped = {
        f"{layer}.{part}": _float_tensor(state, f"{layer}.{part}", path)
        for layer in LAYERS
        if f"{layer}.weight" in state or f"{layer}.bias" in state
        for part in ("weight", "bias")
    }
    stored = getattr(state, "_metadata", None)
    metadata = stored.get(METADATA) if isinstance(stored, dict) else None
    if isinstance(metadata, dict):
        config, classes, statistics = from_metadata(metadata, path)
        plain = scale_dropped_inputs(grouped, config.model, inverse=True)
        tensors = from_grouped(plain, config.model, path)
        return NetworkFile(path, config, tensors, classes, statistics)
    if base is None:
        raise ValueError(
            f"{path}: a state dict that does not say what the network computes (norm, pooling, "
            "padding); name it with --preset"
        )
    return _from_grouped(grouped, base, path)


def write_grouped(network: NetworkFile, path: Path) -> None:
    """Writes a plain state dict, for a module with `groups` and inverted dropout or none.

    Our metadata is an attribute of the dict, as torch's own is, so that load_state_dict takes it.
    """
    state: OrderedDict[str, Tensor] = OrderedDict(_to_inverted(network))
    state._metadata = {METADATA: to_metadata(network)}  # type: ignore[attr-defined]  # as torch's
    checkpoint_file.write_atomically(path, state)


def _to_inverted(network: NetworkFile) -> dict[str, Tensor]:
    grouped = to_grouped(network.tensors, network.config.model)
    return scale_dropped_inputs(grouped, network.config.model)


def _from_grouped(grouped: Mapping[str, Tensor], base: Config, path: Path) -> NetworkFile:
    shapes = {name: tuple(value.shape) for name, value in grouped.items()}
    config = config_for(base.with_fields(dropout="inverted"), shapes, path)
    classes = tuple(f"class {k}" for k in range(config.model.classes))
    return NetworkFile(path, config, from_grouped(grouped, config.model, path), classes)


def _float_tensor(state: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in state:
        raise ValueError(f"{path}: there is no {name} in it")
    value = state[name]
    if not value.dtype.is_floating_point or value.layout != torch.strided:
        raise ValueError(f"{path}: {name} is not a tensor of floating point numbers")
    return value.detach().float()
