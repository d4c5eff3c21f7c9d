"""Which network a configuration names: AlexNet, or the four-layer net of the paper's figure 1, with the same interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.model.alexnet import PAPER_CLASSES, AlexNet, Link


class FourLayerColumn(nn.Module):
    """The weights of the four-layer net, which is one column."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        inputs = 3
        for (layer, size), kernels in zip(config.kernel_sizes.items(), config.kernels, strict=True):
            self.add_module(
                layer, nn.utils.skip_init(nn.Conv2d, inputs, kernels, size, padding=size // 2)
            )
            inputs = kernels
        height, width = config.map_sizes()["fc8"]
        self.fc8 = nn.utils.skip_init(
            nn.Linear, inputs * height * width, config.classes or PAPER_CLASSES
        )


class FourLayerNet(AlexNet):
    """Three convolutions and the logits: the net on which the paper compares ReLU with tanh (section 3.1, figure 1).

    The paper refers to cuda-convnet's files for it; this is example-layers/layers-18pct.cfg: 5x5 kernels, a maximum and two
    average pools of 3x3 pixels at stride 2, whose last window may reach over the edge. LRN, where it is on, is the paper's. Shapes
    at line ends are those at 32 pixels.
    """

    column_kind = FourLayerColumn

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S). There is no dropout: `keys` change nothing."""
        size, stride = self.config.pool_size, self.config.pool_stride
        x = self._read("conv1", self._images(images))  # 32 x 32 x 32
        x = self._activate(
            [F.max_pool2d(y, size, stride, ceil_mode=True) for y in x]
        )  # 32 x 16 x 16
        x = self._activate(self._read("conv2", self._norm(x)))  # 32 x 16 x 16
        x = self._norm([F.avg_pool2d(y, size, stride, ceil_mode=True) for y in x])  # 32 x 8 x 8
        x = self._activate(self._read("conv3", x))  # 64 x 8 x 8
        x = [
            F.avg_pool2d(y, size, stride, ceil_mode=True).flatten(1) for y in x
        ]  # 64 x 4 x 4 -> 1024
        return self.link.sum("fc8", self._read("fc8", x))


def build_network(
    config: ModelConfig,
    columns: Sequence[int] | None = None,
    link: Link | None = None,
    seed: int = 0,
) -> AlexNet:
    """The network that `config.network` names, or the `columns` of it that live here; see AlexNet."""
    kind = {"alexnet": AlexNet, "four-layers": FourLayerNet}[config.network]
    return kind(config, columns, link, seed)
