#!/usr/bin/env python
"""Gives mutated files to the readers, which may raise only the errors that they document.

    python tests/faults/fuzz.py --files 10000 [--seed N] [--reader checkpoint JPEG]

`--files` counts the files of each kind. A reader is an entry of READERS: a function that makes a
good file, one that reads it, and the errors that it documents, each of one line. There are three
kinds of damage: bytes changed at random; bytes changed inside a zip file whose checksums are then
corrected; values changed inside the content. Time and memory are bounded. Exit code 1 if a reader
did anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch import nn

from alexnet_mp import AlexNet, Trainer, preset
from alexnet_mp.cli.parser import stored_config
from alexnet_mp.data import Store, try_read
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_folder import list_split
from alexnet_mp.data.split_packer import pack_split
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training import checkpoint
from alexnet_mp.training.checkpoint import restore
from alexnet_mp.training.sgd2012 import build_optimizer

SECONDS = 10  # a file that takes longer counts as a hang
MEGABYTES = 200  # by which the process may grow over all files


@dataclass(frozen=True)
class Reader:
    """A kind of file."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    alter: Callable[[Path, random.Random], None] | None = None  # changes values inside the content


CONFIG = preset("demo").with_fields(kernels=(4, 4, 4, 4, 4), hidden=(6, 5), classes=3)


def trainer() -> Trainer:
    model = AlexNet(CONFIG.model, seed=0)
    return Trainer(
        model, nn.CrossEntropyLoss(), build_optimizer(model, CONFIG.recipe), "cpu", verbose=False
    )


def make_checkpoint(path: Path) -> None:
    one = trainer()
    one.train(
        [(torch.randn(2, 3, 67, 67), torch.tensor([0, 2]))],
        [(torch.randn(2, 3, 67, 67), torch.tensor([0, 2]))],
        2,
    )
    data = {"classes": ["a", "b", "c"], "images": [2, 2, 2], "statistics": None}
    checkpoint.save(
        path,
        ParallelContext(Environment(), torch.device("cpu"), (0, 1)),
        one.model,
        one.optimizer,
        CONFIG,
        one.state_dict(),
        data,
    )


TRAINER: list[Trainer] = []


def read_checkpoint(path: Path) -> None:
    """Reads everything that `--resume` reads before the first step."""
    stored_config(path)
    content = checkpoint.read(path)
    if not TRAINER:
        TRAINER.append(trainer())
    restore(content, TRAINER[0].model, TRAINER[0], path)


RUBBISH = (
    None,
    -1,
    2**70,
    float("nan"),
    "",
    "x" * 1000,
    [],
    {},
    [[]],
    True,
    b"\xff",
    (1, 2),
    torch.zeros(0),
    torch.zeros(3, 3, dtype=torch.int8),
)


def alter_checkpoint(path: Path, draw: random.Random) -> None:
    """Another value, or none, or one too many, somewhere in the content."""
    content = torch.load(path, weights_only=True)
    where = content
    while True:
        key = draw.choice(list(where)) if isinstance(where, dict) else draw.randrange(len(where))
        if isinstance(where[key], dict | list) and where[key] and draw.random() < 0.8:
            where = where[key]
            continue
        change = draw.randrange(3)
        if change == 0 or isinstance(where, list):
            where[key] = draw.choice(RUBBISH)
        elif change == 1:
            del where[key]
        else:
            where[draw.choice(("x", 3, None, "model"))] = draw.choice(RUBBISH)
        break
    torch.save(content, path)


def store_reader(name: str, encode: str) -> Reader:
    """Reads one file of a store, and everything that training reads of a store with that file."""

    def folder(path: Path) -> Path:
        return path.with_name(f"store-{encode}")

    def make(path: Path) -> None:
        images = path.with_name("images")
        noise = np.random.default_rng(0)
        if not folder(path).exists():
            for label, count in (("a", 3), ("b", 2)):
                (images / "train" / label).mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    Image.fromarray(noise.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(
                        images / "train" / label / f"{i}.png"
                    )
            pack_split(
                list_split(images / "train"),
                folder(path),
                Packing(encode, workers=1),
                with_sums=True,
            )
        shutil.copyfile(folder(path) / name, path)

    def read(path: Path) -> None:
        good = (folder(path) / name).read_bytes()
        try:
            (folder(path) / name).write_bytes(path.read_bytes())
            store = Store.open(folder(path), verify=True)
            store.gather(range(len(store)), 20)
            store.statistics(24)
        except ValueError as error:
            raise ValueError(
                str(error).replace(str(folder(path)), str(path))
            ) from None  # the store's files are path's
        finally:
            (folder(path) / name).write_bytes(good)
            for kept in folder(path).glob("statistics-*"):
                kept.unlink()

    return Reader(f"{encode} store's {name}", make, read, (ValueError,))


def image_reader(kind: str, **options: Any) -> Reader:
    """Reads an image file as packing and prediction do: an array, or a text with the reason."""

    def make(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((320, 280)).save(path, kind, **options)

    def read(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata
            image = try_read(path)
        if isinstance(image, str):
            raise ValueError(f"{path}: {image}")
        if (
            image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[0] != 3
            or image.shape[1] != image.shape[2]
            or image.shape[1] > 256
        ):
            raise AssertionError(f"an image of {image.dtype} {image.shape}")

    return Reader(kind, make, read, (ValueError,))


READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "checkpoint",
            make_checkpoint,
            read_checkpoint,
            (ValueError, FileNotFoundError),
            alter_checkpoint,
        ),
        *(
            store_reader(name, "raw")
            for name in ("header.json", "labels.npy", "places.npy", "images-00000.npy", "sums.npz")
        ),
        *(store_reader(name, "jpeg") for name in ("ends.npy", "images-00000.npy")),
        image_reader("JPEG"),
        image_reader("PNG"),
        image_reader("GIF"),
        image_reader("TIFF", compression="tiff_lzw"),
        image_reader("WEBP"),
        image_reader("BMP"),
        image_reader("PPM"),
    )
}


def mutate(content: bytes, draw: random.Random) -> bytes:
    """`content` with one to eight changes: bytes flipped, changed, removed, repeated, cut off."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        at = draw.choice(
            (
                draw.randrange(len(data)),
                draw.randrange(min(len(data), 600)),
                len(data) - 1 - draw.randrange(min(len(data), 600)),
            )
        )
        size, change = draw.choice((1, 1, 2, 4, 16, 300)), draw.randrange(6)
        if change == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[at : at + size] = draw.randbytes(size)
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = data[at : at + size]
        elif change == 4:
            data[at : at + size] = draw.choice((b"\x00", b"\xff")) * size
        else:
            del data[at:]
    return bytes(data)


def reseal(content: bytes, draw: random.Random) -> bytes:
    """A zip file with one member mutated and its checksum corrected, which no checksum can find."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target,
    ):
        members = source.namelist()
        chosen = draw.choice(
            members
            if draw.random() < 0.3
            else [name for name in members if name.endswith("data.pkl")] or members
        )
        for name in members:
            data = source.read(name)
            target.writestr(name, mutate(data, draw) if name == chosen else data)
    return out.getvalue()


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    def hang(number: int, frame: Any) -> None:
        raise TimeoutError(f"still reading after {seconds} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fuzz(
    reader: Reader, files: int, seed: int, folder: Path
) -> tuple[Counter[str], list[str], float]:
    """(number of files by outcome, outcomes that are wrong, megabytes by which memory grew)."""
    name = reader.name.replace(" ", "-")
    draw, good, path = random.Random(seed), folder / f"good-{name}", folder / f"mutated-{name}"
    reader.make(good)
    reader.read(good)
    content, outcomes, wrong = good.read_bytes(), Counter(), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(files):
        kind = draw.choice(("bytes", "bytes", "resealed", "altered"))
        if kind == "altered" and reader.alter:
            path.write_bytes(content)
            reader.alter(path, draw)
        else:
            path.write_bytes(
                reseal(content, draw)
                if kind == "resealed" and zipfile.is_zipfile(good)
                else mutate(content, draw)
            )
        try:
            with limit(SECONDS):
                reader.read(path)
            outcomes[f"{kind}: read"] += 1
        except reader.errors as error:
            outcomes[f"{kind}: refused"] += 1
            if "\n" in str(error) or str(path) not in str(error):
                wrong.append(f"file {number} ({kind}): not one line that names the file: {error!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"file {number} ({kind}): {type(error).__name__}: {str(error)[:300]}")
    return outcomes, wrong, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated files for the readers.")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=list(READERS), nargs="*", default=list(READERS))
    asked = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.reader:
            started = time.monotonic()
            outcomes, wrong, megabytes = fuzz(READERS[name], asked.files, asked.seed, Path(folder))
            print(
                f"{name}: {asked.files} files in {time.monotonic() - started:.0f} s; "
                + ", ".join(f"{k} {v}" for k, v in sorted(outcomes.items()))
                + f"; grew by {megabytes:.0f} MB"
            )
            print("\n".join(wrong[:20]))
            failures += len(wrong) + (megabytes > MEGABYTES)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
