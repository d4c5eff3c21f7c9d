"""A folder of image files, SPLIT/CLASS/FILE: what counts as an image, and how one becomes a stored image."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from alexnet_mp.data.store import Writer

SIDE = 256
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
SHOWN = 3
"""Bad files that one message names."""
MOST_BAD = 20
"""Bad files after which packing stops looking for more."""
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
"""What EXIF's orientation asks a reader to do."""


@dataclass(frozen=True)
class Listing:
    """The images of one split, by class and name, before any is opened."""

    folder: Path
    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]
    hidden: int          # files and folders that were ignored, also what archives of a Mac leave behind
    other: int           # files that were ignored because of their extension
    digest: str          # of names, sizes and times of change


def list_split(folder: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """Lists FOLDER/CLASS/*, also within subfolders of a class. Classes are the folders' names, sorted.

    ValueError naming the folder: no class folders, a class without images, or other classes than `classes`.
    """
    entries = _entries(folder)
    names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name)))
    hidden, other = sum(_hidden(entry.name) for entry in entries), 0
    if not names:
        loose = sum(_is_image(entry.name) for entry in entries)
        raise ValueError(f"--data-dir: {folder} has no class folders" + (f", but {loose} images: sort them into {folder}/CLASS/" if loose else
                         f"; expected {folder}/CLASS/ with images in it"))
    if classes is not None and names != classes:
        odd = sorted(set(names) ^ set(classes))[0]
        have, lack = ("is not a class of the training images", "has it") if odd in names else ("is a class of the training images", "lacks it")
        raise ValueError(f"--data-dir: {folder} and its neighbour train must have the same classes: {odd} {have}, {folder} {lack}")
    files: list[Path] = []
    labels: list[int] = []
    digest = hashlib.blake2b(digest_size=8)
    for label, name in enumerate(names):
        before = len(files)
        for entry in _below(folder / name):
            if _hidden(entry.name) or not _is_image(entry.name):
                hidden, other = hidden + _hidden(entry.name), other + (not _hidden(entry.name))
                continue
            status = entry.stat()
            digest.update(repr((name, os.path.relpath(entry.path, folder), status.st_size, status.st_mtime_ns)).encode(errors="surrogateescape"))
            files.append(Path(entry.path))
            labels.append(label)
        if len(files) == before:
            raise ValueError(f"--data-dir: {folder / name} has no images ({' '.join(sorted(EXTENSIONS))}); add some or delete the folder")
    return Listing(folder, names, files, labels, hidden, other, digest.hexdigest())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _hidden(name: str) -> bool:
    """Hidden ones, which include AppleDouble's `._photo.jpg`, and a Mac archive's shadow folder."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The files in `folder` and below, in the order of their names; a hidden folder as one."""
    for entry in _entries(folder):
        if entry.is_dir() and not _hidden(entry.name):
            yield from _below(Path(entry.path))
        else:
            yield entry


def pack(listing: Listing, path: Path, progress: bool) -> None:
    """Writes the images of `listing` as the store `path`. ValueError naming the files that cannot be read."""
    bad: list[str] = []
    files = iter(zip(listing.files, listing.labels, strict=True))
    workers = os.cpu_count() or 1
    bar = tqdm(total=len(listing.files), desc=f"packing {listing.folder.name}", unit=" images", leave=False, disable=None if progress else True)
    with (Writer(path, listing.classes) as writer, ThreadPoolExecutor(workers) as pool, bar, warnings.catch_warnings()):
        warnings.simplefilter("ignore")         # Pillow's, of odd metadata: one a file; what cannot be read raises
        while group := list(islice(files, 64 * workers)):
            for (file, label), image in zip(group, pool.map(try_read, [file for file, _ in group]), strict=True):
                if isinstance(image, str):
                    bad.append(f"{file}: {image}")
                else:
                    writer.add(image, label)
            bar.update(len(group))
            if len(bad) >= MOST_BAD:
                break
        if bad:
            more = f" (and {len(bad) - SHOWN} more{' so far' if len(bad) >= MOST_BAD else ''})" if len(bad) > SHOWN else ""
            raise ValueError(f"cannot read {'; '.join(bad[:SHOWN])}{more}; replace or delete what is damaged")


def try_read(file: Path) -> np.ndarray | str:
    """`read_image`, or in a few words why that cannot be."""
    try:
        return read_image(file)
    except Exception as error:       # Pillow's plugins raise nearly everything for a damaged file
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        text = "not an image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else words
        return "an empty file" if isinstance(error, OSError) and _is_empty(file) else text.replace("\n", " ")


def _is_empty(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return file.stat().st_size == 0
    return False


def read_image(file: str | Path, side: int = SIDE) -> np.ndarray:
    """The image in `file` as it is stored: uint8 RGB (3, s, s), the centre square at s = min(side, its shorter side).

    Told by content, not by name. Turned upright as EXIF says; the first frame of an animation; transparency on white;
    16 bits become 8. Raises OSError and others of Pillow's for what is no image.
    """
    with Image.open(file) as opened:
        # A large JPEG is decoded at a half, quarter or eighth, but never below twice the side, so that the reduction stays smooth.
        opened.draft(None, (2 * side, 2 * side))
        orientation = 1
        with contextlib.suppress(Exception):     # damaged metadata does not spoil the pixels
            orientation = opened.getexif().get(0x0112, 1)
        image = _rgb(opened)
    width, height = image.size
    shorter = min(width, height)
    kept = min(side, shorter)
    left, top = (width - shorter) // 2, (height - shorter) // 2
    square = (left, top, left + shorter, top + shorter)
    image = image.crop(square) if kept == shorter else image.resize((kept, kept), Image.Resampling.BILINEAR, box=square)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):        # 16-bit grey: Pillow's own conversion would clip it to white
        grey = np.clip(np.asarray(image, np.int64), 0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("grey levels in floating point, whose scale is not known")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
