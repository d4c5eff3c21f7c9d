"""The classes that trained networks find in image files."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.config.arguments import PredictRequest
from alexnet_mp.config.progress import Progress, progress
from alexnet_mp.data import resize, try_read
from alexnet_mp.inference.ensemble import EnsembleRunner

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
    images = [_read(file, ensemble.first.side) for file in files]
    readable = [image for image in images if isinstance(image, Tensor)]
    rows = iter(ensemble.probabilities(torch.stack(readable)) if readable else ())
    for file, image in zip(files, images, strict=True):
        if isinstance(image, Tensor):
            best = best_classes(next(rows), ensemble.first.classes, top)
            yield {"file": file, "top": best}
        else:
            yield {"file": file, "error": image}


def _read(file: str, side: int) -> Tensor | str:
    """The image in `file`, uint8 (3, side, side), or the reason why it cannot be read."""
    if file == "-":
        return "the standard input is not read; save the image and give the name of its file"
    if URL.match(file):
        return "an address, not a file; download the image and give the name of its file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata in images that it reads
        image = try_read(Path(file))
    return image if isinstance(image, str) else resize(torch.from_numpy(image)[None], side)[0]


def best_classes(probabilities: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The `top` most probable classes of one row (classes,), the most probable first."""
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    # A network may have more logits than its training images had classes.
    names = [classes[k] if k < len(classes) else f"class {k}" for k in numbers.tolist()]
    return [
        {"class": name, "probability": value}
        for name, value in zip(names, values.tolist(), strict=True)
    ]


def prediction_lines(answer: dict[str, Any]) -> list[str]:
    """The file's name, and a line with a bar of up to 30 signs for each of its classes."""
    lines = [answer["file"]]
    for entry in answer["top"]:
        share = entry["probability"]
        lines.append(f"{share:8.1%}  {'#' * round(30 * share):30s}  {entry['class']}")
    return lines
