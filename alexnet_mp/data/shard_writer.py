"""Packs listed image files into stores, on all cores, so that a kill at any moment costs no more than a shard.

A shard is decoded, written beside its name, synced and renamed; then its note, which has the checksum and what the header will
need of it. Whoever packs again believes a shard that has a note of the same files and the bytes that the note says, and makes
the others. What is written is a function of the files alone, so an interrupted store ends as every other one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from alexnet_mp.config.files import remove_leftovers, write_atomically
from alexnet_mp.data import store_format
from alexnet_mp.data.decode import SIDE, decode_jpeg, encode_jpeg, try_read
from alexnet_mp.data.image_folder import Listing
from alexnet_mp.data.statistics import Sums
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import EncodedImage, StoreIndex, shard_name
from alexnet_mp.ops.cpu_cores import available_cores

SHOWN = 3
"""Bad files that one message names."""
MOST_BAD = 20
"""Bad files after which packing stops looking for more."""
CHUNK = 16
"""Files that a thread decodes before it hands them over."""


@dataclass(frozen=True)
class Packing:
    """How to pack."""

    encode: Literal["raw", "jpeg"] = "raw"
    on_error: Literal["stop", "skip"] = "stop"
    workers: int = 0  # threads; 0: one for each core
    progress: bool = False


def pack_split(listing: Listing, path: Path, packing: Packing, with_sums: bool) -> dict[str, Any]:
    """Makes `listing` the store `path`, or finishes it, and returns its header. `with_sums`: also what statistics are made of.

    ValueError naming the files that cannot be read, after all others have been packed, and where the disk is full.
    """
    shards = [
        range(start, min(start + store_format.SHARD, len(listing)))
        for start in range(0, len(listing), store_format.SHARD)
    ]
    digests = [
        f"{packing.encode} {SIDE} {store_format.VERSION} {listing.digest(rows)}" for rows in shards
    ]
    bar = tqdm(
        total=len(listing),
        desc=f"packing {listing.folder.name}",
        unit=" images",
        leave=False,
        disable=None if packing.progress else True,
    )
    try:
        with bar, quiet():
            if header := _complete(path, digests, packing):
                return header
            path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            notes = {}
            for number in range(len(shards)):
                if note := _finished(path, number, digests[number], packing, with_sums):
                    notes[number] = note
            bar.initial = bar.n = sum(
                len(shards[number]) for number in notes
            )  # which is not this run's speed
            missing = [number for number in range(len(shards)) if number not in notes]
            bad: list[str] = []
            for number, images, sums in decoded(
                listing, {number: shards[number] for number in missing}, packing, with_sums, bar
            ):
                skipped = [
                    (listing.name(row), image)
                    for row, image in zip(shards[number], images, strict=True)
                    if isinstance(image, str)
                ]
                if skipped and packing.on_error == "stop":
                    bad += [f"{listing.folder / name}: {reason}" for name, reason in skipped]
                    if len(bad) >= MOST_BAD:
                        break
                else:
                    notes[number] = _write(
                        path,
                        number,
                        digests[number],
                        listing,
                        shards[number],
                        images,
                        skipped,
                        sums,
                    )
            if bad:
                raise ValueError(_names(bad))
            return _finish(
                path,
                listing,
                packing,
                [notes[number] for number in range(len(shards))],
                digests,
                with_sums,
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"{path}: no room left for the store ({error.strerror}); make some and repeat the command, finished shards are kept"
            ) from None
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of Pillow's, of odd metadata, one a file; and one thread for each of torch's calls, which are made on all cores at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def _names(bad: Sequence[str]) -> str:
    more = (
        f" (and {len(bad) - SHOWN} more{' so far' if len(bad) >= MOST_BAD else ''})"
        if len(bad) > SHOWN
        else ""
    )
    return f"cannot read {'; '.join(bad[:SHOWN])}{more}; replace or delete what is damaged, or leave it out with --on-error skip"


def decoded(
    listing: Listing, shards: dict[int, range], packing: Packing, with_sums: bool, bar: tqdm
) -> Iterator[tuple[int, list[EncodedImage | str], Sums | None]]:
    """Each of `shards`, decoded: images, or what is wrong with them, in order. Threads work a shard ahead."""
    workers = packing.workers or available_cores()
    sums = {number: Sums() if with_sums else None for number in shards}

    def work(number: int, rows: range) -> list[EncodedImage | str]:
        # One image after another: it is summed while it is still in the processor's cache.
        return [_stored(try_read(listing.path(row)), packing.encode, sums[number]) for row in rows]

    chunks = (
        (number, range(start, min(start + CHUNK, rows.stop)))
        for number, rows in shards.items()
        for start in range(rows.start, rows.stop, CHUNK)
    )
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future] = deque(
            pool.submit(work, *chunk)
            for chunk in islice(chunks, max(store_format.SHARD // CHUNK, 2 * workers))
        )
        try:
            for number, rows in shards.items():
                images: list[EncodedImage | str] = []
                while len(images) < len(rows):
                    some = ahead.popleft().result()
                    ahead.extend(pool.submit(work, *chunk) for chunk in islice(chunks, 1))
                    images += some
                    bar.update(len(some))
                yield number, images, sums.pop(number)
        finally:
            for future in ahead:
                future.cancel()


def _stored(image: np.ndarray | str, encode: str, sums: Sums | None) -> EncodedImage | str:
    if isinstance(image, str):
        return image
    content = EncodedImage(image.shape[-1], image)
    if encode == "jpeg":
        data = encode_jpeg(image)
        content = EncodedImage(image.shape[-1], data)
        image = (
            np.ascontiguousarray(decode_jpeg(data).numpy()) if sums is not None else image
        )  # statistics are of what training will see
    if sums is not None:
        sums.add(image)
    return content


# ---- shards ----------------------------------------------------------------------------------------------------------------


def _note(path: Path, number: int, suffix: str = ".json") -> Path:
    return path / f".note-{number:05d}{suffix}"


def _write(
    path: Path,
    number: int,
    digest: str,
    listing: Listing,
    rows: range,
    images: Sequence[EncodedImage | str],
    skipped: list[tuple[str, str]],
    sums: Sums | None,
) -> dict[str, Any]:
    """A shard and its note."""
    kept = [k for k, image in enumerate(images) if not isinstance(image, str)]
    entry, order, ends = store_format.write_shard(
        path / shard_name(number), [images[k] for k in kept]
    )
    note = {
        "digest": digest,
        "entry": entry,
        "kept": [rows[k] for k in kept],
        "order": order.tolist(),
        "ends": ends.tolist(),
        "skipped": skipped,
    }
    if sums is not None:
        content = sums.to_bytes()
        write_atomically(_note(path, number, ".npz"), content)
        note["sums"] = zlib.crc32(content)
    # The shard's name is on the disk by now, before the note says so.
    write_atomically(_note(path, number), json.dumps(note).encode())
    return note


def _finished(
    path: Path, number: int, digest: str, packing: Packing, with_sums: bool
) -> dict[str, Any] | None:
    """The note of a shard that is whole, of the same files, and of the bytes that the note says."""
    try:
        note = json.loads(_note(path, number).read_bytes())
        data = np.load(
            path / shard_name(number),
            mmap_mode="r" if note["entry"]["bytes"] else None,
            allow_pickle=False,
        )
        whole = (
            note["digest"] == digest
            and not (note["skipped"] and packing.on_error == "stop")
            and data.shape == (note["entry"]["bytes"],)
            and store_format.checksum_of(data) == note["entry"]["checksum"]
            and (
                not with_sums
                or zlib.crc32(_note(path, number, ".npz").read_bytes()) == note["sums"]
            )
        )
        return note if whole else None
    except Exception:  # of many kinds for a damaged shard or note, which is then made again
        return None


def _finish(
    path: Path,
    listing: Listing,
    packing: Packing,
    notes: Sequence[dict[str, Any]],
    digests: Sequence[str],
    with_sums: bool,
) -> dict[str, Any]:
    """Writes what belongs to the whole split, the header last, and clears the notes away."""
    contents, names, sums = StoreIndex(), [], Sums()
    for number, note in enumerate(notes):
        kept, order = note["kept"], np.array(note["order"], np.int64)
        ends = np.array(note["ends"], np.int64) if packing.encode == "jpeg" else None
        contents.add(note["entry"], order, [listing.labels[row] for row in kept], ends)
        names += [listing.name(kept[k]) for k in order]
        if with_sums:
            sums.merge(Sums.from_bytes(_note(path, number, ".npz").read_bytes()))
    own = {"paths.json": (json.dumps(names, indent=0) + "\n").encode()}
    more: dict[str, Any] = {
        "encode": packing.encode,
        "files": listing.digest(),
        "digests": list(digests),
        "skipped": [pair for note in notes for pair in note["skipped"]],
    }
    if with_sums and sums.count:
        own["sums.npz"] = sums.to_bytes()
        statistics = sums.statistics(max(sums.counts))
        more |= {
            "mean": statistics.mean_image.double().mean((1, 2)).tolist(),
            "covariance": statistics.covariance.tolist(),
        }
    for name, content in own.items():
        write_atomically(path / name, content)
    contents.write(
        path,
        listing.classes,
        checksums={name: zlib.crc32(content) for name, content in own.items()},
        **more,
    )
    _tidy(path, len(notes))
    return store_format.read_header(path)


def _tidy(path: Path, shards: int) -> None:
    """Removes notes, and shards of a longer list that was begun here before."""
    remove_leftovers(path)
    for leftover in path.glob(".note-*"):
        leftover.unlink()
    for shard in path.glob("images-*.npy"):
        if shard.name not in {shard_name(number) for number in range(shards)}:
            shard.unlink()


def packed_files(path: Path) -> str | None:
    """`Listing.digest` of what the finished store `path` was packed from; None where it is something else."""
    with contextlib.suppress(ValueError):
        return store_format.read_header(path).get("files")
    return None


def _complete(path: Path, digests: Sequence[str], packing: Packing) -> dict[str, Any] | None:
    """The header of a split that is finished, of these files and undamaged; what is finished otherwise is removed."""
    if not (path / "header.json").exists():
        return None
    with contextlib.suppress(ValueError):
        header = store_format.read_header(path)
        if header.get("digests") == list(digests) and not (
            header["skipped"] and packing.on_error == "stop"
        ):
            Store.open(path, verify=True)
            _tidy(path, len(digests))
            return header
    shutil.rmtree(path)
    return None
