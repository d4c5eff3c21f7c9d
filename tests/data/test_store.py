"""Stores: what is read is what was written, damage is told, statistics are exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import levels, load_folder, make_folder, mixed_store, random_store

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Store, datasets, load, store_statistics, store_writer
from alexnet_mp.data.decode import resize
from alexnet_mp.data.statistics import Sums

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("store", [random_store(), mixed_store()], ids=["one side", "two sides"])
def test_a_saved_store_opens_with_the_same_images_labels_and_classes(
    store: Store, tmp_path: Path
) -> None:
    store.save(tmp_path / "store")
    opened = Store.open(tmp_path / "store", verify=True)
    assert opened.classes == store.classes and opened.sides == store.sides
    assert np.array_equal(opened.labels, store.labels)
    assert torch.equal(opened.gather(range(len(store)), 20), store.gather(range(len(store)), 20))


def test_a_store_on_disk_is_a_plain_numpy_array(tmp_path: Path) -> None:
    store = random_store()
    store.save(tmp_path / "store")
    assert np.array_equal(
        np.load(tmp_path / "store" / "images-00000.npy").reshape(40, 3, 12, 12), store.arrays[0]
    )


def test_a_saved_subset_holds_its_images_only(tmp_path: Path) -> None:
    store = random_store()
    store.subset([7, 3]).save(tmp_path / "store")
    assert torch.equal(Store.open(tmp_path / "store").gather([0, 1]), store.gather([7, 3]))


def test_gather_gives_images_of_any_shelf_in_the_order_asked_for() -> None:
    store = mixed_store()
    images = store.gather([5, 0, 9], side=20)
    assert torch.equal(images[0], torch.from_numpy(store.arrays[1][2]))
    assert torch.equal(images[1:2], resize(torch.from_numpy(store.arrays[0][:1]), 20))
    assert torch.equal(images[2], torch.from_numpy(store.arrays[1][4]))


def test_gather_refuses_to_guess_a_side_for_images_of_several() -> None:
    with pytest.raises(ValueError, match="sides 12 20"):
        mixed_store().gather([0, 1])


def test_a_subset_of_a_subset_is_the_images_meant() -> None:
    store = random_store()
    assert torch.equal(store.subset([5, 6, 7]).subset([2, 0]).gather([0, 1]), store.gather([7, 5]))


@pytest.mark.parametrize("side", [9, 31])
def test_resizing_gives_the_same_bits_alone_and_in_a_batch(
    side: int,
) -> None:
    store = random_store(count=600, side=20)
    whole = store.resized(side)
    assert whole is not store and whole.sides == (side,)
    batch = [599, 3, 255, 256, 17]
    assert torch.equal(whole.gather(batch), store.gather(batch, side))
    assert torch.equal(whole.gather([17]), resize(store.gather([17]), side))


def test_a_set_too_large_for_memory_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_mp.data.store.IN_MEMORY", 1000)
    store = random_store()
    assert store.resized(24) is store


def test_reducing_averages_instead_of_dropping_pixels() -> None:
    noise = random_store(1, side=256).gather([0])
    assert (
        noise.float().std() > 70 and resize(noise, 32).float().std() < 12
    )  # two of eight pixels alone would leave half of it


def test_statistics_are_those_of_numpy() -> None:
    store = random_store(count=300)
    images = store.arrays[0].astype(np.float64)
    statistics = store.statistics(12)
    np.testing.assert_allclose(statistics.mean_image, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        statistics.covariance,
        np.cov(images.transpose(1, 0, 2, 3).reshape(3, -1), bias=True),
        rtol=1e-10,
    )


def test_statistics_at_a_smaller_side_are_those_of_the_reduced_images() -> None:
    store = random_store()
    reduced = store.resized(8).statistics(8)
    assert torch.equal(store.statistics(8).mean_image, reduced.mean_image)
    assert torch.equal(store.statistics(8).covariance, reduced.covariance)


def test_every_image_weighs_the_same_in_the_statistics_whatever_its_side() -> None:
    arrays = [np.full((1, 3, 4, 4), 100, np.uint8), np.full((3, 3, 8, 8), 200, np.uint8)]
    store = Store(arrays, np.zeros(4), ["a"], np.array([(0, 0), (1, 0), (1, 1), (1, 2)]))
    statistics = store.statistics(8)
    torch.testing.assert_close(statistics.mean_image, torch.full((3, 8, 8), 175.0))
    torch.testing.assert_close(statistics.covariance, torch.full((3, 3), 1875.0).double())


def test_sums_are_exact_where_32_bits_are_full() -> None:
    white, full = np.full((3, 2, 2), 255, np.uint8), (2**32 - 1) // 255
    sums = Sums()
    sums.add(white)
    sums.counts[2], sums.images[2] = full - 1, np.full((3, 2, 2), 255 * (full - 1), np.uint32)
    for count in (full, full + 1, full + 2):
        sums.add(white)
        assert (sums.images[2] == 255 * count).all() and sums.count == count


def test_statistics_of_a_store_on_disk_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_store().save(tmp_path / "store")
    first = Store.open(tmp_path / "store").statistics(12)
    monkeypatch.setattr(store_statistics, "measure", None)
    assert torch.equal(Store.open(tmp_path / "store").statistics(12).mean_image, first.mean_image)
    with pytest.raises(TypeError):
        Store.open(tmp_path / "store").subset([1, 2]).statistics(
            12
        )  # other images: not the same numbers


def test_statistics_of_every_side_are_kept_in_the_stores_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_store().save(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    expected = {side: store.statistics(side) for side in (8, 12)}
    monkeypatch.setattr(store_statistics, "measure", None)
    for side, statistics in expected.items():
        again = Store.open(tmp_path / "store").statistics(side)
        assert torch.equal(again.mean_image, statistics.mean_image)
        assert torch.equal(again.covariance, statistics.covariance)


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "images-00000.npy"),
        (lambda path: path.unlink(), "images-00000.npy"),
        (lambda path: path.write_bytes(b""), "images-00000.npy"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "labels.npy"),
        (lambda path: path.write_text("{"), "header.json"),
        (lambda path: path.write_text('{"format": "something else"}'), "header.json"),
        (lambda path: path.write_text("[]"), "header.json"),
        (lambda path: path.unlink(), "header.json"),
        (
            lambda path: path.write_text(path.read_text().replace('"version": 2', '"version": 9')),
            "header.json",
        ),
        (lambda path: np.save(path, np.zeros((41, 3, 12, 12), np.uint8)), "images-00000.npy"),
        (lambda path: np.save(path, np.zeros((40, 3, 12, 12), np.float32)), "images-00000.npy"),
    ],
)
def test_a_damaged_store_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, damage, name: str
) -> None:
    random_store().save(tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(ValueError, match=name) as caught:
        Store.open(tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_verifying_finds_a_single_changed_pixel(tmp_path: Path) -> None:
    random_store().save(tmp_path / "store")
    path = tmp_path / "store" / "images-00000.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    Store.open(tmp_path / "store")
    with pytest.raises(ValueError, match="damaged"):
        Store.open(tmp_path / "store", verify=True)


def test_a_store_that_could_not_be_written_whole_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with store_writer.StoreWriter(tmp_path / "store", ["a"]) as writer:
            writer.add(np.zeros((3, 4, 4), np.uint8), 0)
            writer.add(np.zeros((3, 4, 4)), 0)

    with pytest.raises(ValueError, match="float64"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_saving_over_something_is_refused(tmp_path: Path) -> None:
    random_store().save(tmp_path / "store")
    with pytest.raises(FileExistsError, match="exists already"):
        random_store().save(tmp_path / "store")


def test_the_validation_split_has_its_rounded_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 46, 7])
    store = Store([np.arange(153, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)], labels, "abc")
    rest, share = datasets.hold_out(store, 0.1, seed=3)
    assert np.bincount(share.labels).tolist() == [10, 5, 1]  # 4.6 is rounded
    assert sorted(levels(rest) + levels(share)) == list(range(153))


def test_the_validation_split_depends_on_the_seed_alone() -> None:
    store = random_store(200)
    first, again, other = (datasets.hold_out(store, 0.2, seed)[1].places for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_class_with_one_image_keeps_it_for_training() -> None:
    store = random_store(5, classes=4)
    rest, share = datasets.hold_out(store, 0.5, 0)
    assert sorted(rest.labels) == [0, 1, 2, 3] and share.labels.tolist() == [0]


def test_a_set_with_one_image_a_class_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"--validation-share 0\.5"):
        datasets.hold_out(random_store(4), 0.5, 0)


def test_limits_keep_that_many_images_chosen_by_the_seed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", count=20)
    one, two = (
        load(
            DataConfig(
                data="folder", data_dir=str(root), limit_train=9, limit_val=2, limit_test=11
            ),
            seed,
        )
        for seed in (0, 1)
    )
    assert [len(store) for store in (one.train, one.val, one.test)] == [9, 2, 11]
    assert levels(one.test) != levels(two.test)
    assert set(one.test.labels) == {0, 1}  # a shuffle, not the head of the list


@pytest.mark.parametrize("name, available", [("train", 18), ("val", 2), ("test", 20)])
def test_a_limit_beyond_the_set_is_refused_with_the_number_that_there_is(
    tmp_path: Path, name: str, available: int
) -> None:
    root = make_folder(tmp_path / "set")
    with pytest.raises(ValueError, match=f"--limit-{name} 1000: there are {available} images"):
        load_folder(root, **{f"limit_{name}": 1000})
