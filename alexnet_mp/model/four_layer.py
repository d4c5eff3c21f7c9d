"""The four-layer net of the paper's figure 1, and `build_network`, which builds either network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.model.alexnet import PAPER_CLASSES, AlexNet, without_values
from alexnet_mp.model.cross_column import Link
from alexnet_mp.model.image_check import check_images


class FourLayerColumn(nn.Module):
    """The weights of the four-layer net, which is one column."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        inputs = 3
        for (layer, size), kernels in zip(config.kernel_sizes.items(), config.kernels, strict=True):
            conv = without_values(nn.Conv2d, inputs, kernels, size, padding=size // 2)
            self.add_module(layer, conv)
            inputs = kernels
        height, width = config.map_sizes()["fc8"]
        classes = config.classes or PAPER_CLASSES
        self.fc8 = without_values(nn.Linear, inputs * height * width, classes)


class FourLayerNet(AlexNet):
    """Three convolutions and the logits, for comparing ReLU with tanh (P 3.1, figure 1).

    The paper refers to cuda-convnet's files for it; this is example-layers/layers-18pct.cfg: 5x5
    kernels, a maximum and two average pools of 3x3 pixels at stride 2, whose last window may reach
    over the edge. LRN, where it is on, is the paper's. Shapes at line ends are those at 32 pixels.
    """

    column_type = FourLayerColumn

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S). `keys` change nothing, without dropout."""
        check_images(images, self.config)
        x = self._layer("conv1", [images])  # 32 x 32 x 32
        x = self._activate(self._max_pool(x))  # 32 x 16 x 16
        x = self._activate(self._layer("conv2", self._norm("lrn1", x)))  # 32 x 16 x 16
        x = self._norm("lrn2", self._average_pool(x))  # 32 x 8 x 8
        x = self._activate(self._layer("conv3", x))  # 64 x 8 x 8
        x = self._flatten(self._average_pool(x))  # 64 x 4 x 4 -> 1024
        return self.link.sum("fc8", self._layer("fc8", x))  # 10

    def _max_pool(self, x: list[Tensor]) -> list[Tensor]:
        return [F.max_pool2d(y, *self.pool, ceil_mode=True) for y in x]

    def _average_pool(self, x: list[Tensor]) -> list[Tensor]:
        return [F.avg_pool2d(y, *self.pool, ceil_mode=True) for y in x]


def build_network(
    config: ModelConfig,
    columns: Sequence[int] | None = None,
    link: Link | None = None,
    seed: int | None = None,
) -> AlexNet:
    """The network that `config.network` names, or its `columns` that live here; see AlexNet.

    >>> network = build_network(preset("four-layers").model)
    """
    kind = {"alexnet": AlexNet, "four-layers": FourLayerNet}[config.network]
    return kind(config, columns, link, seed)
