"""One training behind a table: found again, resumed, watched from within, tested, reported.

A training is found again by its name and taken as it is if its settings are the same; one that was
stopped goes on where it was saved. Nothing is kept of it but its history and scores, unless it is
asked for. `training_pool.py` trains many of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plateau import RecordingLoss
from shared_images import shared_images

from alexnet_mp import preset
from alexnet_mp.config import Config
from alexnet_mp.config.arguments import EvaluateRequest, Networks
from alexnet_mp.config.files import write_atomically
from alexnet_mp.inference.evaluate import evaluate_checkpoints
from alexnet_mp.inference.finished_run import read_history
from alexnet_mp.training.run import run
from alexnet_mp.training.run_folder import RunFolder
from alexnet_mp.training.trainer import NonFiniteError, Trainer

SAVE_SECONDS = 60.0
"""Between two saves of a training, at ends of epochs; a training that is told to stop saves too."""
SERIES = ("lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "grad_norm")


@dataclass(frozen=True)
class Stop:
    """Says to all processes of a pool whether to stop: by a file, which needs no living process.

    multiprocessing's Event waits for ever where a process that waited for it has ended.
    """

    path: Path

    def is_set(self) -> bool:
        return self.path.exists()

    def set(self) -> None:
        self.path.touch()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Training:
    """One network to be trained: `name` is its folder in --out."""

    name: str
    config: Config
    ten_views: bool = False
    """Test it with ten views too."""
    target: float = 0.0
    """Training error at which it ends."""
    rivals: tuple[str, ...] = ()
    """Trainings with the same target of which only the fastest counts: it ends after as many
    epochs."""
    best_epoch: bool = False
    """Test the weights of the lowest validation loss, not the last ones."""
    record_losses: bool = False
    """Keep the loss of every step."""
    keep: bool = False
    """Keep the weights."""

    @property
    def weights_name(self) -> str:
        """The file with the weights that are tested."""
        return "best.pt" if self.best_epoch else "last.pt"

    def settings(self) -> dict[str, Any]:
        """What must be the same for a training to be this one."""
        config = self.config.to_dict()
        parts = {name: config[name] for name in ("model", "data", "recipe")}
        run = {name: config["run"][name] for name in ("seed", "precision")}
        return json.loads(json.dumps(parts | {"run": run, "target": self.target}))  # type: ignore[no-any-return]


def found(training: Training, out: Path) -> dict[str, Any] | None:
    """What a finished training in `out` came to; None if it is not there or not finished.

    Raises ValueError if its folder has one of other settings.
    """
    folder = out / training.name
    settings, scores = folder / "settings.json", folder / "scores.json"
    if settings.exists() and json.loads(settings.read_text("utf-8")) != training.settings():
        raise ValueError(
            f"--out {out}: {training.name} in it is of other settings; name another folder"
        )
    if not scores.exists():
        return None
    content: dict[str, Any] = json.loads(scores.read_text("utf-8"))
    if training.keep and not (folder / training.weights_name).exists():
        return None
    return content


def epochs_until(history: Sequence[dict[str, Any]], target: float) -> float | None:
    """Epochs to the training error `target`, to a fraction of one, or None if it was not reached.

    The error is taken to fall linearly from one epoch's to the next.
    """
    before = None
    for record in history:
        error = 1 - record["train_top1"]
        if error <= target:
            share = 1.0 if before is None else (before - target) / (before - error)
            return float(record["epoch"] - 1 + share)
        before = error
    return None


# --- one training


def train(training: Training, out: Path, stop: Stop) -> bool:
    """Trains, or goes on, and tests. Returns False if it was told to stop before the end.

    What is printed goes to log.txt in its folder.
    """
    folder = out / training.name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "settings.json", json.dumps(training.settings()) + "\n")
    last = folder / "last.pt"
    config = training.config.with_fields(
        out=str(folder),
        resume=str(last) if last.exists() else "",
        **shared_images(training.config, out),
    )
    watch = Watch(training, out, stop)
    with log_to(folder / "log.txt"):
        try:
            with watch:
                result = run(config, watch.install)
            if result.get("stopped"):
                return False
            scores = _scores(training, folder, result) | {"end": watch.end}
        except NonFiniteError as error:  # a rate that is too high for one of a pair is an answer
            scores = {"end": "diverged", "reason": str(error)}
    write_atomically(folder / "scores.json", json.dumps(scores) + "\n")
    if not training.keep:
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    return True


def _scores(training: Training, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Accuracies on the test images, of the weights that the training says."""
    scores = {"one_view": {name: result[name] for name in ("top1", "top5")}}
    if training.ten_views:
        config = training.config
        scores["ten_views"] = evaluated([folder / training.weights_name], config, ten_views=True)
    return scores | {name: result[name] for name in ("epochs", "steps", "seconds", "device")}


def evaluated(files: Sequence[Path], config: Config, ten_views: bool) -> dict[str, float]:
    """Top-1 and top-5 accuracy on the test images of the average of the networks in `files`."""
    machine = {name: getattr(config.run, name) for name in ("device", "threads")}
    networks = Networks(checkpoint=tuple(map(str, files)), ten_crop=ten_views, **machine)
    result = evaluate_checkpoints(EvaluateRequest(networks, limit_test=config.data.limit_test))
    return {name: result[name] for name in ("top1", "top5")}


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


class Watch:
    """Looks at a training from within: when it ends, when it is saved, and whether it is to stop.

    Used as a context manager around the training, which ends its thread.
    """

    def __init__(self, training: Training, out: Path, stop: Stop) -> None:
        self.training, self.out, self.stop = training, out, stop
        self.folder = out / training.name
        self.end = "finished"
        self.trainer: Any = None
        self._over = threading.Event()
        self._saved = time.monotonic()
        self._losses = self.folder / "losses.json"

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._write_losses()

    def install(self, trainer: Trainer) -> None:
        """Called with the trainer before the first step."""
        self.trainer = trainer
        self._save, trainer.on_epoch = trainer.on_epoch, self._end_epoch
        if self.training.record_losses:
            there = trainer.step and self._losses.exists()
            before = json.loads(self._losses.read_text("utf-8")) if there else []
            trainer.criterion = RecordingLoss(before[: trainer.step]).to(trainer.device)
        trainer.stop_requested = self.stop.is_set()
        threading.Thread(target=self._wait, name="stop", daemon=True).start()

    def _write_losses(self) -> None:
        if self.training.record_losses and self.trainer is not None:
            losses = self.trainer.criterion.losses()[: self.trainer.step]
            write_atomically(self._losses, json.dumps([round(loss, 5) for loss in losses]) + "\n")

    def _wait(self) -> None:
        while not self._over.wait(0.2):
            if self.stop.is_set():
                self.trainer.stop_requested = True
                return

    def _end_epoch(self, record: dict[str, Any], improved: bool) -> None:
        trainer, training = self.trainer, self.training
        self.end = self._reason(record)
        if self.end != "finished":
            trainer.max_steps = trainer.step  # so it ends here, as if that had been the plan
        if training.best_epoch:
            self._save(record, improved)
            return
        trainer.best = {"val_loss": math.inf, "epoch": None}  # the last weights are tested
        last = trainer.epoch == training.config.recipe.epochs or self.end != "finished"
        due = time.monotonic() - self._saved > SAVE_SECONDS
        if (training.ten_views or training.keep) if last else (due or trainer.stop_requested):
            self._write_losses()  # before the weights: a run that goes on needs all until then
            self._save(record, False)
            self._saved = time.monotonic()
        else:
            RunFolder(self.folder).write_history(trainer.history)

    def _reason(self, record: dict[str, Any]) -> str:
        """Why the training ends after this epoch: the target is reached, or a rival was faster."""
        if not self.training.target:
            return "finished"
        if 1 - record["train_top1"] <= self.training.target:
            return "target"
        for name in self.training.rivals:
            scores = self.out / name / "scores.json"
            if scores.exists():
                rival = json.loads(scores.read_text("utf-8"))
                if rival["end"] == "target" and rival["epochs"] <= record["epoch"]:
                    return "outrun"
        return "finished"


# --- what is left of it


def report(training: Training, out: Path) -> dict[str, Any]:
    """All about one finished training, small enough to be kept."""
    history = read_history(out / training.name)
    return {
        "preset": training.config.preset,
        "differs": differences(training.config),
        **(found(training, out) or {}),
        "history": {name: [float(f"{record[name]:.5g}") for record in history] for name in SERIES},
    }


def differences(config: Config) -> dict[str, Any]:
    """The fields in which `config` differs from its preset; where it runs is none of them."""
    mine, base = config.to_dict(), preset(config.preset).to_dict()
    places = ("data_dir", "device", "threads", "out")
    return {
        name: value
        for part in ("model", "data", "recipe", "run")
        for name, value in mine[part].items()
        if value != base[part][name] and name not in places
    }
