"""AlexNet in columns, as figure 2 of the paper draws it.

Every layer works on a list that has one tensor per column. Shapes at line ends are those of one
column of the paper's net at 227 pixels, without the batch axis. A column reads the outputs of the
others in conv3, fc6 and fc7 only; where they come from is the business of `cross_column`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.config import ModelConfig
from alexnet_mp.model import cross_column
from alexnet_mp.model.cross_column import (
    Crossing,
    CrossingConv2d,
    CrossingLinear,
    Link,
    LocalLink,
    one_each,
)
from alexnet_mp.model.image_check import check_images
from alexnet_mp.model.initialization import initialize_parameters
from alexnet_mp.model.layer_table import summary
from alexnet_mp.ops.conv1 import Conv1, conv1_input
from alexnet_mp.ops.dropout import Dropout, batch_keys
from alexnet_mp.ops.pooling import adaptive_average_pool, overlapping_max_pool
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm
from alexnet_mp.ops.tracing import not_compiled

PAPER_CLASSES = 1000  # a network made without data has the paper's thousand logits


class Column(nn.Module):
    """The weights of one column: what one GPU held in 2012."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        k1, k2, k3, k4, k5 = config.kernels
        u6, u7 = config.hidden
        height, width = config.map_sizes()["fc6"]
        classes = config.classes or PAPER_CLASSES

        def conv(name: str, inputs: int, kernels: int, size: int) -> nn.Module:
            if config.crosses(name):
                return CrossingConv2d(inputs, kernels, size, index, config.columns)
            return without_values(nn.Conv2d, inputs, kernels, size, padding=size // 2)

        def linear(name: str, inputs: int, units: int) -> nn.Module:
            if config.crosses(name):
                return CrossingLinear(inputs, units, index, config.columns)
            return without_values(nn.Linear, inputs, units)

        self.conv1 = without_values(Conv1, k1)  #  48 kernels of 11 x 11 x 3, stride 4
        self.conv2 = conv("conv2", k1, k2, 5)  # 128 kernels of 5 x 5 x 48
        self.conv3 = conv("conv3", k2, k3, 3)  # 192 kernels of 3 x 3 x 256: both columns
        self.conv4 = conv("conv4", k3, k4, 3)  # 192 kernels of 3 x 3 x 192
        self.conv5 = conv("conv5", k4, k5, 3)  # 128 kernels of 3 x 3 x 192
        self.fc6 = linear("fc6", k5 * height * width, u6)  # 9216 -> 2048: both columns
        self.fc7 = linear("fc7", u6, u7)  # 4096 -> 2048: both columns
        # Each column multiplies its own fc7 by its share of fc8. The sum of the columns' products
        # has one bias, column 0's.
        self.fc8 = without_values(nn.Linear, u7, classes, bias=index == 0)  # 2048 -> 1000
        self.dropout = nn.ModuleDict(
            {
                layer: Dropout(config.dropout_rate, layer, index, config.dropout)
                for layer in config.dropout_after
                if config.dropout_rate
            }
        )


class AlexNet(nn.Module):
    """The network of `config`, or the `columns` of it that live here.

        model = AlexNet(preset("paper").model)
        logits = model(torch.randn(8, 3, 224, 224))  # (8, 1000)

    `AlexNet(config)` holds all columns on one device. `AlexNet(config, columns=(rank,), link=link)`
    holds one GPU's, and `link` reaches the others. `seed` draws the initial weights and the dropout
    masks of passes without `keys`; column i starts the same wherever it lives. None draws a seed
    from torch's generator, so that `torch.manual_seed` counts, as it does for torch's own layers.
    ValueError where the columns are not the configuration's.
    """

    column_type: type[nn.Module] = Column

    def __init__(
        self,
        config: ModelConfig | None = None,
        columns: Sequence[int] | None = None,
        link: Link | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        here = check_columns(config, columns, link)
        self.link = link or LocalLink()
        self.columns = nn.ModuleDict({str(i): self.column_type(config, i) for i in here})
        self.lrn = (
            LocalResponseNorm(config.lrn_size, config.lrn_k, config.lrn_alpha, config.lrn_beta)
            if config.lrn
            else None
        )
        self.map_norm = MapNorm(alpha=config.map_norm_alpha) if config.map_norm else None
        activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh}
        self.activation = activations[config.activation]
        self.pool = (config.pool_size, config.pool_stride)
        self.initialize(seed)

    def initialize(self, seed: int | None = None) -> None:
        """Draws all weights anew; `seed` as for the class.

        Also for a network that was made under `torch.device("meta")` and got memory by `to_empty`.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        self.seed, self.training_passes = seed, 0
        columns = {int(index): column for index, column in self.columns.items()}
        initialize_parameters(self.config, columns, seed)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of images (N, 3, S, S), floating point.

        `keys` (N,) from `dropout_keys` name the rows of the global batch, so that masks do not
        depend on placement. Without them the model counts its own training passes.
        ValueError for images of another shape or of whole numbers.
        """
        check_images(images, self.config)
        if keys is None and self.training:
            keys = self._next_keys(images)
        x = self._columns_read(images)  # 3 x 227 x 227
        x = self._after_conv1(self._layer("conv1", x))  # 48 x 55 x 55 -> 48 x 27 x 27
        x = self._after_conv2(self._layer("conv2", x))  # 128 x 27 x 27 -> 128 x 13 x 13
        x = self._activate(self._layer("conv3", x))  # 192 x 13 x 13
        x = self._activate(self._layer("conv4", x))  # 192 x 13 x 13
        # Pooling before the activation is the same as after it, and cheaper.
        x = self._activate(self._max_pool(self._layer("conv5", x)))  # 128 x 13 x 13 -> 128 x 6 x 6
        x = self._dropout("conv5", self._flatten(x), keys)  # 4608
        x = self._dropout("fc6", self._activate(self._layer("fc6", x)), keys)  # 2048
        x = self._dropout("fc7", self._activate(self._layer("fc7", x)), keys)  # 2048
        return self.link.sum("fc8", self._layer("fc8", x))  # 1000: the sum of the columns' shares

    def _layer(self, name: str, x: list[Tensor]) -> list[Tensor]:
        """Layer `name` of every column. A crossing gets the other columns' outputs as well."""
        layers = [getattr(column, name) for column in self.columns.values()]
        if not isinstance(layers[0], Crossing):
            return [layer(y) for layer, y in zip(layers, x, strict=True)]
        others = one_each(self.link.start_exchange(name, x), len(x))
        return [layer(y, arrive) for layer, y, arrive in zip(layers, x, others, strict=True)]

    def _columns_read(self, images: Tensor) -> list[Tensor]:
        """The images, with zeros around them, as every column's conv1 reads them: one tensor."""
        first: Any = next(iter(self.columns.values()))
        x = conv1_input(images, self.config.conv1_padding, first.conv1.weight)
        return [x] * len(self.columns)

    def _after_conv1(self, x: list[Tensor]) -> list[Tensor]:
        """ReLU, norm, pool (P 3.3 and 3.4). The 2012 source has the ReLU last."""
        if self.config.layer1_order == "relu-lrn-pool":
            return self._activate_norm_pool(x)
        return self._activate(self._norm_pool(x))

    def _after_conv2(self, x: list[Tensor]) -> list[Tensor]:
        """ReLU, norm, pool (P 3.3 and 3.4). The 2012 source has a second norm before the pool."""
        if self.map_norm is None:
            return self._activate_norm_pool(x)
        return self._max_pool([self.map_norm(y) for y in self._norm(self._activate(x))])

    def _activate_norm_pool(self, x: list[Tensor]) -> list[Tensor]:
        if self.config.activation == "relu":
            return self._norm_pool(x, relu=True)
        return self._norm_pool(self._activate(x))

    def _norm_pool(self, x: list[Tensor], relu: bool = False) -> list[Tensor]:
        """No window of the norm reaches into another column."""
        if self.lrn is None:
            return self._max_pool(self._activate(x) if relu else x)
        return [self.lrn(y, relu=relu, pool=self.pool) for y in x]

    def _norm(self, x: list[Tensor]) -> list[Tensor]:
        return x if self.lrn is None else [self.lrn(y) for y in x]

    def _activate(self, x: list[Tensor]) -> list[Tensor]:
        # Not in place: hooks may have seen what a layer returned.
        return [self.activation(y) for y in x]

    def _max_pool(self, x: list[Tensor]) -> list[Tensor]:
        return [overlapping_max_pool(y, *self.pool) for y in x]

    def _flatten(self, x: list[Tensor]) -> list[Tensor]:
        if self.config.adaptive_pool:
            x = [adaptive_average_pool(y, self.config.adaptive_pool) for y in x]
        return [y.flatten(1) for y in x]

    def _dropout(self, after: str, x: list[Tensor], keys: Tensor | None) -> list[Tensor]:
        if after not in self.config.dropout_after or not self.config.dropout_rate:
            return x
        layers: list[Any] = [column.dropout for column in self.columns.values()]
        return [layer[after](y, keys) for layer, y in zip(layers, x, strict=True)]

    @not_compiled  # it would be compiled again for every value of the counter
    def _next_keys(self, images: Tensor) -> Tensor:
        self.training_passes += 1
        return batch_keys(images, self.seed, self.training_passes - 1)

    def canonical(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """`read(parameter)` of every parameter, with the names and shapes of the state dict.

        E.g. `canonical(lambda p: p.grad)`; a crossing's two halves come as one tensor.
        """
        return cross_column.canonical(self, read)

    def from_canonical(self, values: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The inverse of `canonical`: each parameter here with its part of `values`.

        KeyError names what is missing.
        """
        return cross_column.from_canonical(self, values)

    def summary(self) -> str:
        """The table of layers; see `alexnet_mp.model.layer_table.summary`."""
        return summary(self.config)


def check_columns(
    config: ModelConfig, columns: Sequence[int] | None, link: Link | None
) -> tuple[int, ...]:
    """The columns that live here, all by default. ValueError unless they make a network."""
    here = tuple(range(config.columns)) if columns is None else tuple(columns)
    if not here or list(here) != sorted(set(here)) or not set(here) <= set(range(config.columns)):
        raise ValueError(
            f"columns {here}: this network has columns 0 to {config.columns - 1}, each named once "
            "and in order"
        )
    if link is None and len(here) < config.columns:
        raise ValueError(
            f"columns {here}: only {len(here)} of {config.columns}, so a link to the others is "
            "needed"
        )
    return here


def without_values(layer: type[nn.Module], *arguments: Any, **others: Any) -> nn.Module:
    """A layer whose parameters have no values yet, on torch's default device."""
    device = torch.get_default_device()
    made = nn.utils.skip_init(layer, *arguments, device=device, **others)  # type: ignore[no-untyped-call]
    return cast(nn.Module, made)
