"""The classes that trained networks find in image files."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.config.arguments import PredictRequest
from alexnet_mp.config.progress import Progress, progress
from alexnet_mp.inference.ensemble import EnsembleRunner
from alexnet_mp.inference.load_network import TrainedNetwork, best_classes

URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def predict_files(request: PredictRequest) -> list[dict[str, Any]]:
    """Predicts the classes of the request's files; rank 0 prints them. Every rank calls it.

    Returns {"file", "top": [{"class", "probability"}, ...]} for each file in order, and
    {"file", "error"} for one that cannot be read. Raises ValueError or OSError for a checkpoint
    that cannot be used.
    """
    ensemble = EnsembleRunner(request.networks)
    answers = []
    shown: Progress[Any] = progress(
        total=len(request.images),
        description="predicting",
        unit="images",
        # On a terminal the predictions themselves show how far it is; a bar would run into them.
        enabled=ensemble.context.is_rank0 and not sys.stdout.isatty(),
    )
    with shown:
        for files in _batches(request.images, ensemble.first.config.recipe.batch_size):
            for answer in _predict_batch(ensemble, files, request.top):
                answers.append(answer)
                if "top" in answer:
                    ensemble.print_rank0("\n".join(prediction_lines(answer)))
            shown.update(len(files))
    ensemble.context.close()
    return answers


def _batches(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def _predict_batch(
    ensemble: EnsembleRunner, files: Sequence[str], top: int
) -> Iterator[dict[str, Any]]:
    images = [_read(file, ensemble.first) for file in files]
    readable = [image for image in images if isinstance(image, Tensor)]
    rows = iter(ensemble.probabilities(torch.stack(readable)) if readable else ())
    for file, image in zip(files, images, strict=True):
        if isinstance(image, Tensor):
            best = best_classes(next(rows), ensemble.first.classes, top)
            yield {"file": file, "top": [{"class": c, "probability": p} for c, p in best]}
        else:
            yield {"file": file, "error": image}


def _read(file: str, network: TrainedNetwork) -> Tensor | str:
    """The image in `file` as `network` wants it, or the reason why it cannot be read."""
    if file == "-":
        return "the standard input is not read; save the image and give the name of its file"
    if URL.match(file):
        return "an address, not a file; download the image and give the name of its file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata in images that it reads
        return network.read_image(file)


def prediction_lines(answer: dict[str, Any]) -> list[str]:
    """The file's name, and a line with a bar of up to 30 signs for each of its classes."""
    lines = [answer["file"]]
    for entry in answer["top"]:
        share = entry["probability"]
        lines.append(f"{share:8.1%}  {'#' * round(30 * share):30s}  {entry['class']}")
    return lines
