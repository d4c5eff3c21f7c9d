"""The order of an epoch: every image once, the same for the same seed and epoch, and for a disk in
runs of neighbors.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import make_folder, random_store

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Augment, Loader, Store, dataset_packer, epoch_order
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.epoch_order import BLOCK_SIZE, SHUFFLE_WINDOW, ReadAhead, block_order
from alexnet_mp.data.image_sets import list_source


@given(st.integers(0, 3 * BLOCK_SIZE * SHUFFLE_WINDOW))
def test_blocks_give_every_image_once(count: int) -> None:
    assert np.array_equal(np.sort(block_order(count, 0, 0)), np.arange(count))


def test_blocks_depend_on_seed_and_epoch_and_on_nothing_else() -> None:
    first, again, seed, epoch = (
        block_order(20000, *key) for key in ((1, 2), (1, 2), (0, 2), (1, 3))
    )
    assert (
        np.array_equal(first, again)
        and not np.array_equal(first, seed)
        and not np.array_equal(first, epoch)
    )


def test_a_window_is_whole_blocks_far_apart_and_well_mixed() -> None:
    count = 10 * BLOCK_SIZE * SHUFFLE_WINDOW
    window = block_order(count, 0, 0)[: BLOCK_SIZE * SHUFFLE_WINDOW]
    blocks, sizes = np.unique(window // BLOCK_SIZE, return_counts=True)
    assert len(blocks) == SHUFFLE_WINDOW and set(sizes) == {BLOCK_SIZE}
    assert blocks.min() < SHUFFLE_WINDOW and blocks.max() > 9 * SHUFFLE_WINDOW
    batch = np.unique(window[:128] // BLOCK_SIZE)
    # 128 draws from 128 blocks meet 1 - 1/e of them, 81; without mixing it would be 2.
    assert 65 < len(batch) < 97


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_the_order_does_not_depend_on_rank_or_resume(
    shuffle: str,
) -> None:
    store = random_store(300, classes=300)
    augment = Augment(DataConfig(stored_side=12, crop_of=9, mean="none", shuffle=shuffle), 9)
    whole = [
        label for batch in Loader(store, augment, 32, 5, True) for label in batch.labels.tolist()
    ]
    assert sorted(whole) == list(range(300)) and (
        shuffle == "full" or whole == block_order(300, 5, 0).tolist()
    )
    resumed = Loader(store, augment, 32, 5, True)
    resumed.set_epoch(0, skip=4)
    assert [label for batch in resumed for label in batch.labels.tolist()] == whole[128:]
    halves = [list(Loader(store, augment, 32, 5, True, rank, 2)) for rank in (0, 1)]
    assert [
        label
        for pair in zip(*halves, strict=True)
        for batch in pair
        for label in batch.labels.tolist()
    ] == whole


def test_the_disk_hears_of_every_image_once_and_a_window_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epoch_order, "BLOCK_SIZE", 4)
    monkeypatch.setattr(epoch_order, "SHUFFLE_WINDOW", 5)
    store, told = random_store(100), []
    monkeypatch.setattr(epoch_order, "stored_bytes", lambda array, first, last: (first, last))
    monkeypatch.setattr(epoch_order, "will_need", told.append)
    numbers = epoch_order.block_order(100, 0, 0)
    ahead = ReadAhead(store, numbers)
    for position in range(0, 100, 8):
        ahead.reach(position)
        known = np.concatenate([np.arange(first, last) for first, last in told])
        soon = numbers[: (position // 20 + 2) * 20]
        assert sorted(known) == sorted(soon)
    assert all(last - first >= 4 for first, last in told)


@pytest.mark.parametrize("encode", ["raw", "jpeg"])
def test_announcing_a_store_on_disk_changes_no_pixel(tmp_path: Path, encode: str) -> None:
    listings = list_source(make_folder(tmp_path / "set"))
    dataset_packer.pack(listings, tmp_path / "store", Packing(encode))
    store = Store.open(tmp_path / "store" / "train")
    before = store.gather(range(20))
    ReadAhead(store, np.arange(20)).reach(0)
    assert torch.equal(store.gather(range(20)), before)
