"""Turns stored images into what the network sees: resize, crop, flip, mean, color.

Values are gray levels, 0 to 255, as in 2012, and stay so after the mean is subtracted; only `--mean
half` and `--deviations` scale them.
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
from alexnet_mp.data.store import ForEachRow
from alexnet_mp.ops import cpu_kernels, cuda_kernels
from alexnet_mp.ops.cpu_kernels import Mean


@dataclass(frozen=True)
class AugmentParams:
    """The random choices for some rows of a batch."""

    top: Tensor
    """int64 (N,): the crop's first row."""
    left: Tensor
    """int64 (N,): the crop's first column."""
    flip: Tensor
    """bool (N,): whether the crop is mirrored."""
    color: Tensor | None
    """float32 (N, 3): gray levels to add to red, green and blue; None without color noise."""

    def rows(self, first: int, last: int) -> AugmentParams:
        """The choices for rows `first` to `last` - 1."""
        color = None if self.color is None else self.color[first:last]
        return AugmentParams(
            self.top[first:last], self.left[first:last], self.flip[first:last], color
        )

    def to(self, device: torch.device) -> AugmentParams:
        """A copy on `device`, made without waiting: one small pinned tensor for the places, one for
        the colors.
        """
        places = _send(torch.stack([self.top, self.left, self.flip.long()]), device)  # (3, N)
        color = None if self.color is None else _send(self.color, device)
        return AugmentParams(places[0], places[1], places[2].bool(), color)


def _send(values: Tensor, device: torch.device) -> Tensor:
    """`values`, from the CPU, on `device`. CUDA copies from pinned memory only without holding up
    the host.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Augment:
    """Turns uint8 images (N, 3, s, s) into float32 (N, 3, size, size), on the images' device.

    Images are resized to `side` before they are cropped to `size`. During training `noise_off` ends
    the color noise, and the division that belongs to it, as the 2012 schedule does.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        statistics: Statistics | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`statistics`: of the training split at `side`. ValueError where
        `needs_statistics(config)` and there are none.

        `dtype`: of the result on CUDA, where the layers' own type saves a pass over memory; float32
        elsewhere.
        """
        self.dtype = dtype
        self.config, self.size, self.statistics = config, image_size, statistics
        self.side = config.resized_side(image_size)
        self.margin = self.side - image_size  # the last place at which a crop fits
        self.noise_off = False
        self.color_axes: Tensor | None = None
        self.reversed_colors = config.color_order == "bgr"
        self.deviations = torch.tensor(config.deviations)[:, None, None].to(device)
        self.scales_colors = set(config.deviations) != {1.0}
        if config.mean == "values":
            values = torch.tensor(config.mean_values)[:, None, None]
            self.center_mean = values.expand(3, image_size, image_size).contiguous().to(device)
        if not needs_statistics(config):
            return
        if statistics is None:
            raise ValueError(
                f"--mean {config.mean} --color-noise {config.color_noise}: need the statistics of "
                "the training images"
            )
        if config.mean.startswith("image"):
            self.mean_image = statistics.mean_image.to(device)  # (3, side, side)
            center = slice(self.margin // 2, self.margin // 2 + image_size)
            self.center_mean = self.mean_image[:, center, center].contiguous()  # (3, size, size)
        if config.color_noise:
            self.color_axes = color_axes(config, statistics)

    def draw(self, seed: int, epoch: int, batch: int, rows: int) -> AugmentParams:
        """The random choices for all `rows` of the `batch`-th global batch of `epoch`.

        They are the same on every rank, which takes its own rows of them, and on the CPU.
        """
        generator = torch.Generator().manual_seed(combine(seed, "augment", epoch, batch))
        chunk = self.config.images_per_crop
        chunks = -(-rows // chunk)
        places = max(self.margin + self.config.last_offset, 1)
        crops = torch.randint(places, (2, chunks), generator=generator)
        flips = torch.randint(2, (chunks,), generator=generator, dtype=torch.uint8).bool()
        color = None
        if self.color_axes is not None:
            normal = torch.randn((rows, 3), generator=generator) * self.config.color_noise
            # A matrix product's last bits may depend on threads and processor; these do not.
            red, green, blue = (normal[:, k, None] * self.color_axes[:, k] for k in range(3))
            color = red + green + blue
        if not self.config.random_crop:
            crops.fill_(self.margin // 2)
        top, left, flip = (
            values.repeat_interleave(chunk)[:rows] for values in (*crops, flips & self.config.flip)
        )
        return AugmentParams(top, left, flip, color)

    def train(self, images: Tensor, params: AugmentParams) -> Tensor:
        """Crops, flips and colors as `params` (on the CPU) say, and subtracts the mean."""
        images = resize(images, self.side)
        if images.device.type == "cpu":
            return self._all_on_cpu(images, params)
        params = params.to(images.device)
        if self._has_kernel(images):
            return self._by_kernel(images, params)
        values = self._centered(images, params)
        if params.color is not None and not self.noise_off:
            values += params.color[:, :, None, None]
            if self.config.color_divides:
                values /= 1 + self.config.color_noise
        return self._scaled(values)

    def test(self, images: Tensor) -> Tensor:
        """Takes the center crop and subtracts the mean."""
        return self._view(resize(images, self.side), self.margin // 2, self.margin // 2, False)

    def center(self, rows: int) -> AugmentParams:
        """The choices that `test` makes, for `rows` images."""
        return _same_for_all(rows, self.margin // 2, self.margin // 2, False)

    def ten_crop(self, images: Tensor) -> Tensor:
        """float32 (N, 10, 3, size, size): the four corners from the top left by rows, the center,
        then the same five flipped.
        """
        return torch.stack(list(self.ten_views(images)), 1)

    def ten_views(self, images: Tensor) -> Iterator[Tensor]:
        """The ten views of `ten_crop` one after another, which needs the memory of one."""
        images, last, middle = resize(images, self.side), self.margin, self.margin // 2
        places = ((0, 0), (0, last), (last, 0), (last, last), (middle, middle))
        for flip in (False, True):
            for top, left in places:
                yield self._view(images, top, left, flip)

    def on_cpu(
        self,
        image: Callable[[int], np.ndarray],
        params: AugmentParams,
        out: Tensor,
        for_each_row: ForEachRow = map,
    ) -> Tensor:
        """Does what `train` does, to the bit, with images that lie anywhere, and returns `out`.

        `image(row)`: uint8 (3, side, side). `out`: float32 (N, 3, size, size). `for_each_row` calls
        a function for each row, e.g. a thread pool's map.

        All steps of an image follow each other while it is in the processor's cache: one pass over
        the memory, and no copy of the stored images. It is not made of torch's operations, so a
        thread may call it without starting torch's threads beside the trainer's.
        """
        target, tops = out.numpy(), params.top.tolist()
        lefts, flips = params.left.tolist(), params.flip.tolist()
        noise = params.color is not None and not self.noise_off
        color = params.color.numpy() if params.color is not None and noise else None
        divisor = 1 + self.config.color_noise if noise and self.config.color_divides else 1.0
        constant, scale = (127.5, 127.5) if self.config.mean == "half" else (0.0, 1.0)
        aligned = center = None
        if self.config.mean == "image-aligned":
            aligned = Mean(self.mean_image.numpy(), 0, 0, False)
        elif self.config.mean in ("image-center", "values"):
            # Not flipped with the image: as in the 2012 source.
            center = Mean(self.center_mean.numpy(), 0, 0, False)
        crop = _crop if cpu_kernels.unavailable_reason() else cpu_kernels.crop

        def prepare(row: int) -> None:
            top, left, flip = tops[row], lefts[row], flips[row]
            mean = aligned._replace(top=top, left=left, flip=flip) if aligned else center
            shift = None if color is None else color[row]
            crop(image(row), top, left, flip, mean, constant, shift, divisor, scale, target[row])
            if self.scales_colors:
                target[row] /= self.deviations.numpy()
            if self.reversed_colors:
                target[row] = target[row, ::-1].copy()

        for _ in for_each_row(prepare, range(len(tops))):
            pass
        return out

    def _all_on_cpu(self, images: Tensor, params: AugmentParams) -> Tensor:
        out = torch.empty((len(images), 3, self.size, self.size))
        return self.on_cpu(images.numpy().__getitem__, params, out)

    def _view(self, images: Tensor, top: int, left: int, flip: bool) -> Tensor:
        """The same crop of every image."""
        params = _same_for_all(len(images), top, left, flip, images.device)
        if images.device.type == "cpu":
            return self._all_on_cpu(images, params)
        if self._has_kernel(images):
            return self._by_kernel(images, params)
        return self._scaled(self._centered(images, params))

    def _has_kernel(self, images: Tensor) -> bool:
        """Whether one kernel does all steps on the images' device; foreign networks' colors it does
        not.
        """
        return (
            cuda_kernels.usable(images.device.type)
            and not self.scales_colors
            and not self.reversed_colors
        )

    def _by_kernel(self, images: Tensor, params: AugmentParams) -> Tensor:
        """Does what `train` does in one pass over the images: (N, 3, size, size), channels-last, of
        `dtype`.
        """
        from alexnet_mp.ops import triton_kernels  # needs Triton

        noise = params.color is not None and not self.noise_off
        half, mean = self.config.mean == "half", None
        if self.config.mean == "image-aligned":
            mean = self.mean_image
        elif self.config.mean in ("image-center", "values"):
            mean = self.center_mean
        return triton_kernels.crop(
            images.contiguous(),
            torch.stack([params.top, params.left, params.flip.long()]).int(),
            self.size,
            self.dtype,
            mean,
            aligned=self.config.mean == "image-aligned",
            constant=127.5 if half else 0.0,
            color=params.color if noise else None,
            divisor=1 + self.config.color_noise if noise and self.config.color_divides else 1.0,
            scale=127.5 if half else 1.0,
        )

    def _centered(self, images: Tensor, params: AugmentParams) -> Tensor:
        """Crops minus their mean; `params` are on the images' device."""
        places = params.top, params.left, params.flip, self.size
        values = batched_crop(images, *places).float()
        if self.config.mean == "image-aligned":
            values -= batched_crop(self.mean_image.expand(len(images), -1, -1, -1), *places)
        elif self.config.mean in ("image-center", "values"):
            values -= self.center_mean  # not flipped with the image: as in the 2012 source
        elif self.config.mean == "half":
            values -= 127.5
        return values

    def _scaled(self, values: Tensor) -> Tensor:
        if self.config.mean == "half":
            values.div_(127.5)
        if self.scales_colors:
            values.div_(self.deviations)
        return values.flip(1) if self.reversed_colors else values


def _same_for_all(
    rows: int, top: int, left: int, flip: bool, device: torch.device | str = "cpu"
) -> AugmentParams:
    """One place for `rows` images, filled in on the device: nothing is copied."""
    return AugmentParams(
        torch.full((rows,), top, device=device),
        torch.full((rows,), left, device=device),
        torch.full((rows,), flip, device=device),
        None,
    )


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
    """`cpu_kernels.crop` with NumPy's operations, the same to the bit."""
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
    """Whether augmentation uses the mean image or the colors of the training split."""
    return config.mean.startswith("image") or config.color_noise > 0


def color_axes(config: DataConfig, statistics: Statistics) -> Tensor:
    """float32 (3, 3): the factor that turns a normal triple times color_noise into gray levels of
    red, green and blue.

    Columns are the covariance's eigenvectors, each times a scale. `deviation`: the standard
    deviation along it, in gray levels (ImageNet: 19.7, 37.1, 121.8). `eigenvalue`: the paper's,
    which means the variance of values from 0 to 1; the product, too, is of that scale and is
    brought back to gray levels (ImageNet: 0.228 * 255 = 58.2 for the largest).
    """
    variances, vectors = torch.linalg.eigh(statistics.covariance)
    variances = variances.clamp(min=0)
    # LAPACK leaves each vector's sign open; it is fixed here, so that machines agree.
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    scale = variances / 255 if config.color_unit == "eigenvalue" else variances.sqrt()
    axes: Tensor = (vectors * scale).float()
    return axes


def batched_crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """The crop (3, size, size) of each image (N, 3, s, s) at its own place, mirrored where `flip`;
    all on one device.

    One gather for all images, for a GPU; on a CPU `Augment.on_cpu` is several times as fast.
    """
    along = torch.arange(size, device=images.device)
    rows = top[:, None] + along  # (N, size)
    columns = left[:, None] + torch.where(flip[:, None], size - 1 - along, along)
    numbers = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    return images[numbers, channels, rows[:, None, :, None], columns[:, None, None, :]]
