"""The training loop: the tutorial's Trainer, which also trains a network that is spread over ranks.

One rank with any module and any DataLoader is the degenerate case of many ranks with columns; there
is no second loop. All ranks run the same loop on the same numbers, so that every decision (stop,
skip, rate) is taken alike. `_train_epoch` is the loop of a textbook; what all ranks must agree on
before an update is in step_sync.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from alexnet_mp.config.progress import progress
from alexnet_mp.ops.precision import LossScale, autocast
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.meter import EVALUATION
from alexnet_mp.training.batch_gradient import BatchGradient, BatchLoss, Criterion
from alexnet_mp.training.best_weights import BestWeights
from alexnet_mp.training.diagnostics import Diagnostics
from alexnet_mp.training.epoch_batches import EpochBatches
from alexnet_mp.training.history import TrainingHistory
from alexnet_mp.training.input_checks import check_first_batch, check_loader
from alexnet_mp.training.interrupts import on_interrupt
from alexnet_mp.training.metrics import (
    EPOCH_HEADER,
    EpochMetrics,
    Scores,
    epoch_line,
    evaluate,
)
from alexnet_mp.training.schedule import EarlyStopping, LRSchedule, as_schedule
from alexnet_mp.training.step_sync import (
    NonFiniteError,
    Outcome,
    Step,
    StepSync,
    Stopped,
    until_stop_requested,
)
from alexnet_mp.training.wrapped_models import TrainingMode, notes_on, unwrap


class Trainer(TrainingHistory):
    """Trains `model`, watches the validation loss, keeps the best weights.

    The first five arguments are the tutorial's: a module that gives logits, a loss, an optimizer, a
    device, and the epochs without improvement after which to stop (0: never).

    model: any module. The dropout of an AlexNet, also of one in DataParallel,
        DistributedDataParallel or torch.compile, is drawn from `seed` (None: the network's own) and
        the number of the step. Submodules that were put into evaluation mode before training stay
        in it.
    criterion: takes (output, labels) and gives the mean loss of a batch, or its sum where its
        `reduction` is "sum"; with several data ranks it must be the sum, which is divided by the
        global batch. Losses per sample are averaged.
    Loaders give batches (images, labels, ...) with class numbers (N,) or, if the criterion takes
        them, class probabilities (N, classes); accuracy then counts the most probable class. `rows`
        and `first_row` of a batch, if it has these attributes, are its place in the global batch.
    schedule: one of ours, or any of torch.optim.lr_scheduler, which steps once an epoch (see
        TorchSchedule); None: the tutorial's plateau rule.
    accumulate: parts in which the rows of a batch are computed, one after the other, for less
        memory; more than one need a criterion that gives the sum.
    on_epoch: called with (record, improved) after each epoch, before its line is printed.
    on_save: called within an epoch, every `save_every` steps.
    on_step: called with each step after its backward pass, before its update is taken.
    restore_best_weights: after `train` the model has the weights of the best epoch. The last ones
        are kept, and put back when `train` is called again: six calls for one epoch are one call
        for six.
    command_line: hints name the flags of the command line.

    `train_losses`, `val_losses` (means over images) and `gradient_norms` (means over steps) have
    one entry per epoch.

        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, "cpu", patience=7)
        trainer.train(train_loader, val_loader, epochs=50)
        trainer.evaluate(test_loader), trainer.accuracy(test_loader)  # mean loss, fraction of 1
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        device: torch.device | str,
        patience: int = 7,
        *,
        schedule: LRSchedule | LRScheduler | ReduceLROnPlateau | None = None,
        early_stopping: EarlyStopping | None = None,
        context: ParallelContext | None = None,
        precision: str = "fp32",
        seed: int | None = None,
        accumulate: int = 1,
        max_steps: int = 0,
        on_epoch: Callable[[dict[str, Any], bool], None] | None = None,
        on_save: Callable[[], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
        save_every: int = 0,
        restore_best_weights: bool = True,
        verbose: bool = True,
        command_line: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model, self.optimizer = model.to(self.device), optimizer
        self.network = unwrap(self.model)
        self.criterion = (
            criterion.to(self.device) if isinstance(criterion, nn.Module) else criterion
        )
        self.context = context or ParallelContext(Environment(), self.device, (0,))
        self.precision, self.loss_scale = precision, LossScale(precision)
        self.seed = seed if seed is not None else getattr(self.network, "seed", 0)
        self.gradient = BatchGradient(
            self.network, self.context, self.loss_scale, precision, self.seed, accumulate
        )
        self.gradient.check(criterion)
        self.replica = self.context.wrap_ddp(self.model)
        self.early_stopping = early_stopping or (EarlyStopping(patience) if patience else None)
        self.schedule = as_schedule(schedule, optimizer)
        self.max_steps = max_steps
        self.on_epoch, self.on_save, self.save_every = on_epoch, on_save, save_every
        self.on_step = on_step
        self.restore_best_weights = restore_best_weights
        self.verbose = verbose and self.context.is_rank0

        self.epoch = self.step = self.batch = 0  # whole epochs, all steps, batches of this epoch
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"val_loss": math.inf, "epoch": None}
        self.stop_requested = False  # of this rank, set from a signal handler
        self.stopping = False  # what the ranks made of their requests, the same on all
        self.images_seen = 0  # by this process, for the meter's figures per image
        self.largest_step_bytes = 0

        self.metrics = EpochMetrics(self.device)
        self.step_sync = StepSync(self.context, self.network, optimizer, self.loss_scale)
        self.diagnostics = Diagnostics(self.network, command_line)
        self._weights = BestWeights(self.model)
        self._training_mode = TrainingMode(self.model)
        self._checked: list[Any] = [None, None]  # the loaders whose first batch was looked at
        self._frozen: set[nn.Parameter] = set()  # by the schedule
        self._validation_seconds = 0.0
        self._sent_before = 0  # bytes, before the current step
        for note in notes_on(model, seed):
            self._print(f"note: {note}")

    # --- the loop

    def train(self, train_loader: Any, val_loader: Any, epochs: int) -> list[dict[str, Any]]:
        """Trains for `epochs` more epochs or until a reason to stop; returns the history.

        Ctrl-C (a notebook's "interrupt") ends it after the step, as if that had been the last; a
        second one raises KeyboardInterrupt at once. Raises ValueError, before the first step, for a
        loader without batches, with labels or images that the network cannot take, or for a model
        and a criterion that do not fit; NonFiniteError where the loss or a gradient is not finite:
        the model then has the weights from before that step.
        """
        check_loader(train_loader, "training", self.network, self.context, self.criterion)
        look = self._checked[1] is not val_loader
        check_loader(val_loader, "validation", self.network, self.context, self.criterion, look)
        self._checked[1] = val_loader
        if not self._weights.put_back_last():
            self._print("note: the weights were changed after train(), which goes on from them")
        self.stopping = False
        last = self.epoch + epochs
        if epochs:
            self._print(EPOCH_HEADER)
        with on_interrupt(self._request_stop) as interrupts, self._counters_kept(interrupts):
            while self.epoch < last and not self.stopped_early:
                if not self._train_epoch(train_loader):
                    break
                try:
                    self._end_epoch(self.scores(val_loader, "validation"))
                except Stopped:  # the epoch has not ended: its validation is still to come
                    break
                if self.out_of_steps or self.stopping:
                    break
        if self.stopped_early and self.early_stopping:
            count = self.early_stopping.counter
            self._print(f"stopped early: no better validation loss for {count} epochs")
        self._load_best_weights()
        if interrupts:
            self.stop_requested = False
            self._print(self._interrupt_text())
        return self.history

    def _train_epoch(self, loader: Any) -> bool:
        """The rest of the current epoch; False if it was left before its end."""
        with contextlib.closing(self._start_epoch(loader)) as batches:
            for batch in batches:
                self.schedule.advance(self.epoch + batches.fraction(self.batch))
                self._start_step(batch.rows)
                found = self.gradient.compute(
                    self.replica, self.criterion, batch, self.step, self.metrics
                )
                self._send_flags(found)
                batches.prefetch()  # while the flags are on their way
                self._update()
                if not batches.at_end and not self._goes_on():
                    return False
        self._end_steps()
        return True

    # --- its parts

    def _start_epoch(self, loader: Any) -> EpochBatches:
        """Sets modes and rates for the rest of the epoch; returns its batches."""
        self._training_mode.set()
        self.schedule.advance(self.epoch)
        self._freeze_conv1()
        augment: Any = getattr(loader, "augment", None)
        if hasattr(augment, "noise_off"):
            augment.noise_off = self.schedule.noise_off
        self.metrics.start_lap()
        seen, began = self.images_seen, time.perf_counter()

        def text() -> str:
            speed = (self.images_seen - seen) / (time.perf_counter() - began)
            return f"loss {self.metrics.mean_loss():.3f}, {speed:,.0f} images/s"

        batches = EpochBatches(loader, self.epoch, self.batch, self.device, text, self.verbose)
        if batches.done != self.batch:  # the loader cannot leave them out: the epoch begins again
            self.batch, self.metrics = 0, EpochMetrics(self.device)
        if self.batch:  # resumed, perhaps after the epoch's last step: the rate that step had
            self.schedule.advance(self.epoch + batches.fraction(self.batch - 1))
        if not batches.at_end and self._checked[0] is not loader:
            check_first_batch(batches.upcoming, self.network, self.context, self.criterion)
            self._checked[0] = loader
        return batches

    def _freeze_conv1(self) -> None:
        """Takes conv1 out of autograd when the schedule freezes it: no gradient, no step, no decay.

        Parameters that the user has frozen stay frozen.
        """
        groups = [g for g in self.optimizer.param_groups if g.get("layer") == "conv1"]
        conv1 = {p for group in groups for p in group["params"]}
        change = {p for p in conv1 if p.requires_grad} if self.schedule.frozen else self._frozen
        if change:
            for parameter in change:
                parameter.requires_grad_(not self.schedule.frozen)
            self._frozen = change if self.schedule.frozen else set()
            # DistributedDataParallel asks once which gradients it will get
            self.replica = self.context.wrap_ddp(self.model)

    def _start_step(self, rows: int) -> None:
        """Clears all gradients, also of weights that the optimizer does not have."""
        self.images_seen += rows
        self.context.status = f"step {self.step + 1}"
        self._sent_before = self.context.meter.total_bytes()
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _send_flags(self, found: BatchLoss) -> None:
        """Tells the other ranks of this step, without waiting for their answer."""
        sent = self.context.meter.total_bytes() - self._sent_before
        self.largest_step_bytes = max(self.largest_step_bytes, sent)
        step = self.step_sync.start(
            self.step + 1, self.epoch + 1, self.lr, found.loss, found.sums, self.stop_requested
        )
        self.diagnostics.classes = found.classes
        self.diagnostics.record(step.names, step.norms)
        if self.on_step is not None:
            self.on_step(step)

    def _update(self) -> None:
        """The optimizer's step, unless something is not finite on some rank."""
        self.step, self.batch = self.step + 1, self.batch + 1
        self._record(self.step_sync.finish())
        self.schedule.end_step()

    def _record(self, outcome: Outcome | None) -> None:
        """Adds a step whose outcome is known to the epoch's figures."""
        if outcome is not None:
            self.stopping = outcome.stop
            self.metrics.add(outcome.sums, outcome.gradient_norm)

    def _goes_on(self) -> bool:
        """Between two steps: saves if it is time; False if training is to stop here."""
        stop = self.stopping or self.out_of_steps
        save = self.save_every > 0 and self.step % self.save_every == 0
        if stop or save:
            self._record(self.step_sync.resolve_pending())
            self.metrics.end_lap()
        if save and not stop and self.on_save is not None:
            self.on_save()
        return not stop

    def _end_steps(self) -> None:
        """All steps of the epoch are done, and count."""
        self._record(self.step_sync.resolve_pending())
        self.metrics.end_lap()
        if not self.metrics.steps:
            again = "; a generator gives its batches once only" if self.epoch else ""
            raise ValueError(
                f"the training loader gave no batches with images in epoch {self.epoch + 1}{again}"
            )

    def _end_epoch(self, scores: Scores) -> None:
        """Validation is done: record, decide, save, print."""
        metrics, self.metrics = self.metrics, EpochMetrics(self.device)
        record = {"epoch": self.epoch + 1, "step": self.step, "lr": self.lr} | metrics.record(
            scores, self._validation_seconds, self.context.all_reduce_replicas
        )
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.schedule.end_epoch(scores.loss)
        if self.early_stopping is not None:
            self.early_stopping(scores.loss)
        improved = scores.loss < self.best["val_loss"]
        if improved:
            self.best = {"val_loss": scores.loss, "epoch": self.epoch}
            if self.restore_best_weights:
                self._weights.keep()
        if self.on_epoch is not None:
            self.on_epoch(record, improved)
        self._print(epoch_line(record) + ("  best" if improved else ""))
        everywhere = self.context.gather(self.diagnostics.dead_layers())
        dead = {column: layers for here in everywhere for column, layers in here.items()}
        top1 = record["train_top1"]
        for line in self.diagnostics.after_epoch(self.epoch, record["train_loss"], top1, dead):
            self._print(line)

    @property
    def stopped_early(self) -> bool:
        """Whether the validation loss has not improved for long enough."""
        return self.early_stopping is not None and self.early_stopping.early_stop

    @property
    def out_of_steps(self) -> bool:
        """Whether `max_steps` are done."""
        return bool(self.max_steps) and self.step >= self.max_steps

    @property
    def lr(self) -> float:
        """The learning rate of the weights behind conv1; of other modules, the last group's."""
        groups = self.optimizer.param_groups
        ours = [g for g in groups if g.get("layer") == "rest" and g.get("kind") == "weight"]
        return float((ours or groups)[-1]["lr"])

    @property
    def scheduler(self) -> LRScheduler | ReduceLROnPlateau | None:
        """The scheduler of torch behind the schedule, if it is one (the tutorial's name)."""
        return getattr(self.schedule, "scheduler", None)

    # --- weights and interrupts

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _load_best_weights(self) -> None:
        if (self.best["epoch"], 0) != (self.epoch, self.batch):  # else the model has them
            self._weights.load_best()

    @contextlib.contextmanager
    def _counters_kept(self, interrupts: list[int]) -> Iterator[None]:
        """After an error or an interrupt the counters are those of the steps that were taken."""
        try:
            yield
        except (
            NonFiniteError
        ) as error:  # where one more had begun, its update was suppressed as well
            self.batch -= self.step - (error.step - 1)
            self.step = error.step - 1
            raise
        except KeyboardInterrupt:
            self.step_sync.abandon()
            self.stop_requested = False
            self._load_best_weights()
            self._print(self._interrupt_text())
            raise
        except RuntimeError as error:  # the interrupt has reached the workers of a DataLoader, too
            if not interrupts or "DataLoader worker" not in str(error):
                raise
            self.step_sync.abandon()
            self.stopping = True

    def _interrupt_text(self) -> str:
        best = f"the best weights, of epoch {self.best['epoch']}"
        weights = "its last weights" if self._weights.best is None else best
        return (
            f"interrupted after step {self.step}: the model has {weights}; train() goes on "
            "from the last"
        )

    def _print(self, text: str) -> None:
        """Prints on rank 0. A screen that is gone does not end the training."""
        if self.verbose:
            with contextlib.suppress(OSError):
                print(text, flush=True)

    # --- scores

    def scores(self, loader: Any, name: str = "evaluation") -> Scores:
        """Loss, top-1 and top-5 over `loader`, of the weights that the model has now.

        Raises Stopped if a rank is asked to stop.
        """
        started, self.context.status = time.perf_counter(), f"{name} after step {self.step}"
        shown = progress(loader, description=name, unit="batches", enabled=self.verbose)
        # In DistributedDataParallel an evaluation would wait for ranks that have fewer batches.
        model = self.network if isinstance(self.model, DistributedDataParallel) else self.model
        with self.context.meter.counting(EVALUATION):
            scores = evaluate(
                model,
                until_stop_requested(shown, self),
                device=self.device,
                criterion=self.criterion,
                reduce=self.context.all_reduce_replicas,
                precision=lambda: autocast(self.device, self.precision),
                name=name,
            )
        self._validation_seconds = time.perf_counter() - started
        return scores

    def evaluate(self, test_loader: Any) -> float:
        """The mean loss over the images of `test_loader`."""
        return self.scores(test_loader).loss

    def accuracy(self, test_loader: Any) -> float:
        """The share of `test_loader`'s images whose largest logit is the label's.

        A fraction of 1.
        """
        return self.scores(test_loader).top1

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """The loop's state in plain containers and tensors, the same on all ranks of one copy.

        With `restore_best_weights` the best and the last weights are part of it.
        """
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "history": self.history,
            "best": self.best,
            "schedule": self.schedule.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else None,
            "tally": self.metrics.state_dict(self.context.all_reduce_replicas),
        }
        if self.restore_best_weights:
            state["weights"] = self._weights.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, at any placement."""
        for name in ("epoch", "step", "batch", "history", "best"):
            setattr(self, name, state[name])
        self.schedule.load_state_dict(state["schedule"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self.early_stopping and state["early_stopping"]:
            self.early_stopping.load_state_dict(state["early_stopping"])
        self.metrics.load_state_dict(state["tally"], first_copy=self.context.data_rank == 0)
        if "weights" in state:
            self._weights.load_state_dict(state["weights"])
