"""The interface of a source of images: the splits that it has, each opened when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from alexnet_mp.config import DataConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.data.cache import Cache, RunOncePerHost, cache_folder
from alexnet_mp.data.folder_layout import Split
from alexnet_mp.data.store import Store


@dataclass(frozen=True)
class Request:
    """Which images are wanted, and how a source works and speaks on this rank."""

    config: DataConfig
    seed: int
    run_once_per_host: RunOncePerHost
    progress: bool
    side: int | None
    """The side that images will be resized to; None if it is not known."""

    @property
    def directory(self) -> Path:
        """--data-dir, with ~ as the home. ValueError for the home of an unknown user."""
        try:
            return Path(self.config.data_dir).expanduser()
        except RuntimeError as error:
            raise ValueError(f"--data-dir {self.config.data_dir}: {error}") from None

    def cache(self, fallback: Path) -> Cache:
        """The cache of drawn and packed images: --cache-dir, else the user's, else `fallback`."""
        chosen = self.config.cache_dir
        places = [cache_folder(chosen), None if chosen else fallback]
        folders = [place for place in places if place is not None]
        return Cache(folders, self.run_once_per_host, self.print_rank0)

    def chosen(self, split: Split, count: int) -> np.ndarray:
        """The numbers of the images that --limit-SPLIT leaves of `count`, or all.

        The seed chooses them; they are in stored order, in which a disk reads fastest. ValueError
        naming the flag where there are fewer images.
        """
        limit: int = getattr(self.config, f"limit_{split}")
        if limit > count:
            raise ValueError(
                f"--limit-{split} {limit}: there are {count} images in the {split} split; "
                "0 takes all"
            )
        if not limit:
            return np.arange(count)
        rng = np.random.default_rng(combine(self.seed, "limit", split))
        return np.sort(rng.permutation(count)[:limit])

    def print_rank0(self, text: str) -> None:
        """Prints on the rank that speaks."""
        if self.progress:
            print(text, flush=True)


class Source(Protocol):
    """A set of labeled images in up to three splits."""

    splits: Sequence[Split]
    """The splits that it has."""

    def describe(self, split: Split) -> str:
        """What the screen calls one of its splits; empty where nobody needs to be told."""

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        """The stores of `splits`. Every rank calls it, with the same splits, and gets the same.

        Only what these splits need is downloaded, generated or packed.
        """
