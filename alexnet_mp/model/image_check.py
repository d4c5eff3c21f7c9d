"""Refuses images that a network cannot read, in one line with both shapes and the way out."""

from __future__ import annotations

from torch import Tensor

from alexnet_mp.config import ModelConfig
from alexnet_mp.ops.tracing import has_symbolic_shape


def check_images(images: Tensor, config: ModelConfig) -> None:
    """Raises ValueError unless `images` are floating-point (N, 3, H, W) of a size that fits.

    Other sizes than the configured one fit if the first fully connected layer gets as many values.
    """
    if has_symbolic_shape(images):
        return  # there are no numbers to compare
    side = config.image_size
    shape = tuple(images.shape)
    wanted = f"images {shape}: this network reads (N, 3, {side}, {side})"
    if len(shape) == 3:
        raise ValueError(f"{wanted}; give one image a batch axis, images[None]")
    if len(shape) != 4:
        raise ValueError(f"{wanted}, a batch of images")
    if shape[1] != 3:
        raise ValueError(f"{wanted}; {_way_to_three_channels(shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: this network reads floating-point numbers; scale and "
            "center them as in training, which the loaders of alexnet_mp.build_loaders do"
        )
    if shape[2:] != (side, side) and not _fits(shape[2], shape[3], config):
        raise ValueError(
            f"{wanted}; resize or crop the images, or build a network with image_size={shape[2]}"
        )


def _way_to_three_channels(shape: tuple[int, ...]) -> str:
    if shape[3] == 3:
        return "put the channels first, images.permute(0, 3, 1, 2)"
    if shape[1] == 1:
        return "repeat the gray channel, images.expand(-1, 3, -1, -1)"
    if shape[1] == 4:
        return "leave the fourth channel out, images[:, :3]"
    return "the second axis is that of the three colors"


def _fits(height: int, width: int, config: ModelConfig) -> bool:
    """Whether the maps that are flattened have the configured size: rows and columns separately."""
    last = list(config.map_sizes())[-1]
    rows, columns = config.map_sizes(height)[last][0], config.map_sizes(width)[last][1]
    return (rows, columns) == config.map_sizes()[last]
