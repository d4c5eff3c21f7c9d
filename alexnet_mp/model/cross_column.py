"""The weights of a layer that reads all columns, kept as two halves: this column's own inputs and its peers'.

Two halves instead of one tensor that is sliced: the product with the own half runs while the peers' activations are
on their way, and backward needs no zero-filled gradient of a slice. A state dict shows one `weight` all the same,
its input axis in global column order, so that a checkpoint does not know where it was trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Crossing(nn.Module):
    """Base of the two crossing layers. `weight_own` is (out, in, ...), `weight_peers` (out, in * (columns - 1), ...)."""

    def __init__(
        self, outputs: int, inputs: int, window: tuple[int, ...], column: int, columns: int
    ) -> None:
        super().__init__()
        self.inputs, self.column, self.columns = inputs, column, columns
        self.weight_own = nn.Parameter(torch.empty(outputs, inputs, *window))
        self.weight_peers = nn.Parameter(torch.empty(outputs, inputs * (columns - 1), *window))
        self.bias = nn.Parameter(torch.empty(outputs))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def own(self, x: Tensor) -> Tensor:
        """This column's half of the layer, with the bias: (N, in, ...) -> (N, out, ...)."""
        return self.product(x, self.weight_own, self.bias)

    def peers(self, x: Tensor) -> Tensor:
        """The other columns' half: (N, in * (columns - 1), ...) in column order -> (N, out, ...)."""
        return self.product(x, self.weight_peers, None)

    def merge(self, own: Tensor, peers: Tensor) -> Tensor:
        """One tensor in global column order, from two of the shapes of `weight_own` and `weight_peers`."""
        before = self.column * self.inputs
        return torch.cat([peers[:, :before], own, peers[:, before:]], 1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `merge`."""
        before, after = self.column * self.inputs, (self.column + 1) * self.inputs
        return weight[:, before:after], torch.cat([weight[:, :before], weight[:, after:]], 1)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.merge(
            self.weight_own.detach(), self.weight_peers.detach()
        )
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix + "weight"
        state = dict(state_dict)
        if name in state:
            weight, own = state.pop(name), self.weight_own
            whole = (own.shape[0], self.inputs * self.columns, *own.shape[2:])
            if tuple(weight.shape) == whole:
                state[prefix + "weight_own"], state[prefix + "weight_peers"] = self.split(weight)
            else:
                error_msgs.append(
                    f"{name}: the file has {tuple(weight.shape)}, this network needs {whole}"
                )
                state[prefix + "weight_own"], state[prefix + "weight_peers"] = (
                    own,
                    self.weight_peers,
                )
        missing: list[str] = []
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing, [], error_msgs
        )
        missing_keys += [key for key in missing if not key.startswith(name)] + [name] * (
            prefix + "weight_own" in missing
        )
        if strict:
            known = (name, prefix + "bias")
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in known
            ]

    def extra_repr(self) -> str:
        out, _, *window = self.weight_own.shape
        return f"{self.inputs} own + {self.inputs * (self.columns - 1)} from peers, {out}" + (
            f", kernel_size={tuple(window)}" if window else ""
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
