"""Trained networks put to use: one or several checkpoints as one network, its scores on a data set, its predictions for files."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from alexnet_mp.config import Config
from alexnet_mp.config.arguments import EvaluateRequest, Networks, PredictRequest
from alexnet_mp.data import (
    Augment,
    Loader,
    Statistics,
    Store,
    load,
    needs_statistics,
    resize,
    try_read,
)
from alexnet_mp.ops import cpu_kernels
from alexnet_mp.ops.precision import autocast
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.meter import EVALUATION
from alexnet_mp.training import checkpoint
from alexnet_mp.training.metrics import evaluate

Views = Callable[[Tensor], Iterable[Tensor]]
"""Gives the views of a batch of images, uint8, one after another: `Augment.ten_views`, or one that is the center crop."""


class EnsembleModel(nn.Module):
    """Several networks, and several views of every image, as one network: `evaluate` takes it like any other.

    Each network's views are averaged, then the networks by their weights, as in 2012 (paper 4.1; `avg-test.py` of the source).
    Views go through a network one by one, so ten need no more memory than one.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        views: Sequence[Views],
        weights: Sequence[float] | None = None,
        average: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        """One of `views` for each network, which may crop and subtract its own mean. `average` is of a network's views."""
        super().__init__()
        self.networks, self.views, self.average = nn.ModuleList(networks), tuple(views), average
        self.weights = tuple(weights or [1.0] * len(networks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes), whose softmax is the average, of images (N, 3, s, s)."""
        answers = []
        for network, views in zip(self.networks, self.views, strict=True):
            outputs = [network(view) for view in views(images)]
            answers.append(average_outputs(outputs, [1.0] * len(outputs), self.average))
        return average_outputs(answers, self.weights)


def average_outputs(
    outputs: Sequence[Tensor],
    weights: Sequence[float],
    average: Literal["probabilities", "logits"] = "probabilities",
) -> Tensor:
    """Logits whose softmax is the weighted mean of the `outputs`' softmaxes; or the weighted mean of the outputs themselves.

    Cross-entropy of these logits is minus the logarithm of the label's mean probability, also where that is too small for a float.
    Float64 where the device has it; a single output comes back as it is, bit for bit.
    """
    if len(outputs) == 1:
        return outputs[0]
    stacked = torch.stack(list(outputs))  # outputs x N x classes
    stacked = stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)
    shares = stacked.new_tensor(weights)[:, None, None] / sum(weights)
    if average == "logits":
        return (stacked * shares).sum(0)
    return (stacked.log_softmax(2) + shares.log()).logsumexp(0)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint knows of its network, and of how images have to be prepared for it."""

    path: str
    content: dict[str, Any]
    config: Config
    classes: tuple[str, ...]
    statistics: Statistics | None

    @staticmethod
    def read(path: str) -> Trained:
        """Raises FileNotFoundError, or ValueError naming the file."""
        content = checkpoint.read(path)
        config, data = Config.from_dict(content["config"]), content["data"]
        statistics = data.get("statistics")
        if statistics is None and needs_statistics(config.data):
            raise ValueError(
                f"{path}: holds no mean image of its training images, without which its network cannot be shown others; "
                "it was written before checkpoints kept it"
            )
        return Trained(
            path, content, config, tuple(data["classes"]), statistics and Statistics(**statistics)
        )

    @property
    def side(self) -> int:
        """Of the images that its views are cut from."""
        return self.config.data.resized_side(self.config.model.image_size)


class EnsembleRunner:
    """The networks of a request, averaged, at their place on this rank. Every rank makes one.

    Each network gets its own crops and mean image; they share the classes and the side of the images that crops are cut from.
    """

    def __init__(self, request: Networks, **changes: Any) -> None:
        """`changes` are of the first checkpoint's configuration, which says what the request leaves open."""
        self.request, self.members = request, [Trained.read(path) for path in request.checkpoint]
        first = self.first = self.members[0]
        for other in self.members[1:]:
            _check_same(first, other)
        # Ranks can share out what divides every network's columns.
        columns = math.gcd(*(member.config.model.columns for member in self.members))
        self.config = first.config.with_fields(
            columns=columns,
            precision=request.precision or first.config.run.precision,
            **request.machine(),
            **changes,
        )
        place = self.context = init_parallel(self.config)
        if place.device.type == "cpu":
            cpu_kernels.keep_freed_memory()
        self.precision = self.config.run.precision
        networks, augments = [], []
        for member in self.members:
            model = member.config.model
            share = model.columns // place.column_ranks
            here = tuple(range(place.column_rank * share, (place.column_rank + 1) * share))
            network = replace(place, columns=here).build_model(model, member.config.run.seed)
            checkpoint.load_model(member.content, network, member.path)
            networks.append(network)
            augments.append(
                Augment(member.config.data, model.image_size, member.statistics, place.device)
            )
        self.augment = augments[0]
        views = [
            augment.ten_views if request.ten_crop else _center_view(augment) for augment in augments
        ]
        self.model = EnsembleModel(networks, views, request.shares, request.average).eval()

    @property
    def views(self) -> int:
        return 10 if self.request.ten_crop else 1

    def print_rank0(self, text: str) -> None:
        """Prints on the main rank."""
        if self.context.is_rank0:
            print(text, flush=True)

    def introduction(self) -> str:
        place, several = self.context, len(self.members) > 1
        names = f"{len(self.members)} networks" if several else f"preset {self.first.config.preset}"
        views = (
            f"ten views, their {self.request.average} averaged"
            if self.views > 1
            else "the center view"
        )
        ranks = f"{place.world_size} rank{'s' * (place.world_size > 1)} on {place.device.type}"
        return f"alexnet_mp: {names}, {views}, {ranks}, {self.precision}"

    def loader(self, store: Store, batch_size: int) -> Loader:
        """This rank's uint8 images of `store`, at the networks' side."""
        place = self.context
        return Loader(
            store.resized(self.first.side),
            self.augment,
            batch_size,
            data_rank=place.data_rank,
            data_ranks=place.data_ranks,
            device=place.device,
            raw=True,
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """float64 (N, classes) of uint8 images (N, 3, side, side), on the CPU."""
        with self.context.meter.counting(EVALUATION), autocast(self.context.device, self.precision):
            logits = self.model(images.to(self.context.device))
        return logits.cpu().double().softmax(1)


def evaluate_checkpoints(request: EvaluateRequest) -> dict[str, Any]:
    """The scores that `request` asks for, as the JSON has them, printed by the main rank. Every rank calls it.

    Raises ValueError or OSError (one line, naming the flag or file) for what a user can mend.
    """
    # Nothing is measured on these images: what the networks subtract is in their checkpoints.
    ensemble = EnsembleRunner(request.networks, **request.data_fields())
    config, place, first = ensemble.config, ensemble.context, ensemble.first
    ensemble.print_rank0(ensemble.introduction())
    source = replace(config.data, mean="none", color_noise=0.0)
    store: Store = getattr(
        load(source, config.run.seed, place.run_once_per_host, place.is_rank0, first.side),
        request.split,
    )
    if store.classes != first.classes:
        raise ValueError(
            f"--data {source.data} --data-dir {source.data_dir}: {_difference(store.classes, first.classes)}, unlike in the "
            f"images that {first.path} was trained on"
        )
    if request.split == "val" and len({member.config.run.seed for member in ensemble.members}) > 1:
        ensemble.print_rank0(
            "note: the networks had different seeds, so that images held out from the first may have trained another; "
            "--split test has none of these"
        )
    loader = ensemble.loader(store, request.batch_size or config.recipe.batch_size)
    started = time.perf_counter()
    bar = tqdm(
        loader, request.split, unit="batch", leave=False, disable=None if place.is_rank0 else True
    )
    with place.meter.counting(EVALUATION):
        scores = evaluate(
            ensemble.model,
            bar,
            device=place.device,
            reduce=place.all_reduce_replicas,
            precision=lambda: autocast(place.device, ensemble.precision),
        )
    seconds = time.perf_counter() - started
    result = {
        "loss": scores.loss,
        "top1": scores.top1,
        "top5": scores.top5,
        "images": scores.images,
        "views": ensemble.views,
        "checkpoints": list(request.networks.checkpoint),
        "weights": list(request.networks.shares),
        "average": request.networks.average,
        "data": source.data,
        "data_dir": source.data_dir,
        "split": request.split,
        "seconds": round(seconds, 3),
        "images_per_second": scores.images / seconds,
        "ranks": place.world_size,
        "device": str(place.device),
        "precision": ensemble.precision,
    }
    ensemble.print_rank0(scores_table(result, len(first.classes)))
    place.close()
    return result


def predict_files(request: PredictRequest) -> list[dict[str, Any]]:
    """For each file, in order, {"file", "top": [{"class", "probability"}, ...]}, or {"file", "error"}; printed by the main rank.

    Every rank calls it. Raises ValueError or OSError for a checkpoint that cannot be used, not for an image.
    """
    ensemble = EnsembleRunner(request.networks)
    answers = []
    for files in _batches(request.images, ensemble.first.config.recipe.batch_size):
        images = {file: _read(file, ensemble.first.side) for file in files}
        good = [file for file, image in images.items() if isinstance(image, Tensor)]
        probabilities = iter(
            ensemble.probabilities(torch.stack([images[file] for file in good])) if good else ()
        )
        found = {
            file: _best(next(probabilities), ensemble.first.classes, request.top) for file in good
        }
        for file in files:
            answers.append(
                {"file": file, "top": found[file]}
                if file in found
                else {"file": file, "error": images[file]}
            )
            if file in found:
                ensemble.print_rank0("\n".join(prediction_lines(answers[-1])))
    ensemble.context.close()
    return answers


def _center_view(augment: Augment) -> Views:
    return lambda images: (augment.test(images),)


def _check_same(first: Trained, other: Trained) -> None:
    """ValueError, naming `other`, where the two cannot be averaged."""
    if other.classes != first.classes:
        raise ValueError(
            f"{other.path}: {_difference(other.classes, first.classes)}, unlike in {first.path}, so they cannot be averaged"
        )
    logits = [member.config.model.classes for member in (other, first)]
    if logits[0] != logits[1]:
        raise ValueError(
            f"{other.path}: has {logits[0]} logits, {first.path} {logits[1]}, so they cannot be averaged"
        )
    if other.side != first.side:
        raise ValueError(
            f"{other.path}: takes its crops from images of {other.side} pixels, {first.path} of {first.side}, "
            "so they cannot be averaged"
        )


def _difference(classes: Sequence[str], others: Sequence[str]) -> str:
    """What distinguishes `classes` from `others`."""
    for name in classes:
        if name not in others:
            return f"there is a class {name!r}"
    for name in others:
        if name not in classes:
            return f"there is no class {name!r}"
    return "the classes stand in another order"


def _batches(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def _read(file: str, side: int) -> Tensor | str:
    """The image in `file`, uint8 (3, side, side), or what is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's, of odd metadata; what cannot be read comes back as text
        image = try_read(Path(file))
    return image if isinstance(image, str) else resize(torch.from_numpy(image)[None], side)[0]


def _best(probabilities: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    # A network may have more logits than its training images had classes.
    names: Iterable[str] = (
        classes[k] if k < len(classes) else f"class {k}" for k in numbers.tolist()
    )
    return [
        {"class": name, "probability": value}
        for name, value in zip(names, values.tolist(), strict=True)
    ]


def scores_table(result: dict[str, Any], classes: int) -> str:
    """What launch/evaluate.py found, as the JSON has it, for people."""
    lines = [f"{'weight':>8s}  checkpoint"] if len(result["checkpoints"]) > 1 else []
    lines += (
        [
            f"{weight:8.3f}  {path}"
            for path, weight in zip(result["checkpoints"], result["weights"], strict=True)
        ]
        if lines
        else []
    )
    top = f"top-{min(5, classes)}"
    return "\n".join(
        [
            *lines,
            f"{'data':>14s} {'split':>6s} {'loss':>9s} {'top-1':>8s} {top:>8s} {'images':>9s} {'views':>6s} {'seconds':>8s} {'images/s':>9s}",
            f"{result['data']:>14s} {result['split']:>6s} {result['loss']:9.4f} {result['top1']:8.2%} {result['top5']:8.2%} {result['images']:9,d} "
            f"{result['views']:6d} {result['seconds']:8.1f} {result['images_per_second']:9.0f}",
        ]
    )


def prediction_lines(answer: dict[str, Any]) -> list[str]:
    """One file's most probable classes, with a bar of up to 30 signs for each."""
    return [
        answer["file"],
        *(
            f"{entry['probability']:8.1%}  {'#' * round(30 * entry['probability']):30s}  {entry['class']}"
            for entry in answer["top"]
        ),
    ]
