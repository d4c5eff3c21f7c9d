"""conv1 and what it reads: the images with the zeros around them, for a CPU's bfloat16 cut into blocks of 4x4 pixels.

A stride of 4 over three colors leaves a CPU's matrix units idle: the gradient of conv1's weights alone took a tenth of a step. The same sums are a
convolution of 3x3 blocks at stride 1 over the 48 values of a block, its kernels 12x12 with a last row and column of zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_mp.config.model import CONV1_STRIDE, KERNEL_SIZES

SIZE, STRIDE = KERNEL_SIZES["alexnet"]["conv1"], CONV1_STRIDE
REACH = SIZE // STRIDE + 1  # blocks that a kernel touches along one axis


class FirstConv2d(nn.Conv2d):
    """conv1: 11x11 kernels at stride 4 (paper, section 3.5): (N, 3, H, W), or its `in_blocks`, -> (N, kernels, (H - 11) // 4 + 1, ...)."""

    def __init__(
        self,
        kernels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(3, kernels, SIZE, STRIDE, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            return super().forward(x)
        side = STRIDE * REACH
        weight = F.pad(
            self.weight.to(x.dtype), (0, side - SIZE, 0, side - SIZE)
        )  # (kernels, 3, 12, 12)
        weight = weight.unflatten(3, (REACH, STRIDE)).unflatten(
            2, (REACH, STRIDE)
        )  # (kernels, 3, 3, 4, 3, 4)
        weight = weight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # (kernels, 48, 3, 3)
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), self.bias)


def first_input(images: Tensor, padding: tuple[int, int, int, int], conv1: nn.Module) -> Tensor:
    """The images (N, 3, H, W) as `conv1` reads them, zeros left, right, top and bottom, in the type it computes in.

    Once, where autocast would do it for every column. In blocks where that is faster: while its weights learn, on a CPU, in bfloat16.
    """
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    learns = torch.is_grad_enabled() and conv1.weight.requires_grad and not images.requires_grad
    if (
        isinstance(conv1, FirstConv2d)
        and learns
        and kind == "cpu"
        and dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
    ):
        return in_blocks(images, padding)
    if not any(padding):
        return images.to(dtype)
    left, right, top, bottom = padding
    height, width = images.shape[2:]
    memory_format = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    return _framed(
        images, height + top + bottom, width + left + right, top, left, dtype, memory_format
    )


def in_blocks(images: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Images (N, 3, H, W), zeros around them, as bfloat16 (N, 48, blocks down, blocks across), channels last; 48 is (row, column, color) of a pixel.

    As many blocks as conv1's places reach: up to three pixels at the right and bottom, which it does not read, are left out, or zeros are added.
    """
    left, right, top, bottom = padding
    down, across = (
        (n - SIZE) // STRIDE + REACH
        for n in (images.shape[2] + top + bottom, images.shape[3] + left + right)
    )
    framed = _framed(
        images, down * STRIDE, across * STRIDE, top, left, torch.bfloat16, torch.channels_last
    )
    # Four pixels of three colors are 24 bytes: moved as three long words, several times as fast as twelve short ones.
    rows = (
        framed.permute(0, 2, 3, 1)
        .reshape(len(images), down, STRIDE, across * STRIDE * 3)
        .view(torch.int64)
    )
    blocks = (
        rows.unflatten(3, (across, 3)).permute(0, 1, 3, 2, 4).contiguous()
    )  # (N, down, across, 4, 3 words)
    return blocks.flatten(3).view(torch.bfloat16).permute(0, 3, 1, 2)


def _framed(
    images: Tensor,
    height: int,
    width: int,
    top: int,
    left: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """The images at (top, left) of zeros (N, 3, height, width), as far as they fit; several times as fast as F.pad, which knows one format only."""
    framed = torch.empty(
        (*images.shape[:2], height, width),
        dtype=dtype,
        device=images.device,
        memory_format=memory_format,
    )
    inside = images[:, :, : height - top, : width - left]
    below, beside = top + inside.shape[2], left + inside.shape[3]
    framed[:, :, top:below, left:beside] = inside
    for edge in (
        framed[:, :, :top],
        framed[:, :, below:],
        framed[..., :left],
        framed[..., beside:],
    ):
        edge.zero_()
    return framed
