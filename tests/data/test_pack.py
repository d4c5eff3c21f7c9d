"""launch/pack.py: every kill leaves something that the same command finishes, to the byte as if
nothing had been.
"""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from image_sets import levels, make_folder, pack_slowly, write_image
from PIL import Image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import (
    Store,
    dataset_packer,
    decode,
    decode_pool,
    load,
    store_format,
    store_statistics,
    store_writer,
)
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_sets import list_source

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("ALEXNET_MP_KILLS", "5"))
pytestmark = pytest.mark.usefixtures("cache")


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def noisy_folder(root: Path, count: int = 60) -> Path:
    """Images of three sides, in two classes, two splits."""
    for i in range(count):
        for split in ("train", "test"):
            noise(root / split / "ab"[i % 2] / f"{i:03d}.png", i, (30 + i % 3, 45))
    return root


def pack(
    source: Path, store: Path, *, encode: str = "raw", on_error: str = "stop", **options: object
) -> dict:
    return dataset_packer.pack(list_source(source), store, Packing(encode, on_error, 2), **options)


def contents(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_format, "SHARD", 16)
    monkeypatch.setattr(decode_pool, "CHUNK", 4)


@pytest.mark.parametrize("encode", ["raw", "jpeg"])
def test_a_packed_folder_has_the_pixels_labels_and_paths_of_its_files(
    tmp_path: Path, encode: str, small_shards: None
) -> None:
    source = noisy_folder(tmp_path / "set")
    pack(source, tmp_path / "store", encode=encode)
    train = Store.open(tmp_path / "store" / "train", verify=True)
    assert len(train) == 60 and train.classes == ("a", "b") and train.sides == (30, 31, 32)
    for number, path in enumerate(train.paths):
        pixels, expected = (
            train.image(number).astype(int),
            decode.read_image(source / "train" / f"{path}.png"),
        )
        assert train.classes[train.labels[number]] == Path(path).parent.name
        assert (
            np.array_equal(pixels, expected)
            if encode == "raw"
            else np.abs(pixels - expected).mean() < 60
        )
    splits = load(DataConfig(data="store", data_dir=str(tmp_path / "store")), 0, side=76)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [54, 6, 60]


def test_a_jpeg_store_is_smaller_and_nearly_the_same(tmp_path: Path) -> None:
    y, x = np.mgrid[:256, :256] / 40
    picture = (np.stack([np.sin(x), np.cos(y), np.sin(x * y / 9)], 2) * 100 + 128).astype(np.uint8)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / "set" / split / name / "1.png")
    raw, jpeg = (
        pack(tmp_path / "set", tmp_path / encode, encode=encode)["splits"]["train"]["bytes"]
        for encode in ("raw", "jpeg")
    )
    assert raw == 2 * 3 * 256 * 256 and jpeg < raw / 4
    stored = Store.open(tmp_path / "jpeg" / "train").gather([0])[0].numpy().transpose(1, 2, 0)
    assert np.abs(stored.astype(int) - picture).mean() < 3


@pytest.mark.parametrize("encode", ["raw", "jpeg"])
def test_stored_statistics_are_those_that_would_be_measured(
    tmp_path: Path, encode: str, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(noisy_folder(tmp_path / "set"), tmp_path / "store", encode=encode)
    store = Store.open(tmp_path / "store" / "train")
    in_memory = Store(store.arrays, store.labels, store.classes, store.places)
    most = np.arange(60) % 10 != 3
    wanted = [in_memory.statistics(32), in_memory.subset(np.flatnonzero(most)).statistics(32)]
    measured = []
    sum_images = store_statistics.sum_images
    monkeypatch.setattr(
        store_statistics,
        "sum_images",
        lambda store, side: (measured.append(len(store)), sum_images(store, side))[1],
    )
    for expected, found in zip(
        wanted,
        (store.statistics(32), store.subset(np.flatnonzero(most)).statistics(32)),
        strict=True,
    ):
        assert torch.equal(found.mean_image, expected.mean_image) and torch.equal(
            found.covariance, expected.covariance
        )
    assert measured == [0, 6]  # of the images that were left out only
    header = store_format.read_header(tmp_path / "store" / "train")
    np.testing.assert_allclose(header["covariance"], wanted[0].covariance, rtol=1e-12)


@pytest.mark.parametrize("encode", ["raw", "jpeg"])
def test_the_number_of_threads_changes_no_byte(
    tmp_path: Path, encode: str, small_shards: None
) -> None:
    listings = list_source(noisy_folder(tmp_path / "set"))
    for workers in (1, 5):
        dataset_packer.pack(
            listings, tmp_path / f"store{workers}", Packing(encode, "stop", workers)
        )
    assert contents(tmp_path / "store1") == contents(tmp_path / "store5")


@contextlib.contextmanager
def packing_process(source: Path, store: Path) -> Iterator[multiprocessing.Process]:
    """Has begun to pack when the block starts, and has ended when it is left."""
    ranks.start_server()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(
        target=pack_slowly, args=(str(source), str(store), there)
    )
    process.start()
    assert here.recv()
    yield process
    process.join(60)


def test_a_killed_and_resumed_store_has_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    source = noisy_folder(tmp_path / "set", 120)
    with packing_process(source, tmp_path / "whole") as process:
        began = time.perf_counter()
    duration, rng, interrupted = time.perf_counter() - began, random.Random(0), 0
    assert process.exitcode == 0
    for kill in range(KILLS):
        store = tmp_path / f"killed{kill}"
        with packing_process(source, store) as process:
            time.sleep(rng.uniform(0, duration))
            process.kill()
        if store.is_dir() and (store / dataset_packer.UNFINISHED).exists():
            interrupted += 1
            with pytest.raises(ValueError, match="packing was interrupted; finish it with"):
                load(DataConfig(data="store", data_dir=str(store)), 0)
        with packing_process(source, store) as process:
            pass
        assert process.exitcode == 0 and contents(store) == contents(tmp_path / "whole")
        shutil.rmtree(store)
    assert interrupted > KILLS / 3


def stopped(
    monkeypatch: pytest.MonkeyPatch, source: Path, store: Path, after: int = 70, **options: object
) -> None:
    """Packs until file number `after` and leaves what a kill would."""
    read, count = decode_pool.try_read, []

    def interrupt(file: Path) -> object:
        count.append(file)
        if len(count) > after:
            raise KeyboardInterrupt
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(decode_pool, "try_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(source, store, **options)


def test_finished_shards_are_not_decoded_again_unless_they_are_damaged(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    pack(source, tmp_path / "whole")
    stopped(monkeypatch, source, tmp_path / "store", after=110)
    assert (
        tmp_path / "store" / "train" / "header.json"
    ).exists()  # one split finished, the other begun
    shards = sorted((tmp_path / "store" / "test").glob("images-*.npy"))
    assert shards and not (tmp_path / "store" / "test" / "header.json").exists()
    decoded: list[Path] = []
    read = decode_pool.try_read
    monkeypatch.setattr(decode_pool, "try_read", lambda file: (decoded.append(file), read(file))[1])
    pack(source, tmp_path / "store")
    assert len(decoded) == 60 - 16 * len(shards) and contents(tmp_path / "store") == contents(
        tmp_path / "whole"
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_shard_that_was_damaged_is_made_again(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    source = noisy_folder(tmp_path / "set")
    pack(source, tmp_path / "whole")
    stopped(monkeypatch, source, tmp_path / "store", after=100)
    shard = tmp_path / "store" / split / "images-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_damaged_sums_of_a_shard_are_taken_again(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    pack(source, tmp_path / "whole")
    stopped(monkeypatch, source, tmp_path / "store", after=50)
    sums = tmp_path / "store" / "train" / ".manifest-00000.npz"
    content = bytearray(sums.read_bytes())
    content[-200] ^= 1
    sums.write_bytes(content)
    pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_that_lacks_bad_files_does_not_pass_for_whole(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    source = noisy_folder(tmp_path / "set")
    (source / "train" / "a" / "000.png").write_bytes(b"")
    if finished:
        pack(source, tmp_path / "store", on_error="skip")
    else:
        stopped(monkeypatch, source, tmp_path / "store", after=50, on_error="skip")
        assert (tmp_path / "store" / "train" / ".manifest-00000.json").exists()
    with pytest.raises(ValueError, match=r"cannot read .*a/000\.png: an empty file"):
        pack(source, tmp_path / "store")


def test_a_file_that_changed_meanwhile_is_packed_as_it_is_now(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    stopped(monkeypatch, source, tmp_path / "store", after=100)
    for split in ("train", "test"):
        noise(source / split / "a" / "000.png", 999, (77, 80))
    pack(source, tmp_path / "store")
    for split in ("train", "test"):
        store = Store.open(tmp_path / "store" / split, verify=True)
        assert np.array_equal(
            store.image(store.paths.index("a/000")),
            decode.read_image(source / split / "a" / "000.png"),
        )


def test_a_store_is_not_finished_with_other_options_or_images(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    stopped(monkeypatch, source, tmp_path / "store")
    with pytest.raises(ValueError, match="was begun with encode raw, not jpeg"):
        pack(source, tmp_path / "store", encode="jpeg")
    with pytest.raises(ValueError, match=r"was begun with source .*set, not .*other"):
        pack(noisy_folder(tmp_path / "other"), tmp_path / "store")


def test_a_finished_store_is_never_overwritten_by_other_images(
    tmp_path: Path,
) -> None:
    source = make_folder(tmp_path / "set")
    pack(source, tmp_path / "store")
    before = contents(tmp_path / "store")
    pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == before
    write_image(source / "train" / "cat" / "new.png")
    with pytest.raises(ValueError, match="is complete, and packed from other files"):
        pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_a_folder_with_something_else_in_it_is_not_packed_into(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "set")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds something else already \(letters.txt\)"):
        pack(source, tmp_path / "home")


def test_what_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "set")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**4))
    with pytest.raises(
        ValueError,
        match=r"STORE .*: needs about 48 kB, 10 kB are free there; "
        "name a folder on a larger disk, or take --encode jpeg",
    ):
        pack(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_room_that_a_begun_store_takes_already_is_not_asked_for_again(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    stopped(monkeypatch, source, tmp_path / "store", after=110)
    there = sum(path.stat().st_size for path in (tmp_path / "store").rglob("images-*.npy"))
    whole = 2 * 20 * 3 * (30**2 + 31**2 + 32**2)
    usage = shutil.disk_usage(tmp_path)
    lines: list[str] = []
    for room, fits in ((whole - there - 1000, False), (whole - there + 1000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, room=room: usage._replace(free=room))
        with (
            contextlib.nullcontext() if fits else pytest.raises(ValueError, match="are free there")
        ):
            pack(source, tmp_path / "store", say=lines.append)
    assert "about 346 kB, of which" in lines[0]


def test_what_is_promised_is_on_the_disk_before_the_promise(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard before its manifest, all before the header, the header before the store counts as
    finished.
    """
    events: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def name(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", name(fd))), fsync(fd))[1])
    monkeypatch.setattr(
        os,
        "replace",
        lambda old, new: (events.append((Path(old).name, Path(new).name)), replace(old, new))[1],
    )

    def record_unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == dataset_packer.UNFINISHED:
            events.append(("unlink", path.name))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", record_unlink)
    pack(noisy_folder(tmp_path / "set"), tmp_path / "store")
    train, test = [], []
    for number in range(-(-60 // 16)):
        manifest = f".manifest-{number:05d}"
        train += [f"images-{number:05d}.npy", f"{manifest}.npz", f"{manifest}.json"]
        test += [f"images-{number:05d}.npy", f"{manifest}.json"]
    train += ["paths.json", "sums.npz", "labels.npy", "places.npy", "header.json"]
    test += ["paths.json", "labels.npy", "places.npy", "header.json"]
    renamed = [new for old, new in events if old.endswith(".tmp")]
    assert renamed == ["unfinished.json", *train, *test]
    for number, (old, new) in enumerate(events):
        if old.endswith(".tmp"):  # its content is on the disk before, and its new name after
            assert ("sync", old) in events[:number] and events[number + 1][0] == "sync", new
    assert events[-2:] == [("unlink", "unfinished.json"), ("sync", "store")]


def test_a_disk_that_fills_up_is_one_line_and_keeps_the_finished_shards(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = noisy_folder(tmp_path / "set")
    pack(source, tmp_path / "whole")
    write, count = store_writer.write_shard, []

    def fill(path: Path, *args: object) -> object:
        count.append(path)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "write_shard", fill)
        with pytest.raises(
            ValueError, match=r"no room left .*repeat the command, finished shards are kept"
        ) as caught:
            pack(source, tmp_path / "store")
    assert (
        "\n" not in str(caught.value)
        and len(list((tmp_path / "store" / "train").glob("images-*.npy"))) == 2
    )
    pack(source, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_bad_files_are_named_after_the_others_and_mending_finishes_it(
    tmp_path: Path, small_shards: None
) -> None:
    source = noisy_folder(tmp_path / "set")
    good = (source / "train" / "a" / "010.png").read_bytes()
    (source / "train" / "a" / "010.png").write_bytes(b"<html>")
    with pytest.raises(
        ValueError,
        match=r"010\.png: not an image that Pillow knows.*or leave it out with --on-error skip",
    ):
        pack(source, tmp_path / "store")
    assert len(list((tmp_path / "store" / "train").glob("images-*.npy"))) == 3
    (source / "train" / "a" / "010.png").write_bytes(good)
    assert pack(source, tmp_path / "store")["splits"]["train"]["images"] == 60


def test_skipped_files_are_counted_and_listed_and_no_label_moves(
    tmp_path: Path, small_shards: None
) -> None:
    source = make_folder(tmp_path / "set")
    (source / "train" / "cat" / "3.png").write_bytes(b"")
    report = pack(source, tmp_path / "store", on_error="skip")
    assert (
        report["splits"]["train"]["skipped"] == [["cat/3.png", "an empty file"]]
        and report["splits"]["train"]["images"] == 19
    )
    assert any("cat/3.png: an empty file" in line for line in dataset_packer.report_lines(report))
    assert store_format.read_header(tmp_path / "store" / "train")["skipped"] == [
        ["cat/3.png", "an empty file"]
    ]
    store = Store.open(tmp_path / "store" / "train")
    assert [
        (level, int(label)) for level, label in zip(levels(store), store.labels, strict=True)
    ] == [(level, level // 10) for level in range(20) if level != 3]


def test_checking_reports_every_bad_file_and_writes_nothing(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "set")
    for name in ("train/cat/3.png", "test/dog/4.png"):
        (source / name).write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    report = dataset_packer.check(list_source(source), Packing())
    assert [report["splits"][split]["skipped"] for split in ("train", "test")] == [
        [["cat/3.png", "an empty file"]],
        [["dog/4.png", "an empty file"]],
    ]
    assert report["splits"]["train"]["images"] == 19 and sorted(tmp_path.rglob("*")) == before


def test_a_second_process_does_not_pack_into_the_same_folder(tmp_path: Path) -> None:
    source = noisy_folder(tmp_path / "set", 120)
    with packing_process(source, tmp_path / "store") as process:
        while not (tmp_path / "store" / dataset_packer.UNFINISHED).exists():
            time.sleep(0.01)
        with pytest.raises(ValueError, match="another process is packing into it"):
            pack(source, tmp_path / "store")
    assert process.exitcode == 0
