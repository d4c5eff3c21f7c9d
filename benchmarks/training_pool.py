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

PROBE_STEPS, PROBE_EVERY = 24, 4
"""Steps of the trial that the estimate of the time comes from, and of a piece of it."""
FORWARD_SHARE = 1 / 3  # of a training step's time, which a validation batch takes


def seconds_per_step(config: Config, out: Path) -> tuple[float, list[int]]:
    """Trains a few steps of `config`; returns the seconds of one, and the number of images of the
    training and the validation split.

    It also compiles, once for all processes, the kernels that are compiled when they are needed.
    """
    times = []

    def install(trainer: Trainer) -> None:
        def end_epoch(*_: Any) -> None:
            trainer.best = {"val_loss": math.inf, "epoch": None}  # nothing is saved

        trainer.on_epoch, trainer.save_every = end_epoch, PROBE_EVERY
        trainer.on_save = lambda: times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=out) as folder:
        fields = shared_images(config, out) | {"max_steps": PROBE_STEPS, "out": f"{folder}/run"}
        with log_to(Path(folder) / "log.txt"):
            began = time.perf_counter()
            result = run(config.with_fields(**fields), install)
            whole = time.perf_counter() - began
        about = json.loads((Path(folder) / "run" / "config.json").read_text("utf-8"))
    torch.cuda.empty_cache()  # this process trains no more
    pieces = [after - before for before, after in itertools.pairwise(times)]
    seconds = statistics.median(pieces) / PROBE_EVERY if pieces else whole / result["steps"]
    return seconds, about["data"]["images"][:2]


def estimate(trainings: Sequence[Training], out: Path, jobs: int) -> dict[str, Any]:
    """How long `trainings` will take, from a few steps of the first of each kind of network.

    A kind is a network on a set of images, e.g. `original` on a folder.
    """
    kinds: dict[tuple[Any, ...], list[Training]] = {}
    for training in trainings:
        config = training.config
        kinds.setdefault((config.preset, *shared_images(config, out).values()), []).append(training)
    steps, total = {}, 0.0
    for (name, *_), members in kinds.items():
        seconds, images = seconds_per_step(members[0].config, out)
        steps[name] = round(seconds, 6)
        for member in members:
            recipe = member.config.recipe
            passes = images[0] + FORWARD_SHARE * images[1]
            total += seconds * recipe.epochs * passes / recipe.batch_size
    return {
        "trainings": len(trainings),
        "seconds_per_step": steps,
        "seconds": round(total / max(min(jobs, len(trainings)), 1), 1),
        "jobs": jobs,
    }


def estimate_line(about: dict[str, Any]) -> str:
    """The estimate for people."""
    steps = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in about["seconds_per_step"].items())
    minutes, seconds = divmod(round(about["seconds"]), 60)
    return (
        f"{about['trainings']} trainings, {about['jobs']} at a time: {minutes // 60}:"
        f"{minutes % 60:02}:{seconds:02} at most, if they do not slow each other down "
        f"(a step: {steps})"
    )


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

    def train(
        self, trainings: Sequence[Training], each: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Trains what is not there yet, in this order; calls `each` whenever one more is done.

        Returns the estimate of the time and the time that it took.
        """
        missing = [one for one in trainings if found(one, self.out) is None]
        there = len(trainings) - len(missing)
        print(f"{len(trainings)} trainings, {there} of them found in {self.out}", flush=True)
        if not missing:
            return {}
        self.out.mkdir(parents=True, exist_ok=True)
        for training in missing:
            share_images(training.config, self.out)
        about = estimate(missing, self.out, self.jobs)
        print(estimate_line(about), flush=True)
        began = time.monotonic()
        stop = Stop(self.out / f".stop-{os.getpid()}")
        stop.clear()
        with (
            self._stopping(stop),
            progress(total=len(missing), description="training", unit="networks") as shown,
        ):
            for _ in self._work(missing, stop):
                shown.update()
                each()
        left = sum(found(one, self.out) is None for one in missing)
        if left:
            reason = "stopped" if self.received else "the time is over"
            reason = f"{len(self.failed)} failed" if self.failed else reason
            print(
                f"{left} of {len(trainings)} trainings are not done ({reason}); the same command "
                "goes on with them",
                flush=True,
            )
        return about | {"took_seconds": round(time.monotonic() - began, 1), "not_done": left}

    @property
    def exit_code(self) -> int:
        """0, also at the end of the time; 1 where a training failed; 128 + n after signal n."""
        return 128 + self.received if self.received else int(bool(self.failed))

    def _work(self, missing: Sequence[Training], stop: Stop) -> Iterator[None]:
        """Trains; gives something back whenever one is done."""
        if self.jobs == 1:
            for training in missing:
                if stop.is_set():
                    return
                if self._done(training, functools.partial(train, training, self.out, stop)):
                    yield
            return
        if stop.is_set():
            return
        jobs = min(self.jobs, len(missing))
        # The processes are new: a fork would inherit torch's threads and CUDA's state.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _start_worker) as executor:
            running = {
                executor.submit(_train_unless_stopped, one, self.out, stop): one for one in missing
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
        timer = threading.Timer(max(self.began + self.time_limit - time.monotonic(), 0), stop.set)
        timer.daemon = True
        if self.time_limit:
            timer.start()

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
