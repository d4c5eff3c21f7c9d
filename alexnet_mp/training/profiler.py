"""Where a training step's time goes: `--profile` watches the first steps of a run from outside and traces a few more.

Nothing in the loop knows of it: the loader is wrapped, the optimizer has hooks, the meter has counted what waited for a peer.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.meter import TRAINING

WARM_UP, TIMED, TRACED = (
    3,
    10,
    3,
)  # steps; a trace slows what it sees, so times are of the steps before it


@dataclass
class Times:
    """Seconds of one step on one rank; all but `hidden` add up to `step`."""

    step: float
    compute: float  # forward, backward, and all that is not named here
    exposed: float  # waiting for the peers' activations and gradients
    hidden: float  # on the way while the rank computed
    flags: float  # waiting for what all ranks must agree on
    input: float  # waiting for the next batch
    optimizer: float


class Profiler:
    """Times `TIMED` steps after a warm-up, then traces `TRACED`; `report` is for all ranks together."""

    def __init__(self, optimizer: torch.optim.Optimizer, context: ParallelContext) -> None:
        self.context, self.meter, self.device = context, context.meter, context.device
        self.times: list[Times] = []
        self.steps, self.input, self.optimizer_began = 0, 0.0, 0.0
        self.trace: torch.profiler.profile | None = None
        self.traced = False
        self.hooks = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]
        self._mark()

    def watching(self, loader: Any) -> WatchedLoader:
        """`loader`, the time that is spent waiting for its batches counted."""
        return WatchedLoader(loader, self)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(
                self.device
            )  # otherwise one part's work would be found in the next part's time
        return time.perf_counter()

    def _mark(self) -> None:
        """A step begins."""
        self.began, self.input = self._now(), 0.0
        self.exposed_seconds, self.flags, self.in_flight_seconds = (
            self.meter.exposed_seconds[TRAINING],
            self.meter.exposed_seconds["control"],
            self.meter.in_flight_seconds[TRAINING],
        )

    def _before_update(self, *_: Any) -> None:
        self.optimizer_began = self._now()

    def _after_update(self, *_: Any) -> None:
        """A step ends: note it, and begin or end the trace where its turn has come."""
        now, self.steps = self._now(), self.steps + 1
        if WARM_UP < self.steps <= WARM_UP + TIMED:
            exposed, flags = (
                self.meter.exposed_seconds[TRAINING] - self.exposed_seconds,
                self.meter.exposed_seconds["control"] - self.flags,
            )
            hidden = self.meter.in_flight_seconds[TRAINING] - self.in_flight_seconds - exposed
            step, optimizer = now - self.began, now - self.optimizer_began
            self.times.append(
                Times(
                    step,
                    step - exposed - flags - self.input - optimizer,
                    exposed,
                    hidden,
                    flags,
                    self.input,
                    optimizer,
                )
            )
        if self.steps == WARM_UP + TIMED:
            activities = [torch.profiler.ProfilerActivity.CPU] + [
                torch.profiler.ProfilerActivity.CUDA
            ] * (self.device.type == "cuda")
            os.environ.setdefault(
                "KINETO_LOG_LEVEL", "5"
            )  # it complains of a missing GPU on every CPU
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
        elif self.steps == WARM_UP + TIMED + TRACED:
            self._end()
        self._mark()

    def _end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self.trace is not None and not self.traced:
            self.trace.stop()
            self.traced = True

    def report(self, folder: Path) -> str:
        """Writes this rank's trace into `folder`; the table of all ranks' steps, or why there is none. Every rank calls it."""
        self._end()
        ranks = [
            [Times(*values) for values in times]
            for times in self.context.gather([astuple(times) for times in self.times])
        ]
        if not ranks[0]:
            return f"--profile: nothing to show, the run had {self.steps} steps and {WARM_UP} warm up; more need --epochs or --max-steps"
        name = "trace.json" if self.context.is_rank0 else f"trace-rank{self.context.rank}.json"
        if self.traced:
            self.trace.export_chrome_trace(str(folder / name))
        return table(ranks) + (
            "\ntrace in trace.json, for chrome://tracing or https://ui.perfetto.dev"
            if self.traced
            else f"\nno trace: that takes {WARM_UP + TIMED + TRACED} steps"
        )


class WatchedLoader:
    """A loader whose batches are waited for by a stopwatch; all else is the loader's own."""

    def __init__(self, loader: Any, profiler: Profiler) -> None:
        self.loader, self.profiler = loader, profiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.profiler.input += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def table(ranks: list[list[Times]]) -> str:
    """Milliseconds per step of the main rank, then medians of every rank, then each part's share of the main rank's median step."""
    names = [field.name for field in fields(Times)]
    lines = ["milliseconds".ljust(16) + "".join(name.rjust(11) for name in names)]
    lines += [line(f"step {WARM_UP + 1 + i}", times) for i, times in enumerate(ranks[0])]
    medians = [
        Times(*(statistics.median(values) for values in zip(*map(astuple, times), strict=True)))
        for times in ranks
    ]
    lines += [line(f"median, rank {rank}", times) for rank, times in enumerate(medians)]
    lines.append(
        "share of a step".ljust(16)
        + "".join(f"{value / medians[0].step:11.1%}" for value in astuple(medians[0]))
    )
    return "\n".join(lines)


def line(name: str, times: Times) -> str:
    return name.ljust(16) + "".join(f"{1e3 * value:11.2f}" for value in astuple(times))
