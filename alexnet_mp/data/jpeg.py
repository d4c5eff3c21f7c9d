"""JPEG, the one format whose decoding time decides how fast images are packed and loaded."""

from __future__ import annotations

import io

import numpy as np
import torch
import torchvision  # noqa: F401  registers the operator below, where its build has it
from PIL import Image
from torch import Tensor

QUALITY = 95


def decode(content: bytes | np.ndarray) -> Tensor:
    """uint8 (C, height, width), channels last in memory, C the channels in the file. RuntimeError where it is damaged.

    torchvision's operator and Pillow hold the same decoder and give the same pixels; the operator leaves out two copies. It is
    deprecated, so nothing but speed may depend on it.
    """
    if fast():
        return torch.ops.image.decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, False
        )
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as opened:
            return (
                torch.from_numpy(np.array(opened))
                .reshape(opened.height, opened.width, -1)
                .permute(2, 0, 1)
            )
    except OSError as error:
        raise RuntimeError(str(error)) from None


def fast() -> bool:
    """Whether this torchvision still has the operator."""
    return hasattr(torch.ops.image, "decode_jpeg")


def encode(image: np.ndarray) -> bytes:
    """uint8 (3, side, side) as a JPEG of quality 95."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(
        content, "JPEG", quality=QUALITY
    )
    return content.getvalue()
