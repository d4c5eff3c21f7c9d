"""Draws color images of twelve shapes, 256 pixels a side: no download, and color does not help.

Shape, place, size, rotation, colors, background and clutter of image `index` of a split are
functions of (seed, split, index). VERSION, which is in the name of the cache, has to change
whenever an image changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from alexnet_mp.config.progress import Progress, progress
from alexnet_mp.config.seeds import combine
from alexnet_mp.data.decode import resize
from alexnet_mp.data.folder_layout import SPLITS, Split
from alexnet_mp.data.source import Request
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import VERSION as STORE_VERSION
from alexnet_mp.data.store_writer import StoreWriter

VERSION = 2
SIDE = 256
COUNTS: dict[Split, int] = {"train": 4000, "val": 400, "test": 1000}
SUPERSAMPLING = 2
TILT = 0.35
"""Radians by which a shape is turned at most, either way."""
CHUNK = 50
"""Images that a thread makes in one go."""
FEW = 0.25
"""Share of a split up to which its images are drawn in memory, not kept on disk."""

Outlines = list[tuple[np.ndarray, bool]]
"""Polygons (points, 2) in the circle of radius 1 around 0, one over the other.

True paints, False cuts a hole.
"""


class Shapes:
    """--data shapes: 4,000, 400 and 1,000 images, drawn at the first start and kept in the cache.

    Where a limit asks for few of them, only those are drawn, in memory, at every start.
    """

    splits: Sequence[Split] = SPLITS

    def __init__(self, request: Request) -> None:
        self.request = request
        self.side = min(SIDE, request.side or SIDE)

    def describe(self, split: Split) -> str:
        return ""

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        return {split: self._open(split) for split in splits}

    def _open(self, split: Split) -> Store:
        request, side, count = self.request, self.side, COUNTS[split]
        rows = request.chosen(split, count)
        if len(rows) <= count * FEW:
            images = list(_drawn(request.seed, split, side, rows.tolist()))
            return Store([np.stack(images)], rows % len(CLASSES), CLASSES)

        def build(path: Path) -> None:
            bar: Progress[None] = progress(
                total=count, description="shapes", unit="images", enabled=request.progress
            )
            with bar, StoreWriter(path, CLASSES) as writer:
                for index, image in enumerate(_drawn(request.seed, split, side, range(count))):
                    writer.add(image, index % len(CLASSES))
                    bar.update()

        return Store.open(
            request.cache(request.directory).get(
                f"shapes-{request.seed}-{VERSION}-{side}px-store{STORE_VERSION}-{split}",
                build,
                f"drawing {count:,} images of {len(CLASSES)} shapes",
                count,
            )
        )


def _drawn(seed: int, split: Split, side: int, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The images `numbers` of `split`, uint8 (3, side, side), reduced from 256 as a store would."""

    def chunk(start: int) -> np.ndarray:
        images = [draw(seed, split, number) for number in numbers[start : start + CHUNK]]
        return resize(torch.from_numpy(np.stack(images)), side).numpy()

    # Pillow and NumPy leave Python's lock now and then; more than two threads gain nothing.
    with ThreadPoolExecutor(2) as pool:
        for images in pool.map(chunk, range(0, len(numbers), CHUNK)):
            yield from images


def draw(seed: int, split: Split, index: int) -> np.ndarray:
    """Image `index` of `split`, uint8 (3, 256, 256); its class is `index` modulo 12."""
    rng = np.random.default_rng(combine(seed, "shapes", split, index))
    ground, color = _contrasting(rng)
    canvas = _mottled(rng, ground, int(rng.integers(2, 9)), SIDE, 30)
    for _ in range(rng.integers(3, 10)):
        _clutter(rng, canvas, 4, 14)
    radius = rng.uniform(0.28, 0.42) * SIDE
    outlines = SHAPES[CLASSES[index % len(CLASSES)]](rng)
    axis = rng.uniform(0, np.pi)
    matrix = (
        _rotation(rng.uniform(-TILT, TILT))
        @ _rotation(axis)
        @ np.diag([1, rng.uniform(0.8, 1)])
        @ _rotation(-axis)
    )
    center = rng.uniform(radius + 8, SIDE - radius - 8, 2)
    fill = _mottled(rng, color, int(rng.integers(2, 5)), SIDE, 20)
    _stamp(
        canvas, [(points @ matrix.T, painted) for points, painted in outlines], center, radius, fill
    )
    for _ in range(rng.integers(0, 4)):
        _clutter(rng, canvas, 3, 8)
    pixels = np.asarray(canvas, np.int16)
    noise = np.frombuffer(rng.bytes(pixels.size), np.int8).reshape(pixels.shape)
    pixels = pixels + (noise * np.int16(rng.integers(0, 40)) >> 7)
    return np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(2, 0, 1))


def _contrasting(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colors that differ in brightness and in all; neither says anything about the class."""
    while True:
        one, other = rng.uniform(0, 255, (2, 3))
        if abs((one - other) @ (0.3, 0.59, 0.11)) > 50 and np.linalg.norm(one - other) > 110:
            return one, other


def _mottled(
    rng: np.random.Generator, color: np.ndarray, grid: int, side: int, strength: float
) -> Image.Image:
    """`color` with soft patches on a grid: two a side make a gradient."""
    patches = (
        color
        + rng.uniform(-strength, strength, (grid, grid, 1))
        + rng.uniform(-strength, strength, (grid, grid, 3)) / 2
    )
    return Image.fromarray(np.clip(patches, 0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR
    )


def _clutter(
    rng: np.random.Generator, canvas: Image.Image, smallest: float, largest: float
) -> None:
    """A blob or a line, small beside the shape, anywhere."""
    radius = rng.uniform(smallest, largest)
    if rng.random() < 0.5:
        outline = _circle(12) * (1, rng.uniform(0.4, 1))
    else:
        outline, radius = _box(-1, 1, -0.4 / radius, 0.4 / radius), radius * 3
    color = Image.new("RGB", (SIDE, SIDE), tuple(int(c) for c in rng.integers(0, 256, 3)))
    _stamp(
        canvas,
        [(outline @ _rotation(rng.uniform(0, np.pi)), True)],
        rng.uniform(0, SIDE, 2),
        radius,
        color,
    )


def _stamp(
    canvas: Image.Image, outlines: Outlines, center: np.ndarray, radius: float, fill: Image.Image
) -> None:
    """Paints the shape with the part of `fill` under it, edges softened by supersampling."""
    corner = np.floor(center - radius).astype(int) - 1
    side = int(2 * radius) + 4
    mask = Image.new("L", (side * SUPERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    for points, painted in outlines:
        pen.polygon(
            ((points * radius + center - corner) * SUPERSAMPLING).ravel().tolist(),
            fill=255 if painted else 0,
        )
    left, top = corner.tolist()
    canvas.paste(
        fill.crop((left, top, left + side, top + side)), (left, top), mask.reduce(SUPERSAMPLING)
    )


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _circle(points: int = 72) -> np.ndarray:
    return _polar(np.ones(points), np.arange(points) * 2 * np.pi / points)


def _box(left: float, right: float, top: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _disc(rng: np.random.Generator) -> Outlines:
    return [(_circle() * 0.9, True)]


def _ring(rng: np.random.Generator) -> Outlines:
    return [(_circle(), True), (_circle() * rng.uniform(0.5, 0.7), False)]


def _square(rng: np.random.Generator) -> Outlines:
    return [(_box(-0.7, 0.7, -0.7, 0.7), True)]


def _triangle(rng: np.random.Generator) -> Outlines:
    return [(_polar(np.ones(3), np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.2, 0.2, 3)), True)]


def _star(rng: np.random.Generator) -> Outlines:
    return [(_polar(np.tile([1, rng.uniform(0.36, 0.46)], 5), np.arange(10) * np.pi / 5), True)]


def _cross(rng: np.random.Generator) -> Outlines:
    width = rng.uniform(0.2, 0.3)
    return [(_box(-0.95, 0.95, -width, width), True), (_box(-width, width, -0.95, 0.95), True)]


def _crescent(rng: np.random.Generator) -> Outlines:
    return [
        (_circle(), True),
        (_circle() * rng.uniform(0.75, 0.85) + (rng.uniform(0.4, 0.5), 0), False),
    ]


def _bars(rng: np.random.Generator) -> Outlines:
    count = int(rng.integers(3, 5))
    width = 1.5 / (2 * count - 1)
    return [
        (_box(-0.75 + 2 * k * width, -0.75 + (2 * k + 1) * width, -0.7, 0.7), True)
        for k in range(count)
    ]


def _checker(rng: np.random.Generator) -> Outlines:
    count = int(rng.integers(3, 5))
    edges = np.linspace(-0.75, 0.75, count + 1)
    return [
        (_box(edges[i], edges[i + 1], edges[j], edges[j + 1]), True)
        for i, j in product(range(count), repeat=2)
        if (i + j) % 2 == 0
    ]


def _spiral(rng: np.random.Generator) -> Outlines:
    angle = np.linspace(0, 2 * np.pi * rng.uniform(1.9, 2.4), 120)
    middle = 0.1 + 0.78 * angle / angle[-1]
    half = rng.uniform(0.07, 0.1)
    turn = int(rng.choice([-1, 1]))
    edges = np.concatenate([_polar(middle + half, angle), _polar(middle - half, angle)[::-1]])
    return [(edges * (1, turn), True)]


def _arrow(rng: np.random.Generator) -> Outlines:
    width, neck, barb = rng.uniform(0.12, 0.2), rng.uniform(0, 0.25), rng.uniform(0.5, 0.65)
    half = [(1, 0), (neck, barb), (neck, width), (-0.95, width)]
    return [(np.array(half + [(x, -y) for x, y in reversed(half)]), True)]


def _heart(rng: np.random.Generator) -> Outlines:
    t = np.arange(72) * 2 * np.pi / 72
    points = np.stack(
        [
            16 * np.sin(t) ** 3,
            -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t),
        ],
        1,
    )
    return [((points - (0, 2)) / 17, True)]


SHAPES: dict[str, Callable[[np.random.Generator], Outlines]] = {
    "arrow": _arrow,
    "bars": _bars,
    "checker": _checker,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "heart": _heart,
    "ring": _ring,
    "spiral": _spiral,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASSES = tuple(SHAPES)
