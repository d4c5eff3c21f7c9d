"""Batches that a network cannot take, refused before the first step: later they are an index error, on CUDA an assert that ends the context."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_mp.data import Splits
from alexnet_mp.model.alexnet import PAPER_CLASSES, AlexNet
from alexnet_mp.parallel.context import ParallelContext


def known_classes(model: nn.Module) -> int | None:
    """How many logits `model` gives, where that is known without running it."""
    return (model.config.classes or PAPER_CLASSES) if isinstance(model, AlexNet) else None


def check_loader(loader: Any, name: str, model: nn.Module) -> None:
    """Looks at what `loader` will give, as far as that can be told beforehand. ValueError names the loader and what is wrong."""
    classes = known_classes(model)
    if classes is None:
        return
    labels = labels_of(loader)
    if labels is not None and len(labels):
        check_range(int(labels.min()), int(labels.max()), classes, name)
    sample = _first_item(loader)
    if sample is not None:
        check_batch(sample[0][None], torch.as_tensor(sample[1]).reshape(1), name, model)


def labels_of(loader: Any) -> np.ndarray | None:
    """All labels that `loader` will give, where its store or data set has them in one place."""
    dataset = getattr(loader, "dataset", None)
    tensors = getattr(dataset, "tensors", ())
    found = getattr(getattr(loader, "store", None), "labels", None)
    if found is None:
        found = tensors[1] if len(tensors) > 1 else getattr(dataset, "targets", None)
    try:
        labels = None if found is None else np.asarray(found)
    except (TypeError, ValueError):
        return None
    return labels if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _first_item(loader: Any) -> Any:
    """The data set's first (image, label), which costs no worker; drawing it leaves all random streams as they were."""
    dataset = getattr(loader, "dataset", None)
    if (
        not isinstance(loader, torch.utils.data.DataLoader)
        or isinstance(dataset, torch.utils.data.IterableDataset)
        or not len(dataset)
    ):
        return None
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            item = dataset[0]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    usable = (
        isinstance(item, Sequence)
        and len(item) > 1
        and isinstance(item[0], Tensor)
        and isinstance(item[1], int | Tensor | np.integer)
    )
    return item if usable and (not isinstance(item[1], Tensor) or item[1].ndim == 0) else None


def check_batch(images: Tensor, labels: Tensor, name: str, model: nn.Module) -> None:
    """ValueError where a batch is not (N, 3, S, S) images and N labels. A label's range is looked at on the CPU only: elsewhere it would wait."""
    if len(images) != len(labels):
        raise ValueError(f"the {name} loader gives {len(images)} images with {len(labels)} labels")
    if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"the {name} loader's labels are {labels.dtype} of shape {tuple(labels.shape)}; class numbers, one whole number "
            "for each image, are needed"
        )
    if isinstance(model, AlexNet):
        side = model.config.image_size
        if images.ndim != 4 or images.shape[1] != 3:
            channels = images.shape[1] if images.ndim == 4 else None
            hint = (
                "; repeat a gray channel three times"
                if channels == 1
                else "; leave out the alpha channel"
                if channels == 4
                else ""
            )
            raise ValueError(
                f"the {name} loader's images are {tuple(images.shape)}, not (images, 3 channels, {side}, {side}){hint}"
            )
        if tuple(images.shape[2:]) != (side, side):
            raise ValueError(
                f"the {name} loader's images are {images.shape[2]}x{images.shape[3]} pixels; this network takes {side}x{side} "
                "(--image-size, or resize them)"
            )
        if not images.dtype.is_floating_point:
            raise ValueError(
                f"the {name} loader's images are {images.dtype}; floating point is needed (torchvision's ToTensor, or .float())"
            )
    classes = known_classes(model)
    if classes is not None:
        check_labels(labels, classes, name)


def check_first(batch: Any, model: nn.Module, context: ParallelContext) -> None:
    """The first batch of training: one that `model` can take, and the same on all ranks that share a network. ValueError, on all ranks alike."""
    images, labels = batch[0], batch[1]
    failure = None
    try:
        check_batch(images, labels, "training", model)
    except ValueError as error:
        failure = str(error)
    everywhere = context.gather((failure, list(images.shape), str(images.dtype), labels.tolist()))
    for rank, (problem, *batch_there) in enumerate(everywhere):
        if problem:
            raise ValueError(problem)
        first = rank - rank % context.column_ranks
        expected = everywhere[first][1:]
        if batch_there != list(expected):
            raise ValueError(
                f"rank {rank} was given another first batch than rank {first}, which holds other columns of the same network: "
                f"images {batch_there[0]}, labels {batch_there[2][:8]} against {expected[0]}, {expected[2][:8]}"
            )


def check_alike(context: ParallelContext, splits: Splits) -> None:
    """ValueError, on all ranks alike, where they have loaded different images."""
    mine = fingerprint(splits)
    for rank, theirs in enumerate(everywhere := context.gather(mine)):
        if theirs != everywhere[0]:
            raise ValueError(
                f"rank {rank} has other data than rank 0: {theirs[0]} images of {theirs[1]} classes (digest {theirs[2]}), "
                f"not {everywhere[0][0]} of {everywhere[0][1]} ({everywhere[0][2]}); do all hosts see the same --data-dir?"
            )


def fingerprint(splits: Splits) -> tuple[list[int], int, str]:
    """(images of the three splits, classes, digest of all labels and of a few images of each)."""
    digest, stores = hashlib.blake2b(digest_size=6), (splits.train, splits.val, splits.test)
    for store in stores:
        digest.update(repr(store.classes).encode() + store.labels.tobytes())
        for index in np.linspace(0, max(len(store) - 1, 0), min(len(store), 8)).astype(int):
            digest.update(store.gather([index], max(store.sides)).numpy().tobytes())
    return [len(store) for store in stores], len(splits.train.classes), digest.hexdigest()


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """ValueError where a label on the CPU is not one of `classes`."""
    if labels.device.type == "cpu" and len(labels):
        check_range(int(labels.min()), int(labels.max()), classes, name)


def check_range(lowest: int, highest: int, classes: int, name: str) -> None:
    """ValueError where labels from `lowest` to `highest` are not within 0 and `classes` - 1."""
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"the {name} loader has labels from {lowest} to {highest}, but the network has {classes} classes, 0 to {classes - 1}: "
            f"set --classes {highest + 1}, or number the classes from 0"
            if lowest >= 0
            else f"the {name} loader has a label {lowest}: classes are numbered from 0 to {classes - 1}"
        )
