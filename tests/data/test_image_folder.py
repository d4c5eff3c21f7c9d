"""An image folder is listed, packed once, and refused in one line where it cannot be trained on."""

import os
import tarfile
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import levels, load_folder, make_folder, random_store, write_image
from PIL import Image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import decode, decode_pool, folder_cache, load, store_format
from alexnet_mp.data.image_folder import list_split

CIFAR_JPEG = Path(__file__).resolve().parents[3] / "shared/data/cifar10-jpeg.tar.gz"
IMAGENET = Path(__file__).resolve().parents[3] / "shared/data/imagenet-samples.tar"
pytestmark = pytest.mark.usefixtures("cache")


def test_one_folder_beside_train_is_the_test_split_whatever_its_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train", "val"))
    splits = load_folder(root)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [18, 2, 20]
    assert sorted(levels(splits.train) + levels(splits.val)) == list(range(20))
    assert levels(splits.test) == list(range(20, 40))


def test_val_and_test_together_are_what_they_say(tmp_path: Path) -> None:
    splits = load_folder(make_folder(tmp_path / "set", ("train", "val", "test")))
    assert [levels(store) for store in (splits.train, splits.val, splits.test)] == [
        list(range(k, k + 20)) for k in (0, 20, 40)
    ]


def test_classes_are_the_folders_sorted_by_name(tmp_path: Path) -> None:
    splits = load_folder(make_folder(tmp_path / "set", classes=("zebra", "café", "ant")))
    assert splits.train.classes == ("ant", "café", "zebra")
    assert (
        levels(splits.test)[0] == 50 and splits.test.labels[0] == 0
    )  # of ant, which was written last


def test_hidden_files_and_those_of_a_mac_archive_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/2.png", "cat/._3.png", "cat/.hidden/4.png"):
        write_image(root / "train" / name)
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    splits = load_folder(root)
    assert splits.train.classes == ("cat", "dog") and len(splits.train) + len(splits.val) == 20
    assert "ignored 4 hidden files or folders, 1 files whose names" in capsys.readouterr().out


def test_extensions_count_in_either_case_and_content_decides_the_format(
    tmp_path: Path,
) -> None:
    root = make_folder(tmp_path / "set")
    write_image(root / "train" / "cat" / "a.JPEG", format="PNG")
    for name in ("b.JPG", "c.jfif", "d.gif", "e.webp", "f.tiff", "g.bmp"):
        write_image(root / "train" / "cat" / name, format="JPEG" if name == "c.jfif" else None)
    splits = load_folder(root)
    assert len(splits.train) + len(splits.val) == 27


@pytest.mark.parametrize(
    "content, reason",
    [(b"", "an empty file"), (b"<!DOCTYPE html>", "not an image"), (None, "runcated")],
)
def test_a_bad_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    root = make_folder(tmp_path / "set")
    bad = root / "train" / "dog" / "bad.jpg"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(bad)
        content = bad.read_bytes()[:2000]
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"dog/bad\.jpg: .*" + reason) as caught:
        load_folder(root)
    assert "\n" not in str(caught.value)


def test_several_bad_files_are_named_at_once_and_no_cache_is_left(
    tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "set")
    for i in range(5):
        (root / "train" / "dog" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad0.*bad2.*\(and 2 more\)"):
        load_folder(root)
    assert not list(cache.glob("folder-*"))


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    (root / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="train/eel has no images"):
        load_folder(root)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_of_one_split_only_is_named(tmp_path: Path, split: str) -> None:
    root = make_folder(tmp_path / "set")
    write_image(root / split / "eel" / "1.png")
    with pytest.raises(ValueError, match="same classes: eel"):
        load_folder(root)


def test_images_that_are_not_sorted_into_classes_are_recognized(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train",))
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="no class folders, but 1 images: sort them"):
        load_folder(root)


@pytest.mark.parametrize("data", ["folder", "store"])
def test_a_missing_folder_is_told_with_flag_path_and_what_was_expected(
    tmp_path: Path, data: str
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"--data-dir .*nowhere: no such folder; expected one with"
    ):
        load(DataConfig(data=data, data_dir=str(tmp_path / "nowhere")), 0)
    (tmp_path / "set" / "test").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*set: no folder train in it"):
        load(DataConfig(data=data, data_dir=str(tmp_path / "set")), 0)


def test_a_folder_is_packed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    first = load_folder(root)
    out = capsys.readouterr().out
    assert [f"packing 20 images of {root / name}" in out for name in ("train", "test")] == [
        True
    ] * 2
    monkeypatch.setattr(folder_cache, "pack_split", None)
    assert levels(load_folder(root).train) == levels(first.train)
    assert "packing" not in capsys.readouterr().out


def test_a_changed_folder_is_packed_again_and_the_old_pack_is_named(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set")
    load_folder(root)
    before = set(cache.iterdir())
    write_image(root / "test" / "dog" / "0.png", color=(255, 255, 255))
    capsys.readouterr()
    assert 255 in levels(load_folder(root).test)
    out = capsys.readouterr().out
    assert [
        f"{root}/test has changed since it was packed into {old}, which can be deleted" in out
        for old in sorted(before, key=lambda path: (path / "test").is_dir())
    ] == [False, True]
    assert out.count("has changed") == 1


def test_shards_before_a_damaged_file_are_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_format, "SHARD", 4)
    root = make_folder(tmp_path / "set")
    damaged = root / "train" / "dog" / "9.png"  # the last file of train
    content = damaged.read_bytes()
    damaged.write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"9\.png: .*; replace or delete what is damaged"):
        load_folder(root)
    damaged.write_bytes(content)
    decoded: list[Path] = []
    read = decode_pool.try_read
    monkeypatch.setattr(decode_pool, "try_read", lambda file: (decoded.append(file), read(file))[1])
    load_folder(root)
    assert len(decoded) == 4 + 20  # the shard that it was in, and test


def test_a_cache_that_cannot_be_written_gives_way_to_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = make_folder(tmp_path / "set")
    first = load_folder(root)
    assert list(root.glob(".alexnet_mp/folder-*"))
    again = load_folder(
        root
    )  # the packs are no classes, even where classes lie in the folder itself
    assert load_folder(root / "train").train.classes == again.train.classes == first.train.classes


def test_a_stored_set_is_read_from_its_folder(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        random_store(seed=seed).save(tmp_path / "set" / name)
    splits = load(DataConfig(data="store", data_dir=str(tmp_path / "set")), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [36, 4, 40]
    assert torch.equal(splits.test.gather([5]), random_store(seed=1).gather([5]))


def test_a_listing_takes_bytes_and_not_objects_for_each_image(tmp_path: Path) -> None:
    original = write_image(tmp_path / "a.png")
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(2000):
            os.link(original, tmp_path / "set" / name / f"n01440764_{k:05}.JPEG")
    tracemalloc.start()
    listing = list_split(tmp_path / "set")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listing) == 4000 and listing.name(3999) == "dog/n01440764_01999.JPEG"
    assert kept / 4000 < 100 and peak < 4e6  # 1.3 million images: 130 MB


def test_a_listings_digest_tells_names_sizes_times_and_classes_apart(tmp_path: Path) -> None:
    def digests(change: Callable[[Path], object]) -> tuple[str, str, str]:
        root = make_folder(tmp_path / str(len(list(tmp_path.iterdir()))), ("",))
        for file in root.rglob("*.png"):
            os.utime(file, ns=(10**18, 10**18))
        change(root)
        listing = list_split(root)
        return listing.digest(), listing.digest(range(10)), listing.digest(range(10, 20))

    def write(root: Path) -> None:
        (root / "dog" / "9.png").write_bytes(b"other")
        os.utime(root / "dog" / "9.png", ns=(10**18, 10**18))

    same = digests(lambda root: None)
    assert digests(lambda root: None) == same and same[1] != same[2]
    for change in (
        write,
        lambda root: os.utime(root / "dog" / "9.png", ns=(10**18, 10**18 + 1)),
        lambda root: (root / "dog" / "9.png").rename(root / "dog" / "91.png"),
        lambda root: (root / "dog").rename(root / "eel"),
    ):
        whole, first, second = digests(change)
        assert whole != same[0] and first == same[1] and second != same[2]
    added = digests(lambda root: write_image(root / "ant" / "0.png"))
    assert added[0] != same[0]


def pixel(path: Path) -> list[int]:
    image = decode.read_image(path)
    return image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()


def test_gray_images_have_three_equal_channels(tmp_path: Path) -> None:
    assert pixel(write_image(tmp_path / "a.png", mode="L", color=77)) == [77, 77, 77]


def test_a_cmyk_jpeg_is_converted_to_rgb(tmp_path: Path) -> None:
    assert pixel(
        write_image(tmp_path / "a.jpg", mode="CMYK", color=(0, 255, 255, 0), quality=100)
    ) == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize(
    "mode, color, gray",
    [("RGBA", (255, 0, 0, 0), 255), ("RGBA", (0, 0, 0, 128), 127), ("LA", (0, 0), 255)],
)
def test_transparency_lies_on_white(
    tmp_path: Path, mode: str, color: tuple[int, ...], gray: int
) -> None:
    assert pixel(write_image(tmp_path / "a.png", mode=mode, color=color)) == [gray] * 3


def test_a_palette_gives_its_colors_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=1)
    assert pixel(tmp_path / "a.png") == [10, 20, 30] and pixel(tmp_path / "b.png") == [255] * 3


@pytest.mark.parametrize("value, expected", [(0, 0), (1000, 4), (32896, 128), (65535, 255)])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_become_eight_instead_of_white(
    tmp_path: Path, name: str, value: int, expected: int
) -> None:
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / name)
    assert pixel(tmp_path / name) == [expected] * 3


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255  # white above
    exif = Image.Exif()
    for orientation, stored in (
        (1, upright),
        (3, upright[::-1, ::-1]),
        (6, np.rot90(upright)),
        (8, np.rot90(upright, -1)),
    ):
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(
            tmp_path / "a.jpg", exif=exif, quality=95
        )
        image = decode.read_image(tmp_path / "a.jpg").astype(int)
        assert image[:, :14].min() > 230 and image[:, 18:].max() < 25, orientation


def test_odd_metadata_neither_warns_nor_fails(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    path = write_image(root / "train" / "cat" / "odd.jpg")
    content = path.read_bytes()
    # It announces five entries and ends in the first.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0"
    path.write_bytes(
        content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]
    )
    assert len(load_folder(root).train) == 19


@pytest.mark.parametrize(
    "size, side",
    [
        ((300, 500), 256),
        ((2000, 1200), 256),
        ((256, 300), 256),
        ((40, 30), 30),
        ((255, 999), 255),
        ((1, 1), 1),
    ],
)
def test_the_shorter_side_becomes_256_but_is_never_enlarged(
    tmp_path: Path, size: tuple[int, int], side: int
) -> None:
    assert decode.read_image(write_image(tmp_path / "a.jpg", size)).shape == (3, side, side)


def test_the_center_square_is_kept(tmp_path: Path) -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    assert decode.read_image(tmp_path / "a.png").min() == 255


def test_a_large_jpeg_is_reduced_to_what_a_full_decoding_gives(tmp_path: Path) -> None:
    y, x = np.mgrid[:1500, :2100] / 60
    picture = np.stack([np.sin(x) * np.cos(y), np.sin(x / 2 + y), np.cos(x * y / 9)], 2) * 100 + 128
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        full = np.asarray(
            image.resize((256, 256), Image.Resampling.BILINEAR, box=(300, 0, 1800, 1500)),
            np.float64,
        )
    assert np.abs(decode.read_image(tmp_path / "a.jpg").transpose(1, 2, 0) - full).mean() < 2


@pytest.mark.skipif(not CIFAR_JPEG.is_file(), reason=f"{CIFAR_JPEG} is not there")
def test_real_jpegs_are_packed_as_pillow_reads_them(tmp_path: Path) -> None:
    root, wanted = (
        tmp_path / "set",
        {(split, name): 20 for split in ("train", "test") for name in ("cat", "ship")},
    )
    with tarfile.open(CIFAR_JPEG) as archive:
        for member in archive:
            *_, split, name, file = ("", "", *Path(member.name).parts)
            if wanted.get((split, name)) and member.isfile():
                wanted[split, name] -= 1
                (root / split / name).mkdir(parents=True, exist_ok=True)
                (root / split / name / file).write_bytes(archive.extractfile(member).read())
            if not any(wanted.values()):
                break
    splits = load_folder(root)
    file = sorted((root / "test" / "ship").iterdir())[3]
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(splits.test.gather([23])[0].numpy(), expected)


@pytest.mark.skipif(not IMAGENET.is_file(), reason="imagenet-samples.tar is not there")
def test_real_photographs_become_squares_of_256(tmp_path: Path) -> None:
    with tarfile.open(IMAGENET) as archive:
        members = [member for member in archive.getmembers() if member.isfile()][:12]
        for member in members:
            path = tmp_path / Path(member.name).name
            path.write_bytes(archive.extractfile(member).read())
            with Image.open(path) as image:
                shorter = min(image.size)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert decode.read_image(path).shape == (3, min(256, shorter), min(256, shorter))
