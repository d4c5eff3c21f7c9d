"""What all ranks must know of a step: whether its numbers are finite, how large its gradient is, and whether one of them wants to stop.

Two ways, with the same results bit for bit:

    at once     the flags travel on the control group while the next batch is prepared, and are read before the update
    deferred    the flags stay on the device, where a fused optimizer skips the update by itself; they are read one step later, so
                that no step waits for the device. Needs NCCL, or one rank, and an optimizer that takes `found_inf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_mp.config.model import LAYERS
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.sgd2012 import FUSED, SGD2012


class NonFiniteError(ArithmeticError):
    """The loss or a gradient stopped being a number; the weights are those from before that step."""


class Stopped(Exception):
    """All ranks agreed to stop where no result comes of what was begun (validation, a test); caught where it was begun."""


@dataclass
class Step:
    """One step whose outcome is not known yet."""

    number: int  # counted from 1 over the whole run
    epoch: int  # counted from 1
    lr: float
    names: list[str]  # of the parameters with a gradient
    norms: Tensor  # of their gradients, on the device
    loss: Tensor
    arrive: Callable[
        [], Tensor
    ]  # waits for [squared gradient norm, losses that are not finite, requests to stop] over all ranks


class StepSync:
    """Starts a step's flags on their way and says what came of them, the same on every rank."""

    def __init__(
        self,
        context: ParallelContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        deferred: bool | None = None,
    ) -> None:
        """`deferred` None: where it can be and saves something, which is on CUDA. fp16 needs the outcome at once, for its loss scale."""
        self.context, self.model, self.optimizer = context, model, optimizer
        devices = {p.device for p in model.parameters()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        able = (
            isinstance(optimizer, SGD2012)
            and device.type in FUSED
            and precision != "fp16"
            and context.backend in ("none", "nccl")
        )
        self.deferred = able and device.type == "cuda" if deferred is None else deferred
        self.flags = torch.zeros(
            3, dtype=torch.float64, device="cpu" if device.type == "mps" else device
        )
        if self.deferred:
            # Once set it stays: a step after the one that failed must not change the weights either.
            optimizer.found_inf = torch.zeros((), device=device)

    def start(
        self, number: int, epoch: int, lr: float, loss: Tensor, scale: float, stop: bool
    ) -> Step:
        """Sends off the flags of a step whose gradients, of a loss that was multiplied by `scale`, lie in the parameters."""
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
        mine[0] = squared / scale**2 / self.context.data_ranks
        mine[1] = (~loss.detach().isfinite()).to(mine)
        mine[2] = float(stop)
        arrive = (
            self._send_from_device(mine) if self.deferred else self.context.start_sum(mine.cpu())
        )
        return Step(number, epoch, lr, [name for name, _ in named], norms, loss.detach(), arrive)

    def _send_from_device(self, mine: Tensor) -> Callable[[], Tensor]:
        self.context.sum_on_device(mine)
        bad = (mine[1] > 0) | ~mine[0].isfinite()
        self.optimizer.found_inf.copy_(
            torch.maximum(self.optimizer.found_inf, bad.to(self.optimizer.found_inf))
        )
        if mine.device.type != "cuda":
            return lambda: mine
        host = torch.empty(3, dtype=mine.dtype, pin_memory=True).copy_(mine, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def arrive() -> Tensor:
            copied.synchronize()
            return host

        return arrive

    def resolve_step(
        self, step: Step, overflow_is_fine: bool = False, exhausted: bool = False
    ) -> tuple[float, bool]:
        """Waits for the flags: (squared gradient norm, whether to stop). NonFiniteError, on all ranks, naming step, layer, rank and lr.

        In fp16 a gradient that overflows is no error, while a smaller loss scale may help (`overflow_is_fine`, not `exhausted`).
        """
        squared, bad_losses, stop = step.arrive().tolist()
        if bad_losses or exhausted or (not math.isfinite(squared) and not overflow_is_fine):
            if self.deferred:
                self.optimizer.found_inf.zero_()  # for whoever goes on, at another rate
            raise NonFiniteError(
                f"step {step.number} (epoch {step.epoch}): {self._culprit(step)} is not finite, so the step was not taken; "
                f"lr {step.lr:g} may be too high for this network and data"
            )
        return squared, stop > 0

    def _culprit(self, step: Step) -> str:
        """Where it began, over all ranks: the loss, else the gradient that backward met first, which is the one nearest to the output."""
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
                mine = max(
                    (
                        depth(name),
                        f"the gradient of {name.replace('weight_own', 'weight').replace('weight_peers', 'weight')}",
                    )
                    for name in bad
                )
        everywhere = self.context.gather(mine)
        deepest, what = max(everywhere)
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


def until_stop_requested(batches: Iterable[Any], trainer: Any) -> Iterator[Any]:
    """`batches`, until a rank is asked to stop; then Stopped, on all. A validation may take longer than the half minute that torchrun gives.

    `trainer` has the placement, this rank's `stop_requested`, and `stopping`, what the ranks made of their requests.
    """
    arrive = None
    for batch in batches:
        if arrive is not None:
            trainer.stopping = arrive().item() > 0
            if trainer.stopping:
                raise Stopped
        arrive = trainer.context.start_sum(
            torch.tensor([float(trainer.stop_requested)], dtype=torch.float64)
        )
        yield batch
    if arrive is not None:
        trainer.stopping = arrive().item() > 0


def depth(name: str) -> int:
    """How far towards the output a parameter lies, by its layer's name; 0 for other modules than ours."""
    return max(
        (number for number, layer in enumerate(LAYERS, 1) if f".{layer}." in f".{name}."), default=0
    )
