"""Packs all splits of an image set into one folder, which --data store trains from."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_mp.config.files import remove_leftovers, sync_folder, write_atomically
from alexnet_mp.config.folder_lock import LOCK_NAME, FolderLock
from alexnet_mp.config.progress import Progress, progress
from alexnet_mp.data import store_format
from alexnet_mp.data.decode import SIDE
from alexnet_mp.data.decode_pool import Packing, decoded, quiet_decoding
from alexnet_mp.data.folder_layout import SPLITS, Split
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.pack_size import estimated_bytes, free_bytes, packed_bytes, size_text
from alexnet_mp.data.split_packer import holds_same_files, pack_split
from alexnet_mp.data.streamed_decoding import decoded_as_streamed
from alexnet_mp.ops.cpu_cores import available_cores

UNFINISHED = "unfinished.json"
"""The file in a store's folder that says how its packing was begun, until it is finished."""

Say = Callable[[str], None]


def pack(
    listings: Mapping[Split, Listing],
    store: Path,
    packing: Packing,
    command: str = "",
    say: Say = print,
) -> dict[str, Any]:
    """Packs every split into STORE/SPLIT and returns a report of what is there.

    A store that was begun is finished; one that is complete and of the same files is left alone.
    `command`: the one that finishes it after a kill. ValueError where STORE holds something else,
    where it would not fit onto the disk, and where another process is packing into it.
    """
    started, count = time.perf_counter(), sum(len(listing) for listing in listings.values())
    plan = {
        "source": os.path.commonpath([listing.folder.resolve() for listing in listings.values()]),
        "encode": packing.encode,
        "splits": list(listings),
    }
    _check_begun(store, plan, listings)
    smaller = ", or take --encode jpeg" if packing.encode == "raw" else ""
    size = check_room(
        listings.values(),
        packing,
        store,
        f"STORE {store}",
        f"name a folder on a larger disk{smaller}",
    )
    threads = packing.workers or available_cores()
    say(f"packing {count:,} images into {store}: {size}; {threads} threads")
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        remove_leftovers(store)
        write_atomically(store / UNFINISHED, json.dumps(plan | {"command": command}) + "\n")
        headers = {
            name: pack_split(listing, store / name, packing, name == "train")
            for name, listing in listings.items()
        }
        (store / UNFINISHED).unlink()
        sync_folder(store)
    seconds = time.perf_counter() - started
    return {
        "store": str(store),
        "encode": packing.encode,
        "splits": {name: _summary(listings[name], header) for name, header in headers.items()},
        "seconds": round(seconds, 3),
        "images_per_second": count / seconds,
    }


def check_room(
    listings: Iterable[Listing], packing: Packing, folder: Path, place: str, remedy: str
) -> str:
    """How much will be written into `folder`, and how much is free there, in words.

    ValueError where it would not fit. `place` begins its message, and `remedy` says how to get more
    room.
    """
    need, have = estimated_bytes(listings, packing.encode), packed_bytes(folder)
    free = free_bytes(folder)
    if need - have > free:
        raise ValueError(
            f"{place}: needs about {size_text(need - have)}, {size_text(free)} are free there; "
            f"{remedy}"
        )
    there = f"of which {size_text(have)} are there, " if have else ""
    return f"about {size_text(need)}, {there}{size_text(free)} free"


def check(listings: Mapping[Split, Listing], packing: Packing) -> dict[str, Any]:
    """Opens and decodes every file, writes nothing, and returns a report like that of `pack`.

    The files that cannot be read are in it under "skipped".
    """
    splits = {}
    for name, listing in listings.items():
        numbers = dict(enumerate(store_format.blocks(len(listing))))
        skipped: list[tuple[str, str]] = []
        small = 0
        bar = progress(
            total=len(listing),
            description=f"checking {name}",
            unit="images",
            enabled=packing.progress,
        )
        with bar, quiet_decoding():
            for row, image in _sides(listing, numbers, packing, bar):
                if isinstance(image, str):
                    skipped.append((listing.name(row), image))
                else:
                    small += image < SIDE
        splits[name] = _summary(listing, {"skipped": sorted(skipped)}) | {
            "images": len(listing) - len(skipped),
            "smaller_than_256": small,
        }
    return {"splits": splits}


def _sides(
    listing: Listing, shards: Mapping[int, range], packing: Packing, bar: Progress[None]
) -> Iterator[tuple[int, int | str]]:
    """The side of each image as it would be stored, or why it cannot be read."""
    if listing.contents.in_order:
        rows = np.arange(len(listing))
        for row, image, _ in decoded_as_streamed(listing, rows, packing, bar):
            yield row, image if isinstance(image, str) else image.side
        return
    for shard in decoded(listing, shards, packing, False, bar):
        for row, image in zip(shards[shard.number], shard.images, strict=True):
            yield row, image if isinstance(image, str) else image.side


def unfinished(store: Path) -> str | None:
    """The command that finishes the store in this folder; None unless packing was interrupted."""
    try:
        begun = json.loads((store / UNFINISHED).read_text(encoding="utf-8"))
        return begun["command"] or "launch/pack.py"
    except (FileNotFoundError, NotADirectoryError):  # the latter: an archive
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "launch/pack.py"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `pack` or `check` for people."""
    lines = []
    for name, split in report["splits"].items():
        line = f"{name}: {split['images']:,} images of {split['classes']:,} classes"
        if "bytes" in split:
            line += f", {size_text(split['bytes'])}"
        if split.get("smaller_than_256"):
            line += f", {split['smaller_than_256']:,} smaller than {SIDE} pixels"
        lines.append(line)
        if split["ignored"]:
            lines.append(f"  ignored {split['ignored']}")
        if split["skipped"]:
            lines.append(f"  {len(split['skipped']):,} could not be read:")
            lines += [f"    {file}: {reason}" for file, reason in split["skipped"]]
    return lines


def _summary(listing: Listing, header: Mapping[str, Any]) -> dict[str, Any]:
    shards = header.get("shards", [])
    summary = {
        "images": sum(sum(shard["counts"]) for shard in shards),
        "classes": len(listing.classes),
        "ignored": str(listing.ignored),
        "skipped": [list(pair) for pair in header["skipped"]],
    }
    if "shards" in header:
        sides: Counter[int] = Counter()
        for shard in shards:
            sides.update(dict(zip(shard["sides"], shard["counts"], strict=True)))
        summary["bytes"] = sum(shard["bytes"] for shard in shards)
        summary["sides"] = dict(sorted(sides.items()))
    return summary


def _check_begun(store: Path, plan: Mapping[str, Any], listings: Mapping[Split, Listing]) -> None:
    """ValueError unless `store` is new, empty, or one that this plan began or finished."""
    if not store.exists():
        return
    if not store.is_dir():
        raise ValueError(f"STORE {store}: a file; name a folder")
    names = {entry.name for entry in os.scandir(store)}
    strange = sorted(
        name
        for name in names - {UNFINISHED, LOCK_NAME, *SPLITS}
        if not (name.startswith(".") and name.endswith(".tmp"))
    )
    if strange:
        raise ValueError(
            f"STORE {store}: holds something else already ({strange[0]}); name a new folder"
        )
    begun: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        begun = json.loads((store / UNFINISHED).read_text(encoding="utf-8"))
    if not begun and (packed := names & set(SPLITS)):
        same = packed == set(listings) and all(
            holds_same_files(store / name, listing) for name, listing in listings.items()
        )
        if not same:
            raise ValueError(
                f"STORE {store}: is complete, and packed from other files than those of "
                f"{plan['source']}, or from these before they changed; delete it, or name another "
                "folder"
            )
        header = store_format.read_header(store / next(iter(listings)))
        begun = {"encode": header.get("encode", "raw")}
    for key, value in plan.items():
        if key in begun and begun[key] != value:
            old, new = (
                " ".join(words) if isinstance(words, list) else words
                for words in (begun[key], value)
            )
            raise ValueError(
                f"STORE {store}: was begun with {key} {old}, not {new}; repeat that command, "
                "or delete the folder"
            )


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keeps a second process from packing into the same folder; ValueError in that one."""
    lock = FolderLock(store, "another process is packing into it")
    try:
        lock.take()
    except OSError as error:
        raise ValueError(f"STORE {store}: {error}") from None
    try:
        yield
    finally:
        lock.release()
