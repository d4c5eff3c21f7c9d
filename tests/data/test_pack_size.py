"""The size that is announced for a pack is that of the images that there are."""

from pathlib import Path

import pytest
from image_sets import write_image

from alexnet_mp.data import pack_size
from alexnet_mp.data.image_folder import list_split
from alexnet_mp.data.image_sets import list_source
from alexnet_mp.data.listing import Listing
from alexnet_mp.data.pack_size import estimated_bytes, size_text


def listing_of(root: Path, sizes: list[tuple[int, int]]) -> Listing:
    for number, size in enumerate(sizes):
        write_image(root / "ab"[number % 2] / f"{number:03d}.png", size)
    return list_split(root)


def test_small_images_are_announced_as_small_as_they_are(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, [(64, 64)] * 10 + [(500, 80)] * 4 + [(700, 600)] * 2)
    assert estimated_bytes([listing], "raw") == 3 * (10 * 64**2 + 4 * 80**2 + 2 * 256**2)
    assert estimated_bytes([listing, listing], "raw") == 2 * estimated_bytes([listing], "raw")


def test_jpegs_are_announced_by_their_pixels(tmp_path: Path) -> None:
    large, small = ([(side, side)] * 4 for side in (300, 64))
    sizes = [
        estimated_bytes([listing_of(tmp_path / "ab"[k], s)], "jpeg")
        for k, s in enumerate((large, small))
    ]
    assert 4 * 40_000 < sizes[0] < 4 * 50_000 and sizes[1] < sizes[0] / 15


def test_a_sample_of_many_images_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = listing_of(tmp_path, [(30 + k % 7, 40) for k in range(200)])
    exact = estimated_bytes([listing], "raw")
    monkeypatch.setattr(pack_size, "SAMPLE", 40)
    opened: list[Path] = []
    side = pack_size.stored_side
    monkeypatch.setattr(pack_size, "stored_side", lambda file: (opened.append(file), side(file))[1])
    assert estimated_bytes([listing], "raw") == pytest.approx(exact, rel=0.05)
    assert len(opened) == 40


def test_files_that_cannot_be_read_count_as_the_others(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, [(20, 20)] * 4)
    for name in ("000.png", "001.png"):
        (tmp_path / "ab"[int(name[2])] / name).write_bytes(b"")
    assert estimated_bytes([listing], "raw") == 4 * 3 * 20**2


def test_sizes_are_told_in_their_own_unit() -> None:
    assert [size_text(count) for count in (48_000, 1.4e9, 261_690_000_000, 2e12, 3e6)] == [
        "48 kB",
        "1.40 GB",
        "261.69 GB",
        "2.00 TB",
        "3.00 MB",
    ]


def test_a_source_lists_its_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        listing_of(tmp_path / split, [(8, 8)] * 4)
    assert estimated_bytes(list_source(tmp_path).values(), "raw") == 8 * 3 * 8 * 8
