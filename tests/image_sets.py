"""Sets of images that the tests of the data package make: stores in memory, folders of files."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Splits, Store, dataset_packer, decode_pool, load, store_format
from alexnet_mp.data.image_sets import list_source


def random_store(count: int = 40, side: int = 12, classes: int = 4, seed: int = 0) -> Store:
    rng = np.random.default_rng(seed)
    names = [f"class {k}" for k in range(classes)]
    return Store(
        [rng.integers(0, 256, (count, 3, side, side), np.uint8)], np.arange(count) % classes, names
    )


def mixed_store() -> Store:
    """Ten images on arrays of 12 and 20 pixels, taking turns."""
    rng = np.random.default_rng(1)
    places = np.array([(i % 2, i // 2) for i in range(10)])
    return Store(
        [rng.integers(0, 256, (5, 3, side, side), np.uint8) for side in (12, 20)],
        np.arange(10) % 2,
        ["a", "b"],
        places,
    )


def write_image(
    path: Path,
    size: tuple[int, int] = (20, 20),
    color: object = (200, 30, 60),
    mode: str = "RGB",
    **options: object,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def make_folder(
    root: Path,
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] = ("cat", "dog"),
    count: int = 10,
) -> Path:
    """SPLIT/CLASS/0.png ..., every image of another gray level."""
    level = 0
    for split in splits:
        for name in classes:
            for i in range(count):
                write_image(root / split / name / f"{i}.png", color=(level,) * 3)
                level += 1
    return root


def load_folder(root: Path, **fields: object) -> Splits:
    return load(DataConfig(data="folder", data_dir=str(root), **fields), seed=0, progress=True)


def levels(store: Store) -> list[int]:
    """The gray levels of a store of `make_folder`: which of its images they are."""
    return [int(store.gather([i])[0, 0, 0, 0]) for i in range(len(store))]


def pack_slowly(source: str, store: str, ready: object) -> None:
    """Packs in small shards, slowly enough to be killed at any point. `ready` is a pipe's end."""
    read = decode_pool.try_read
    store_format.SHARD, decode_pool.CHUNK, decode_pool.try_read = (
        8,
        2,
        lambda file: (time.sleep(0.002), read(file))[1],
    )
    listings = list_source(Path(source))
    ready.send(True)
    dataset_packer.pack(
        listings, Path(store), decode_pool.Packing(workers=2), say=lambda text: None
    )
