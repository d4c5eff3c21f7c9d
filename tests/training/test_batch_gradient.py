"""Accumulation: a batch in parts has the gradient of the whole, and is one step in all respects."""

import pytest
import torch
from small_nets import TINY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alexnet_mp import AlexNet, Trainer
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training.batch_gradient import divide
from alexnet_mp.training.input_checks import LabeledBatch
from alexnet_mp.training.profiler import Profiler
from alexnet_mp.training.sgd2012 import SGD2012
from alexnet_mp.training.trainer import NonFiniteError

CPU = torch.device("cpu")


def batch(count: int, first_row: int = 0) -> LabeledBatch:
    images = torch.arange(count * 12.0).view(count, 3, 2, 2)
    return LabeledBatch(images, torch.arange(count), rows=100, first_row=first_row)


def points(n: int = 11) -> TensorDataset:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) * 2).floor().clamp(0, 2).long())


def trainer(model: nn.Module | None = None, reduction: str = "sum", **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 3) if model is None else model
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options = {"patience": 0, "verbose": False, "restore_best_weights": False} | options
    return Trainer(model, criterion, SGD2012(model.parameters(), lr=0.1), "cpu", **options)


def trained(accumulate: int, model: nn.Module | None = None, **options) -> Trainer:
    """Two epochs of batches of 4, 4 and 3 points."""
    one = trainer(model, accumulate=accumulate, **options)
    one.train(DataLoader(points(), 4), DataLoader(points(), 4), 2)
    return one


@pytest.mark.parametrize(
    ("rows", "parts", "sizes"),
    [(8, 4, [2] * 4), (7, 3, [2, 2, 3]), (3, 8, [1, 1, 1]), (5, 1, [5]), (0, 4, [0])],
)
def test_parts_differ_by_one_row_at_most_and_none_is_empty_unless_the_batch_is(
    rows: int, parts: int, sizes: list[int]
) -> None:
    assert [len(part.images) for part in divide(batch(rows), parts)] == sizes


def test_parts_are_the_rows_of_the_batch_and_know_their_place_in_it() -> None:
    whole = batch(7, first_row=20)
    parts = divide(whole, 3)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert [part.first_row for part in parts] == [20, 22, 24]
    assert {part.rows for part in parts} == {100}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_any_module_trains_in_parts_as_at_once(parts: int) -> None:
    whole, divided = trained(1), trained(parts)
    assert divided.step == whole.step == 6
    # float32 sums over rows in another order
    assert torch.allclose(divided.model.weight, whole.model.weight, rtol=1e-5)
    for name in ("train_loss", "train_top1", "val_loss", "grad_norm"):
        for line, expected in zip(divided.history, whole.history, strict=True):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)


def test_a_row_has_the_dropout_mask_of_its_place_in_the_whole_batch() -> None:
    images = torch.randn(6, 3, 67, 67, generator=torch.Generator().manual_seed(1)).double()
    data = [(images, torch.tensor([0, 1, 2, 0, 1, 2]))]
    weights = []
    for parts in (1, 3):
        one = trainer(AlexNet(TINY, seed=1).double(), accumulate=parts)
        one.train(data, data, 3)
        weights.append(one.model.state_dict())
    for name, value in weights[0].items():
        # float64's rounding, grown in three steps; another mask would change the second digit
        assert torch.allclose(weights[1][name], value, rtol=1e-10, atol=1e-13), name


def test_a_loss_scale_is_the_same_for_all_parts_of_a_step() -> None:
    plain, scaled = trained(3), trainer(accumulate=3)
    scaled.loss_scale.active, scaled.loss_scale.scale = True, 2.0**10
    scaled.train(DataLoader(points(), 4), DataLoader(points(), 4), 2)
    assert torch.equal(scaled.model.weight, plain.model.weight)  # a power of two changes no digit
    assert scaled.gradient_norms == plain.gradient_norms


class InfiniteAtCall(nn.Linear):
    """Gives infinite logits at one of its calls, counted from 1."""

    calls, bad = 0, 0

    def forward(self, x):
        self.calls += self.training
        output = super().forward(x)
        return output * float("inf") if self.calls == self.bad else output


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_one_part_that_is_not_finite_keeps_the_whole_step_from_being_taken(part: int) -> None:
    model = InfiniteAtCall(2, 3)
    model.bad = part
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"step 1 .*the loss is not finite"):
        trained(4, model)
    assert torch.equal(model.weight, before)


def test_the_profile_counts_steps_not_parts() -> None:
    one = trainer(accumulate=4)
    profiler = Profiler(one.optimizer, ParallelContext(Environment(), CPU, (0,)))
    one.train(profiler.watching(DataLoader(points(), 4)), DataLoader(points(), 4), 2)
    assert profiler.steps == one.step == 6


def test_no_more_than_one_part_is_held_in_memory() -> None:
    sizes = []

    class Watched(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    one = trainer(Watched(2, 3), accumulate=2)
    one.train(DataLoader(points(8), 8), DataLoader(points(8), 3), 1)
    assert sizes == [4, 4, 3, 3, 2]  # two parts, then the validation's own batches


MEAN = r'the criterion gives a mean over the batch; 2 parts need its sum \(reduction="sum"\)'


def test_a_mean_over_the_batch_cannot_be_computed_in_parts() -> None:
    with pytest.raises(ValueError, match=MEAN):
        trainer(accumulate=2, reduction="mean")


def test_a_criterion_that_is_exchanged_later_is_looked_at_too() -> None:
    one = trainer(accumulate=2)
    one.criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=MEAN):
        one.train(DataLoader(points(), 4), DataLoader(points(), 4), 1)


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate 0: one part or more"):
        trainer(accumulate=0)
