"""Crossings: the layers that read all columns, and the link that brings them the others' outputs.

A crossing keeps its weights in two halves, this column's own inputs and its peers'. So the product
with the own half runs while the peers' outputs are on their way, and backward needs no zero-filled
gradient of a slice. A state dict shows one `weight` all the same, its input axis in global column
order, and so does not tell where it was trained.

What tools do not see: a crossing is neither an nn.Conv2d nor an nn.Linear, so whatever asks
`isinstance` passes it by (initialization by type, quantize_dynamic, some FLOP counters; use
`AlexNet.summary`). torch.nn.utils.prune takes `weight_own` and `weight_peers`, not `weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.ops.tracing import needs_plain_operations


class Link(Protocol):
    """Gives a model the activations of the other columns."""

    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Offers these columns' outputs to all columns.

        The callable returns, for each column here, all the others', concatenated in column order.
        """

    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        """The sum over all columns of tensors of one shape, the same on every rank."""


class LocalLink:
    """All columns are here: nothing has to travel.

    >>> AlexNet(config, columns=(0, 1), link=LocalLink())  # the same as AlexNet(config)
    """

    def start_exchange(self, layer: str, x: list[Tensor]) -> Callable[[], list[Tensor]]:
        others = [x[:i] + x[i + 1 :] for i in range(len(x))]
        return lambda: [other[0] if len(other) == 1 else torch.cat(other, 1) for other in others]

    def sum(self, layer: str, x: list[Tensor]) -> Tensor:
        total = x[0]
        for part in x[1:]:
            total = total + part
        return total


class WholeWeight(Tensor):
    """What `Crossing.weight` returns: a copy of both halves, whose changes in place reach them.

    So nn.init, `copy_` and `weight[0] = 1` do what they do to a parameter, through `weight.data`
    and through views as well. Gradients flow from it to the halves; it has no `grad` of its own.
    """

    crossing: Crossing
    whole: Tensor  # the tensor that this is a view of, or itself
    written: int  # the version that the halves have

    @staticmethod
    def of(crossing: Crossing, values: Tensor, whole: Tensor | None = None) -> WholeWeight:
        weight = values.as_subclass(WholeWeight)
        with torch._C.DisableTorchFunctionSubclass():
            weight.crossing, weight.whole = crossing, weight if whole is None else whole
            weight.written = weight._version
        return weight

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            for weight in (*args, *kwargs.values()):
                if not isinstance(weight, WholeWeight):
                    continue
                if weight._version != weight.written:  # it was changed
                    weight.crossing.set_weight(weight.whole)
                    weight.written = weight._version
                if type(result) is Tensor and _share_memory(result, weight):
                    return cls.of(weight.crossing, result, weight.whole)
        return result


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Crossing(nn.Module):
    """Base of the two layers that read all columns.

    `weight_own` is (out, in, ...), `weight_peers` (out, in * (columns - 1), ...), its inputs in
    column order.
    """

    def __init__(
        self, outputs: int, inputs: int, window: tuple[int, ...], column: int, columns: int
    ) -> None:
        super().__init__()
        self.inputs, self.column, self.columns = inputs, column, columns
        self.weight_own = nn.Parameter(torch.empty(outputs, inputs, *window))
        self.weight_peers = nn.Parameter(torch.empty(outputs, inputs * (columns - 1), *window))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.register_state_dict_post_hook(merge_halves)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(split_halves)  # type: ignore[no-untyped-call]

    def forward(self, own: Tensor, arrive: Callable[[], Tensor] | None = None) -> Tensor:
        """The layer's output (N, out, ...) from this column's inputs and those of its peers.

        `own` is (N, in, ...). `arrive()` returns (N, in * (columns - 1), ...), the other columns'
        in column order; it is called after the product with the own half, which it may wait for
        meanwhile. TypeError without it.
        """
        if arrive is None:
            raise TypeError(
                f"{self} reads {self.columns} columns: call the whole network, or the layer as "
                "layer(own, arrive), where arrive() returns the other columns' outputs"
            )
        y = self.own(own)
        peers = self.peers(arrive())
        return y + peers if needs_plain_operations(y) else y.add_(peers)  # nobody has seen y yet

    def own(self, x: Tensor) -> Tensor:
        """This column's half of the layer, with the bias: (N, in, ...) -> (N, out, ...)."""
        return self.product(x, self.weight_own, self.bias)

    def peers(self, x: Tensor) -> Tensor:
        """The other columns' half: (N, in * (columns - 1), ...) -> (N, out, ...)."""
        return self.product(x, self.weight_peers, None)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def merge(self, own: Tensor, peers: Tensor) -> Tensor:
        """One tensor in global column order, from two of the shapes of the halves."""
        before = self.column * self.inputs
        return torch.cat([peers[:, :before], own, peers[:, before:]], 1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `merge`."""
        before, after = self.column * self.inputs, (self.column + 1) * self.inputs
        return weight[:, before:after], torch.cat([weight[:, :before], weight[:, after:]], 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the whole weight, (out, in * columns, ...)."""
        outputs, inputs, *window = self.weight_own.shape
        return (outputs, inputs * self.columns, *window)

    @property
    def weight(self) -> Tensor:
        """The whole weight in global column order, a copy; see WholeWeight.

        A tensor that is assigned is copied into the halves. TypeError for an nn.Parameter, which
        the layer could not keep.
        """
        values = self.merge(self.weight_own, self.weight_peers)
        return values if needs_plain_operations(values) else WholeWeight.of(self, values)

    @weight.setter
    def weight(self, values: Tensor) -> None:
        if tuple(values.shape) != self.weight_shape:
            raise ValueError(
                f"weight: got {tuple(values.shape)}, this layer needs {self.weight_shape}"
            )
        self.set_weight(values)

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        """Copies a whole weight into the halves."""
        for half, part in zip(
            (self.weight_own, self.weight_peers), self.split(values), strict=True
        ):
            half.copy_(part)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # what `layer.weight = nn.Parameter(...)` comes to
            raise TypeError(
                "weight: a crossing keeps it in two halves, so no parameter can take its place; "
                "assign a tensor, or copy: with torch.no_grad(): layer.weight.copy_(values)"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Draws weights and bias as torch's own layers do: uniform within 1 / sqrt(fan-in)."""
        bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        outputs, _, *window = self.weight_own.shape
        kernel = f", kernel_size={tuple(window)}" if window else ""
        return (
            f"{self.inputs} own + {self.inputs * (self.columns - 1)} from peers, {outputs}{kernel}"
        )


class CrossingConv2d(Crossing):
    """A convolution over all columns, stride 1 and "same" zero padding, as conv2 to conv5 are."""

    def __init__(self, inputs: int, kernels: int, size: int, column: int, columns: int) -> None:
        super().__init__(kernels, inputs, (size, size), column, columns)
        self.padding = size // 2

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding)


class CrossingLinear(Crossing):
    """A fully connected layer over all columns."""

    def __init__(self, inputs: int, outputs: int, column: int, columns: int) -> None:
        super().__init__(outputs, inputs, (), column, columns)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


def one_each(arrive: Callable[[], list[Tensor]], columns: int) -> list[Callable[[], Tensor]]:
    """`arrive` of a link as one callable per column, the first of which waits for them all."""
    arrived: list[Tensor] = []

    def arrive_at(column: int) -> Tensor:
        if not arrived:
            arrived.extend(arrive())
        return arrived[column]

    return [partial(arrive_at, column) for column in range(columns)]


def across(
    link: Link,
    name: str,
    norm: Callable[[Tensor], Tensor],
    half: int,
    x: list[Tensor],
    here: list[int],
    columns: int,
) -> list[Tensor]:
    """`norm` of each column (N, C, ...), whose windows reach `half` maps into the neighbors.

    `here` are the numbers of the columns in `x`, `columns` is how many the network has.
    """
    arrive = link.start_exchange(name, edges(x, here, columns, half))
    normed = []
    for y, (before, after) in zip(x, halos(arrive(), here, columns, half), strict=True):
        wide = norm(torch.cat([before, y, after], 1))
        normed.append(wide[:, before.shape[1] : before.shape[1] + y.shape[1]])
    return normed


def edges(x: list[Tensor], here: list[int], columns: int, half: int) -> list[Tensor]:
    """The maps of each column (N, C, H, W) that windows of the neighboring columns reach.

    The first `half` and the last `half` of them; of two columns only those at the border between
    them. `here` are the numbers of the columns in `x`.
    """
    if columns == 2:
        return [y[:, -half:] if i == 0 else y[:, :half] for i, y in zip(here, x, strict=True)]
    return [torch.cat([y[:, :half], y[:, -half:]], 1) for y in x]


def halos(
    others: list[Tensor], here: list[int], columns: int, half: int
) -> list[tuple[Tensor, Tensor]]:
    """The maps (N, half, H, W) before and after each column here, of its neighbors' `edges`.

    `others` has for each column all other columns' edges in column order. The first column has none
    before it, the last none after it.
    """
    found = []
    for i, edge in zip(here, others, strict=True):
        none = edge[:, :0]
        if columns == 2:
            found.append((none, edge) if i == 0 else (edge, none))
            continue
        parts = list(torch.split(edge, half, 1))  # first and last of column 0, of column 1, ...
        before = parts[2 * (i - 1) + 1] if i > 0 else none
        after = parts[2 * i] if i < columns - 1 else none
        found.append((before, after))
    return found


def merge_halves(
    crossing: Crossing, state: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Makes one `weight` of the two halves in a state dict: a hook of torch."""
    halves = [f"{prefix}weight_own", f"{prefix}weight_peers"]
    if not all(name in state for name in halves):
        return  # a tool put others in their place, as torch.nn.utils.prune does until prune.remove
    merged = {f"{prefix}weight": crossing.merge(*(state.pop(name) for name in halves))}
    bias = f"{prefix}bias"
    state |= merged | ({bias: state.pop(bias)} if bias in state else {})


def split_halves(
    crossing: Crossing,
    state: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Makes the two halves of the `weight` in a state dict to be loaded: a hook of torch."""
    halves = {
        f"{prefix}weight_own": crossing.weight_own,
        f"{prefix}weight_peers": crossing.weight_peers,
    }
    for name in halves:
        if state.pop(name, None) is not None:  # torch would take it for a name that it knows
            unexpected_keys.append(name)
    name, shape = f"{prefix}weight", crossing.weight_shape
    weight = state.pop(name, None)
    if weight is None:
        missing_keys.append(name)
        state |= halves  # each half keeps its value, and torch has nothing to add
    elif tuple(weight.shape) != shape:
        error_msgs.append(f"{name}: the file has {tuple(weight.shape)}, this network needs {shape}")
        state |= halves
    else:
        # Contiguous, since load_state_dict(..., assign=True) makes parameters of them.
        state |= zip(halves, (part.contiguous() for part in crossing.split(weight)), strict=True)


def canonical(model: nn.Module, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """`read(parameter)` of every parameter, under the names and in the shapes of the state dict."""
    values = {}
    for prefix, module in model.named_modules():
        halves = ("weight_own", "weight_peers") if isinstance(module, Crossing) else ()
        if isinstance(module, Crossing):
            values[f"{prefix}.weight"] = module.merge(*(read(getattr(module, h)) for h in halves))
        for name, parameter in module.named_parameters(recurse=False):
            if name not in halves:
                values[f"{prefix}.{name}"] = read(parameter)
    return values


def from_canonical(model: nn.Module, values: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The inverse of `canonical`: each parameter with its part of `values`.

    KeyError names what is missing.
    """
    parts: dict[nn.Parameter, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Crossing):
            own, peers = module.split(values[f"{prefix}.weight"])
            parts |= {module.weight_own: own, module.weight_peers: peers}
            parts[module.bias] = values[f"{prefix}.bias"]
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parts[parameter] = values[f"{prefix}.{name}"]
    return parts
