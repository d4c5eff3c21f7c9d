"""Decodes images in the order of an archive, and collects them into shards in a store's order.

A compressed archive can only be read from its start, and the rows of Parquet only in groups. So it
is read once, in its own order, and each image waits for the others of its shard: in memory, and
beyond BUDGET in the file `.begun-NUMBER` of its shard. A killed packing goes on from those files.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet_mp.config.progress import Progress
from alexnet_mp.data import store_format
from alexnet_mp.data.contents import Bytes
from alexnet_mp.data.decode import decode_jpeg, try_read
from alexnet_mp.data.decode_pool import CHUNK, DecodedShard, Packing, encoded
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.statistics import Sums
from alexnet_mp.data.store_writer import EncodedImage
from alexnet_mp.ops.cpu_cores import available_cores

BUDGET = 2**30
"""Bytes of images that wait in memory for the others of their shards."""
_RECORD = struct.Struct("<qqqQ")
"""In a begun file, before each image: row, side, bytes of its file, bytes that follow."""
_CHECKSUM = struct.Struct("<I")
"""After it, before the image: CRC-32 of both."""
_UNREADABLE = -1
"""In place of the side: what follows is not an image but why there is none."""


class _Image(NamedTuple):
    """A decoded image, or why there is none; and the size of its file."""

    image: EncodedImage | str
    size: int

    def data(self) -> bytes | memoryview:
        if isinstance(self.image, str):
            return self.image.encode()
        data = self.image.data
        return data if isinstance(data, bytes) else data.reshape(-1).data


def decoded_as_streamed(
    listing: Listing, rows: np.ndarray, packing: Packing, progress: Progress[None]
) -> Iterator[tuple[int, EncodedImage | str, int]]:
    """The images `rows` in the order of their archive: row; image, or why not; bytes of its file.

    Threads decode while this one reads the archive.
    """
    workers = packing.workers or available_cores()

    def work(chunk: Sequence[tuple[int, bytes]]) -> list[tuple[int, EncodedImage | str, int]]:
        return [
            (row, encoded(try_read(Bytes(content)), packing.encode, None), len(content))
            for row, content in chunk
        ]

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[tuple[int, EncodedImage | str, int]]]] = deque()
        try:
            for chunk in _chunks(listing.contents.stream(rows)):
                ahead.append(pool.submit(work, chunk))
                if len(ahead) > 2 * workers:
                    progress.update(len(done := ahead.popleft().result()))
                    yield from done
            while ahead:
                progress.update(len(done := ahead.popleft().result()))
                yield from done
        finally:
            for future in ahead:
                future.cancel()


class ShardCollector:
    """The shards of one split, each yielded when all of its images have come."""

    def __init__(
        self,
        folder: Path,
        listing: Listing,
        shards: Mapping[int, range],
        digests: Sequence[str],
        packing: Packing,
        with_sums: bool,
    ) -> None:
        """`digests`: what each shard is made of; files that were begun with another are removed."""
        self.folder, self.listing, self.shards = folder, listing, dict(shards)
        self.digests, self.packing, self.with_sums = digests, packing, with_sums
        self.waiting: dict[int, dict[int, _Image]] = {}
        self.held = 0  # bytes in `waiting`
        self.begun: dict[int, dict[int, int]] = {}  # where each row is in its shard's begun file

    def decoded(self, progress: Progress[None]) -> Iterator[DecodedShard]:
        """Reads the archive once, and what turns out to be damaged on the disk once more."""
        for number in self.shards:
            self._open_begun(number)
        progress.restart(progress.count + sum(map(len, self.begun.values())))
        while self.shards:
            yield from self._complete(list(self.shards))
            wanted, count = np.array(list(self._missing()), np.int64), 0
            streamed = decoded_as_streamed(self.listing, wanted, self.packing, progress)
            for row, image, size in streamed:
                number, count = row // store_format.SHARD, count + 1
                self.waiting.setdefault(number, {})[row] = found = _Image(image, size)
                self.held += len(found.data())
                yield from self._complete([number])
                if self.held > BUDGET:
                    self._write_begun()
            if count < len(wanted):
                raise ValueError(
                    f"{self.listing.folder}: changed while it was read; repeat the command"
                )

    def _missing(self) -> Iterator[int]:
        for number, rows in self.shards.items():
            there = self.begun.get(number, {}).keys() | self.waiting.get(number, {}).keys()
            yield from (row for row in rows if row not in there)

    def _complete(self, numbers: Iterable[int]) -> Iterator[DecodedShard]:
        """Those of the shards `numbers` that have all their images."""
        for number in numbers:
            waiting, begun = self.waiting.get(number, {}), self.begun.get(number, {})
            if len(waiting) + len(begun) < len(self.shards[number]):
                continue
            images = self._read_begun(number) | waiting
            if len(images) < len(self.shards[number]):  # damaged: read the archive for it again
                continue
            ordered = [images[row] for row in self.shards[number]]
            self.held -= sum(len(image.data()) for image in waiting.values())
            self.waiting.pop(number, None)
            found = [image.image for image in ordered]
            sizes = [image.size for image in ordered]
            yield DecodedShard(number, found, self._sums(found), sizes)
            # The shard has been written when this goes on.
            del self.shards[number]
            self.begun.pop(number, None)
            self._path(number).unlink(missing_ok=True)

    def _sums(self, images: Sequence[EncodedImage | str]) -> Sums | None:
        """The sums of what training will see."""
        if not self.with_sums:
            return None
        sums = Sums()

        def add(image: EncodedImage | str) -> None:
            if isinstance(image, str):
                return
            data = image.data
            if isinstance(data, bytes):
                data = np.ascontiguousarray(decode_jpeg(data).numpy())
            sums.add(data)

        with ThreadPoolExecutor(self.packing.workers or available_cores()) as pool:
            deque(pool.map(add, images), maxlen=0)
        return sums

    # ---- files of begun shards ----

    def _path(self, number: int) -> Path:
        return self.folder / f"{store_format.BEGUN}{number:05d}"

    def _head(self, number: int) -> bytes:
        return self.digests[number].encode() + b"\n"

    def _write_begun(self) -> None:
        """Moves all images that wait in memory to the files of their shards."""
        for number, images in sorted(self.waiting.items()):
            with self._path(number).open("ab") as file:
                if not file.tell():
                    file.write(self._head(number))
                for row, image in images.items():
                    data = image.data()
                    side = image.image.side if isinstance(image.image, tuple) else _UNREADABLE
                    self.begun.setdefault(number, {})[row] = file.tell()
                    head = _RECORD.pack(row, side, image.size, len(data))
                    file.write(head)
                    file.write(_CHECKSUM.pack(zlib.crc32(data, zlib.crc32(head))))
                    file.write(data)
        self.waiting, self.held = {}, 0

    def _open_begun(self, number: int) -> None:
        """Finds the images in the file of a shard, and cuts off one that a kill left half."""
        path, head, found = self._path(number), self._head(number), {}
        if not path.exists():
            return
        with path.open("r+b") as file:
            total = os.fstat(file.fileno()).st_size
            whole = place = len(head) if file.read(len(head)) == head else 0
            while place and len(record := file.read(_RECORD.size)) == _RECORD.size:
                row, _, _, length = _RECORD.unpack(record)
                place += _RECORD.size + _CHECKSUM.size + length
                if place > total or row not in self.shards[number]:
                    break
                found[row], whole = whole, place
                file.seek(place)
            file.truncate(whole)
        if found:
            self.begun[number] = found

    def _read_begun(self, number: int) -> dict[int, _Image]:
        """The images in the file of a shard; where one is damaged, the file counts no longer."""
        found: dict[int, _Image] = {}
        if not (places := self.begun.get(number)):
            return found
        with (
            contextlib.suppress(ValueError, OSError, struct.error),
            self._path(number).open("rb") as file,
        ):
            for row, place in places.items():
                file.seek(place)
                head = file.read(_RECORD.size)
                same, side, size, length = _RECORD.unpack(head)
                (checksum,) = _CHECKSUM.unpack(file.read(_CHECKSUM.size))
                data = file.read(length)
                if same != row or zlib.crc32(data, zlib.crc32(head)) != checksum:
                    raise ValueError("damaged")
                found[row] = _Image(self._image(side, data), size)
            return found
        del self.begun[number]
        self._path(number).unlink(missing_ok=True)
        return {}

    def _image(self, side: int, data: bytes) -> EncodedImage | str:
        if side == _UNREADABLE:
            return data.decode()
        if self.packing.encode == "jpeg":
            return EncodedImage(side, data)
        return EncodedImage(side, np.frombuffer(data, np.uint8).reshape(3, side, side))


def _chunks(
    items: Iterator[tuple[int, bytes]],
) -> Iterator[list[tuple[int, bytes]]]:
    while chunk := list(islice(items, CHUNK)):
        yield chunk
