"""The network's configuration, checked when it is made.

Each default is the paper's, its section beside it (P 3.3); `presets.py` names the sources. Layers
are always named conv1 to conv5 and fc6 to fc8; a tuple of eight has one entry for each, in that
order. The four-layer net of the paper's figure 1 has conv1 to conv3 and fc8 of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
KERNEL_SIZES = {
    "alexnet": {"conv1": 11, "conv2": 5, "conv3": 3, "conv4": 3, "conv5": 3},  # P, figure 2
    "four-layers": {"conv1": 5, "conv2": 5, "conv3": 5},  # 18pct
}
CONV1_STRIDE = 4  # P 3.5; the four-layer net's is 1

Size = tuple[int, int]
"""(height, width)."""


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_not_negative(part: Any, *names: str) -> None:
    """Raises ValueError, naming the flag, unless these fields of `part` are 0 or more."""
    for name in names:
        check(
            0 <= getattr(part, name) < math.inf,
            f"--{name.replace('_', '-')} {getattr(part, name)}: must be a number and not negative",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network. All sizes are those of one column: `kernels=(48, ...)` in two columns make 96.

    A column is one GPU's part of the network. A crossing is a layer that reads all columns: there,
    and only there, the GPUs exchange activations. Raises ValueError, one line that names the flag,
    for a network that cannot be, e.g. one that leaves nothing of so small an image.

        ModelConfig(columns=2, image_size=227, classes=1000)
    """

    columns: int = 2
    """Columns, the parts of the network that one GPU each holds: 1, 2 (the paper) or more."""
    kernels: tuple[int, ...] = (48, 128, 192, 192, 128)
    """Kernels of conv1 to conv5 in each column (P, figure 2)."""
    hidden: tuple[int, ...] = (2048, 2048)
    """Units of fc6 and fc7 in each column (P, figure 2)."""
    classes: int = 0
    """Classes, that is logits. 0: as many as the data has, or the paper's 1000 without data."""
    image_size: int = 227
    """Side of the square crop that the network sees, in pixels."""
    conv1_padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Zeros around the crop: left, right, top, bottom. The 2012 source: 0 3 0 3 at 224 pixels."""
    crossings: tuple[str, ...] = ("conv3", "fc6", "fc7", "fc8")
    """Layers that read all columns, where GPUs exchange activations. fc8 is always among them."""
    layer1_order: Literal["relu-lrn-pool", "lrn-pool-relu", "relu-pool-lrn"] = "relu-lrn-pool"
    """Order of the steps after conv1: the paper normalizes after the ReLU, the 2012 source before
    it, Caffe's bvlc_reference_caffenet after pooling."""
    layer2_order: Literal["relu-lrn-pool", "relu-pool-lrn"] = "relu-lrn-pool"
    """Order of the steps after conv2: the paper's, or that of bvlc_reference_caffenet."""
    lrn: bool = True
    """Local response normalization after conv1 and conv2 (P 3.3)."""
    lrn_across_columns: bool = False
    """Let the window of LRN reach into the neighboring column's maps, as Caffe does. Ranks then
    exchange these maps too."""
    lrn_size: int = 5
    """Neighboring kernel maps in the sum, n in P 3.3."""
    lrn_k: float = 2.0
    """The constant k in the denominator (P 3.3)."""
    lrn_alpha: float = 1e-4
    """Factor of the SUM of squares, as P 3.3 prints it; not divided by n, unlike torch's."""
    lrn_beta: float = 0.75
    """The exponent of the denominator (P 3.3)."""
    map_norm: bool = False
    """The 2012 source's second norm in layer 2: 5x5 pixels within each map, not in the paper."""
    map_norm_alpha: float = 1e-3 / 25
    """Factor of that norm's sum of 25 squares (LP145:157-163, divided by the window's size)."""
    pool_size: int = 3
    """Side of the max-pooling window (P 3.4)."""
    pool_stride: int = 2
    """Step of the max-pooling window; smaller than pool_size overlaps (P 3.4)."""
    activation: Literal["relu", "tanh"] = "relu"
    """The nonlinearity after every layer but fc8 (P 3.1)."""
    dropout: Literal["2012", "inverted"] = "2012"
    """2012: masks in training, multiplies by the keep rate in testing. inverted: divides in
    training."""
    dropout_rate: float = 0.5
    """Share of units set to zero in training (P 4.2); 0 turns dropout off."""
    dropout_after: tuple[str, ...] = ("fc6", "fc7")
    """Layers whose outputs are dropped: any of conv5 (as in the tutorial's net), fc6, fc7."""
    initial_weights: tuple[float | Literal["he", "torch"], ...] = (0.01,) * 8
    """Standard deviation of each layer's normal draw (P 5), or he: sqrt(2/fan-in), or torch: its
    default."""
    initial_biases: tuple[float | Literal["torch"], ...] = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    """Constant bias of each layer (P 5), or torch (its default)."""
    adaptive_pool: int = 0
    """Average-pool the last map to this side whatever the image size, as the tutorial's net (6); 0:
    do not."""
    network: Literal["alexnet", "four-layers"] = "alexnet"
    """four-layers: the small net on which the paper compares ReLU with tanh (P, figure 1); one
    column."""

    def __post_init__(self) -> None:
        check(
            self.network in KERNEL_SIZES,
            f"--network {self.network}: not one of {', '.join(KERNEL_SIZES)}",
        )
        check(self.columns >= 1, f"--columns {self.columns}: a network has one column or more")
        check_not_negative(self, "classes", "lrn_alpha", "lrn_beta", "map_norm_alpha")
        self._check_layers()
        self._check_crossings()
        self._check_norm_and_pool()
        self._check_dropout()
        self._check_start()
        if self.network == "four-layers":
            self._check_four_layers()
        smallest = self.smallest_image()
        check(
            self.image_size >= smallest,
            f"--image-size {self.image_size}: too small for this network, nothing is left of the "
            f"image after the last pool; the smallest that works is {smallest}",
        )

    def _check_layers(self) -> None:
        convolutions = list(self.kernel_sizes)
        units = [name for name in self.layers if name in ("fc6", "fc7")]
        check(
            len(self.kernels) == len(convolutions) and min(self.kernels) > 0,
            f"--kernels {self.kernels}: {len(convolutions)} positive numbers, "
            f"{convolutions[0]} to {convolutions[-1]}",
        )
        wanted = (
            "two positive numbers, fc6 and fc7"
            if units
            else "none, --network four-layers has no hidden units"
        )
        check(
            len(self.hidden) == len(units) and min(self.hidden, default=1) > 0,
            f"--hidden {self.hidden}: {wanted}",
        )
        check(
            len(self.conv1_padding) == 4 and min(self.conv1_padding) >= 0,
            f"--conv1-padding {self.conv1_padding}: four numbers, left right top bottom, "
            "none negative",
        )

    def _check_crossings(self) -> None:
        given = " ".join(self.crossings)
        unknown = [name for name in self.crossings if name not in LAYERS[1:]]
        check(not unknown, f"--crossings {' '.join(unknown)}: not one of {' '.join(LAYERS[1:])}")
        check(
            "fc8" in self.crossings,
            f"--crossings {given}: fc8 must be among them, every rank needs all logits",
        )
        check(
            len(set(self.crossings)) == len(self.crossings),
            f"--crossings {given}: a layer stands there twice",
        )

    def _check_norm_and_pool(self) -> None:
        check(
            self.lrn_size >= 1 and self.lrn_size % 2 == 1,
            f"--lrn-size {self.lrn_size}: an odd number, the window is centered",
        )
        check(
            self.lrn_k > 0,
            f"--lrn-k {self.lrn_k}: must be positive, it keeps the denominator from zero",
        )
        check(
            self.pool_size >= 1 and self.pool_stride >= 1,
            f"--pool-size {self.pool_size} --pool-stride {self.pool_stride}: must be positive",
        )

    def _check_dropout(self) -> None:
        check(
            0 <= self.dropout_rate < 1,
            f"--dropout-rate {self.dropout_rate}: at least 0 and below 1",
        )
        check(
            not (self.map_norm and self.layer2_order != "relu-lrn-pool"),
            f"--layer2-order {self.layer2_order}: --map-norm has its place before the pool",
        )
        check(
            self.columns == 1
            or not self.lrn_across_columns
            or self.lrn_size // 2 <= min(self.kernels[:2]),
            f"--lrn-size {self.lrn_size}: with --lrn-across-columns the window may reach into the "
            f"next column only, which has {min(self.kernels[:2])} maps",
        )
        unknown = [name for name in self.dropout_after if name not in ("conv5", "fc6", "fc7")]
        check(not unknown, f"--dropout-after {' '.join(unknown)}: not one of conv5 fc6 fc7")

    def _check_start(self) -> None:
        for flag, count in (
            ("weights", len(self.initial_weights)),
            ("biases", len(self.initial_biases)),
        ):
            check(
                count == len(self.layers),
                f"--initial-{flag}: needs {len(self.layers)} values, "
                f"one for each of {' '.join(self.layers)}, got {count}",
            )
        check(
            all(isinstance(w, str) or 0 <= w < math.inf for w in self.initial_weights),
            f"--initial-weights {self.initial_weights}: negative",
        )

    def _check_four_layers(self) -> None:
        check(
            self.columns == 1,
            f"--columns {self.columns}: --network four-layers has one column",
        )
        check(
            not any(self.conv1_padding),
            f"--conv1-padding {self.conv1_padding}: --network four-layers has none but its own",
        )
        for name in ("map_norm", "adaptive_pool", "dropout_rate"):
            value = getattr(self, name)
            check(
                not value,
                f"--{name.replace('_', '-')} {value}: --network four-layers has no such thing; "
                "--preset four-layers sets it so",
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with weights, in order."""
        return LAYERS if self.network == "alexnet" else ("conv1", "conv2", "conv3", "fc8")

    @property
    def kernel_sizes(self) -> dict[str, int]:
        """The side of the convolutions' kernels."""
        return KERNEL_SIZES[self.network]

    def crosses(self, layer: str) -> bool:
        """Whether `layer` reads other columns too (never, where there is one column)."""
        return self.columns > 1 and layer in self.crossings

    @property
    def exchanges(self) -> tuple[str, ...]:
        """Names under which activations travel between columns: crossings, norms across columns."""
        norms = ("lrn1", "lrn2") if self.lrn and self.lrn_across_columns else ()
        return (*norms, *self.crossings)

    def map_sizes(self, image_size: int | None = None) -> dict[str, Size]:
        """The size of the maps after each convolution and pool, and of the first fully connected
        layer's input.

        `image_size` defaults to the configured one. Sizes are rounded down, as torch does; at 227,
        163, 131, 99 and 67 (without padding) no row is left over. The four-layer net rounds them
        up, as its source does.
        """
        size = self.image_size if image_size is None else image_size
        if self.network == "four-layers":
            return self._map_sizes_of_four_layers(size)
        left, right, top, bottom = self.conv1_padding
        kernel = self.kernel_sizes["conv1"]

        def conv1_side(n: int) -> int:
            return max((n - kernel) // CONV1_STRIDE + 1, 0)

        def pool(n: Size) -> Size:
            height, width = (max((side - self.pool_size) // self.pool_stride + 1, 0) for side in n)
            return height, width

        conv1 = conv1_side(size + top + bottom), conv1_side(size + left + right)
        pool1 = pool(conv1)
        pool2 = pool(pool1)  # conv2 keeps the size: 5x5, padding 2
        pool5 = pool(pool2)  # conv3 to conv5 too: 3x3, padding 1
        adaptive = self.adaptive_pool, self.adaptive_pool
        return {
            "conv1": conv1,
            "pool1": pool1,
            "conv2": pool1,
            "pool2": pool2,
            "conv3": pool2,
            "conv4": pool2,
            "conv5": pool2,
            "pool5": pool5,
            "fc6": adaptive if self.adaptive_pool and min(pool5) > 0 else pool5,
        }

    def _map_sizes_of_four_layers(self, size: int) -> dict[str, Size]:
        sizes = {}
        for layer in self.kernel_sizes:  # 5x5, padding 2: the size stays
            sizes[layer] = (size, size)
            size = max((size - self.pool_size + self.pool_stride - 1) // self.pool_stride + 1, 0)
            sizes[f"pool{layer[-1]}"] = (size, size)
        return sizes | {"fc8": (size, size)}

    def smallest_image(self) -> int:
        """The smallest image side that leaves at least one value after the last pool."""
        size, last = 1, f"pool{len(self.kernels)}"
        while min(self.map_sizes(size)[last]) < 1:
            size += 1
        return size
