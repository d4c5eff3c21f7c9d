"""AlexNet in columns a second time, written from the formulas; imports nothing from alexnet_mp.

The whole network is one tower of grouped layers in float64: a layer whose weight has fewer inputs
than arrive is split into that many groups, which are the columns. It takes batches, drawn masks and
converted weights as arrays, and draws nothing itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
Arrays = dict[str, np.ndarray]


@dataclass
class Settings:
    """What the weights do not show."""

    columns: int = 2
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # of the image: left, right, top, bottom
    norm_first: bool = False  # layer 1 as the 2012 source has it: norm, pool, activation
    activation: str = "relu"
    n: int = 5
    k: float = 2.0
    alpha: float = 1e-4
    beta: float = 0.75
    map_alpha: float = 0.0  # of the norm within each map after layer 2's LRN; 0: none
    inverted: bool = False  # dropout's kind
    rate: float = 0.5


def convert(state: Arrays, columns: int) -> Arrays:
    """Joins `columns.<i>.<layer>.weight` and `.bias` of all columns to `<layer>.weight` and
    `.bias`.

    Outputs stand column after column. fc8 adds the columns up, so its INPUTS stand column after
    column, with one bias.
    """
    whole = {}
    for layer in LAYERS:
        weights = [state[f"columns.{i}.{layer}.weight"] for i in range(columns)]
        whole[f"{layer}.weight"] = np.concatenate(weights, 1 if layer == "fc8" else 0).astype(
            np.float64
        )
        biases = [
            state[f"columns.{i}.{layer}.bias"] for i in range(1 if layer == "fc8" else columns)
        ]
        whole[f"{layer}.bias"] = np.concatenate(biases).astype(np.float64)
    return whole


class Network:
    """The tower over one set of whole weights."""

    def __init__(self, weights: Arrays, settings: Settings) -> None:
        self.settings = settings
        self.weights = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in weights.items()
        }

    def logits(self, images: np.ndarray, dropped: Arrays | None = None) -> Tensor:
        """`dropped` maps a layer to (N, units of all columns), True where a unit is zero; testing
        without."""
        s = self.settings
        x = F.pad(torch.tensor(images, dtype=torch.float64), s.padding)
        x = self.layer("conv1", x, stride=4)
        x = (
            self.pool(self.norm(self.activate(x)))
            if not s.norm_first
            else self.activate(self.pool(self.norm(x)))
        )
        x = self.norm(self.activate(self.layer("conv2", x)))
        x = self.pool(self.norm_of_maps(x) if s.map_alpha else x)
        x = self.activate(self.layer("conv3", x))
        x = self.activate(self.layer("conv4", x))
        x = self.pool(self.activate(self.layer("conv5", x)))
        x = x.flatten(1)[:, :, None, None]  # channel, row, column: column 0's channels come first
        for name in ("fc6", "fc7"):
            x = self.drop(
                self.activate(self.layer(name, x)), None if dropped is None else dropped[name]
            )
        return self.layer("fc8", x).flatten(1)

    def layer(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A fully connected layer is a convolution of 1x1 maps, so that it can have groups too."""
        weight = self.weights[f"{name}.weight"]
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        padding = 0 if name == "conv1" else weight.shape[2] // 2
        return F.conv2d(
            x,
            weight,
            self.weights[f"{name}.bias"],
            stride,
            padding,
            groups=x.shape[1] // weight.shape[1],
        )

    def activate(self, x: Tensor) -> Tensor:
        return (
            x * (x > 0)
            if self.settings.activation == "relu"
            else (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())
        )

    def pool(self, x: Tensor) -> Tensor:
        return x.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).amax(4)

    def norm(self, a: Tensor) -> Tensor:
        """Every kernel map by itself; the window stops at the edges of its own column."""
        s, maps, normed = self.settings, a.shape[1] // self.settings.columns, []
        for i in range(a.shape[1]):
            first = i // maps * maps
            low, high = max(first, i - s.n // 2), min(first + maps - 1, i + s.n // 2)
            total = sum(a[:, j] ** 2 for j in range(low, high + 1))
            normed.append(a[:, i] / (s.k + s.alpha * total) ** s.beta)
        return torch.stack(normed, 1)

    def norm_of_maps(self, a: Tensor) -> Tensor:
        total = sum(
            F.pad(a**2, (2, 2, 2, 2))[:, :, i : i + a.shape[2], j : j + a.shape[3]]
            for i in range(5)
            for j in range(5)
        )
        return a / (1 + self.settings.map_alpha * total) ** 0.75

    def drop(self, x: Tensor, dropped: np.ndarray | None) -> Tensor:
        keep = 1 - self.settings.rate
        if dropped is None:
            return x if self.settings.inverted else x * keep
        kept = torch.tensor(~dropped, dtype=x.dtype)[:, :, None, None]
        return x * kept / keep if self.settings.inverted else x * kept

    def gradients(
        self, images: np.ndarray, labels: np.ndarray, dropped: Arrays | None
    ) -> tuple[Arrays, np.ndarray]:
        """Those of the mean cross-entropy over the batch, and the logits."""
        logits = self.logits(images, dropped)
        chosen = logits[torch.arange(len(labels)), torch.tensor(labels)]
        loss = (logits.exp().sum(1).log() - chosen).mean()
        values = torch.autograd.grad(loss, list(self.weights.values()))
        return {
            name: value.numpy() for name, value in zip(self.weights, values, strict=True)
        }, logits.detach().numpy()


class Descent:
    """v <- momentum v - decay rate w - rate gradient; w <- w + v. Biases have a rate of their own
    and may not decay."""

    def __init__(
        self,
        network: Network,
        momentum: float = 0.9,
        decay: float = 0.0005,
        bias_decay: float | None = None,
    ) -> None:
        self.network, self.momentum = network, momentum
        self.decay = {"weight": decay, "bias": decay if bias_decay is None else bias_decay}
        self.velocity = {name: np.zeros(tuple(w.shape)) for name, w in network.weights.items()}

    def step(self, gradients: Arrays, rate: float, bias_rate: float | None = None) -> None:
        rates = {"weight": rate, "bias": rate if bias_rate is None else bias_rate}
        for name, w in self.network.weights.items():
            kind = name.split(".")[1]
            w = w.detach().numpy()  # shares memory with the tensor
            self.velocity[name] = (
                self.momentum * self.velocity[name]
                - self.decay[kind] * rates[kind] * w
                - rates[kind] * gradients[name]
            )
            w += self.velocity[name]


def response_norm(
    a: np.ndarray, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> np.ndarray:
    """Section 3.3 of the paper, as printed, for (N, C, H, W): alpha multiplies the plain sum."""
    b = np.empty_like(a)
    for i in range(a.shape[1]):
        total = np.zeros_like(a[:, 0])
        for j in range(max(0, i - n // 2), min(a.shape[1] - 1, i + n // 2) + 1):
            total += a[:, j] ** 2
        b[:, i] = a[:, i] / (k + alpha * total) ** beta
    return b


def map_norm(
    a: np.ndarray, size: int = 5, k: float = 1.0, alpha: float = 4e-5, beta: float = 0.75
) -> np.ndarray:
    """The 2012 source's second norm of layer 2: sums over size x size pixels around each, in a
    map."""
    b, half = np.empty_like(a), size // 2
    for y in range(a.shape[2]):
        for x in range(a.shape[3]):
            window = a[:, :, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
            b[:, :, y, x] = a[:, :, y, x] / (k + alpha * (window**2).sum((2, 3))) ** beta
    return b


def seed_of(*parts: int | str) -> np.uint64:
    """The first 8 bytes of the parts' BLAKE2b digest, little-endian, without the lowest bit."""
    return np.frombuffer(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "<u8")[
        0
    ] >> np.uint64(1)


def _round(x: np.ndarray, shift: int, factor: int) -> np.ndarray:
    return (x ^ (x >> np.uint32(shift))) * np.uint32(factor)


def dropped_units(
    seed: int, step: int, rows: np.ndarray, layer: str, column: int, units: int, rate: float
) -> np.ndarray:
    """Returns the dropout hash on unsigned numbers: (len(rows), units), True where a unit is
    dropped."""
    keys = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed_of(seed, "dropout", step)
    for shift in (30, 27):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(0x1CE4E5B9BF58476D)
    low, high = keys.astype(np.uint32)[:, None], (keys >> np.uint64(32)).astype(np.uint32)[:, None]
    base = seed_of("dropout", layer, column).astype(np.uint32)
    unit = np.arange(units, dtype=np.uint32) * np.uint32(0x85EBCA6B) + base
    unit = _round(_round(unit, 16, 0x7FEB352D), 15, 0x846CA68B)
    x = _round(unit[None] ^ low, 16, 0x7FEB352D) + high
    x = _round(_round(x, 15, 0x846CA68B), 16, 0xC2B2AE35)
    return (
        x ^ np.uint32(0x80000000)
    ) < rate * 2**32  # x read as a signed number, from the lowest up
