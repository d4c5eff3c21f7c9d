"""Images: datasets fill stores, loaders give batches of them, augmented for training.

Imports config and ops. Start with `datasets.py`, then `store.py`, `loader.py` and `transforms.py`.
"""

from __future__ import annotations

import torch

from alexnet_mp.config import Config
from alexnet_mp.data.datasets import Splits, load, load_split
from alexnet_mp.data.decode import resize, try_read
from alexnet_mp.data.loader import Batch, Loader
from alexnet_mp.data.statistics import Statistics
from alexnet_mp.data.store import Store
from alexnet_mp.data.transforms import Augment, AugmentParams, needs_statistics
from alexnet_mp.ops.precision import DTYPES

__all__ = [
    "Augment",
    "AugmentParams",
    "Batch",
    "Loader",
    "Splits",
    "Statistics",
    "Store",
    "build_loaders",
    "load",
    "load_split",
    "needs_statistics",
    "resize",
    "try_read",
]


def build_loaders(
    config: Config,
    splits: Splits,
    *,
    data_rank: int = 0,
    data_ranks: int = 1,
    device: torch.device | str = "cpu",
) -> tuple[Loader, Loader, Loader, Augment]:
    """Loaders of the three splits for one data rank, and the augmentation that they share.

    Small sets are resized once, in memory. Batches that are not trained on have the size of one of
    --accumulate's parts, so that they need no more memory. ValueError where the data has more
    classes than the network.

        splits = load(config.data, seed=0)
        config = config.with_fields(classes=len(splits.train.classes))
        train_loader, val_loader, test_loader, augment = build_loaders(config, splits)
        images, labels, *_ = next(iter(train_loader))  # (N, 3, S, S) float32, (N,) int64
    """
    found, classes = len(splits.train.classes), config.model.classes
    if classes and found > classes:
        raise ValueError(
            f"--classes {classes}: {found} classes found, --classes is {classes}; leave the flag "
            "out to take the data's own number"
        )
    size = config.model.image_size
    side = config.data.resized_side(size)
    statistics = splits.train.statistics(side) if needs_statistics(config.data) else None
    parts = config.run.accumulate
    on_cuda = torch.device(device).type == "cuda"
    dtype = DTYPES[config.run.precision] if on_cuda else torch.float32
    augment = Augment(config.data, size, statistics, device, dtype)
    train, val, test = (
        Loader(
            store.resized(side),
            augment,
            config.recipe.batch_size if training else -(-config.recipe.batch_size // parts),
            config.run.seed,
            training,
            data_rank,
            data_ranks,
            device,
            workers=config.run.workers,
        )
        for store, training in ((splits.train, True), (splits.val, False), (splits.test, False))
    )
    return train, val, test, augment
