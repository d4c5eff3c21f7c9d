"""Reads a trained network and everything that is needed to show it images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alexnet_mp.config import Config
from alexnet_mp.data import Augment, Statistics, needs_statistics, resize, try_read
from alexnet_mp.data.decode import SIDE, to_square
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.weights.checkpoint_file import load_tensors
from alexnet_mp.weights.convert import read_network_file


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network in a file: weights, configuration, classes, preprocessing."""

    path: Path
    tensors: dict[str, Tensor]
    """The whole network's state dict."""
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
        load_tensors(self.tensors, model, self.path)
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

    def read_image(self, file: str | Path) -> Tensor | str:
        """The image in `file`, uint8 (3, side, side), or the reason why it cannot be read."""
        return read_square(file, self.side, self.config.data.resize == "warp")


def read_square(file: str | Path, side: int, warp: bool = False) -> Tensor | str:
    """The image in `file`, uint8 (3, side, side), or the reason why it cannot be read.

    Its center, by way of the size that stores have; or with `warp` the whole image.
    """
    image = try_read(Path(file), side if warp else SIDE, warp)
    return image if isinstance(image, str) else resize(torch.from_numpy(image)[None], side)[0]


def read_network(path: str | Path) -> TrainedNetwork:
    """Reads the trained network at `path`, a checkpoint or a file of any other known format.

    Raises FileNotFoundError, or ValueError that names the file and says why it cannot be used.
    """
    file = read_network_file(path)
    statistics = Statistics(**file.statistics) if file.statistics else None
    return TrainedNetwork(file.path, file.tensors, file.config, file.classes, statistics)


class Preprocess:
    """Turns images into the input of a network, as in its test: `preprocess("cat.jpg")`."""

    def __init__(self, network: TrainedNetwork, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network, torch.device(device)
        self.augment = network.augment(device)

    def __call__(self, images: Any) -> Tensor:
        """float32 (N, 3, size, size), on the device, of one image or a sequence of them.

        An image is the name of a file, a PIL image, uint8 RGB of NumPy (height, width, 3), or a
        uint8 tensor (3, height, width); a tensor (N, 3, height, width) is N images. Raises
        ValueError that names the file, or says what was given instead of an image.
        """
        single = isinstance(images, (str, Path, Image.Image)) or (
            isinstance(images, (np.ndarray, Tensor)) and images.ndim == 3
        )
        squares = [self._square(image) for image in ([images] if single else images)]
        if not squares:
            raise ValueError("no images: the sequence is empty")
        return self.augment.test(torch.stack(squares).to(self.device))

    def _square(self, image: Any) -> Tensor:
        """One image, uint8 (3, side, side)."""
        if isinstance(image, (str, Path)):
            square = self.network.read_image(image)
            if isinstance(square, str):
                raise ValueError(f"{image}: {square}")
            return square
        if isinstance(image, Image.Image):
            image = np.asarray(image.convert("RGB"))
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3:
            image = torch.tensor(image).permute(2, 0, 1)
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            shape = tuple(getattr(image, "shape", ()))
            raise ValueError(
                f"not an image: {type(image).__name__} {shape or ''}; give a file's name, a PIL "
                "image, uint8 RGB (height, width, 3) of NumPy, or a uint8 tensor (3, height, width)"
            )
        if image.dtype != torch.uint8:
            raise ValueError(
                f"an image of {image.dtype}; give gray levels from 0 to 255 as uint8, which are "
                "then scaled as the network wants them"
            )
        side, warp = self.network.side, self.network.config.data.resize == "warp"
        return resize(to_square(image.cpu(), side if warp else SIDE, warp), side)[0]


class LoadedNetwork(NamedTuple):
    """A network to be used: `model, classes, preprocess = load_network(FILE)`."""

    model: AlexNet
    classes: tuple[str, ...]
    preprocess: Preprocess

    @torch.no_grad()
    def probabilities(self, images: Any) -> Tensor:
        """float64 (N, classes), on the CPU, of images as `Preprocess` takes them."""
        logits: Tensor = self.model(self.preprocess(images))
        return logits.cpu().double().softmax(1)

    def predict(self, images: Any, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image with their probabilities, best first.

        network = load_network("runs/demo/best.pt")
        network.predict(["cat.jpg"])  # [[("cat", 0.93), ("dog", 0.04), ...]]
        """
        return [best_classes(row, self.classes, top) for row in self.probabilities(images)]


def load_network(path: str | Path, device: torch.device | str = "cpu") -> LoadedNetwork:
    """Loads the trained network at `path` for use from Python, all its columns on one device.

    The file may be a checkpoint (best.pt) or of any other format that launch/convert.py reads.
    Raises FileNotFoundError, or ValueError that names the file and says why it cannot be used.

        model, classes, preprocess = load_network("runs/demo/best.pt")
        logits = model(preprocess("cat.jpg"))  # (1, classes)
    """
    network = read_network(path)
    return LoadedNetwork(network.build().to(device), network.classes, Preprocess(network, device))


def best_classes(
    probabilities: Tensor, classes: Sequence[str], top: int
) -> list[tuple[str, float]]:
    """The `top` most probable classes of one row (classes,), with probabilities, best first."""
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    # A network may have more logits than its training images had classes.
    names = [classes[k] if k < len(classes) else f"class {k}" for k in numbers.tolist()]
    return list(zip(names, values.tolist(), strict=True))


def class_difference(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The first difference between `classes` and `others`, which are not equal, in a few words."""
    for name in classes:
        if name not in others:
            return f"there is a class {name!r}"
    for name in others:
        if name not in classes:
            return f"there is no class {name!r}"
    return "the classes stand in another order"
