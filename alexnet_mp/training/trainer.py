"""The training loop: the tutorial's Trainer, which also trains a network that is spread over ranks.

One rank with any module and any DataLoader is the degenerate case of many ranks with columns; there is no second loop.
All ranks run the same loop on the same numbers, so that every decision (stop, skip, rate) is taken alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.precision import LossScale, autocast
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.meter import EVALUATION
from alexnet_mp.training.curves import Curves
from alexnet_mp.training.diagnostics import Diagnostics
from alexnet_mp.training.input_checks import check_first, check_labels, check_loader, labels_of
from alexnet_mp.training.metrics import EPOCH_HEADER, Scores, epoch_line, evaluate, topk_correct
from alexnet_mp.training.schedule import EarlyStopping, LRSchedule, Plateau
from alexnet_mp.training.step_sync import (
    NonFiniteError,
    Step,
    StepSync,
    Stopped,
    until_stop_requested,
)
from alexnet_mp.training.tally import Tally


class Trainer(Curves):
    """Trains `model`, watches the validation loss, keeps the best weights.

    The first five arguments are the tutorial's: a module that gives logits, a loss, an optimizer, a device, and the
    epochs without improvement after which to stop. `criterion` gives the mean over a batch, or its sum where its
    `reduction` is "sum"; with several data ranks it must be the sum, which is then divided by the global batch.
    A batch is (images, labels, ...); `rows` and `first_row` of it, if there, are its place in the global batch.

    `train_losses`, `val_losses` (means over images) and `gradient_norms` (means over steps) have one entry per epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device | str,
        patience: int = 7,
        *,
        schedule: LRSchedule | None = None,
        early_stopping: EarlyStopping | None = None,
        context: ParallelContext | None = None,
        precision: str = "fp32",
        seed: int = 0,
        max_steps: int = 0,
        verbose: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.model, self.criterion, self.optimizer = model.to(self.device), criterion, optimizer
        self.context = context or ParallelContext(Environment(), self.device, (0,))
        self.replica = self.context.wrap_ddp(self.model)
        self.early_stopping = early_stopping or (EarlyStopping(patience) if patience else None)
        self.schedule = schedule or Plateau(
            optimizer, factor=0.5, patience=3, min_lr=1e-6
        )  # the tutorial's
        self.precision, self.loss_scale = precision, LossScale(precision)
        self.seed, self.max_steps = seed, max_steps
        self.verbose = verbose and self.context.is_rank0
        self.summed = getattr(criterion, "reduction", "mean") == "sum"
        self.epoch = self.step = self.batch = (
            0  # whole epochs, all steps, steps of the current epoch
        )
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"val_loss": math.inf, "epoch": None}
        self.stop_requested = False  # of this rank, set from a signal handler
        self.stopping = False  # what the ranks made of their requests, the same on all
        self.images_seen = 0  # by this process, for the meter's figures per image
        self.largest_step_bytes = 0
        self.on_epoch: Callable[[dict[str, Any], bool], None] | None = None
        self.save_every, self.on_save = (
            0,
            lambda: None,
        )  # steps between two saves within an epoch, by whoever keeps checkpoints
        self._best_weights: dict[str, Tensor] | None = None
        self.tally = Tally(self.device)
        self.step_sync, self.diagnostics = (
            StepSync(self.context, self.model, optimizer, precision),
            Diagnostics(self.model),
        )
        self._unsettled: tuple[Step, Tensor] | None = (
            None  # the step before, where its outcome is read a step later
        )
        self._checked: set[int] = set()  # loaders whose first batch has been looked at

    @property
    def scheduler(self) -> ReduceLROnPlateau | None:
        """The plateau rule behind the schedule, where it is one (the tutorial's name)."""
        return getattr(self.schedule, "plateau", None)

    def train(self, train_loader: Any, val_loader: Any, epochs: int) -> list[dict[str, Any]]:
        """Trains for `epochs` more epochs or until a reason to stop; returns the history, one dictionary per epoch.

        Afterwards the model has the weights of the best epoch, unless `on_epoch` has been set to keep them elsewhere.
        Raises ValueError, before the first step, for a loader without batches or with labels or images that the network cannot take;
        NonFiniteError where the loss or a gradient is not finite.
        """
        for loader, name in ((train_loader, "training"), (val_loader, "validation")):
            if isinstance(loader, Sized) and not len(loader):
                raise ValueError(
                    f"the {name} loader has no batches: fewer images than a batch with drop_last, or none at all"
                )
            check_loader(loader, name, self.model)
        last = self.epoch + epochs
        if self.verbose and epochs:
            print(EPOCH_HEADER, flush=True)
        while self.epoch < last and not self.stopped_early:
            if not self._train_epoch(train_loader):
                break
            try:
                self._end_epoch(self.scores(val_loader))
            except Stopped:  # the epoch has not ended: a resumed run begins with its validation
                break
            if self.out_of_steps or self.stopping:
                break
        if self.stopped_early and self.verbose:
            print(
                f"stopped early: no better validation loss for {self.early_stopping.counter} epochs"
            )
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)
        return self.history

    @property
    def stopped_early(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.early_stop

    @property
    def out_of_steps(self) -> bool:
        return bool(self.max_steps) and self.step >= self.max_steps

    def _train_epoch(self, loader: Any) -> bool:
        """The rest of the current epoch; False if it was left before its end."""
        self.model.train()
        batches = len(loader) if isinstance(loader, Sized) else None
        self.schedule.advance(self.epoch)
        self._freeze()
        if hasattr(loader, "augment"):
            loader.augment.noise_off = self.schedule.noise_off
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch, self.batch)
        elif hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(self.epoch)
        clock = time.perf_counter()
        bar = tqdm(
            loader,
            f"epoch {self.epoch + 1}",
            total=batches,
            initial=self.batch,
            unit="step",
            leave=False,
            disable=None if self.verbose else True,
        )
        batches_left = iter(bar)
        batch = next(batches_left, None)
        if (
            self.batch and batches
        ):  # resumed within the epoch, perhaps after its last step: the rate that step had
            self.schedule.advance(self.epoch + (self.batch - 1) / batches)
        if batch is not None and id(loader) not in self._checked:
            check_first(batch, self.model, self.context)
            self._checked |= {id(loader)} if labels_of(loader) is not None else set()
        while batch is not None:
            self.schedule.advance(self.epoch + (self.batch / batches if batches else 0))
            self.context.status = f"step {self.step + 1}"
            step = self._gradients(batch, labels_known=id(loader) in self._checked)
            batch = next(batches_left, None)  # prepared while the ranks' flags are on their way
            self._update(*step)
            if bar.disable is False and self.step % 10 == 0:
                bar.set_postfix_str(f"loss {self.tally.mean_loss():.3f}")
            stop = self.stopping or self.out_of_steps
            save = self.save_every and self.step % self.save_every == 0
            if stop or save or self.batch == batches:
                self.resolve_pending()
                self.tally.seconds, clock = (
                    self.tally.seconds + time.perf_counter() - clock,
                    time.perf_counter(),
                )
            if stop and self.batch != batches:
                return False
            if save and self.batch != batches:
                self.on_save()
        self.resolve_pending()
        bar.close()
        self.tally.seconds += time.perf_counter() - clock
        if not self.tally.steps:
            raise ValueError("the training loader gave no batches")
        return True

    def _freeze(self) -> None:
        """Takes conv1 out of autograd from the epoch on at which the schedule freezes it: no gradient, no step, no decay."""
        conv1 = [
            p
            for group in self.optimizer.param_groups
            if group.get("layer") == "conv1"
            for p in group["params"]
        ]
        if any(p.requires_grad == self.schedule.frozen for p in conv1):
            for p in conv1:
                p.requires_grad_(not self.schedule.frozen)
            self.replica = self.context.wrap_ddp(
                self.model
            )  # DistributedDataParallel asks once which gradients it will get

    def _gradients(self, batch: Any, labels_known: bool = False) -> tuple[Step, Tensor]:
        """Forward and backward of one batch: its step, whose flags are on their way, and what it adds to the epoch's sums."""
        images, labels = (
            batch[0].to(self.device, non_blocking=True),
            batch[1].to(self.device, non_blocking=True),
        )
        rows, first_row = getattr(batch, "rows", len(labels)), getattr(batch, "first_row", 0)
        sent_before = self.context.meter.total_bytes()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits = self.replica(images, *self._keys(images, first_row))
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if not labels_known:
            check_labels(batch[1], logits.shape[1], "training")
        loss = self.criterion(logits, labels)
        # The sum over this rank's rows, divided by the whole batch: right for uneven tails too. DDP averages its ranks' gradients, so that is undone.
        share = loss / rows * self.context.data_ranks if self.summed else loss
        (share * self.loss_scale.scale).backward()
        self.largest_step_bytes = max(
            self.largest_step_bytes, self.context.meter.total_bytes() - sent_before
        )
        step = self.step_sync.start(
            self.step + 1, self.epoch + 1, self.lr, loss, self.loss_scale.scale, self.stop_requested
        )
        self.diagnostics.record(step.names, step.norms, logits.shape[1])
        self.images_seen += rows
        return step, self.tally.counts(
            loss * (1 if self.summed else len(labels)), topk_correct(logits, labels, 1), len(labels)
        )

    def _update(self, step: Step, counts: Tensor) -> None:
        """The optimizer's step, unless something is not finite. Where the device sees to that itself, the step before is settled now."""
        if not self.step_sync.deferred:
            self._settle(step, counts)
            self.step, self.batch = self.step + 1, self.batch + 1
            return
        self.optimizer.step()
        self.step, self.batch = self.step + 1, self.batch + 1
        self.resolve_pending()
        self._unsettled = (step, counts)

    def resolve_pending(self) -> None:
        """After it, every step that was counted is known to count."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled:
            self._settle(*unsettled)

    def _settle(self, step: Step, counts: Tensor) -> None:
        try:
            squared, self.stopping = self.step_sync.resolve_step(
                step, self.loss_scale.active, self.loss_scale.exhausted
            )
        except NonFiniteError:
            self.batch -= self.step - (
                step.number - 1
            )  # where one more had begun, its update was suppressed as well
            self.step = step.number - 1
            raise
        taken = self.loss_scale.update(squared)
        if taken and not self.step_sync.deferred:
            if self.loss_scale.scale != 1:
                torch._foreach_mul_(
                    [p.grad for p in self.model.parameters() if p.grad is not None],
                    1 / self.loss_scale.scale,
                )
            self.optimizer.step()
        self.tally.confirm(counts, math.sqrt(squared) if taken else 0.0)

    def _keys(self, images: Tensor, first_row: int) -> tuple[Tensor, ...]:
        """The dropout keys of these rows for our own network; other modules take images only."""
        if not isinstance(self.model, AlexNet):
            return ()
        return (
            dropout_keys(
                self.seed,
                self.step,
                torch.arange(first_row, first_row + len(images), device=self.device),
            ),
        )

    @property
    def lr(self) -> float:
        """The learning rate of the weights behind conv1 (of the last group, for other modules the only one)."""
        groups = self.optimizer.param_groups
        return (
            [g for g in groups if g.get("layer") == "rest" and g.get("kind") == "weight"] or groups
        )[-1]["lr"]

    def _end_epoch(self, scores: Scores) -> None:
        """Validation is done: record, decide, hand over."""
        tally, self.tally = self.tally, Tally(self.device)
        loss, correct, images = self.context.all_reduce_replicas(tally.sums.cpu().double()).tolist()
        record = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.lr,
            "train_loss": loss / images,
            "train_top1": correct / images,
            "val_loss": scores.loss,
            "val_top1": scores.top1,
            "val_top5": scores.top5,
            "grad_norm": tally.grad_norm / tally.steps,
            "images_per_second": images / tally.seconds,
            "seconds": round(tally.seconds + self._validation_seconds, 3),
        }
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.schedule.end_epoch(scores.loss)
        if self.early_stopping is not None:
            self.early_stopping(scores.loss)
        improved = scores.loss < self.best["val_loss"]
        if improved:
            self.best = {"val_loss": scores.loss, "epoch": self.epoch}
        if self.verbose:
            print(epoch_line(record) + ("  best" if improved else ""), flush=True)
        dead = {
            column: layers
            for here in self.context.gather(self.diagnostics.dead_layers())
            for column, layers in here.items()
        }
        for line in self.diagnostics.after_epoch(self.epoch, record["train_loss"], dead):
            if self.verbose:
                print(line, flush=True)
        if self.on_epoch is not None:
            self.on_epoch(record, improved)
        elif improved:
            self._best_weights = {
                name: value.detach().cpu().clone()
                for name, value in self.model.state_dict().items()
            }

    def scores(self, loader: Any) -> Scores:
        """Loss, top-1 and top-5 over `loader`, of the weights that the model has now. Raises Stopped if a rank is asked to stop."""
        started, self.context.status = time.perf_counter(), f"validation after step {self.step}"
        bar = tqdm(
            loader, "validation", unit="batch", leave=False, disable=None if self.verbose else True
        )
        with self.context.meter.counting(EVALUATION):
            scores = evaluate(
                self.model,
                until_stop_requested(bar, self),
                device=self.device,
                criterion=self.criterion,
                reduce=self.context.all_reduce_replicas,
                precision=lambda: autocast(self.device, self.precision),
            )
        self._validation_seconds = time.perf_counter() - started
        return scores

    def evaluate(self, test_loader: Any) -> float:
        """The mean loss over the images of `test_loader`."""
        return self.scores(test_loader).loss

    def accuracy(self, test_loader: Any) -> float:
        """The share of `test_loader`'s images whose largest logit is the label's, a fraction of 1."""
        return self.scores(test_loader).top1

    def state_dict(self) -> dict[str, Any]:
        """The loop's state in plain containers and tensors; the same on all ranks that hold one copy."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "history": self.history,
            "best": self.best,
            "schedule": self.schedule.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else None,
            "tally": self.tally.state_dict(self.context.all_reduce_replicas),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, at any placement."""
        for name in ("epoch", "step", "batch", "history", "best"):
            setattr(self, name, state[name])
        self.schedule.load_state_dict(state["schedule"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self.early_stopping and state["early_stopping"]:
            self.early_stopping.load_state_dict(state["early_stopping"])
        self.tally.load_state_dict(state["tally"], first_copy=self.context.data_rank == 0)
