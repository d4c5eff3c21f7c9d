"""Loads a data set: chooses the source, and makes training, validation and test of its splits.

Start here: a source (generated, downloaded, folder or store) opens stores, one for each split.
What a set lacks is held out from its training images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alexnet_mp.config import DataConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.data.cache import RunOncePerHost, run_here
from alexnet_mp.data.downloads import Cifar10, FashionMnist
from alexnet_mp.data.folder_layout import EXPECTED, SPLITS, Split
from alexnet_mp.data.packed_sets import ImageFolder, PackedStore
from alexnet_mp.data.source import Request, Source
from alexnet_mp.data.store import Store
from alexnet_mp.data.synthetic import Shapes
from alexnet_mp.data.transforms import needs_statistics

SOURCES: Mapping[str, Callable[[Request], Source]] = {
    "shapes": Shapes,
    "cifar10": Cifar10,
    "fashion-mnist": FashionMnist,
    "folder": ImageFolder,
    "store": PackedStore,
}
TEST_SEED = 0
"""Held-out test images are the same for every --seed: no member of an ensemble trains on them."""
SHARES = {0.5: "half", 0.25: "a quarter", 0.2: "a fifth", 0.1: "a tenth"}


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images; none in common, but val may be the test images.

    >>> splits = load(preset("demo").data, seed=0)
    >>> splits.train.classes, len(splits.test)
    """

    train: Store
    val: Store
    test: Store
    validation: str = "own split"
    """Where val comes from: own split, held out from train, or test images."""


@dataclass(frozen=True)
class Part:
    """The images of a split: all of one of the source's splits, or a share of train."""

    source: Split
    share: Literal["all", "train", "test", "validation"] = "all"
    """test, validation: the share of train that is held out for it. train: what then remains."""


def load(
    config: DataConfig,
    seed: int,
    run_once_per_host: RunOncePerHost = run_here,
    progress: bool = False,
    side: int | None = None,
) -> Splits:
    """The splits of `config.data`. Every rank calls it and gets the same.

    `side` is what the caller will resize to (`config.resized_side(image_size)`): generated images
    are then cached no larger, and statistics that take long are measured by one rank. It changes
    no pixel that the network sees. None: full size.

    Raises ValueError or FileNotFoundError with one line that names the flag or file.

    >>> splits = load(DataConfig(data="folder", data_dir="~/pets"), seed=0, progress=True)
    >>> splits.train.classes, len(splits.train), len(splits.val), len(splits.test)
    """
    request = Request(config, seed, run_once_per_host, progress, side)
    source = SOURCES[config.data](request)
    parts = assign(source.splits, config.validation)
    found = _open(request, source, parts, SPLITS)
    for name, store in found.items():
        if store.classes != found["train"].classes:
            odd = sorted(set(store.classes) ^ set(found["train"].classes)) or ["their order"]
            raise ValueError(
                f"--data-dir {config.data_dir}: the classes of {name} are not those of train: "
                f"{odd[0]} differs"
            )
    splits = Splits(**found, validation=_validation(parts))
    if side is not None and needs_statistics(config) and splits.train.path is not None:

        def measure() -> None:  # it stays in the store's folder, where the other ranks find it
            splits.train.statistics(side)

        run_once_per_host(measure)
    return splits


def load_split(
    config: DataConfig,
    split: Split,
    seed: int,
    run_once_per_host: RunOncePerHost = run_here,
    progress: bool = False,
    side: int | None = None,
) -> Store:
    """One split of `config.data`, as `load` gives it. Every rank calls it and gets the same.

    Only the folder that the split comes from is needed and packed: measuring on test needs no
    training images. Raises as `load` does.
    """
    request = Request(config, seed, run_once_per_host, progress, side)
    source = SOURCES[config.data](request)
    return _open(request, source, assign(source.splits, config.validation), (split,))[split]


def assign(available: Sequence[Split], validation: str) -> dict[Split, Part]:
    """Which images train, validate and test, given the splits that a set has.

    With val and test, both are what they say. With one of them, that is the test split, and
    validation is held out from train, or with `validation` "val" is the test images too, as in
    the paper and the 2012 source. With neither, a share of train is held out for the test.
    """
    others: list[Split] = [split for split in ("val", "test") if split in available]
    test = Part(others[-1]) if others else Part("train", "test")
    if len(others) == 2:
        val = Part("val")
    else:
        val = test if validation == "val" else Part("train", "validation")
    return {"train": Part("train", "train"), "val": val, "test": test}


def hold_out(
    store: Store, share: float, seed: int, purpose: str = "validation"
) -> tuple[Store, Store]:
    """Splits off `share` of each class's images, chosen by `seed`: (the rest, the share).

    Both are in stored order. A class gives at least one image, unless it has only one. ValueError
    if nothing is given.
    """
    rng = np.random.default_rng(combine(seed, purpose))
    chosen = np.zeros(len(store), bool)
    # A pass over all labels for each of a thousand classes would take a second.
    by_class = np.argsort(store.labels, kind="stable")
    borders = np.searchsorted(store.labels[by_class], np.arange(len(store.classes) + 1))
    for first, last in itertools.pairwise(borders.tolist()):
        mine = by_class[first:last]
        count = min(max(round(share * len(mine)), 1), len(mine) - 1)
        chosen[rng.permutation(mine)[: max(count, 0)]] = True
    if not chosen.any():
        raise ValueError(
            f"--validation-share {share}: no class has two images to share between training and "
            f"{purpose}; give val and test folders of their own"
        )
    return store.subset(np.flatnonzero(~chosen)), store.subset(np.flatnonzero(chosen))


def _open(
    request: Request, source: Source, parts: Mapping[Split, Part], wanted: Sequence[Split]
) -> dict[Split, Store]:
    """The `wanted` splits, limited as the configuration says; prints where they come from."""
    config = request.config
    needed = [split for split in SPLITS if split in {parts[name].source for name in wanted}]
    for name in wanted:
        if (lacking := parts[name].source) not in source.splits:
            reason = "" if name == lacking else f", and {name} would be held out from it"
            raise FileNotFoundError(
                f"--data-dir {request.directory}: no folder {lacking} in it{reason}; "
                f"expected {EXPECTED}"
            )
    origins = [_origin(name, source, parts, config) for name in wanted]
    if any(origins):
        request.print_rank0("; ".join(origins))
    stores = source.open(needed)
    held = _held_out(stores["train"], parts, config, request.seed) if "train" in stores else {}
    found: dict[Split, Store] = {}
    for name in wanted:
        part = parts[name]
        store = stores[part.source] if part.share == "all" else held[part.share]
        rows = request.chosen(name, len(store))
        found[name] = store if len(rows) == len(store) else store.subset(rows)
    return found


def _held_out(
    train: Store, parts: Mapping[Split, Part], config: DataConfig, seed: int
) -> dict[str, Store]:
    """The shares of `train` by their names, and what remains of it as "train"."""
    held = {"train": train}
    if parts["test"].share == "test":
        held["train"], held["test"] = hold_out(train, config.validation_share, TEST_SEED, "test")
    if parts["val"].share == "validation":
        held["train"], held["validation"] = hold_out(held["train"], config.validation_share, seed)
    return held


def _validation(parts: Mapping[Split, Part]) -> str:
    if parts["val"] == parts["test"]:
        return "test images"
    return "own split" if parts["val"].share == "all" else "held out from train"


def _origin(name: Split, source: Source, parts: Mapping[Split, Part], config: DataConfig) -> str:
    """Says where a split comes from, for the screen; empty where the source has it as expected."""
    part, place = parts[name], source.describe(parts[name].source)
    share = SHARES.get(config.validation_share, f"{config.validation_share:.3g}")
    if not place:
        return ""
    if name == "val" and part == parts["test"]:
        return "validation: the test images (--validation val)"
    if part.share == "test":
        return f"test: {share} of {place}, the same for every --seed"
    if part.share == "validation":
        rest = "the rest" if parts["test"].share == "test" else "train"
        return f"validation: {share} of {rest}, chosen by --seed"
    only = " (the only other split)" if name == "test" and part.source == "val" else ""
    return f"{'validation' if name == 'val' else name}: {place}{only}"
