"""A network as every file format is read: configuration, tensors, classes, preprocessing."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.config import Config

STATISTICS = {"mean_image": torch.float32, "covariance": torch.float64}
METADATA = "alexnet_mp"
"""Marks metadata that this program wrote."""


@dataclass(frozen=True)
class NetworkFile:
    """A trained network, whatever file it was read from.

    `config.data`, with the `statistics` that it may need, is the preprocessing of the weights.
    """

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    """The whole network's state dict, `columns.<i>.<layer>.weight` and `.bias`, on the CPU."""
    classes: tuple[str, ...]
    statistics: dict[str, Tensor] | None = None
    """Of the training images: mean_image (3, s, s), covariance (3, 3); None if there are none."""


def to_metadata(network: NetworkFile, statistics: bool = True) -> dict[str, str]:
    """Configuration, classes and preprocessing as texts, for formats that hold such pairs.

    `statistics` False leaves out the mean image, for formats that hold it as a tensor.
    """
    metadata = {
        "format": METADATA,
        "config": json.dumps(network.config.to_dict()),
        "classes": json.dumps(list(network.classes)),
    }
    if statistics and network.statistics:
        metadata["statistics"] = json.dumps(
            {
                name: {
                    "shape": list(value.shape),
                    "base64": base64.b64encode(value.contiguous().numpy().tobytes()).decode(),
                }
                for name, value in network.statistics.items()
            }
        )
    return metadata


def from_metadata(
    metadata: Mapping[str, str], path: Path
) -> tuple[Config, tuple[str, ...], dict[str, Tensor] | None]:
    """The inverse of `to_metadata`. Raises ValueError that names `path` and the wrong part."""
    try:
        part = "configuration"
        config = Config.from_dict(json.loads(metadata["config"]))
        part = "classes"
        classes = tuple(checked_classes(json.loads(metadata["classes"])))
        part = "statistics"
        statistics = None
        if "statistics" in metadata:
            stored = json.loads(metadata["statistics"])
            statistics = {name: _tensor(stored[name], kind) for name, kind in STATISTICS.items()}
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        binascii.Error,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{path}: its {part} cannot be read ({reason})") from None
    return config, classes, checked_statistics(statistics, config, path)


def checked_classes(names: Any) -> list[str]:
    """`names` if it is a list of strings; else ValueError."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of names")
    return names


def checked_statistics(
    statistics: dict[str, Tensor] | None, config: Config, path: Path
) -> dict[str, Tensor] | None:
    """`statistics` if their types and shapes fit `config`; else ValueError that names `path`."""
    if statistics is None:
        return None
    side = config.data.resized_side(config.model.image_size)
    shapes = {"mean_image": (3, side, side), "covariance": (3, 3)}
    for name, kind in STATISTICS.items():
        value = statistics.get(name)
        if value is None or value.dtype != kind or tuple(value.shape) != shapes[name]:
            raise ValueError(f"{path}: its {name} should be {kind} of shape {shapes[name]}")
    return statistics


def _tensor(stored: Mapping[str, Any], kind: torch.dtype) -> Tensor:
    content = base64.b64decode(stored["base64"], validate=True)
    array = np.frombuffer(content, np.float64 if kind == torch.float64 else np.float32)
    return torch.from_numpy(array.copy()).reshape([int(length) for length in stored["shape"]])
