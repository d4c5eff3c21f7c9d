"""Published rates of AlexNet on 1 to 8 GPUs, beside what the model predicts from the first of them.

All figures are TensorFlow's own (docs_src/performance/benchmarks.md of TensorFlow 1.x, "Training
synthetic data", May 2017): tf_cnn_benchmarks' AlexNet, one tower without LRN, 512 images a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from step_model import Cluster, Layout, Link, StepModel, device_at

from alexnet_mp import preset

IMAGES = 512
"""Images of each GPU in a step."""
TOLERATED = 0.15
"""Error from which a row needs a reason."""


@dataclass(frozen=True)
class Machine:
    """A published column of the table: images per second by number of GPUs."""

    name: str
    rates: dict[int, int]
    link: Link
    memory_bandwidth: float
    """Bytes per second between a GPU and its memory."""
    update: str
    """How its copies were kept equal, as published."""
    reason: str
    """Why the model is off, where it is."""


MACHINES = (
    Machine(
        "DGX-1, P100",
        {1: 2987, 2: 5658, 4: 10509, 8: 17822},
        # Two P100 of a DGX-1 share one NVLink of 20 GB/s each way, and a ring passes through one
        # link of each; 0.8 of it is taken as reached. HBM2: 732 GB/s.
        Link(0.8 * 20e9, 10e-6),
        732e9,
        "replicated (with NCCL)",
        "From 2 to 8 GPUs a ring's time grows by {ring_growth:.2f} (2 (n - 1) / n of the bytes), "
        "but what a step takes beyond one GPU's grew by {published_growth:.1f}, from "
        "{least:.0f} to {most:.0f} ms. One ring of NVLinks, not hidden behind the backward pass, "
        "fits 2 and 4 GPUs within 4 %. At 8 something else grows, which the figures do not tell: a "
        "ring of 8 has to leave the fully connected group of four, and one process launches the "
        "kernels and the NCCL calls of all copies.",
    ),
    Machine(
        "Google Compute Engine, K80",
        {1: 656, 2: 1209, 4: 2328, 8: 4640},
        # 8 dies on 4 boards: two dies share the 16 lanes of PCIe 3 of a board (15.75 GB/s each
        # way, 0.8 of it reached). GDDR5: 240 GB/s a die.
        Link(0.8 * 15.75e9 / 2, 10e-6),
        240e9,
        "parameter_server on the CPU",
        "The weights were kept on the CPU: each GPU sends all gradients there and reads all "
        "weights back, two dies through one slot, where the model has a ring.",
    ),
)


def compare(machine: Machine) -> list[dict[str, Any]]:
    """A dictionary per number of GPUs: published, predicted with the gradients hidden behind the
    backward pass and without."""
    # TensorFlow's tower (scripts/tf_cnn_benchmarks/models/alexnet_model.py) is that of `tutorial`
    # with 384 kernels in conv4.
    config = preset("tutorial").with_fields(classes=1000, kernels=(64, 192, 384, 384, 256)).model
    models = {}
    for overlap in (True, False):
        cluster = Cluster(machine.link, machine.link, max(machine.rates))
        model = StepModel(config, device_at(1, 1, 1, 1, 0), cluster, 4, overlap)
        model.device = device_at(
            machine.rates[1], IMAGES, machine.memory_bandwidth, model.parameters(1), 0.0
        )
        models[overlap] = model
    rows = []
    for count, published in machine.rates.items():
        hidden, exposed = (
            models[overlap].rate(count * IMAGES, Layout(1, count)) for overlap in (True, False)
        )
        rows.append(
            {
                "machine": machine.name,
                "devices": count,
                "published": published,
                "predicted": round(hidden, 1),
                "error": round(hidden / published - 1, 4),
                "predicted_without_overlap": round(exposed, 1),
                "error_without_overlap": round(exposed / published - 1, 4),
                "published_excess_seconds": round(
                    count * IMAGES / published - IMAGES / machine.rates[1], 5
                ),
            }
        )
    return rows


def reason(machine: Machine, rows: list[dict[str, Any]]) -> str:
    """Why the model is off by more than TOLERATED; empty where it is not."""
    if all(abs(row["error"]) <= TOLERATED for row in rows):
        return ""
    several = [row for row in rows if row["devices"] > 1]
    least, most = (1e3 * several[k]["published_excess_seconds"] for k in (0, -1))
    first, last = (several[k]["devices"] for k in (0, -1))
    ring_growth = ((last - 1) / last) / ((first - 1) / first)
    return machine.reason.format(
        ring_growth=ring_growth, published_growth=most / least, least=least, most=most
    )
