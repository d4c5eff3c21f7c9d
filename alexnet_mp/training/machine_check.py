"""Will this machine train two columns, and how fast? Measurements for the command `check`.

Each function measures one thing on all ranks and returns rows; rank 0's rows are shown. Start with
`run_checks`.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.config import Config, ModelConfig, RecipeConfig, preset
from alexnet_mp.data.cache import cache_folder
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.precision import autocast
from alexnet_mp.ops.response_norm import slow_norm
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.sgd2012 import build_optimizer

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative error of a gradient: two ranks against one device in the same precision."""
TF32_TOLERANCE = 2e-3  # ten bits of mantissa in the products
STEPS = 4
MESSAGE_BYTES = (4, 65_536, 1_048_576, 16_777_216)
GIGABYTE = 10**9
# The gradient that comes back through a crossing arrives at the layer below it.
BELOW = {"conv3": "conv2", "fc6": "conv5", "fc7": "fc6", "fc8": "fc7"}


@dataclass
class Row:
    """One line of the report. `status` is ok, note or FAIL; a FAIL names its `remedy`."""

    name: str
    detail: str
    status: str = "ok"
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def run_checks(context: ParallelContext, seconds: float = 8.0) -> Iterator[Row]:
    """Yields the rows in order, each as soon as it is known; every rank iterates to the end.

    `seconds` bounds each of the two timings of training.
    """
    yield from places(context)
    yield from devices(context)
    yield kernels(context)
    yield from limits(context)
    if context.column_ranks > 1:
        yield from crossings(context)
        yield from training_steps(context)
        yield from link(context)
    yield from speed(context, seconds)


def versions(digest: str) -> Row:
    """Versions of everything that decides a result; `digest` is that of the package's sources."""
    import numpy
    import torchvision

    import alexnet_mp

    found = {
        "alexnet_mp": f"{alexnet_mp.__version__} ({digest})",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return Row("versions", ", ".join(f"{k} {v}" for k, v in found.items()), values=found)


def places(context: ParallelContext) -> Iterator[Row]:
    """One row for each rank: its host, device, columns and threads."""
    mine = {
        "host": platform.node(),
        "device": str(context.device),
        "columns": list(context.columns),
        "threads": context.threads,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }
    for rank, place in enumerate(context.gather(mine)):
        columns = " and ".join(map(str, place["columns"]))
        several = "s" * (len(place["columns"]) > 1)
        yield Row(
            f"rank {rank}",
            f"column{several} {columns} on {place['device']} of {place['host']}, "
            f"{place['threads']} threads, backend {context.backend}",
            values=place,
        )


def devices(context: ParallelContext) -> Iterator[Row]:
    """The GPUs that this rank sees, and whether each pair reaches the other directly."""
    if context.device.type != "cuda":
        name = platform.processor() or platform.machine()
        yield Row("device", f"{context.device.type}: {name}, {os.cpu_count()} cores")
        return
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield Row(
            f"GPU {index}",
            f"{properties.name}, {properties.total_memory / GIGABYTE:.0f} GB, "
            f"capability {properties.major}.{properties.minor}",
        )
    for first in range(count):
        for second in range(first + 1, count):
            direct = torch.cuda.can_device_access_peer(first, second)
            yield Row(
                f"GPU {first} - GPU {second}",
                "peer access" if direct else "no peer access: messages go through host memory",
                "ok" if direct else "note",
                "" if direct else "NVLink or one PCIe switch gives peer access; else it is slower",
                {"peer_access": direct},
            )


def kernels(context: ParallelContext) -> Row:
    """Which kernels ReLU, response norm and pooling use on this device."""
    reason = slow_norm(context.device.type)
    if reason:
        way_out = (
            "install a C++ compiler (g++)" if context.device.type == "cpu" else "install Triton"
        )
        return Row("kernels", reason, "note", f"{way_out}, or accept the slower norm")
    return Row("kernels", f"response norm is compiled on {context.device.type}")


def limits(context: ParallelContext) -> Iterator[Row]:
    """Open files, shared memory and the disk under the cache, on this rank's host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < 256
    yield Row(
        "open files",
        f"soft limit {soft}, hard limit {hard}",
        "note" if low else "ok",
        "raise it with `ulimit -n 1024`" if low else "",
        {"soft": soft, "hard": hard},
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = context.backend == "nccl" and free < 256 * 10**6
        yield Row(
            "/dev/shm",
            f"{free / GIGABYTE:.2f} GB free",
            "note" if small else "ok",
            "start the container with --shm-size=1g" if small else "",
            {"free": free},
        )
    cache = cache_folder() or Path.cwd()
    existing = next((path for path in (cache, *cache.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    yield Row("cache", f"{cache}: {free / GIGABYTE:.1f} GB free", values={"free": free})


def precisions(context: ParallelContext) -> tuple[str, ...]:
    """The precisions that this device computes in."""
    if context.device.type == "cuda":
        return ("fp64", "fp32", "bf16", "fp16")
    return ("fp64", "fp32", "bf16") if context.device.type == "cpu" else ("fp32",)


def small_config() -> ModelConfig:
    """A network of the paper's shape with few kernels: an odd number of classes, 67 pixels."""
    return ModelConfig(
        kernels=(8, 12, 12, 12, 8),
        hidden=(40, 24),
        classes=11,
        image_size=67,
        initial_weights=("he",) * 8,
    )


def crossings(context: ParallelContext) -> Iterator[Row]:
    """Compares each crossing, forward and backward, with one device that holds all columns.

    Every rank also computes the whole network by itself, on the same batch. A crossing that sends a
    wrong gradient shows as a ratio that is not 1 in the layer below it.
    """
    for precision in precisions(context):
        rows = _compare_gradients(context, precision)
        worst = max(rows, key=lambda row: row["error"])
        bad = [row for row in rows if not row["error"] <= row["tolerance"]]
        detail = "; ".join(f"{row['crossing']} {row['error']:.1e}" for row in rows)
        if bad:
            detail = "; ".join(
                f"rank {row['rank']}: the gradient through {row['crossing']} is "
                f"{row['ratio']:.6f} times as large as on one device (error {row['error']:.1e})"
                if row["crossing"] != "logits"
                else f"rank {row['rank']}: the logits differ by {row['error']:.1e}"
                for row in bad
            )
        remedy = "another path between the devices: NCCL_P2P_DISABLE=1, or --backend gloo"
        yield Row(
            f"exchange {precision}",
            detail,
            "FAIL" if bad else "ok",
            remedy if bad else "",
            {"largest_error": worst["error"], "crossings": rows},
        )


def _compare_gradients(context: ParallelContext, precision: str) -> list[dict[str, Any]]:
    """Relative errors of the logits and of the gradient through each crossing, the worst rank's."""
    split = context.build_model(small_config(), 0)
    whole = _all_columns(context, small_config())
    if precision == "fp64":
        split, whole = split.double(), whole.double()
    images, labels = _batch(context, small_config(), 12, split)
    gradients, logits = [], []
    for network in (split, whole):
        keys = dropout_keys(0, 0, torch.arange(len(images), device=context.device))
        with autocast(context.device, precision if precision != "fp64" else "fp32"):
            outputs = network(images, keys)
        torch.autograd.backward(
            F.cross_entropy(outputs.float() if precision != "fp64" else outputs, labels)
        )
        gradients.append(
            network.canonical(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
        )
        logits.append(outputs.detach())
    found = [_error("logits", logits[0], logits[1], context, precision)]
    for crossing in split.config.crossings:
        here = {
            name: value
            for name, value in gradients[0].items()
            if f".{BELOW.get(crossing)}.weight" in name
        }
        found += [
            _error(crossing, value, gradients[1][name], context, precision)
            for name, value in here.items()
        ]
    everyone = [
        row | {"rank": rank} for rank, rows in enumerate(context.gather(found)) for row in rows
    ]
    names = list(dict.fromkeys(row["crossing"] for row in everyone))
    return [
        max((row for row in everyone if row["crossing"] == name), key=lambda row: row["error"])
        for name in names
    ]


def _error(
    crossing: str, found: Tensor, wanted: Tensor, context: ParallelContext, precision: str
) -> dict[str, Any]:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    scale = wanted.square().sum().sqrt().item()
    error = (found - wanted).square().sum().sqrt().item() / (scale or 1.0)
    ratio = (found * wanted).sum().item() / (scale**2 or 1.0)
    tolerance = TOLERANCE[precision]
    if precision == "fp32" and context.device.type == "cuda":
        tolerance = TF32_TOLERANCE
    error = error if math.isfinite(error) else math.inf
    return {"crossing": crossing, "error": error, "ratio": ratio, "tolerance": tolerance}


def training_steps(context: ParallelContext) -> Iterator[Row]:
    """Trains the small network for some steps with dropout, split and whole, and compares
    weights."""
    config = small_config()
    networks = context.build_model(config, 0), _all_columns(context, config)
    images, labels = _batch(context, config, 12, networks[0])
    for network in networks:
        optimizer = build_optimizer(network, RecipeConfig(lr=0.01))
        for step in range(STEPS):
            optimizer.zero_grad()
            keys = dropout_keys(0, step, torch.arange(len(images), device=context.device))
            torch.autograd.backward(F.cross_entropy(network(images, keys), labels))
            optimizer.step()
    weights = [network.canonical(lambda p: p.detach()) for network in networks]
    mine = max(
        _error(name, value, weights[1][name], context, "fp32")["error"]
        for name, value in weights[0].items()
    )
    errors = context.gather(mine)
    worst = max(errors)
    good = worst <= (TF32_TOLERANCE if context.device.type == "cuda" else 1e-4)
    yield Row(
        f"{STEPS} steps",
        f"weights of {context.column_ranks} ranks differ from one device's by {worst:.1e}"
        + ("" if good else f" on rank {errors.index(worst)}"),
        "ok" if good else "FAIL",
        "" if good else "compare the rows `exchange`; the same versions on all ranks?",
        {"largest_error": worst},
    )


def link(context: ParallelContext) -> Iterator[Row]:
    """Latency and bandwidth of the pair: both directions at once, as at a crossing."""
    network = context.build_model(small_config(), 0)
    figures = []
    for size in MESSAGE_BYTES:
        tensor = torch.zeros(1, size // 4, device=context.device)

        def exchange(tensor: Tensor = tensor) -> None:
            with torch.no_grad():
                network.link.start_exchange("fc6", [tensor])()

        seconds = _time(context, exchange, 20 if size < 10**6 else 5)
        figures.append({"bytes": size, "seconds": max(context.gather(seconds))})
    latency, large = figures[0]["seconds"], figures[-1]
    bandwidth = large["bytes"] / large["seconds"]
    yield Row(
        "link",
        f"{latency * 1e6:.0f} us for {figures[0]['bytes']} bytes, "
        f"{bandwidth / GIGABYTE:.2f} GB/s each way for {large['bytes'] // 2**20} MiB",
        values={"latency_seconds": latency, "bytes_per_second": bandwidth, "messages": figures},
    )


def speed(context: ParallelContext, seconds: float) -> Iterator[Row]:
    """Images/s of training on all ranks and on one, and the share of a step that the exchange
    exposes."""
    config, batch, precision = _timed_training(context)
    together, exposed = _train_for(context, seconds, config, batch, precision, whole=False)
    alone = 0.0
    if context.world_size > 1:
        if context.is_rank0:
            alone, _ = _train_for(context, seconds, config, batch, precision, whole=True)
        alone = context.gather_no_timeout(alone)[0]
    ranks = f"{context.world_size} rank{'s' * (context.world_size > 1)}"
    detail = f"{config.preset} at {config.model.image_size} px, {precision}, batch {batch}: "
    detail += f"{ranks} {together:,.0f} images/s"
    if alone:
        detail += f", one rank alone {alone:,.0f}; {exposed:.1%} of a step waits for the exchange"
    values = {"images_per_second": together, "images_per_second_one_rank": alone or None}
    yield Row("speed", detail, values=values | {"exposed_share": exposed, "precision": precision})


def _timed_training(context: ParallelContext) -> tuple[Config, int, str]:
    """The network that is timed: the paper's on a GPU, the demo's on a CPU."""
    if context.device.type == "cuda":
        return preset("paper").with_fields(classes=1000), 128, "bf16"
    return preset("demo").with_fields(classes=12), 32, "fp32"


def _train_for(
    context: ParallelContext,
    seconds: float,
    config: Config,
    batch: int,
    precision: str,
    whole: bool,
) -> tuple[float, float]:
    """(images/s, share of the time spent waiting for the exchange), after two steps of warm-up."""
    model = config.model
    network = _all_columns(context, model) if whole else context.build_model(model, 0)
    images, labels = _batch(context, config.model, batch, network)
    optimizer = build_optimizer(network, config.recipe)
    meter, steps, began, waiting_before = context.meter, 0, 0.0, 0.0
    for step in range(10_000):
        if step == 2:
            _synchronize(context)
            began, waiting_before = time.perf_counter(), sum(meter.exposed_seconds.values())
        optimizer.zero_grad()
        with autocast(context.device, precision):
            keys = dropout_keys(0, step, torch.arange(batch, device=context.device))
            loss = F.cross_entropy(network(images, keys), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        if step < 2:
            continue
        steps = step - 1
        if steps % 5 == 0:
            _synchronize(context)
            over = time.perf_counter() - began > seconds
            if over if whole else any(context.gather(over)):
                break
    _synchronize(context)
    elapsed = time.perf_counter() - began
    waited = sum(meter.exposed_seconds.values()) - waiting_before
    return batch * steps / elapsed, waited / elapsed


def _all_columns(context: ParallelContext, config: ModelConfig) -> AlexNet:
    """The whole network on this rank, from the seed of `context.build_model(config, 0)`."""
    whole = AlexNet(config, seed=0).to(context.device)
    return whole.to(memory_format=torch.channels_last)


def _batch(
    context: ParallelContext, config: ModelConfig, images: int, network: AlexNet
) -> tuple[Tensor, Tensor]:
    """The same images (N, 3, S, S) and labels (N,) on every rank, in the network's type."""
    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    batch = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(config.classes, (images,), generator=generator)
    dtype = next(network.parameters()).dtype
    batch = batch.to(context.device, dtype, memory_format=torch.channels_last)
    return batch, labels.to(context.device)


def _time(context: ParallelContext, work: Callable[[], None], repeats: int) -> float:
    """Median seconds of `work`, which all ranks do together, after a warm-up."""
    work()
    durations = []
    for _ in range(repeats):
        _synchronize(context)
        began = time.perf_counter()
        work()
        _synchronize(context)
        durations.append(time.perf_counter() - began)
    return sorted(durations)[len(durations) // 2]


def _synchronize(context: ParallelContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
