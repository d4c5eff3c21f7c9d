"""Drawn and downloaded sets are made once, the same for every rank; else one line says why."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from image_sets import levels, make_folder, random_store
from ranks import process_group, run

from alexnet_mp.config import DataConfig
from alexnet_mp.config.seeds import combine
from alexnet_mp.data import (
    Store,
    datasets,
    downloads,
    folder_cache,
    image_folder,
    load,
    load_split,
    store_format,
    synthetic,
)
from alexnet_mp.data.source import Request

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "COUNTS", {"train": 60, "val": 24, "test": 24})


def test_shapes_are_balanced_and_complete(few_shapes: None) -> None:
    splits = load(DataConfig(), 0)
    assert len(splits.train.classes) == 12 and splits.train.sides == (256,)
    assert (
        np.bincount(splits.train.labels).tolist() == [5] * 12
        and np.bincount(splits.test.labels).tolist() == [2] * 12
    )


def test_shapes_cached_at_a_smaller_side_are_the_large_ones_reduced(
    few_shapes: None, cache: Path
) -> None:
    large, small = load(DataConfig(), 0), load(DataConfig(), 0, side=76)
    assert sorted(path.name for path in cache.iterdir()) == [
        f"shapes-0-{synthetic.VERSION}-{side}px-store{store_format.VERSION}-{split}"
        for side in (256, 76)
        for split in ("test", "train", "val")
    ]
    assert torch.equal(large.train.gather(range(60), 76), small.train.gather(range(60)))
    assert torch.equal(large.train.statistics(76).mean_image, small.train.statistics(76).mean_image)


def test_shapes_are_generated_once_for_each_seed(
    few_shapes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = load(DataConfig(), 0, progress=True, side=32), load(DataConfig(), 1, side=32)
    assert capsys.readouterr().out.count("drawing 60 images") == 1
    assert not torch.equal(first.train.gather([0]), other.train.gather([0]))
    monkeypatch.setattr(synthetic, "draw", None)
    assert torch.equal(load(DataConfig(), 0, side=32).train.gather([0]), first.train.gather([0]))


def test_a_limit_of_few_shapes_draws_only_those_and_keeps_nothing_on_disk(
    few_shapes: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"limit_train": 12, "limit_val": 6, "limit_test": 5}
    drawn, draw = [], synthetic.draw
    monkeypatch.setattr(synthetic, "draw", lambda *args: (drawn.append(args[1:]), draw(*args))[1])
    few = load(DataConfig(**limits), 3, side=32)
    assert len(drawn) == 23 and not cache.exists()
    monkeypatch.setattr(synthetic, "FEW", 0.0)  # from now on all are drawn, and some are taken
    many = load(DataConfig(**limits), 3, side=32)
    assert len(drawn) == 23 + 108 and cache.exists()
    for split in ("train", "val", "test"):
        one, other = getattr(few, split), getattr(many, split)
        assert one.labels.tolist() == other.labels.tolist()
        assert torch.equal(one.gather(range(len(one))), other.gather(range(len(one))))
    with pytest.raises(ValueError, match="--limit-val 25: there are 24 images"):
        load(DataConfig(limit_val=25), 0)


def test_one_split_of_the_shapes_draws_only_that_one(few_shapes: None, cache: Path) -> None:
    test = load_split(DataConfig(), "test", 0, side=32)
    assert [path.name[-5:] for path in cache.iterdir()] == ["-test"] and len(test) == 24
    assert torch.equal(
        test.gather(range(24)), load(DataConfig(), 0, side=32).test.gather(range(24))
    )


def test_no_two_images_of_the_shapes_are_alike_in_any_split(
    few_shapes: None,
) -> None:
    splits = load(DataConfig(), 0, side=32)
    everything = torch.cat(
        [store.gather(range(len(store))) for store in (splits.train, splits.val, splits.test)]
    )
    flat = everything.flatten(1).float() - everything.flatten(1).float().mean(1, keepdim=True)
    closeness = torch.corrcoef(flat) - 2 * torch.eye(len(flat))
    assert closeness.max() < 0.98


def test_mean_colors_do_not_tell_the_class_of_a_shape() -> None:
    count = {"train": 360, "test": 360}
    features = {
        split: torch.tensor(
            np.stack(
                [
                    np.concatenate(
                        [
                            (image := synthetic.draw(0, split, i)[:, ::4, ::4]).mean((1, 2)),
                            image.std((1, 2)),
                        ]
                    )
                    for i in range(n)
                ]
            )
        ).float()
        for split, n in count.items()
    }
    mean, deviation = features["train"].mean(0), features["train"].std(0)
    inputs = {split: (values - mean) / deviation for split, values in features.items()}
    target = torch.arange(360) % 12
    classifier = torch.nn.Linear(6, 12)
    torch.nn.init.zeros_(classifier.weight)
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.cross_entropy(classifier(inputs["train"]), target)
            + 1e-3 * classifier.weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (classifier(inputs["test"]).argmax(1) == target).float().mean()
    assert accuracy < 0.25  # chance is 0.083; area shows a little in the deviations


def test_offline_cifar_10_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        print("torchvision is chatty")
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(
        ValueError,
        match=r"--data-dir .*cifar: .*https://.*cifar-10-python.tar.gz.*resolution.*put cifar-10",
    ) as caught:
        load(DataConfig(data="cifar10", data_dir=str(tmp_path / "cifar")), 0)
    assert "\n" not in str(caught.value)


def test_cifar_10_is_read_from_torchvisions_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    rows = {
        name: rng.integers(0, 256, (20, 3072), np.uint8)
        for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    }
    for name, data in rows.items():
        (base / name).write_bytes(
            pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]})
        )
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{k}" for k in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    splits = load(DataConfig(data="cifar10", data_dir=str(tmp_path)), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [90, 10, 20]
    assert (
        torch.equal(splits.test.gather([7]).flatten(), torch.from_numpy(rows["test_batch"][7]))
        and splits.test.labels[7] == 7
    )


@pytest.mark.parametrize("validation, sizes", [("held-out", [30, 10, 40]), ("val", [40, 40, 40])])
def test_fashion_mnist_validates_as_asked(
    tmp_path: Path, validation: str, sizes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    make_fashion(tmp_path / "set")
    config = DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set"), validation=validation)
    splits = load(config, 0, progress=True)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == sizes
    assert "train: Fashion-MNIST's train images; validation: " in capsys.readouterr().out


def test_one_split_of_fashion_mnist_needs_only_its_files(tmp_path: Path) -> None:
    make_fashion(tmp_path / "set")
    for file in (tmp_path / "set").glob("train-*"):
        file.unlink()
    config = DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set"))
    assert len(load_split(config, "test", 0)) == 40


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
def test_fashion_mnist_is_read_where_debian_or_torchvision_put_it(
    tmp_path: Path, where: str
) -> None:
    images = make_fashion(tmp_path / "set" / where)
    splits = load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)
    assert torch.equal(splits.test.gather([3])[0], torch.from_numpy(images[3]).expand(3, -1, -1))
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [30, 10, 40]
    assert splits.test.classes[9] == "ankle boot" and splits.test.labels[9] == 9


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:1000], lambda content: content[:10] + b"\xff" + content[11:]],
    ids=["cut short", "no such compression"],
)
def test_a_damaged_fashion_mnist_file_is_named(tmp_path: Path, damage) -> None:
    make_fashion(tmp_path / "set")
    path = tmp_path / "set" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: damaged"):
        load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)


def test_offline_fashion_mnist_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(downloads, "DEBIAN_FASHION", tmp_path / "nowhere")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(
        ValueError,
        match=r"--data-dir .*cannot be downloaded.*apt-get install dataset-fashion-mnist, or use",
    ):
        load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path / "set")), 0)


@pytest.mark.skipif(
    not downloads.DEBIAN_FASHION.is_dir(),
    reason="apt-get install dataset-fashion-mnist puts the real files there",
)
def test_the_real_fashion_mnist_is_found_without_a_download(tmp_path: Path) -> None:
    splits = load(DataConfig(data="fashion-mnist", data_dir=str(tmp_path)), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [54000, 6000, 10000]
    assert np.bincount(splits.val.labels).tolist() == [600] * 10
    assert splits.test.labels[:5].tolist() == [9, 2, 1, 1, 6]


def load_on_a_rank(rank: int, root: str) -> tuple[list[int], int, int]:
    """Loads as `ParallelContext.run_once_per_host` would; counts the packings and the listings of
    this rank."""
    packed, listed = [], []
    pack, list_split = folder_cache.pack_split, image_folder.list_split
    folder_cache.pack_split = lambda *args, **options: (
        packed.append(1),
        pack(*args, **options),
    )[1]
    image_folder.list_split = lambda *args: (listed.append(1), list_split(*args))[1]
    with process_group():

        def run_once_per_host(work, usable=None) -> object:
            result = [work() if rank == 0 else None]
            dist.broadcast_object_list(result)
            return result[0] if rank == 0 or (usable and usable(result[0])) else work()

        splits = load(DataConfig(data="folder", data_dir=root), 5, run_once_per_host)
    return levels(splits.val), len(packed), len(listed)


def test_one_rank_lists_and_packs_and_all_see_the_same_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", count=30)
    (first, *work), (second, *none) = run(load_on_a_rank, 2, str(root))
    assert first == second and len(first) == 6
    assert (work, none) == ([2, 2], [0, 0])


class TrainAndTest:
    """A source of 60 training and 20 test images in memory."""

    splits = ("train", "test")
    stores: ClassVar = {name: random_store(n, seed=n) for name, n in (("train", 60), ("test", 20))}

    def __init__(self, request: Request) -> None:
        pass

    def describe(self, split: str) -> str:
        return split

    def open(self, splits: Sequence[str]) -> dict[str, Store]:
        return {split: self.stores[split] for split in splits}


@pytest.fixture
def train_and_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.SOURCES, "shapes", TrainAndTest)


def test_what_is_held_out_is_drawn_class_by_class_in_stored_order() -> None:
    """Written out with a pass over all labels for each class, which is slow for a thousand."""
    labels = np.random.default_rng(1).integers(0, 7, 200)
    labels[labels == 4] = 3  # a class without images
    store = Store([np.zeros((200, 3, 2, 2), np.uint8)], labels, "abcdefg")
    rng, expected = np.random.default_rng(combine(9, "validation")), []
    for label in range(7):
        mine = np.flatnonzero(labels == label)
        expected += rng.permutation(mine)[: round(0.2 * len(mine))].tolist()
    rest, held = datasets.hold_out(store, 0.2, 9)
    assert held.numbers().tolist() == sorted(expected) and len(rest) == 200 - len(expected)


@pytest.mark.parametrize("seed, share", [(5, 0.25), (6, 0.1)])
def test_the_seed_chooses_the_share_that_is_held_out(train_and_test, seed, share) -> None:
    splits = load(DataConfig(validation_share=share), seed)
    rest, held = datasets.hold_out(TrainAndTest.stores["train"], share, seed)
    for store, expected in ((splits.train, rest), (splits.val, held)):
        assert np.array_equal(store.gather(range(len(store))), expected.gather(range(len(store))))
        assert len(store) == len(expected)
    assert len(splits.test) == 20 and splits.validation == "held out from train"


def test_validation_val_trains_on_all_and_validates_on_the_test(train_and_test) -> None:
    splits = load(DataConfig(validation="val"), 0)
    assert [len(store) for store in (splits.train, splits.val, splits.test)] == [60, 20, 20]
    assert np.array_equal(splits.val.gather(range(20)), splits.test.gather(range(20)))
    assert splits.validation == "test images"
