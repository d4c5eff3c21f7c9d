"""One whole training run: prepare, restore, train, test, write the files of its folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet_mp.config import Config, check
from alexnet_mp.config.rate_scaling import described_rates, scaled_recipe, scaling_note
from alexnet_mp.data import build_loaders, load
from alexnet_mp.ops.allocator import keep_freed_memory
from alexnet_mp.ops.compile import compile_network
from alexnet_mp.ops.response_norm import slow_norm
from alexnet_mp.parallel.context import ParallelContext, describe, init_parallel, note_on_hosts
from alexnet_mp.parallel.launcher import restarts
from alexnet_mp.parallel.rendezvous import Meeting, code_version
from alexnet_mp.training import checkpoint, run_messages
from alexnet_mp.training.fine_tuning import freeze, initialize_from
from alexnet_mp.training.input_checks import check_alike
from alexnet_mp.training.metrics import Scores
from alexnet_mp.training.profiler import Profiler
from alexnet_mp.training.run_folder import RunFolder
from alexnet_mp.training.schedule import EarlyStopping, build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.step_sync import NonFiniteError, Stopped
from alexnet_mp.training.tensorboard import TensorBoard, require_tensorboard
from alexnet_mp.training.trainer import Trainer


def run(
    config: Config,
    install_signals: Callable[[Trainer], None] | None = None,
    meeting: Meeting | None = None,
) -> dict[str, Any]:
    """Trains as `config` says. Every rank calls it, with the `meeting` if the ranks have met.

    Returns the content of result.json, or {"stopped": True, "out": folder} for a run that was asked
    to stop before its end. `install_signals` is called with the trainer before the first step; a
    signal handler may set its `stop_requested`.

    Raises ValueError or OSError (one line, naming the flag, file or rank) for what a user can mend,
    NonFiniteError for a run that diverged; last.pt then has the weights from before that step.
    """
    context = init_parallel(config, meeting)
    one = Run(config, context)
    try:
        result = one.train_and_test(install_signals)
    finally:
        one.folder.release()
        if one.tensorboard:
            one.tensorboard.close()
    # Not after an error: closing would reach the peers before the cause does, as "connection lost".
    context.close()
    return result


class Run:
    """A run on this rank. The constructor prepares data, network and trainer."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.context = context
        self.print_rank0(run_messages.introduction(config, context))
        if note := note_on_hosts(context):
            self.print_rank0(note)
        self._check_settings(config)
        self._prepare_device(config)
        self._load_images(config)
        self._build_trainer()
        self.folder = RunFolder(self._folder_path())

    def train_and_test(
        self, install_signals: Callable[[Trainer], None] | None = None
    ) -> dict[str, Any]:
        """Trains, then tests the best weights once, on images that no decision was based on."""
        self._open_folder()
        if self.config.run.resume:
            self._restore(Path(self.config.run.resume))
        self._write_history()
        self._open_tensorboard()
        if install_signals:
            install_signals(self.trainer)
        try:
            self._train()
            return self._write_result(self._test())
        except Stopped:
            self.print_rank0(run_messages.stopped(self.trainer, self.folder.path))
            return {"stopped": True, "out": str(self.folder.path)}

    def print_rank0(self, text: str) -> None:
        """Prints on rank 0 only. A screen that is gone does not end the run."""
        if self.context.is_rank0:
            with contextlib.suppress(OSError):
                print(text, flush=True)

    # --- prepare

    def _check_settings(self, config: Config) -> None:
        """ValueError where a setting does not fit the device or the number of ranks."""
        kind, ranks = self.context.device.type, self.context.data_ranks
        check(
            kind == "cuda" or not config.run.cuda_graphs,
            f"--cuda-graphs: {kind} has none; leave the flag out, or give --compile instead",
        )
        parts, share = config.run.accumulate, config.recipe.batch_size // ranks
        of_ranks = f", {share} for each of {ranks} data ranks," if ranks > 1 else ""
        check(
            parts <= max(share, 1),
            f"--accumulate {parts}: a batch of {config.recipe.batch_size} images{of_ranks} has "
            f"at most {max(share, 1)} parts that are not empty; raise --batch-size",
        )

    def _prepare_device(self, config: Config) -> None:
        kind = self.context.device.type
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if kind == "cpu":
            keep_freed_memory()
        if config.model.lrn and (slow := slow_norm(kind)):
            self.print_rank0(f"note: {slow}")

    def _load_images(self, config: Config) -> None:
        context, context.status = self.context, "loading the images"
        splits = load(
            config.data,
            config.run.seed,
            context.run_once_per_host,
            context.is_rank0,
            config.data.resized_side(config.model.image_size),
        )
        classes = list(splits.train.classes)
        self.config = config.with_fields(classes=config.model.classes or len(classes))
        train_loader, self.val_loader, self.test_loader, self.augment = build_loaders(
            self.config,
            splits,
            data_rank=context.data_rank,
            data_ranks=context.data_ranks,
            device=context.device,
        )
        self.train_loader: Any = train_loader  # or the profiler's view of it
        images = [len(splits.train), len(splits.val), len(splits.test)]
        self.data: dict[str, Any] = {"classes": classes, "images": images}
        self.validation = splits.validation
        check_alike(context, splits)
        self.print_rank0(
            f"{config.data.data}: {len(classes)} classes; "
            f"{' / '.join(f'{n:,}' for n in images)} images to train / validate / test"
        )

    def _build_trainer(self) -> None:
        context, config = self.context, self.config
        recipe, settings = scaled_recipe(config), config.run
        self.model = context.build_model(config.model, settings.seed)
        for line in run_messages.ranks(context, self.model, recipe.batch_size, settings.accumulate):
            self.print_rank0(line)
        if note := scaling_note(config):
            self.print_rank0(note)
        if recipe.init_from and not settings.resume:
            for line in initialize_from(self.model, recipe.init_from, config, recipe.reset):
                self.print_rank0(line)
        freeze(self.model, recipe.freeze, config)
        if settings.compile or settings.cuda_graphs:
            compile_network(self.model, settings.cuda_graphs)
        optimizer = build_optimizer(self.model, recipe)
        stopping = EarlyStopping(recipe.patience, delta=recipe.delta) if recipe.patience else None
        self.trainer = Trainer(
            self.model,
            nn.CrossEntropyLoss(reduction="sum"),
            optimizer,
            context.device,
            patience=0,
            schedule=build_schedule(optimizer, recipe),
            early_stopping=stopping,
            context=context,
            precision=settings.precision,
            seed=settings.seed,
            accumulate=settings.accumulate,
            max_steps=recipe.max_steps,
            on_epoch=self._save,
            on_save=self._save,
            save_every=settings.save_every,
            restore_best_weights=False,  # they are in best.pt
            command_line=True,
        )
        self.tensorboard: TensorBoard | None = None
        if settings.tensorboard:
            context.run_on_rank0(require_tensorboard)
        self.profiler = (
            Profiler(optimizer, context, self.trainer.replica) if settings.profile else None
        )
        if self.profiler:
            self.train_loader = self.profiler.watching(self.train_loader)

    def _folder_path(self) -> Path:
        """--out, or a name with rank 0's time: ranks do not start in the same second."""
        config = self.config
        now = self.context.gather(time.strftime("%Y%m%d-%H%M%S"))[0]
        return Path(config.run.out or f"runs/{config.preset}-{config.data.data}-{now}")

    def _open_folder(self) -> None:
        import alexnet_mp  # its own version; when this module is imported, it is not complete yet

        version = {"alexnet_mp": alexnet_mp.__version__, "code": code_version()}
        content = {
            "config": self.config.to_dict(),
            "rates": described_rates(self.config),
            "environment": version | describe(self.context),
            "data": self.data,
        }
        self.context.run_on_rank0(lambda: self.folder.open(content, bool(self.config.run.resume)))

    def _open_tensorboard(self) -> None:
        if not self.config.run.tensorboard:
            return
        trainer, folder = self.trainer, self.folder.path / "tensorboard"
        board = self.tensorboard = TensorBoard(folder, self.context, trainer.step)
        trainer.on_step = lambda step: board.record_step(step, trainer.loss_scale.scale)

    # --- restore

    def _restore(self, path: Path) -> None:
        """Continues from the checkpoint `path`, and gives the folder what it lacks of it."""
        content = checkpoint.read_for_all(path, self.context, self.model.state_dict().keys())
        if {name: content["data"][name] for name in self.data} != self.data:
            raise ValueError(
                f"--data-dir {self.config.data.data_dir}: {path} was trained on other data, "
                f"{content['data']['images']} images of {len(content['data']['classes'])} classes, "
                f"not {self.data['images']} of {len(self.data['classes'])}"
            )
        trainer = self.trainer
        checkpoint.restore(content, self.model, trainer, path)
        best_epoch = trainer.best["epoch"]
        if best_epoch is not None:
            self.context.run_on_rank0(
                lambda: checkpoint.link_best(self.folder.best, best_epoch, path)
            )
        keep = self.config.run.keep_checkpoints
        if keep and trainer.epoch and not trainer.batch and path.parent == self.folder.path:
            # A kill may have come between last.pt and the epoch's own file.
            links = (self.folder.epoch_checkpoint(trainer.epoch),)
            self.context.run_on_rank0(lambda: checkpoint.link_and_prune(path, links, keep))
        again = f"started again by torchrun ({restarts()}): " if restarts() else ""
        self.print_rank0(
            f"{again}resumed from {path}: {trainer.epoch} epochs and {trainer.batch} steps done"
        )
        before = Config.from_dict(content["config"]).recipe
        if note := run_messages.stretched(trainer, self.config.recipe, before, self.train_loader):
            self.print_rank0(note)

    # --- train

    def _train(self) -> None:
        """Trains to the end of the last epoch or step, or raises Stopped."""
        trainer = self.trainer
        epochs = 0 if trainer.out_of_steps else self.config.recipe.epochs - trainer.epoch
        try:
            trainer.train(self.train_loader, self.val_loader, max(epochs, 0))
        except NonFiniteError:
            self._save()
            raise
        if trainer.batch or not trainer.history:
            self._save()  # within an epoch: the epochs before it were saved as they ended
        if self.profiler:
            self.print_rank0(self.profiler.report(self.folder.path, self.config.recipe.batch_size))
        if trainer.stopping:
            raise Stopped

    def _save(self, record: dict[str, Any] | None = None, improved: bool = False) -> None:
        """Saves last.pt; with the `record` of an epoch that has ended, its other names too."""
        trainer, folder, keep = self.trainer, self.folder, self.config.run.keep_checkpoints
        statistics = self.augment.statistics
        self.context.status = f"saving after step {trainer.step}"
        if self.context.is_rank0 and not folder.path.is_dir():
            self.print_rank0(
                f"{folder.path} has vanished and is made again; its files are lost, best.pt too"
            )
        links = [folder.best] if improved else []
        if record and keep:
            links.append(folder.epoch_checkpoint(trainer.epoch))
        checkpoint.save(
            folder.last,
            self.context,
            self.model,
            trainer.optimizer,
            self.config,
            trainer.state_dict(),
            self.data | {"statistics": vars(statistics) if statistics else None},
            links=tuple(links),
            keep=keep,
        )
        self._write_history()
        if record and self.tensorboard:
            self.tensorboard.record_epoch(record, self.model)

    def _write_history(self) -> None:
        self.context.run_on_rank0(lambda: self.folder.write_history(self.trainer.history))

    # --- test and write

    def _test(self) -> Scores:
        """Scores of the best weights, or before the first epoch ends of the current ones."""
        if self.trainer.best["epoch"] is not None:
            self._load_best_weights()
        return self.trainer.scores(self.test_loader, "test")

    def _load_best_weights(self) -> None:
        best = self.folder.best
        names = self.model.state_dict().keys()
        checkpoint.load_model(
            checkpoint.read_for_all(best, self.context, names, ("model",)), self.model, best
        )

    def _write_result(self, scores: Scores) -> dict[str, Any]:
        """Writes result.json and curves.png; returns the content of result.json."""
        trainer, context, folder = self.trainer, self.context, self.folder
        history = trainer.history
        result = {
            "test_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "best_epoch": trainer.best["epoch"],
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "seconds": round(sum(record["seconds"] for record in history), 3),
            "images_per_second": history[-1]["images_per_second"] if history else None,
            "ranks": context.world_size,
            "device": str(context.device),
            "precision": self.config.run.precision,
            "validation": self.validation,
            "exchange": run_messages.exchange(
                context, trainer, self.config.model.exchanges, self.test_loader.images
            ),
        }
        context.run_on_rank0(lambda: folder.write_result(result))
        if context.is_rank0:
            context.status = "drawing the curves"
            if history and (failure := folder.draw_curves(history, len(self.data["classes"]))):
                self.print_rank0(failure)
            logits = self.config.model.classes
            best_epoch = trainer.best["epoch"]
            self.print_rank0(run_messages.scores(scores, best_epoch, logits, self.validation))
            self.print_rank0(f"files in {folder.path}: {'  '.join(folder.file_names())}")
        return result
