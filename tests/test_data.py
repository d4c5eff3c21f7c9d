"""Stores, sources and loaders: what is read is what was there, and no rank, resume or cache can change a batch."""

import gzip
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import process_group, run

from alexnet_mp.config import Config, DataConfig
from alexnet_mp.data import Augment, Loader, Splits, Store, build_loaders, files, folder, load, shapes, sources
from alexnet_mp.data.store import resize

CIFAR_JPEG = Path("/tmp/w/cifar10-jpeg")
IMAGENET = Path("/work/shared/data/imagenet-samples.tar")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alexnet_mp"


def random_store(count: int = 40, side: int = 12, classes: int = 4, seed: int = 0) -> Store:
    rng = np.random.default_rng(seed)
    names = [f"class {k}" for k in range(classes)]
    return Store([rng.integers(0, 256, (count, 3, side, side), np.uint8)], np.arange(count) % classes, names)


def mixed_store() -> Store:
    """Ten images on shelves of 12 and 20 pixels, taking turns."""
    rng = np.random.default_rng(1)
    places = np.array([(i % 2, i // 2) for i in range(10)])
    return Store([rng.integers(0, 256, (5, 3, side, side), np.uint8) for side in (12, 20)], np.arange(10) % 2, ["a", "b"], places)


def write_image(path: Path, size: tuple[int, int] = (20, 20), colour: object = (200, 30, 60), mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def make_folder(root: Path, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    """SPLIT/CLASS/0.png ..., every image of another grey level."""
    level = 0
    for split in splits:
        for name in classes:
            for i in range(count):
                write_image(root / split / name / f"{i}.png", colour=(level,) * 3)
                level += 1
    return root


def load_folder(root: Path, **fields: object) -> Splits:
    return load(DataConfig(data="folder", data_dir=str(root), **fields), seed=0, progress=True)


def levels(store: Store) -> list[int]:
    """The grey levels of a store of `make_folder`: which of its images they are."""
    return [int(store.gather([i])[0, 0, 0, 0]) for i in range(len(store))]


# ---- stores ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("store", [random_store(), mixed_store()], ids=["one side", "two sides"])
def test_a_saved_store_opens_with_the_same_images_labels_and_classes(store: Store, tmp_path: Path) -> None:
    store.save(tmp_path / "store")
    opened = Store.open(tmp_path / "store", verify=True)
    assert opened.classes == store.classes and opened.sides == store.sides
    assert np.array_equal(opened.labels, store.labels)
    assert torch.equal(opened.gather(range(len(store)), 20), store.gather(range(len(store)), 20))


def test_a_store_on_disk_is_a_plain_numpy_array(tmp_path: Path) -> None:
    store = random_store()
    store.save(tmp_path / "store")
    assert np.array_equal(np.load(tmp_path / "store" / "images-12.npy"), store.shelves[0])


def test_a_saved_subset_holds_its_images_only(tmp_path: Path) -> None:
    store = random_store()
    store.subset([7, 3]).save(tmp_path / "store")
    assert torch.equal(Store.open(tmp_path / "store").gather([0, 1]), store.gather([7, 3]))


def test_gather_gives_images_of_any_shelf_in_the_order_asked_for() -> None:
    store = mixed_store()
    images = store.gather([5, 0, 9], side=20)
    assert torch.equal(images[0], torch.from_numpy(store.shelves[1][2]))
    assert torch.equal(images[1:2], resize(torch.from_numpy(store.shelves[0][:1]), 20))
    assert torch.equal(images[2], torch.from_numpy(store.shelves[1][4]))


def test_gather_refuses_to_guess_a_side_for_images_of_several() -> None:
    with pytest.raises(ValueError, match="sides 12 20"):
        mixed_store().gather([0, 1])


def test_a_subset_of_a_subset_is_the_images_meant() -> None:
    store = random_store()
    assert torch.equal(store.subset([5, 6, 7]).subset([2, 0]).gather([0, 1]), store.gather([7, 5]))


@pytest.mark.parametrize("side", [9, 31])
def test_an_image_is_resized_to_the_same_bits_alone_in_a_batch_or_with_the_whole_set(side: int) -> None:
    store = random_store(count=600, side=20)
    whole = store.resized(side)
    assert whole is not store and whole.sides == (side,)
    batch = [599, 3, 255, 256, 17]
    assert torch.equal(whole.gather(batch), store.gather(batch, side))
    assert torch.equal(whole.gather([17]), resize(store.gather([17]), side))


def test_a_set_too_large_for_memory_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_mp.data.store.FITS", 1000)
    store = random_store()
    assert store.resized(24) is store


def test_reducing_averages_instead_of_dropping_pixels() -> None:
    noise = random_store(1, side=256).gather([0])
    assert noise.float().std() > 70 and resize(noise, 32).float().std() < 12       # two of eight pixels alone would leave half of it


def test_statistics_are_those_of_numpy() -> None:
    store = random_store(count=300)
    images = store.shelves[0].astype(np.float64)
    statistics = store.statistics(12)
    np.testing.assert_allclose(statistics.mean_image, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.covariance, np.cov(images.transpose(1, 0, 2, 3).reshape(3, -1), bias=True), rtol=1e-10)


def test_statistics_of_smaller_images_are_those_of_the_images_as_they_are_reduced() -> None:
    store = random_store()
    reduced = store.resized(8).statistics(8)
    assert torch.equal(store.statistics(8).mean_image, reduced.mean_image)
    assert torch.equal(store.statistics(8).covariance, reduced.covariance)


def test_every_image_weighs_the_same_in_the_statistics_whatever_its_side() -> None:
    shelves = [np.full((1, 3, 4, 4), 100, np.uint8), np.full((3, 3, 8, 8), 200, np.uint8)]
    store = Store(shelves, np.zeros(4), ["a"], np.array([(0, 0), (1, 0), (1, 1), (1, 2)]))
    statistics = store.statistics(8)
    torch.testing.assert_close(statistics.mean_image, torch.full((3, 8, 8), 175.0))
    torch.testing.assert_close(statistics.covariance, torch.full((3, 3), 1875.0).double())


def test_statistics_of_a_store_on_disk_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_store().save(tmp_path / "store")
    first = Store.open(tmp_path / "store").statistics(12)
    monkeypatch.setattr(Store, "_measure", None)
    assert torch.equal(Store.open(tmp_path / "store").statistics(12).mean_image, first.mean_image)
    with pytest.raises(TypeError):
        Store.open(tmp_path / "store").subset([1, 2]).statistics(12)        # other images: not the same numbers


@pytest.mark.parametrize("damage, name", [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "images-12.npy"),
    (lambda path: path.unlink(), "images-12.npy"),
    (lambda path: path.write_bytes(b""), "images-12.npy"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "labels.npy"),
    (lambda path: path.write_text("{"), "header.json"),
    (lambda path: path.write_text('{"format": "something else"}'), "header.json"),
    (lambda path: path.write_text("[]"), "header.json"),
    (lambda path: path.unlink(), "header.json"),
    (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 9')), "header.json"),
    (lambda path: np.save(path, np.zeros((41, 3, 12, 12), np.uint8)), "images-12.npy"),
    (lambda path: np.save(path, np.zeros((40, 3, 12, 12), np.float32)), "images-12.npy"),
])
def test_a_damaged_store_is_refused_in_one_line_that_names_the_file(tmp_path: Path, damage, name: str) -> None:
    random_store().save(tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(ValueError, match=name) as caught:
        Store.open(tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_verifying_finds_a_single_changed_pixel(tmp_path: Path) -> None:
    random_store().save(tmp_path / "store")
    path = tmp_path / "store" / "images-12.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    Store.open(tmp_path / "store")
    with pytest.raises(ValueError, match="damaged"):
        Store.open(tmp_path / "store", verify=True)


def test_a_store_that_could_not_be_written_whole_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with files.Writer(tmp_path / "store", ["a"]) as writer:
            writer.add(np.zeros((3, 4, 4), np.uint8), 0)
            writer.add(np.zeros((3, 4, 4)), 0)

    with pytest.raises(ValueError, match="float64"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_saving_over_something_is_refused(tmp_path: Path) -> None:
    random_store().save(tmp_path / "store")
    with pytest.raises(FileExistsError, match="exists already"):
        random_store().save(tmp_path / "store")


# ---- the validation split and the limits -----------------------------------------------------------------------------------

def test_the_validation_split_has_its_share_of_every_class_and_nothing_of_the_rest() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 7])
    store = Store([np.arange(147, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)], labels, "abc")
    rest, share = sources.hold_out(store, 0.1, seed=3)
    assert np.bincount(share.labels).tolist() == [10, 4, 1]
    assert sorted(levels(rest) + levels(share)) == list(range(147))


def test_the_validation_split_depends_on_the_seed_alone() -> None:
    store = random_store(200)
    first, again, other = (sources.hold_out(store, 0.2, seed)[1].places for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_class_with_one_image_keeps_it_for_training() -> None:
    store = random_store(5, classes=4)
    rest, share = sources.hold_out(store, 0.5, 0)
    assert sorted(rest.labels) == [0, 1, 2, 3] and share.labels.tolist() == [0]


def test_a_set_with_one_image_a_class_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"--validation-share 0\.5"):
        sources.hold_out(random_store(4), 0.5, 0)


def test_limits_keep_that_many_images_chosen_by_the_seed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", count=20)
    one, two = (load(DataConfig(data="folder", data_dir=str(root), limit_train=9, limit_val=2, limit_test=11), seed) for seed in (0, 1))
    assert [len(store) for store in (one.train, one.val, one.test)] == [9, 2, 11]
    assert levels(one.test) != levels(two.test)
    assert set(one.test.labels) == {0, 1}            # a shuffle, not the head of the list


@pytest.mark.parametrize("name, available", [("train", 18), ("val", 2), ("test", 20)])
def test_a_limit_beyond_the_set_is_refused_with_the_number_that_there_is(tmp_path: Path, name: str, available: int) -> None:
    root = make_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=f"--limit-{name} 1000: there are {available} images"):
        load_folder(root, **{f"limit_{name}": 1000})


# ---- folders ---------------------------------------------------------------------------------------------------------------

def test_one_folder_beside_train_is_the_test_split_whatever_its_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train", "val"))
    splits = load_folder(root)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [18, 2, 20]
    assert sorted(levels(splits.train) + levels(splits.val)) == list(range(20))
    assert levels(splits.test) == list(range(20, 40))


def test_val_and_test_together_are_what_they_say(tmp_path: Path) -> None:
    splits = load_folder(make_folder(tmp_path / "set", ("train", "val", "test")))
    assert [levels(store) for store in (splits.train, splits.val, splits.test)] == [list(range(k, k + 20)) for k in (0, 20, 40)]


def test_classes_are_the_folders_sorted_by_name(tmp_path: Path) -> None:
    splits = load_folder(make_folder(tmp_path / "set", classes=("zebra", "café", "ant")))
    assert splits.train.classes == ("ant", "café", "zebra")
    assert levels(splits.test)[0] == 50 and splits.test.labels[0] == 0       # of ant, which was written last


def test_hidden_files_and_those_of_a_mac_archive_are_no_images_and_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "set")
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/2.png", "cat/._3.png", "cat/.hidden/4.png"):
        write_image(root / "train" / name)
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    splits = load_folder(root)
    assert splits.train.classes == ("cat", "dog") and len(splits.train) + len(splits.val) == 20
    assert "ignored 4 hidden files or folders, 1 files whose names" in capsys.readouterr().out


def test_extensions_are_known_in_either_case_and_content_decides_how_to_decode(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    write_image(root / "train" / "cat" / "a.JPEG", format="PNG")
    for name in ("b.JPG", "c.jfif", "d.gif", "e.webp", "f.tiff", "g.bmp"):
        write_image(root / "train" / "cat" / name, format="JPEG" if name == "c.jfif" else None)
    splits = load_folder(root)
    assert len(splits.train) + len(splits.val) == 27


@pytest.mark.parametrize("content, reason", [(b"", "an empty file"), (b"<!DOCTYPE html>", "not an image"), (None, "runcated")])
def test_a_bad_file_is_named_with_the_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    root = make_folder(tmp_path / "set")
    bad = root / "train" / "dog" / "bad.jpg"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(bad)
        content = bad.read_bytes()[:2000]
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=r"dog/bad\.jpg: .*" + reason) as caught:
        load_folder(root)
    assert "\n" not in str(caught.value)


def test_several_bad_files_are_told_at_once_and_leave_no_cache(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "set")
    for i in range(5):
        (root / "train" / "dog" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad0.*bad2.*\(and 2 more\)"):
        load_folder(root)
    assert list(cache.iterdir()) == []


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


def test_images_that_are_not_sorted_into_classes_are_recognised(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train",))
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="no class folders, but 1 images: sort them"):
        load_folder(root)


@pytest.mark.parametrize("data", ["folder", "store"])
def test_a_missing_folder_is_told_with_flag_path_and_what_was_expected(tmp_path: Path, data: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*nowhere: no such folder; expected one with"):
        load(DataConfig(data=data, data_dir=str(tmp_path / "nowhere")), 0)
    make_folder(tmp_path / "set", ("train",))
    with pytest.raises(FileNotFoundError, match=r"--data-dir .*set: no folder val or test in it"):
        load(DataConfig(data=data, data_dir=str(tmp_path / "set")), 0)


def test_a_folder_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "set")
    first = load_folder(root)
    assert "packing 40 images of" in capsys.readouterr().out
    monkeypatch.setattr(folder, "pack", None)
    assert levels(load_folder(root).train) == levels(first.train)
    assert "packing" not in capsys.readouterr().out


def test_a_changed_folder_is_packed_again_and_the_old_pack_is_named(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "set")
    load_folder(root)
    old = next(cache.iterdir())
    write_image(root / "test" / "dog" / "0.png", colour=(255, 255, 255))
    capsys.readouterr()
    assert 255 in levels(load_folder(root).test)
    assert f"has changed since it was packed into {old}, which can be deleted" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_gives_way_to_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = make_folder(tmp_path / "set")
    load_folder(root)
    assert any(path.name.startswith("folder-") for path in root.iterdir())


def test_a_stored_set_is_read_from_its_folder(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        random_store(seed=seed).save(tmp_path / "set" / name)
    splits = load(DataConfig(data="store", data_dir=str(tmp_path / "set")), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [36, 4, 40]
    assert torch.equal(splits.test.gather([5]), random_store(seed=1).gather([5]))


# ---- how an image file is read ---------------------------------------------------------------------------------------------

def pixel(path: Path) -> list[int]:
    image = folder.read_image(path)
    return image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()


def test_grey_images_have_three_equal_channels(tmp_path: Path) -> None:
    assert pixel(write_image(tmp_path / "a.png", mode="L", colour=77)) == [77, 77, 77]


def test_a_cmyk_jpeg_is_converted_to_rgb(tmp_path: Path) -> None:
    assert pixel(write_image(tmp_path / "a.jpg", mode="CMYK", colour=(0, 255, 255, 0), quality=100)) == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("mode, colour, grey", [("RGBA", (255, 0, 0, 0), 255), ("RGBA", (0, 0, 0, 128), 127), ("LA", (0, 0), 255)])
def test_transparency_lies_on_white(tmp_path: Path, mode: str, colour: tuple[int, ...], grey: int) -> None:
    assert pixel(write_image(tmp_path / "a.png", mode=mode, colour=colour)) == [grey] * 3


def test_a_palette_gives_its_colours_and_its_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=1)
    assert pixel(tmp_path / "a.png") == [10, 20, 30] and pixel(tmp_path / "b.png") == [255] * 3


@pytest.mark.parametrize("value, expected", [(0, 0), (1000, 4), (32896, 128), (65535, 255)])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_become_eight_instead_of_white(tmp_path: Path, name: str, value: int, expected: int) -> None:
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / name)
    assert pixel(tmp_path / name) == [expected] * 3


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255                                    # white above
    exif = Image.Exif()
    for orientation, stored in ((1, upright), (3, upright[::-1, ::-1]), (6, np.rot90(upright)), (8, np.rot90(upright, -1))):
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif, quality=95)
        image = folder.read_image(tmp_path / "a.jpg").astype(int)
        assert image[:, :14].min() > 230 and image[:, 18:].max() < 25, orientation


def test_odd_metadata_neither_warns_nor_fails(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    path = write_image(root / "train" / "cat" / "odd.jpg")
    content = path.read_bytes()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0"       # announces five entries and ends in the first
    path.write_bytes(content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:])
    assert len(load_folder(root).train) == 19


@pytest.mark.parametrize("size, side", [((300, 500), 256), ((2000, 1200), 256), ((256, 300), 256), ((40, 30), 30), ((255, 999), 255), ((1, 1), 1)])
def test_the_shorter_side_becomes_256_but_is_never_enlarged(tmp_path: Path, size: tuple[int, int], side: int) -> None:
    assert folder.read_image(write_image(tmp_path / "a.jpg", size)).shape == (3, side, side)


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    assert folder.read_image(tmp_path / "a.png").min() == 255


def test_a_large_jpeg_is_reduced_to_what_a_full_decoding_gives(tmp_path: Path) -> None:
    y, x = np.mgrid[:1500, :2100] / 60
    picture = np.stack([np.sin(x) * np.cos(y), np.sin(x / 2 + y), np.cos(x * y / 9)], 2) * 100 + 128
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        full = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR, box=(300, 0, 1800, 1500)), np.float64)
    assert np.abs(folder.read_image(tmp_path / "a.jpg").transpose(1, 2, 0) - full).mean() < 2


# ---- generated shapes ------------------------------------------------------------------------------------------------------

@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "COUNTS", {"train": 60, "val": 24, "test": 24})


def test_shapes_are_balanced_and_complete(few_shapes: None) -> None:
    splits = load(DataConfig(), 0)
    assert len(splits.train.classes) == 12 and splits.train.sides == (256,)
    assert np.bincount(splits.train.labels).tolist() == [5] * 12 and np.bincount(splits.test.labels).tolist() == [2] * 12


def test_shapes_cached_at_a_smaller_side_are_the_large_ones_reduced(few_shapes: None, cache: Path) -> None:
    large, small = load(DataConfig(), 0), load(DataConfig(), 0, side=76)
    assert sorted(path.name for path in cache.iterdir()) == [f"shapes-0-{shapes.VERSION}-256px", f"shapes-0-{shapes.VERSION}-76px"]
    assert torch.equal(large.train.gather(range(60), 76), small.train.gather(range(60)))
    assert torch.equal(large.train.statistics(76).mean_image, small.train.statistics(76).mean_image)


def test_shapes_are_generated_once_for_each_seed(few_shapes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = load(DataConfig(), 0, progress=True, side=32), load(DataConfig(), 1, side=32)
    assert capsys.readouterr().out.count("drawing 108 images") == 1
    assert not torch.equal(first.train.gather([0]), other.train.gather([0]))
    monkeypatch.setattr(shapes, "generate", None)
    assert torch.equal(load(DataConfig(), 0, side=32).train.gather([0]), first.train.gather([0]))


def test_no_two_images_of_the_shapes_are_alike_within_or_between_the_splits(few_shapes: None) -> None:
    splits = load(DataConfig(), 0, side=32)
    everything = torch.cat([store.gather(range(len(store))) for store in (splits.train, splits.val, splits.test)])
    flat = everything.flatten(1).float() - everything.flatten(1).float().mean(1, keepdim=True)
    closeness = torch.corrcoef(flat) - 2 * torch.eye(len(flat))
    assert closeness.max() < 0.98


def test_mean_colours_do_not_tell_the_class_of_a_shape() -> None:
    count = {"train": 360, "test": 360}
    features = {split: torch.tensor(np.stack([np.concatenate([(image := shapes.draw(0, split, i)[:, ::4, ::4]).mean((1, 2)), image.std((1, 2))])
                                              for i in range(n)])).float() for split, n in count.items()}
    mean, deviation = features["train"].mean(0), features["train"].std(0)
    inputs = {split: (values - mean) / deviation for split, values in features.items()}
    target = torch.arange(360) % 12
    classifier = torch.nn.Linear(6, 12)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(classifier(inputs["train"]), target) + 1e-3 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (classifier(inputs["test"]).argmax(1) == target).float().mean()
    assert accuracy < 0.25                              # chance is 0.083; area shows a little in the deviations


# ---- downloads -------------------------------------------------------------------------------------------------------------

def test_offline_cifar_10_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        print("torchvision is chatty")
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(ValueError, match=r"--data-dir .*cifar: .*https://.*cifar-10-python.tar.gz.*name resolution.*put cifar-10-python") as caught:
        load(DataConfig(data="cifar10", data_dir=str(tmp_path / "cifar")), 0)
    assert "\n" not in str(caught.value)


def test_cifar_10_is_read_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (20, 3072), np.uint8) for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]}
    for name, data in rows.items():
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{k}" for k in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    splits = load(DataConfig(data="cifar10", data_dir=str(tmp_path)), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [90, 10, 20]
    assert torch.equal(splits.test.gather([7]).flatten(), torch.from_numpy(rows["test_batch"][7])) and splits.test.labels[7] == 7


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def make_fashion(root: Path) -> np.ndarray:
    root.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8) % 10)
    return images


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_where_debian_or_torchvision_put_it(tmp_path: Path, where: str) -> None:
    images = make_fashion(tmp_path / "set" / where)
    splits = load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)
    assert torch.equal(splits.test.gather([3])[0], torch.from_numpy(images[3]).expand(3, -1, -1))
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [30, 10, 40]
    assert splits.test.classes[9] == "ankle boot" and splits.test.labels[9] == 9


def test_a_damaged_fashion_mnist_file_is_named(tmp_path: Path) -> None:
    make_fashion(tmp_path / "set")
    path = tmp_path / "set" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: damaged"):
        load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)


def test_offline_fashion_mnist_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sources, "DEBIAN_FASHION", tmp_path / "nowhere")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(ValueError, match=r"--data-dir .*cannot be downloaded.*apt-get install dataset-fashion-mnist, or use --data shapes"):
        load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)


@pytest.mark.skipif(not sources.DEBIAN_FASHION.is_dir(), reason="apt-get install dataset-fashion-mnist puts the real files there")
def test_the_real_fashion_mnist_is_found_without_a_download(tmp_path: Path) -> None:
    splits = load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path)), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [54000, 6000, 10000]
    assert np.bincount(splits.val.labels).tolist() == [600] * 10
    assert splits.test.labels[:5].tolist() == [9, 2, 1, 1, 6]


# ---- several ranks ---------------------------------------------------------------------------------------------------------

def load_on_a_rank(rank: int, root: str) -> tuple[list[int], int]:
    """What `Placement.alone` does, in short; counts the packings that this rank did."""
    packed = []
    pack = folder.pack
    folder.pack = lambda *args: (packed.append(1), pack(*args))
    with process_group():
        def alone(work) -> None:
            if rank == 0:
                work()
            dist.barrier()

        splits = load(DataConfig(data="folder", data_dir=root), 5, alone)
    return levels(splits.val), len(packed)


def test_one_rank_packs_and_all_see_the_same_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", count=30)
    (first, packed), (second, none) = run(load_on_a_rank, 2, str(root))
    assert first == second and len(first) == 6
    assert (packed, none) == (2, 0)


# ---- loaders ---------------------------------------------------------------------------------------------------------------

def loader(store: Store | None = None, batch_size: int = 16, train: bool = True, size: int = 9, data_rank: int = 0, data_ranks: int = 1) -> Loader:
    store = store or random_store(50)
    config = DataConfig(stored_side=12, crop_of=size, colour_noise=0.1)
    return Loader(store, Augment(config, size, store.statistics(12)), batch_size, 7, train, data_rank, data_ranks)


def test_every_image_comes_once_an_epoch_and_the_short_last_batch_too() -> None:
    store = random_store(50, classes=50)
    batches = list(loader(store))
    assert len(batches) == len(loader(store)) == 4 and loader(store).images == 50
    assert [(len(batch.labels), batch.rows, batch.first_row) for batch in batches] == [(16, 16, 0)] * 3 + [(2, 2, 0)]
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(50))


def test_a_batch_reads_as_images_and_labels() -> None:
    for images, labels, *_ in loader():
        assert images.shape == (len(labels), 3, 9, 9) and images.dtype == torch.float32 and labels.dtype == torch.int64
    batch = next(iter(loader()))
    assert batch[0] is batch.images and batch[1] is batch.labels


def test_labels_stay_with_their_images() -> None:
    level = np.arange(50, dtype=np.uint8)
    store = Store([np.broadcast_to(level[:, None, None, None], (50, 3, 12, 12)).copy()], level, [str(k) for k in range(50)])
    whole = Loader(store, Augment(DataConfig(stored_side=12, crop_of=9, mean="none"), 9), 16, 0, train=True)
    for images, labels, *_ in whole:
        assert torch.equal(images[:, 1, 4, 4].long(), labels)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_ranks_batches_joined_are_the_batch_of_one_rank_bit_for_bit(ranks: int, train: bool) -> None:
    parts = [list(loader(train=train, data_rank=rank, data_ranks=ranks)) for rank in range(ranks)]
    for whole, *shares in zip(loader(train=train), *parts, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert [share.first_row for share in shares] == np.cumsum([0] + [len(share.labels) for share in shares])[:-1].tolist()
        assert {share.rows for share in shares} == {whole.rows}


def test_a_rank_without_a_row_in_the_last_batch_gets_an_empty_one() -> None:
    shapes_ = [list(loader(data_rank=rank, data_ranks=3))[-1].images.shape for rank in range(3)]
    assert shapes_ == [(0, 3, 9, 9), (1, 3, 9, 9), (1, 3, 9, 9)]


def test_a_resumed_epoch_goes_on_with_the_very_batches_that_were_left() -> None:
    whole, resumed = loader(), loader()
    whole.set_epoch(3)
    resumed.set_epoch(3, skip=2)
    for expected, batch in zip(list(whole)[2:], resumed, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.labels, expected.labels)
    assert len(resumed) == 4


def test_iterating_twice_gives_the_epoch_twice_and_another_epoch_another_order_and_other_crops() -> None:
    one = loader(random_store(50, classes=50))
    first, again = list(one), list(one)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    one.set_epoch(1)
    assert [b.labels.tolist() for b in one] != [b.labels.tolist() for b in first]
    assert not torch.equal(one.augment.draw(7, 0, 0, 16).top, one.augment.draw(7, 1, 0, 16).top)


def test_evaluation_keeps_the_stored_order_and_the_same_images_every_time() -> None:
    one = loader(random_store(50, classes=50), train=False)
    assert torch.cat([batch.labels for batch in one]).tolist() == list(range(50))
    assert torch.equal(next(iter(one)).images, next(iter(one)).images)


def test_a_slow_consumer_gets_what_a_fast_one_gets() -> None:
    slow = []
    for batch in loader():
        time.sleep(0.02)
        slow.append(batch.images)
    assert all(torch.equal(a, b.images) for a, b in zip(slow, loader(), strict=True))


def test_loading_leaves_the_global_random_states_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


def loader_threads() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


def test_an_abandoned_iteration_ends_its_thread() -> None:
    for _ in loader(batch_size=1):
        assert loader_threads() == 1
        break
    assert loader_threads() == 0


def test_a_failure_in_the_thread_is_raised_where_the_batches_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is gone")

    one = loader()
    monkeypatch.setattr(one.store, "gather", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(one)
    assert loader_threads() == 0


def test_an_interpreter_that_ends_within_an_epoch_ends_at_once() -> None:
    program = ("import numpy as np; from alexnet_mp.data import *; from alexnet_mp.config import DataConfig\n"
               "store = Store([np.zeros((5000, 3, 76, 76), np.uint8)], np.zeros(5000), ['a'])\n"
               "batches = iter(Loader(store, Augment(DataConfig(mean='none'), 67), 64, train=True)); next(batches); print('one')")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("one\n", "")


def test_images_of_several_sides_are_loaded_at_one() -> None:
    store = mixed_store()
    batches = list(Loader(store, Augment(DataConfig(stored_side=16, crop_of=14, mean="none"), 14), 4, train=True))
    assert {batch.images.shape[1:] for batch in batches} == {(3, 14, 14)}


# ---- all together ----------------------------------------------------------------------------------------------------------

def splits_of(classes: int = 4, side: int = 76) -> Splits:
    return Splits(*(random_store(count, side, classes, seed) for seed, count in enumerate((60, 20, 20))))


def test_loaders_are_built_from_a_configuration() -> None:
    config = Config().with_fields(image_size=67, batch_size=16, seed=3)
    train, val, test, augment = build_loaders(config, splits_of(), data_rank=0, data_ranks=1, device=torch.device("cpu"))
    assert [loader.images for loader in (train, val, test)] == [60, 20, 20]
    assert next(iter(train)).images.shape == (16, 3, 67, 67) and train.augment is augment
    assert train.training and not val.training and not test.training


def test_statistics_come_from_the_training_split_only() -> None:
    splits = splits_of()
    augment = build_loaders(Config().with_fields(image_size=67), splits)[3]
    assert torch.equal(augment.mean_image, splits.train.statistics(76).mean_image)


def test_more_classes_than_the_network_has_are_refused() -> None:
    with pytest.raises(ValueError, match="11 classes found, --classes is 10"):
        build_loaders(Config().with_fields(image_size=67, classes=10), splits_of(11))


def test_a_small_set_gives_the_same_batches_whether_it_was_resized_at_once_or_is_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config().with_fields(image_size=67, batch_size=16)
    once = build_loaders(config, splits_of(side=28))[0]
    monkeypatch.setattr("alexnet_mp.data.store.FITS", 0)
    each = build_loaders(config, splits_of(side=28))[0]
    assert once.store.sides == (76,) and each.store.sides == (28,)
    assert all(torch.equal(a.images, b.images) for a, b in zip(once, each, strict=True))


@pytest.mark.skipif(not CIFAR_JPEG.is_dir(), reason="cifar10-jpeg.tar.gz is not unpacked in /tmp/w")
def test_real_jpegs_are_packed_as_pillow_reads_them(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "test"):
        for name in ("cat", "ship"):
            (root / split / name).mkdir(parents=True)
            for file in sorted((CIFAR_JPEG / split / name).iterdir())[:20]:
                (root / split / name / file.name).write_bytes(file.read_bytes())
    splits = load_folder(root)
    file = sorted((root / "test" / "ship").iterdir())[3]
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(splits.test.gather([23])[0].numpy(), expected)


@pytest.mark.skipif(not IMAGENET.is_file(), reason="imagenet-samples.tar is not there")
def test_real_photographs_become_squares_of_256(tmp_path: Path) -> None:
    import tarfile
    with tarfile.open(IMAGENET) as archive:
        members = [member for member in archive.getmembers() if member.isfile()][:12]
        for member in members:
            path = tmp_path / Path(member.name).name
            path.write_bytes(archive.extractfile(member).read())
            with Image.open(path) as image:
                shorter = min(image.size)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert folder.read_image(path).shape == (3, min(256, shorter), min(256, shorter))
