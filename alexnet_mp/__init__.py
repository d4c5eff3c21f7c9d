"""AlexNet as it ran in 2012: one column on each of two GPUs, exchanging activations only at conv3 and the fully connected layers."""

from alexnet_mp.config import Config, DataConfig, ModelConfig, RecipeConfig, RunConfig
from alexnet_mp.config.presets import PRESETS, preset
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.cross_column import LocalLink
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.model.numpy_init import initialize_biases, initialize_weights
from alexnet_mp.ops.response_norm import LocalResponseNorm
from alexnet_mp.parallel.exchange import GroupLink, Meter
from alexnet_mp.training.schedule import EarlyStopping
from alexnet_mp.training.sgd2012 import SGD2012
from alexnet_mp.training.trainer import Trainer

__version__ = "0.1.0"
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
    "Trainer",
    "build_network",
    "initialize_biases",
    "initialize_weights",
    "preset",
]
