"""Packs the images of one split into a store, on all cores; a kill costs no more than a shard.

A shard is decoded, written and synced; then its manifest, which has the checksum and what the
header will need of it. On resume, shards whose manifest and checksum match are reused. A store is a
function of the files alone, so an interrupted one ends with the same bytes as any other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_mp.config.files import OUT_OF_SPACE, remove_leftovers, write_atomically
from alexnet_mp.config.progress import Progress, progress
from alexnet_mp.data import store_format, store_writer
from alexnet_mp.data.decode import SIDE
from alexnet_mp.data.decode_pool import DecodedShard, Packing, decoded, quiet_decoding
from alexnet_mp.data.listing import UNKNOWN, Listing
from alexnet_mp.data.statistics import Sums
from alexnet_mp.data.store import Store
from alexnet_mp.data.store_format import open_array, shard_name
from alexnet_mp.data.store_writer import StoreIndex
from alexnet_mp.data.streamed_decoding import ShardCollector

SHOWN = 3
"""Unreadable files that one message names."""
MOST_BAD = 20
"""Unreadable files after which packing stops to look for more."""


def pack_split(listing: Listing, path: Path, packing: Packing, with_sums: bool) -> dict[str, Any]:
    """Makes `listing` the store `path`, or finishes it, and returns its header.

    `with_sums`: the store also gets the sums from which statistics are made. ValueError naming the
    files that cannot be read, after all others are packed, and where the disk is full.
    """
    try:
        with quiet_decoding():
            return _SplitPacker(listing, path, packing, with_sums).pack()
    except OSError as error:
        if error.errno in OUT_OF_SPACE | {errno.EFBIG}:
            raise ValueError(
                f"{path}: no room left for the store ({error.strerror}); make some and repeat the "
                "command, finished shards are kept"
            ) from None
        raise


def holds_same_files(path: Path, listing: Listing) -> bool:
    """Whether the store `path` is finished and of the files of `listing` as they are now.

    A store says nothing of the times of its files, so that all forms of a data set give the same.
    But the time of its header is that of the latest: files with a later one have changed.
    """
    with contextlib.suppress(ValueError, OSError):
        header = store_format.read_header(path)
        return bool(
            header.get("files") == listing.identity()
            and (UNKNOWN in listing.sizes or header.get("sizes") == _digest(listing.sizes))
            and _latest(listing) <= (path / "header.json").stat().st_mtime_ns
        )
    return False


class _SplitPacker:
    """One split on its way into the store `path`."""

    def __init__(self, listing: Listing, path: Path, packing: Packing, with_sums: bool) -> None:
        self.listing, self.path, self.packing, self.with_sums = listing, path, packing, with_sums
        self.shards = [
            range(start, min(start + store_format.SHARD, len(listing)))
            for start in range(0, len(listing), store_format.SHARD)
        ]
        kind = f"{packing.encode} {SIDE} {store_format.VERSION}"
        self.digests = [f"{kind} {listing.digest(rows)}" for rows in self.shards]

    def pack(self) -> dict[str, Any]:
        if header := self._finished_before():
            return header
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        bar = progress(
            total=len(self.listing),
            description=f"packing {self.listing.folder.name}",
            unit="images",
            enabled=self.packing.progress,
        )
        with bar:
            missing = {n: rows for n, rows in enumerate(self.shards) if not self._reusable(n)}
            # Reused shards are not this run's speed.
            bar.restart(len(self.listing) - sum(map(len, missing.values())))
            bad: list[str] = []
            for shard in self._decoded(missing, bar):
                skipped = self._unreadable(shard)
                if not skipped or self.packing.on_error == "skip":
                    self._write(shard, [(self.listing.name(row), why) for row, why in skipped])
                else:
                    bad += [f"{self.listing.location(row)}: {why}" for row, why in skipped]
                    if len(bad) >= MOST_BAD:
                        break
        if bad:
            raise ValueError(_unreadable_message(bad))
        return self._finish()

    def _decoded(self, missing: Mapping[int, range], bar: Progress[None]) -> Iterator[DecodedShard]:
        if not self.listing.contents.in_order:
            return decoded(self.listing, missing, self.packing, self.with_sums, bar)
        return ShardCollector(
            self.path, self.listing, missing, self.digests, self.packing, self.with_sums
        ).decoded(bar)

    def _unreadable(self, shard: DecodedShard) -> list[tuple[int, str]]:
        """The row of each file of a shard that cannot be read, and why."""
        return [
            (row, image)
            for row, image in zip(self.shards[shard.number], shard.images, strict=True)
            if isinstance(image, str)
        ]

    def _manifest_path(self, number: int, suffix: str = ".json") -> Path:
        return self.path / f".manifest-{number:05d}{suffix}"

    def _write(self, decoded: DecodedShard, skipped: Sequence[tuple[str, str]]) -> None:
        """Writes a shard, and its manifest when the shard is on the disk."""
        number, images, sums, sizes = decoded
        readable = {
            row: image
            for row, image in zip(self.shards[number], images, strict=True)
            if not isinstance(image, str)
        }
        shard = store_writer.write_shard(self.path / shard_name(number), list(readable.values()))
        manifest = {
            "digest": self.digests[number],
            "entry": shard.entry,
            "kept": list(readable),
            "order": shard.order.tolist(),
            "ends": shard.ends.tolist(),
            "skipped": skipped,
            "sizes": sizes,
        }
        if sums is not None:
            content = sums.to_bytes()
            write_atomically(self._manifest_path(number, ".npz"), content)
            manifest["sums"] = zlib.crc32(content)
        write_atomically(self._manifest_path(number), json.dumps(manifest))

    def _manifest(self, number: int) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(self._manifest_path(number).read_bytes())
        return manifest

    def _reusable(self, number: int) -> bool:
        """Whether a shard is whole, of the same files, and has the bytes that its manifest says."""
        try:
            manifest = self._manifest(number)
            if manifest["digest"] != self.digests[number]:
                return False
            if manifest["skipped"] and self.packing.on_error == "stop":
                return False
            entry = manifest["entry"]
            open_array(
                self.path, shard_name(number), np.uint8, (entry["bytes"],), entry["checksum"]
            )
            if not self.with_sums:
                return True
            sums = zlib.crc32(self._manifest_path(number, ".npz").read_bytes())
            return bool(sums == manifest["sums"])
        except Exception:  # of many kinds for a damaged shard or manifest, which is then made again
            return False

    def _finish(self) -> dict[str, Any]:
        """Writes the files of the whole split, the header last, and removes the manifests."""
        index, names, sums, sizes = StoreIndex(), bytearray(), Sums(), array("q")
        skipped: list[Sequence[str]] = []
        for number in range(len(self.shards)):
            manifest = self._manifest(number)
            kept, order = (
                np.array(manifest["kept"], np.int64),
                np.array(manifest["order"], np.int64),
            )
            ends = np.array(manifest["ends"], np.int64) if self.packing.encode == "jpeg" else None
            index.add(manifest["entry"], order, self.listing.labels[kept], ends)
            for row in kept[order].tolist():
                names += b",\n" if names else b""
                names += json.dumps(self.listing.stored_name(row)).encode()
            skipped += manifest["skipped"]
            sizes.extend(manifest["sizes"])
            if self.with_sums:
                content = self._manifest_path(number, ".npz").read_bytes()
                sums.merge(Sums.from_bytes(content))
        files = {"paths.json": b"[\n" + bytes(names) + b"\n]\n"}
        more: dict[str, Any] = {}
        if self.with_sums and sums.count:
            files["sums.npz"] = sums.to_bytes()
            statistics = sums.statistics(max(sums.counts))
            more["mean"] = statistics.mean_image.double().mean((1, 2)).tolist()
            more["covariance"] = statistics.covariance.tolist()
        for name, content in files.items():
            write_atomically(self.path / name, content)
        index.write(
            self.path,
            self.listing.classes,
            {name: zlib.crc32(content) for name, content in files.items()},
            encode=self.packing.encode,
            files=self.listing.identity(),
            sizes=_digest(np.array(sizes, np.int64)),
            skipped=skipped,
            **more,
        )
        latest = _latest(self.listing)
        os.utime(self.path / "header.json", ns=(latest, latest))  # for `holds_same_files`
        self._tidy()
        return store_format.read_header(self.path)

    def _finished_before(self) -> dict[str, Any] | None:
        """The header of the store, if it is finished, of these files and undamaged.

        Any other finished store is removed.
        """
        if not (self.path / "header.json").exists():
            return None
        with contextlib.suppress(ValueError):
            header = store_format.read_header(self.path)
            refused = header["skipped"] and self.packing.on_error == "stop"
            same = header.get("encode") == self.packing.encode
            if same and holds_same_files(self.path, self.listing) and not refused:
                Store.open(self.path, verify=True)
                self._tidy()
                return header
        shutil.rmtree(self.path)
        return None

    def _tidy(self) -> None:
        """Removes manifests, temporaries, and shards of a longer list that was begun here."""
        remove_leftovers(self.path)
        own = {shard_name(number) for number in range(len(self.shards))}
        leftovers = [
            *self.path.glob(".manifest-*"),
            *self.path.glob(f"{store_format.BEGUN}*"),
        ]
        others = (shard for shard in self.path.glob("images-*.npy") if shard.name not in own)
        for file in [*leftovers, *others]:
            file.unlink()


def _latest(listing: Listing) -> int:
    """When the file was changed that was changed last, in nanoseconds."""
    return int(listing.times.max(initial=0))


def _digest(values: np.ndarray) -> str:
    return hashlib.blake2b(values.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _unreadable_message(bad: Sequence[str]) -> str:
    more = ""
    if len(bad) > SHOWN:
        more = f" (and {len(bad) - SHOWN} more{' so far' if len(bad) >= MOST_BAD else ''})"
    return (
        f"cannot read {'; '.join(bad[:SHOWN])}{more}; replace or delete what is damaged, "
        "or leave it out with --on-error skip"
    )
