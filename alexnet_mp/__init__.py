"""AlexNet as it ran in 2012: one column on each of two GPUs, which exchange activations only at
conv3 and the fully connected layers.

    from alexnet_mp import AlexNet, Trainer, preset

The names below are the public interface. Each is imported at its first use, so that `import
alexnet_mp` costs nothing and a program that only reads configurations needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alexnet_mp.config import (
        PRESETS,
        Config,
        DataConfig,
        ModelConfig,
        RecipeConfig,
        RunConfig,
        preset,
    )
    from alexnet_mp.data import Splits, build_loaders, load
    from alexnet_mp.inference.load_network import load_network
    from alexnet_mp.model.alexnet import AlexNet
    from alexnet_mp.model.cross_column import LocalLink
    from alexnet_mp.model.four_layer import build_network
    from alexnet_mp.model.numpy_init import describe_layers, initialize_biases, initialize_weights
    from alexnet_mp.ops.response_norm import LocalResponseNorm
    from alexnet_mp.parallel.devices import choose_device
    from alexnet_mp.parallel.exchange import GroupLink
    from alexnet_mp.parallel.meter import Meter
    from alexnet_mp.plotting.predictions import draw_samples
    from alexnet_mp.training.schedule import EarlyStopping
    from alexnet_mp.training.sgd2012 import SGD2012
    from alexnet_mp.training.trainer import Trainer

__version__ = "0.1.0"

_MODULES = {
    "config": (
        "PRESETS",
        "Config",
        "DataConfig",
        "ModelConfig",
        "RecipeConfig",
        "RunConfig",
        "preset",
    ),
    "data": ("Splits", "build_loaders", "load"),
    "inference.load_network": ("load_network",),
    "model.alexnet": ("AlexNet",),
    "model.cross_column": ("LocalLink",),
    "model.four_layer": ("build_network",),
    "model.numpy_init": ("describe_layers", "initialize_biases", "initialize_weights"),
    "ops.response_norm": ("LocalResponseNorm",),
    "parallel.devices": ("choose_device",),
    "parallel.exchange": ("GroupLink",),
    "parallel.meter": ("Meter",),
    "plotting.predictions": ("draw_samples",),
    "training.schedule": ("EarlyStopping",),
    "training.sgd2012": ("SGD2012",),
    "training.trainer": ("Trainer",),
}
_MODULE_OF = {name: f"alexnet_mp.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "PRESETS",
    "SGD2012",
    "AlexNet",
    "Config",
    "DataConfig",
    "EarlyStopping",
    "GroupLink",
    "LocalLink",
    "LocalResponseNorm",
    "Meter",
    "ModelConfig",
    "RecipeConfig",
    "RunConfig",
    "Splits",
    "Trainer",
    "build_loaders",
    "build_network",
    "choose_device",
    "describe_layers",
    "draw_samples",
    "initialize_biases",
    "initialize_weights",
    "load",
    "load_network",
    "preset",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
