"""Where a training step's time goes: `--profile` times a run's first steps, records, traces more.

The loop does not know of it: the loader is wrapped, the optimizer has hooks, the meter counts the
waits for a peer.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet_mp.config.command import typed_command
from alexnet_mp.config.files import write_atomically
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.meter import TRAINING
from alexnet_mp.training.step_recorder import StepRecorder, why_no_timeline

# Steps, in this order. Recording and tracing slow the steps that they see.
WARM_UP, TIMED, RECORDED, TRACED = 3, 10, 3, 3
STEPS = WARM_UP + TIMED + RECORDED + TRACED

_END = object()


@dataclass
class Times:
    """Seconds of one step on one rank.

    All but `hidden`, which lies inside `compute`, add up to `step`.
    """

    step: float
    compute: float  # forward, backward, and all that is not named here
    exposed: float  # waiting for the peers' activations and gradients
    hidden: float  # these were on the way while the rank computed
    flags: float  # waiting for the other ranks' flags
    input: float  # waiting for the next batch
    optimizer: float


class Profiler:
    """Times `TIMED` steps after a warm-up, then records and traces more; `report` covers all ranks.

    `replica` is what is trained; without it no step is recorded. On CUDA, while steps are timed, it
    waits for the device wherever a part of a step begins or ends; otherwise one part's work would
    be found in the next part's time.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        context: ParallelContext,
        replica: nn.Module | None = None,
    ) -> None:
        self.context, self.meter, self.device = context, context.meter, context.device
        self.meter.times_device = self.device.type == "cuda"
        self.times: list[Times] = []
        self.steps, self.input, self.optimizer_began = 0, 0.0, 0.0
        self.no_timeline = why_no_timeline(replica)
        self.recorder: StepRecorder | None = None
        if replica is not None and not self.no_timeline:
            self.recorder = StepRecorder(replica, context)
        self.recording: StepRecorder | None = None  # while steps are recorded
        self.trace: torch.profiler.profile | None = None
        self.traced = False
        self.hooks = [
            optimizer.register_step_pre_hook(self._before_update),
            optimizer.register_step_post_hook(self._after_update),
        ]
        self._begin_step()

    def watching(self, loader: Any) -> WatchedLoader:
        """`loader`, with the time that is spent waiting for its batches counted."""
        return WatchedLoader(loader, self)

    def now(self) -> float:
        """Seconds, after all that the device was given to do, unless the step is recorded."""
        if not self.recording:
            self._wait_for_device()
        return time.perf_counter()

    def _wait_for_device(self) -> None:
        if self.hooks and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add_input(self, asked: float, came: float) -> None:
        """A batch was waited for."""
        self.input += came - asked
        if self.recording:
            self.recording.add_input(asked, came)

    def _begin_step(self) -> None:
        self.began, self.input = self.now(), 0.0
        self.meter.resolve_device_times()
        self.exposed = self.meter.exposed_seconds[TRAINING]
        self.flags = self.meter.exposed_seconds["control"]
        self.in_flight = self.meter.in_flight_seconds[TRAINING]
        if self.recording:
            self.recording.begin_step()

    def _before_update(self, *_: Any) -> None:
        if self.recording:
            self.recording.begin_update()
        else:
            self.optimizer_began = self.now()

    def _after_update(self, *_: Any) -> None:
        """A step ends: notes it, and goes on to recording or tracing where its turn has come."""
        self._wait_for_device()
        now, self.steps = time.perf_counter(), self.steps + 1
        self.meter.resolve_device_times()
        if WARM_UP < self.steps <= WARM_UP + TIMED:
            self.times.append(self._times(now))
        if self.recording:
            self.recording.end_step(self.steps)
        if self.steps == WARM_UP + TIMED and self.recorder:
            self.recording = self.recorder
            self.recording.start()
        if self.steps == WARM_UP + TIMED + RECORDED:
            self._end_recording()
            # It complains of a missing GPU on every CPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
        elif self.steps == STEPS:
            self._end()
        self._begin_step()

    def _times(self, now: float) -> Times:
        """The parts of the step that ends `now`."""
        exposed = self.meter.exposed_seconds[TRAINING] - self.exposed
        flags = self.meter.exposed_seconds["control"] - self.flags
        hidden = self.meter.in_flight_seconds[TRAINING] - self.in_flight - exposed
        step, optimizer = now - self.began, now - self.optimizer_began
        compute = step - exposed - flags - self.input - optimizer
        return Times(step, compute, exposed, hidden, flags, self.input, optimizer)

    def _end_recording(self) -> None:
        if self.recording:
            self.recording.stop()
            self.recording = None

    def _end(self) -> None:
        self._end_recording()
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.meter.times_device = False
        if self.trace is not None and not self.traced:
            self.trace.stop()
            self.traced = True

    def report(self, folder: Path, batch: int) -> str:
        """Writes timeline.json and this rank's trace into `folder`; returns the table.

        All ranks call it. `batch`: images of a step, over all ranks.
        """
        self._end()
        ranks = [
            [Times(*values) for values in times]
            for times in self.context.gather([astuple(times) for times in self.times])
        ]
        if not ranks[0]:
            return (
                f"--profile: nothing to show, the run had {self.steps} steps and {WARM_UP} warm "
                "up; more need --epochs or --max-steps"
            )
        lines = [table(ranks), self._write_timeline(folder, batch)]
        if self.trace is None or not self.traced:
            return "\n".join([*lines, f"no trace: that takes {STEPS} steps"])
        name = "trace.json" if self.context.is_rank0 else f"trace-rank{self.context.rank}.json"
        self.trace.export_chrome_trace(str(folder / name))
        lines.append("trace in trace.json, for chrome://tracing or https://ui.perfetto.dev")
        return "\n".join(lines)

    def _write_timeline(self, folder: Path, batch: int) -> str:
        """Writes timeline.json on rank 0; returns the line about it."""
        if self.recorder is None:
            return f"no timeline: {self.no_timeline}"
        step = self.recorder.typical_step(batch)
        if step is None:
            return f"no timeline: that takes {WARM_UP + TIMED + 1} steps"
        if self.context.is_rank0:
            write_atomically(folder / "timeline.json", json.dumps(step) + "\n")
        draw = typed_command("figures")
        return f"timeline of step {step['step']} in timeline.json; `{draw} {folder}` draws it"


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
            asked = self.profiler.now()
            batch = next(batches, _END)
            self.profiler.add_input(asked, self.profiler.now())
            if batch is _END:
                return
            yield batch


def table(ranks: list[list[Times]]) -> str:
    """Milliseconds of rank 0's steps, each rank's medians, each part's share of rank 0's median."""
    names = [field.name for field in fields(Times)]
    lines = [
        "The exchange is exposed while a rank waits for it, hidden while the rank computes:",
        "hidden lies inside compute; the other parts add up to a step.",
        "milliseconds".ljust(16) + "".join(name.rjust(11) for name in names),
    ]
    lines += [line(f"step {WARM_UP + 1 + i}", times) for i, times in enumerate(ranks[0])]
    medians = [
        Times(*(statistics.median(values) for values in zip(*map(astuple, times), strict=True)))
        for times in ranks
    ]
    lines += [line(f"median, rank {rank}", times) for rank, times in enumerate(medians)]
    shares = (value / medians[0].step for value in astuple(medians[0]))
    lines.append("share of a step".ljust(16) + "".join(f"{share:11.1%}" for share in shares))
    return "\n".join(lines)


def line(name: str, times: Times) -> str:
    """One row of the table."""
    return name.ljust(16) + "".join(f"{1e3 * value:11.2f}" for value in astuple(times))
