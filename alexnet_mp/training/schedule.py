"""When the learning rate falls, and when training stops.

Every schedule has `advance(epoch)` before each step (epochs count from 0; 1.5 is the middle of the
second), `end_step()`, `end_epoch(validation_loss)`, and a `state_dict`. All ranks hold one each and
feed it the same numbers, so they decide alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from alexnet_mp.config import RecipeConfig

SCHEDULE_2012_EPOCHS = 90  # of which RecipeConfig.schedule_epochs are counted (paper, section 5)


class EarlyStopping:
    """Stops when the validation loss has not improved in `patience` evaluations (the tutorial's).

    Call it with the loss after each epoch; `early_stop` says whether to stop. An improvement lowers
    the best loss by at least `delta`, and by more than nothing: an equal loss is none. An
    improvement resets the count.

        stopping = EarlyStopping(patience=7)
        for loss in val_losses:
            stopping(loss)
            if stopping.early_stop:
                break
    """

    def __init__(self, patience: int = 7, verbose: bool = False, delta: float = 0) -> None:
        if patience < 1:
            raise ValueError(f"patience {patience}: must be at least 1")
        if delta < 0:
            raise ValueError(f"delta {delta}: must not be negative")
        self.patience, self.verbose, self.delta = patience, verbose, delta
        self.counter = 0
        self.best_score: float | None = None
        self.early_stop = False

    def __call__(self, val_loss: float) -> bool:
        """Counts one evaluation; returns whether it was an improvement."""
        score = -val_loss
        gain = math.inf if self.best_score is None else score - self.best_score
        if gain > 0 and gain >= self.delta:
            self.best_score, self.counter = score, 0
            return True
        self.counter += 1
        self.early_stop = self.early_stop or self.counter >= self.patience
        if self.verbose:
            print(f"EarlyStopping: no improvement for {self.counter} of {self.patience} epochs")
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "counter": self.counter,
            "best_score": self.best_score,
            "early_stop": self.early_stop,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counter, self.best_score = state["counter"], state["best_score"]
        self.early_stop = (
            bool(state["early_stop"]) and self.counter >= self.patience
        )  # which may be larger now


class LRSchedule:
    """The learning rate stays what the optimizer was made with."""

    noise_off = False  # whether the color noise is over
    frozen = False  # whether conv1 learns no more, so that nothing need be computed for it

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def advance(self, epoch: float) -> None:
        """Sets the rates for this point of training."""

    def end_step(self) -> None:
        """Called after each step of the optimizer."""

    def end_epoch(self, validation_loss: float) -> None:
        """Called after each validation, with its loss."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""


class TorchSchedule(LRSchedule):
    """Any scheduler of torch.optim.lr_scheduler, which takes a step at the end of each epoch.

    ReduceLROnPlateau is given the validation loss. OneCycleLR and CyclicLR count steps of the
    optimizer, so they take one after each of these; `every_step` says it of others (a LambdaLR,
    say, that was written so).
    """

    def __init__(
        self, scheduler: LRScheduler | ReduceLROnPlateau, every_step: bool | None = None
    ) -> None:
        super().__init__(scheduler.optimizer)
        self.scheduler = scheduler
        by_step = isinstance(scheduler, OneCycleLR | CyclicLR)
        self.every_step = by_step if every_step is None else every_step

    def end_step(self) -> None:
        if self.every_step and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()

    def end_epoch(self, validation_loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(validation_loss)
        elif not self.every_step:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return self.scheduler.state_dict() | {"lr": rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for group, lr in zip(self.optimizer.param_groups, state.pop("lr"), strict=True):
            group["lr"] = lr
        self.scheduler.load_state_dict(state)


class Plateau(TorchSchedule):
    """Divides the rate where the validation loss stops improving, as in 2012 by hand (paper, 5).

    Biases that have a rate of their own keep it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: float = 0.1,
        patience: int = 3,
        min_lr: float = 1e-5,
        fixed_biases: bool = False,
    ) -> None:
        floors = [
            group["lr"]
            if fixed_biases and group.get("kind") == "bias"
            else min(min_lr, group["lr"])
            for group in optimizer.param_groups
        ]
        super().__init__(
            ReduceLROnPlateau(optimizer, "min", factor=factor, patience=patience, min_lr=floors)
        )


class Schedule2012(LRSchedule):
    """The rates of a net of 2012, changed by hand at epochs of its log, scaled from 90 to `epochs`.

    `at` are the five of RecipeConfig.schedule_epochs: the rate is divided by ten at the first,
    second and fifth. From the third on conv1 learns at 1e-5 of 1e-2 and the color noise is gone,
    from the fourth on conv1 is frozen, its biases too; other biases keep their rate. Source: the
    log in LP145 (config/presets.py names the files).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        epochs: int,
        fixed_biases: bool = True,
        at: tuple[int, int, int, int, int] = RecipeConfig.schedule_epochs,
    ) -> None:
        super().__init__(optimizer)
        self.scale, self.fixed_biases = SCHEDULE_2012_EPOCHS / max(epochs, 1), fixed_biases
        first, second, self.slower, freeze, third = at
        self.drops = ((first, 1e-1), (second, 1e-2), (third, 1e-3))
        self.conv1 = ((self.slower, 1e-3), (freeze, 0.0))
        self.first = [group["lr"] for group in optimizer.param_groups]

    def advance(self, epoch: float) -> None:
        at = math.floor(epoch) * self.scale  # between epochs only, as it was done by hand
        share = last_reached(self.drops, at, 1.0)
        conv1 = last_reached(self.conv1, at, share)
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            mine = conv1 if group.get("layer") == "conv1" else share
            if group.get("kind") == "bias" and self.fixed_biases:
                mine = 0.0 if mine == 0 else 1.0
            group["lr"] = first * mine
        self.noise_off, self.frozen = at >= self.slower, conv1 == 0


class Cosine(LRSchedule):
    """Half a cosine from the first rate to zero over `epochs`, set before every step.

    Biases that have a rate of their own keep it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, epochs: int, fixed_biases: bool = False
    ) -> None:
        super().__init__(optimizer)
        self.epochs, self.fixed_biases = max(epochs, 1), fixed_biases
        self.first = [group["lr"] for group in optimizer.param_groups]

    def advance(self, epoch: float) -> None:
        share = (1 + math.cos(math.pi * min(epoch / self.epochs, 1.0))) / 2
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = first * (
                1.0 if self.fixed_biases and group.get("kind") == "bias" else share
            )


class WarmUp(LRSchedule):
    """Multiplies all rates of `schedule` by a factor that rises from 0 to 1 over `epochs`.

    The factor is linear in the steps. Biases rise too, also those that no schedule changes: a large
    batch's rate is as dangerous to them. Losses of the warm-up are not shown to `schedule`: that
    one of them stalls at a small rate is no reason for Plateau to lower it.
    """

    def __init__(self, schedule: LRSchedule, epochs: float) -> None:
        super().__init__(schedule.optimizer)
        self.schedule, self.epochs = schedule, epochs
        self.at = 0.0  # the epoch of the last `advance`
        self._full: list[float] | None = None  # the rates of `schedule`, while others are set

    def advance(self, epoch: float) -> None:
        self._put_back()
        self.schedule.advance(epoch)
        self.at, self.noise_off, self.frozen = epoch, self.schedule.noise_off, self.schedule.frozen
        if epoch < self.epochs:
            self._full = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] *= epoch / self.epochs

    def end_step(self) -> None:
        self.schedule.end_step()

    def end_epoch(self, validation_loss: float) -> None:
        self._put_back()
        if math.floor(self.at) + 1 > self.epochs:
            self.schedule.end_epoch(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        """The state of `schedule` alone: the factor is a function of the epoch."""
        here, full = [group["lr"] for group in self.optimizer.param_groups], self._full
        self._put_back()
        state = self.schedule.state_dict()
        self._set(here)
        self._full = full
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._put_back()
        self.schedule.load_state_dict(state)

    def _put_back(self) -> None:
        """Gives the optimizer the rates of `schedule`, which reads and changes them."""
        if self._full is not None:
            self._set(self._full)
            self._full = None

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def last_reached(steps: tuple[tuple[float, float], ...], at: float, before: float) -> float:
    """The value of the last of `steps` (epoch, value) that `at` has reached, or `before`."""
    reached = [value for epoch, value in steps if at >= epoch]
    return reached[-1] if reached else before


def as_schedule(
    schedule: LRSchedule | LRScheduler | ReduceLROnPlateau | None, optimizer: torch.optim.Optimizer
) -> LRSchedule:
    """`schedule` as an LRSchedule of `optimizer`; None is the tutorial's plateau rule.

    ValueError if it is no schedule of it.
    """
    if schedule is None:
        return Plateau(optimizer, factor=0.5, patience=3, min_lr=1e-6)
    if isinstance(schedule, LRScheduler | ReduceLROnPlateau):
        schedule = TorchSchedule(schedule)
    if not isinstance(schedule, LRSchedule):
        raise ValueError(
            f"schedule {type(schedule).__name__}: a scheduler of torch.optim.lr_scheduler, or an "
            "LRSchedule, is needed"
        )
    if schedule.optimizer is not optimizer:
        raise ValueError("the schedule was made for another optimizer than the trainer's")
    return schedule


def build_schedule(optimizer: torch.optim.Optimizer, recipe: RecipeConfig) -> LRSchedule:
    """The schedule that the recipe names, behind its warm-up, if it has one."""
    schedule = _build_schedule(optimizer, recipe)
    return WarmUp(schedule, recipe.warmup_epochs) if recipe.warmup_epochs else schedule


def _build_schedule(optimizer: torch.optim.Optimizer, recipe: RecipeConfig) -> LRSchedule:
    fixed = recipe.bias_lr is not None
    if recipe.schedule == "plateau":
        return Plateau(optimizer, recipe.lr_factor, recipe.lr_patience, recipe.lr_min, fixed)
    if recipe.schedule == "2012":
        return Schedule2012(optimizer, recipe.epochs, fixed, recipe.schedule_epochs)
    if recipe.schedule == "cosine":
        return Cosine(optimizer, recipe.epochs, fixed)
    return LRSchedule(optimizer)
