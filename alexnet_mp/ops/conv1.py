"""conv1, and the images as it reads them: with zeros around them, or cut into blocks of 4x4 pixels.

A stride of 4 over three colors leaves the matrix units of a CPU or a GPU idle: in bfloat16 the
gradient of conv1's weights alone took a tenth of a step on a CPU, and its forward pass a third of
the kernels' time on an H200, where cuDNN takes a direct kernel for it. The same sums are a
convolution of 3x3 blocks at stride 1 over the 48 values of a block, with kernels of 12x12 whose
last row and column are zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from alexnet_mp.config.model import CONV1_STRIDE, KERNEL_SIZES
from alexnet_mp.ops.tracing import needs_plain_operations

SIZE, STRIDE = KERNEL_SIZES["alexnet"]["conv1"], CONV1_STRIDE
COLORS = 3
HALF = (torch.bfloat16, torch.float16)
REACH = SIZE // STRIDE + 1  # blocks that a kernel touches along one axis


class Conv1(nn.Conv2d):
    """conv1: 11x11 kernels at stride 4 (P 3.5).

    (N, 3, H, W), or the same images by `space_to_depth`, -> (N, kernels, (H - 11) // 4 + 1, ...).
    """

    def __init__(
        self,
        kernels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(COLORS, kernels, SIZE, STRIDE, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See Conv1; `weight` is (kernels, 3, 11, 11)."""
    if needs_plain_operations(x) or x.shape[1] == COLORS:
        return F.conv2d(x, weight, bias, STRIDE)
    blank = STRIDE * REACH - SIZE
    weight = F.pad(weight.to(x.dtype), (0, blank, 0, blank))  # (kernels, 3, 12, 12)
    weight = weight.view(-1, COLORS, REACH, STRIDE, REACH, STRIDE)  # (kernels, 3, 3, 4, 3, 4)
    weight = weight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # (kernels, 48, 3, 3)
    return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), bias)


def conv1_input(images: Tensor, padding: tuple[int, int, int, int], weight: Tensor) -> Tensor:
    """The images (N, 3, H, W) as Conv1 reads them, in the type that it computes in.

    `padding` are zeros left, right, top and bottom; `weight` is conv1's. This is done once, where
    autocast would do it for every column. They are cut into blocks where that is faster: in two
    bytes a value on a GPU, and in bfloat16 on a CPU while conv1 learns.
    """
    if needs_plain_operations(images):
        return F.pad(images, padding) if any(padding) else images
    device = images.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else images.dtype
    learns = torch.is_grad_enabled() and weight.requires_grad
    faster = dtype in HALF if device == "cuda" else learns and dtype == torch.bfloat16
    if faster and device in ("cpu", "cuda") and not images.requires_grad:
        return space_to_depth(images, padding, dtype)
    memory_format = input_format(device, images, weight)
    if not any(padding):
        return images.to(dtype, memory_format=memory_format)
    if memory_format == torch.preserve_format:
        memory_format = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    left, right, top, bottom = padding
    height, width = images.shape[2] + top + bottom, images.shape[3] + left + right
    return _pad(images, height, width, top, left, dtype, memory_format)


fx.wrap("convolve")  # torch.fx records a call of these, and does not look inside
fx.wrap("conv1_input")


def input_format(device: str, images: Tensor, weight: Tensor) -> torch.memory_format:
    """The format in memory of what conv1 reads: the images' own, but on a GPU that of the weights.

    There cuDNN would convert images of another format in forward and again in backward, for every
    column.
    """
    if device != "cuda":
        return torch.preserve_format
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


def space_to_depth(
    images: Tensor, padding: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Images (N, 3, H, W) as blocks of 4x4 pixels: (N, 48, rows, columns), channels-last.

    The 48 are (row, column, color) of a pixel of the block; `padding` as in `conv1_input`; `dtype`
    is bfloat16 or float16. There
    are as many blocks as conv1's kernels reach: up to three pixels at the right and at the bottom,
    which conv1 does not read, are left out, or zeros are added there.
    """
    left, right, top, bottom = padding
    rows, columns = (
        (n - SIZE) // STRIDE + REACH
        for n in (images.shape[2] + top + bottom, images.shape[3] + left + right)
    )
    height, width = rows * STRIDE, columns * STRIDE
    padded = _pad(images, height, width, top, left, dtype, torch.channels_last)
    # Four pixels of three colors are 24 bytes. They are moved as three long words, several times as
    # fast as twelve short ones.
    pixels = padded.permute(0, 2, 3, 1).reshape(len(images), rows, STRIDE, width * COLORS)
    words = pixels.view(torch.int64).view(len(images), rows, STRIDE, columns, COLORS)
    blocks = words.permute(0, 1, 3, 2, 4).contiguous()  # (N, rows, columns, 4, 3)
    blocks = blocks.flatten(3).view(dtype)  # (N, rows, columns, 48)
    return blocks.permute(0, 3, 1, 2)


def _pad(
    images: Tensor,
    height: int,
    width: int,
    top: int,
    left: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """The images at (top, left) of zeros (N, 3, height, width), as far as they fit.

    It is several times as fast as F.pad, which knows one memory format only.
    """
    padded = torch.empty(
        (*images.shape[:2], height, width),
        dtype=dtype,
        device=images.device,
        memory_format=memory_format,
    )
    inside = images[:, :, : height - top, : width - left]
    below, beside = top + inside.shape[2], left + inside.shape[3]
    padded[:, :, top:below, left:beside] = inside
    for edge in (
        padded[:, :, :top],
        padded[:, :, below:],
        padded[..., :left],
        padded[..., beside:],
    ):
        edge.zero_()
    return padded
