#!/usr/bin/env python
"""Predicts training speed on a device, two columns, copies, and copies of two columns.

    python benchmarks/scaling_model.py --images-per-second 16487 --link pcie4 --devices-per-node 8
    python benchmarks/scaling_model.py --check throughput.json --exchange exchange.json

A model of four numbers: the device's computing speed, the bytes that an update of the weights reads
and writes, and a link's latency and bandwidth. Transfers are hidden behind the work that this
package (columns) or DistributedDataParallel (copies) has beside them, no further. A table, a plot,
and JSON as the last line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import common
from tyro.conf import arg

from alexnet_mp import preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import ModelConfig, check
from alexnet_mp.model.layer_table import layer_table

# Line rates in one direction, of 16 lanes or of all links of an H100, as their standards and makers
# print them; a start takes what such links
# usually need. REACHED of the rate is what large messages are taken to get.
LINKS = {
    "pcie3": (15.75e9, 10e-6),
    "pcie4": (31.5e9, 10e-6),
    "pcie5": (63.0e9, 10e-6),
    "nvlink": (450e9, 6e-6),
    "ethernet-10": (1.25e9, 40e-6),
    "ethernet-25": (3.125e9, 30e-6),
    "ethernet-100": (12.5e9, 20e-6),
}
REACHED = 0.8
LinkName = Literal[
    "pcie3", "pcie4", "pcie5", "nvlink", "ethernet-10", "ethernet-25", "ethernet-100"
]
# Passes over the weights in an update: gradient written and read, weight and velocity read and
# written.
PASSES = 6


@dataclass(frozen=True)
class Request:
    """How fast would it be?"""

    images_per_second: float = 16_487.0
    """Images/s that one device trains at --batch-size. Default: the published fp16 figure of an
    A100 (a network without LRN, at batch 3,584)."""
    memory_bandwidth: float = 1555.0
    """GB/s between a device and its memory, for the weights' update. Default: the A100's."""
    batch_size: int = 128
    """Images in a step, over all devices together."""
    scale_batch: bool = False
    """Keep --batch-size for each copy of the network, so that the whole batch grows with the
    copies."""
    value_bytes: int = 2
    """Bytes of a value that crosses: 2 in half precision, 4 in float32. Weight gradients are
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
    nodes: int = 16
    """The most nodes in the table."""
    check: Annotated[str, arg(metavar="FILE")] = ""
    """throughput.py's JSON: its one-device rate is the device's, and its other rows are
    predicted."""
    exchange: Annotated[str, arg(metavar="FILE")] = ""
    """exchange.py's JSON: its latency and bandwidth are taken for the link."""
    plot: Annotated[str, arg(metavar="FILE")] = "plan.png"
    """Where the picture goes; its ending says the format."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        for name in ("images_per_second", "memory_bandwidth"):
            check(
                getattr(self, name) > 0,
                f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive",
            )
        for name in ("batch_size", "value_bytes", "devices_per_node", "nodes"):
            check(
                getattr(self, name) >= 1,
                f"--{name.replace('_', '-')} {getattr(self, name)}: one or more",
            )
        check(
            self.bandwidth >= 0 and self.latency >= 0,
            f"--bandwidth {self.bandwidth} --latency {self.latency}: must not be negative",
        )


@dataclass(frozen=True)
class Link:
    """Bytes per second in one direction, and seconds before the first arrives."""

    bandwidth: float
    latency: float

    def seconds(self, count: float) -> float:
        return self.latency + count / self.bandwidth


@dataclass(frozen=True)
class Device:
    """Returns seconds for one image's forward and backward, and for one update of all weights."""

    image: float
    update: float


class Plan:
    """Step times of the paper's network."""

    def __init__(
        self,
        device: Device,
        near: Link,
        far: Link,
        devices_per_node: int,
        value_bytes: int,
        config: ModelConfig | None = None,
    ) -> None:
        self.device, self.near, self.far, self.devices_per_node, self.value_bytes = (
            device,
            near,
            far,
            devices_per_node,
            value_bytes,
        )
        self.config = config or preset("paper").with_fields(classes=1000).model
        self.layers = {row["layer"]: row for row in layer_table(self.config) if row["column"] == 0}
        self.work = sum(row["multiply_adds"] for row in self.layers.values())  # of one column
        self.gradients = 4 * 2 * sum(row["parameters"] for row in self.layers.values())
        height, width = self.config.map_sizes()["fc6"]
        maps = self.layers["conv3"]["output"][1] * self.layers["conv3"]["output"][2]
        self.crossing = {
            "conv3": self.config.kernels[1] * maps,
            "fc6": self.config.kernels[4] * height * width,
            "fc7": self.config.hidden[0],
            "fc8": self.config.classes,
        }

    def step(self, rows: float, columns: int = 1, copies: int = 1) -> float:
        """Returns seconds of a step of `copies` copies, each on `columns` devices with `rows`
        images."""
        seconds = (rows * self.device.image + self.device.update) / columns
        if columns > 1:
            seconds += sum(self.exposed(layer, rows) for layer in self.crossing)
        return seconds + self.exposed_gradients(rows, columns, copies)

    def exposed(self, layer: str, rows: float) -> float:
        """Returns the seconds of one crossing that its own layer's half does not hide."""
        transfer = self.near.seconds(rows * self.crossing[layer] * self.value_bytes)
        if layer == "fc8":
            return transfer  # a sum at the very end; its gradient is everywhere
        own = rows * self.device.image / 2 * self.layers[layer]["multiply_adds"] / 2 / self.work
        return max(0.0, transfer - own / 3) + max(
            0.0, transfer - own * 2 / 3
        )  # backward is two of three products

    def exposed_gradients(self, rows: float, columns: int, copies: int) -> float:
        """Returns the seconds of the gradients' ring beyond the backward pass of the
        convolutions."""
        if copies == 1:
            return 0.0
        slower = Link(
            min(self.near.bandwidth, self.far.bandwidth), max(self.near.latency, self.far.latency)
        )
        link = (
            self.near if copies * columns <= self.devices_per_node else slower
        )  # a ring over nodes passes through both kinds
        ring = 2 * (copies - 1) * link.seconds(self.gradients / columns / copies)
        convolutions = (
            sum(
                row["multiply_adds"] for name, row in self.layers.items() if name.startswith("conv")
            )
            / self.work
        )
        return max(0.0, ring - rows * self.device.image / columns * convolutions * 2 / 3)


def device_of(rate: float, batch: int, bandwidth: float, gradients: float) -> Device:
    """From images per second at `batch`, with an update that is as fast as the memory."""
    update = min(PASSES * gradients / bandwidth, 0.5 * batch / rate)
    return Device((batch / rate - update) / batch, update)


def predictions(request: Request, plan: Plan) -> list[dict[str, Any]]:
    """One dictionary per number of devices and arrangement."""
    rows, counts = [], [2**i for i in range(20) if 2**i <= request.devices_per_node * request.nodes]
    for devices in counts:
        for name, columns in (("copies", 1), ("copies of two columns", 2)):
            copies = devices // columns
            whole = request.batch_size * (copies if request.scale_batch else 1)
            if copies and whole >= copies:
                rows.append(
                    {
                        "devices": devices,
                        "arrangement": name,
                        "copies": copies,
                        "columns": columns,
                        "batch_size": whole,
                        "images_per_second": round(
                            whole / plan.step(whole / copies, columns, copies), 1
                        ),
                    }
                )
    return rows


def checked(request: Request, near: Link) -> tuple[list[dict[str, Any]], float]:
    """Returns what throughput.py measured beside the prediction from its one-device row, and its
    rate."""
    try:
        measured = json.loads(Path(request.check).read_text(encoding="utf-8"))
        rows = {
            row["row"]: row
            for row in measured["rows"]
            if row.get("mode") == "training"
            and "images_per_second" in row
            and (row["batch_size"], row["precision"])
            == (measured["headline_case"]["batch_size"], measured["headline_case"]["precision"])
        }
        one = rows["one"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(
            f"--check {request.check}: not the JSON of throughput.py with the row `one` in training"
        ) from None
    # On a CPU one process has all cores; a rank has its share of them and of the memory.
    share = 2 if measured["machine"]["device"] == "cpu" else 1
    config = preset("paper").with_fields(classes=one["classes"], image_size=one["image_size"]).model
    batch, bytes_each = one["batch_size"], 4 if one["precision"] == "fp32" else 2
    gradients = Plan(Device(1, 1), near, near, 2, bytes_each, config).gradients
    whole = device_of(one["images_per_second"], batch, 1e9 * request.memory_bandwidth, gradients)
    plan = Plan(
        Device(share * whole.image, share * whole.update), near, near, 2, bytes_each, config
    )
    predicted = {
        "two": batch / plan.step(batch, 2, 1),
        "data-parallel": batch / plan.step(batch / 2, 1, 2),
    }
    found = {name: rows[name]["images_per_second"] for name in predicted if name in rows}
    return [
        {
            "row": name,
            "measured": rate,
            "predicted": round(predicted[name], 1),
            "error": round(predicted[name] / rate - 1, 4),
        }
        for name, rate in found.items()
    ], one["images_per_second"]


def link_of(request: Request) -> Link:
    """The link between two devices: measured, given by its numbers, or by its name."""
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


def draw(rows: list[dict[str, Any]], target: str, title: str) -> None:
    """Images per second over devices, for each arrangement."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, mark in (("copies", "o"), ("copies of two columns", "s")):
        mine = [row for row in rows if row["arrangement"] == name]
        axes.plot(
            [row["devices"] for row in mine],
            [row["images_per_second"] for row in mine],
            marker=mark,
            label=name,
        )
    counts = sorted({row["devices"] for row in rows})
    axes.plot(
        counts,
        [count * rows[0]["images_per_second"] for count in counts],
        color="0.6",
        linestyle="--",
        label="without any exchange",
    )
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="images per second", title=title)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    near = link_of(request)
    rate, latency = LINKS[request.between_nodes]
    plan = Plan(
        Device(1, 1),
        near,
        Link(REACHED * rate, latency),
        request.devices_per_node,
        request.value_bytes,
    )
    check_rows: list[dict[str, Any]] = []
    if request.check:
        check_rows, measured = checked(request, near)
        request = replace(request, images_per_second=measured)
    plan.device = device_of(
        request.images_per_second,
        request.batch_size,
        1e9 * request.memory_bandwidth,
        plan.gradients,
    )
    rows = predictions(request, plan)
    print(
        f"one device: {request.images_per_second:,.0f} images/s at batch {request.batch_size}; "
        f"link {near.bandwidth / 1e9:.2f} GB/s, "
        f"{near.latency * 1e6:.0f} us; batch "
        f"{'of each copy' if request.scale_batch else 'of all devices together'}"
    )
    print(
        common.table(
            ("arrangement", "devices", "copies", "batch", "images/s"),
            [
                (
                    row["arrangement"],
                    str(row["devices"]),
                    str(row["copies"]),
                    f"{row['batch_size']:,}",
                    f"{row['images_per_second']:,.0f}",
                )
                for row in rows
            ],
        )
    )
    if check_rows:
        print(
            "\n"
            + common.table(
                ("against what was measured", "measured", "predicted", "error"),
                [
                    (
                        row["row"],
                        f"{row['measured']:.1f}",
                        f"{row['predicted']:.1f}",
                        f"{row['error']:+.1%}",
                    )
                    for row in check_rows
                ],
            )
        )
    draw(
        rows,
        request.plot,
        f"predicted: {near.bandwidth / 1e9:.3g} GB/s in a node of {request.devices_per_node}, "
        f"{request.between_nodes} between",
    )
    print(f"plot in {request.plot}")
    common.finish(
        {"rows": rows, "check": check_rows, "link": vars(near), "request": vars(request)},
        request.json,
    )
    return 0


if __name__ == "__main__":
    run_main(main)
