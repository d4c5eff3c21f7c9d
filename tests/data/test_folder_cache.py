"""Packs of image folders are found by content, whatever the place of the folder, and made once."""

import os
import shutil
import time
from pathlib import Path

import pytest
from image_sets import levels, load_folder, make_folder, write_image
from ranks import run

from alexnet_mp.config import DataConfig
from alexnet_mp.data import decode_pool, folder_cache, load

pytestmark = pytest.mark.usefixtures("cache")

Output = pytest.CaptureFixture[str]


def bitmaps(root: Path, first: int = 0) -> Path:
    """Images whose files are all of one size, as BMP's are, each of another gray level."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for k in range(3):
                write_image(root / split / name / f"{k}.bmp", color=(first,) * 3)
                first += 1
    return root


def packs(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("folder-*"))


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_cache, "pack_split", None)


def test_a_copy_of_a_folder_elsewhere_uses_the_same_packs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_folder(make_folder(tmp_path / "job1"))
    shutil.copytree(tmp_path / "job1", tmp_path / "job2", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "job1")
    before = packs(cache)
    no_packing(monkeypatch)
    again = load_folder(tmp_path / "job2")
    assert levels(again.train) == levels(first.train) and levels(again.test) == levels(first.test)
    assert packs(cache) == before and len(before) == 2


def test_an_unchanged_folder_is_known_without_opening_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "set")
    load_folder(root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    load_folder(tmp_path / "copy")  # compared once
    no_packing(monkeypatch)
    monkeypatch.setattr(folder_cache, "try_read", None)
    assert levels(load_folder(tmp_path / "copy").test) == list(range(20, 40))


def test_a_file_changed_in_place_to_the_same_size_is_packed_again(
    tmp_path: Path, cache: Path
) -> None:
    root = bitmaps(tmp_path / "set")
    load_folder(root)
    size = (root / "test" / "cat" / "1.bmp").stat().st_size
    write_image(root / "test" / "cat" / "1.bmp", color=(99,) * 3)
    assert (root / "test" / "cat" / "1.bmp").stat().st_size == size
    assert levels(load_folder(root).test) == [6, 99, 8, 9, 10, 11]
    assert len(packs(cache)) == 3


def test_files_that_were_only_touched_are_not_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = bitmaps(tmp_path / "set")
    load_folder(root)
    os.utime(root / "test" / "cat" / "1.bmp", (1, 1))
    no_packing(monkeypatch)
    assert levels(load_folder(root).test) == list(range(6, 12))


def test_two_sets_of_the_same_names_and_sizes_keep_a_pack_each(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = bitmaps(tmp_path / "one"), bitmaps(tmp_path / "two", 100)
    for root in (one, two):
        load_folder(root)
    no_packing(monkeypatch)
    assert levels(load_folder(one).test)[0] == 6 and levels(load_folder(two).test)[0] == 106
    assert len(packs(cache)) == 4


def test_files_that_were_left_out_are_compared_by_their_place_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = bitmaps(tmp_path / "set")
    (root / "train" / "cat" / "1.bmp").write_bytes(b"no image")
    first = load_folder(root, on_error="skip")
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    no_packing(monkeypatch)
    again = load_folder(tmp_path / "copy", on_error="skip")
    assert levels(again.train) == levels(first.train) and len(first.train) + len(first.val) == 5


def test_of_a_large_copied_folder_some_files_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_folder(make_folder(tmp_path / "set", count=20))
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    compared: list[Path] = []
    read = folder_cache.try_read
    monkeypatch.setattr(folder_cache, "COMPARED", 5)
    monkeypatch.setattr(
        folder_cache, "try_read", lambda file: (compared.append(file), read(file))[1]
    )
    load_folder(tmp_path / "copy")
    train = sorted(file for file in compared if "train" in file.parts)
    assert len(compared) == 10 and len(train) == 5
    assert {file.parent.name for file in train} == {"cat", "dog"}


def test_leaving_bad_files_out_is_not_taken_for_having_all(tmp_path: Path) -> None:
    root = bitmaps(tmp_path / "set")
    (root / "train" / "cat" / "1.bmp").write_bytes(b"no image")
    load_folder(root, on_error="skip")
    with pytest.raises(ValueError, match=r"cannot read .*1\.bmp"):
        load_folder(root)


def test_a_packed_training_set_brings_the_sums_for_its_statistics(
    tmp_path: Path, cache: Path
) -> None:
    load_folder(make_folder(tmp_path / "set"))
    assert len(list(cache.glob("folder-*/train/sums.npz"))) == 1
    assert not list(cache.glob("folder-*/test/sums.npz"))


def test_a_start_that_uses_a_set_marks_it_as_used(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "set")
    load_folder(root)
    for pack in cache.glob("folder-*"):
        os.utime(pack, (10**9, 10**9))
    load_folder(root)
    assert all(time.time() - pack.stat().st_mtime < 60 for pack in cache.glob("folder-*"))


def test_a_cache_that_is_too_small_names_the_flag_and_a_smaller_way(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "set")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**4))
    words = (
        rf"packing {root}/train into {cache}: needs about 24 kB, 10 kB are free there; "
        rf"name a folder .*--cache-dir .*XDG_CACHE_HOME.*launch/pack.py {root} STORE --encode jpeg"
    )
    with pytest.raises(ValueError, match=words) as caught:
        load_folder(root)
    assert "\n" not in str(caught.value) and packs(cache) == []


def test_the_flag_says_where_packs_are_kept(tmp_path: Path, cache: Path) -> None:
    load_folder(make_folder(tmp_path / "set"), cache_dir=str(tmp_path / "scratch"))
    assert len(packs(tmp_path / "scratch")) == 2 and not cache.exists()


def test_a_flag_that_names_no_usable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/cache cannot be written: set --cache-dir"):
        load_folder(make_folder(tmp_path / "set"), cache_dir=str(tmp_path / "file" / "cache"))


def test_sets_that_lie_unused_in_the_cache_are_named_with_their_size(
    tmp_path: Path, cache: Path, capsys: Output
) -> None:
    load_folder(make_folder(tmp_path / "old"))
    assert "not used for a week" not in capsys.readouterr().out
    for pack in cache.glob("folder-*"):
        os.utime(pack, (10**9, 10**9))
    load_folder(make_folder(tmp_path / "new", count=11))
    out = capsys.readouterr().out
    assert f"{cache} also holds " in out and "kB of image sets that were not used for a week" in out
    assert f"of {tmp_path / 'old' / 'train'}, last used 2001-09-09)" in out


def load_as_another_job(
    rank: int, root: str, locks: bool, seconds: float
) -> tuple[list[int], list[int], int]:
    """Loads the folder as the first rank of a job of its own; slowly, so that two jobs meet."""
    packed = []
    pack, read = folder_cache.pack_split, decode_pool.try_read

    def slow(file: Path) -> object:
        time.sleep(seconds)
        return read(file)

    def refuse(*args: object) -> None:
        raise OSError(9, "Bad file descriptor")

    folder_cache.pack_split = lambda *args, **options: (
        packed.append(1),
        pack(*args, **options),
    )[1]
    decode_pool.try_read = slow
    if not locks:
        import fcntl

        fcntl.flock = refuse
        time.sleep(0.5 * rank)
    splits = load(DataConfig(data="folder", data_dir=root), 0)
    return levels(splits.train), levels(splits.test), len(packed)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_of_two_jobs_that_need_the_same_pack_one_makes_it(
    tmp_path: Path, cache: Path, locks: bool
) -> None:
    root = make_folder(tmp_path / "set", count=20)
    one, two = run(load_as_another_job, 2, str(root), locks, 0.02)
    assert one[:2] == two[:2] and one[2] + two[2] == 2  # train and test, each once
    assert len(packs(cache)) == 2 and not list(cache.glob(".*"))


def test_what_a_killed_job_left_is_finished_by_the_next(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "set")
    left = cache / f".folder-{'0' * 12}.lock"
    left.mkdir(parents=True)
    (left / ".lock").write_text('{"pid": 999999999, "host": "nowhere"}')
    assert levels(load_folder(root).test) == list(range(20, 40))
