"""Schedules and early stopping: what they do to the rates, epoch by epoch."""

import math

import pytest
import torch
from torch import nn

from alexnet_mp import EarlyStopping
from alexnet_mp.config import RecipeConfig
from alexnet_mp.training.schedule import build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer


class Two(nn.Module):
    """A module with a conv1 and a layer behind it, each with weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc6 = nn.Linear(1, 1), nn.Linear(1, 1)


def made(**fields):
    recipe = RecipeConfig(**fields)
    optimizer = build_optimizer(Two(), recipe)
    return build_schedule(optimizer, recipe), optimizer


def rates(optimizer) -> dict:
    return {(group["layer"], group["kind"]): group["lr"] for group in optimizer.param_groups}


def test_plateau_divides_by_ten_after_its_patience_down_to_its_floor() -> None:
    schedule, optimizer = made(schedule="plateau", lr=0.01, lr_patience=1, lr_min=1e-3)
    seen = []
    for loss in (1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9):
        schedule.end_epoch(loss)
        seen.append(rates(optimizer)["rest", "weight"])
    assert seen == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001, 0.001, 0.001, 0.001])


def test_biases_with_a_rate_of_their_own_keep_it_on_a_plateau() -> None:
    schedule, optimizer = made(schedule="plateau", bias_lr=0.02, lr_patience=0)
    for _ in range(4):
        schedule.end_epoch(1.0)
    assert rates(optimizer)["rest", "weight"] < 0.01 and rates(optimizer)["rest", "bias"] == 0.02


def test_the_2012_schedule_follows_net_145_over_90_epochs() -> None:
    schedule, optimizer = made(schedule="2012", epochs=90, bias_lr=0.02)
    table = {
        0: (1e-2, 1e-2),
        24: (1e-2, 1e-2),
        25: (1e-3, 1e-3),
        50: (1e-3, 1e-3),
        51: (1e-4, 1e-4),
        66: (1e-4, 1e-4),
        67: (1e-4, 1e-5),
        71: (1e-4, 1e-5),
        72: (1e-4, 0),
        78: (1e-4, 0),
        79: (1e-5, 0),
        89: (1e-5, 0),
    }
    for epoch, (rest, conv1) in table.items():
        schedule.advance(epoch + 0.5)  # the middle of an epoch is as its start
        assert rates(optimizer)["rest", "weight"] == pytest.approx(rest), epoch
        assert rates(optimizer)["conv1", "weight"] == pytest.approx(conv1), epoch
        assert rates(optimizer)["rest", "bias"] == 0.02
        assert rates(optimizer)["conv1", "bias"] == (0.02 if conv1 else 0)
        assert schedule.noise_off == (epoch >= 67)


def test_the_2012_schedule_follows_the_epochs_that_it_is_given() -> None:
    schedule, optimizer = made(
        schedule="2012", epochs=90, schedule_epochs=(20, 48, 66, 72, 79)
    )  # the half net's
    table = {
        19: (1e-2, 1e-2),
        20: (1e-3, 1e-3),
        48: (1e-4, 1e-4),
        65: (1e-4, 1e-4),
        66: (1e-4, 1e-5),
        72: (1e-4, 0),
        79: (1e-5, 0),
    }
    for epoch, (rest, conv1) in table.items():
        schedule.advance(epoch)
        assert (
            rates(optimizer)["rest", "weight"],
            rates(optimizer)["conv1", "weight"],
        ) == pytest.approx((rest, conv1)), epoch
        assert (schedule.noise_off, schedule.frozen) == (epoch >= 66, epoch >= 72)


@pytest.mark.parametrize("epochs", [(25, 51, 67, 79, 72), (0, 51, 67, 72, 79), (25, 51, 67)])
def test_epochs_out_of_order_are_refused(epochs: tuple) -> None:
    with pytest.raises(ValueError, match=r"--schedule-epochs .*five epochs above 0"):
        RecipeConfig(schedule_epochs=epochs)


def test_the_2012_schedule_scales_to_the_epochs_of_the_run() -> None:
    schedule, optimizer = made(schedule="2012", epochs=9)
    seen = []
    for epoch in range(9):
        schedule.advance(epoch)
        seen.append(rates(optimizer)["rest", "weight"])
    assert seen == pytest.approx(
        [1e-2] * 3 + [1e-3] * 3 + [1e-4] * 2 + [1e-5]
    )  # 25, 51 and 79 of 90 are 2.5, 5.1 and 7.9 of 9


def test_the_rates_of_2012_fall_between_epochs_only() -> None:
    schedule, optimizer = made(schedule="2012", epochs=9)
    schedule.advance(2.9)  # 25 of 90 is 2.78 of 9
    assert rates(optimizer)["rest", "weight"] == 1e-2
    schedule.advance(3.0)
    assert rates(optimizer)["rest", "weight"] == pytest.approx(1e-3)


def test_a_warm_up_rises_linearly_to_the_cosine() -> None:
    schedule, optimizer = made(schedule="cosine", epochs=100, warmup_epochs=4, lr=0.1)
    for epoch in (0, 1, 2, 3, 4):
        schedule.advance(epoch)
        cosine = 0.1 * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert rates(optimizer)["rest", "weight"] == pytest.approx(cosine * epoch / 4)


@pytest.mark.parametrize("kind", ["constant", "plateau", "2012", "cosine"])
def test_every_schedule_has_a_warm_up_and_is_itself_after_it(kind: str) -> None:
    fields = {"schedule": kind, "epochs": 9, "lr": 0.1, "bias_lr": 0.3}
    warm, optimizer = made(**fields, warmup_epochs=2)
    plain, other = made(**fields)
    for at in (0, 0.5, 1, 1.75, 2, 2.5, 5, 8):
        for schedule in (warm, plain):
            schedule.advance(at)
        factor = min(at / 2, 1)
        expected = {group: rate * factor for group, rate in rates(other).items()}
        assert rates(optimizer) == pytest.approx(expected), at  # biases with their own rate too
        assert (warm.noise_off, warm.frozen) == (plain.noise_off, plain.frozen)


def test_a_plateau_counts_no_stall_of_the_warm_up() -> None:
    schedule, optimizer = made(schedule="plateau", lr=0.01, lr_patience=1, warmup_epochs=3)
    seen = []
    for epoch in range(7):
        schedule.advance(epoch)
        seen.append(rates(optimizer)["rest", "weight"])
        schedule.end_epoch(1.0)
    # the loss of epoch 3 is the first that counts, those of 4 and 5 are no better
    assert seen == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("kind", ["constant", "plateau", "2012", "cosine"])
def test_a_schedule_that_is_saved_within_its_warm_up_goes_on_with_it(kind: str) -> None:
    fields = {"schedule": kind, "epochs": 9, "lr": 0.1, "lr_patience": 0, "warmup_epochs": 2}
    whole, optimizer = made(**fields)
    for at in (0, 0.5):
        whole.advance(at)
    before = rates(optimizer)
    state = whole.state_dict()
    assert rates(optimizer) == before  # saving changes no rate
    resumed, other = made(**fields)
    resumed.advance(1.5)  # whatever it did before
    resumed.load_state_dict(state)
    for at in (1.0, 1.5, 2.0, 3.0):
        for schedule in (whole, resumed):
            schedule.advance(at)
        assert rates(other) == rates(optimizer)
        if at == int(at):
            for schedule in (whole, resumed):
                schedule.end_epoch(1.0)


def test_a_cosine_stays_at_zero_after_its_end() -> None:
    schedule, optimizer = made(schedule="cosine", epochs=2, lr=0.1)
    for epoch in (2, 3):
        schedule.advance(epoch)
        assert rates(optimizer)["rest", "weight"] == 0.0


def test_cosine_ends_at_zero_and_passes_half_in_the_middle() -> None:
    schedule, optimizer = made(schedule="cosine", epochs=4, lr=0.1)
    seen = []
    for epoch in (0, 2, 4):
        schedule.advance(epoch)
        seen.append(rates(optimizer)["rest", "weight"])
    assert seen == pytest.approx([0.1, 0.05, 0.0])


def test_cosine_leaves_biases_their_own_rate() -> None:
    schedule, optimizer = made(schedule="cosine", epochs=4, lr=0.1, bias_lr=0.02)
    schedule.advance(2)
    assert (rates(optimizer)["rest", "weight"], rates(optimizer)["rest", "bias"]) == pytest.approx(
        (0.05, 0.02)
    )


@pytest.mark.parametrize("kind", ["constant", "plateau", "2012", "cosine"])
def test_a_schedule_continues_from_its_saved_state(kind: str) -> None:
    def run(schedule, optimizer, epochs):
        seen = []
        for epoch in epochs:
            schedule.advance(epoch)
            schedule.end_epoch(1.0)
            seen.append(rates(optimizer))
        return seen

    whole = run(*made(schedule=kind, epochs=8, lr_patience=1), range(8))
    first, optimizer = made(schedule=kind, epochs=8, lr_patience=1)
    run(first, optimizer, range(4))
    second, optimizer = made(schedule=kind, epochs=8, lr_patience=1)
    second.load_state_dict(first.state_dict())
    assert run(second, optimizer, range(4, 8)) == whole[4:]


def test_early_stopping_counts_evaluations_without_improvement_and_resets() -> None:
    stopping = EarlyStopping(patience=2)
    counts = []
    for loss in (1.0, 1.1, 0.9, 0.9, 0.95):
        stopping(loss)
        counts.append((stopping.counter, stopping.early_stop))
    # an equal loss is no improvement, which the tutorial's own code has wrong
    assert counts == [(0, False), (1, False), (0, False), (1, False), (2, True)]


def test_an_improvement_smaller_than_delta_does_not_count() -> None:
    stopping = EarlyStopping(patience=3, delta=0.25)
    assert [stopping(loss) for loss in (1.0, 0.875, 0.75, 0.625)] == [True, False, True, False]


def test_a_run_that_stopped_early_goes_on_with_more_patience_only() -> None:
    stopped = EarlyStopping(patience=2)
    for loss in (1.0, 1.0, 1.0):
        stopped(loss)
    assert stopped.early_stop
    for patience, expected in ((2, True), (3, False)):
        resumed = EarlyStopping(patience)
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.early_stop == expected and resumed.counter == 2


def test_early_stopping_speaks_only_if_asked(capsys) -> None:
    for verbose in (False, True):
        stopping = EarlyStopping(patience=7, verbose=verbose)
        stopping(1.0)
        stopping(1.0)
        assert ("1 of 7" in capsys.readouterr().out) is verbose


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"delta": -1}])
def test_early_stopping_refuses_what_means_nothing(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


def test_a_loss_that_is_not_a_number_is_no_improvement() -> None:
    stopping = EarlyStopping(patience=1)
    stopping(1.0)
    assert stopping(float("nan")) is False and stopping.early_stop
    assert not torch.isnan(torch.tensor(stopping.best_score))
