#!/usr/bin/env python
"""Times our response normalization against torch.nn.LocalResponseNorm, forward and backward.

    python benchmarks/lrn.py [--batch-size 128] [--precision fp32 bf16] [--threads 1]

The shapes are those of one column of the paper's net: 48 x 55 x 55 after conv1, 128 x 27 x 27 after
conv2. `copies` says how often the same tensor could have been copied meanwhile; forward and
backward read or write five tensors, which is 2.5 copies. Extra memory is the peak beyond input,
output and both gradients, in activations. The last line is JSON.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import common
import torch
from common import Spread, rounded
from torch import Tensor, nn
from tqdm import tqdm
from tyro.conf import arg

from alexnet_mp import LocalResponseNorm
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import check
from alexnet_mp.ops.precision import DTYPES

SHAPES = {"layer 1": (48, 55, 55), "layer 2": (128, 27, 27)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NORMS = {
    "ours": LocalResponseNorm(),
    "torch": nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
}  # torch divides alpha by the size


@dataclass(frozen=True)
class Request:
    """What does response normalization cost?"""

    batch_size: int = 128
    """Images."""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of input, output and gradients."""
    rounds: int = 7
    """Turns of each side; the median is over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""
    threads: int = 0
    """CPU threads; 0: one for each core."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        check(
            self.batch_size >= 1 and self.rounds >= 1,
            f"--batch-size {self.batch_size} --rounds {self.rounds}: one or more",
        )
        check(self.threads >= 0, f"--threads {self.threads}: must not be negative")
        check(bool(self.precision), "--precision: name at least one")


def once(norm: nn.Module, x: Tensor, gradient: Tensor, device: torch.device) -> float:
    """Seconds of forward and backward."""
    common.synchronize(device)
    start = time.perf_counter()
    torch.autograd.grad(norm(x), x, gradient)
    common.synchronize(device)
    return time.perf_counter() - start


def copying(x: Tensor, device: torch.device) -> float:
    """Seconds of a copy of `x`, the median of five."""
    target, seconds = torch.empty_like(x), []
    for _ in range(6):
        common.synchronize(device)
        start = time.perf_counter()
        target.copy_(x)
        common.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def extra_memory(norm: nn.Module, x: Tensor, gradient: Tensor, device: torch.device) -> float:
    """The peak beyond input, output and their gradients, in tensors of the input's size."""
    common.reset_peak_memory(device)
    before = common.peak_memory(device)
    y = norm(x)
    dx = torch.autograd.grad(y, x, gradient)
    common.synchronize(device)
    size = x.numel() * x.element_size()
    extra = (common.peak_memory(device) - before) / size - 2
    del y, dx
    return max(extra, 0.0)


def measure(request: Request, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    cases = [
        (layer, precision, memory_format)
        for layer in SHAPES
        for precision in request.precision
        for memory_format in FORMATS
    ]
    for layer, precision, memory_format in tqdm(cases, "norms", leave=False, disable=None):
        generator = torch.Generator().manual_seed(0)
        x, gradient = (
            torch.randn(request.batch_size, *SHAPES[layer], generator=generator)
            .to(device, DTYPES[precision])
            .contiguous(memory_format=FORMATS[memory_format])
            for _ in range(2)
        )
        x.requires_grad_()
        row = {
            "layer": layer,
            "precision": precision,
            "memory_format": memory_format,
            "batch_size": request.batch_size,
        }
        sides, seconds = dict(NORMS), {name: [] for name in NORMS}
        for turn in range(request.rounds + 1):
            for name, norm in list(sides.items()):
                try:
                    taken = once(norm, x, gradient, device)
                except (
                    RuntimeError,
                    NotImplementedError,
                ) as error:  # torch's norm lacks some types on some devices
                    row[f"{name}_failed"] = str(error).splitlines()[0]
                    del sides[name]
                    continue
                if turn:  # the first warms up
                    seconds[name].append(taken)
        for name in sides:
            taken = Spread.of(seconds[name])
            row |= {
                f"{name}_seconds": rounded(taken.median, 6),
                f"{name}_spread": [round(s, 6) for s in taken.range],
                f"{name}_extra_activations": round(
                    extra_memory(NORMS[name], x, gradient, device), 3
                ),
            }
        row["ours_copies"] = rounded(
            Spread.of(seconds["ours"]).median / copying(x.detach(), device), 2
        )
        row["ratio"] = (
            rounded(Spread.of(seconds["torch"]).over(Spread.of(seconds["ours"])).median)
            if len(sides) == 2
            else None
        )
        rows.append(row)
    return rows


def headline(rows: list[dict[str, Any]]) -> float | None:
    """Returns the smaller of the two layers' ratios in float32 (or the first precision measured),
    each side in its best memory format."""
    precision = "fp32" if any(row["precision"] == "fp32" for row in rows) else rows[0]["precision"]
    ratios = []
    for layer in SHAPES:
        mine = [row for row in rows if (row["layer"], row["precision"]) == (layer, precision)]
        if any(row["ratio"] is None for row in mine):
            return None
        ratios.append(
            min(row["torch_seconds"] for row in mine) / min(row["ours_seconds"] for row in mine)
        )
    return rounded(min(ratios))


def show(rows: list[dict[str, Any]]) -> str:
    head = (
        "",
        "precision",
        "memory format",
        "ours, ms",
        "torch's, ms",
        "ratio",
        "ours, copies",
        "extra, ours",
        "extra, torch's",
    )

    def number(row: dict[str, Any], key: str, factor: float, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key] * factor, form)

    lines = [
        (
            row["layer"],
            row["precision"],
            row["memory_format"],
            number(row, "ours_seconds", 1e3, ".1f"),
            number(row, "torch_seconds", 1e3, ".1f"),
            number(row, "ratio", 1, ".2f"),
            number(row, "ours_copies", 1, ".1f"),
            number(row, "ours_extra_activations", 1, ".2f"),
            number(row, "torch_extra_activations", 1, ".2f"),
        )
        for row in rows
    ]
    failures = sorted(
        {
            f"{name}: {row[f'{name}_failed']}"
            for row in rows
            for name in NORMS
            if f"{name}_failed" in row
        }
    )
    return "\n".join([common.table(head, lines), *failures])


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    device = common.choose_device(request.device)
    torch.set_num_threads(request.threads or common.available_cores())
    place = common.machine(device, torch.get_num_threads())
    print(common.describe(place), flush=True)
    rows = measure(request, device)
    print(show(rows))
    common.finish(
        {"ratio_to_torch_lrn": headline(rows), "rows": rows, "machine": place}, request.json
    )
    return 0


if __name__ == "__main__":
    run_main(main)
