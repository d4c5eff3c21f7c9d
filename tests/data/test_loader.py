"""Loaders: no rank, resume, thread or cache can change a batch."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import make_folder, mixed_store, random_store

from alexnet_mp.config import Config, DataConfig
from alexnet_mp.data import Augment, Loader, Splits, Store, build_loaders
from alexnet_mp.data.image_sets import list_source
from alexnet_mp.data.loader import PREFETCH

pytestmark = pytest.mark.usefixtures("cache")


def loader(
    store: Store | None = None,
    batch_size: int = 16,
    train: bool = True,
    size: int = 9,
    data_rank: int = 0,
    data_ranks: int = 1,
    device: str = "cpu",
) -> Loader:
    store = store or random_store(50)
    config = DataConfig(stored_side=12, crop_of=size, color_noise=0.1)
    return Loader(
        store,
        Augment(config, size, store.statistics(12), device),
        batch_size,
        7,
        train,
        data_rank,
        data_ranks,
        device,
    )


def test_every_image_comes_once_an_epoch_and_the_short_last_batch_too() -> None:
    store = random_store(50, classes=50)
    batches = list(loader(store))
    assert len(batches) == len(loader(store)) == 4 and loader(store).images == 50
    assert [(len(batch.labels), batch.rows, batch.first_row) for batch in batches] == [
        (16, 16, 0)
    ] * 3 + [(2, 2, 0)]
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(50))


def test_a_batch_reads_as_images_and_labels() -> None:
    for images, labels, *_ in loader():
        assert (
            images.shape == (len(labels), 3, 9, 9)
            and images.dtype == torch.float32
            and labels.dtype == torch.int64
        )
    batch = next(iter(loader()))
    assert batch[0] is batch.images and batch[1] is batch.labels


def test_labels_stay_with_their_images() -> None:
    level = np.arange(50, dtype=np.uint8)
    store = Store(
        [np.broadcast_to(level[:, None, None, None], (50, 3, 12, 12)).copy()],
        level,
        [str(k) for k in range(50)],
    )
    whole = Loader(
        store, Augment(DataConfig(stored_side=12, crop_of=9, mean="none"), 9), 16, 0, train=True
    )
    for images, labels, *_ in whole:
        assert torch.equal(images[:, 1, 4, 4].long(), labels)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_ranks_batches_joined_are_the_batch_of_one_rank_bit_for_bit(
    ranks: int, train: bool
) -> None:
    parts = [list(loader(train=train, data_rank=rank, data_ranks=ranks)) for rank in range(ranks)]
    for whole, *shares in zip(loader(train=train), *parts, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert [share.first_row for share in shares] == np.cumsum(
            [0] + [len(share.labels) for share in shares]
        )[:-1].tolist()
        assert {share.rows for share in shares} == {whole.rows}


def test_a_rank_without_a_row_in_the_last_batch_gets_an_empty_one() -> None:
    shapes_ = [list(loader(data_rank=rank, data_ranks=3))[-1].images.shape for rank in range(3)]
    assert shapes_ == [(0, 3, 9, 9), (1, 3, 9, 9), (1, 3, 9, 9)]


def test_a_resumed_epoch_goes_on_with_the_very_batches_that_were_left() -> None:
    whole, resumed = loader(), loader()
    whole.set_epoch(3)
    resumed.set_epoch(3, skip=2)
    for expected, batch in zip(list(whole)[2:], resumed, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(
            batch.labels, expected.labels
        )
    assert len(resumed) == 4


def test_another_epoch_has_another_order_and_other_crops() -> None:
    one = loader(random_store(50, classes=50))
    first, again = list(one), list(one)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    one.set_epoch(1)
    assert [b.labels.tolist() for b in one] != [b.labels.tolist() for b in first]
    assert not torch.equal(one.augment.draw(7, 0, 0, 16).top, one.augment.draw(7, 1, 0, 16).top)


@pytest.mark.parametrize("epoch", [0, 3])
def test_crops_flips_and_colors_are_those_of_the_epoch(epoch: int) -> None:
    one = loader()
    one.set_epoch(epoch, skip=1)
    for number, batch in enumerate(one, 1):
        images = one.store.gather(one.order(epoch)[number * 16 : (number + 1) * 16])
        params = one.augment.draw(7, epoch, number, len(images))
        assert torch.equal(batch.images, one.augment.train(images, params))


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
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(
        np.random.get_state()[1], numpy_before
    )


def loader_threads() -> int:
    return sum(thread.name == "loader" for thread in threading.enumerate())


def test_an_abandoned_iteration_ends_its_thread() -> None:
    for _ in loader(batch_size=1):
        assert loader_threads() == 1
        break
    assert loader_threads() == 0


def test_a_failure_in_the_thread_is_raised_where_the_batches_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is gone")

    one = loader()
    monkeypatch.setattr(one.store, "image", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(one)
    assert loader_threads() == 0


def test_an_interpreter_that_ends_within_an_epoch_ends_at_once() -> None:
    program = (
        "import numpy as np; from alexnet_mp.data import *\n"
        "from alexnet_mp.config import DataConfig\n"
        "store = Store([np.zeros((5000, 3, 76, 76), np.uint8)], np.zeros(5000), ['a'])\n"
        "loader = Loader(store, Augment(DataConfig(mean='none'), 67), 64, train=True)\n"
        "batches = iter(loader); next(batches); print('one')"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("one\n", "")


def test_images_of_several_sides_are_loaded_at_one() -> None:
    store = mixed_store()
    batches = list(
        Loader(
            store, Augment(DataConfig(stored_side=16, crop_of=14, mean="none"), 14), 4, train=True
        )
    )
    assert {batch.images.shape[1:] for batch in batches} == {(3, 14, 14)}


def splits_of(classes: int = 4, side: int = 76) -> Splits:
    return Splits(
        *(random_store(count, side, classes, seed) for seed, count in enumerate((60, 20, 20)))
    )


def test_loaders_are_built_from_a_configuration() -> None:
    config = Config().with_fields(image_size=67, batch_size=16, seed=3)
    train, val, test, augment = build_loaders(
        config, splits_of(), data_rank=0, data_ranks=1, device=torch.device("cpu")
    )
    assert [loader.images for loader in (train, val, test)] == [60, 20, 20]
    assert next(iter(train)).images.shape == (16, 3, 67, 67) and train.augment is augment
    assert train.training and not val.training and not test.training


def test_each_split_has_its_loader_with_the_settings_of_the_run() -> None:
    config = Config().with_fields(image_size=67, batch_size=16, seed=3, workers=2)
    stores = [random_store(count, 76, 4, seed=count) for count in (60, 20, 28)]
    loaders = build_loaders(config, Splits(*stores), data_rank=1, data_ranks=2)[:3]
    for loader, store in zip(loaders, stores, strict=True):
        assert loader.images == len(store)
        assert np.array_equal(loader.store.labels, store.labels)
        assert np.array_equal(loader.store.gather([5]), store.gather([5]))
        assert (loader.seed, loader.batch_size, loader.workers) == (3, 16, 2)
        assert (loader.data_rank, loader.data_ranks) == (1, 2)


def test_images_that_are_not_trained_on_come_in_batches_of_a_parts_size() -> None:
    config = Config().with_fields(image_size=67, batch_size=10, accumulate=4)
    loaders = build_loaders(config, splits_of())[:3]
    assert [loader.batch_size for loader in loaders] == [10, 3, 3]


def test_statistics_come_from_the_training_split_only() -> None:
    splits = splits_of()
    augment = build_loaders(Config().with_fields(image_size=67), splits)[3]
    assert torch.equal(augment.mean_image, splits.train.statistics(76).mean_image)


def test_more_classes_than_the_network_has_are_refused() -> None:
    with pytest.raises(ValueError, match="11 classes found, --classes is 10"):
        build_loaders(Config().with_fields(image_size=67, classes=10), splits_of(11))


def test_batches_are_the_same_if_a_set_is_resized_at_once_or_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config().with_fields(image_size=67, batch_size=16)
    once = build_loaders(config, splits_of(side=28))[0]
    monkeypatch.setattr("alexnet_mp.data.store.IN_MEMORY", 0)
    each = build_loaders(config, splits_of(side=28))[0]
    assert once.store.sides == (76,) and each.store.sides == (28,)
    assert all(torch.equal(a.images, b.images) for a, b in zip(once, each, strict=True))


@pytest.mark.parametrize("mean", ["image-center", "image-aligned", "half", "none"])
@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_threads_batches_are_the_augmented_gathered_images(
    mean: str, divides: bool, train: bool
) -> None:
    store = random_store(50)
    augment = Augment(
        DataConfig(stored_side=12, crop_of=9, color_noise=0.1, color_divides=divides, mean=mean),
        9,
        store.statistics(12),
    )
    one = Loader(store, augment, 16, 7, train)
    for number, batch in enumerate(one):
        images = store.gather(one.order(0)[number * 16 : (number + 1) * 16])
        draw = augment.draw(7, 0, number, len(images))
        expected = (
            augment._scaled(augment._centered(images, draw)) if train else augment.test(images)
        )
        if (
            train
        ):  # as it was computed before there was one pass: the same operations in the same order
            expected = augment._centered(images, draw) + draw.color[:, :, None, None]
            expected = augment._scaled(expected / 1.1 if divides else expected)
        assert torch.equal(batch.images, expected)


@pytest.mark.parametrize("store", [random_store(50), mixed_store()], ids=["one side", "two sides"])
def test_the_number_of_threads_changes_no_bit(store: Store) -> None:
    augment = Augment(
        DataConfig(stored_side=20 if len(store) == 10 else 12, crop_of=9, mean="none"), 9
    )
    one, three = (list(Loader(store, augment, 16, 7, True, workers=workers)) for workers in (1, 3))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, three, strict=True))


def test_batches_that_are_kept_keep_their_values_while_buffers_are_reused() -> None:
    expected = [batch.images.clone() for batch in loader(batch_size=2)]
    kept, places = [], set()
    for number, batch in enumerate(loader(batch_size=2)):
        places.add(batch.images.data_ptr())
        if number % 3 == 0:
            kept.append((number, batch.images[1:]))  # a view holds its batch's memory too
    assert all(torch.equal(images, expected[number][1:]) for number, images in kept)
    assert len(places) < len(kept) + PREFETCH + 4


def test_a_jpeg_store_gives_the_batches_of_its_decoded_images(tmp_path: Path) -> None:
    from alexnet_mp.data import dataset_packer
    from alexnet_mp.data.decode_pool import Packing

    dataset_packer.pack(
        list_source(make_folder(tmp_path / "set")),
        tmp_path / "store",
        Packing("jpeg"),
    )
    store = Store.open(tmp_path / "store" / "train")
    decoded = Store(
        [np.stack([store.image(i) for i in range(len(store))])], store.labels, store.classes
    )
    augment = Augment(DataConfig(stored_side=20, crop_of=16, mean="none"), 16)
    ours, expected = (Loader(kind, augment, 8, 0, True, workers=2) for kind in (store, decoded))
    assert all(torch.equal(a.images, b.images) for a, b in zip(ours, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_travel_beside_the_step_and_are_those_of_the_cpu() -> None:
    expected = [batch.images for batch in loader(batch_size=4)]
    on_gpu = loader(batch_size=4, device="cuda:0")
    busy = torch.randn(4096, 4096, device="cuda")
    for batch, wanted in zip(on_gpu, expected, strict=True):
        for _ in range(20):
            busy = busy @ busy * 1e-4  # the stream of the step is occupied
        torch.testing.assert_close(batch.images.cpu(), wanted, rtol=1e-6, atol=1e-4)
