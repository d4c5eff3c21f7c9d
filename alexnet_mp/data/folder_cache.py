"""Packs image folders into the cache, and finds the packs again by content.

A pack belongs to the names, sizes and classes of its files, wherever these lie. Times of change
only tell whether the files need another look: the times of the last look are kept in the pack, and
where they are the same, no file is opened. Where they differ, because files were changed in place
or the folder was copied, changed files are decoded and compared with the pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from alexnet_mp.config.files import write_atomically
from alexnet_mp.data.cache import ORIGIN, Cache, origin_of
from alexnet_mp.data.contents import Bytes
from alexnet_mp.data.dataset_packer import check_room
from alexnet_mp.data.decode import SIDE, Readable, try_read
from alexnet_mp.data.decode_pool import Packing, quiet_decoding
from alexnet_mp.data.folder_layout import Split
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.split_packer import pack_split
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import VERSION, read_header
from alexnet_mp.ops.cpu_cores import available_cores

COMPARED = 1000
"""Changed files that are compared; of more, as in a copied folder, this many spread evenly."""
TIMES = "times.npy"
"""The file in a pack with int64 (N,): when each image file was changed, as of the last look."""


def packed_folder(listing: Listing, split: Split, packing: Packing, cache: Cache) -> Path:
    """The store of the images of `listing`, packed by one rank of the host if it is in no cache.

    Raises ValueError as `pack_split`, and where there is no room.
    """
    folder = listing.folder.resolve()
    key = _digest(
        VERSION, SIDE, packing.on_error, split, listing.classes, listing.digest(times=False)
    )

    def find(place: Path) -> Path | None:
        packs = sorted(place.glob(f"folder-{key}-*"))
        return next((pack for pack in packs if _holds(pack, split, listing)), None)

    def build(path: Path) -> None:
        place = path.parents[1]
        for old in sorted(place.glob("folder-*")):
            if origin_of(old) == str(folder):
                cache.print_line(
                    f"{folder} has changed since it was packed into {old}, which can be deleted"
                )
        size = check_room(
            [listing],
            packing,
            path,
            f"packing {folder} into {place}",
            "name a folder on a larger disk with --cache-dir (or XDG_CACHE_HOME), or pack once, "
            f"smaller: `launch/pack.py {folder.parent} STORE --encode jpeg`, and train with "
            "--data store --data-dir STORE",
        )
        cache.print_line(f"the pack takes {size}")
        pack_split(listing, path / split, packing, with_sums=split == "train")
        write_atomically(path / ORIGIN, json.dumps({"folder": str(folder)}))
        _record_times(path, listing)

    return (
        cache.get(
            f"folder-{key}-{_digest(listing.times.tobytes())}",
            build,
            f"packing {len(listing):,} images of {folder}",
            len(listing),
            find=find,
            lock=f"folder-{key}",  # copies of the folder, elsewhere, have the same
            unfinished=f"folder-{_digest(str(folder))}-{split}",  # repaired files do not change it
        )
        / split
    )


def _holds(pack: Path, split: Split, listing: Listing) -> bool:
    """Whether `pack` holds the images of `listing` as they are now."""
    with contextlib.suppress(OSError, ValueError):
        times = np.load(pack / TIMES, allow_pickle=False)
        if times.shape != listing.times.shape:
            return False
        changed = np.flatnonzero(times != listing.times)
        if len(changed) > COMPARED:
            changed = changed[np.linspace(0, len(changed) - 1, COMPARED).astype(int)]
        if not len(changed):
            return True
        if _same_images(Store.open(pack / split), pack / split, listing, changed.tolist()):
            with contextlib.suppress(OSError):  # a read-only cache: they are compared at each start
                _record_times(pack, listing)
            return True
    return False


def _same_images(store: Store, path: Path, listing: Listing, rows: Sequence[int]) -> bool:
    """Whether the files of `rows` decode to the images that the store has of them."""
    skipped = {name for name, _ in read_header(path)["skipped"]}
    left_out = np.zeros(len(listing), bool)
    if skipped:
        left_out[:] = [listing.name(row) in skipped for row in range(len(listing))]
    numbers = np.cumsum(~left_out) - 1  # of each row's image in the store

    def same(row: int, file: Readable) -> bool:
        image = try_read(file)
        if isinstance(image, str) or left_out[row]:
            return isinstance(image, str) and bool(left_out[row])
        return np.array_equal(image, store.image(int(numbers[row])))

    files = (
        ((row, Bytes(content)) for row, content in listing.contents.stream(np.array(rows)))
        if listing.contents.in_order
        else ((row, listing.file(row)) for row in rows)
    )
    with quiet_decoding(), ThreadPoolExecutor(available_cores()) as pool:
        return all(pool.map(lambda item: same(*item), files))


def _record_times(pack: Path, listing: Listing) -> None:
    content = io.BytesIO()
    np.save(content, listing.times)
    write_atomically(pack / TIMES, content.getvalue())


def _digest(*values: object) -> str:
    return hashlib.blake2b(
        repr(values).encode("utf-8", "surrogateescape"), digest_size=6
    ).hexdigest()
