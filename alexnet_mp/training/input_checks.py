"""Refuses batches that a network cannot take, before the first step.

Later such a batch is an index error, and on CUDA an assertion that ends the context. Only what a
loader gives is judged, batch by batch; the data set behind it may be changed on the way by
samplers, transforms and collate functions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from alexnet_mp.data import Splits, Store
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.image_check import check_images
from alexnet_mp.parallel.context import ParallelContext

WANTED = "(images, labels) is needed"


class LabeledBatch(NamedTuple):
    """A batch of one rank, and its place in the global batch."""

    images: Tensor
    labels: Tensor  # class numbers, int64 (N,), or class probabilities, floating point (N, classes)
    rows: int  # of the global batch
    first_row: int  # of this rank's rows in it


def unpack_batch(batch: Any, loader: str) -> LabeledBatch:
    """A loader's batch (images, labels, ...) as a LabeledBatch.

    Its attributes `rows` and `first_row` say which part of the global batch it is; without them it
    is the whole. ValueError, with the name of the `loader`, where it does not have images and
    labels.
    """
    if isinstance(batch, Mapping):
        keys = ", ".join(repr(key) for key in list(batch)[:8])
        raise ValueError(
            f"the {loader} loader gives a {type(batch).__name__} with the keys {keys}; {WANTED}: "
            "let its collate_fn return the two tensors"
        )
    if isinstance(batch, Tensor | np.ndarray | str):  # whose first two rows are no batch
        raise ValueError(f"the {loader} loader gives a {type(batch).__name__}; {WANTED}")
    try:
        images, labels = batch[0], batch[1]
    except (TypeError, IndexError, KeyError, AttributeError):
        found = type(batch).__name__
        found += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(f"the {loader} loader gives a {found}; {WANTED}") from None
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        raise ValueError(
            f"the {loader} loader gives images as {type(images).__name__}; one tensor is needed: "
            "torchvision's ToTensor makes tensors of images, and a collate_fn stacks them"
        )
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"the {loader} loader gives labels as {type(labels).__name__}; a tensor is needed"
            ) from None
    if images.ndim == 0 or labels.ndim not in (1, 2) or labels.dtype == torch.bool:
        raise ValueError(f"the {loader} loader's labels are {_labels_text(labels)}")
    if len(images) != len(labels):
        raise ValueError(
            f"the {loader} loader gives {len(images)} images with {len(labels)} labels"
        )
    if labels.ndim == 1:
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"the {loader} loader's labels are {_labels_text(labels)}")
        labels = labels.long()
    elif not labels.is_floating_point():
        labels = labels.float()
    rows, first_row = getattr(batch, "rows", len(labels)), getattr(batch, "first_row", 0)
    return LabeledBatch(images, labels, rows, first_row)


def is_empty(batch: Any) -> bool:
    """Whether no rank has an image of the global `batch`; False for what is no batch."""
    try:
        return not getattr(batch, "rows", len(batch[1]))
    except (TypeError, IndexError, KeyError):
        return False


def _labels_text(labels: Tensor) -> str:
    return (
        f"{labels.dtype} of shape {tuple(labels.shape)}; class numbers, one whole number for each "
        "image, or class probabilities of shape (images, classes) are needed"
    )


def check_labels(labels: Tensor, classes: int, loader: str, criterion: Any = None) -> None:
    """ValueError where unpacked labels do not fit `classes` logits.

    Class numbers are looked at on the CPU only: elsewhere that would wait for the device. The
    number that `criterion` ignores is none.
    """
    if labels.ndim == 2:
        if labels.shape[1] != classes:
            raise ValueError(
                f"the {loader} loader's labels are of shape {tuple(labels.shape)}, but the network "
                f"has {classes} classes: class numbers (images,) or probabilities "
                f"(images, {classes}) are needed"
            )
        return
    if labels.device.type != "cpu" or not len(labels):
        return
    ignored = getattr(criterion, "ignore_index", None)
    lowest, highest = int(labels.min()), int(labels.max())
    if ignored is not None and (lowest < 0 or highest >= classes):
        labels = labels[labels != ignored]
        if not len(labels):
            return
        lowest, highest = int(labels.min()), int(labels.max())
    check_range(lowest, highest, classes, loader)


def check_range(lowest: int, highest: int, classes: int, loader: str) -> None:
    """ValueError where labels from `lowest` to `highest` are not within 0 and `classes` - 1."""
    if lowest < 0:
        raise ValueError(
            f"the {loader} loader has a label {lowest}: classes are numbered from 0 to "
            f"{classes - 1}"
        )
    if highest >= classes:
        raise ValueError(
            f"the {loader} loader has labels from {lowest} to {highest}, but the network has "
            f"{classes} classes, 0 to {classes - 1}: make it with {highest + 1} classes (--classes "
            f"{highest + 1}), or number the classes from 0"
        )


def known_classes(model: nn.Module) -> int | None:
    """Returns the number of logits of `model`, where that is known without running it."""
    network = our_network(model)
    if network is None:
        return None
    classes = {
        head.out_features if type(head) is nn.Linear else None
        for head in (getattr(column, "fc8", None) for column in network.columns.values())
    }
    return classes.pop() if len(classes) == 1 else None


def our_network(model: nn.Module) -> AlexNet | None:
    """`model`, if it is an AlexNet whose input is its own, not changed by a subclass or a hook."""
    if not isinstance(model, AlexNet) or model._forward_pre_hooks:
        return None
    is_ours = getattr(model.forward, "__module__", "").startswith("alexnet_mp.")
    return model if is_ours else None


def check_batch(batch: Any, loader: str, model: nn.Module, criterion: Any = None) -> None:
    """ValueError where `model` cannot take `batch`, as far as that shows without running it."""
    images, labels, *_ = unpack_batch(batch, loader)
    if not len(images):
        return
    if network := our_network(model):
        try:
            check_images(images, network.config)
        except ValueError as error:
            raise ValueError(f"the {loader} loader's {error}") from None
    classes = known_classes(model)
    if classes is not None:
        check_labels(labels, classes, loader, criterion)


def check_first_batch(
    batch: Any, model: nn.Module, context: ParallelContext, criterion: Any = None
) -> None:
    """Checks that `model` can take the first batch, and that all ranks of a network have the same.

    ValueError, on all ranks alike.
    """
    failure, shape, dtype, numbers = None, None, None, None
    try:
        check_batch(batch, "training", model, criterion)
        images, labels, *_ = unpack_batch(batch, "training")
        shape, dtype, numbers = list(images.shape), str(images.dtype), labels.tolist()
    except ValueError as error:
        failure = str(error)
    everywhere = context.gather((failure, shape, dtype, numbers))
    for rank, (problem, *batch_there) in enumerate(everywhere):
        if problem:
            raise ValueError(problem)
        first = rank - rank % context.column_ranks
        expected = everywhere[first][1:]
        if batch_there != list(expected):
            raise ValueError(
                f"rank {rank} was given another first batch than rank {first}, which holds other "
                f"columns of the same network: images {batch_there[0]}, labels "
                f"{batch_there[2][:8]} against "
                f"{expected[0]}, {expected[2][:8]}"
            )


def check_loader(
    loader: Any,
    name: str,
    model: nn.Module,
    context: ParallelContext,
    criterion: Any = None,
    peek: bool = False,
) -> None:
    """Looks at what `loader` will give, without taking anything from it.

    Our own loaders have the labels of their store. `peek`: the first batch of a list, and of a
    DataLoader that can be read again, is looked at now; all random streams stay as they were. Other
    loaders are judged by what they give. ValueError, on all ranks alike, names the loader and what
    is wrong.
    """
    store, classes, first, failure = (
        getattr(loader, "store", None),
        known_classes(model),
        None,
        None,
    )
    if peek and length_of(loader):
        if isinstance(loader, list | tuple):
            first = loader[0]
        elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            with random_streams_kept():
                first = next(iter(loader))
    try:
        if length_of(loader) == 0:
            raise ValueError(
                f"the {name} loader has no batches: fewer images than a batch with drop_last, or "
                "none at all"
            )
        if isinstance(store, Store) and classes is not None and len(store.labels):
            check_range(int(store.labels.min()), int(store.labels.max()), classes, name)
        if first is not None:
            check_batch(first, name, model, criterion)
    except ValueError as error:
        failure = str(error)
    for problem in context.gather(failure):
        if problem:
            raise ValueError(problem)


def length_of(loader: Any) -> int | None:
    """The number of batches, or None: over an IterableDataset a DataLoader's len() raises."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Puts the global random streams of Python, NumPy and torch back to where they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def check_alike(context: ParallelContext, splits: Splits) -> None:
    """ValueError, on all ranks alike, where they have loaded different images."""
    mine = fingerprint(splits)
    for rank, theirs in enumerate(everywhere := context.gather(mine)):
        if theirs != everywhere[0]:
            raise ValueError(
                f"rank {rank} has other data than rank 0: {theirs[0]} images of {theirs[1]} "
                f"classes (digest {theirs[2]}), not {everywhere[0][0]} of {everywhere[0][1]} "
                f"({everywhere[0][2]}); do all hosts see the same --data-dir?"
            )


def fingerprint(splits: Splits) -> tuple[list[int], int, str]:
    """(images of the three splits, classes, digest of all labels and of a few images of each)."""
    digest, stores = hashlib.blake2b(digest_size=6), (splits.train, splits.val, splits.test)
    for store in stores:
        digest.update(repr(store.classes).encode() + store.labels.tobytes())
        for index in np.linspace(0, max(len(store) - 1, 0), min(len(store), 8)).astype(int):
            digest.update(store.gather([index], max(store.sides)).numpy().tobytes())
    return [len(store) for store in stores], len(splits.train.classes), digest.hexdigest()
