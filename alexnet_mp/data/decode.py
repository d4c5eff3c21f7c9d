"""How an image file of any kind becomes a stored image: told by content, upright, square, never enlarged."""

from __future__ import annotations

import contextlib
import io
import threading
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alexnet_mp.data import jpeg
from alexnet_mp.data.store import resize

SIDE = 256
LARGE = 2**24
"""Pixels of an image that is decoded while no other large one is: a thread for each would need gigabytes."""
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "GIF",
    "WEBP",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "PPM",
    "JPEG2000",
    "HEIF",
)
"""What is tried. Pillow knows more, some without a mark of their own, one that starts another program on the file (EPS)."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientation asks a reader to do."""
_one_large = threading.Lock()


def try_read(file: Path, side: int = SIDE) -> np.ndarray | str:
    """`read_image`, or in a few words why that cannot be."""
    try:
        return read_image(file, side)
    except Exception as error:  # Pillow's plugins raise nearly everything for a damaged file
        return _reason(file, error)


def _reason(file: Path, error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        words = "not an image that Pillow knows"
        with contextlib.suppress(OSError), file.open("rb") as opened:
            start = opened.read(64).lstrip().lower()
            if not start:
                words = "an empty file"
            elif start.startswith(b"version https://git-lfs"):
                words = "not an image but a Git LFS pointer; fetch the files with `git lfs pull`"
    elif isinstance(error, Image.DecompressionBombError):
        words = f"more pixels than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} that Pillow decodes"
    return words.replace("\n", " ")


def read_image(file: str | Path, side: int = SIDE) -> np.ndarray:
    """The image in `file` as it is stored: uint8 RGB (3, s, s), the center square at s = min(side, its shorter side).

    Turned upright as EXIF says; the first frame of an animation; transparency on white; 16 bits become 8. Raises OSError and
    others of Pillow's for what is no image.
    """
    content = Path(file).read_bytes()
    with Image.open(io.BytesIO(content), formats=_formats()) as opened:
        width, height = opened.size
        with _one_large if width * height > LARGE else contextlib.nullcontext():
            square = _center_square(_pixels(opened, content, side))
        orientation = 1
        with contextlib.suppress(Exception):  # damaged metadata does not spoil the pixels
            orientation = opened.getexif().get(
                0x0112, 1
            )  # after the pixels: a TIFF is turned, and this set to 1, as it is decoded
    image = resize(square, min(side, square.shape[-1]))[0].numpy()
    if orientation in TURNS:
        turned = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).transpose(
            TURNS[orientation]
        )
        image = np.asarray(turned).transpose(2, 0, 1)
    return np.ascontiguousarray(image)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _pixels(opened: Image.Image, content: bytes, side: int) -> Tensor:
    """uint8 (3, height, width) or, of gray levels, (1, height, width); of a large JPEG, a half, quarter or eighth of its size."""
    if opened.format == "JPEG" and opened.mode in ("RGB", "L") and min(opened.size) < 4 * side:
        # The same library gives the same pixels as through Pillow, without its copies. What it refuses, Pillow may still know.
        with contextlib.suppress(RuntimeError):
            return jpeg.decode(content)
    # Scaled decoding, but never below twice the side, so that the reduction stays smooth.
    opened.draft(None, (2 * side, 2 * side))
    return torch.from_numpy(np.array(_rgb(opened))).permute(2, 0, 1)


def _center_square(pixels: Tensor) -> Tensor:
    """uint8 (1, 3, shorter, shorter), channels last in memory."""
    height, width = pixels.shape[1:]
    shorter = min(width, height)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = pixels[None, :, top : top + shorter, left : left + shorter].expand(-1, 3, -1, -1)
    return square.contiguous(
        memory_format=torch.channels_last
    )  # which is resized fastest, and to the same bits


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip it to white
        gray = np.clip(np.asarray(image, np.int64), 0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("gray levels in floating point, whose scale is not known")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
