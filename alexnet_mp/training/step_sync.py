"""Makes all ranks agree on each step: is it finite, how large is its gradient, is one to stop.

The update is taken here, because it depends on that. There are two ways, with the same results bit
for bit:

    at once     the flags travel on the control group while the next batch is prepared, and are
                read before the update
    deferred    the flags stay on the device, where a fused optimizer skips the update by itself;
                they are read one step later, so that no step waits for the device. Needs NCCL, or
                one rank, and an optimizer that takes `found_inf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alexnet_mp.config.model import LAYERS
from alexnet_mp.ops.precision import LossScale
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.sgd2012 import FUSED, SGD2012


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not finite; the weights are those from before that step."""

    step = 0  # the number of that step, counted from 1


class Stopped(Exception):
    """Raised on all ranks when an evaluation is interrupted."""


@dataclass
class Step:
    """One step whose outcome is not known yet."""

    number: int  # counted from 1 over the whole run
    epoch: int  # counted from 1
    lr: float
    names: list[str]  # of the parameters with a gradient
    norms: Tensor  # of their gradients, on the device
    loss: Tensor
    sums: Tensor  # what the step adds to the epoch's sums if it counts
    wait: Callable[[], Tensor]  # gives the three flags (see StepSync.start), summed over all ranks


@dataclass
class Outcome:
    """The result of one step, the same on all ranks; `sums` are this rank's own."""

    gradient_norm: float  # 0 for a step that was skipped
    stop: bool  # whether a rank is asked to stop
    sums: Tensor


class StepSync:
    """Takes the optimizer's steps, each only if it is finite on every rank.

        step_sync.start(...)             # after backward: the flags leave
        outcome = step_sync.finish()     # the update; deferred, the outcome is of the step before
        outcome = step_sync.resolve_pending()

    `deferred` None: where it can be and saves something, which is on CUDA. fp16 needs the outcome
    at once, for its loss scale.
    """

    def __init__(
        self,
        context: ParallelContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale,
        deferred: bool | None = None,
    ) -> None:
        self.context, self.model, self.optimizer = context, model, optimizer
        self.loss_scale = loss_scale
        devices = {p.device for p in model.parameters()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        able = (
            isinstance(optimizer, SGD2012)
            and device.type in FUSED
            and not loss_scale.active
            and context.backend in ("none", "nccl")
        )
        self.deferred = able and device.type == "cuda" if deferred is None else deferred
        self.flags = torch.zeros(
            3, dtype=torch.float64, device="cpu" if device.type == "mps" else device
        )
        # Once set it stays: a step after the one that failed must not change the weights either.
        self.found_inf = torch.zeros((), device=device)
        if self.deferred:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]  # as torch.amp sets it
        self._started: Step | None = None  # its flags are on their way, its update is not taken
        self._pending: Step | None = None  # deferred: its update is taken, its flags are not read

    def start(
        self, number: int, epoch: int, lr: float, loss: Tensor, sums: Tensor, stop: bool
    ) -> Step:
        """Sends off the flags of a step whose gradients lie in the parameters.

        The flags are: the squared norm of the gradient, losses that are not finite, requests to
        stop.
        """
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        norms = (
            torch.stack(torch._foreach_norm([gradient for _, gradient in named]))
            if named
            else self.flags.new_zeros(1)
        )
        mine = self.flags.clone()
        # MPS has no float64: there the squares are added up on the CPU, as everywhere in float64
        squared = (
            (norms if norms.device == mine.device else norms.to(mine.device))
            .double()
            .square()
            .sum()
        )
        mine[0] = squared / self.loss_scale.scale**2 / self.context.data_ranks
        mine[1] = (~loss.detach().isfinite()).to(mine)
        mine[2:].fill_(float(stop))  # assigned, a number would be copied, and waited for
        wait = self._send_from_device(mine) if self.deferred else self.context.start_sum(mine.cpu())
        names = [name for name, _ in named]
        self._started = Step(number, epoch, lr, names, norms, loss.detach(), sums, wait)
        return self._started

    def _send_from_device(self, mine: Tensor) -> Callable[[], Tensor]:
        self.context.sum_on_device(mine)
        bad = (mine[1] > 0) | ~mine[0].isfinite()
        self.found_inf.copy_(torch.maximum(self.found_inf, bad.to(self.found_inf)))
        if mine.device.type != "cuda":
            return lambda: mine
        host = torch.empty(3, dtype=mine.dtype, pin_memory=True).copy_(mine, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's has no annotations
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait

    def finish(self) -> Outcome | None:
        """Takes the update of the started step; returns its outcome, or, deferred, the last one's.

        NonFiniteError, on all ranks, names step, layer, rank and rate.
        """
        step, self._started = self._started, None
        assert step is not None
        if not self.deferred:
            return self._resolve(step)
        self.optimizer.step()
        before = self.resolve_pending()
        self._pending = step
        return before

    def resolve_pending(self) -> Outcome | None:
        """Resolves the pending step, if any."""
        step, self._pending = self._pending, None
        return self._resolve(step) if step else None

    def abandon(self) -> None:
        """Forgets what is on its way, after an interrupt."""
        self._started = self._pending = None

    def _resolve(self, step: Step) -> Outcome:
        squared, bad_losses, stop = step.wait().tolist()
        scale = self.loss_scale
        # In fp16 a gradient that overflows is no error, as long as a smaller loss scale may help.
        overflow_is_fine = scale.active and not scale.exhausted
        if bad_losses or scale.exhausted or not (math.isfinite(squared) or overflow_is_fine):
            self.found_inf.zero_()  # for whoever goes on, at another rate
            error = NonFiniteError(
                f"step {step.number} (epoch {step.epoch}): {self._culprit(step)} is not finite, so "
                f"the step was not taken; lr {step.lr:g} may be too high for this network and data"
            )
            error.step = step.number
            raise error
        factor = scale.scale  # that of these gradients, which update may change
        taken = scale.update(squared)
        if taken and not self.deferred:
            self._unscale_gradients(factor)
            self.optimizer.step()
        return Outcome(math.sqrt(squared) if taken else 0.0, stop > 0, step.sums)

    def _unscale_gradients(self, factor: float) -> None:
        """Undoes the `factor` that fp16 put on the loss."""
        if factor != 1:
            groups = self.optimizer.param_groups
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / factor)

    def _culprit(self, step: Step) -> str:
        """Where it began, over all ranks: the loss, else the bad gradient nearest to the output."""
        mine: tuple[int, str] = (-1, "")
        if not step.loss.isfinite():
            mine = (len(LAYERS) + 1, "the loss")
        else:
            bad = [
                name
                for name, finite in zip(step.names, step.norms.isfinite().tolist(), strict=False)
                if not finite
            ]
            if bad:
                mine = max((depth(name), f"the gradient of {parameter_name(name)}") for name in bad)
        everywhere = self.context.gather(mine)
        deepest: int = max(everywhere)[0]
        what: str = max(everywhere)[1]
        ranks = [rank for rank, found in enumerate(everywhere) if found[0] == deepest]
        if deepest < 0:
            return "the gradient's norm"
        if len(everywhere) == 1:
            return what
        return f"{what} on " + (
            "every rank"
            if len(ranks) == len(everywhere)
            else f"rank {' and '.join(map(str, ranks))}"
        )


class Stoppable(Protocol):
    """The part of a trainer that `until_stop_requested` reads and sets."""

    context: ParallelContext
    stop_requested: bool  # of this rank
    stopping: bool  # of all ranks


def until_stop_requested(batches: Iterable[Any], trainer: Stoppable) -> Iterator[Any]:
    """`batches`, until a rank is asked to stop; then raises Stopped on all ranks.

    A validation may take longer than the half minute that torchrun gives.
    """
    wait = None
    for batch in batches:
        if wait is not None:
            trainer.stopping = wait().item() > 0
            if trainer.stopping:
                raise Stopped
        wait = trainer.context.start_sum(
            torch.tensor([float(trainer.stop_requested)], dtype=torch.float64)
        )
        yield batch
    if wait is not None:
        trainer.stopping = wait().item() > 0


def parameter_name(name: str) -> str:
    """A parameter's name as the state dict has it: a crossing's weight is stored in two halves."""
    return name.replace("weight_own", "weight").replace("weight_peers", "weight")


def depth(name: str) -> int:
    """Returns the number of a parameter's layer, which grows towards the output; 0 for other
    modules."""
    return max(
        (number for number, layer in enumerate(LAYERS, 1) if f".{layer}." in f".{name}."), default=0
    )
