#!/usr/bin/env python
"""Predicts training on up to 1,024 GPUs: column pairs inside a node, data parallelism across.

    python benchmarks/scaling_model.py --images-per-second 16487 --link pcie4 --devices-per-node 8
    python benchmarks/scaling_model.py --published
    python benchmarks/scaling_model.py --check throughput.json --exchange exchange.json

For each number of devices and both layouts: memory and bytes of a rank, time of a step, efficiency,
and the batch at which the layouts are level. `step_model.py` has the arithmetic, and its
assumptions are printed. A table, a plot, and JSON as the last line.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import common
import published
from step_model import (
    ASSUMPTIONS,
    Cluster,
    Layout,
    Link,
    StepModel,
    describe,
    device_at,
)
from tyro.conf import arg

from alexnet_mp import preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import ModelConfig, check

LINKS = {
    # Bytes per second in one direction, as standards and makers print them: PCI-SIG's rates for 16
    # lanes after encoding (3.0: 8 GT/s, 128b/130b), NVIDIA's for all NVLinks of an A100 (12 of 25
    # GB/s) and an H100 (18 of 25 GB/s), InfiniBand and Ethernet by their bits per second.
    # Seconds until a message begins to arrive: what such links usually need.
    "pcie3": (15.75e9, 10e-6),
    "pcie4": (31.5e9, 10e-6),
    "pcie5": (63.0e9, 10e-6),
    "nvlink-a100": (300e9, 6e-6),
    "nvlink": (450e9, 6e-6),
    "ethernet-10": (1.25e9, 40e-6),
    "ethernet-25": (3.125e9, 30e-6),
    "ethernet-100": (12.5e9, 20e-6),
    "infiniband-200": (25e9, 5e-6),
    "infiniband-400": (50e9, 5e-6),
}
REACHED = 0.8
"""Share of a line rate that large messages are taken to get."""
LinkName = Literal[
    "pcie3",
    "pcie4",
    "pcie5",
    "nvlink-a100",
    "nvlink",
    "ethernet-10",
    "ethernet-25",
    "ethernet-100",
    "infiniband-200",
    "infiniband-400",
]
RANKS = {
    "one": Layout(1, 1),
    "two": Layout(2, 1),
    "data-parallel": Layout(1, 2),
    "four": Layout(2, 2),
    "data-parallel-four": Layout(1, 4),
}
"""The rows of throughput.py that are predicted."""
TOLERATED = published.TOLERATED
MEASURED_RANKS = 2
"""Ranks between which exchange.py measures."""


@dataclass(frozen=True)
class Request:
    """How fast would it be?"""

    images_per_second: float = 16_487.0
    """Images/s that one device trains at --measured-batch. Default: the published fp16 figure of an
    A100 (a network without LRN)."""
    measured_batch: int = 3584
    """The batch at which that was measured."""
    memory_bandwidth: float = 1555.0
    """GB/s between a device and its memory, for the weights' update. Default: the A100's."""
    overhead: float = 500.0
    """Microseconds of a step that do not depend on its batch: about a hundred kernels' launches."""
    batch_size: int = 1024
    """Images in a step over all devices together, where the batch is fixed."""
    batch_per_device: int = 128
    """Images in a step for each device, where the batch grows with the devices."""
    value_bytes: int = 2
    """Bytes of an activation, kept or sent: 2 in half precision, 4 in float32. Weight gradients are
    float32."""
    link: LinkName = "pcie4"
    """Between devices of a node."""
    bandwidth: float = 0.0
    """GB/s that it reaches in one direction; 0: 0.8 of the named link's line rate."""
    latency: float = 0.0
    """Microseconds until a message begins to arrive; 0: the named link's."""
    between_nodes: LinkName = "ethernet-100"
    """Between nodes, for each device of them."""
    devices_per_node: int = 8
    """Devices that --link connects."""
    nodes: int = 128
    """The most nodes in the table."""
    published: bool = False
    """Predict TensorFlow's published rates on 1 to 8 P100 and K80 instead."""
    check: Annotated[str, arg(metavar="FILE")] = ""
    """throughput.py's JSON: its one-device rate is the device's, and its other rows are
    predicted."""
    exchange: Annotated[str, arg(metavar="FILE")] = ""
    """exchange.py's JSON: its latency and bandwidth are taken for the link."""
    plot: Annotated[str, arg(metavar="FILE")] = "scaling.png"
    """Where the picture goes; its ending says the format."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        for name in ("images_per_second", "memory_bandwidth"):
            check(
                getattr(self, name) > 0,
                f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive",
            )
        counts = ("measured_batch", "batch_size", "batch_per_device", "value_bytes")
        for name in (*counts, "devices_per_node", "nodes"):
            check(
                getattr(self, name) >= 1,
                f"--{name.replace('_', '-')} {getattr(self, name)}: one or more",
            )
        for name in ("bandwidth", "latency", "overhead"):
            check(
                getattr(self, name) >= 0,
                f"--{name} {getattr(self, name)}: must not be negative",
            )


def near_link(request: Request) -> Link:
    """The link between two devices of a node: measured, given by its numbers, or by its name."""
    if request.exchange:
        try:
            transfers = json.loads(Path(request.exchange).read_text(encoding="utf-8"))["transfers"]
            seconds = [(row["bytes"], row["ours_seconds"]) for row in transfers]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"--exchange {request.exchange}: not the JSON of exchange.py"
            ) from None
        return Link(
            max(size / taken for size, taken in seconds), min(taken for _, taken in seconds)
        )
    rate, latency = LINKS[request.link]
    return Link(1e9 * request.bandwidth or REACHED * rate, 1e-6 * request.latency or latency)


def build_model(request: Request, config: ModelConfig, share: int = 1) -> StepModel:
    """The model of the requested devices; `share` of them share one device's speed."""
    near, (rate, latency) = near_link(request), LINKS[request.between_nodes]
    cluster = Cluster(near, Link(REACHED * rate, latency), request.devices_per_node)
    model = StepModel(config, device_at(1, 1, 1, 1, 0), cluster, request.value_bytes)
    whole = device_at(
        request.images_per_second,
        request.measured_batch,
        1e9 * request.memory_bandwidth,
        model.parameters(1),
        1e-6 * request.overhead,
    )
    model.device = replace(whole, image=share * whole.image, update=share * whole.update)
    return model


# ---- predictions ----


def predictions(request: Request, model: StepModel) -> list[dict[str, Any]]:
    """One dictionary per scaling (strong: a fixed batch; weak: one that grows with the devices),
    number of devices and layout that has an image or more for each copy."""
    most = request.devices_per_node * request.nodes
    rows = []
    for scaling in ("strong", "weak"):
        for devices in (2**i for i in range(most.bit_length())):
            batch = (
                request.batch_size if scaling == "strong" else request.batch_per_device * devices
            )
            for layout in (Layout(1, devices), Layout(2, devices // 2)):
                if layout.copies and batch >= layout.copies:
                    alone = batch if scaling == "strong" else request.batch_per_device
                    single = model.rate(alone, Layout(1, 1))
                    rows.append({"scaling": scaling} | prediction(model, layout, batch, single))
    return rows


def prediction(model: StepModel, layout: Layout, batch: int, single: float) -> dict[str, Any]:
    """What a step of `batch` images costs in `layout`; its efficiency is 1 where each device adds
    the rate `single` of one device alone."""
    images = batch / layout.copies
    step = model.step(images, layout)
    rate = batch / step.total
    return {
        "devices": layout.devices,
        "layout": layout.name,
        "copies": layout.copies,
        "columns": layout.columns,
        "batch_size": batch,
        "memory_bytes_per_rank": round(model.memory(images, layout)),
        "crossing_bytes_per_rank": round(model.crossing_bytes(images, layout.columns)),
        "gradient_bytes_per_rank": round(model.gradient_bytes(layout)),
        **describe(step),
        "images_per_second": round(rate, 1),
        "efficiency": round(rate / layout.devices / single, 4),
    }


def level_batches(model: StepModel, rows: list[dict[str, Any]]) -> dict[int, float | None]:
    """By number of devices: the batch below which copies of two columns are faster."""
    counts = sorted({row["devices"] for row in rows if row["devices"] > 1})
    return {count: common.rounded(model.level_batch(count), 0) for count in counts}


# ---- the check on this machine ----


def checked(request: Request) -> tuple[list[dict[str, Any]], Request]:
    """What throughput.py measured beside the prediction from its one-device row, and the request
    with that row's rate."""
    try:
        measured = json.loads(Path(request.check).read_text(encoding="utf-8"))
        headline, cpu = measured["headline_case"], measured["machine"]["device"] == "cpu"
        rows = [
            row
            for row in measured["rows"]
            if row["row"] in RANKS
            and (row["mode"], row["precision"]) == ("training", headline["precision"])
            and "images_per_second" in row
        ]
        (one,) = [
            row
            for row in rows
            if row["row"] == "one" and row["batch_size"] == headline["batch_size"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"--check {request.check}: not the JSON of throughput.py with the row `one` in training"
        ) from None
    request = replace(
        request,
        images_per_second=one["images_per_second"],
        measured_batch=one["batch_size"],
        value_bytes=4 if one["precision"] == "fp32" else 2,
        overhead=0.0 if cpu else request.overhead,
    )
    config = preset("paper").with_fields(classes=one["classes"], image_size=one["image_size"]).model
    return [check_row(request, config, row, one, cpu) for row in rows if row is not one], request


def check_row(
    request: Request, config: ModelConfig, row: dict[str, Any], one: dict[str, Any], cpu: bool
) -> dict[str, Any]:
    """One measured row beside its prediction."""
    layout, batch = RANKS[row["row"]], row["batch_size"]
    model = build_model(request, config, layout.devices if cpu else 1)
    cluster = replace(model.cluster, devices_per_node=layout.devices)
    if cpu and layout.devices > 1:
        # One process has all cores; a rank has its share of them, and of what exchange.py's two
        # ranks had. gloo copies and sums on these cores, so that gradients hide behind nothing.
        near = cluster.near
        share = Link(near.bandwidth * MEASURED_RANKS / layout.devices, near.latency)
        cluster, model.overlap = replace(cluster, near=share), False
    model.cluster = cluster
    predicted, rate = model.rate(batch, layout), row["images_per_second"]
    alone = model.memory(one["batch_size"], Layout(1, 1))
    more = model.memory(batch / layout.copies, layout) - alone
    return {
        "row": row["row"],
        "ranks": layout.devices,
        "batch_size": batch,
        "measured": rate,
        "predicted": round(predicted, 1),
        "error": round(predicted / rate - 1, 4),
        "memory_above_one_device_bytes": row["memory_bytes_per_rank"]
        - one["memory_bytes_per_rank"],
        "memory_above_one_device_predicted_bytes": round(more),
    }


def check_reason(row: dict[str, Any], cpu: bool) -> str:
    """Why a row is off by more than TOLERATED, as far as the model leaves something out."""
    if row["ranks"] == 1:
        return "an image does not take the same time at every batch"
    if cpu and row["ranks"] > common.available_cores():
        return "more ranks than cores: each waits for the others' turns, which the model leaves out"
    if cpu:
        return "the ranks share cores, caches and memory, of which the model knows the cores alone"
    return "the exchange slows the computation down, which the model leaves out"


# ---- what is printed and drawn ----


def show(rows: list[dict[str, Any]], scaling: str) -> str:
    head = (
        "layout",
        "devices",
        "batch",
        "GB a rank",
        "MB columns",
        "MB gradients",
        "step, ms",
        "waits, ms",
        "images/s",
        "efficiency",
    )
    lines = [
        (
            row["layout"],
            f"{row['devices']:,}",
            f"{row['batch_size']:,}",
            f"{row['memory_bytes_per_rank'] / 1e9:.2f}",
            f"{row['crossing_bytes_per_rank'] / 1e6:.1f}",
            f"{row['gradient_bytes_per_rank'] / 1e6:.1f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * (row['exposed_crossings_seconds'] + row['exposed_gradients_seconds']):.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['efficiency']:.0%}",
        )
        for row in rows
        if row["scaling"] == scaling
    ]
    return common.table(head, lines)


def show_errors(rows: list[dict[str, Any]], title: str) -> str:
    """The rows of a check, `label` first."""
    return common.table(
        (title, "measured", "predicted", "error"),
        [
            (
                f"{row['row']}, {row['ranks']} ranks, batch {row['batch_size']}",
                f"{row['measured']:,.1f}",
                f"{row['predicted']:,.1f}",
                f"{row['error']:+.1%}",
            )
            for row in rows
        ],
    )


def print_check(rows: list[dict[str, Any]], cpu: bool) -> None:
    print("\n" + show_errors(rows, "against what was measured"))
    for row in rows:
        if abs(row["error"]) > TOLERATED:
            print(
                f"{row['row']}, {row['ranks']} ranks: off by {row['error']:+.0%}: "
                f"{check_reason(row, cpu)}"
            )
    for row in rows:
        print(
            f"{row['row']}: memory of a rank against one device "
            f"{row['memory_above_one_device_bytes'] / 1e9:+.2f} GB, "
            f"{row['memory_above_one_device_predicted_bytes'] / 1e9:+.2f} GB predicted"
        )


def print_published() -> list[dict[str, Any]]:
    """Prints the published rows beside their predictions, and returns all of them."""
    found = []
    for machine in published.MACHINES:
        rows = published.compare(machine)
        found += rows
        head = ("GPUs", "published", "predicted", "error", "without overlap", "error")
        lines = [
            (
                str(row["devices"]),
                f"{row['published']:,}",
                f"{row['predicted']:,.0f}",
                f"{row['error']:+.1%}",
                f"{row['predicted_without_overlap']:,.0f}",
                f"{row['error_without_overlap']:+.1%}",
            )
            for row in rows
        ]
        print(f"{machine.name}, variable_update {machine.update}, batch {published.IMAGES} a GPU")
        print(common.table(head, lines))
        if text := published.reason(machine, rows):
            print(textwrap.fill(f"off by more than {TOLERATED:.0%}: {text}", 100))
        print()
    return found


def draw(rows: list[dict[str, Any]], target: str, title: str) -> None:
    """Efficiency over devices for each layout, with a fixed batch and with one that grows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, scaling in zip(panels, ("strong", "weak"), strict=True):
        these = [row for row in rows if row["scaling"] == scaling]
        for name, mark in (("copies", "o"), ("copies of two columns", "s")):
            mine = [row for row in these if row["layout"] == name]
            axes.plot(
                [row["devices"] for row in mine],
                [row["images_per_second"] for row in mine],
                marker=mark,
                label=name,
            )
        counts = sorted({row["devices"] for row in these})
        single = these[0]["images_per_second"]
        axes.plot(
            counts,
            [count * single for count in counts],
            color="0.6",
            linestyle="--",
            label="as many times one device",
        )
        batch = f"{these[0]['batch_size']:,} images"
        what = f"{batch} in all" if scaling == "strong" else f"{batch} a device"
        axes.set(xscale="log", yscale="log", xlabel="devices", title=f"a step of {what}")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("images per second, predicted")
    figure.suptitle(title)
    figure.savefig(target, dpi=110)


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    if request.published:
        common.finish({"published": print_published()}, request.json)
        return 0
    check_rows: list[dict[str, Any]] = []
    if request.check:
        check_rows, request = checked(request)
    model = build_model(request, preset("paper").with_fields(classes=1000).model)
    rows = predictions(request, model)
    near = model.cluster.near
    print(
        f"one device: {request.images_per_second:,.0f} images/s at batch {request.measured_batch}; "
        f"link {near.bandwidth / 1e9:.2f} GB/s, {near.latency * 1e6:.0f} us; nodes of "
        f"{request.devices_per_node}, {request.between_nodes} between. Assumed:"
    )
    for line in ASSUMPTIONS:
        print(textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  "))
    print(
        f"\na fixed batch of {request.batch_size:,} images; efficiency against as many times one "
        f"device with all of them\n{show(rows, 'strong')}"
    )
    each = request.batch_per_device
    print(
        f"\n{each:,} images for each device; efficiency against as many times one device with "
        f"{each:,}\n{show(rows, 'weak')}"
    )
    levels = level_batches(model, rows)
    words = [
        f"{'always' if batch is None else f'{batch:,.0f}'} on {count:,}"
        for count, batch in levels.items()
    ]
    print(
        "\nCopies of two columns are faster below a batch of, by number of devices: "
        + ", ".join(words)
    )
    if request.check:
        print_check(check_rows, request.overhead == 0)
    where = f"{near.bandwidth / 1e9:.3g} GB/s in a node of {request.devices_per_node}"
    draw(rows, request.plot, f"{where}, {request.between_nodes} between nodes")
    print(f"plot in {request.plot}")
    common.finish(
        {
            "rows": rows,
            "level_batches": levels,
            "check": check_rows,
            "link": vars(near),
            "assumptions": ASSUMPTIONS,
            "request": vars(request),
        },
        request.json,
    )
    return 0


if __name__ == "__main__":
    run_main(main)
