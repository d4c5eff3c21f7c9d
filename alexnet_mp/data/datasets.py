"""Where images come from: every source ends as three stores.

What has to be downloaded, generated or packed is made once, by one rank of a host, in a cache on disk that every rank then opens.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision import datasets
from tqdm.auto import tqdm

from alexnet_mp.config import DataConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.data import dataset_packer, image_folder, synthetic
from alexnet_mp.data.cache import RunOncePerHost, cache_folder, cached
from alexnet_mp.data.shard_writer import Packing
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import VERSION, Writer, read_header
from alexnet_mp.data.transforms import needs_statistics

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
FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images, none in common."""

    train: Store
    val: Store
    test: Store


def load(
    config: DataConfig,
    seed: int,
    run_once_per_host: RunOncePerHost = lambda work: work(),
    progress: bool = False,
    side: int | None = None,
) -> Splits:
    """The splits of `config.data`. Every rank calls it and gets the same.

    `side` is what the caller will resize to (`config.resized_side(image_size)`): generated images are then cached no larger, and
    statistics that take long are measured by one rank. It changes no pixel that the network sees. None: full size.
    Raises ValueError or FileNotFoundError with one line that names the flag or file.
    """
    load_source = {
        "shapes": _shapes,
        "cifar10": _cifar10,
        "fashion-mnist": _fashion_mnist,
        "folder": _folder,
        "store": _store,
    }[config.data]
    train, val, test = load_source(_Request(config, seed, run_once_per_host, progress, side))
    if val is None:
        train, val = hold_out(train, config.validation_share, seed)
    splits = Splits(
        *(
            _limited(store, getattr(config, f"limit_{name}"), name, seed)
            for store, name in ((train, "train"), (val, "val"), (test, "test"))
        )
    )
    if side is not None and needs_statistics(config) and splits.train.path is not None:
        run_once_per_host(
            lambda: _ignore(splits.train.statistics(side))
        )  # kept in the store's folder, where the other ranks find them
    return splits


def load_split(
    config: DataConfig,
    split: Literal["train", "val", "test"],
    seed: int,
    run_once_per_host: RunOncePerHost = lambda work: work(),
    progress: bool = False,
    side: int | None = None,
) -> Store:
    """One split of `config.data`, as `load` gives it. Every rank calls it and gets the same.

    Only the folder that the split comes from is needed and packed: measuring on test needs no
    training images. Raises as `load` does.
    """
    return getattr(load(config, seed, run_once_per_host, progress, side), split)


def hold_out(store: Store, share: float, seed: int) -> tuple[Store, Store]:
    """Splits off `share` of each class's images, chosen by `seed`: (the rest, the share), each in stored order.

    A class gives at least one image, unless it has only one. ValueError if nothing is given.
    """
    rng = np.random.default_rng(combine(seed, "validation"))
    chosen = np.zeros(len(store), bool)
    for label in range(len(store.classes)):
        mine = np.flatnonzero(store.labels == label)
        count = min(max(round(share * len(mine)), 1), len(mine) - 1)
        chosen[rng.permutation(mine)[: max(count, 0)]] = True
    if not chosen.any():
        raise ValueError(
            f"--validation-share {share}: no class has two images to share between training and validation; "
            "give val and test folders of their own"
        )
    return store.subset(np.flatnonzero(~chosen)), store.subset(np.flatnonzero(chosen))


def _limited(store: Store, limit: int, name: str, seed: int) -> Store:
    """`limit` images chosen by `seed`, in stored order, in which a disk reads fastest."""
    if limit > len(store):
        raise ValueError(
            f"--limit-{name} {limit}: there are {len(store)} images in the {name} split; 0 takes all"
        )
    if not limit:
        return store
    chosen = np.random.default_rng(combine(seed, "limit", name)).permutation(len(store))[:limit]
    return store.subset(np.sort(chosen))


def _ignore(value: object) -> None:
    pass


@dataclass(frozen=True)
class _Request:
    config: DataConfig
    seed: int
    run_once_per_host: RunOncePerHost
    progress: bool
    side: int | None

    @property
    def directory(self) -> Path:
        return Path(self.config.data_dir).expanduser()

    def print_rank0(self, text: str) -> None:
        if self.progress:
            print(text, flush=True)


_Three = tuple[Store, Store | None, Store]


def _open_splits(path: Path) -> _Three:
    """The stores in PATH/train and PATH/val, PATH/test: where only one of the two is there, it is the test split."""
    train, others = (
        Store.open(path / "train"),
        [Store.open(path / name) for name in ("val", "test") if (path / name).is_dir()],
    )
    for store in others:
        if store.classes != train.classes:
            odd = sorted(set(store.classes) ^ set(train.classes)) or ["the order"]
            raise ValueError(
                f"{store.path}: its classes are not those of {path / 'train'}: {odd[0]} differs"
            )
    return train, others[0] if len(others) == 2 else None, others[-1]


# ---- the sources -----------------------------------------------------------------------------------------------------------


def _shapes(request: _Request) -> _Three:
    side, count = (
        min(synthetic.SIDE, request.side or synthetic.SIDE),
        sum(synthetic.COUNTS.values()),
    )

    def build(path: Path) -> None:
        bar = tqdm(
            total=count,
            desc="shapes",
            unit=" images",
            leave=False,
            disable=None if request.progress else True,
        )
        with bar:
            for split in synthetic.COUNTS:
                with Writer(path / split, synthetic.CLASSES) as writer:
                    for image, label in synthetic.generate(request.seed, split, side):
                        writer.add(image, label)
                        bar.update()

    name = f"shapes-{request.seed}-{synthetic.VERSION}-{side}px-store{VERSION}"
    what = f"drawing {count:,} images of {len(synthetic.CLASSES)} shapes"
    return _open_splits(
        cached(
            name,
            build,
            what,
            count,
            request.directory,
            request.run_once_per_host,
            request.print_rank0,
        )
    )


def _cifar10(request: _Request) -> _Three:
    kind, root = datasets.CIFAR10, str(request.directory)

    def read(train: bool) -> datasets.CIFAR10:
        with warnings.catch_warnings():  # NumPy warns of the pickles' age
            warnings.simplefilter("ignore")
            return kind(root, train)

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            _ignore(read(False))
            return
        request.print_rank0(f"downloading CIFAR-10 into {root}")
        _download(
            lambda: kind(root, True, download=True),
            kind.url,
            root,
            f"put {kind.filename} there yourself",
        )

    request.run_once_per_host(work)
    train, test = (
        Store(
            [np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))],
            np.array(part.targets),
            part.classes,
        )
        for part in (read(True), read(False))
    )
    return train, None, test


def _fashion_mnist(request: _Request) -> _Three:
    places = (request.directory, request.directory / "FashionMNIST" / "raw", DEBIAN_FASHION)

    def find() -> list[Path] | None:
        for place in places:
            files = [
                next((p for p in (place / (name + ".gz"), place / name) if p.is_file()), None)
                for name in FASHION_FILES
            ]
            if all(files):
                return files
        return None

    def work() -> None:
        if find() is None:
            request.print_rank0(f"downloading Fashion-MNIST into {request.directory}")
            names = " ".join(name + ".gz" for name in FASHION_FILES)
            _download(
                lambda: datasets.FashionMNIST(str(request.directory), download=True),
                datasets.FashionMNIST.mirrors[0],
                str(request.directory),
                f"put {names} there, or apt-get install dataset-fashion-mnist",
            )

    request.run_once_per_host(work)
    files = find()
    if files is None:
        raise FileNotFoundError(
            f"--data-dir {request.directory}: no Fashion-MNIST here, though another rank of this host has it"
        )
    images, labels, test_images, test_labels = (_read_idx(file) for file in files)
    train, test = (
        Store([np.repeat(gray[:, None], 3, axis=1)], numbers, FASHION_CLASSES)
        for gray, numbers in ((images, labels), (test_images, test_labels))
    )
    return train, None, test


def _download(fetch: Callable[[], object], url: str, root: str, remedy: str) -> None:
    """torchvision's download, quietly. It checks what it got by MD5, at every start, so a half of a file is fetched again."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fetch()
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--data-dir {root}: not there, and {url} cannot be downloaded ({reason[0]}); {remedy}, or use --data shapes"
        ) from None


def _read_idx(file: Path) -> np.ndarray:
    """The uint8 array of an idx file (two zeros, type 8, number of axes, sizes, values), packed by gzip or not."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        axes = content[3]
        shape = np.frombuffer(content, ">u4", axes, 4).astype(int)
        if content[:3] != b"\0\0\x08":
            raise ValueError
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise ValueError(
            f"{file}: damaged, or not one of Fashion-MNIST's files; delete it and get it again"
        ) from None


def _folder(request: _Request) -> _Three:
    directory = request.directory.resolve()
    _expect(
        request.directory,
        "train, and val or test or both, each with a folder of images for every class",
    )
    listings = {"train": image_folder.list_split(directory / "train")}
    for name in ("val", "test"):
        if (directory / name).is_dir():
            listings[name] = image_folder.list_split(directory / name, listings["train"].classes)
    where = hashlib.blake2b(
        str(directory).encode(errors="surrogateescape"), digest_size=6
    ).hexdigest()
    content = [(name, listing.digest()) for name, listing in listings.items()]
    fingerprint = hashlib.blake2b(
        repr((VERSION, request.config.on_error, content)).encode(), digest_size=6
    ).hexdigest()
    dataset_packer.tell(listings, request.print_rank0)

    def build(path: Path) -> None:
        for old in sorted((cache_folder() or path.parent).glob(f"folder-{where}-*")):
            request.print_rank0(
                f"{directory} has changed since it was packed into {old}, which can be deleted"
            )
        dataset_packer.pack(
            listings,
            path,
            Packing(on_error=request.config.on_error, progress=request.progress),
            say=lambda text: None,
            wait=True,
        )

    count = sum(len(listing.files) for listing in listings.values())
    path = cached(
        f"folder-{where}-{fingerprint}",
        build,
        f"packing {count:,} images of {directory}",
        count,
        request.directory,
        request.run_once_per_host,
        request.print_rank0,
        unfinished=f".folder-{where}-{'-'.join(listings)}.unfinished",
    )
    for name in listings:
        if skipped := read_header(path / name)["skipped"]:
            request.print_rank0(
                f"{directory / name}: left out {len(skipped):,} files that cannot be read: "
                + "; ".join(f"{file}: {reason}" for file, reason in skipped[:3])
                + ("; ..." if len(skipped) > 3 else "")
            )
    return _open_splits(path)


def _store(request: _Request) -> _Three:
    if command := dataset_packer.unfinished(request.directory):
        raise ValueError(
            f"--data-dir {request.directory}: packing was interrupted; finish it with: {command}"
        )
    _expect(request.directory, "stores named train, and val or test or both")
    return _open_splits(request.directory)


def _expect(directory: Path, what: str) -> None:
    """FileNotFoundError unless DIRECTORY has train and at least one of val and test."""
    if not directory.is_dir():
        raise FileNotFoundError(f"--data-dir {directory}: no such folder; expected one with {what}")
    if not (directory / "train").is_dir() or not any(
        (directory / name).is_dir() for name in ("val", "test")
    ):
        lacking = "train" if not (directory / "train").is_dir() else "val or test"
        raise FileNotFoundError(
            f"--data-dir {directory}: no folder {lacking} in it; expected {what}"
        )
