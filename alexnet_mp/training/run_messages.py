"""The lines that a run prints about itself, and the figures of its exchange."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from torch import nn

from alexnet_mp.config import Config, RecipeConfig
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.meter import EVALUATION, TRAINING
from alexnet_mp.training.metrics import Scores
from alexnet_mp.training.trainer import Trainer


def introduction(config: Config, context: ParallelContext) -> str:
    """The first line: preset, columns, ranks and arithmetic."""
    model, ranks, copies = config.model, context.world_size, context.data_ranks
    where = f"{ranks} rank{'s' * (ranks > 1)} on {context.device.type}"
    if ranks > 1:
        several = f"{copies} copies" if copies > 1 else "1 copy"
        where += f" through {context.backend}, {several} of the network"
    return (
        f"alexnet_mp: preset {config.preset}, {model.columns} column{'s' * (model.columns > 1)} "
        f"at {model.image_size} px, {where}, "
        f"{context.threads} thread{'s' * (context.threads > 1)} each, {config.run.precision}, "
        f"seed {config.run.seed}"
    )


def ranks(context: ParallelContext, model: nn.Module, batch_size: int, parts: int = 1) -> list[str]:
    """A line for each kind of rank, such as "rank 0: column 0; 10,108,620 parameters; batch 32".

    Every rank calls it. The parameters are those that the rank holds, the batch is its share, which
    it computes in `parts`.
    """
    share = -(-batch_size // context.data_ranks)
    batch = f"batch {share}" + (f" of {batch_size}" if context.data_ranks > 1 else "")
    batch += f" in {parts} parts" if parts > 1 else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mine = f"{count('column', context.columns)}; {parameters:,} parameters; {batch}"
    everywhere = context.gather(mine)
    return [
        f"{count('rank', [rank for rank, other in enumerate(everywhere) if other == text])}: {text}"
        for text in dict.fromkeys(everywhere)
    ]


def count(noun: str, numbers: Sequence[int]) -> str:
    """ "column 0", "columns 0 and 1", "ranks 0, 2 and 4"."""
    *first, last = map(str, numbers)
    return f"{noun}s {', '.join(first)} and {last}" if first else f"{noun} {last}"


def stretched(trainer: Trainer, now: RecipeConfig, before: RecipeConfig, loader: Sized) -> str:
    """A note for a resumed run whose new --epochs move its schedule, or "".

    The cosine and 2012 schedules are scaled to the number of epochs: a run that had ended at a low
    rate goes on at a high one. `trainer` stands where the run goes on.
    """
    if now.epochs == before.epochs or now.schedule not in ("cosine", "2012") or not trainer.history:
        return ""
    last = trainer.history[-1]["lr"]
    trainer.schedule.advance(trainer.epoch + trainer.batch / len(loader))
    if trainer.lr == last:
        return ""
    return (
        f"note: the {now.schedule} schedule is scaled to --epochs, now {now.epochs} instead of "
        f"{before.epochs}: the learning rate goes from {last:.3g} to {trainer.lr:.3g}"
    )


def stopped(trainer: Trainer, folder: Path) -> str:
    """The line of a run that was asked to stop."""
    return (
        f"stopped at step {trainer.step}, saved; "
        f"continue with the same command and --out {folder} --resume"
    )


def scores(found: Scores, best_epoch: int | None, logits: int, validation: str) -> str:
    """The line of the final test. `validation`: where the validation images came from."""
    top5 = f", top-{min(5, logits)} {found.top5:.2%}" if logits > 2 else ""
    weights = f"epoch {best_epoch}" if best_epoch else "the last step"
    chosen = ", which these images chose" if best_epoch and validation == "test images" else ""
    return (
        f"test: loss {found.loss:.4f}, accuracy {found.top1:.2%}{top5} "
        f"({found.images:,} images, weights of {weights}{chosen})"
    )


def exchange(
    context: ParallelContext, trainer: Trainer, crossings: Sequence[str], test_images: int
) -> dict[str, Any]:
    """`exchange` of result.json: what this rank sent to its peers, as the meter counted it.

    Values an image at each of the `crossings`, and the bytes of the largest training step. Every
    rank of a copy sends the same amounts. A run without a training step is measured in its test.
    """
    if context.column_ranks == 1:
        return {"values_per_image": {}, "values_per_image_backward": {}, "bytes_per_step": 0}
    phase, images = TRAINING, trainer.images_seen // context.data_ranks
    if not images:
        phase, images = EVALUATION, test_images

    def per_image(direction: str) -> dict[str, int | float]:
        values = {
            name: context.meter.total_values(name, direction, phase) / images for name in crossings
        }
        return {name: int(n) if n == int(n) else n for name, n in values.items()}

    return {
        "values_per_image": per_image("forward"),
        "values_per_image_backward": per_image("backward"),
        "bytes_per_step": trainer.largest_step_bytes,
    }
