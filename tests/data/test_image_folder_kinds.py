"""Odd things in image folders are followed, left out and counted, noted, or refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from image_sets import load_folder, make_folder, write_image

from alexnet_mp.data.directory import is_image
from alexnet_mp.data.image_sets import list_source

pytestmark = pytest.mark.usefixtures("cache")


def test_images_in_folders_of_a_class_belong_to_the_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    write_image(root / "train" / "dog" / "terrier" / "small" / "1.png")
    assert list_source(root)["train"].labels.tolist().count(1) == 11


def test_pipes_devices_and_broken_or_circular_links_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    os.mkfifo(root / "train" / "cat" / "pipe.jpg")
    (root / "train" / "cat" / "null.jpg").symlink_to("/dev/zero")
    (root / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "train" / "cat" / "again").symlink_to(root / "train")
    (root / "train" / "cat" / "self.jpg").symlink_to(root / "train" / "cat" / "self.jpg")
    splits = load_folder(root)
    assert len(splits.train) + len(splits.val) == 20
    assert "ignored 5 pipes, devices, broken or circular links" in capsys.readouterr().out


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    write_image(tmp_path / "elsewhere" / "1.png")
    (root / "train" / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    for split in ("train", "test"):
        (root / split / "eel").symlink_to(tmp_path / "elsewhere")
    listing = list_source(root)["train"]
    assert listing.classes == ("cat", "dog", "eel")
    assert np.bincount(listing.labels).tolist() == [10, 11, 1]


@pytest.mark.parametrize(
    "name, expected",
    [("a.JPEG", True), ("a.b.png", True), ("jpg", False), ("jpg.txt", False), ("a.", False)],
)
def test_an_images_name_ends_in_a_dot_and_an_extension(name: str, expected: bool) -> None:
    assert is_image(name) is expected


def test_names_that_are_no_images_are_counted_by_extension(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    for name in ("a.txt", "b.txt", "Thumbs.db", "desktop.ini", "README"):
        (root / "train" / "cat" / name).write_text("x")
    (root / "train" / "labels.csv").write_text("x")
    load_folder(root)
    assert (
        "6 files whose names are not an image's (.txt 2, .csv 1, no extension 1, .db 1, .ini 1)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "names, words",
    [
        (("1", "2", "10"), "the classes are numbers, sorted as text (1, 10, 2 ...)"),
        (("01", "02", "10"), ""),
        (
            ("Cat", "cat", "dog"),
            "differ only in upper and lower case are different classes: Cat, cat",
        ),
    ],
)
def test_names_of_classes_that_may_surprise_are_told(
    tmp_path: Path, names: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load_folder(make_folder(tmp_path / "set", classes=names))
    out = capsys.readouterr().out
    assert words in out and ("note:" in out) == bool(words) and out.count("note:") <= 1


def test_a_name_that_is_not_utf8_is_shown_escaped_and_packed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    for split in ("train", "test"):
        folder = os.fsencode(root / split) + b"/caf\xe9"
        os.mkdir(folder)
        write_image(Path(os.fsdecode(folder)) / os.fsdecode(b"\xff.png"))
    store = load_folder(root).test
    assert store.classes == ("caf\\xe9", "cat", "dog") and store.paths[0] == "caf\\xe9/\\xff"
    "".join(store.classes).encode()


def test_skipping_lists_the_bad_files_at_every_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    (root / "train" / "dog" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dog/3\.png: an empty file.*--on-error skip"):
        load_folder(root)
    for _ in range(2):
        splits = load_folder(root, on_error="skip")
        assert len(splits.train) + len(splits.val) == 19
        assert (
            "train: left out 1 files that cannot be read: dog/3.png: an empty file"
            in capsys.readouterr().out
        )
    with pytest.raises(ValueError, match=r"dog/3\.png"):
        load_folder(root)  # what was packed by skipping is not what stopping would train on


def test_folders_too_deep_within_each_other_are_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    write_image(root.joinpath("train", "cat", *["x"] * 70, "1.png"))
    with pytest.raises(ValueError, match="more than 64 folders within each other"):
        load_folder(root)
