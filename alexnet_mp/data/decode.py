"""Decodes image files of any kind into stored images, and JPEG from and into bytes.

The format is detected from the content; EXIF orientation is applied. A stored image is square,
uint8 RGB, and never enlarged.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import threading
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIDE = 256
QUALITY = 95
LARGE = 2**24
"""Pixels from which only one image is decoded at a time: one a thread would need gigabytes."""
FORMATS = tuple("JPEG MPO PNG GIF WEBP AVIF TIFF BMP DIB PPM JPEG2000 HEIF".split())
"""The formats that are tried.

Pillow knows more. Some of those cannot be told from their content, and one (EPS) starts another
program on the file.
"""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that each EXIF orientation asks for."""
_one_large = threading.Lock()


class Readable(Protocol):
    """A Path, or a member of an archive."""

    def read_bytes(self) -> bytes:
        """The whole content. OSError where it cannot be read."""


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, s, s) -> uint8 (N, 3, side, side): bilinear, with antialias where it reduces.

    Every image is resized on its own, in whole numbers on the CPU: the bits do not depend on the
    batch. CUDA has no such kernel; there it is done in float32 and rounded, which may differ by
    one gray level.
    """
    if images.shape[-1] == side:
        return images
    if not len(images):
        return images.new_empty((0, 3, side, side))
    if images.device.type == "mps":  # has no antialias
        return resize(images.cpu(), side).to(images.device)
    if images.device.type == "cpu":
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return (
        F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
    )


def try_read(file: Readable, side: int = SIDE, warp: bool = False) -> np.ndarray | str:
    """What `read_image` returns, or the reason why the file cannot be read, in a few words."""
    try:
        return read_image(file, side, warp)
    except Exception as error:  # Pillow's plugins raise nearly everything for a damaged file
        return _reason(file, error)


def _reason(file: Readable, error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        words = "not an image that Pillow knows"
        with contextlib.suppress(OSError):
            start = file.read_bytes()[:64]
            if not start.strip():
                words = "an empty file"
            elif start.lstrip().lower().startswith(b"version https://git-lfs"):
                words = "not an image but a Git LFS pointer; fetch the files with `git lfs pull`"
            elif start[4:8] == b"ftyp":
                words = _container_reason(start[8:32])
    elif isinstance(error, Image.DecompressionBombError):
        words = f"more pixels than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} that Pillow decodes"
    return words.replace("\n", " ")


def _container_reason(brands: bytes) -> str:
    """Why a file of the kind of HEIC, AVIF and MP4 was not taken, by the brands in its head."""
    if b"avif" in brands or b"avis" in brands:
        return "an AVIF image, which this Pillow does not read; pip install pillow-avif-plugin"
    if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")):
        if reason := _register_heif():
            return f"a HEIC image, which Pillow alone does not read; {reason}"
        return "a HEIC image that is damaged, or of a kind that pillow-heif does not read"
    return "not an image that Pillow knows, perhaps a video"


@cache
def _register_heif() -> str:
    """Teaches Pillow to read HEIC, with the pillow-heif package; else returns the way out."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ModuleNotFoundError:
        return "pip install pillow-heif"
    except Exception as error:  # an installation for another Python or system
        return f"pillow-heif is installed but cannot be used ({type(error).__name__}: {error})"
    return ""


def read_image(file: str | Readable, side: int = SIDE, warp: bool = False) -> np.ndarray:
    """The image in `file` as it is stored: uint8 RGB (3, s, s), s = min(side, its shorter side).

    It is the center square, upright as EXIF says; the first frame of an animation; transparency
    lies on white; 16 bits become 8. Raises OSError and other errors of Pillow's for a file that is
    damaged or no image.

    With `warp` it is the whole image at side x side instead, whatever its aspect and size.
    """
    content = (Path(file) if isinstance(file, str) else file).read_bytes()
    with Image.open(io.BytesIO(content), formats=_formats()) as opened:
        width, height = opened.size
        with _one_large if width * height > LARGE else contextlib.nullcontext():
            square = to_square(_pixels(opened, content, side), side, warp)
        orientation = 1
        # After the pixels: as a TIFF or HEIC is decoded, it is turned and this is set to 1.
        # Damaged metadata does not spoil the pixels.
        with contextlib.suppress(Exception):
            orientation = opened.getexif().get(0x0112, 1)
    image = square[0].numpy()
    if orientation in TURNS:
        turned = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).transpose(
            TURNS[orientation]
        )
        image = np.asarray(turned).transpose(2, 0, 1)
    return np.ascontiguousarray(image)


def stored_side(file: Readable, side: int = SIDE) -> int | None:
    """The side of `read_image`'s result, by the file's header alone; None where that is damaged."""
    try:
        start = file if isinstance(file, Path) else io.BytesIO(file.read_bytes())
        with Image.open(start, formats=_formats()) as opened:
            width, height = opened.size
            return min(side, int(width), int(height))
    except Exception:  # Pillow's plugins raise nearly everything for a damaged file
        return None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    _register_heif()
    if "AVIF" not in Image.OPEN:
        with contextlib.suppress(Exception):  # not installed, or for another system
            importlib.import_module("pillow_avif")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _pixels(opened: Image.Image, content: bytes, side: int) -> Tensor:
    """uint8 (3, height, width) or, of gray levels, (1, height, width).

    A large JPEG is decoded at a half, a quarter or an eighth of its size.
    """
    if opened.format == "JPEG" and opened.mode in ("RGB", "L") and min(opened.size) < 4 * side:
        # The operator gives the pixels that Pillow gives, without Pillow's copies. Pillow may
        # still read what the operator refuses.
        with contextlib.suppress(RuntimeError):
            return decode_jpeg(content)
    # The scaled size stays above twice the side, so that the reduction stays smooth.
    opened.draft(None, (2 * side, 2 * side))
    return torch.from_numpy(np.array(_rgb(opened))).permute(2, 0, 1)


def to_square(pixels: Tensor, side: int = SIDE, warp: bool = False) -> Tensor:
    """uint8 (1, 3, s, s) of uint8 (3 or 1, height, width): the center, or with `warp` the whole.

    s is min(side, the shorter side), or with `warp` side.
    """
    if warp:
        return _warped(pixels, side)
    square = _center_square(pixels)
    return resize(square, min(side, square.shape[-1]))


def _center_square(pixels: Tensor) -> Tensor:
    """uint8 (1, 3, shorter, shorter), channels last in memory."""
    height, width = pixels.shape[1:]
    shorter = min(width, height)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = pixels[None, :, top : top + shorter, left : left + shorter].expand(-1, 3, -1, -1)
    # Channels last is resized fastest, and to the same bits.
    return square.contiguous(memory_format=torch.channels_last)


def _warped(pixels: Tensor, side: int) -> Tensor:
    """uint8 (1, 3, side, side): both axes resized, each by its own factor."""
    whole = pixels[None].expand(-1, 3, -1, -1).contiguous()
    return F.interpolate(whole, (side, side), mode="bilinear", antialias=True)


def _rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB. ValueError for gray levels in floating point."""
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


def decode_jpeg(content: bytes | np.ndarray) -> Tensor:
    """uint8 (C, height, width), channels last in memory, C the channels in the file.

    RuntimeError where it is damaged. torchvision's operator and Pillow hold the same decoder and
    give the same pixels; the operator leaves out two copies. It is deprecated, so nothing but
    speed may depend on it.
    """
    if has_jpeg_operator():
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        decoded: Tensor = torch.ops.image.decode_jpeg(buffer, 0, False)
        return decoded
    data = content.tobytes() if isinstance(content, np.ndarray) else content
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as opened:
            pixels = torch.from_numpy(np.array(opened))
            return pixels.reshape(opened.height, opened.width, -1).permute(2, 0, 1)
    except OSError as error:
        raise RuntimeError(str(error)) from None


@cache
def has_jpeg_operator() -> bool:
    """Whether torchvision is installed, fits this torch, and still has the operator."""
    with contextlib.suppress(Exception):  # a build for another torch fails in several ways
        importlib.import_module("torchvision")
        return hasattr(torch.ops.image, "decode_jpeg")
    return False


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8 (3, side, side) as a JPEG of quality 95."""
    content = io.BytesIO()
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
