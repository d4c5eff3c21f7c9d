"""Mean loss, top-1 and top-5 accuracy, over images and never over batches; the table of epochs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_mp.training.input_checks import check_labels, unpack_batch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Scores:
    """Means over `images` images. Accuracies are fractions of 1; top5 is top-min(5, classes)."""

    loss: float
    top1: float
    top5: float
    images: int


def in_float32(output: Any) -> Any:
    """A model's output with half-precision tensors as float32, those of a tuple too."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in HALF else output
    if isinstance(output, tuple):
        parts = [in_float32(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor, its attribute `logits`, or a tuple's first part.

    ValueError where there are none of shape (N, classes).
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = (
            f"of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(output).__name__
        )
        raise ValueError(
            f"the model's output is {found}; logits of shape (images, classes) are needed"
        )
    return logits


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Counts the rows of (N, classes) logits that have their label among the k largest.

    `labels` are class numbers (N,), or class probabilities (N, classes) of which the largest
    counts. With no more than k classes all rows count. One logit alone is a yes or a no: above 0
    for a label above a half.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        return ((logits > 0) == (labels > 0.5)).sum()
    if labels.ndim == 2:
        labels = labels.argmax(1)
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()


def is_summed(criterion: Any) -> bool:
    """Whether `criterion` gives the sum over a batch; otherwise it gives the mean."""
    return getattr(criterion, "reduction", "mean") == "sum"


def loss_of(criterion: Any, output: Any, labels: Tensor) -> Tensor:
    """The criterion's loss as one number; losses per sample are averaged.

    ValueError if it gives something else.
    """
    loss = criterion(output, labels)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the criterion gives {type(loss).__name__}; a tensor with the loss of the batch is "
            "needed"
        )
    return loss.mean() if loss.ndim else loss


def first_loss_of(criterion: Any, output: Any, labels: Tensor) -> Tensor:
    """As `loss_of`; ValueError, in one line, where `criterion` does not take these arguments."""
    try:
        loss = loss_of(criterion, output, labels)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"the criterion, {type(criterion).__name__}, does not take the model's output, "
            f"{described(output)}, with the loader's labels, {described(labels)}: {reason}"
        ) from error
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no parameter that requires a gradient: all are frozen"
        )
    return loss


def described(value: Any) -> str:
    """A model's output or labels in a few words: type, and shape or parts."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if fields := getattr(value, "_fields", None):
        return f"{type(value).__name__}({', '.join(fields)})"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__


def batch_sums(criterion: Any, loss: Tensor, labels: Tensor) -> list[Tensor | int]:
    """[summed loss, what it is to be divided by for the mean loss, images], of one batch.

    The mean of torch's classification losses is over the labels that are not ignored, each with its
    class's weight. So is the mean over batches that comes of these sums.
    """
    images: Tensor | int = len(labels)
    weight: Tensor | int = images
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and labels.ndim == 1:
        counted = labels != criterion.ignore_index
        images = weight = counted.sum()
        if criterion.weight is not None and not is_summed(criterion):
            weight = criterion.weight[labels.where(counted, 0)].mul(counted).sum()
    loss = loss.detach()
    return [loss if is_summed(criterion) else loss * weight, weight, images]


def stack_sums(values: list[Tensor | int], like: Tensor) -> Tensor:
    """One tensor, of the type and device of `like`, of numbers that partly lie on it already."""
    return torch.stack(
        [
            value.detach().to(like.dtype)
            if isinstance(value, Tensor)
            else like.new_full((), value)  # a fill on the device: no copy to wait for
            for value in values
        ]
    )


class EpochMetrics:
    """Sums over the steps of an epoch so far, of this rank's rows.

    They stay on the device, so that no step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps, self.gradient_norm, self.seconds = 0, 0.0, 0.0
        # float64 sums lose nothing over an epoch; MPS has no float64
        self.sums = torch.zeros(
            4, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )  # loss, its weight, images, correct
        self._lap_began = time.perf_counter()

    def batch(self, criterion: Any, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """(4,): what a step adds to the sums, once it is known to count."""
        correct = topk_correct(logits.detach(), labels, 1)
        return stack_sums([*batch_sums(criterion, loss, labels), correct], self.sums)

    def add(self, sums: Tensor, gradient_norm: float) -> None:
        """Adds one successful step."""
        self.sums += sums
        self.steps, self.gradient_norm = self.steps + 1, self.gradient_norm + gradient_norm

    def start_lap(self) -> None:
        """Time counts from here on."""
        self._lap_began = time.perf_counter()

    def end_lap(self) -> None:
        """Adds the time since the last call to `seconds`."""
        began, self._lap_began = self._lap_began, time.perf_counter()
        self.seconds += self._lap_began - began

    def mean_loss(self) -> float:
        """The mean loss of this rank's rows so far. Waits for the device."""
        loss, weight, _, _ = self.sums.tolist()
        return loss / weight if weight else 0.0

    def record(
        self, scores: Scores, validation_seconds: float, all_reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """The figures of a finished epoch for history.jsonl; `scores` are of its validation.

        `all_reduce` adds the other copies' sums. images_per_second is of the training alone.
        """
        loss, weight, images, correct = all_reduce(self.sums.cpu().double()).tolist()
        return {
            "train_loss": loss / weight,
            "train_top1": correct / images,
            "val_loss": scores.loss,
            "val_top1": scores.top1,
            "val_top5": scores.top5,
            "grad_norm": self.gradient_norm / self.steps,
            "images_per_second": images / self.seconds,
            "seconds": round(self.seconds + validation_seconds, 3),
        }

    def state_dict(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The state of all copies of the network: `all_reduce` adds the other copies' sums."""
        return {
            "steps": self.steps,
            "grad_norm": self.gradient_norm,
            "seconds": self.seconds,
            "sums": all_reduce(self.sums.cpu().double()),
        }

    def load_state_dict(self, state: dict[str, Any], first_copy: bool) -> None:
        """The sums of all copies go on as the first one's: added up again, they count once."""
        self.steps, self.gradient_norm = state["steps"], state["grad_norm"]
        self.seconds = state["seconds"]
        sums = state["sums"]
        if len(sums) == 3:  # loss, correct, images: before losses had weights
            sums = sums[[0, 2, 2, 1]]
        self.sums.zero_()
        if first_copy:
            self.sums += sums.to(self.sums)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device,
    criterion: Any = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    name: str = "evaluation",
) -> Scores:
    """Scores of `model` in evaluation mode on batches (images, labels, ...).

    `criterion` gives the mean loss of a batch (default: cross-entropy), or its sum where its
    `reduction` says so. `reduce` adds this rank's sums (float64, CPU) to those of the others and
    corrects for copies. Each submodule is left in the mode, training or evaluation, in which it
    was. ValueError, with the `name` of the loader, if there are no images, or a batch is not one of
    a classifier.
    """
    criterion = nn.CrossEntropyLoss(reduction="sum") if criterion is None else criterion
    sums = torch.zeros(5, dtype=torch.float64)  # loss, its weight, images, top-1, top-5
    with evaluation_mode(model):
        for batch in loader:
            images, labels, *_ = unpack_batch(batch, name)
            if not len(labels):
                continue
            with precision():
                output = in_float32(model(images.to(device)))
            logits = logits_of(output)
            check_labels(labels, logits.shape[1], name, criterion)
            labels = labels.to(device)
            loss = loss_of(criterion, output, labels)
            correct = [topk_correct(logits, labels, k) for k in (1, 5)]
            values = [*batch_sums(criterion, loss, labels), *correct]
            sums += stack_sums(values, loss).cpu().double()  # one copy from the device
    total, weight, images, top1, top5 = reduce(sums).tolist()
    if not images:
        raise ValueError("nothing to evaluate: the loader gave no images")
    return Scores(total / weight, top1 / images, top5 / images, round(images))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule has the mode that it had, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


EPOCH_HEADER = (
    "epoch    step        lr   train loss  train top-1   val loss  val top-1  val top-5  grad norm"
    "  images/s  seconds"
)


def epoch_line(record: dict[str, Any]) -> str:
    """One object of history.jsonl as a line under EPOCH_HEADER."""
    return (
        f"{record['epoch']:5d} {record['step']:7d} {record['lr']:9.2g} "
        f"{record['train_loss']:12.4f} {record['train_top1']:12.1%} "
        f"{record['val_loss']:10.4f} {record['val_top1']:10.1%} {record['val_top5']:10.1%} "
        f"{record['grad_norm']:10.3f} {record['images_per_second']:9.0f} {record['seconds']:8.1f}"
    )
