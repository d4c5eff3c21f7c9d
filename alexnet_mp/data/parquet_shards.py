"""Parquet as Hugging Face writes it: `image` {bytes, path}, `label`, class names in the schema."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_mp.config.progress import progress
from alexnet_mp.data.archive_index import Problems
from alexnet_mp.data.contents import Bytes, Contents
from alexnet_mp.data.decode import Readable
from alexnet_mp.data.folder_layout import Split
from alexnet_mp.data.labeled_samples import UNLABELED, ListedSet, Samples, list_samples, stem_of
from alexnet_mp.data.listing import UNKNOWN

IMAGE_NAMES = ("image", "img", "jpg", "picture")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
"""Names of columns, the likeliest first, where several would do."""
BATCH = 64
"""Rows that are read at a time: of large photographs they take some ten megabytes."""


class DamagedError(ValueError):
    """A Parquet file that cannot be opened."""


class _Columns(NamedTuple):
    """Where a Parquet file has its images and labels."""

    content: str
    """The column of the images' bytes, with a dot before a field of a struct."""
    path: str | None
    """The column of the images' names, if there is one."""
    label: str
    classes: list[str] | None
    """The class that each number is, as the schema's metadata say."""


@dataclass(frozen=True)
class ParquetImages(Contents):
    """Images in the rows of Parquet files, which are read in groups."""

    files: tuple[Path, ...]
    column: str
    which: np.ndarray  # int32 (N,), the file of each image
    rows: np.ndarray  # int64 (N,), the row in its file
    in_order = True

    def file(self, number: int) -> Bytes:
        return Bytes(next(self.stream(np.array([number])))[1])

    def stream(self, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for which in np.unique(self.which[numbers]).tolist():
            mine = numbers[self.which[numbers] == which]
            yield from self._stream_one(self.files[which], mine)

    def _stream_one(self, path: Path, numbers: np.ndarray) -> Iterator[tuple[int, bytes]]:
        number_of = dict(zip(self.rows[numbers].tolist(), numbers.tolist(), strict=True))
        wanted, first = np.sort(self.rows[numbers]), 0
        with _open(path) as opened:
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                if np.diff(np.searchsorted(wanted, (first, first + count))).any():
                    batches = opened.iter_batches(BATCH, row_groups=[group], columns=[self.column])
                    yield from self._stream_group(path, batches, first, number_of)
                first += count

    def _stream_group(
        self, path: Path, batches: Iterator[Any], first: int, number_of: Mapping[int, int]
    ) -> Iterator[tuple[int, bytes]]:
        row, inner = first, self.column.partition(".")[2]
        while (batch := self._next(path, batches)) is not None:
            values = batch.column(0).field(inner) if inner else batch.column(0)
            for place in range(len(values)):
                if (number := number_of.get(row + place)) is not None:
                    yield number, values[place].as_py() or b""
            row += len(values)

    def _next(self, path: Path, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except (importlib.import_module("pyarrow").ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: rows of it cannot be read, download it again "
                f"({' '.join(str(error).split())})"
            ) from None

    def sample(self, count: int, total: int) -> list[Readable]:
        order = np.lexsort((self.rows, self.which))[:count]
        return [Bytes(content) for _, content in self.stream(order)]

    def location(self, number: int, name: str) -> str:
        return f"{self.files[self.which[number]]}: row {self.rows[number]} ({name})"

    def reordered(self, order: np.ndarray) -> ParquetImages:
        return replace(self, which=self.which[order], rows=self.rows[order])


def read_parquet(
    root: Path,
    files: Mapping[Split, Sequence[Path]],
    flag: str,
    problems: Problems,
    show_progress: bool,
) -> ListedSet:
    """Lists the rows of all files, without their images' bytes.

    ValueError where pyarrow is missing, and for columns that are not as expected.
    """
    samples: dict[Split, Samples] = {}
    contents: dict[Split, Any] = {}
    names: list[str] | None = None
    for split, some in files.items():
        samples[split], which, rows = Samples(), list[int](), list[int]()
        columns: _Columns | None = None
        for number, path in enumerate(
            progress(some, description=f"listing {split}", unit="files", enabled=show_progress)
        ):
            try:
                with _open(path) as opened:
                    columns = _columns(opened.schema_arrow, path, flag)
                    count = _add(samples[split], opened, columns, path)
            except DamagedError as error:
                problems.add(str(error))
                continue
            names = columns.classes or names
            which += [number] * count
            rows += range(count)
        if columns is not None:
            contents[split] = partial(
                _contents, tuple(some), columns.content, np.array(which), np.array(rows)
            )
        else:
            del samples[split]
    if not samples and problems.lines:
        raise ValueError(f"{flag} {root}: no file of it can be read: {problems.lines[0]}")
    return list_samples(root, samples, contents, names, flag)


def _contents(
    files: tuple[Path, ...], column: str, which: np.ndarray, rows: np.ndarray, chosen: np.ndarray
) -> ParquetImages:
    return ParquetImages(
        files, column, which[chosen].astype(np.int32), rows[chosen].astype(np.int64)
    )


def _open(path: Path) -> Any:
    """A ParquetFile. ValueError where pyarrow is missing, and for another or a damaged file."""
    try:
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs the package pyarrow: pip install pyarrow, or "
            "pip install 'alexnet_mp[parquet]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{path}: not a Parquet file, or cut short ({reason})") from None


def _columns(schema: Any, path: Path, flag: str) -> _Columns:
    """The columns that hold images and labels. ValueError, naming those there are, without them."""
    features: dict[str, Any] = {}
    if schema.metadata and (about := schema.metadata.get(b"huggingface")):
        features = json.loads(about).get("info", {}).get("features", {})
    kinds = {
        name: feature.get("_type")
        for name, feature in features.items()
        if isinstance(feature, dict)
    }
    image = _choose(
        schema.names, IMAGE_NAMES, [name for name, kind in kinds.items() if kind == "Image"]
    )
    label = _choose(
        schema.names, LABEL_NAMES, [name for name, kind in kinds.items() if kind == "ClassLabel"]
    )
    if image is None or label is None:
        lacking = "images (image)" if image is None else "labels (label)"
        raise ValueError(
            f"{flag} {path}: has no column of {lacking}, but {', '.join(schema.names)}"
        )
    fields = schema.field(image).type
    names = [fields.field(k).name for k in range(fields.num_fields)]
    if names and "bytes" not in names:
        raise ValueError(f"{flag} {path}: {image} has no field bytes, but {', '.join(names)}")
    classes = features.get(label, {}).get("names")
    return _Columns(
        f"{image}.bytes" if names else image,
        f"{image}.path" if "path" in names else None,
        label,
        classes,
    )


def _choose(names: Sequence[str], usual: Sequence[str], typed: Sequence[str]) -> str | None:
    """The column of the type that is wanted, or one with a usual name."""
    candidates = [name for name in typed if name in names] or list(names)
    if len(candidates) == 1 and typed:
        return candidates[0]
    return next((name for name in usual if name in candidates), None)


def _add(samples: Samples, opened: Any, columns: _Columns, path: Path) -> int:
    """Adds all rows of a file, and returns how many they are."""
    wanted = [columns.label, *([columns.path] if columns.path else [])]
    table = opened.read(columns=wanted)
    labels = table.column(columns.label).to_pylist()
    names: list[str] = [""] * len(labels)
    if columns.path:
        head, _, inner = columns.path.partition(".")
        names = [(name or {}).get(inner) or "" for name in table.column(head).to_pylist()]
    count = len(labels)
    samples.keys += names
    samples.labels += [UNLABELED if label is None else label for label in labels]
    samples.places += [stem_of(path.name)] * count
    samples.sizes += [UNKNOWN] * count
    samples.times += [path.stat().st_mtime_ns] * count
    samples.rows += range(len(samples.rows), len(samples.rows) + count)
    return count
