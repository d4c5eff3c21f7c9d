#!/usr/bin/env python
"""Times packing against Pillow in a loop, and loading against torchvision's ImageFolder.

    python benchmarks/loader.py     500 drawn photographs of 500x375
    python benchmarks/loader.py --data-dir ../shared/data/imagenet-samples.tar --repeat 44
    python benchmarks/loader.py --quick --json result.json

Loading: batches of 128 crops of 227, mirrored, float32, mean image subtracted, with the same number
of workers (their processes, our threads) on both sides. Packing: one thread on both sides, by
processor time. Passes take turns (A B C A B C ...); medians with the smallest and the largest. The
last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm.auto import tqdm
from tyro.conf import arg

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from alexnet_mp.cli.flags import parse_request  # noqa: E402
from alexnet_mp.cli.process import printing_json, run_main  # noqa: E402
from alexnet_mp.config import DataConfig  # noqa: E402
from alexnet_mp.data import Augment, Loader, Store, dataset_packer  # noqa: E402
from alexnet_mp.data.decode_pool import Packing  # noqa: E402
from alexnet_mp.data.directory import EXTENSIONS  # noqa: E402
from alexnet_mp.data.image_folder import list_split  # noqa: E402
from alexnet_mp.data.split_packer import pack_split  # noqa: E402
from alexnet_mp.data.transforms import color_axes  # noqa: E402
from alexnet_mp.ops.cpu_cores import available_cores  # noqa: E402

BATCH, CROP, SIDE = 128, 227, 256
DRAWN, QUICK = 500, 256
THEIRS = 1024
"""Images of a pass of the slower side: seconds of work. Our side takes all images in a pass."""


@dataclass(frozen=True)
class Request:
    """What is measured?"""

    data_dir: Annotated[str, arg(metavar="DIR")] = ""
    """Photographs: a folder, with or without folders in it, or a .tar; default: drawn ones."""
    repeat: int = 1
    """Use each photograph so many times: 44 makes 5,060 of 115."""
    passes: int = 5
    """Timed passes of each; the figures are their medians."""
    workers: int = 0
    """Processes of the DataLoader, threads of ours; 0: one for each core."""
    cold: bool = False
    """Drop the files from the page cache before every pass; otherwise they are cached."""
    quick: bool = False
    """Fewer images and passes."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the result into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        for name, least in (("repeat", 1), ("passes", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")


# ---- the images ----


def draw(count: int, folder: Path) -> list[Path]:
    """Draws JPEGs that resemble photographs: noise that is smooth at every scale, stronger where
    coarser; at 500x375 a file has about 110 kB, like ImageNet's."""
    rng, files = np.random.default_rng(0), []
    for number in tqdm(
        range(count), "drawing photographs", unit=" images", leave=False, disable=None
    ):
        picture = np.zeros((375, 500, 3), np.float32)
        for level in range(9):
            coarse = rng.standard_normal(
                (2 + 375 * 2**level // 256, 2 + 500 * 2**level // 256, 3), np.float32
            )
            bands = [
                Image.fromarray(coarse[..., band]).resize((500, 375), Image.Resampling.BICUBIC)
                for band in range(3)
            ]
            picture += np.stack([np.asarray(band) for band in bands], 2) * 48 / 1.45**level
        files.append(folder / f"{number:04d}.jpg")
        Image.fromarray((picture + 118).clip(0, 255).astype(np.uint8)).save(files[-1], quality=92)
    return files


def photographs(request: Request, folder: Path) -> list[Path]:
    """The files that are measured on. ValueError where there are none."""
    if not request.data_dir:
        return draw(QUICK if request.quick else DRAWN, folder)
    given = Path(request.data_dir).expanduser()
    if given.is_file():
        with tarfile.open(given) as archive:
            archive.extractall(folder, filter="data")
        given = folder
    files = sorted(
        path
        for path in given.resolve().rglob("*")
        if path.suffix.lower() in EXTENSIONS and path.is_file()
    )
    if not files:
        raise ValueError(f"--data-dir {request.data_dir}: no images in it")
    return files[:QUICK] if request.quick else files


def arrange(files: list[Path], repeat: int, folder: Path) -> list[Path]:
    """FOLDER/CLASS/FILE as links, in ten classes."""
    links = []
    for copy in range(repeat):
        for number, file in enumerate(files):
            link = folder / f"class{number % 10}" / f"{copy:03d}-{number:05d}{file.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
            links.append(link)
    return sorted(links)


# ---- the contestants ----


class PaperTransform:
    """The paper's data recipe in torchvision's words, for one image."""

    def __init__(self, mean: torch.Tensor, axes: torch.Tensor | None) -> None:
        self.geometry = transforms.Compose(
            [
                transforms.Resize(SIDE),
                transforms.CenterCrop(SIDE),
                transforms.RandomCrop(CROP),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )
        self.mean, self.axes = mean, axes

    def __call__(self, image: Image.Image) -> torch.Tensor:
        values = self.geometry(image).float() - self.mean
        return (
            values
            if self.axes is None
            else values + (self.axes @ (torch.randn(3) * 0.1))[:, None, None]
        )


def image_folder(
    folder: Path, workers: int, mean: torch.Tensor, axes: torch.Tensor | None
) -> Callable[[], int]:
    data = torch.utils.data.Subset(
        dataset := ImageFolder(str(folder), PaperTransform(mean, axes)),
        np.random.default_rng(0).permutation(len(dataset))[:THEIRS].tolist(),
    )
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: sum(len(labels) for _, labels in loader)


def stored(path: Path, workers: int, color_noise: float) -> Callable[[], int]:
    epoch = iter(range(10**6))

    def run() -> int:
        store = Store.open(path)
        config = DataConfig(color_noise=color_noise)
        loader = Loader(
            store, Augment(config, CROP, store.statistics(SIDE)), BATCH, 0, True, workers=workers
        )
        loader.buffers = buffers  # as from the second epoch of a run on
        loader.set_epoch(next(epoch))
        return sum(len(labels) for _, labels, *_ in loader)

    store = Store.open(path)
    buffers = Loader(store, Augment(DataConfig(mean="none"), CROP), BATCH).buffers
    return run


def pillow_loop(files: list[Path], target: Path) -> Callable[[], int]:
    """What a packing script is at its plainest."""

    def run() -> int:
        array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(files), 3, SIDE, SIDE))
        for number, file in enumerate(files):
            image = Image.open(file).convert("RGB")
            scale = SIDE / min(image.size)
            image = image.resize(
                [max(SIDE, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR
            )
            left, top = ((side - SIDE) // 2 for side in image.size)
            array[number] = np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).transpose(
                2, 0, 1
            )
        array.flush()
        return len(files)

    return run


def our_packing(folder: Path, target: Path) -> Callable[[], int]:
    def run() -> int:
        shutil.rmtree(target, ignore_errors=True)
        listing = list_split(folder)
        pack_split(listing, target, Packing(workers=1), with_sums=True)
        return len(listing)

    return run


# ---- the measurement ----


def take_turns(
    kinds: dict[str, Callable[[], int]],
    passes: int,
    clock: Callable[[], float],
    before: Callable[[], None],
) -> dict[str, list[float]]:
    """Images a second of every pass, after one that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    bar = tqdm(
        total=(passes + 1) * len(kinds), desc="measuring", unit="pass", leave=False, disable=None
    )
    with bar:
        for number in range(passes + 1):
            for name, run in kinds.items():
                before()
                started = clock()
                images = run()
                if number:
                    rates[name].append(images / (clock() - started))
                bar.update()
    return rates


def drop_from_cache(folder: Path) -> None:
    """Asks the system to forget the files' pages, which it does where nobody has them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(name: str, rates: list[float], workers: int) -> dict[str, Any]:
    """A line of the table; every number an image rate."""
    per_core = [rate / workers for rate in rates]
    return {
        "name": name,
        "images_per_second": statistics.median(rates),
        "images_per_second_per_core": statistics.median(per_core),
        "least": min(per_core),
        "most": max(per_core),
        "passes": len(rates),
    }


def measure(request: Request, folder: Path) -> dict[str, Any]:
    workers, passes = (
        request.workers or available_cores(),
        min(request.passes, 2) if request.quick else request.passes,
    )
    (folder / "given").mkdir()
    files = photographs(request, folder / "given")
    images = arrange(files, request.repeat, folder / "set" / "train")
    listings = {"train": list_split(folder / "set" / "train")}
    for encode in ("raw", "jpeg"):
        dataset_packer.pack(
            listings, folder / encode, Packing(encode, progress=True), say=lambda text: None
        )
    store = Store.open(folder / "raw" / "train")
    found = store.statistics(SIDE)
    mean, axes = (
        found.mean_image[:, 14 : 14 + CROP, 14 : 14 + CROP],
        color_axes(DataConfig(), found),
    )
    kinds = {}
    for noise, words in ((0.0, ""), (0.1, ", color noise")):
        kinds |= {
            f"ImageFolder and DataLoader{words}": image_folder(
                folder / "set" / "train", workers, mean, axes if noise else None
            ),
            f"store, raw{words}": stored(folder / "raw" / "train", workers, noise),
            f"store, JPEG{words}": stored(folder / "jpeg" / "train", workers, noise),
        }
    before = (lambda: drop_from_cache(folder)) if request.cold else (lambda: None)
    loading = take_turns(kinds, passes, time.perf_counter, before)
    few = images[:THEIRS]
    arrange([path.resolve() for path in few], 1, folder / "few")
    packers = {
        "Pillow in a loop": pillow_loop(few, folder / "loop.npy"),
        "launch/pack.py": our_packing(folder / "few", folder / "packed"),
    }
    packing = take_turns(packers, passes, time.process_time, before)
    rows = [row(f"load: {name}", rates, workers) for name, rates in loading.items()]
    rows += [row(f"pack: {name}", rates, 1) for name, rates in packing.items()]
    theirs, raw, jpeg, *_ = (line["images_per_second"] for line in rows)
    return {
        "ratio_store_to_imagefolder": raw / theirs,
        "ratio_jpeg_store_to_imagefolder": jpeg / theirs,
        "pack_ratio_to_pillow": rows[-1]["images_per_second"] / rows[-2]["images_per_second"],
        "rows": rows,
        "images": len(images),
        "photographs": request.data_dir or "drawn",
        "cache": "cold" if request.cold else "warm",
        "workers": workers,
        "bytes_per_image": {
            encode: sum(
                path.stat().st_size for path in (folder / encode / "train").glob("images-*")
            )
            / len(images)
            for encode in ("raw", "jpeg")
        },
        "cores": available_cores(),
        "load_before": os.getloadavg()[0],
        "machine": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{result['images']:,} images ({result['photographs']}), {result['workers']} workers on "
        f"{result['cores']} cores, {result['cache']} page "
        f"cache; torch {result['versions']['torch']}, Pillow {result['versions']['pillow']}; "
        "images a second and core, median (least to most)"
    )
    for line in result["rows"]:
        yield (
            f"  {line['name']:<48}{line['images_per_second_per_core']:>8,.0f}   "
            f"({line['least']:,.0f} to {line['most']:,.0f})"
        )
    yield f"raw store to ImageFolder   {result['ratio_store_to_imagefolder']:.1f}"
    yield f"JPEG store to ImageFolder  {result['ratio_jpeg_store_to_imagefolder']:.1f}"
    yield f"packing to Pillow          {result['pack_ratio_to_pillow']:.2f}"


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__)
    torch.set_num_threads(1)  # of the consumer; what loads has the workers
    with printing_json(request.json) as write, contextlib.ExitStack() as stack:
        result = measure(
            request, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-")))
        )
        write(result)
        print("\n".join(table(result)))
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
