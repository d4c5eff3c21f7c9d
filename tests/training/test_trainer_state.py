"""Which weights a model has when training ends, goes on, is interrupted or is resumed."""

import _thread
import contextlib
import copy
import math
import signal
import sys

import pytest
import torch
from ranks import run as run_ranks
from small_nets import TINY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alexnet_mp import AlexNet, Config, RunConfig, Trainer, preset
from alexnet_mp.data import build_loaders, load
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.training.metrics import EpochMetrics, evaluate
from alexnet_mp.training.schedule import Cosine, EarlyStopping, build_schedule
from alexnet_mp.training.sgd2012 import SGD2012, build_optimizer
from alexnet_mp.training.step_sync import Stopped


def points(n: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return TensorDataset(x, (x.sum(1) * 2).floor().clamp(0, 2).long())


def trainer(model: nn.Module | None = None, lr: float = 0.1, **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(2, 3) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    options = {"patience": 0, "verbose": False} | options
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", **options)


def rough(**options) -> tuple[Trainer, DataLoader, DataLoader]:
    """A trainer whose rate makes its validation loss go up and down, and its loaders."""
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(points(24), 6, shuffle=True, generator=generator)
    return trainer(lr=4.0, **options), data, DataLoader(points(12, 1), 6)


# --- the best weights and the last


def test_six_calls_for_one_epoch_are_one_call_for_six() -> None:
    whole, *data = rough()
    whole.train(*data, 6)
    calls, *data = rough()
    for _ in range(6):
        calls.train(*data, 1)
    assert calls.train_losses == whole.train_losses and calls.val_losses == whole.val_losses
    assert sorted(whole.val_losses) != whole.val_losses[::-1]  # it does get worse in between
    assert torch.equal(calls.model.weight, whole.model.weight)


def test_six_calls_are_one_for_a_network_with_dropout_and_norms_too() -> None:
    x = torch.randn(9, 3, 67, 67, generator=torch.Generator().manual_seed(0))
    batches = [(x[:5], torch.tensor([0, 1, 2, 0, 1])), (x[5:], torch.tensor([0, 1, 2, 0]))]
    results = []
    for calls in ([3], [1, 1, 1]):
        one = trainer(AlexNet(TINY, seed=1), lr=0.05)
        for epochs in calls:
            one.train(batches, batches[:1], epochs)
        results.append((one.train_losses, one.val_losses))
    assert results[0] == results[1]


def test_after_each_call_the_model_has_the_best_weights_so_far() -> None:
    one, train, val = rough()
    for _ in range(6):
        one.train(train, val, 1)
        assert one.evaluate(val) == pytest.approx(min(one.val_losses))


def test_weights_that_the_user_loads_in_between_are_trained_on() -> None:
    one, train, val = rough()
    one.train(train, val, 4)  # the last epoch is not the best
    start = {name: torch.zeros_like(value) for name, value in one.model.state_dict().items()}
    one.model.load_state_dict(start)
    one.train(train, val, 1)
    fresh, *data = rough()
    fresh.train(*data, 4)
    fresh.train(*data, 1)
    assert one.train_losses[:4] == fresh.train_losses[:4]
    assert one.train_losses[4] != fresh.train_losses[4]


def test_the_last_weights_stay_if_the_best_are_not_asked_for() -> None:
    best, *data = rough()
    last, *other = rough(restore_best_weights=False)
    best.train(*data, 4)
    last.train(*other, 4)
    assert last.evaluate(other[1]) == pytest.approx(last.val_losses[-1])
    assert min(best.val_losses) < best.val_losses[-1]  # so that the two differ


def test_of_equal_epochs_the_first_is_the_best() -> None:
    one = trainer(lr=0.0)
    one.train(DataLoader(points(9), 3), DataLoader(points(6), 3), 3)
    assert one.best["epoch"] == 1


def test_a_logging_callback_does_not_cost_the_best_weights() -> None:
    one, train, val = rough(on_epoch=lambda record, improved: None)
    one.train(train, val, 6)
    assert one.evaluate(val) == pytest.approx(min(one.val_losses))


# --- interrupts


def interrupting(at: int) -> nn.Module:
    """A loss in whose `at`-th training call the user presses Ctrl-C."""

    class Interrupted(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, logits, labels):
            Interrupted.calls += logits.requires_grad
            if Interrupted.calls == at and logits.requires_grad:
                _thread.interrupt_main()
            return super().forward(logits, labels)

    return Interrupted()


def test_an_interrupt_ends_after_the_step_with_the_best_weights(capsys) -> None:
    one, train, val = rough(verbose=True)
    one.criterion = interrupting(at=4 * 3 + 2)  # in the second step of the fourth epoch
    history = one.train(train, val, 1000)
    assert len(history) == 3 and one.step == 14
    assert one.evaluate(val) == pytest.approx(min(one.val_losses))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "interrupt" in line]
    assert f"after step 14: the model has the best weights, of epoch {one.best['epoch']}" in line
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_an_interrupt_training_goes_on_with_whole_epochs() -> None:
    one, train, val = rough()
    one.criterion = interrupting(at=6)
    one.train(train, val, 1000)
    assert (one.epoch, one.batch) == (1, 2)
    counts: list = []
    one.save_every, one.on_save = 1, lambda: counts.append((one.batch, one.metrics.steps))
    one.train(train, val, 2)
    assert counts == [(1, 1), (2, 2), (3, 3)] * 2
    assert (one.epoch, one.batch, one.step) == (3, 0, 6 + 8) and len(one.history) == 3
    assert one.history[1]["step"] == 6 + 4  # the second epoch has all of its steps again


def test_after_an_interrupt_our_own_loader_goes_on_where_it_was() -> None:
    config = preset("demo").with_fields(
        kernels=(4, 4, 4, 4, 4),
        hidden=(6, 5),
        limit_train=40,
        limit_val=12,
        limit_test=12,
        batch_size=8,
    )
    splits = load(config.data, 0)
    config = config.with_fields(classes=len(splits.train.classes))

    def made() -> tuple:
        loaders = build_loaders(config, splits)
        return trainer(AlexNet(config.model, seed=1), lr=0.01), *loaders[:2]

    whole, *data = made()
    whole.train(*data, 3)
    one, *data = made()
    one.criterion = interrupting(at=7)
    one.train(*data, 3)
    assert (one.epoch, one.batch) == (1, 2)
    one.train(*data, 2)
    assert one.train_losses == whole.train_losses and one.val_losses == whole.val_losses


def test_an_interrupt_during_validation_goes_on_with_the_validation() -> None:
    one, train, _ = rough()
    val = DataLoader(points(12, 1), 3)
    whole, *data = rough()
    whole.train(*data, 2)

    class Interrupted(nn.CrossEntropyLoss):
        pressed = False

        def forward(self, logits, labels):
            if not logits.requires_grad and not Interrupted.pressed:
                Interrupted.pressed = True
                _thread.interrupt_main()
            return super().forward(logits, labels)

    one.criterion = Interrupted()
    one.train(train, val, 2)
    assert (one.epoch, one.step, one.history) == (0, 4, [])
    one.train(train, val, 1)
    assert (one.epoch, one.step) == (1, 4) and one.train_losses == whole.train_losses[:1]


def test_an_epoch_that_lacked_its_validation_has_its_last_steps_rate() -> None:
    rates = []
    for stops in (False, True):
        one, train, val = rough()
        one.schedule = Cosine(one.optimizer, epochs=3)
        if stops:
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(one, "scores", raising_stopped)
                one.train(train, val, 1)
        one.train(train, val, 1)
        rates.append(one.history[0]["lr"])
    assert rates[0] == rates[1] < 4.0


def raising_stopped(*_) -> None:
    raise Stopped


def test_a_second_interrupt_ends_at_once_and_leaves_the_best_weights(capsys) -> None:
    one, train, val = rough(verbose=True)

    class Twice(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            if one.step == 9 and logits.requires_grad:
                for _ in range(2):
                    _thread.interrupt_main()
                    for _ in range(1000):  # give the handler its turn
                        pass
            return super().forward(logits, labels)

    one.criterion = Twice()
    with pytest.raises(KeyboardInterrupt):
        one.train(train, val, 1000)
    assert one.step == 9 and one.evaluate(val) == pytest.approx(min(one.val_losses))
    one.criterion = nn.CrossEntropyLoss()
    one.train(train, val, 1)
    assert one.epoch == 3 and one.step == 9 + 4


def test_a_loader_whose_workers_were_interrupted_ends_training_too() -> None:
    one, train, val = rough()

    def dying():
        yield from (points(6)[:] for _ in range(2))
        _thread.interrupt_main()
        for _ in range(1000):
            pass
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")

    assert one.train(dying(), val, 3) == [] and one.stopping
    one.train(train, val, 1)
    assert len(one.history) == 1 and one.stop_requested is False

    def failing():
        yield points(6)[:]
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")

    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # nobody has interrupted this
        one.train(failing(), val, 1)


def test_handlers_of_the_user_are_left_alone() -> None:
    one, train, val = rough()

    def own(number, frame) -> None:
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        one.on_epoch = lambda record, improved: seen.append(signal.getsignal(signal.SIGINT))
        seen: list = []
        one.train(train, val, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [own]


# --- the order of things at the end of an epoch


def test_an_epoch_is_saved_before_its_line_is_printed(capsys) -> None:
    printed = []
    one, train, val = rough(verbose=True)
    one.on_epoch = lambda record, improved: printed.append(capsys.readouterr().out)
    one.train(train, val, 2)
    assert "    1 " not in printed[0] and "\n    1 " in "\n" + printed[1]


def test_a_screen_that_is_gone_does_not_end_training(monkeypatch) -> None:
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    one, train, val = rough(verbose=True)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert len(one.train(train, val, 2)) == 2


@pytest.mark.parametrize("deferred", [False, True])
def test_saves_come_within_epochs_only_with_all_steps_counted(deferred: bool) -> None:
    model = nn.Linear(2, 3)
    one = Trainer(
        model,
        nn.CrossEntropyLoss(),
        SGD2012(model.parameters()),
        "cpu",
        0,
        verbose=False,
        save_every=2,
    )
    if deferred:
        from alexnet_mp.training.step_sync import StepSync

        one.step_sync = StepSync(one.context, model, one.optimizer, one.loss_scale, deferred=True)
    saved = []
    one.on_save = lambda: saved.append((one.step, one.batch, one.metrics.steps))
    one.train(DataLoader(points(24), 6), DataLoader(points(6), 6), 2)
    assert saved == [(2, 2, 2), (6, 2, 2)]  # not at steps 4 and 8, which end an epoch


# --- a state that is put back


def plateau_trainer() -> Trainer:
    model = nn.Linear(2, 3)
    recipe = (
        preset("demo").with_fields(schedule="plateau", lr=0.5, lr_patience=0, lr_factor=0.5).recipe
    )
    optimizer = build_optimizer(model, recipe)
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        "cpu",
        schedule=build_schedule(optimizer, recipe),
        early_stopping=EarlyStopping(5),
        precision="fp16",
        verbose=False,
    )


def test_a_restored_trainer_has_the_lowered_rate_the_counter_and_the_scale() -> None:
    first, second = plateau_trainer(), plateau_trainer()
    for loss in (1.0, 2.0, 2.0):
        first.schedule.end_epoch(loss)
        first.early_stopping(loss)
    first.loss_scale.scale, first.loss_scale.good_steps = 8.0, 17
    assert first.lr == 0.125
    second.load_state_dict(first.state_dict())
    assert second.lr == 0.125 and second.early_stopping.counter == 2
    assert (second.loss_scale.scale, second.loss_scale.good_steps) == (8.0, 17)
    second.schedule.end_epoch(2.0)
    assert second.lr == 0.0625


def test_the_best_and_the_last_weights_are_part_of_the_state() -> None:
    whole, *data = rough()
    whole.train(*data, 6)
    first, train, val = rough()
    first.train(train, val, 4)
    second = trainer(lr=4.0)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    second.train(train, val, 2)
    assert second.train_losses == whole.train_losses
    assert torch.equal(second.model.weight, whole.model.weight)


def test_sums_of_several_copies_count_once_when_they_are_put_back() -> None:
    def all_reduce(sums):  # of two copies that have the same
        sums *= 2  # in place, as a process group adds
        return sums

    metrics = EpochMetrics(torch.device("cpu"))
    metrics.add(torch.tensor([3.0, 4.0, 4.0, 1.0], dtype=torch.float64), 0.5)
    state = metrics.state_dict(lambda sums: all_reduce(sums.clone()))
    assert metrics.sums.tolist() == [3, 4, 4, 1]
    copies = [EpochMetrics(torch.device("cpu")) for _ in range(2)]
    for number, one in enumerate(copies):
        one.load_state_dict(state, first_copy=number == 0)
    assert sum(one.sums for one in copies).tolist() == [6, 8, 8, 2]
    assert [one.steps for one in copies] == [1, 1]


def on_copies(rank: int, save_every: int) -> list[dict]:
    """The history of two copies that are saved within epochs and resumed from the last save."""
    config = Config(model=TINY, run=RunConfig(device="cpu", column_ranks=1))
    context = init_parallel(config)
    try:
        x = torch.randn(16, 3, 67, 67, generator=torch.Generator().manual_seed(rank))
        labels = torch.arange(16) % 3
        batches = Skippable([(x[i : i + 4], labels[i : i + 4]) for i in range(0, 16, 4)])

        def made() -> Trainer:
            model = context.build_model(TINY, 0)
            return Trainer(
                model,
                nn.CrossEntropyLoss(reduction="sum"),
                torch.optim.SGD(model.parameters(), lr=0.01),
                "cpu",
                0,
                context=context,
                verbose=False,
                restore_best_weights=False,
            )

        states: list = []
        one = made()
        one.save_every = save_every
        one.on_save = lambda: states.append(
            copy.deepcopy([one.model.state_dict(), one.state_dict()])
        )
        one.train(batches, batches[:1], 2)
        if states:
            weights, loop = states[-1]  # within the second epoch
            one = made()
            one.model.load_state_dict(weights)
            one.load_state_dict(loop)
            one.train(batches, batches[:1], 1)
        return [{k: v for k, v in record.items() if "second" not in k} for record in one.history]
    finally:
        context.close()


class Skippable(list):
    """A loader that can leave out the first batches of an epoch."""

    skip = 0

    def set_epoch(self, epoch: int, skip: int) -> None:
        self.skip = skip

    def __iter__(self):
        return iter([self[k] for k in range(self.skip, len(self))])


def test_copies_that_save_and_resume_have_the_uninterrupted_history() -> None:
    whole, saved = (run_ranks(on_copies, 2, save_every) for save_every in (0, 1))
    assert whole[0] == whole[1] == saved[0] == saved[1] and len(whole[0]) == 2


def test_sums_of_an_older_checkpoint_are_read() -> None:
    metrics = EpochMetrics(torch.device("cpu"))
    state = {"steps": 2, "grad_norm": 1.0, "seconds": 3.0, "sums": torch.tensor([6.0, 3.0, 8.0])}
    metrics.load_state_dict(state, first_copy=True)
    assert metrics.sums.tolist() == [6, 8, 8, 3] and metrics.mean_loss() == 0.75


# --- what is passed on


def test_masks_are_keyed_by_the_step_over_the_whole_run(monkeypatch) -> None:
    from alexnet_mp.training import batch_gradient as module

    steps, seeds = [], set()
    original = module.dropout_keys

    def recorded(seed, step, rows):
        steps.append(step)
        seeds.add(seed)
        return original(seed, step, rows)

    monkeypatch.setattr(module, "dropout_keys", recorded)
    one = trainer(AlexNet(TINY), seed=9)
    x = torch.randn(6, 3, 67, 67)
    batches = [(x[i : i + 2], torch.tensor([0, 1])) for i in (0, 2, 4)]
    one.train(batches, batches[:1], 2)
    assert steps == [0, 1, 2, 3, 4, 5] and seeds == {9}


def test_a_sampler_is_told_each_epoch() -> None:
    told = []

    class Told(torch.utils.data.RandomSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    data = points(6)
    one = trainer()
    one.train(DataLoader(data, 3, sampler=Told(data)), DataLoader(data, 3), 2)
    one.train(DataLoader(data, 3, sampler=Told(data)), DataLoader(data, 3), 1)
    assert told == [0, 1, 2]


def test_our_own_loader_is_told_the_epoch_and_the_batches_to_leave_out() -> None:
    told = []

    class Ours(list):
        def set_epoch(self, epoch, skip=0):
            told.append((epoch, skip))

    class Foreign(Ours):
        def set_epoch(self, epoch):
            told.append(epoch)

    batches = [points(3)[:] for _ in range(3)]
    for kind, expected in ((Ours, [(0, 0), (1, 0), (1, 1)]), (Foreign, [0, 1, 1])):
        told.clear()
        one = trainer(max_steps=4)
        one.train(kind(batches), batches[:1], 5)
        one.max_steps = 0
        one.train(kind(batches), batches[:1], 1)
        assert told == expected
    assert one.step == 4 + 3 and one.history[-1]["step"] == 7


def test_the_rate_of_each_step_is_that_of_its_place_in_the_epoch() -> None:
    one = trainer()

    class Recorded(type(one.schedule)):
        seen: list = []  # noqa: RUF012

        def advance(self, epoch):
            self.seen.append(epoch)

    one.schedule = Recorded(one.optimizer)
    one.train([points(3)[:]] * 4, [points(3)[:]], 2)
    assert one.schedule.seen == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1.25, 1.5, 1.75]


# --- fp16


class Exact(nn.Module):
    """A layer that computes in float32 under autocast, too, so that only the loss scale differs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float())


@pytest.mark.parametrize("good_steps", [0, 1998])  # the scale doubles at the 2000th
def test_the_loss_scale_changes_neither_weights_nor_norms(good_steps: int) -> None:
    results, start = [], nn.Linear(2, 3).state_dict()
    for precision in ("fp32", "fp16"):
        one = trainer(Exact(), precision=precision)
        one.model.layer.load_state_dict(start)
        one.loss_scale.good_steps = good_steps
        one.train(DataLoader(points(24), 6), DataLoader(points(6), 6), 1)
        results.append((one.model.layer.weight.detach(), one.gradient_norms, one.train_losses))
    (weight, norms, losses), (scaled_weight, scaled_norms, scaled_losses) = results
    assert torch.allclose(weight, scaled_weight, rtol=1e-5)  # a power of two: no rounding at all
    assert norms == pytest.approx(scaled_norms) and losses == pytest.approx(scaled_losses)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_of_any_kind_of_non_number_is_skipped_in_fp16(value: float) -> None:
    one = trainer(Exact(), precision="fp16")
    hook = one.model.layer.bias.register_hook(lambda g: torch.full_like(g, value))
    before = one.model.layer.weight.clone()
    one.train(DataLoader(points(12), 6), DataLoader(points(6), 6), 1)
    assert torch.equal(before, one.model.layer.weight) and one.loss_scale.scale == 2.0**14
    hook.remove()


def test_evaluation_restores_the_mode_of_a_model_that_was_evaluating() -> None:
    model = nn.Linear(2, 3).eval()
    with contextlib.suppress(ValueError):
        evaluate(model, [], device=torch.device("cpu"))
    evaluate(model, [points(3)[:]], device=torch.device("cpu"))
    assert not model.training
