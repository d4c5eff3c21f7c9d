"""CIFAR-10 and Fashion-MNIST: found on this machine, or downloaded once by one rank of a host."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from alexnet_mp.config.errors import first_line
from alexnet_mp.data.folder_layout import Split
from alexnet_mp.data.source import Request
from alexnet_mp.data.store import Store

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_PARTS: dict[Split, str] = {"train": "train", "test": "t10k"}


class Cifar10:
    """CIFAR-10 in torchvision's files: 50,000 training and 10,000 test images."""

    splits: Sequence[Split] = ("train", "test")

    def __init__(self, request: Request) -> None:
        self.request = request

    def describe(self, split: Split) -> str:
        return f"CIFAR-10's {split} images"

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        root = str(self.request.directory)
        kind = _torchvision_datasets("cifar10").CIFAR10

        def read(split: Split) -> Any:
            with warnings.catch_warnings():  # NumPy warns of the pickles' age
                warnings.simplefilter("ignore")
                return kind(root, split == "train")

        def work() -> None:
            with contextlib.suppress(RuntimeError):
                read("test")
                return
            self.request.print_rank0(f"downloading CIFAR-10 into {root}")
            remedy = f"put {kind.filename} there yourself"
            _download(lambda: kind(root, True, download=True), kind.url, root, remedy)

        self.request.run_once_per_host(work)
        found = {split: read(split) for split in splits}
        return {
            split: Store(
                [np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))],  # N, 3, 32, 32
                np.array(part.targets),
                part.classes,
            )
            for split, part in found.items()
        }


class FashionMnist:
    """Fashion-MNIST in its idx files: 60,000 training and 10,000 test images, gray."""

    splits: Sequence[Split] = ("train", "test")

    def __init__(self, request: Request) -> None:
        self.request = request

    def describe(self, split: Split) -> str:
        return f"Fashion-MNIST's {split} images"

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        directory = self.request.directory

        def work() -> None:
            if any(self._files(split) is None for split in splits):
                self.request.print_rank0(f"downloading Fashion-MNIST into {directory}")
                kind = _torchvision_datasets("fashion-mnist").FashionMNIST
                names = " ".join(
                    f"{name}.gz" for part in FASHION_PARTS.values() for name in _idx_names(part)
                )
                remedy = f"put {names} there, or apt-get install dataset-fashion-mnist"
                fetch = lambda: kind(str(directory), download=True)  # noqa: E731
                _download(fetch, kind.mirrors[0], str(directory), remedy)

        self.request.run_once_per_host(work)
        return {split: self._read(split) for split in splits}

    def _files(self, split: Split) -> list[Path] | None:
        """The file of images and the one of labels, packed by gzip or not; None if not there."""
        directory = self.request.directory
        for place in (directory, directory / "FashionMNIST" / "raw", DEBIAN_FASHION):
            found = []
            for name in _idx_names(FASHION_PARTS[split]):
                found += [p for p in (place / f"{name}.gz", place / name) if p.is_file()][:1]
            if len(found) == 2:
                return found
        return None

    def _read(self, split: Split) -> Store:
        files = self._files(split)
        if files is None:
            raise FileNotFoundError(
                f"--data-dir {self.request.directory}: no Fashion-MNIST here, though another rank "
                "of this host has it"
            )
        gray, labels = (_read_idx(file) for file in files)
        return Store([np.repeat(gray[:, None], 3, axis=1)], labels, FASHION_CLASSES)


def _idx_names(part: str) -> tuple[str, str]:
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _torchvision_datasets(data: str) -> ModuleType:
    """torchvision's data sets. ValueError where it is missing or does not fit this torch."""
    try:
        return importlib.import_module("torchvision.datasets")
    except Exception as error:  # a build for another torch fails in several ways
        raise ValueError(
            f"--data {data}: torchvision cannot be imported ({first_line(error)}); "
            f"install the one that fits torch {torch.__version__}, or use --data shapes"
        ) from None


def _download(fetch: Callable[[], object], url: str, root: str, remedy: str) -> None:
    """Runs torchvision's download without its output.

    torchvision compares MD5 sums at every start, so half of a file is fetched again.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fetch()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--data-dir {root}: not there, and {url} cannot be downloaded ({first_line(error)}); "
            f"{remedy}, or use --data shapes"
        ) from None


def _read_idx(file: Path) -> np.ndarray:
    """The uint8 array of an idx file: two zeros, type 8, number of axes, sizes, values."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        axes = content[3]
        shape = np.frombuffer(content, ">u4", axes, 4).astype(int)
        if content[:3] != b"\0\0\x08":
            raise ValueError
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise ValueError(
            f"{file}: damaged, or not one of Fashion-MNIST's files; delete it and get it again"
        ) from None
