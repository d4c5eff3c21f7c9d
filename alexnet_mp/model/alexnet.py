"""AlexNet in columns, as figure 2 of the paper draws it: one class for one device and for a column on each of two GPUs.

Every layer works on a list with one tensor per column held here. Shapes at line ends are those of one column of the
paper's net at 227 pixels, without the batch axis. Which columns live where, and how a crossing reaches the others,
is the link's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.model.cross_column import Crossing, CrossingConv2d, CrossingLinear
from alexnet_mp.model.initialization import initialize_parameters
from alexnet_mp.model.layer_table import summary
from alexnet_mp.ops.conv1 import FirstConv2d, first_input
from alexnet_mp.ops.dropout import Dropout, dropout_keys
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm, overlapping_max_pool

PAPER_CLASSES = 1000  # a network made without data has the paper's thousand logits


class Link(Protocol):
    """How a model gets what other columns computed."""

    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Offer these columns' outputs; the callable gives each column here all the others', concatenated in column order."""

    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        """The sum over all columns of tensors of one shape, the same on every rank."""


class LocalLink:
    """All columns are here: nothing has to travel."""

    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        others = [x[:i] + x[i + 1 :] for i in range(len(x))]
        return lambda: [other[0] if len(other) == 1 else torch.cat(other, 1) for other in others]

    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        total = x[0]
        for part in x[1:]:
            total = total + part
        return total


class Column(nn.Module):
    """The weights of one column: what one GPU held in 2012."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        k1, k2, k3, k4, k5 = config.kernels
        u6, u7 = config.hidden
        height, width = config.map_sizes()["fc6"]

        def conv(name: str, inputs: int, kernels: int, size: int) -> nn.Module:
            if config.crosses(name):
                return CrossingConv2d(inputs, kernels, size, index, config.columns)
            return nn.utils.skip_init(nn.Conv2d, inputs, kernels, size, padding=size // 2)

        def linear(name: str, inputs: int, units: int) -> nn.Module:
            if config.crosses(name):
                return CrossingLinear(inputs, units, index, config.columns)
            return nn.utils.skip_init(nn.Linear, inputs, units)

        self.conv1 = nn.utils.skip_init(FirstConv2d, k1)
        self.conv2 = conv("conv2", k1, k2, 5)
        self.conv3 = conv("conv3", k2, k3, 3)
        self.conv4 = conv("conv4", k3, k4, 3)
        self.conv5 = conv("conv5", k4, k5, 3)
        self.fc6 = linear("fc6", k5 * height * width, u6)
        self.fc7 = linear("fc7", u6, u7)
        # Each column multiplies its own fc7 by its share of fc8; the sum of these products has one bias, column 0's.
        self.fc8 = nn.utils.skip_init(
            nn.Linear, u7, config.classes or PAPER_CLASSES, bias=index == 0
        )
        self.dropout = nn.ModuleDict(
            {
                layer: Dropout(config.dropout_rate, layer, index, config.dropout)
                for layer in config.dropout_after
                if config.dropout_rate
            }
        )


class AlexNet(nn.Module):
    """The network of `config`, or the `columns` of it that live here.

    `AlexNet(config)` holds all columns on one device; `columns=(rank,)` with a group link holds one GPU's.
    `seed` draws the initial weights; column i starts the same wherever it is.
    Raises ValueError where the columns are not the configuration's.
    """

    column_kind: type[nn.Module] = Column

    def __init__(
        self,
        config: ModelConfig | None = None,
        columns: Sequence[int] | None = None,
        link: Link | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        columns = tuple(range(config.columns)) if columns is None else tuple(columns)
        if (
            not columns
            or list(columns) != sorted(set(columns))
            or not set(columns) <= set(range(config.columns))
        ):
            raise ValueError(
                f"columns {columns}: this network has columns 0 to {config.columns - 1}, each named once and in order"
            )
        if link is None and len(columns) < config.columns:
            raise ValueError(
                f"columns {columns}: only {len(columns)} of {config.columns}, so a link to the others is needed"
            )
        self.link = link or LocalLink()
        self.columns = nn.ModuleDict({str(i): self.column_kind(config, i) for i in columns})
        self.lrn = (
            LocalResponseNorm(config.lrn_size, config.lrn_k, config.lrn_alpha, config.lrn_beta)
            if config.lrn
            else nn.Identity()
        )
        self.map_norm = MapNorm(alpha=config.map_norm_alpha) if config.map_norm else nn.Identity()
        self.activation = {"relu": F.relu_, "tanh": torch.tanh_}[config.activation]
        self.seed, self.training_passes = seed, 0
        initialize_parameters(self, seed)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S).

        `keys` (N,) from `dropout_keys` name the rows of the global batch, so that masks do not depend on placement;
        without them the model counts its own training passes.
        """
        if keys is None and self.training:
            keys = self._next_keys(images)
        x = self._images(images)  #   3 x 227 x 227, the same for every column
        x = self._layer1(self._read("conv1", x))  #  48 x 55 x 55 -> 48 x 27 x 27
        x = self._layer2(self._read("conv2", x))  # 128 x 27 x 27 -> 128 x 13 x 13
        x = self._activate(self._read("conv3", x))  # 192 x 13 x 13
        x = self._activate(self._read("conv4", x))  # 192 x 13 x 13
        x = self._activate(
            self._pool(self._read("conv5", x))
        )  # 128 x 6 x 6; pooling first is the same, and cheaper
        x = self._drop("conv5", self._flat(x), keys)  # 4608
        x = self._drop("fc6", self._activate(self._read("fc6", x)), keys)  # 2048
        x = self._drop("fc7", self._activate(self._read("fc7", x)), keys)  # 2048
        return self.link.sum("fc8", self._read("fc8", x))  # classes: the sum of the columns' shares

    def _read(self, name: str, x: list[Tensor]) -> list[Tensor]:
        """Layer `name` of every column here. A crossing works on its own half while the peers' outputs are on their way."""
        layers = [getattr(column, name) for column in self.columns.values()]
        if not isinstance(layers[0], Crossing):
            return [layer(y) for layer, y in zip(layers, x, strict=True)]
        arrive = self.link.start_exchange(name, x)
        own = [layer.own(y) for layer, y in zip(layers, x, strict=True)]
        return [y.add_(layer.peers(p)) for y, layer, p in zip(own, layers, arrive(), strict=True)]

    def _layer1(self, x: list[Tensor]) -> list[Tensor]:
        if self.config.layer1_order == "relu-lrn-pool":
            return self._activate_norm_pool(x)
        return self._activate(self._norm_pool(x))

    def _layer2(self, x: list[Tensor]) -> list[Tensor]:
        if not self.config.map_norm:
            return self._activate_norm_pool(x)
        return self._pool([self.map_norm(y) for y in self._norm(self._activate(x))])

    def _activate_norm_pool(self, x: list[Tensor]) -> list[Tensor]:
        if self.config.activation == "relu":
            return self._norm_pool(
                x, relu=True
            )  # one node of all three: what lies between them is the most memory of all
        return self._norm_pool(self._activate(x))

    def _norm_pool(self, x: list[Tensor], relu: bool = False) -> list[Tensor]:
        if not self.config.lrn:
            return self._pool(self._activate(x) if relu else x)
        return [
            self.lrn.relu_lrn_pool(y, self.config.pool_size, self.config.pool_stride, relu)
            for y in x
        ]

    def _norm(self, x: list[Tensor]) -> list[Tensor]:
        return [self.lrn(y) for y in x]  # each column by itself: no window reaches into the other

    def _activate(self, x: list[Tensor]) -> list[Tensor]:
        return [self.activation(y) for y in x]

    def _pool(self, x: list[Tensor]) -> list[Tensor]:
        return [overlapping_max_pool(y, self.config.pool_size, self.config.pool_stride) for y in x]

    def _flat(self, x: list[Tensor]) -> list[Tensor]:
        if self.config.adaptive_pool:
            x = [F.adaptive_avg_pool2d(y, self.config.adaptive_pool) for y in x]
        return [y.flatten(1) for y in x]

    def _drop(self, after: str, x: list[Tensor], keys: Tensor | None) -> list[Tensor]:
        if after not in self.config.dropout_after or not self.config.dropout_rate:
            return x
        return [
            column.dropout[after](y, keys)
            for column, y in zip(self.columns.values(), x, strict=True)
        ]

    def _images(self, images: Tensor) -> list[Tensor]:
        conv1 = next(iter(self.columns.values())).conv1
        return [first_input(images, self.config.conv1_padding, conv1)] * len(self.columns)

    @torch.compiler.disable  # it would be compiled again for every value of the counter
    def _next_keys(self, images: Tensor) -> Tensor:
        self.training_passes += 1
        return dropout_keys(
            self.seed, self.training_passes - 1, torch.arange(len(images), device=images.device)
        )

    def canonical(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """`read(parameter)` of every parameter, under the names and in the shapes of the state dict.

        E.g. `canonical(lambda p: p.grad)`; a crossing's two halves come as one tensor.
        """
        values = {}
        for prefix, module in self.named_modules():
            halves = ("weight_own", "weight_peers") if isinstance(module, Crossing) else ()
            if halves:
                values[f"{prefix}.weight"] = module.merge(
                    *(read(getattr(module, half)) for half in halves)
                )
            for name, parameter in module.named_parameters(recurse=False):
                if name not in halves:
                    values[f"{prefix}.{name}"] = read(parameter)
        return values

    def from_canonical(self, values: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The inverse of `canonical`: each parameter here with its part of `values`. KeyError names what is missing."""
        parts: dict[nn.Parameter, Tensor] = {}
        for prefix, module in self.named_modules():
            if isinstance(module, Crossing):
                own, peers = module.split(values[f"{prefix}.weight"])
                parts |= {
                    module.weight_own: own,
                    module.weight_peers: peers,
                    module.bias: values[f"{prefix}.bias"],
                }
            else:
                parts |= {
                    parameter: values[f"{prefix}.{name}"]
                    for name, parameter in module.named_parameters(recurse=False)
                }
        return parts

    def summary(self) -> str:
        """The table of layers: see `alexnet_mp.summary.summary`."""
        return summary(self.config)
