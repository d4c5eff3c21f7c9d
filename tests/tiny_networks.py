"""A configuration of some thousand weights, and images for it, for tests of the network itself."""

import torch
from torch import Tensor

from alexnet_mp.config import ModelConfig


def tiny(**changes) -> ModelConfig:
    """A net whose signals neither vanish nor explode, of 67 pixels and 5 classes."""
    fields = {
        "kernels": (4, 6, 8, 6, 4),
        "hidden": (12, 10),
        "classes": 5,
        "image_size": 67,
        "initial_weights": ("he",) * 8,
        "initial_biases": (0.1,) * 8,
    }
    return ModelConfig(**fields | changes)


def images(number: int = 3, size: int = 67, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))
