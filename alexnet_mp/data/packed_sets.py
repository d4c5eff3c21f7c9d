"""Image folders, packed into the user's cache at first use, and stores that were packed before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alexnet_mp.data import dataset_packer, folder_layout
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.folder_cache import packed_folder
from alexnet_mp.data.folder_layout import SPLITS, Split
from alexnet_mp.data.image_folder import Listing
from alexnet_mp.data.image_sets import SetOptions, find_image_set
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
        directory = request.directory
        if _is_store(directory):
            raise ValueError(
                f"--data folder --data-dir {directory}: a packed store; use --data store"
            )
        options = SetOptions(skip=request.config.on_error == "skip", progress=request.progress)
        self.request, self.found = request, find_image_set(directory, options=options)
        self.splits: Sequence[Split] = [split for split in SPLITS if split in self.found.folders]
        for note in self.found.notes:
            request.print_rank0(note)

    def describe(self, split: Split) -> str:
        return str(self.found.folders[split])

    def open(self, splits: Sequence[Split]) -> dict[Split, Store]:
        """Lists all of `splits` before the first is packed, which may take hours."""
        listings = {split: self.found.list(split) for split in splits}
        folder_layout.report(listings, self.request.print_rank0)
        return {split: self._open(split, listings[split]) for split in splits}

    def _open(self, split: Split, listing: Listing) -> Store:
        """The store of one split, packed into the cache if it is in none."""
        request = self.request
        packing = Packing(on_error=request.config.on_error, progress=request.progress)
        place = request.directory if request.directory.is_dir() else request.directory.parent
        path = packed_folder(listing, split, packing, request.cache(place / CACHE))
        if skipped := read_header(path)["skipped"]:
            request.print_rank0(
                f"{listing.folder}: left out {len(skipped):,} files that cannot be read: "
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
