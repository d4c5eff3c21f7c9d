"""Scores of trained networks on the images of a split: loss, top-1, top-5."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from alexnet_mp.config import DataConfig
from alexnet_mp.config.arguments import EvaluateRequest
from alexnet_mp.config.progress import progress
from alexnet_mp.data import Store, load_split
from alexnet_mp.inference.ensemble import EnsembleRunner
from alexnet_mp.inference.load_network import class_difference
from alexnet_mp.ops.precision import autocast
from alexnet_mp.parallel.meter import EVALUATION
from alexnet_mp.training.metrics import Scores, evaluate


def evaluate_checkpoints(request: EvaluateRequest) -> dict[str, Any]:
    """Measures what `request` asks for; rank 0 prints it. Every rank calls it.

    Returns the scores as the JSON has them. Raises ValueError or OSError with one line that names
    the flag or file.
    """
    ensemble = EnsembleRunner(request.networks, **request.data_fields())
    ensemble.print_rank0(ensemble.introduction())
    store = _open_split(ensemble, request.split)
    seeds = {member.config.run.seed for member in ensemble.members}
    if request.split == "val" and len(seeds) > 1:
        ensemble.print_rank0(
            "note: the networks had different seeds, so that images held out from the first may "
            "have trained another; --split test has none of these"
        )
    started = time.perf_counter()
    scores = _scores(ensemble, store, request)
    seconds = time.perf_counter() - started
    result = _result(ensemble, request, scores, seconds)
    ensemble.print_rank0(scores_table(result, len(ensemble.first.classes)))
    ensemble.context.close()
    return result


def _open_split(ensemble: EnsembleRunner, split: Literal["train", "val", "test"]) -> Store:
    """The images of `split`. Raises ValueError where they have other classes than the networks."""
    config, context, first = ensemble.config, ensemble.context, ensemble.first
    # The checkpoints hold the training images' statistics, so nothing is measured on these images.
    data: DataConfig = replace(config.data, mean="none", color_noise=0.0)
    store = load_split(
        data, split, config.run.seed, context.run_once_per_host, context.is_rank0, first.side
    )
    if tuple(store.classes) != first.classes:
        raise ValueError(
            f"--data {data.data} --data-dir {data.data_dir}: "
            f"{class_difference(tuple(store.classes), first.classes)}, unlike in the images that "
            f"{first.path} was trained on"
        )
    return store


def _scores(ensemble: EnsembleRunner, store: Store, request: EvaluateRequest) -> Scores:
    context = ensemble.context
    batch_size = request.batch_size or ensemble.config.recipe.batch_size
    batches = progress(
        ensemble.loader(store, batch_size),
        description=f"evaluating {request.split}",
        unit="batches",
        enabled=context.is_rank0,
    )
    with context.meter.counting(EVALUATION):
        return evaluate(
            ensemble.model,
            batches,
            device=context.device,
            reduce=context.all_reduce_replicas,
            precision=lambda: autocast(context.device, ensemble.precision),
        )


def _result(
    ensemble: EnsembleRunner, request: EvaluateRequest, scores: Scores, seconds: float
) -> dict[str, Any]:
    context, data = ensemble.context, ensemble.config.data
    return {
        "loss": scores.loss,
        "top1": scores.top1,
        "top5": scores.top5,
        "images": scores.images,
        "views": ensemble.views,
        "checkpoints": list(request.networks.checkpoint),
        "weights": list(request.networks.shares),
        "average": request.networks.average,
        "data": data.data,
        "data_dir": data.data_dir,
        "split": request.split,
        "seconds": round(seconds, 3),
        "images_per_second": scores.images / seconds,
        "ranks": context.world_size,
        "device": str(context.device),
        "precision": ensemble.precision,
    }


def scores_table(result: dict[str, Any], classes: int) -> str:
    """The result of `evaluate_checkpoints` as a table for people."""
    lines = []
    if len(result["checkpoints"]) > 1:
        lines.append(f"{'weight':>8s}  checkpoint")
        for path, weight in zip(result["checkpoints"], result["weights"], strict=True):
            lines.append(f"{weight:8.3f}  {path}")
    top = f"top-{min(5, classes)}"
    lines.append(
        f"{'data':>14s} {'split':>6s} {'loss':>9s} {'top-1':>8s} {top:>8s} "
        f"{'images':>9s} {'views':>6s} {'seconds':>8s} {'images/s':>9s}"
    )
    lines.append(
        f"{result['data']:>14s} {result['split']:>6s} {result['loss']:9.4f} {result['top1']:8.2%} "
        f"{result['top5']:8.2%} {result['images']:9,d} {result['views']:6d} "
        f"{result['seconds']:8.1f} {result['images_per_second']:9.0f}"
    )
    return "\n".join(lines)
