"""safetensors: the tensors of the state dict, and configuration and classes as metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from alexnet_mp.config.files import atomic_writer
from alexnet_mp.weights.extras import require
from alexnet_mp.weights.network_file import (
    METADATA,
    STATISTICS,
    NetworkFile,
    checked_statistics,
    from_metadata,
    to_metadata,
)

STATISTICS_PREFIX = "statistics."


def read(path: Path) -> NetworkFile:
    """Reads a file of `write`. Raises ValueError that names `path` and the part that is wrong."""
    library: Any = require("safetensors")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            # Copies: the library's tensors are views of a map, and a file may change under it.
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # SafetensorError, and errors of torch for odd shapes
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not a readable safetensors file ({reason})") from None
    if metadata.get("format") != METADATA:
        raise ValueError(f"{path}: a safetensors file of another program; it names no network")
    config, classes, _ = from_metadata(metadata, path)
    statistics = {
        name: tensors.pop(STATISTICS_PREFIX + name)
        for name in STATISTICS
        if STATISTICS_PREFIX + name in tensors
    }
    return NetworkFile(
        path, config, tensors, classes, checked_statistics(statistics or None, config, path)
    )


def write(network: NetworkFile, path: Path) -> None:
    """Writes `network`. Raises OSError that names `path`."""
    library: Any = require("safetensors.torch")
    tensors = {name: value.contiguous() for name, value in network.tensors.items()}
    for name, value in (network.statistics or {}).items():
        tensors[STATISTICS_PREFIX + name] = value.contiguous()
    content = library.save(tensors, to_metadata(network, statistics=False))
    with atomic_writer(path) as file:
        file.write(content)
