"""The rehearsal of ImageNet's size, at a size for a test: links, and what a start takes."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import imagenet_scale as scale  # noqa: E402

COUNTS = {"train": 37, "val": 9}


def test_images_are_links_to_a_few_files_spread_evenly_over_the_classes(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(scale, "ORIGINALS", 5)
    assert scale.make_images(tmp_path, COUNTS, classes=4) == 5
    classes = sorted((tmp_path / "images" / "train").iterdir())
    assert [len(list(folder.iterdir())) for folder in classes] == [9, 9, 9, 10]
    files = list((tmp_path / "images").glob("*/*/*.JPEG"))
    assert len(files) == 46 and len({file.stat().st_ino for file in files}) == 5
    assert scale.list_images(tmp_path)["images"] == 46


def test_no_file_gets_more_names_than_the_file_system_allows(tmp_path: Path, monkeypatch) -> None:
    """With 10 names a file, of which half are used, 3,000 images need 600 files."""
    monkeypatch.setattr(os, "pathconf", lambda *_: 10)
    assert scale.count_originals(tmp_path, 3000) == 600
    monkeypatch.setattr(os, "pathconf", lambda *_: 65_000)
    assert scale.count_originals(tmp_path, 1_331_167) == 256


def test_a_file_system_without_inodes_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch
) -> None:
    status = os.statvfs_result((4096, 4096, 1, 1, 1, 100, 50, 50, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    with pytest.raises(ValueError, match=r"50 inodes are free there, and 264 needed"):
        scale.make_images(tmp_path / "new", COUNTS, classes=4)
    assert not list((tmp_path / "new").iterdir())


def test_a_second_start_from_a_folder_opens_none_of_its_files(tmp_path: Path) -> None:
    scale.make_images(tmp_path, COUNTS, classes=4)
    assert scale.pack_images(tmp_path)["images"] == 46
    scale.link_store(tmp_path)
    assert scale.open_store(tmp_path) == {"images": 37, "shards": 1}
    start = scale.first_step(tmp_path, "folder")
    assert start["image_files_opened"] == 0 and 0 < start["open_files"] < 64
    assert start["cpu_seconds"] > 0 and start["own_memory_bytes"] < start["peak_memory_bytes"]


class Pipe(list):
    """A pipe's end that keeps what is sent."""

    send = list.append


def test_a_part_sends_its_result_with_figures_or_why_it_failed(tmp_path: Path) -> None:
    scale.make_images(tmp_path / "set", COUNTS, classes=4)
    sent = Pipe()
    scale._measure(sent, scale.list_images, tmp_path / "set")
    scale._measure(sent, scale.open_store, tmp_path)
    assert sent[0]["images"] == 46 and sent[0]["memory_bytes"] > sent[0]["seconds"] > 0
    assert "header.json: not there" in sent[1]
