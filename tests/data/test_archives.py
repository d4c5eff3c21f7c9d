"""Image sets as people hold them: the same images give the same store to the byte from every form,
and nothing is unpacked.
"""

import io
import itertools
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_forms import add, make_parquet, make_shards, make_tar
from image_sets import levels, load_folder, make_folder, write_image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import (
    Store,
    dataset_packer,
    decode_pool,
    folder_cache,
    load,
    store_format,
    streamed_decoding,
)
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_sets import SetOptions, list_source
from alexnet_mp.data.store_writer import EncodedImage
from alexnet_mp.data.streamed_decoding import ShardCollector, _Image

TINY_100 = Path(__file__).resolve().parents[3] / "shared/data/tiny-imagenet-100.tar.gz"
pytestmark = pytest.mark.usefixtures("cache")


def pack(source: Path, store: Path, *, encode: str = "raw", skip: bool = False) -> dict:
    options = SetOptions(skip=skip)
    packing = Packing(encode, "skip" if skip else "stop", 2)
    listings = list_source(source, options=options)
    return dataset_packer.pack(listings, store, packing, say=lambda text: None)


def contents(store: Path) -> dict[str, bytes]:
    files = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 32 images; of those that come out of order, few wait in memory."""
    monkeypatch.setattr(store_format, "SHARD", 32)
    monkeypatch.setattr(streamed_decoding, "CHUNK", 4)
    monkeypatch.setattr(streamed_decoding, "BUDGET", 500_000)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of Tiny-ImageNet: three classes with 50 images to train and 10 to validate."""
    if not TINY_100.is_file():
        pytest.skip(f"{TINY_100} is not there")
    root, count = tmp_path_factory.mktemp("photographs"), dict[str, int]()
    with tarfile.open(TINY_100, "r|gz") as archive:
        for member in archive:
            _, wnid, name = member.name.split("/")
            count[wnid] = number = count.get(wnid, 0) + 1
            if len(count) > 3:
                return root
            if number > 60:
                continue
            path = root / ("train" if number <= 50 else "val") / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
    return root


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return target


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "tar": lambda folder, place: make_tar(folder, place / "set.tar"),
    "shuffled tar": lambda folder, place: make_tar(folder, place / "set.tar", seed=0),
    "tar.gz": lambda folder, place: make_tar(folder, place / "set.tar.gz", "w:gz"),
    "shuffled tgz": lambda folder, place: make_tar(folder, place / "set.tgz", "w:gz", seed=0),
    "tar.xz": lambda folder, place: make_tar(folder, place / "set.tar.xz", "w:xz"),
    "tar.bz2": lambda folder, place: make_tar(folder, place / "set.tar.bz2", "w:bz2", seed=1),
    "zip": lambda folder, place: zipped(folder, place / "set.zip"),
    "webdataset": lambda folder, place: make_shards(folder, place / "shards"),
    "parquet": lambda folder, place: make_parquet(folder, place / "parquet"),
}


@pytest.mark.parametrize("form", FORMS)
def test_real_photographs_give_the_same_store_from_every_form(
    form: str, photographs: Path, tmp_path: Path, small_shards: None
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    source = FORMS[form](photographs, tmp_path)
    before = contents(tmp_path)
    pack(photographs, tmp_path / "expected")
    report = pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")
    assert {name: split["images"] for name, split in report["splits"].items()} == {
        "train": 150,
        "val": 30,
    }
    assert Store.open(tmp_path / "store" / "train").classes == tuple(
        sorted(path.name for path in (photographs / "train").iterdir())
    )
    shutil.rmtree(tmp_path / "store")
    shutil.rmtree(tmp_path / "expected")
    assert contents(tmp_path) == before  # nothing was written but the store


def test_names_with_and_without_an_extension_are_in_the_same_order(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    root, level = tmp_path / "set", itertools.count()
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        for file in ("a.png", "a-1.png", "a(1).png", "b.png"):  # some sort before a dot
            write_image(root / split / name / file, color=(next(level),) * 3)
    pack(root, tmp_path / "expected")
    pack(make_parquet(root, tmp_path / "parquet", extension=False), tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")


@pytest.mark.parametrize("archive", [True, False])
def test_without_class_folders_imagenets_names_tell_the_class(
    archive: bool, tmp_path: Path
) -> None:
    level, sorted_set, flat = itertools.count(), tmp_path / "sorted", tmp_path / "flat"
    for wnid, number in itertools.product(("n01518878", "n01440764"), range(3)):
        color, name = (next(level),) * 3, f"{wnid}_{number}.png"
        write_image(sorted_set / wnid / name, color=color)
        write_image(flat / name, color=color)
    pack(sorted_set, tmp_path / "expected")
    pack(make_tar(flat, tmp_path / "flat.tar") if archive else flat, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")
    assert Store.open(tmp_path / "store" / "train").classes == ("n01440764", "n01518878")


def test_one_image_without_a_wnid_leaves_all_classes_open(tmp_path: Path) -> None:
    for name in ("n01518878_1.png", "n01440764_1.png", "cat_1.png"):
        write_image(tmp_path / "flat" / name)
    with pytest.raises(ValueError, match="has no class folders, but 3 images"):
        list_source(tmp_path / "flat")


@pytest.mark.parametrize("form", ["shuffled tgz", "parquet"])
def test_a_jpeg_store_is_the_same_from_a_stream(
    form: str, photographs: Path, tmp_path: Path, small_shards: None
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    pack(photographs, tmp_path / "expected", encode="jpeg")
    pack(FORMS[form](photographs, tmp_path), tmp_path / "store", encode="jpeg")
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")


# ---- a kill ----


def stopped(
    monkeypatch: pytest.MonkeyPatch, module: object, source: Path, store: Path, after: int
) -> None:
    """Packs until image number `after` and leaves what a kill would."""
    read, count = module.try_read, itertools.count()

    def interrupt(file: object) -> object:
        if next(count) >= after:
            raise KeyboardInterrupt
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(module, "try_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(source, store)


@pytest.mark.parametrize("form", ["tar", "shuffled tgz"])
@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_packing_of_an_archive_goes_on_where_it_was(
    form: str,
    damage: bool,
    photographs: Path,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = streamed_decoding if form == "shuffled tgz" else decode_pool
    source, store = FORMS[form](photographs, tmp_path), tmp_path / "store"
    pack(source, tmp_path / "expected")
    stopped(monkeypatch, module, source, store, 120)
    begun = sorted(store.rglob(".begun-*"))
    assert bool(begun) == (form == "shuffled tgz")
    if damage:
        for file in begun[:2] or [store / "train" / "images-00000.npy"]:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content[:-7] if file in begun[1:] else content)
    decoded: list[object] = []
    read = module.try_read
    monkeypatch.setattr(module, "try_read", lambda file: (decoded.append(file), read(file))[1])
    pack(source, store)
    assert contents(store) == contents(tmp_path / "expected")
    assert len(decoded) < 180 if damage else len(decoded) < 120


def test_an_archive_is_packed_again_only_when_it_has_changed(
    photographs: Path, tmp_path: Path
) -> None:
    source = make_tar(photographs, tmp_path / "set.tar")
    pack(source, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    pack(source, tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    make_tar(photographs, tmp_path / "set.tar")  # later
    with pytest.raises(ValueError, match="or from these before they changed"):
        pack(source, tmp_path / "store")


def test_a_file_that_is_changed_while_its_set_is_packed_does_not_pass_for_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "set")
    read = decode_pool.try_read

    def read_and_touch(file: Path) -> object:
        image = read(file)
        os.utime(file)  # it was listed with an earlier time
        return image

    with monkeypatch.context() as patch:
        patch.setattr(decode_pool, "try_read", read_and_touch)
        pack(root, tmp_path / "store")
    with pytest.raises(ValueError, match="or from these before they changed"):
        pack(root, tmp_path / "store")


def test_a_begun_file_that_a_kill_left_with_half_an_image_is_written_on(tmp_path: Path) -> None:
    def collector() -> ShardCollector:
        opened = ShardCollector(tmp_path, None, {0: range(4)}, ["made of"], Packing(), False)
        opened._open_begun(0)
        return opened

    def write(collector: ShardCollector, rows: range) -> None:
        pixels = np.zeros((3, 5, 5), np.uint8)
        collector.waiting[0] = {row: _Image(EncodedImage(5, pixels + row), 9) for row in rows}
        collector._write_begun()

    write(collector(), range(2))
    (file,) = tmp_path.glob(".begun-*")
    file.write_bytes(file.read_bytes()[:-3])
    write(collector(), range(1, 4))
    found = collector()._read_begun(0)
    assert [int(image.image.data.max()) for _, image in sorted(found.items())] == [0, 1, 2, 3]


# ---- training from an archive ----


def test_training_takes_an_archive_as_it_takes_its_folder_and_they_share_a_pack(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set", ("train", "val", "test"))
    archive = make_tar(root, tmp_path / "set.tar.gz", "w:gz", seed=3)
    splits = load_folder(archive)
    assert [levels(store) for store in (splits.train, splits.val, splits.test)] == [
        list(range(k, k + 20)) for k in (0, 20, 40)
    ]
    assert f"train: {archive}/train; validation: {archive}/val" in capsys.readouterr().out
    load_folder(root)
    load_folder(archive)
    assert "packing" not in capsys.readouterr().out
    assert len(list(cache.glob("folder-*"))) == 3


def test_an_archive_whose_images_changed_is_packed_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "set", ("train", "test"))
    archive = make_tar(root, tmp_path / "set.tgz", "w:gz")
    load_folder(archive)
    file = root / "test" / "cat" / "3.png"
    size = file.stat().st_size
    write_image(file, color=(255, 255, 255))
    file.write_bytes(file.read_bytes() + bytes(max(0, size - file.stat().st_size)))
    make_tar(root, archive, "w:gz")
    assert levels(load_folder(archive).test)[3] == 255


def test_a_folder_around_the_set_in_an_archive_is_looked_through(tmp_path: Path) -> None:
    make_folder(tmp_path / "download" / "pets v2", ("train", "val"))
    (tmp_path / "download" / "pets v2" / "README.txt").write_text("hello")
    archive = make_tar(tmp_path / "download", tmp_path / "pets.tar")
    splits = load_folder(archive)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [18, 2, 20]


def test_tiny_imagenets_annotations_and_words_are_read_within_its_archive(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "tiny", ("train",), ("n01443537", "n02012849"), 4)
    for k in range(4):
        write_image(root / "val" / "images" / f"val_{k}.JPEG")
    lines = (f"val_{k}.JPEG\t{('n02012849', 'n01443537')[k % 2]}\t0\t1\t2\t3\n" for k in range(4))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n02012849\tcrane\nn01443537\tgoldfish, Carassius\n")
    for archive in (
        make_tar(root, tmp_path / "tiny.tar.gz", "w:gz"),
        zipped(root, tmp_path / "tiny.zip"),
    ):
        listings = list_source(archive)
        assert listings["val"].labels.tolist() == [0, 0, 1, 1]
        assert listings["val"].name(0) == "n01443537/val_1.JPEG"
        assert listings["train"].classes == ("goldfish", "crane")


# ---- what is wrong ----


def tar_of(target: Path, *members: tuple[str, bytes, dict], mode: str = "w") -> Path:
    """A tar with two images each of two classes, and `members`."""
    picture = io.BytesIO()
    write = write_image(target.parent / "one.png").read_bytes
    picture.write(write())
    with tarfile.open(target, mode) as archive:
        for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
            add(archive, f"train/{name}", picture.getvalue())
        for name, content, fields in members:
            add(archive, name, content, **fields)
    return target


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("/etc/cat.png", {}, "'/etc/cat.png' is no name within an archive"),
        ("train/cat/../../x.png", {}, r"'train/cat/\.\./\.\./x\.png' is no name within"),
        ("train/cat/1.png", {}, "train/cat/1.png is in it twice"),
        ("train/cat/3.png", {"type": tarfile.SYMTYPE, "linkname": "1.png"}, "is a symbolic link"),
        (
            "train/cat/3.png",
            {"type": tarfile.LNKTYPE, "linkname": "train/cat/9.png"},
            "is a link to what is not in it",
        ),
    ],
)
def test_a_member_that_cannot_be_taken_is_one_line_or_left_out(
    tmp_path: Path, name: str, fields: dict, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tar_of(tmp_path / "set.tar", (name, b"", fields))
    with pytest.raises(ValueError, match=words) as caught:
        list_source(archive)
    assert "\n" not in str(caught.value) and "--on-error skip" in str(caught.value)
    listings = list_source(archive, options=SetOptions(skip=True))
    assert len(listings["train"]) == 4
    assert "left out: " in capsys.readouterr().out


def test_a_hard_link_in_a_tar_is_the_file_that_it_links_to(tmp_path: Path) -> None:
    link = {"type": tarfile.LNKTYPE, "linkname": "train/cat/1.png"}
    archive = tar_of(tmp_path / "set.tar", ("train/dog/3.png", b"", link))
    listing = list_source(archive)["train"]
    assert listing.name(4) == "dog/3.png"
    assert listing.file(4).read_bytes() == listing.file(0).read_bytes() != b""


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_an_archive_that_was_cut_short_is_one_line_and_its_whole_images_can_be_packed(
    tmp_path: Path, mode: str, photographs: Path
) -> None:
    archive = make_tar(photographs, tmp_path / "set.tar", mode)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size * 4 // 5])
    with pytest.raises(ValueError, match="cut short or damaged at byte") as caught:
        list_source(archive)
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    report = pack(archive, tmp_path / "store", skip=True)
    assert 100 < report["splits"]["train"]["images"] <= 150


def test_a_tar_that_ends_between_two_members_or_has_a_damaged_header_is_not_taken_for_whole(
    tmp_path: Path,
) -> None:
    whole = tar_of(tmp_path / "set.tar").read_bytes()
    with tarfile.open(tmp_path / "set.tar") as archive:
        third = archive.getmembers()[2].offset
    for content, words in (
        (whole[:third], "no end marker"),
        (whole[:third] + b"x" * 512 + whole[third + 512 :], "a damaged header"),
    ):
        (tmp_path / "set.tar").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            list_source(tmp_path / "set.tar")


def test_an_image_that_cannot_be_read_is_named_with_its_archive_or_skipped(tmp_path: Path) -> None:
    for mode in ("w", "w:gz"):
        archive = tar_of(tmp_path / "set.tar", ("train/cat/3.png", b"<html>", {}), mode=mode)
        with pytest.raises(ValueError, match=r"set\.tar: cat/3\.png: not an image .* skip"):
            pack(archive, tmp_path / "store")
        report = pack(archive, tmp_path / "store", skip=True)
        assert report["splits"]["train"]["skipped"][0][0] == "cat/3.png"
        assert report["splits"]["train"]["images"] == 4
        shutil.rmtree(tmp_path / "store")


@pytest.mark.parametrize(
    "name, words",
    [
        ("train-00000-of-01024", "TFRecord is not read; pack the images that it was made from"),
        ("train.tfrecord", "TFRecord is not read"),
        ("train.beton", "FFCV's beton is not read"),
        ("lmdb/data.mdb", "LMDB is not read"),
        ("notes.txt", "a file, and neither an archive"),
        ("set.tar", "neither tar nor zip, or damaged"),
        ("set.zip", "neither tar nor zip, or damaged"),
        ("nowhere-{00..03}.tar", "4 of 4 files are not there, the first of them nowhere-00.tar"),
        ("nowhere-*.tar", "no file has such a name"),
    ],
)
def test_a_form_that_is_not_read_is_refused_in_one_line(
    tmp_path: Path, name: str, words: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if "nowhere" not in name:
        path.write_bytes(b"some bytes" * 100)
    source = path.parent if name == "lmdb/data.mdb" else path
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        list_source(source)
    assert "\n" not in str(caught.value)
    config = DataConfig(data="folder", data_dir=str(source))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load(config, 0)


def test_flat_archives_and_several_are_refused_in_one_line(tmp_path: Path) -> None:
    for k in range(3):
        write_image(tmp_path / "flat" / f"tench_{k}.JPEG")
    archive = make_tar(tmp_path / "flat", tmp_path / "sets" / "flat.tar")
    with pytest.raises(ValueError, match="but 3 images, whose classes nothing says: repack"):
        list_source(archive)
    make_tar(tmp_path / "flat", tmp_path / "sets" / "more.tar")
    with pytest.raises(ValueError, match=r"has 2 archives, flat\.tar, more\.tar, which are not"):
        list_source(tmp_path / "sets")


def test_an_archive_beside_the_folders_that_it_was_unpacked_to_is_not_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train", "test"))
    (root / "set.tar").write_bytes(b"damaged")
    assert len(list_source(root)["train"]) == 20


def test_comparing_a_copied_archive_with_its_pack_reads_it_in_its_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set", ("train", "test"))
    load_folder(make_tar(root, tmp_path / "set.tgz", "w:gz", seed=1))
    capsys.readouterr()
    compared: list[object] = []
    read = folder_cache.try_read
    monkeypatch.setattr(
        folder_cache, "try_read", lambda file: (compared.append(file), read(file))[1]
    )
    load_folder(make_tar(root, tmp_path / "copy.tgz", "w:gz", seed=2))
    assert len(compared) == 40 and "packing" not in capsys.readouterr().out
    assert np.array_equal(read(compared[0]), read(compared[0]))
