"""AlexNet in columns, as figure 2 of the paper draws it.

Every layer works on a list that has one tensor per column. Shapes at line ends are those of one
column of the paper's net at 227 pixels, without the batch axis. A column reads the outputs of the
others in conv3, fc6 and fc7 only; where they come from is the business of `cross_column`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
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
from alexnet_mp.ops.tracing import needs_plain_operations, not_compiled

RECENT_PASSES = 64  # of which a backward pass may repeat any
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
        self._recent_passes: dict[int, int] = {}
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

    def features(self, images: Tensor, layer: str = "fc7") -> Tensor:
        """The output of `layer`, conv5, fc6 or fc7, for images (N, 3, S, S): (N, values).

        That is what the next layer reads, after pooling, ReLU and, in a network with dropout as of
        2012, its factor of 0.5; the columns side by side: 9,216, 4,096 and 4,096 values in the
        paper's network. ValueError for other layers, in training mode, or where columns are on
        other ranks.
        """
        return self.logits_and_features(images, layer)[1]

    @torch.no_grad()
    def logits_and_features(self, images: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """The logits (N, classes) and `features` of one pass."""
        names = self.config.layers
        readers = {name: reader for name, reader in itertools.pairwise(names) if reader[:2] == "fc"}
        if layer not in readers:
            raise ValueError(f"layer {layer}: features are those of {', '.join(readers)}")
        if self.training:
            raise ValueError("features: call model.eval() first, dropout would change them")
        if len(self.columns) < self.config.columns:
            raise ValueError("features: some columns are on other ranks; load the whole network")
        inputs: list[Tensor] = []
        hooks = [
            column.get_submodule(readers[layer]).register_forward_pre_hook(
                lambda _, arguments: inputs.append(arguments[0])
            )
            for column in self.columns.values()
        ]
        try:
            logits: Tensor = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, torch.cat(inputs, 1)

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
        if self.config.layer1_order == "lrn-pool-relu":
            return self._activate(self._norm_pool("lrn1", x))
        return self._activate_norm_pool("lrn1", x, self.config.layer1_order)

    def _after_conv2(self, x: list[Tensor]) -> list[Tensor]:
        """ReLU, norm, pool (P 3.3 and 3.4). The 2012 source has a second norm before the pool."""
        if self.map_norm is None:
            return self._activate_norm_pool("lrn2", x, self.config.layer2_order)
        return self._max_pool([self.map_norm(y) for y in self._norm("lrn2", self._activate(x))])

    def _activate_norm_pool(self, name: str, x: list[Tensor], order: str) -> list[Tensor]:
        if order == "relu-pool-lrn":
            return self._norm(name, self._activate(self._max_pool(x)))
        if self.config.activation == "relu":
            return self._norm_pool(name, x, relu=True)
        return self._norm_pool(name, self._activate(x))

    def _norm_pool(self, name: str, x: list[Tensor], relu: bool = False) -> list[Tensor]:
        if self.lrn is None:
            return self._max_pool(self._activate(x) if relu else x)
        return self._norm(name, x, relu=relu, pool=self.pool)

    def _norm(self, name: str, x: list[Tensor], **options: Any) -> list[Tensor]:
        """No window of the norm reaches into another column, unless `lrn_across_columns`."""
        if self.lrn is None:
            return x
        if self.config.columns == 1 or not self.config.lrn_across_columns:
            return [self.lrn(y, **options) for y in x]
        here = [int(index) for index in self.columns]
        norm = partial(self.lrn, **options)
        half = self.lrn.size // 2
        return cross_column.across(self.link, name, norm, half, x, here, self.config.columns)

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
        """The keys of a pass; activation checkpointing repeats one in backward, with its masks."""
        place = 0 if needs_plain_operations(images) else images.data_ptr()
        if torch._C._current_graph_task_id() >= 0:  # within a backward pass
            number = self._recent_passes.get(place, self.training_passes - 1)
        else:
            number = self.training_passes
            self.training_passes += 1
            self._recent_passes.pop(place, None)
            self._recent_passes[place] = number
            if len(self._recent_passes) > RECENT_PASSES:
                del self._recent_passes[next(iter(self._recent_passes))]
        return batch_keys(images, self.seed, number)

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

    def summary(self, precision: str = "fp32", exchange_precision: str = "same") -> str:
        """The table of layers; see `alexnet_mp.model.layer_table.summary`."""
        return summary(self.config, precision, exchange_precision)


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
