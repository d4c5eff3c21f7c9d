"""What can be configured: four frozen dataclasses, checked when they are made.

Each default is the paper's, its section beside it (P 3.3); `presets.py` holds what other configurations change.
Layers are always named conv1 to conv5 and fc6 to fc8; a tuple of eight has one entry per layer in that order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_not_negative(part: Any, *names: str) -> None:
    for name in names:
        _check(0 <= getattr(part, name) < math.inf, f"--{name.replace('_', '-')} {getattr(part, name)}: must be a number and not negative")


@dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes are per column: `columns=2, kernels=(48, ...)` is the paper's 96 kernels in conv1."""

    columns: int = 2
    """Independent halves of the network: 1 (the one-GPU net), 2 (the paper) or more."""
    kernels: tuple[int, int, int, int, int] = (48, 128, 192, 192, 128)
    """Kernels of conv1 to conv5 in each column (P, figure 2)."""
    hidden: tuple[int, int] = (2048, 2048)
    """Units of fc6 and fc7 in each column (P, figure 2)."""
    classes: int = 0
    """Classes, that is logits. 0 takes the number that the data has (the paper's 1000 for a network without data)."""
    image_size: int = 227
    """Side of the square crop that the network sees, in pixels."""
    conv1_padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros around the crop: left, right, top, bottom. The 2012 source: 0 3 0 3 at 224 pixels."""
    crossings: tuple[str, ...] = ("conv3", "fc6", "fc7", "fc8")
    """Layers that read all columns; fc8 always does. The others read their own column only."""
    layer1_order: Literal["relu-lrn-pool", "lrn-pool-relu"] = "relu-lrn-pool"
    """What follows conv1. The paper normalises after the ReLU; the 2012 source before it."""
    lrn: bool = True
    """Local response normalisation after conv1 and conv2 (P 3.3)."""
    lrn_size: int = 5
    """Neighbouring kernel maps in the sum, n in P 3.3."""
    lrn_k: float = 2.0
    """The constant k in the denominator (P 3.3)."""
    lrn_alpha: float = 1e-4
    """What multiplies the SUM of squares, as P 3.3 prints it; not divided by n, unlike torch's."""
    lrn_beta: float = 0.75
    """The exponent of the denominator (P 3.3)."""
    map_norm: bool = False
    """The 2012 source's second norm in layer 2: 5x5 pixels within each map, not in the paper."""
    map_norm_alpha: float = 4e-5
    """What multiplies its sum of 25 squares: 1e-3 / 25 in the 2012 source."""
    pool_size: int = 3
    """Side of the max-pooling window (P 3.4)."""
    pool_stride: int = 2
    """Step of the max-pooling window; smaller than pool_size overlaps (P 3.4)."""
    activation: Literal["relu", "tanh"] = "relu"
    """The nonlinearity after every layer but fc8 (P 3.1)."""
    dropout: Literal["2012", "inverted"] = "2012"
    """2012: masks in training, multiplies by the keep rate in testing. inverted: divides in training."""
    dropout_rate: float = 0.5
    """Share of units set to zero in training (P 4.2); 0 turns dropout off."""
    dropout_after: tuple[str, ...] = ("fc6", "fc7")
    """Whose outputs are dropped: any of conv5 (as the tutorial's net), fc6, fc7."""
    initial_weights: tuple[float | Literal["he", "torch"], ...] = (0.01,) * 8
    """Standard deviation of the normal draw of each layer (P 5), or he (sqrt(2/fan-in)), or torch (its default)."""
    initial_biases: tuple[float | Literal["torch"], ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    """Constant bias of each layer (P 5), or torch (its default)."""
    adaptive_pool: int = 0
    """Average-pool the last map to this side whatever the image size, as the tutorial's net (6); 0: do not."""

    def __post_init__(self) -> None:
        _check(self.columns >= 1, f"--columns {self.columns}: a network has one column or more")
        _check(len(self.kernels) == 5 and min(self.kernels) > 0, f"--kernels {self.kernels}: five positive numbers, conv1 to conv5")
        _check(len(self.hidden) == 2 and min(self.hidden) > 0, f"--hidden {self.hidden}: two positive numbers, fc6 and fc7")
        _check_not_negative(self, "classes")
        _check(min(self.conv1_padding) >= 0, f"--conv1-padding {self.conv1_padding}: left right top bottom, none negative")
        unknown = [name for name in self.crossings if name not in LAYERS[1:]]
        _check(not unknown, f"--crossings {' '.join(unknown)}: not one of {' '.join(LAYERS[1:])}")
        _check("fc8" in self.crossings, f"--crossings {' '.join(self.crossings)}: fc8 must be among them, every rank needs all logits")
        _check(len(set(self.crossings)) == len(self.crossings), f"--crossings {' '.join(self.crossings)}: a layer stands there twice")
        _check(self.lrn_size >= 1 and self.lrn_size % 2 == 1, f"--lrn-size {self.lrn_size}: an odd number, the window is centred")
        _check(self.lrn_k > 0, f"--lrn-k {self.lrn_k}: must be positive, it keeps the denominator from zero")
        _check_not_negative(self, "lrn_alpha", "lrn_beta", "map_norm_alpha")
        _check(self.pool_size >= 1 and self.pool_stride >= 1, f"--pool-size {self.pool_size} --pool-stride {self.pool_stride}: must be positive")
        _check(0 <= self.dropout_rate < 1, f"--dropout-rate {self.dropout_rate}: at least 0 and below 1")
        unknown = [name for name in self.dropout_after if name not in ("conv5", "fc6", "fc7")]
        _check(not unknown, f"--dropout-after {' '.join(unknown)}: not one of conv5 fc6 fc7")
        for flag, values in (("weights", self.initial_weights), ("biases", self.initial_biases)):
            _check(len(values) == 8, f"--initial-{flag}: needs 8 values, conv1 to fc8, got {len(values)}")
        _check(all(w in ("he", "torch") or 0 <= w < math.inf for w in self.initial_weights), f"--initial-weights {self.initial_weights}: negative")
        smallest = self.smallest_image()
        _check(self.image_size >= smallest, f"--image-size {self.image_size}: too small for this network, nothing is left of the image "
                                            f"after the last pool; the smallest that works is {smallest}")

    def crosses(self, layer: str) -> bool:
        """Whether `layer` reads other columns too (never, where there is one column)."""
        return self.columns > 1 and layer in self.crossings

    def map_sizes(self, image_size: int | None = None) -> dict[str, tuple[int, int]]:
        """(height, width) of the maps after each convolution and pool at `image_size` (default: the configured one).

        Sizes are rounded down, as torch does; at 227, 163, 131, 99 and 67 (without padding) no row is left over.
        """
        size = self.image_size if image_size is None else image_size
        left, right, top, bottom = self.conv1_padding

        def pool(n: int) -> int:
            return (n - self.pool_size) // self.pool_stride + 1 if n >= self.pool_size else 0

        conv1 = tuple(max((n - 11) // 4 + 1, 0) for n in (size + top + bottom, size + left + right))
        pool1 = tuple(pool(n) for n in conv1)
        pool2 = tuple(pool(n) for n in pool1)          # conv2 keeps the size: 5x5, padding 2
        pool5 = tuple(pool(n) for n in pool2)          # conv3 to conv5 too: 3x3, padding 1
        last = (self.adaptive_pool,) * 2 if self.adaptive_pool and min(pool5) > 0 else pool5
        return {"conv1": conv1, "pool1": pool1, "conv2": pool1, "pool2": pool2, "conv3": pool2,
                "conv4": pool2, "conv5": pool2, "pool5": pool5, "fc6": last}

    def smallest_image(self) -> int:
        """The smallest image side that leaves at least one value after the last pool."""
        size = 1
        while min(self.map_sizes(size)["pool5"]) < 1:
            size += 1
        return size


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what is done to a batch before the network sees it."""

    data: Literal["shapes", "cifar10", "fashion-mnist", "folder", "store"] = "shapes"
    """shapes (generated, no download), cifar10, fashion-mnist, folder (DIR/train/CLASS/*), store (packed)."""
    data_dir: str = "data"
    """Where the set is, or is to be put."""
    limit_train: int = 0
    """Use the first N training images, after the seeded shuffle; 0: all."""
    limit_val: int = 0
    """Likewise for validation."""
    limit_test: int = 0
    """Likewise for the test split."""
    validation_share: float = 0.1
    """Class-balanced share of the training images held out for validation, where the set has no split of its own."""
    stored_side: int = 256
    """Side of the stored images that the crop is scaled to (P 2)."""
    crop_of: int = 227
    """The crop that belongs to stored_side: images are resized to stored_side * image_size / crop_of, then cropped."""
    random_crop: bool = True
    """Crop at a random place in training (P 4.1); otherwise, and in testing, at the centre."""
    last_offset: bool = True
    """Whether a crop may touch the right and bottom edge: 33 offsets an axis (2012 source) or the paper's 32."""
    flip: bool = True
    """Mirror half of the training images (P 4.1)."""
    crop_chunk: int = 1
    """Consecutive images that share one crop and flip: 32 in the 2012 source."""
    colour_noise: float = 0.0
    """Standard deviation of the PCA colour noise, 0.1 in P 4.1; 0: none."""
    colour_unit: Literal["eigenvalue", "deviation"] = "deviation"
    """What a draw is multiplied by: the paper says the eigenvalue, the 2012 source takes its square root."""
    colour_divides: bool = False
    """Divide the noisy image by 1 + colour_noise, as the 2012 source does."""
    mean: Literal["image-centre", "image-aligned", "half", "none"] = "image-centre"
    """What is subtracted: the mean image's centre crop (2012 source), the crop's own place in it, or 0.5 after /255."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "limit_train", "limit_val", "limit_test", "colour_noise")
        _check(0 < self.validation_share < 1, f"--validation-share {self.validation_share}: between 0 and 1")
        _check(self.crop_chunk >= 1, f"--crop-chunk {self.crop_chunk}: one image or more")
        _check(self.stored_side >= self.crop_of >= 1, f"--stored-side {self.stored_side} --crop-of {self.crop_of}: the crop must fit in")

    def resized_side(self, image_size: int) -> int:
        """The side to which a batch is resized before it is cropped to `image_size`: round(256 * S / 227)."""
        return round(self.stored_side * image_size / self.crop_of)


@dataclass(frozen=True)
class RecipeConfig:
    """How the network is trained."""

    epochs: int = 90
    """Passes over the training images (P 5)."""
    max_steps: int = 0
    """Stop after this many optimiser steps since the run's first start; 0: no such limit."""
    batch_size: int = 128
    """Images in one step, over all ranks together (P 5)."""
    optimizer: Literal["2012", "torch"] = "2012"
    """2012: the learning rate inside the velocity, as the paper prints it. torch: torch.optim.SGD."""
    lr: float = 0.01
    """Learning rate of the weights (P 5)."""
    bias_lr: float | None = None
    """Learning rate of the biases, which no schedule then changes; None: as the weights'."""
    momentum: float = 0.9
    """Share of the velocity that is kept (P 5)."""
    weight_decay: float = 0.0005
    """Decay of the weights (P 5)."""
    bias_decay: bool = True
    """Whether biases decay too. The paper prints one rule for all; the 2012 source decays weights only."""
    schedule: Literal["constant", "plateau", "log", "cosine"] = "plateau"
    """plateau: lr falls where validation loss stalls; log: the 2012 run's epochs, scaled; cosine: to zero at the end."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate of a cosine schedule rises from zero."""
    lr_factor: float = 0.1
    """plateau: what a stall multiplies the learning rate by (P 5)."""
    lr_patience: int = 3
    """plateau: epochs without improvement that are borne before lr falls."""
    lr_min: float = 1e-5
    """plateau: lr falls no further (P 5: three falls)."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0: never."""
    delta: float = 0.0
    """The least improvement that counts for `patience`."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "epochs", "max_steps", "lr", "weight_decay", "patience", "lr_patience", "lr_min", "warmup_epochs", "delta")
        _check(self.batch_size >= 1, f"--batch-size {self.batch_size}: one image or more")
        _check_not_negative(self, *(["bias_lr"] if self.bias_lr is not None else []))
        _check(0 <= self.momentum < 1, f"--momentum {self.momentum}: at least 0 and below 1")
        _check(0 < self.lr_factor < 1, f"--lr-factor {self.lr_factor}: between 0 and 1")


@dataclass(frozen=True)
class RunConfig:
    """The machine, the placement and the folder. Nothing here changes what is computed, beyond rounding."""

    seed: int = 0
    """Seed of weights, order, crops, flips, colours, dropout and generated data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS (one rank), else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl where each rank has a GPU of its own, else gloo."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers; weights and LRN stay in float32."""
    compile: bool = False
    """Compile what lies between two crossings with torch.compile."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit (on CUDA slower)."""
    threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores evenly."""
    column_ranks: int = 0
    """Ranks that share one copy of the network; 0: the most that columns and ranks allow. 1: data parallel."""
    out: str = ""
    """Folder for the run's files; default runs/PRESET-DATA-TIME."""
    resume: str = ""
    """Continue from this checkpoint; the flag alone means OUT/last.pt."""
    timeout: float = 60.0
    """Seconds that one rank waits for another before it gives up."""

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, f"--seed {self.seed}: a number from 0 to 2**63 - 1")
        _check_not_negative(self, "threads", "column_ranks")
        _check(0 < self.timeout < 1e6, f"--timeout {self.timeout}: a positive number of seconds")


@dataclass(frozen=True)
class Config:
    """One complete configuration: `dataclasses.replace` or `with_fields` makes variants of it."""

    preset: str = "demo"
    """The named configuration that the other flags change: demo, paper, original, original-half, original-isolated, tutorial."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def with_fields(self, **changes: Any) -> Config:
        """A copy with flat field names changed, e.g. `with_fields(image_size=67, lr=0.02)`.

        Raises ValueError for a name that no part has, and for a value that its part refuses.
        """
        parts = {}
        for name in ("model", "data", "recipe", "run"):
            part = getattr(self, name)
            mine = {f.name: changes.pop(f.name) for f in dataclasses.fields(part) if f.name in changes}
            parts[name] = dataclasses.replace(part, **mine)
        if set(changes) - {"preset"}:
            raise ValueError(f"no such configuration field: {', '.join(changes)}")
        return dataclasses.replace(self, **changes, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers: what config.json and a checkpoint hold."""
        return {key: {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()} if isinstance(value, dict) else value
                for key, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises ValueError where a field is unknown or refused."""
        try:
            parts = {name: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[name].items()})
                     for name, kind in (("model", ModelConfig), ("data", DataConfig), ("recipe", RecipeConfig), ("run", RunConfig))}
            return Config(preset=values["preset"], **parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a configuration of this version of alexnet_mp: {error}") from None
