"""The configuration, and small things for every room: checked dataclasses, presets, seeds, files.

Imports no other room. Start with `configuration.py`; each preset of `presets.py` names its sources.
"""

from alexnet_mp.config.configuration import Config, DataConfig, RecipeConfig, RunConfig
from alexnet_mp.config.model import LAYERS, ModelConfig, check
from alexnet_mp.config.presets import PRESETS, preset

__all__ = [
    "LAYERS",
    "PRESETS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "RecipeConfig",
    "RunConfig",
    "check",
    "preset",
]
