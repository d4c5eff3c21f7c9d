"""Mapped files hold no descriptor, and a large store costs neither descriptors nor an object per
image.
"""

import errno
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import run

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Augment, Loader, Store, mapping, store_format, store_writer
from alexnet_mp.data.mapping import map_file, release, will_need

SHARDS = 300


def many_shards(path: Path, images: int = 2 * SHARDS) -> Store:
    """A store of small shards, two images each, made from one file by hard links."""
    index = store_writer.StoreIndex()
    path.mkdir(parents=True)
    pair = [store_writer.EncodedImage(4, np.full((3, 4, 4), k, np.uint8)) for k in range(2)]
    first = path / store_format.shard_name(0)
    entry, order, _ = store_writer.write_shard(first, pair)
    for number in range(images // 2):
        if number:
            os.link(first, path / store_format.shard_name(number))
        index.add(entry, order, [0, 1])
    index.write(path, ["a", "b"])
    return Store.open(path)


def open_and_read(rank: int, path: str) -> tuple[int, int]:
    """Opens the store and reads all images under a limit of 100 descriptors; how many images, and
    how many descriptors it took.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    before = len(os.listdir("/proc/self/fd"))
    store = Store.open(path, verify=True)
    images = store.gather(range(len(store)))
    assert images[:, 0, 0, 0].tolist() == [0, 1] * SHARDS
    return len(store), len(os.listdir("/proc/self/fd")) - before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="/proc tells the open descriptors")
def test_a_store_of_300_shards_opens_under_100_descriptors(tmp_path: Path) -> None:
    many_shards(tmp_path / "store")
    assert run(open_and_read, 1, str(tmp_path / "store")) == [(2 * SHARDS, 0)]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_is_one_line_that_names_ulimit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    many_shards(tmp_path / "store")
    monkeypatch.setattr(mapping, "_mapped", full)
    with pytest.raises(ValueError, match=r"images-00000\.npy: Too many .* `ulimit -n 4096`"):
        Store.open(tmp_path / "store")


def test_a_store_makes_no_python_object_per_image(tmp_path: Path) -> None:
    path, count = tmp_path / "store", 20_000
    Store([np.zeros((count, 3, 4, 4), np.uint8)], np.arange(count) % 7, "abcdefg").save(path)
    augment = Augment(DataConfig(stored_side=4, crop_of=4, mean="none"), 4)
    next(iter(Loader(Store.open(path), augment, 8, train=True)))  # what is made once stays
    before = sys.getallocatedblocks()
    store = Store.open(path).subset(np.arange(1, count))
    batch = next(iter(loader := Loader(store, augment, 8, train=True)))
    assert len(batch.labels) == 8 and loader.images == count - 1
    assert sys.getallocatedblocks() - before < count / 10


def test_a_mapped_file_is_read_only_and_keeps_its_bytes_when_released(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    mapped = map_file(tmp_path / "file")
    part = mapped[5000:70_000].reshape(100, 650)
    will_need(part)
    release(part)
    assert np.array_equal(mapped, content) and np.array_equal(part.ravel(), content[5000:70_000])
    assert not mapped.flags.writeable and not part.flags.writeable


def test_a_part_outlives_the_array_that_was_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)))
    part = map_file(tmp_path / "file")[7:9]
    (tmp_path / "file").unlink()
    assert part.tolist() == [7, 8] and len(mapping._mappings) >= 1


def test_a_mapping_ends_with_its_last_array(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    before = len(mapping._mappings)
    mapped = map_file(tmp_path / "file")
    assert len(mapping._mappings) == before + 1
    del mapped
    assert len(mapping._mappings) == before


def test_releasing_other_memory_leaves_it_alone() -> None:
    array = np.full(100_000, 7, np.uint8)
    release(array)
    release(array[4096:].reshape(2, -1))
    assert (array == 7).all()


def test_an_empty_file_maps_to_an_empty_array(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert map_file(tmp_path / "file").shape == (0,)
