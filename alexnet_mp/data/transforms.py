"""What is done to a batch between the store and the network: resize, crop, flip, mean, color. Batched, on the device.

Values are gray levels, 0 to 255, as in 2012, and stay so after the mean is subtracted; only `--mean half` scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.config import DataConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.data.decode import resize
from alexnet_mp.data.statistics import Statistics
from alexnet_mp.data.store import Run
from alexnet_mp.ops import cpu_kernels
from alexnet_mp.ops.cpu_kernels import Mean


@dataclass(frozen=True)
class AugmentParams:
    """The random choices of some rows of a batch, on the CPU."""

    top: Tensor  # (N,) int64, the crop's first row
    left: Tensor  # (N,) int64, its first column
    flip: Tensor  # (N,) bool
    color: (
        Tensor | None
    )  # (N, 3) float32, gray levels to add to red, green and blue; None without color noise

    def rows(self, first: int, last: int) -> AugmentParams:
        """Those of rows `first` to `last` - 1."""
        color = None if self.color is None else self.color[first:last]
        return AugmentParams(
            self.top[first:last], self.left[first:last], self.flip[first:last], color
        )


class Augment:
    """Turns uint8 images (N, 3, s, s) into what the network sees, float32 (N, 3, size, size), on their device.

    `side` is what images are resized to before they are cropped to `size`. Set `noise_off` to end the color noise, and the
    division that belongs to it, during training, as the 2012 schedule does.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        statistics: Statistics | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`statistics`, of the training split at `side`, is needed where `needs_statistics(config)`."""
        self.config, self.size, self.side, self.statistics = (
            config,
            image_size,
            config.resized_side(image_size),
            statistics,
        )
        self.noise_off = False
        self.margin = self.side - image_size  # the last place at which a crop fits
        if needs_statistics(config) and statistics is None:
            raise ValueError(
                f"--mean {config.mean} --color-noise {config.color_noise}: need the statistics of the training images"
            )
        if config.mean.startswith("image"):
            self.mean_image = statistics.mean_image.to(device)
            center = self.margin // 2
            self.center_mean = self.mean_image[
                :, center : center + image_size, center : center + image_size
            ].contiguous()
        self.color_axes = color_axes(config, statistics) if config.color_noise else None

    def draw(self, seed: int, epoch: int, batch: int, rows: int) -> AugmentParams:
        """The choices for all `rows` of a global batch, the `batch`-th of its epoch: the same on every rank, which takes its rows of them."""
        generator = torch.Generator().manual_seed(combine(seed, "augment", epoch, batch))
        chunk = self.config.images_per_crop
        chunks = -(-rows // chunk)
        places = max(self.margin + self.config.last_offset, 1)
        crops = torch.randint(places, (2, chunks), generator=generator)
        flips = torch.randint(2, (chunks,), generator=generator, dtype=torch.uint8).bool()
        color = None
        if self.color_axes is not None:
            normal = torch.randn((rows, 3), generator=generator) * self.config.color_noise
            # Not a matrix product, whose last bits may depend on threads and processor.
            color = sum(normal[:, k, None] * self.color_axes[:, k] for k in range(3))
        if not self.config.random_crop:
            crops.fill_(self.margin // 2)
        top, left, flip = (
            values.repeat_interleave(chunk)[:rows] for values in (*crops, flips & self.config.flip)
        )
        return AugmentParams(top, left, flip, color)

    def train(self, images: Tensor, draw: AugmentParams) -> Tensor:
        """Cropped, flipped and colored as `draw` says, mean subtracted."""
        images = self._at_side(images)
        if images.device.type == "cpu":
            return self.on_cpu(
                images.numpy().__getitem__,
                draw,
                torch.empty((len(images), 3, self.size, self.size)),
            )
        values = self._centered(images, draw.top, draw.left, draw.flip)
        if draw.color is not None and not self.noise_off:
            values += draw.color.to(values.device, non_blocking=True)[:, :, None, None]
            if self.config.color_divides:
                values /= 1 + self.config.color_noise
        return self._scaled(values)

    def on_cpu(
        self, image: Callable[[int], np.ndarray], draw: AugmentParams, out: Tensor, run: Run = map
    ) -> Tensor:
        """`train`, to the bit, of the images that `image(row)` gives, uint8 (3, side, side), into `out`, float32 (N, 3, size, size).

        An image's steps follow each other while it is in the processor's cache: one pass over the memory, and no copy of the
        stored images. Not torch, so that a thread may do it without starting torch's beside the trainer's. `run` calls a
        function of a row for each, e.g. a thread pool's map.
        """
        target, tops, lefts, flips = (
            out.numpy(),
            draw.top.tolist(),
            draw.left.tolist(),
            draw.flip.tolist(),
        )
        color = draw.color.numpy() if draw.color is not None and not self.noise_off else None
        divisor = (
            1 + self.config.color_noise if color is not None and self.config.color_divides else 1.0
        )
        constant, scale = (127.5, 127.5) if self.config.mean == "half" else (0.0, 1.0)
        aligned = (
            Mean(self.mean_image.numpy(), 0, 0, False)
            if self.config.mean == "image-aligned"
            else None
        )
        center = (
            Mean(self.center_mean.numpy(), 0, 0, False)
            if self.config.mean == "image-center"
            else None
        )
        crop = _crop if cpu_kernels.unavailable_reason() else cpu_kernels.crop

        def prepare(row: int) -> None:
            top, left, flip = tops[row], lefts[row], flips[row]
            # The center's is not flipped with the image: as in the 2012 source.
            mean = aligned._replace(top=top, left=left, flip=flip) if aligned else center
            crop(
                image(row),
                top,
                left,
                flip,
                mean,
                constant,
                None if color is None else color[row],
                divisor,
                scale,
                target[row],
            )

        for _ in run(prepare, range(len(tops))):
            pass
        return out

    def test(self, images: Tensor) -> Tensor:
        """The center crop, mean subtracted."""
        return self._view(self._at_side(images), self.margin // 2, self.margin // 2, False)

    def center(self, rows: int) -> AugmentParams:
        """The choices of `test`, for so many images."""
        middle = torch.full((rows,), self.margin // 2)
        return AugmentParams(middle, middle, torch.zeros(rows, dtype=torch.bool), None)

    def ten_crop(self, images: Tensor) -> Tensor:
        """float32 (N, 10, 3, size, size): top left, top right, bottom left, bottom right, center, then the same five flipped."""
        return torch.stack(list(self.ten_views(images)), 1)

    def ten_views(self, images: Tensor) -> Iterator[Tensor]:
        """The ten of `ten_crop`, one after another: the memory of a single one."""
        images, last, middle = self._at_side(images), self.margin, self.margin // 2
        corners = ((0, 0), (0, last), (last, 0), (last, last), (middle, middle))
        for flip in (False, True):
            for top, left in corners:
                yield self._view(images, top, left, flip)

    def _at_side(self, images: Tensor) -> Tensor:
        return resize(images, self.side)

    def _view(self, images: Tensor, top: int, left: int, flip: bool) -> Tensor:
        """One and the same crop of every image."""
        full = torch.full((len(images),), 0)
        if images.device.type == "cpu":
            draw = AugmentParams(full + top, full + left, (full + flip).bool(), None)
            return self.on_cpu(
                images.numpy().__getitem__,
                draw,
                torch.empty((len(images), 3, self.size, self.size)),
            )
        return self._scaled(self._centered(images, full + top, full + left, (full + flip).bool()))

    def _centered(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        values = batched_crop(images, top, left, flip, self.size).float()
        if self.config.mean == "image-aligned":
            values -= batched_crop(
                self.mean_image.expand(len(images), -1, -1, -1), top, left, flip, self.size
            )
        elif self.config.mean == "image-center":
            values -= self.center_mean  # not flipped with the image: as in the 2012 source
        elif self.config.mean == "half":
            values -= 127.5
        return values

    def _scaled(self, values: Tensor) -> Tensor:
        return values.div_(127.5) if self.config.mean == "half" else values


def _crop(
    image: np.ndarray,
    top: int,
    left: int,
    flip: bool,
    mean: Mean | None,
    constant: float,
    color: np.ndarray | None,
    divisor: float,
    scale: float,
    out: np.ndarray,
) -> None:
    """`native.crop` in NumPy's words, to the bit."""
    size = out.shape[-1]

    def cropped(values: np.ndarray, top: int, left: int, flip: bool) -> np.ndarray:
        return values[:, top : top + size, left : left + size][:, :, :: -1 if flip else 1]

    out[...] = cropped(image, top, left, flip)
    if mean is not None:
        out -= cropped(*mean)
    if constant:
        out -= np.float32(constant)
    if color is not None:
        out += color[:, None, None]
    for number in (divisor, scale):
        if number != 1:
            out /= np.float32(number)


def needs_statistics(config: DataConfig) -> bool:
    """Whether the mean image or the colors of the training split enter."""
    return config.mean.startswith("image") or config.color_noise > 0


def color_axes(config: DataConfig, statistics: Statistics) -> Tensor:
    """float32 (3, 3): what a standard normal triple times color_noise is multiplied by, to give gray levels of red, green and blue.

    Columns are the covariance's eigenvectors, each times a scale. `deviation`: the standard deviation along it, in gray levels
    (ImageNet: 19.7, 37.1, 121.8). `eigenvalue`: the paper's, which means the variance of values from 0 to 1; the product, too, is
    of that scale and is brought back to gray levels (ImageNet: 0.228 * 255 = 58.2 for the largest).
    """
    variances, vectors = torch.linalg.eigh(statistics.covariance)
    variances = variances.clamp(min=0)
    # LAPACK leaves each vector's sign open; fixed, so that machines agree.
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    scale = variances / 255 if config.color_unit == "eigenvalue" else variances.sqrt()
    return (vectors * scale).float()


def batched_crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """The crop (3, size, size) of each image (N, 3, s, s) at its own place, mirrored where `flip`; places are on the CPU.

    One gather for all images, for a GPU; on a CPU `Augment.on_cpu` is several times as fast.
    """
    along = torch.arange(size)
    rows = top[:, None] + along  # (N, size)
    columns = left[:, None] + torch.where(flip[:, None], size - 1 - along, along)
    numbers = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    rows, columns = (places.to(images.device, non_blocking=True) for places in (rows, columns))
    return images[numbers, channels, rows[:, None, :, None], columns[:, None, None, :]]
