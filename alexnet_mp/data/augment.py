"""What is done to a batch between the store and the network: resize, crop, flip, mean, colour. Batched, on the device.

Values are grey levels, 0 to 255, as in 2012, and stay so after the mean is subtracted; only `--mean half` scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alexnet_mp import native
from alexnet_mp.config import DataConfig
from alexnet_mp.data.statistics import Statistics
from alexnet_mp.data.store import Run, resize
from alexnet_mp.native import Mean
from alexnet_mp.seeds import combine


@dataclass(frozen=True)
class Draw:
    """The random choices of some rows of a batch, on the CPU."""

    top: Tensor         # (N,) int64, the crop's first row
    left: Tensor        # (N,) int64, its first column
    flip: Tensor        # (N,) bool
    colour: Tensor | None      # (N, 3) float32, grey levels to add to red, green and blue; None without colour noise

    def rows(self, first: int, last: int) -> Draw:
        """Those of rows `first` to `last` - 1."""
        colour = None if self.colour is None else self.colour[first:last]
        return Draw(self.top[first:last], self.left[first:last], self.flip[first:last], colour)


class Augment:
    """Turns uint8 images (N, 3, s, s) into what the network sees, float32 (N, 3, size, size), on their device.

    `side` is what images are resized to before they are cropped to `size`. Set `noise_off` to end the colour noise, and the
    division that belongs to it, during training, as the 2012 schedule does.
    """

    def __init__(self, config: DataConfig, image_size: int, statistics: Statistics | None = None, device: torch.device | str = "cpu") -> None:
        """`statistics`, of the training split at `side`, is needed where `needs_statistics(config)`."""
        self.config, self.size, self.side, self.statistics = config, image_size, config.resized_side(image_size), statistics
        self.noise_off = False
        self.margin = self.side - image_size        # the last place at which a crop fits
        if needs_statistics(config) and statistics is None:
            raise ValueError(f"--mean {config.mean} --colour-noise {config.colour_noise}: need the statistics of the training images")
        if config.mean.startswith("image"):
            self.mean_image = statistics.mean_image.to(device)
            centre = self.margin // 2
            self.centre_mean = self.mean_image[:, centre:centre + image_size, centre:centre + image_size].contiguous()
        self.colour_axes = colour_axes(config, statistics) if config.colour_noise else None

    def draw(self, seed: int, epoch: int, batch: int, rows: int) -> Draw:
        """The choices for all `rows` of a global batch, the `batch`-th of its epoch: the same on every rank, which takes its rows of them."""
        generator = torch.Generator().manual_seed(combine(seed, "augment", epoch, batch))
        chunk = self.config.crop_chunk
        chunks = -(-rows // chunk)
        places = max(self.margin + self.config.last_offset, 1)
        crops = torch.randint(places, (2, chunks), generator=generator)
        flips = torch.randint(2, (chunks,), generator=generator, dtype=torch.uint8).bool()
        colour = None
        if self.colour_axes is not None:
            normal = torch.randn((rows, 3), generator=generator) * self.config.colour_noise
            # Not a matrix product, whose last bits may depend on threads and processor.
            colour = sum(normal[:, k, None] * self.colour_axes[:, k] for k in range(3))
        if not self.config.random_crop:
            crops.fill_(self.margin // 2)
        top, left, flip = (values.repeat_interleave(chunk)[:rows] for values in (*crops, flips & self.config.flip))
        return Draw(top, left, flip, colour)

    def train(self, images: Tensor, draw: Draw) -> Tensor:
        """Cropped, flipped and coloured as `draw` says, mean subtracted."""
        images = self._at_side(images)
        if images.device.type == "cpu":
            return self.on_cpu(images.numpy().__getitem__, draw, torch.empty((len(images), 3, self.size, self.size)))
        values = self._centred(images, draw.top, draw.left, draw.flip)
        if draw.colour is not None and not self.noise_off:
            values += draw.colour.to(values.device, non_blocking=True)[:, :, None, None]
            if self.config.colour_divides:
                values /= 1 + self.config.colour_noise
        return self._scaled(values)

    def on_cpu(self, image: Callable[[int], np.ndarray], draw: Draw, out: Tensor, run: Run = map) -> Tensor:
        """`train`, to the bit, of the images that `image(row)` gives, uint8 (3, side, side), into `out`, float32 (N, 3, size, size).

        An image's steps follow each other while it is in the processor's cache: one pass over the memory, and no copy of the
        stored images. Not torch, so that a thread may do it without starting torch's beside the trainer's. `run` calls a
        function of a row for each, e.g. a thread pool's map.
        """
        target, tops, lefts, flips = out.numpy(), draw.top.tolist(), draw.left.tolist(), draw.flip.tolist()
        colour = draw.colour.numpy() if draw.colour is not None and not self.noise_off else None
        divisor = 1 + self.config.colour_noise if colour is not None and self.config.colour_divides else 1.0
        constant, scale = (127.5, 127.5) if self.config.mean == "half" else (0.0, 1.0)
        aligned = Mean(self.mean_image.numpy(), 0, 0, False) if self.config.mean == "image-aligned" else None
        centre = Mean(self.centre_mean.numpy(), 0, 0, False) if self.config.mean == "image-centre" else None
        crop = _crop if native.missing() else native.crop

        def prepare(row: int) -> None:
            top, left, flip = tops[row], lefts[row], flips[row]
            # The centre's is not flipped with the image: as in the 2012 source.
            mean = aligned._replace(top=top, left=left, flip=flip) if aligned else centre
            crop(image(row), top, left, flip, mean, constant, None if colour is None else colour[row], divisor, scale, target[row])

        for _ in run(prepare, range(len(tops))):
            pass
        return out

    def test(self, images: Tensor) -> Tensor:
        """The centre crop, mean subtracted."""
        return self._view(self._at_side(images), self.margin // 2, self.margin // 2, False)

    def centre(self, rows: int) -> Draw:
        """The choices of `test`, for so many images."""
        middle = torch.full((rows,), self.margin // 2)
        return Draw(middle, middle, torch.zeros(rows, dtype=torch.bool), None)

    def ten_crop(self, images: Tensor) -> Tensor:
        """float32 (N, 10, 3, size, size): top left, top right, bottom left, bottom right, centre, then the same five flipped."""
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
            draw = Draw(full + top, full + left, (full + flip).bool(), None)
            return self.on_cpu(images.numpy().__getitem__, draw, torch.empty((len(images), 3, self.size, self.size)))
        return self._scaled(self._centred(images, full + top, full + left, (full + flip).bool()))

    def _centred(self, images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        values = cut(images, top, left, flip, self.size).float()
        if self.config.mean == "image-aligned":
            values -= cut(self.mean_image.expand(len(images), -1, -1, -1), top, left, flip, self.size)
        elif self.config.mean == "image-centre":
            values -= self.centre_mean          # not flipped with the image: as in the 2012 source
        elif self.config.mean == "half":
            values -= 127.5
        return values

    def _scaled(self, values: Tensor) -> Tensor:
        return values.div_(127.5) if self.config.mean == "half" else values


def _crop(image: np.ndarray, top: int, left: int, flip: bool, mean: Mean | None, constant: float, colour: np.ndarray | None, divisor: float,
          scale: float, out: np.ndarray) -> None:
    """`native.crop` in NumPy's words, to the bit."""
    size = out.shape[-1]

    def cropped(values: np.ndarray, top: int, left: int, flip: bool) -> np.ndarray:
        return values[:, top:top + size, left:left + size][:, :, ::-1 if flip else 1]

    out[...] = cropped(image, top, left, flip)
    if mean is not None:
        out -= cropped(*mean)
    if constant:
        out -= np.float32(constant)
    if colour is not None:
        out += colour[:, None, None]
    for number in (divisor, scale):
        if number != 1:
            out /= np.float32(number)


def needs_statistics(config: DataConfig) -> bool:
    """Whether the mean image or the colours of the training split enter."""
    return config.mean.startswith("image") or config.colour_noise > 0


def colour_axes(config: DataConfig, statistics: Statistics) -> Tensor:
    """float32 (3, 3): what a standard normal triple times colour_noise is multiplied by, to give grey levels of red, green and blue.

    Columns are the covariance's eigenvectors, each times a scale. `deviation`: the standard deviation along it, in grey levels
    (ImageNet: 19.7, 37.1, 121.8). `eigenvalue`: the paper's, which means the variance of values from 0 to 1; the product, too, is
    of that scale and is brought back to grey levels (ImageNet: 0.228 * 255 = 58.2 for the largest).
    """
    variances, vectors = torch.linalg.eigh(statistics.covariance)
    variances = variances.clamp(min=0)
    # LAPACK leaves each vector's sign open; fixed, so that machines agree.
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    scale = variances / 255 if config.colour_unit == "eigenvalue" else variances.sqrt()
    return (vectors * scale).float()


def cut(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """The crop (3, size, size) of each image (N, 3, s, s) at its own place, mirrored where `flip`; places are on the CPU.

    One gather for all images, for a GPU; on a CPU `Augment.on_cpu` is several times as fast.
    """
    along = torch.arange(size)
    rows = top[:, None] + along                                                            # (N, size)
    columns = left[:, None] + torch.where(flip[:, None], size - 1 - along, along)
    numbers = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(3, device=images.device)[None, :, None, None]
    rows, columns = (places.to(images.device, non_blocking=True) for places in (rows, columns))
    return images[numbers, channels, rows[:, None, :, None], columns[:, None, None, :]]
