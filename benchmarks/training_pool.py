"""Trains many networks, some at a time, until all are done or a time limit is reached.

Each of --jobs processes trains one network after the other, so that it imports torch once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared_images import share_images, shared_images
from trainings import Stop, Training, found, log_to, train

from alexnet_mp.config import Config
from alexnet_mp.config.progress import progress
from alexnet_mp.ops.cpu_cores import available_cores
from alexnet_mp.training.run import run
from alexnet_mp.training.trainer import Trainer

PROBE_STEPS, PROBE_EVERY = 12, 4
"""Steps, at least, of the trial that the estimate of the time comes from, and of a piece of it."""
PROBE_SECONDS = (0.5, 4.0)
"""Its seconds, at least: of one alone, and of as many together as there are jobs, which have to
meet."""
FORWARD_SHARE = 1 / 3  # of a training step's time, which a validation batch takes
TARGET_SHARE = 1 / 3  # of their limit that trainings with a target are taken to need


# --- how long it will take


@dataclass(frozen=True)
class Estimate:
    """How long trainings will take, from some steps of the first of each kind of network."""

    seconds_per_step: dict[str, float]
    """Of a training alone, by preset."""
    slowdown: float
    """How many times as long a step takes while as many networks are trained as there are jobs."""
    fixed: float
    """Seconds for all trainings that do not depend on --epochs, which have a target."""
    per_epoch: float
    """Seconds for one epoch of all others."""
    longest: float
    """Seconds for one epoch of the slowest of these, which no number of jobs makes shorter."""

    def seconds(self, epochs: int) -> float:
        """For all trainings, with --epochs."""
        return max(self.fixed + self.per_epoch * epochs, self.longest * epochs)

    def epochs_within(self, seconds: float) -> int:
        """The largest number of epochs, at least 1, with which all trainings end in `seconds`."""
        epochs = 1
        while self.per_epoch and self.seconds(epochs + 1) <= seconds:
            epochs += 1
        return epochs


def estimate(
    trainings: Sequence[Training], out: Path, jobs: int, slowdown: Callable[[Config, float], float]
) -> Estimate:
    """Trains some steps of the first of each kind. `slowdown` is called with the first of all and
    the seconds of its step.

    A kind is a preset on a set of images, e.g. `original` on a folder.
    """
    kinds: dict[tuple[Any, ...], list[Training]] = {}
    for training in trainings:
        config = training.config
        kinds.setdefault((config.preset, *shared_images(config, out).values()), []).append(training)
    steps, fixed, per_epoch, longest, times = dict[str, float](), 0.0, 0.0, 0.0, 1.0
    for (name, *_), members in kinds.items():
        seconds, images = seconds_per_step(members[0].config, out, PROBE_STEPS, PROBE_SECONDS[0])
        times = times if steps else slowdown(members[0].config, seconds)
        steps[name] = round(seconds, 6)
        at_once = max(min(jobs, len(trainings)), 1)
        for member in members:
            recipe = member.config.recipe
            passes = (images[0] + FORWARD_SHARE * images[1]) / recipe.batch_size
            epoch = seconds * times * passes
            if member.target:
                fixed += epoch * recipe.epochs * TARGET_SHARE / at_once
            else:
                per_epoch += epoch / at_once
                longest = max(longest, epoch)
    torch.cuda.empty_cache()  # this process trains no more
    return Estimate(steps, round(times, 3), round(fixed, 2), round(per_epoch, 4), round(longest, 4))


def seconds_per_step(
    config: Config, out: Path, steps: int, seconds: float
) -> tuple[float, list[int]]:
    """Trains `config` for `steps` and `seconds` at least; returns the seconds of one step, and the
    number of images of the training and the validation split.

    It also compiles, once for all processes, the kernels that are compiled when they are needed.
    """
    times = [time.perf_counter()]

    def install(trainer: Trainer) -> None:
        def end_epoch(*_: Any) -> None:
            trainer.best = {"val_loss": math.inf, "epoch": None}  # nothing is saved

        def end_piece() -> None:
            times.append(time.perf_counter())
            if trainer.step >= steps and times[-1] - times[0] >= seconds:
                trainer.max_steps = trainer.step

        times[0] = time.perf_counter()
        trainer.on_epoch, trainer.on_save, trainer.save_every = end_epoch, end_piece, PROBE_EVERY

    with tempfile.TemporaryDirectory(dir=out) as folder:
        fields = shared_images(config, out) | {"out": f"{folder}/run"}
        limit = steps if not seconds else 1000 * steps
        with log_to(Path(folder) / "log.txt"):
            result = run(config.with_fields(max_steps=limit, **fields), install)
        whole = time.perf_counter() - times[0]
        about = json.loads((Path(folder) / "run" / "config.json").read_text("utf-8"))
    pieces = [after - before for before, after in itertools.pairwise(times[1:])]
    one = statistics.median(pieces) / PROBE_EVERY if pieces else whole / result["steps"]
    return one, about["data"]["images"][:2]


def minutes(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


# --- all of them


@dataclass
class Pool:
    """How many trainings run at a time, and until when; then what became of them."""

    out: Path
    jobs: int = 1
    time_limit: float = 0.0
    """Seconds after `began` at which trainings are told to stop; 0: never."""
    began: float = field(default_factory=time.monotonic)
    received: int = 0
    """The signal that ended it early."""
    failed: dict[str, str] = field(default_factory=dict)
    """Trainings that raised an error, which is no result, and its first line."""

    _executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.jobs > 1:
            # The processes are new: a fork would inherit torch's threads and CUDA's state.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.jobs, context, _start_worker)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def missing(self, trainings: Sequence[Training]) -> list[Training]:
        """Those that are not there yet. ValueError where one is there with other settings."""
        return [one for one in trainings if found(one, self.out) is None]

    def estimate(self, trainings: Sequence[Training]) -> Estimate:
        """How long `trainings` will take; prepares their images, and starts the processes."""
        self.out.mkdir(parents=True, exist_ok=True)
        for training in trainings:
            share_images(training.config, self.out)
        return estimate(trainings, self.out, self.jobs, self._slowdown)

    def _slowdown(self, config: Config, alone: float) -> float:
        """How many times as long as `alone` a step takes beside those of all other jobs."""
        if self._executor is None:
            return 1.0
        trials = [
            self._executor.submit(seconds_per_step, config, self.out, PROBE_STEPS, PROBE_SECONDS[1])
            for _ in range(self.jobs)
        ]
        return statistics.median(trial.result()[0] for trial in trials) / alone

    def seconds_left(self) -> float:
        """Until the time is over."""
        return self.began + self.time_limit - time.monotonic() if self.time_limit else math.inf

    def train(
        self, trainings: Sequence[Training], each: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Trains what is not there yet, in this order; calls `each` whenever one more is done.

        Returns how long it took, and how many are not done.
        """
        missing, began = self.missing(trainings), time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        stop = Stop(self.out / f".stop-{os.getpid()}")
        stop.clear()
        with (
            self._stopping(stop),
            progress(total=len(missing), description="training", unit="networks") as shown,
        ):
            for _ in self._work(missing, stop):
                shown.update()
                each()
        left = len(self.missing(missing))
        if left:
            reason = "stopped" if self.received else "the time is over"
            reason = f"{len(self.failed)} failed" if self.failed else reason
            print(
                f"{left} of {len(trainings)} trainings are not done ({reason}); the same command "
                "goes on with them",
                flush=True,
            )
        return {"took_seconds": round(time.monotonic() - began, 1), "not_done": left}

    @property
    def exit_code(self) -> int:
        """0, also at the end of the time; 1 where a training failed; 128 + n after signal n."""
        return 128 + self.received if self.received else int(bool(self.failed))

    def _work(self, missing: Sequence[Training], stop: Stop) -> Iterator[None]:
        """Trains; gives something back whenever one is done."""
        if self._executor is None:
            for training in missing:
                if stop.is_set():
                    return
                if self._done(training, functools.partial(train, training, self.out, stop)):
                    yield
            return
        if stop.is_set():
            return
        running = {
            self._executor.submit(_train_unless_stopped, one, self.out, stop): one
            for one in missing
        }
        for future in as_completed(running):
            if self._done(running[future], future.result):
                yield

    def _done(self, training: Training, result: Callable[[], bool]) -> bool:
        """Whether the training is done; an error costs that one, and not the others."""
        try:
            return result()
        except Exception as error:
            line = (str(error).splitlines() or [""])[0][:200]
            self.failed[training.name] = f"{type(error).__name__}: {line}"
            print(f"{training.name}: {self.failed[training.name]}", file=sys.stderr, flush=True)
            return False

    @contextlib.contextmanager
    def _stopping(self, stop: Stop) -> Iterator[None]:
        """Sets `stop` when the time is over and at Ctrl-C or SIGTERM, while the block runs."""
        timer = threading.Timer(max(min(self.seconds_left(), threading.TIMEOUT_MAX), 0), stop.set)
        timer.daemon = True
        timer.start()
        if self.seconds_left() <= 0:
            stop.set()  # the timer may need a moment

        def receive(number: int, frame: Any) -> None:
            self.received = number
            stop.set()

        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, receive)
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # so that it does not set `stop` after all
            stop.clear()
            for number, handler in before.items():
                signal.signal(number, handler)


def _start_worker() -> None:
    """Runs first in each process of the pool: a Ctrl-C reaches it by way of `stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train_unless_stopped(training: Training, out: Path, stop: Stop) -> bool:
    return not stop.is_set() and train(training, out, stop)


def threads_of(asked: int, jobs: int, device: str) -> int:
    """CPU threads of each training: the cores are shared; beside a GPU two are enough."""
    share = max(available_cores() // jobs, 1)
    return asked or (share if device == "cpu" else min(share, 2))
