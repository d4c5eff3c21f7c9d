"""One whole training run: from a configuration to the files in its folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet_mp.config import Config, check
from alexnet_mp.config.files import remove_leftovers, write_atomically
from alexnet_mp.config.folder_lock import LOCK_NAME, FolderLock
from alexnet_mp.data import build_loaders, load
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.ops.allocator import keep_freed_memory
from alexnet_mp.ops.compile import compile_network
from alexnet_mp.ops.response_norm import slow_norm
from alexnet_mp.parallel.context import ParallelContext, describe, init_parallel
from alexnet_mp.parallel.exchange import EVALUATION, TRAINING
from alexnet_mp.parallel.rendezvous import restarts
from alexnet_mp.training import checkpoint
from alexnet_mp.training.input_checks import check_alike
from alexnet_mp.training.profiler import Profiler
from alexnet_mp.training.schedule import EarlyStopping, build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.trainer import NonFiniteError, Stopped, Trainer


def run(config: Config, install_signals: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """Trains as `config` says and returns what result.json holds, or {"stopped": True, ...}. Every rank calls it.

    `install_signals` is handed the trainer, whose `stop_requested` a signal handler may set.

    Raises ValueError or OSError (one line, naming the flag, file or rank) for what a user can mend, NonFiniteError for a
    diverged run, with last.pt from before the step.
    """
    context = init_parallel(config)
    one = Run(config, context)
    try:
        result = one.train_and_test(install_signals)
    finally:
        one.lock.release()
    context.close()  # not after an error: closing would reach the peers before the cause does, as "connection lost"
    return result


LOOP = {
    "epoch": int,
    "step": int,
    "batch": int,
    "history": list,
    "best": dict,
    "schedule": dict,
    "loss_scale": dict,
    "tally": dict,
}


def restore(content: dict[str, Any], model: AlexNet, trainer: Trainer, source: str | Path) -> None:
    """Sets `trainer`, and its `model`, to where the checkpoint `content` was written. ValueError names `source` and what does not fit."""
    loop = content["loop"]
    wrong = [
        name
        for name, kind in LOOP.items()
        if type(loop.get(name)) is not kind or (kind is int and loop[name] < 0)
    ]
    if wrong or not all(isinstance(record, dict) for record in loop["history"]):
        raise ValueError(
            f"{source}: the state of the loop in it cannot be continued ({', '.join(wrong) or 'history'})"
        )
    checkpoint.load_model(content, model, source)
    checkpoint.load_velocity(content, model, trainer.optimizer, source)
    try:
        trainer.load_state_dict(loop)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(
            f"{source}: the state of the loop in it cannot be continued ({reason})"
        ) from None


class Run:
    """The pieces of a run on this rank, and the files of its folder, which the main rank writes."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.context = context
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.print_rank0(self._introduction(config))
        context.status = "loading the images"
        kind = context.device.type
        check(
            kind == "cuda" or not config.run.cuda_graphs,
            f"--cuda-graphs: {kind} has none; leave the flag out, or give --compile instead",
        )
        if kind == "cpu":
            keep_freed_memory()
        if config.model.lrn and (slow := slow_norm(kind)):
            self.print_rank0(f"note: {slow}")
        splits = load(
            config.data,
            config.run.seed,
            context.run_once_per_host,
            context.is_rank0,
            config.data.resized_side(config.model.image_size),
        )
        self.config = config = config.with_fields(
            classes=config.model.classes or len(splits.train.classes)
        )
        self.train_loader, self.val_loader, self.test_loader, self.augment = build_loaders(
            config,
            splits,
            data_rank=context.data_rank,
            data_ranks=context.data_ranks,
            device=context.device,
        )
        self.data = {
            "classes": list(splits.train.classes),
            "images": [len(splits.train), len(splits.val), len(splits.test)],
        }
        check_alike(context, splits)
        self.print_rank0(
            f"{config.data.data}: {len(self.data['classes'])} classes; {' / '.join(f'{n:,}' for n in self.data['images'])} images "
            "to train / validate / test"
        )
        self.model = context.build_model(config.model, config.run.seed)
        if config.run.compile or config.run.cuda_graphs:
            compile_network(self.model, config.run.cuda_graphs)
        optimizer = build_optimizer(self.model, config.recipe)
        self.trainer = Trainer(
            self.model,
            nn.CrossEntropyLoss(reduction="sum"),
            optimizer,
            context.device,
            patience=0,
            schedule=build_schedule(optimizer, config.recipe),
            early_stopping=EarlyStopping(config.recipe.patience, delta=config.recipe.delta)
            if config.recipe.patience
            else None,
            context=context,
            precision=config.run.precision,
            seed=config.run.seed,
            max_steps=config.recipe.max_steps,
            on_epoch=self._save,
            on_save=self._save,
            save_every=config.run.save_every,
            restore_best_weights=False,  # they are in best.pt
            command_line=True,
        )
        self.profiler = Profiler(optimizer, context) if config.run.profile else None
        if self.profiler:
            self.train_loader = self.profiler.watching(self.train_loader)
        self.out = Path(
            config.run.out or f"runs/{config.preset}-{config.data.data}-{self._start_time()}"
        )
        self.lock = FolderLock(self.out)

    def train_and_test(
        self, install_signals: Callable[[Trainer], None] | None = None
    ) -> dict[str, Any]:
        """Trains, then tests the best weights, once, on images that no decision was made on."""
        self._open_folder()
        trainer, recipe = self.trainer, self.config.recipe
        if self.config.run.resume:
            self._resume()
        self.context.run_on_rank0(self._write_history)
        if install_signals:
            install_signals(trainer)
        try:
            trainer.train(
                self.train_loader,
                self.val_loader,
                max(recipe.epochs - trainer.epoch, 0) if not trainer.out_of_steps else 0,
            )
        except NonFiniteError:
            self._save()
            raise
        if trainer.batch or not trainer.history:
            self._save()  # within an epoch: the epochs before it have been saved as they ended
        if self.profiler:
            self.print_rank0(self.profiler.report(self.out))
        try:
            if trainer.stopping:
                raise Stopped
            return self._finish()
        except Stopped:
            self.print_rank0(
                f"stopped at step {trainer.step}, saved; continue with the same command and --out {self.out} --resume"
            )
            return {"stopped": True, "out": str(self.out)}

    def print_rank0(self, text: str) -> None:
        """Prints on the main rank."""
        if self.context.is_rank0:
            print(text, flush=True)

    def _introduction(self, config: Config) -> str:
        place, model = self.context, config.model
        where = f"{place.world_size} rank{'s' * (place.world_size > 1)} on {place.device.type}"
        if place.world_size > 1:
            where += f" through {place.backend}: {place.column_ranks} to a network, {place.data_ranks} network{'s' * (place.data_ranks > 1)}"
        return (
            f"alexnet_mp: preset {config.preset}, {model.columns} column{'s' * (model.columns > 1)} at {model.image_size} px, {where}, "
            f"{place.threads} thread{'s' * (place.threads > 1)} each, {config.run.precision}, seed {config.run.seed}"
        )

    def _start_time(self) -> str:
        """One name for all ranks, which do not start at the same second."""
        return self.context.gather(time.strftime("%Y%m%d-%H%M%S"))[0]

    def _open_folder(self) -> None:
        """Makes the folder and writes config.json; ValueError on all ranks where that cannot be or would overwrite another run."""

        def work() -> None:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock.take()
                remove_leftovers(self.out)
                if not self.config.run.resume and (self.out / "last.pt").exists():
                    raise OSError(
                        "holds another run's last.pt; continue that one with --resume, or name another folder"
                    )
                self._write(
                    "config.json",
                    {
                        "config": self.config.to_dict(),
                        "environment": describe(self.context),
                        "data": self.data,
                    },
                )
            except OSError as error:
                raise ValueError(f"--out {self.out}: {error.strerror or error}") from None

        self.context.run_on_rank0(work)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.out / name, json.dumps(content, indent=1) + "\n")

    def _resume(self) -> None:
        path = self.config.run.resume
        content = checkpoint.read(path)
        if {name: content["data"][name] for name in self.data} != self.data:
            raise ValueError(
                f"--data-dir {self.config.data.data_dir}: {path} was trained on other data, {content['data']['images']} images of "
                f"{len(content['data']['classes'])} classes, not {self.data['images']} of {len(self.data['classes'])}"
            )
        restore(content, self.model, self.trainer, path)
        self._bring_best(Path(path))
        self._bring_epoch(Path(path))
        again = f"started again by torchrun ({restarts()}): " if restarts() else ""
        self.print_rank0(
            f"{again}resumed from {path}: {self.trainer.epoch} epochs and {self.trainer.batch} steps done"
        )

    def _bring_best(self, path: Path) -> None:
        """Sees to it that this run's folder has the best weights so far, which need not be in `path`, the checkpoint that was resumed.

        A kill between last.pt and best.pt leaves them in last.pt; whoever goes back to an older epoch may have them in that epoch's file.
        """
        epoch, best = self.trainer.best["epoch"], self.out / "best.pt"

        def work() -> None:
            reasons = []
            for source in (
                best,
                path,
                path.with_name("best.pt"),
                path.with_name(f"epoch-{epoch:04}.pt"),
            ):
                try:
                    loop = checkpoint.read(source)["loop"]
                    if (loop["epoch"], loop["batch"]) == (epoch, 0):
                        if source != best:
                            checkpoint.link_atomically(source, best)
                        return
                except (OSError, ValueError) as error:
                    reasons.append(str(error))
            raise ValueError(
                f"--resume: the best weights so far, of epoch {epoch}, should be beside the checkpoint as best.pt"
                + (f" ({reasons[0]})" if reasons else "")
            )

        if epoch is not None:
            self.context.run_on_rank0(work)

    def _bring_epoch(self, path: Path) -> None:
        """The file of the epoch that `path` ends, should a kill have come between the two."""
        trainer, keep = self.trainer, self.config.run.keep_checkpoints
        if keep and trainer.epoch and not trainer.batch and path.parent == self.out:
            self.context.run_on_rank0(
                lambda: checkpoint.link_and_prune(
                    path, (self.out / f"epoch-{trainer.epoch:04}.pt",), keep
                )
            )

    def _save(self, record: dict[str, Any] | None = None, improved: bool = False) -> None:
        """last.pt as things stand; with the `record` of an epoch that has ended, its other files too."""
        trainer, statistics, keep = (
            self.trainer,
            self.augment.statistics,
            self.config.run.keep_checkpoints,
        )
        self.context.status = f"saving after step {trainer.step}"
        if self.context.is_rank0 and not self.out.is_dir():
            self.print_rank0(
                f"{self.out} has vanished and is made again; what it held is lost, best.pt too"
            )
        data = self.data | {"statistics": vars(statistics) if statistics else None}
        links = [self.out / "best.pt"] * improved + [
            self.out / f"epoch-{trainer.epoch:04}.pt"
        ] * bool(record and keep)
        checkpoint.save(
            self.out / "last.pt",
            self.context,
            self.model,
            trainer.optimizer,
            self.config,
            trainer.state_dict(),
            data,
            links=tuple(links),
            keep=keep,
        )
        self.context.run_on_rank0(self._write_history)

    def _write_history(self) -> None:
        write_atomically(
            self.out / "history.jsonl",
            "".join(json.dumps(record) + "\n" for record in self.trainer.history),
        )

    def _finish(self) -> dict[str, Any]:
        trainer, place = self.trainer, self.context
        best = self.out / "best.pt"
        if trainer.best["epoch"] is not None:
            checkpoint.load_model(checkpoint.read(best), self.model, best)
        scores = trainer.scores(self.test_loader)
        total_seconds = sum(record["seconds"] for record in trainer.history)
        result = {
            "test_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "best_epoch": trainer.best["epoch"],
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "seconds": round(total_seconds, 3),
            "images_per_second": trainer.history[-1]["images_per_second"]
            if trainer.history
            else None,
            "ranks": place.world_size,
            "device": str(place.device),
            "precision": self.config.run.precision,
            "exchange": self._exchange(),
        }
        place.run_on_rank0(lambda: self._write("result.json", result))
        if place.is_rank0:
            place.status = "drawing the curves"
            self._draw_curves()
        top5 = (
            f", top-{min(5, self.config.model.classes)} {scores.top5:.2%}"
            if self.config.model.classes > 2
            else ""
        )
        self.print_rank0(
            f"test: loss {scores.loss:.4f}, accuracy {scores.top1:.2%}{top5} "
            f"({scores.images:,} images, weights of {'epoch ' + str(trainer.best['epoch']) if trainer.best['epoch'] else 'the last step'})"
        )
        self.print_rank0(
            f"files in {self.out}: "
            + "  ".join(sorted(path.name for path in self.out.iterdir() if path.name != LOCK_NAME))
        )
        return result

    def _exchange(self) -> dict[str, Any]:
        """What the meter saw on this rank (every rank of a copy sends the same amounts)."""
        meter, seen = self.context.meter, self.trainer.images_seen
        if self.context.column_ranks == 1:
            return {"values_per_image": {}, "values_per_image_backward": {}, "bytes_per_step": 0}
        phase, images = (
            (TRAINING, seen // self.context.data_ranks)
            if seen
            else (EVALUATION, self.test_loader.images)
        )
        per_image = {
            direction: {
                name: meter.total_values(name, direction, phase) / images
                for name in self.config.model.crossings
            }
            for direction in ("forward", "backward")
        }
        whole = {
            direction: {name: int(n) if n == int(n) else n for name, n in values.items()}
            for direction, values in per_image.items()
        }
        return {
            "values_per_image": whole["forward"],
            "values_per_image_backward": whole["backward"],
            "bytes_per_step": self.trainer.largest_step_bytes,
        }

    def _draw_curves(self) -> None:
        if not self.trainer.history:
            return
        try:
            from alexnet_mp.plotting.curves import draw_curves

            classes = len(self.data["classes"])
            draw_curves(self.trainer.history, self.out / "curves.png", 1, classes)
        except Exception as error:  # of any kind, matplotlib's import too: a picture must not cost the run its result
            self.print_rank0(f"curves.png could not be drawn: {error}")
