"""The configuration of a run: four frozen dataclasses, checked when they are made.

Each default is the paper's, its section beside it (P 3.3). `presets.py` holds the changes of the
other named configurations, and names the sources. The docstring of a field is its flag's help.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from alexnet_mp.config.model import LAYERS, ModelConfig, check, check_not_negative
from alexnet_mp.config.renamed import with_current_names

__all__ = ["LAYERS", "Config", "DataConfig", "ModelConfig", "RecipeConfig", "RunConfig"]


@dataclass(frozen=True)
class DataConfig:
    """The source of the images, and how a batch is changed before the network sees it.

    Sides are in pixels. Raises ValueError, one line that names the flag, for a value that cannot
    be.

        DataConfig(data="folder", data_dir="~/pets", limit_train=1000)
    """

    data: Literal["shapes", "cifar10", "fashion-mnist", "folder", "store"] = "shapes"
    """shapes (generated, no download), cifar10, fashion-mnist, folder (DIR/CLASS/*, or
    DIR/train/CLASS/* and val or test or both; or an archive of one, ImageNet's tars, webdataset
    shards, Parquet), store (packed)."""
    data_dir: str = "data"
    """Where the set is, or is to be put; of an archive or shards the file, or the pattern."""
    cache_dir: str | None = None
    """Where generated and packed images are kept; None: alexnet_mp in $XDG_CACHE_HOME or in
    ~/.cache."""
    on_error: Literal["stop", "skip"] = "stop"
    """folder: at files that cannot be read, and at what is wrong with an archive, stop and name
    it, or leave it out and list it."""
    shuffle: Literal["full", "blocks"] = "full"
    """Order of an epoch. full: any order. blocks: neighbors in the store stay near each other,
    within 8,192 images, which suits spinning disks and network storage."""
    limit_train: int = 0
    """Use the first N training images, after the seeded shuffle; 0: all."""
    limit_val: int = 0
    """Likewise for validation."""
    limit_test: int = 0
    """Likewise for the test split."""
    validation_share: float = 0.1
    """Share of the training images, balanced by class, that is held out for validation, and for the
    test, where the set has no split of its own."""
    validation: Literal["held-out", "val"] = "held-out"
    """Which images validate, where a set has one split beside train, the test split. held-out: a
    share of train. val: the test images, and all of train trains, as in the paper and the 2012
    source."""
    stored_side: int = 256
    """Side of the stored images that the crop is scaled to (P 2)."""
    crop_of: int = 227
    """The crop that belongs to --stored-side: images are resized to stored-side * image-size /
    crop-of, then cropped to --image-size."""
    random_crop: bool = True
    """Crop at a random place in training (P 4.1); otherwise, and in testing, at the center."""
    last_offset: bool = True
    """Let a crop touch the right and bottom edge: 33 offsets an axis (2012 source), not the paper's
    32."""
    flip: bool = True
    """Mirror half of the training images (P 4.1)."""
    images_per_crop: int = 1
    """Consecutive images that share one crop and flip: 32 in the 2012 source."""
    color_noise: float = 0.0
    """Standard deviation of the PCA color noise, 0.1 in P 4.1; 0: none."""
    color_unit: Literal["eigenvalue", "deviation"] = "deviation"
    """Factor of a draw: the eigenvalue (P 4.1), or its square root, the deviation (2012 source)."""
    color_divides: bool = False
    """Divide the noisy image by 1 + color_noise, as the 2012 source does."""
    mean: Literal["image-center", "image-aligned", "values", "half", "none"] = "image-center"
    """The mean that is subtracted. image-center: the mean image's center crop (2012 source).
    image-aligned: the mean image at the crop's own place. values: --mean-values. half: 127.5, and
    the rest is divided by 127.5, so that values lie between -1 and 1."""
    mean_values: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Levels (0 to 255) of red, green and blue that --mean values subtracts: 122.67891 116.66877
    104.00699 for Caffe's networks."""
    deviations: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Levels by which red, green and blue are divided after the mean: 58.395 57.12 57.375 for
    torchvision's networks."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the colors that the network reads; Caffe's networks read bgr."""
    resize: Literal["shorter", "warp"] = "shorter"
    """How predict and features make an image square. shorter: by its shorter side, then the center.
    warp: by both sides, whatever the aspect, as for Caffe's networks. Stored images are square."""

    def __post_init__(self) -> None:
        check_not_negative(self, "limit_train", "limit_val", "limit_test", "color_noise")
        for flag, values in (("mean-values", self.mean_values), ("deviations", self.deviations)):
            check(
                len(values) == 3 and all(-math.inf < value < math.inf for value in values),
                f"--{flag} {' '.join(map(str, values))}: three numbers, for red, green and blue",
            )
        check(
            min(self.deviations) > 0,
            f"--deviations {' '.join(map(str, self.deviations))}: must be positive",
        )
        check(
            0 < self.validation_share < 1,
            f"--validation-share {self.validation_share}: between 0 and 1",
        )
        check(
            self.images_per_crop >= 1,
            f"--images-per-crop {self.images_per_crop}: one image or more",
        )
        check(
            self.stored_side >= self.crop_of >= 1,
            f"--stored-side {self.stored_side} --crop-of {self.crop_of}: the crop must fit in",
        )

    def resized_side(self, image_size: int) -> int:
        """The side to which a batch is resized before it is cropped to `image_size`, in pixels."""
        return round(self.stored_side * image_size / self.crop_of)


@dataclass(frozen=True)
class RecipeConfig:
    """How the network is trained: epochs, batch, rate, schedule, early stopping.

    Raises ValueError, one line that names the flag, for a value that cannot be.

        RecipeConfig(epochs=6, batch_size=32, lr=0.02, schedule="cosine")
    """

    epochs: int = 90
    """Passes over the training images (P 5)."""
    max_steps: int = 0
    """Stop after this many optimizer steps since the run's first start; 0: no such limit."""
    batch_size: int = 128
    """Images in one step, over all ranks together (P 5)."""
    optimizer: Literal["2012", "torch"] = "2012"
    """2012: the learning rate stands inside the velocity (P 5). torch: torch.optim.SGD."""
    lr: float = 0.01
    """Learning rate of the weights (P 5)."""
    bias_lr: float | None = None
    """Learning rate of the biases, which no schedule then changes after the warm-up; None: as the
    weights'."""
    lr_scale: Literal["none", "linear", "sqrt"] = "none"
    """Multiplies --lr, --bias-lr and --lr-min by --batch-size over the preset's batch (linear), or
    by the root of that (sqrt), for which the preset's rates were meant; see --warmup-epochs."""
    momentum: float = 0.9
    """Share of the velocity that is kept (P 5)."""
    weight_decay: float = 0.0005
    """Decay of the weights (P 5)."""
    bias_decay: bool = True
    """Decay biases too: P 5 prints one rule for all; the 2012 source decays weights only."""
    schedule: Literal["constant", "plateau", "2012", "cosine"] = "plateau"
    """Course of lr. plateau: it falls where the validation loss stalls. 2012: at --schedule-epochs,
    as it was changed by hand in 2012. cosine: half a cosine to zero at the last epoch."""
    schedule_epochs: tuple[int, int, int, int, int] = (25, 51, 67, 72, 79)
    """2012: epochs, counted as if all were 90, at whose ends lr falls; falls again; conv1's rate
    goes to 1e-5 and the color noise ends; conv1 freezes; lr falls a third time (LP145:165-182)."""
    warmup_epochs: float = 0.0
    """Epochs over which all rates rise linearly from zero to those of the schedule, whichever it
    is."""
    lr_factor: float = 0.1
    """plateau: factor of the learning rate at a stall (P 5)."""
    lr_patience: int = 3
    """plateau: epochs without improvement before lr falls at the next one."""
    lr_min: float = 1e-5
    """plateau: lr falls no further (P 5: three falls)."""
    patience: int = 0
    """Stop after this many epochs without a better validation loss; 0: never."""
    delta: float = 0.0
    """The least improvement that counts for `patience`."""
    init_from: str = ""
    """Start from the weights in this file, best.pt of a run or any that `convert` reads, instead of
    random ones: fine-tuning, with --reset fc8 for other classes."""
    reset: tuple[str, ...] = ()
    """Layers, such as fc8, that --init-from leaves out: they are drawn anew."""
    freeze: tuple[str, ...] = ()
    """Layers, such as conv1 conv2, that are not trained."""

    def __post_init__(self) -> None:
        for flag, layers in (("reset", self.reset), ("freeze", self.freeze)):
            for layer in layers:
                check(layer in LAYERS, f"--{flag} {layer}: not one of {' '.join(LAYERS)}")
        check(
            bool(self.init_from) or not self.reset,
            f"--reset {' '.join(self.reset)}: says which layers --init-from leaves out; name a "
            "file",
        )
        check_not_negative(
            self,
            "epochs",
            "max_steps",
            "lr",
            "weight_decay",
            "patience",
            "lr_patience",
            "lr_min",
            "warmup_epochs",
            "delta",
        )
        check(self.batch_size >= 1, f"--batch-size {self.batch_size}: one image or more")
        check_not_negative(self, *(["bias_lr"] if self.bias_lr is not None else []))
        check(0 <= self.momentum < 1, f"--momentum {self.momentum}: at least 0 and below 1")
        check(
            len(self.schedule_epochs) == 5
            and list(self.schedule_epochs) == sorted(self.schedule_epochs)
            and min(self.schedule_epochs) > 0,
            f"--schedule-epochs {' '.join(map(str, self.schedule_epochs))}: five epochs above 0, "
            "none before the one to its left",
        )
        check(0 < self.lr_factor < 1, f"--lr-factor {self.lr_factor}: between 0 and 1")


@dataclass(frozen=True)
class RunConfig:
    """The machine, the placement and the folder. Nothing here changes the result, beyond rounding.

    Raises ValueError, one line that names the flag, for a value that cannot be.

        RunConfig(seed=1, device="cpu", threads=2, out="runs/mine")
    """

    seed: int = 0
    """Seed of weights, order, crops, flips, colors, dropout and generated data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS (one rank), else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl where each rank has a GPU of its own, else gloo."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers; weights and LRN stay in float32."""
    exchange_precision: Literal["same", "bf16"] = "same"
    """Precision of the activations that ranks exchange. same: the layers'. bf16: half of float32's
    bytes. Logits are always sent as they are."""
    profile: bool = False
    """Write OUT/trace.json of a few steps, for Perfetto, and print where each step's time goes."""
    tensorboard: bool = False
    """Write OUT/tensorboard: losses, accuracies, rate, norms of the gradients, kernels. Needs the
    package tensorboard."""
    compile: bool = False
    """Compile the layers between two crossings with torch.compile. A crossing is where ranks
    exchange."""
    cuda_graphs: bool = False
    """Compile them and replay them as CUDA graphs; the exchange stays outside the graphs."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit (on CUDA slower)."""
    threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores evenly."""
    workers: int = 0
    """Threads of each rank that prepare batches; 0: one, or --threads where a store holds JPEGs."""
    accumulate: int = 1
    """Parts in which each rank computes its rows of a batch, one after the other, for less memory:
    --batch-size stays the batch of a step, and the result is the same."""
    column_ranks: int = 0
    """Ranks that share one copy of the network. 0: the most that columns and ranks allow. 1: each
    rank holds all columns (data parallel)."""
    out: str = ""
    """Folder for the run's files; default runs/PRESET-DATA-TIME."""
    resume: str = ""
    """Continue from this checkpoint; the flag alone means OUT/last.pt."""
    save_every: int = 0
    """Steps between two saves of last.pt within an epoch; 0: at the ends of epochs only."""
    keep_checkpoints: int = 0
    """Keep the checkpoints of the last N epochs too, as epoch-0001.pt and so on."""
    timeout: float = 60.0
    """Seconds that one rank waits for another before it gives up."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, f"--seed {self.seed}: a number from 0 to 2**63 - 1")
        check_not_negative(
            self, "threads", "workers", "column_ranks", "save_every", "keep_checkpoints"
        )
        check(self.accumulate >= 1, f"--accumulate {self.accumulate}: one part or more")
        check(0 < self.timeout < 1e6, f"--timeout {self.timeout}: a positive number of seconds")


@dataclass(frozen=True)
class Config:
    """One complete configuration of a run. `with_fields` makes variants of it.

    >>> from alexnet_mp import preset >>> preset("demo").with_fields(lr=0.01,
    image_size=99).recipe.lr 0.01
    """

    preset: str = "demo"
    """The named configuration that the other flags change; the list stands above."""
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
            mine = {
                f.name: changes.pop(f.name) for f in dataclasses.fields(part) if f.name in changes
            }
            parts[name] = dataclasses.replace(part, **mine)
        if set(changes) - {"preset"}:
            raise ValueError(f"no such configuration field: {', '.join(changes)}")
        return dataclasses.replace(self, **changes, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers: what config.json and a checkpoint hold."""
        return {
            key: {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; names and values of earlier versions are brought up to date.

        Raises ValueError where a field is unknown or refused.
        """
        try:
            return Config(
                preset=values["preset"],
                model=ModelConfig(**_fields(values["model"])),
                data=DataConfig(**_fields(values["data"])),
                recipe=RecipeConfig(**_fields(values["recipe"])),
                run=RunConfig(**_fields(values["run"])),
            )
        except (
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ) as error:  # a file may hold anything, tensors too
            raise ValueError(
                f"not a configuration of this version of alexnet_mp: {error}"
            ) from None


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a part, from what `to_dict` or an earlier version made of it."""
    current = with_current_names(values)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in current.items()}
