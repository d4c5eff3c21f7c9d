"""Reads a trained network and everything that is needed to show it images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alexnet_mp.config import Config
from alexnet_mp.data import Augment, Statistics, needs_statistics
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.weights import checkpoint_file


@dataclass(frozen=True)
class TrainedNetwork:
    """The content of a checkpoint: weights, configuration, classes, preprocessing."""

    path: Path
    content: dict[str, Any]
    config: Config
    classes: tuple[str, ...]
    statistics: Statistics | None
    """Of the training images, at `side`; None where preprocessing needs none, and in old files."""

    @property
    def side(self) -> int:
        """The side that images are resized to before they are cropped to the network's size."""
        return self.config.data.resized_side(self.config.model.image_size)

    def build(self, build: Callable[..., AlexNet] = build_network) -> AlexNet:
        """The network with its trained weights, in evaluation mode.

        `build` makes the network of a ModelConfig, or those columns of it that live on this rank.
        """
        model = build(self.config.model)
        checkpoint_file.load_model(self.content, model, self.path)
        return model.eval()

    def augment(self, device: torch.device | str = "cpu") -> Augment:
        """The preprocessing that the network was trained with.

        Raises ValueError where it needs a mean image and the checkpoint, an old one, has none.
        """
        if self.statistics is None and needs_statistics(self.config.data):
            raise ValueError(
                f"{self.path}: holds no mean image of its training images, without which its "
                "network cannot be shown others; it was written before checkpoints kept it"
            )
        return Augment(self.config.data, self.config.model.image_size, self.statistics, device)


def read_network(path: str | Path) -> TrainedNetwork:
    """Reads the checkpoint at `path`.

    Raises FileNotFoundError, or ValueError that names the file and says why it cannot be used.
    """
    path = Path(path)
    content = checkpoint_file.read(path)
    try:
        config = Config.from_dict(content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    statistics = content["data"].get("statistics")
    return TrainedNetwork(
        path,
        content,
        config,
        tuple(content["data"]["classes"]),
        Statistics(**statistics) if statistics else None,
    )


def class_difference(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The first difference between `classes` and `others`, which are not equal, in a few words."""
    for name in classes:
        if name not in others:
            return f"there is a class {name!r}"
    for name in others:
        if name not in classes:
            return f"there is no class {name!r}"
    return "the classes stand in another order"
