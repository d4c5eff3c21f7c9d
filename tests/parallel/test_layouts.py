"""Copies times columns, over one node and two, in one part and in four: one device's training.

Each layout trains a tiny network in float64 with all that a run has: the loader's order, crops,
flips and colors, dropout, DistributedDataParallel, validation. Batches are of 16, 16 and 1 image,
so that there are parts of unequal size, and ranks without a row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from image_sets import random_store
from ranks import run
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp import Config, preset
from alexnet_mp.data import Loader, Splits, build_loaders
from alexnet_mp.parallel.context import ParallelContext, init_parallel
from alexnet_mp.training import checkpoint
from alexnet_mp.training.schedule import build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.trainer import Trainer

pytestmark = pytest.mark.ranks

EPOCHS, PARTS = 7, (1, 4)  # 7 epochs of three batches: 21 steps
IMAGES, VALIDATION = 33, 7

CONFIG = preset("demo").with_fields(
    kernels=(4, 6, 8, 6, 4),
    hidden=(12, 10),
    classes=5,
    initial_weights=("he",) * 8,
    initial_biases=(0.1,) * 8,
    random_crop=True,
    flip=True,
    images_per_crop=3,  # crops that reach across the edges of parts
    color_noise=0.1,
    batch_size=16,
    lr=0.02,
    epochs=EPOCHS,
    warmup_epochs=1.0,
    device="cpu",
    threads=1,
)


class InFloat64:
    """A loader whose images come in float64; all else is the loader's own."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield batch._replace(images=batch.images.double())


def loaders(config: Config, context: ParallelContext) -> tuple[InFloat64, InFloat64]:
    """This data rank's share of the training and the validation batches."""
    train = random_store(IMAGES, side=76, classes=5, seed=1)
    val = random_store(VALIDATION, side=76, classes=5, seed=2)
    place = {"data_rank": context.data_rank, "data_ranks": context.data_ranks}
    train_loader, val_loader, *_ = build_loaders(config, Splits(train, val, val), **place)
    return InFloat64(train_loader), InFloat64(val_loader)


@dataclass
class Outcome:
    """What one rank has after a training."""

    layout: tuple[int, int]  # data ranks, column ranks
    gradients: dict[str, Tensor]  # of the first step, canonical
    weights: dict[str, Tensor]
    history: list[dict[str, float]]  # without what the clock says
    validated: int  # images
    all_reduces: int  # of gradients, by DistributedDataParallel
    bytes_per_step: int


def trained(rank: int, config: Config, parts: tuple[int, ...], resume: str = "", save: str = ""):
    """The outcome of one training for each number of `parts`; see `train` for the files."""
    context = init_parallel(config)
    try:
        return [train(config.with_fields(accumulate=n), context, resume, save) for n in parts]
    finally:
        context.close()


def train(config: Config, context: ParallelContext, resume: str, save: str) -> Outcome:
    """Trains from the checkpoint `resume` on, if any, until epochs or steps end; then saves."""
    model = context.build_model(config.model, config.run.seed).double()
    optimizer, recipe = build_optimizer(model, config.recipe), config.recipe
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        optimizer,
        "cpu",
        patience=0,
        schedule=build_schedule(optimizer, recipe),
        context=context,
        seed=config.run.seed,
        accumulate=config.run.accumulate,
        max_steps=recipe.max_steps,
        restore_best_weights=False,
        verbose=False,
    )
    if resume:
        checkpoint.restore(checkpoint.read(Path(resume)), model, trainer, resume)
    gradients: dict[str, Tensor] = {}
    all_reduces = [0]

    def before_update(*_: Any) -> None:
        for name, gradient in model.canonical(lambda p: p.grad).items():
            gradients.setdefault(name, gradient.clone())

    def counted(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        all_reduces[0] += 1
        return allreduce_hook(group, bucket)

    optimizer.register_step_pre_hook(before_update)
    if isinstance(trainer.replica, DistributedDataParallel):
        trainer.replica.register_comm_hook(context.data_group, counted)
    train_loader, val_loader = loaders(config, context)
    trainer.train(train_loader, val_loader, recipe.epochs - trainer.epoch)
    if save:
        state = trainer.state_dict()
        data = {"classes": list("abcde"), "images": [IMAGES, VALIDATION, VALIDATION]}
        checkpoint.save(Path(save), context, model, optimizer, config, state, data)
    return Outcome(
        (context.data_ranks, context.column_ranks),
        gradients,
        {name: value.clone() for name, value in model.state_dict().items()},
        [{k: v for k, v in line.items() if "second" not in k} for line in trainer.history],
        trainer.scores(val_loader).images,
        all_reduces[0],
        trainer.largest_step_bytes,
    )


@pytest.fixture(scope="module")
def one_device() -> Outcome:
    """The whole batch at once on one device, in a process as the ranks' are: one thread."""
    [[outcome]] = run(trained, 1, CONFIG, (1,))
    assert len(outcome.history) == EPOCHS and outcome.history[-1]["step"] == 21
    return outcome


def assert_close(value: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Relative to the largest value, since small ones are differences of large ones."""
    assert value.shape == expected.shape, what
    apart, largest = (value - expected).abs().max().item(), expected.abs().max().item()
    assert apart <= tolerance * largest, f"{what}: {apart:.1e} apart, the largest {largest:.1e}"


def assert_equal(outcome: Outcome, expected: Outcome) -> None:
    """Sums over rows and columns are added in another order: float64's rounding, grown in 21 steps.

    1e-12 for gradients of the first step, 1e-10 for what follows.
    """
    for name, gradient in outcome.gradients.items():
        assert_close(gradient, expected.gradients[name], 1e-12, f"gradient of {name}")
    for name, weight in outcome.weights.items():
        assert_close(weight, expected.weights[name], 1e-10, name)
    for line, other in zip(outcome.history, expected.history, strict=True):
        assert line == pytest.approx(other, rel=1e-10)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("copies", "columns"), [(2, 1), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_a_layout_trains_what_one_device_trains_on_the_whole_batch(
    copies: int, columns: int, nodes: int, one_device: Outcome
) -> None:
    config = CONFIG.with_fields(column_ranks=columns)
    ranks = run(trained, copies * columns, config, PARTS, nodes=nodes)
    for outcomes in ranks:
        for outcome in outcomes:
            assert outcome.layout == (copies, columns)
            assert_equal(outcome, one_device)
            assert outcome.validated == VALIDATION  # each image once, wherever it was
        whole, in_parts = outcomes
        # DDP adds up the copies' gradients once a step, and the exchange sends what it did.
        assert in_parts.all_reduces == whole.all_reduces
        assert (whole.all_reduces >= 21) is (copies > 1)
        assert in_parts.bytes_per_step == whole.bytes_per_step
        assert (whole.bytes_per_step > 0) is (columns > 1)
    for part in range(len(PARTS)):
        named = {name for outcomes in ranks for name in outcomes[part].weights}
        assert named == set(one_device.weights)


@pytest.mark.parametrize(("copies", "column_ranks"), [(1, 4), (2, 2)])
def test_four_columns_train_on_four_ranks_what_they_train_on_one(
    copies: int, column_ranks: int
) -> None:
    config = CONFIG.with_fields(columns=4, epochs=3)
    [[whole]] = run(trained, 1, config, (1,))
    for [outcome] in run(trained, 4, config.with_fields(column_ranks=column_ranks), (4,)):
        assert outcome.layout == (copies, column_ranks)
        assert_equal(outcome, whole)


def test_one_device_trains_in_parts_what_it_trains_at_once(one_device: Outcome) -> None:
    [outcomes] = run(trained, 1, CONFIG, (4, 5))
    for outcome in outcomes:
        assert_equal(outcome, one_device)


def test_a_run_goes_on_at_another_layout_after_any_step(tmp_path, one_device: Outcome) -> None:
    resume = ""
    # (copies, columns, parts, the step at which it ends): within an epoch, and at its end
    for copies, columns, parts, last in (
        (1, 1, 1, 4),
        (1, 2, 4, 8),
        (2, 2, 1, 12),
        (4, 1, 4, 17),
        (2, 1, 1, 0),
    ):
        config = CONFIG.with_fields(column_ranks=columns, max_steps=last)
        save = str(tmp_path / f"{last}.pt")
        ranks = run(trained, copies * columns, config, (parts,), resume, save)
        resume = save
    for [outcome] in ranks:
        outcome.gradients = {}  # those of step 18
        assert_equal(outcome, one_device)
