"""A whole image set: which splits a source has, and packing them into one folder that --data store trains from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from alexnet_mp.config.files import remove_leftovers, sync_folder, write_atomically
from alexnet_mp.config.folder_lock import LOCK_NAME, FolderLock
from alexnet_mp.data import store_format
from alexnet_mp.data.decode import SIDE
from alexnet_mp.data.folder_layout import SPLITS, Split
from alexnet_mp.data.image_folder import Listing
from alexnet_mp.data.shard_writer import Packing, decoded, pack_split, packed_files, quiet
from alexnet_mp.ops.cpu_cores import available_cores

UNFINISHED = "unfinished.json"
"""In a store's folder while it is being packed, and after that was interrupted."""
JPEG_BYTES = 45_000
"""Of a 256-pixel JPEG, rather too many: what room is asked for before it is known."""
Say = Callable[[str], None]


def pack(
    listings: Mapping[Split, Listing],
    store: Path,
    packing: Packing,
    command: str = "",
    say: Say = print,
    wait: bool = False,
) -> dict[str, Any]:
    """Packs every split into STORE/SPLIT and returns a report of what is there. `command`: what would finish it after a kill.

    A store that was begun is finished; one that is complete and of the same files is left alone. ValueError where STORE holds
    something else, where it would not fit onto the disk, or where another process is packing into it, unless it shall `wait`.
    """
    started, count = time.perf_counter(), sum(len(listing) for listing in listings.values())
    plan = {
        "source": os.path.commonpath([listing.folder.resolve() for listing in listings.values()]),
        "encode": packing.encode,
        "splits": list(listings),
    }
    _check_begun(store, plan, listings)
    _check_room(store, count, packing, say)
    store.mkdir(parents=True, exist_ok=True)
    with _lock(store, wait):
        remove_leftovers(store)
        write_atomically(store / UNFINISHED, json.dumps(plan | {"command": command}) + "\n")
        headers = {
            name: pack_split(listing, store / name, packing, name == "train")
            for name, listing in listings.items()
        }
        (store / UNFINISHED).unlink()
        sync_folder(store)
    seconds = time.perf_counter() - started
    splits = {name: _summary(listings[name], header) for name, header in headers.items()}
    return {
        "store": str(store),
        "encode": packing.encode,
        "splits": splits,
        "seconds": round(seconds, 3),
        "images_per_second": count / seconds,
    }


def check(listings: Mapping[Split, Listing], packing: Packing) -> dict[str, Any]:
    """Opens and decodes every file, writes nothing, and returns a report like that of `pack`, with what cannot be read under "skipped"."""
    splits = {}
    for name, listing in listings.items():
        bar = tqdm(
            total=len(listing),
            desc=f"checking {name}",
            unit=" images",
            leave=False,
            disable=None if packing.progress else True,
        )
        numbers = {k: rows for k, rows in enumerate(store_format.blocks(len(listing)))}
        skipped, small = [], 0
        with bar, quiet():
            for number, images, _ in decoded(listing, numbers, packing, False, bar):
                small += sum(not isinstance(image, str) and image.side < SIDE for image in images)
                skipped += [
                    (listing.name(row), image)
                    for row, image in zip(numbers[number], images, strict=True)
                    if isinstance(image, str)
                ]
        splits[name] = _summary(listing, {"skipped": skipped}) | {
            "images": len(listing) - len(skipped),
            "smaller_than_256": small,
        }
    return {"splits": splits}


def unfinished(store: Path) -> str | None:
    """How to finish the store in this folder, if its packing was interrupted."""
    try:
        return (
            json.loads((store / UNFINISHED).read_text(encoding="utf-8"))["command"]
            or "launch/pack.py"
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "launch/pack.py"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    lines = []
    for name, split in report["splits"].items():
        size = f", {split['bytes'] / 1e9:.2f} GB" if "bytes" in split else ""
        small = (
            f", {split['smaller_than_256']:,} smaller than {SIDE} pixels"
            if split.get("smaller_than_256")
            else ""
        )
        lines.append(
            f"{name}: {split['images']:,} images of {split['classes']:,} classes{size}{small}"
        )
        if split["ignored"]:
            lines.append(f"  ignored {split['ignored']}")
        if split["skipped"]:
            lines.append(f"  {len(split['skipped']):,} could not be read:")
            lines += [f"    {file}: {reason}" for file, reason in split["skipped"]]
    return lines


def _summary(listing: Listing, header: Mapping[str, Any]) -> dict[str, Any]:
    summary = {
        "images": sum(sum(shard["counts"]) for shard in header.get("shards", [])),
        "classes": len(listing.classes),
        "ignored": str(listing.ignored),
        "skipped": [list(pair) for pair in header["skipped"]],
    }
    if "shards" in header:
        summary |= {
            "bytes": sum(shard["bytes"] for shard in header["shards"]),
            "sides": dict(sorted(_sides(header).items())),
        }
    return summary


def _sides(header: Mapping[str, Any]) -> Counter[int]:
    sides: Counter[int] = Counter()
    for shard in header["shards"]:
        sides.update(dict(zip(shard["sides"], shard["counts"], strict=True)))
    return sides


def _check_begun(store: Path, plan: Mapping[str, Any], listings: Mapping[Split, Listing]) -> None:
    """ValueError unless `store` is new, empty, or one that this plan began or finished."""
    if not store.exists():
        return
    if not store.is_dir():
        raise ValueError(f"STORE {store}: a file; name a folder")
    names = {entry.name for entry in os.scandir(store)}
    begun: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        begun = json.loads((store / UNFINISHED).read_text(encoding="utf-8"))
    if strange := sorted(
        name
        for name in names - {UNFINISHED, LOCK_NAME, *SPLITS}
        if not (name.startswith(".") and name.endswith(".tmp"))
    ):
        raise ValueError(
            f"STORE {store}: holds something else already ({strange[0]}); name a new folder"
        )
    if not begun and (packed := names & set(SPLITS)):
        same = packed == set(listings) and all(
            packed_files(store / name) == listing.digest() for name, listing in listings.items()
        )
        if not same:
            raise ValueError(
                f"STORE {store}: is complete, and packed from other files than those of {plan['source']}; "
                "delete it, or name another folder"
            )
        begun = {
            "encode": store_format.read_header(store / next(iter(listings))).get("encode", "raw")
        }
    for key, value in plan.items():
        if key in begun and begun[key] != value:
            old, new = (
                " ".join(words) if isinstance(words, list) else words
                for words in (begun[key], value)
            )
            raise ValueError(
                f"STORE {store}: was begun with {key} {old}, not {new}; repeat that command, or delete the folder"
            )


def _check_room(store: Path, count: int, packing: Packing, say: Say) -> None:
    """Says how much will be written, and raises ValueError where that much is not free."""
    each = 3 * SIDE * SIDE if packing.encode == "raw" else JPEG_BYTES
    need, have = (
        count * each,
        sum(path.stat().st_size for path in store.rglob("images-*.npy")) if store.is_dir() else 0,
    )
    place = next(
        parent for parent in (store.absolute(), *store.absolute().parents) if parent.is_dir()
    )
    free = shutil.disk_usage(place).free
    say(
        f"packing {count:,} images into {store}: {'at most' if packing.encode == 'raw' else 'about'} {need / 1e9:,.2f} GB, "
        + (f"of which {have / 1e9:,.2f} are there, " if have else "")
        + f"{free / 1e9:,.2f} free; {packing.workers or available_cores()} threads"
    )
    if need - have > free:
        raise ValueError(
            f"STORE {store}: needs {(need - have) / 1e9:,.2f} GB, {free / 1e9:,.2f} are free there; "
            f"name a folder on a larger disk{', or take --encode jpeg' if packing.encode == 'raw' else ''}"
        )


@contextlib.contextmanager
def _lock(store: Path, wait: bool) -> Iterator[None]:
    """Keeps a second process from packing into the same folder; ValueError in that one, unless it waits."""
    lock = FolderLock(store, "another process is packing into it")
    try:
        lock.take(wait)
    except OSError as error:
        raise ValueError(f"STORE {store}: {error}") from None
    try:
        yield
    finally:
        lock.release()
