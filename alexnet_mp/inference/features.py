"""Features of image files: what a trained network's layers make of them, as an .npz file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.config.arguments import FeaturesRequest
from alexnet_mp.config.files import atomic_writer
from alexnet_mp.config.progress import progress
from alexnet_mp.data.directory import EXTENSIONS
from alexnet_mp.inference.load_network import load_network


def save_features(request: FeaturesRequest, device: torch.device) -> dict[str, Any]:
    """Writes the file that `request` asks for.

    Returns {"images", "values", "layer", "unreadable": [line, ...]}. Raises ValueError or OSError
    with one line that names the flag or file.
    """
    folder = Path(request.folder).expanduser()
    files = image_files(folder)
    network = load_network(request.checkpoint, device)
    names, rows, unreadable = [], [], []
    shown = progress(total=len(files), description="features", unit="images")
    with shown:
        for start in range(0, len(files), request.batch_size):
            batch: list[Tensor] = []
            for file in files[start : start + request.batch_size]:
                square = network.preprocess.network.read_image(file)
                if isinstance(square, str):
                    unreadable.append(f"{file}: {square}")
                    continue
                batch.append(square)
                names.append(str(file.relative_to(folder)))
            if batch:
                images = network.preprocess.augment.test(torch.stack(batch).to(device))
                rows.append(network.model.features(images, request.layer).float().cpu())
            shown.update(min(request.batch_size, len(files) - start))
    if not rows:
        raise ValueError(f"{unreadable[0]}; no image of {folder} can be read")
    features = torch.cat(rows)
    with atomic_writer(Path(request.out).expanduser()) as target:
        np.savez(target, features=features.numpy(), files=np.array(names))
    return {
        "images": len(features),
        "values": features.shape[1],
        "layer": request.layer,
        "unreadable": unreadable,
    }


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and the folders in it, by their names' ends, sorted.

    Raises ValueError or FileNotFoundError where there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(_walk(folder))
    if not files:
        raise ValueError(f"{folder}: has no images ({' '.join(sorted(EXTENSIONS))})")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(place, name)
