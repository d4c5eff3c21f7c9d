"""Image folders and archives, packed into the cache at first use, and stores packed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from alexnet_mp.data import dataset_packer, folder_layout
from alexnet_mp.data.cache import run_here
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.folder_cache import packed_folder
from alexnet_mp.data.folder_layout import SPLITS, Split
from alexnet_mp.data.image_sets import ImageSet, SetOptions, find_image_set
from alexnet_mp.data.source import Request
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import read_header

CACHE = ".alexnet_mp"
"""Packs are kept here, in the image folder, where the user's cache cannot be written.

The name is hidden: it must not pass for a class.
"""
SHOWN = 3
"""Unreadable files that one line names."""


class ImageFolder:
    """--data folder: image files sorted into splits and classes, also within archives."""

    def __init__(self, request: Request) -> None:
        """Looks for the splits. FileNotFoundError or ValueError as `find_image_set`."""
        if _is_store(request.directory):
            raise ValueError(
                f"--data folder --data-dir {request.directory}: a packed store; use --data store"
            )
        self.request = request
        self._places = request.run_once_per_host(self._look, lambda places: True)
        self.splits: Sequence[Split] = [split for split in SPLITS if split in self._places]

    @cached_property
    def _found(self) -> ImageSet:
        request = self.request
        options = SetOptions(skip=request.config.on_error == "skip", progress=request.progress)
        return find_image_set(request.directory, options=options)

    def _look(self) -> dict[Split, str]:
        """What the screen calls the splits. Of an archive all names are read: one rank does it."""
        for note in self._found.notes:
            self.request.print_rank0(note)
        return {split: str(folder) for split, folder in self._found.folders.items()}

    def describe(self, split: Split) -> str:
        return self._places[split]

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        """One rank of each host lists the folder: a million files take seconds, and as many
        questions to a file server."""
        stores = self.request.run_once_per_host(lambda: self._find_or_pack(splits), _are_stores)
        return {split: self._open(split, Path(path)) for split, path in stores.items()}

    def _find_or_pack(self, splits: Sequence[Split]) -> dict[Split, str]:
        """The paths of the stores of `splits`, in the cache; packed if they are in none.

        Lists all of `splits` before the first is packed, which may take hours.
        """
        listings = {split: self._found.list(split) for split in splits}
        folder_layout.report(listings, self.request.print_rank0)
        packing = Packing(on_error=self.request.config.on_error, progress=self.request.progress)
        directory = self.request.directory
        cache = self.request.cache((directory if directory.is_dir() else directory.parent) / CACHE)
        cache = replace(cache, run_once_per_host=run_here)  # this is called by one rank already
        return {
            split: str(packed_folder(listing, split, packing, cache))
            for split, listing in listings.items()
        }

    def _open(self, split: Split, path: Path) -> Store:
        if skipped := read_header(path)["skipped"]:
            self.request.print_rank0(
                f"{self.describe(split)}: left out {len(skipped):,} files that cannot be read: "
                + "; ".join(f"{file}: {reason}" for file, reason in skipped[:SHOWN])
                + ("; ..." if len(skipped) > SHOWN else "")
            )
        return Store.open(path)


class PackedStore:
    """--data store: a folder that launch/pack.py wrote."""

    def __init__(self, request: Request) -> None:
        """FileNotFoundError or ValueError where there is no store, or an unfinished one."""
        self.directory = folder_layout.existing_folder(
            request.directory, "--data-dir", "stores named train, val and test"
        )
        if command := dataset_packer.unfinished(self.directory):
            raise ValueError(
                f"--data-dir {self.directory}: packing was interrupted; finish it with: {command}"
            )
        self.splits: Sequence[Split] = [
            split for split in SPLITS if (self.directory / split).is_dir()
        ]

    def describe(self, split: Split) -> str:
        return str(self.directory / split)

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        return {split: Store.open(self.directory / split) for split in splits}


def _is_store(directory: Path) -> bool:
    return any((directory / split / "header.json").is_file() for split in SPLITS)


def _are_stores(paths: Mapping[Split, str]) -> bool:
    """Whether this rank sees the stores that another one found or packed."""
    return all((Path(path) / "header.json").is_file() for path in paths.values())
