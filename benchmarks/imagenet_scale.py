#!/usr/bin/env python
"""Rehearses ImageNet's size: lists, packs, opens and starts to train on 1.3 million small images.

    python benchmarks/imagenet_scale.py --folder /tmp/scale
    python benchmarks/imagenet_scale.py --folder /tmp/small --images 2000 --val-images 2000

Makes 1,281,167 training and 50,000 validation JPEGs of 32 pixels in 1,000 classes, as hard links
to a few hundred files. Everything then runs with a soft limit of 256 open files, each part in a
process of its own. FOLDER keeps images and pack for another run; delete it afterwards. The last
line is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import common
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from tyro.conf import arg

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import DataConfig, check
from alexnet_mp.data import Store, folder_layout, load

SIDE = 32
ORIGINALS = 256
"""Different images, where the file system allows each enough names."""
FREE_LINKS = 0.5
"""Share of the links that a file may have which are used."""
ONE_STEP = "--max-steps 1 --limit-val 2 --limit-test 2".split()
"""Flags of train: one step, and hardly a test after it."""
SplitName = Literal["train", "val"]


@dataclass(frozen=True)
class Request:
    """How long does it take to begin on ImageNet?"""

    folder: str
    """Where the images, their pack and the runs go; another run finds them there."""
    images: int = 1_281_167
    """Training images; ImageNet's number by default."""
    val_images: int = 50_000
    """Validation images."""
    classes: int = 1000
    """Class folders of each split."""
    open_files: int = 256
    """Soft limit of open files, of every process; 256 is macOS's."""
    rounds: int = 3
    """Starts of each kind; figures are medians."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        check(self.classes >= 2, f"--classes {self.classes}: two or more")
        for name in ("images", "val_images"):
            count = getattr(self, name)
            check(
                count >= 2 * self.classes,
                f"--{name.replace('_', '-')} {count}: two or more for each of {self.classes} "
                "classes",
            )
        check(self.rounds >= 1, f"--rounds {self.rounds}: one or more")
        check(self.open_files >= 64, f"--open-files {self.open_files}: 64 or more")


# ---- the images ----


def make_images(folder: Path, counts: dict[SplitName, int], classes: int) -> int:
    """Makes FOLDER/images/SPLIT/CLASS/* as hard links, and returns the number of original files.

    ValueError where the file system has no room for them, or no hard links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    originals = count_originals(folder, sum(counts.values()))
    free = os.statvfs(folder).f_favail
    need = len(counts) * classes + originals
    if 0 < free < need:  # some file systems have no fixed number, and say 0
        raise ValueError(f"--folder {folder}: {free:,} inodes are free there, and {need:,} needed")
    partial = folder / "images.partial"
    shutil.rmtree(partial, ignore_errors=True)
    sources = write_originals(partial / ".originals", originals)
    total = sum(counts.values())
    with tqdm(total=total, desc="linking", unit=" images", leave=False, disable=None) as bar:
        for split, count in counts.items():
            for label in range(classes):
                place = partial / split / f"n{label:08d}"
                place.mkdir(parents=True)
                numbers = range(count * label // classes, count * (label + 1) // classes)
                for number in numbers:
                    name = f"{place}/n{label:08d}_{number}.JPEG"
                    os.link(sources[number % originals], name)
                bar.update(len(numbers))
    partial.rename(folder / "images")
    return originals


def count_originals(folder: Path, names: int) -> int:
    """How many files are needed for `names` links: ext4 allows 65,000 of each."""
    most = os.pathconf(folder, "PC_LINK_MAX")
    return max(ORIGINALS, -(-names // max(1, int(FREE_LINKS * most))))


def write_originals(folder: Path, count: int) -> list[str]:
    """Writes `count` JPEGs of smooth random colors, and returns their names."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), []
    for number in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        name = f"{folder}/{number:05d}.jpg"
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(name)
        names.append(name)
    return names


# ---- the parts, each in a process of its own ----


def import_only(folder: Path) -> dict[str, Any]:
    """What a process takes that has imported the package."""
    return {}


def list_images(folder: Path) -> dict[str, Any]:
    """Names, sizes and times of all files, and their digest, as at each start."""
    layout = folder_layout.find_layout(folder / "images")
    listings = [layout.list(split) for split in layout.folders]
    return {
        "images": sum(map(len, listings)),
        "digests": [listing.digest(times=False) for listing in listings],
    }


def pack_images(folder: Path) -> dict[str, Any]:
    """The first start: everything is decoded, and packed into the cache."""
    config = DataConfig(
        data="folder", data_dir=str(folder / "images"), cache_dir=str(folder / "cache")
    )
    splits = load(config, seed=0, progress=True)
    return {"images": len(splits.train) + len(splits.val) + len(splits.test)}


def open_store(folder: Path) -> dict[str, Any]:
    """The pack's training images, opened, and the first and the last one read."""
    store = Store.open(folder / "store" / "train")
    store.gather([0, len(store) - 1])
    return {"images": len(store), "shards": len(store.arrays)}


def measured(work: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `work` returns in a new process, with its seconds and the process's largest memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, work, folder))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise ValueError(f"{work.__name__}: the process ended without a result") from None
    finally:
        process.join()
    if isinstance(result, str):
        raise ValueError(f"{work.__name__}: {result}")
    return {"part": work.__name__, **result}


def _measure(pipe: Any, work: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    try:
        result = work(folder)
    except (ValueError, OSError) as error:
        pipe.send(str(error))
        return
    figures = {
        "seconds": round(time.perf_counter() - started, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "memory_bytes": common.peak_memory(torch.device("cpu")),
    }
    pipe.send(result | figures)


# ---- the first step ----


def first_step(folder: Path, data: str) -> dict[str, Any]:
    """Starts two ranks, and returns the seconds from the command to the end of the first step of
    the later rank, and what either took."""
    place = folder / ("images" if data == "folder" else "store")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", str(Path(__file__).with_name("first_step.py"))),
            *(scratch, str(folder / "images"), *ONE_STEP, "--out", f"{scratch}/run"),
            *("--data", data, "--data-dir", str(place), "--cache-dir", str(folder / "cache")),
        ]
        started = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise ValueError(f"train --data {data} failed: {done.stderr.strip()[-500:]}")
        ranks = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(2)]
    return {
        "seconds": round(max(rank["ended_at"] for rank in ranks) - started, 2),
        **{
            name: max(rank[name] for rank in ranks)
            for name in ("cpu_seconds", "peak_memory_bytes", "own_memory_bytes", "open_files")
        },
        "image_files_opened": sum(rank["image_files_opened"] for rank in ranks),
    }


def _environment() -> dict[str, str]:
    ours = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([ours, os.environ.get("PYTHONPATH", "")])}


def link_store(folder: Path) -> None:
    """FOLDER/store: the splits in the cache as a store, without a copy."""
    (folder / "store").mkdir(exist_ok=True)
    for header in (folder / "cache").glob("folder-*/*/header.json"):
        link = folder / "store" / header.parent.name
        link.unlink(missing_ok=True)
        link.symlink_to(header.parent.resolve())


def starts(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Medians of the starts from the folder, which has not changed, and from the store."""
    turns: dict[str, list[dict[str, Any]]] = {"folder": [], "store": []}
    for _ in tqdm(range(rounds), "starts", leave=False, disable=None):
        for data, done in turns.items():
            done.append(first_step(folder, data))
    return [
        {
            "data": data,
            "spread": [min(one["seconds"] for one in done), max(one["seconds"] for one in done)],
            **{name: statistics.median(one[name] for one in done) for name in done[0]},
        }
        for data, done in turns.items()
    ]


# ---- what is printed ----


def show(parts: list[dict[str, Any]], begun: list[dict[str, Any]]) -> str:
    """Both tables: the parts, and the starts."""
    lines = [
        (
            part["part"].replace("_", " "),
            f"{part['seconds']:.1f}",
            f"{part['cpu_seconds']:.1f}",
            f"{part['memory_bytes'] / 1e6:,.0f}",
        )
        for part in parts
    ]
    first = [
        (
            f"train --data {one['data']}",
            f"{one['seconds']:.1f}",
            f"{one['spread'][0]:.1f} to {one['spread'][1]:.1f}",
            f"{one['cpu_seconds']:.1f}",
            f"{one['peak_memory_bytes'] / 1e6:,.0f}",
            f"{one['open_files']:.0f}",
            f"{one['image_files_opened']:.0f}",
        )
        for one in begun
    ]
    head = (
        "two ranks, to the first step's end",
        "seconds",
        "spread",
        "CPU seconds, a rank",
        "peak MB, a rank",
        "open files",
        "image files opened",
    )
    return "\n\n".join(
        [
            common.table(("", "seconds", "CPU seconds", "peak MB"), lines),
            common.table(head, first),
        ]
    )


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    folder = Path(request.folder).expanduser().absolute()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (request.open_files, hard))  # and of its children
    place = common.machine(torch.device("cpu"), common.available_cores())
    print(common.describe(place), flush=True)
    counts: dict[SplitName, int] = {"train": request.images, "val": request.val_images}
    parts = []
    if not (folder / "images").is_dir():
        began, cpu = time.perf_counter(), time.process_time()
        make_images(folder, counts, request.classes)
        parts.append(
            {
                "part": "make_images",
                "seconds": round(time.perf_counter() - began, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
                "memory_bytes": common.peak_memory(torch.device("cpu")),
            }
        )
    parts += [measured(import_only, folder), measured(list_images, folder)]
    if parts[-1]["images"] != sum(counts.values()):
        raise ValueError(
            f"--folder {folder}: holds {parts[-1]['images']:,} images of another run, not "
            f"{sum(counts.values()):,}; delete it, or name another folder"
        )
    if not (folder / "cache").is_dir():
        parts.append(measured(pack_images, folder))
    link_store(folder)
    parts.append(measured(open_store, folder))
    begun = starts(folder, request.rounds)
    print(show(parts, begun))
    common.finish(
        {"parts": parts, "starts": begun, "machine": place, "request": vars(request)}, request.json
    )
    return 0


if __name__ == "__main__":
    run_main(main)
