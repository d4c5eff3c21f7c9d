"""Non-finite numbers, labels outside the classes, runs that learn nothing: noticed on all ranks."""

import copy
import math

import pytest
import torch
from ranks import RanksFailed
from ranks import run as run_ranks
from small_nets import TINY, TINY_RUN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alexnet_mp import AlexNet, Config, Trainer, preset
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training import checkpoint
from alexnet_mp.training.diagnostics import Diagnostics
from alexnet_mp.training.run import Run, run
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.step_sync import StepSync
from alexnet_mp.training.trainer import NonFiniteError

CONFIG = TINY_RUN


def batches(count: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(4, 3, 67, 67, generator=generator),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def trainer(deferred: bool = False, model: nn.Module | None = None, **options) -> Trainer:
    model = model or AlexNet(TINY, seed=1)
    one = Trainer(
        model,
        nn.CrossEntropyLoss(),
        build_optimizer(model, preset("demo").with_fields(lr=0.05).recipe),
        "cpu",
        patience=0,
        verbose=False,
        **options,
    )
    if deferred:
        one.step_sync = StepSync(one.context, model, one.optimizer, one.loss_scale, deferred=True)
    return one


def spoil(
    one: Trainer, at: int, layer: str = "conv4", column: int = 1, value: float = math.nan
) -> None:
    """From now on the gradient of one weight is not finite, in step `at`."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, value) if one.step + 1 == at else gradient

    getattr(one.model.columns[str(column)], layer).bias.register_hook(hook)


def test_flags_that_are_read_a_step_later_change_nothing_bit_for_bit() -> None:
    results = []
    for deferred in (False, True):
        one = trainer(deferred)
        one.train(batches(5), batches(1, seed=9), epochs=3)
        results.append(
            (
                one.model.state_dict(),
                [{k: v for k, v in record.items() if "second" not in k} for record in one.history],
                one.step,
            )
        )
    (weights, history, steps), (later_weights, later_history, later_steps) = results
    assert all(torch.equal(weights[name], later_weights[name]) for name in weights)
    assert history == later_history and steps == later_steps == 15


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    "at", [1, 3, 5, 10]
)  # the first step, within an epoch, its last step, the last of all
def test_a_bad_gradient_leaves_the_weights_alone_and_names_its_layer(
    deferred: bool, at: int
) -> None:
    clean, one = trainer(max_steps=at - 1, restore_best_weights=False), trainer(deferred)
    if at > 1:
        clean.train(batches(5), batches(1, seed=9), epochs=2)
    spoil(one, at)
    with pytest.raises(
        NonFiniteError,
        match=rf"step {at} \(epoch {(at + 4) // 5}\): the gradient of columns.1.conv4.bias is not "
        r"finite.*lr 0.05",
    ):
        one.train(batches(5), batches(1, seed=9), epochs=2)
    assert (one.step, one.batch) == (at - 1, (at - 1) % 5)
    assert all(
        torch.equal(value, clean.model.state_dict()[name])
        for name, value in one.model.state_dict().items()
    )


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_gradient_is_as_bad_as_one_that_is_no_number(
    value: float, deferred: bool
) -> None:
    one = trainer(deferred)
    before = copy.deepcopy(one.model.state_dict())
    spoil(one, at=1, value=value)
    with pytest.raises(
        NonFiniteError, match=r"step 1 \(epoch 1\): the gradient of columns.1.conv4"
    ):
        one.train(batches(2), batches(1), epochs=1)
    assert one.step == 0
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_although_its_gradients_are(value: float) -> None:
    class Shifted(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            return super().forward(logits, labels) + value

    one = trainer()
    one.criterion = Shifted()
    with pytest.raises(NonFiniteError, match=r"step 1 \(epoch 1\): the loss is not finite"):
        one.train(batches(2), batches(1), epochs=1)


def test_a_trainer_that_failed_can_go_on_at_another_rate() -> None:
    one = trainer(deferred=True)
    spoil(one, at=2)
    with pytest.raises(NonFiniteError):
        one.train(batches(5), batches(1), epochs=1)
    before = copy.deepcopy(one.model.state_dict())
    one.model.columns["1"].conv4.bias._backward_hooks.clear()
    one.train(batches(5), batches(1), epochs=1)
    assert one.step == 6 and any(
        not torch.equal(value, before[name]) for name, value in one.model.state_dict().items()
    )


def with_a_spoilt_rank(rank: int, config: Config, where: str) -> None:
    """A whole run whose rank 1 has a bad number in step 4."""
    from alexnet_mp.parallel.context import init_parallel

    one = Run(config, init_parallel(config))
    if rank == 1 and where == "gradient":
        spoil(one.trainer, at=4)
    if rank == 1 and where == "loss":
        one.trainer.criterion = BadLoss(one.trainer)
    one.train_and_test()


class BadLoss(nn.CrossEntropyLoss):
    """Its fourth loss, on this rank only, is infinite."""

    def __init__(self, owner: Trainer) -> None:
        super().__init__(reduction="sum")
        self.owner = owner

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, labels) * (
            float("inf") if self.owner.step == 3 and torch.is_grad_enabled() else 1.0
        )


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("gradient", "the gradient of columns.1.conv4.bias on rank 1"),
        ("loss", "the loss on rank 1"),
    ],
)
def test_one_ranks_bad_number_stops_all_before_the_step(tmp_path, where: str, words: str) -> None:
    config = CONFIG.with_fields(out=str(tmp_path / "run"))
    with pytest.raises(RanksFailed) as caught:
        run_ranks(with_a_spoilt_rank, 2, config, where)
    assert all(
        f"step 4 (epoch 2): {words} is not finite, so the step was not taken; lr 0.0" in text
        for text in caught.value.failed.values()
    )
    assert len(caught.value.failed) == 2
    run(CONFIG.with_fields(out=str(tmp_path / "clean"), max_steps=3))
    spoilt, clean = (checkpoint.read(tmp_path / name / "last.pt") for name in ("run", "clean"))
    assert spoilt["loop"]["step"] == 3 and all(
        torch.equal(value, clean["model"][name]) for name, value in spoilt["model"].items()
    )
    assert checkpoint.read(tmp_path / "run" / "best.pt")["loop"]["epoch"] == 1


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (
            torch.zeros(8, 1, 67, 67),
            torch.zeros(8).long(),
            r"images \(4, 1, 67, 67\).*repeat the gray channel",
        ),
        (torch.zeros(8, 4, 67, 67), torch.zeros(8).long(), "leave the fourth channel out"),
        (
            torch.zeros(8, 3, 64, 64),
            torch.zeros(8).long(),
            r"images \(4, 3, 64, 64\): this network reads \(N, 3, 67, 67\)",
        ),
        (
            torch.zeros(8, 3, 67, 67, dtype=torch.uint8),
            torch.zeros(8).long(),
            "images are torch.uint8",
        ),
        (
            torch.zeros(8, 3, 67, 67),
            torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]),
            "labels from 0 to 3, but the network has 3 classes.*--classes 4",
        ),
        (
            torch.zeros(8, 3, 67, 67),
            torch.tensor([1, -1] * 4),
            "a label -1: classes are numbered from 0 to 2",
        ),
        (torch.zeros(8, 3, 67, 67), torch.zeros(8), "labels are torch.float32"),
    ],
)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_what_the_network_cannot_take_is_refused_before_the_first_step(
    images, labels, words: str, split: str
) -> None:
    bad = DataLoader(TensorDataset(images, labels), 4)
    good = DataLoader(TensorDataset(torch.zeros(4, 3, 67, 67), torch.zeros(4).long()), 4)
    one = trainer()
    with pytest.raises(ValueError, match=f"the {split} loader.*{words}"):
        one.train(*((bad, good) if split == "training" else (good, bad)), epochs=1)
    assert one.step == 0


def test_a_late_label_outside_the_classes_of_any_module_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    data = [(torch.zeros(2, 4), torch.tensor([0, 1])), (torch.zeros(2, 4), torch.tensor([0, 7]))]
    one = trainer(model=model)
    with pytest.raises(ValueError, match="labels from 0 to 7, but the network has 3 classes"):
        one.train(data, data[:1], epochs=1)
    with pytest.raises(ValueError, match="the training loader gives a dict"):
        one.train([data[0], {"x": 1}], data[:1], epochs=1)


def test_looking_at_a_batch_beforehand_leaves_random_streams_alone() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            return torch.randn(3, 67, 67), 0

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    from alexnet_mp.training.input_checks import check_loader

    one = trainer()
    check_loader(
        DataLoader(Noisy(torch.zeros(4)), 2, shuffle=True),
        "validation",
        one.network,
        one.context,
        peek=True,
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def on_other_batches(rank: int, shape: bool) -> None:
    """Ranks of one network that are fed different batches."""
    from alexnet_mp.parallel.context import init_parallel

    context = init_parallel(CONFIG.with_fields(timeout=20.0))
    model = context.build_model(TINY, 0)
    one = Trainer(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        build_optimizer(model, CONFIG.recipe),
        "cpu",
        patience=0,
        verbose=False,
        context=context,
    )
    images, labels = batches(1)[0]
    mine = (
        [(images[:3], labels[:3]) if shape else (images, labels.flip(0))]
        if rank
        else [(images, labels)]
    )
    one.train(mine, batches(1), epochs=1)


@pytest.mark.parametrize("shape", [True, False])
def test_ranks_of_one_network_with_different_batches_are_told_at_once(
    shape: bool,
) -> None:
    with pytest.raises(
        RanksFailed, match="rank 1 was given another first batch than rank 0"
    ) as caught:
        run_ranks(on_other_batches, 2, shape)
    assert len(caught.value.failed) == 2


def test_a_loss_that_stays_at_a_guess_is_pointed_out_once() -> None:
    hints = Diagnostics(AlexNet(TINY), command_line=True)
    hints.classes = 10
    assert hints.after_epoch(1, math.log(10) * 1.006, 0.1, {}) == []
    (line,) = hints.after_epoch(2, math.log(10) * 1.004, 0.1, {})
    assert (
        "training loss of epoch 2 is 2.3118" in line and "ln 10 = 2.3026" in line and "--lr" in line
    )
    assert hints.after_epoch(3, math.log(10), 0.1, {}) == []


def test_a_loss_near_a_guess_is_no_failure_where_many_answers_are_right() -> None:
    hints = Diagnostics(AlexNet(TINY))
    hints.classes = 10
    assert hints.after_epoch(1, math.log(10), 0.58, {}) == []
    (line,) = hints.after_epoch(1, math.log(10), 0.11, {})
    assert "--" not in line  # a Python user has no flags


def test_another_module_gets_no_hints() -> None:
    hints = Diagnostics(nn.Linear(1, 1))
    hints.classes = 10
    assert hints.after_epoch(1, math.log(10), 0.1, {}) == []


def test_a_dead_column_is_pointed_out_and_a_living_one_is_not(capsys) -> None:
    one = trainer(model=(model := AlexNet(TINY, seed=1)))
    one.verbose = True
    with torch.no_grad():
        model.columns["1"].fc7.bias.fill_(-1e3)  # no unit of its last hidden layer ever answers
    one.train(batches(3), batches(1), epochs=2)
    printed = capsys.readouterr().out
    assert (
        printed.count(
            "hint: column 1 is dead in fc7, fc8: no gradient reached a weight there in epoch 1"
        )
        == 1
    )
    assert "column 0 is dead" not in printed


def test_a_placement_of_one_needs_no_control_group_for_its_flags() -> None:
    place = ParallelContext(Environment(), torch.device("cpu"), (0,))
    values = torch.tensor([1.0, 2.0])
    place.sum_on_device(values)
    assert values.tolist() == [1.0, 2.0]
