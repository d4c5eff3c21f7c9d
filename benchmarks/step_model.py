"""Time, bytes and memory of one training step on many devices, computed from a few numbers.

Start with `StepModel`. Nothing here is measured: `ASSUMPTIONS` says what is taken for granted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alexnet_mp.config import ModelConfig
from alexnet_mp.model.layer_table import layer_table

UPDATE_PASSES = 6
"""Passes over the weights in an update: the gradient is written and read, weight and velocity are
read and written."""
BACKWARD = 2 / 3
"""Share of a layer's work that the backward pass has: two products of three."""
BUFFERS = 3
"""float32 tensors that a rank holds of each of its parameters: weight, gradient, velocity."""
NORMALIZED = ("conv1", "conv2")
"""Layers with response normalization, where a network has it."""
MOST_IMAGES = 2.0**24
"""The largest batch for which two layouts are compared."""
ASSUMPTIONS = (
    "An image takes the same time whatever the batch; a step has a fixed overhead beside it.",
    "A column takes half of an image's time, and half of the update's.",
    "The update of the weights is as fast as the device's memory.",
    "A crossing hides behind its layer's own half, as in this package; fc8's sum hides behind "
    "nothing.",
    "Gradients are reduced layer by layer, as soon as each is there (DistributedDataParallel), in "
    "float32, by rings inside a node; between nodes each device carries its share, and latency "
    "grows with the logarithm of the nodes.",
    "Crossings and gradients do not slow each other down. All nodes are equally fast; reading "
    "images, evaluation and checkpoints cost nothing.",
    "Memory is that of tensors which must be there: weights, gradients, velocities, "
    "DistributedDataParallel's buckets, what backward needs of each layer. Workspaces, the "
    "allocator and the libraries come on top.",
)


@dataclass(frozen=True)
class Link:
    """Bytes per second in one direction, and seconds before the first arrives."""

    bandwidth: float
    latency: float

    def seconds(self, count: float) -> float:
        return self.latency + count / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal size. `near` is a device's link in its node, `far` its share of the node's."""

    near: Link
    far: Link
    devices_per_node: int

    def all_reduce(self, count: float, ranks_in_node: int, nodes: int) -> float:
        """Seconds to sum `count` bytes over `ranks_in_node` ranks in each of `nodes` nodes."""
        within = 2 * (ranks_in_node - 1)
        seconds = within * self.near.seconds(count / ranks_in_node)
        if nodes > 1:
            share = count / ranks_in_node
            seconds += 2 * (nodes - 1) / nodes * share / self.far.bandwidth
            seconds += 2 * math.ceil(math.log2(nodes)) * self.far.latency
        return seconds


@dataclass(frozen=True)
class Device:
    """Seconds that one device with the whole network takes."""

    image: float
    """For one image, forward and backward."""
    update: float
    """For one update of all weights."""
    overhead: float = 0.0
    """For each step, whatever its batch: the launches of its kernels."""

    @staticmethod
    def of(rate: float, batch: float, update: float, overhead: float = 0.0) -> Device:
        """The device that trains `rate` images per second at `batch`; `update` and `overhead`, in
        seconds, are cut where they would take more than half of that step."""
        step = batch / rate
        fixed = min(1.0, 0.5 * step / (update + overhead)) if update + overhead else 1.0
        image = (step - fixed * (update + overhead)) / batch
        return Device(image, fixed * update, fixed * overhead)


@dataclass(frozen=True)
class Layout:
    """`copies` of the network, each on `columns` devices."""

    columns: int
    copies: int

    @property
    def devices(self) -> int:
        return self.columns * self.copies

    @property
    def name(self) -> str:
        return "copies" if self.columns == 1 else "copies of two columns"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what the device does in them."""

    work: float
    """Forward, backward, update and overhead."""
    crossings: float
    """Waiting for the other column."""
    gradients: float
    """Waiting for the sums of gradients."""

    @property
    def total(self) -> float:
        return self.work + self.crossings + self.gradients


class StepModel:
    """Steps of a network of one or two columns; `value_bytes` of each value that crosses.

    `overlap`: gradients are reduced during the backward pass; otherwise after it.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: Device,
        cluster: Cluster,
        value_bytes: int,
        overlap: bool = True,
    ) -> None:
        self.config, self.device, self.cluster = config, device, cluster
        self.value_bytes, self.overlap = value_bytes, overlap
        self.rows = layer_table(config)
        # Column 0's, which has the bias of fc8 too.
        self.layers = {row["layer"]: row for row in self.rows if row["column"] == 0}

    # ---- sizes ----

    @cached_property
    def work(self) -> int:
        """Multiply-adds of one column for an image, forward."""
        return sum(row["multiply_adds"] for row in self.layers.values())

    def parameters(self, columns: int, layer: str | None = None) -> int:
        """Parameters that a rank holds, of one layer or of all."""
        rows = self.rows if columns == 1 else self.layers.values()
        return sum(row["parameters"] for row in rows if layer in (None, row["layer"]))

    def crossing_bytes(self, rows: float, columns: int) -> float:
        """Bytes that a rank sends to the other column in a step of `rows` images.

        Each crossing's inputs travel forward and their gradients backward; fc8's logits travel
        once, because the gradient of a sum is on every rank already.
        """
        if columns == 1:
            return 0.0
        sent = {layer: row["sends"] for layer, row in self.layers.items()}
        values = sum((1 if layer == "fc8" else 2) * count for layer, count in sent.items())
        return (columns - 1) * values * rows * self.value_bytes

    def gradient_bytes(self, layout: Layout) -> float:
        """Bytes of gradients that a rank sends in a step: of n it sends 2 (copies - 1) / copies n,
        by a ring or by rings inside nodes and between them alike."""
        count = 4 * self.parameters(layout.columns)
        return 2 * (layout.copies - 1) / layout.copies * count

    def memory(self, rows: float, layout: Layout) -> float:
        """Bytes of the tensors that a rank holds at the end of a forward pass of `rows` images."""
        buffers = BUFFERS + (layout.copies > 1)  # DistributedDataParallel has buckets of its own
        weights = 4 * buffers * self.parameters(layout.columns)
        return weights + rows * self.activation_bytes(layout.columns)

    def activation_bytes(self, columns: int) -> float:
        """Bytes that the backward pass needs of an image.

        A normalized and pooled layer keeps its input and a byte for the place of each maximum,
        torch's pooling alone eight bytes; a hidden layer its output, its mask and their product.
        What fc6 reads is once more there, flattened.
        """
        config, sizes = self.config, self.config.map_sizes()
        padded = config.image_size + sum(config.conv1_padding[:2])
        values, places = float(3 * padded**2), 0.0
        columns_here = config.columns if columns == 1 else 1
        names = [name for name in config.layers if name.startswith("conv")]
        for name, below in zip(names, [*names[1:], "fc6"], strict=True):
            row = self.layers[name]
            values += columns_here * math.prod(row["output"])
            if math.prod(sizes[below]) < math.prod(row["output"][1:]):
                pooled = columns_here * row["output"][0] * math.prod(sizes[below])
                fused = config.lrn and name in NORMALIZED
                values += pooled if below != "fc6" else 2 * pooled
                places += pooled if fused else 8 * pooled
        for units in config.hidden:
            values += columns_here * 3 * units
        if columns > 1:  # the other columns' part of what a crossing reads
            arrived = [row["sends"] for layer, row in self.layers.items() if layer != "fc8"]
            values += (columns - 1) * sum(arrived)
        return values * self.value_bytes + places

    # ---- times ----

    def step(self, rows: float, layout: Layout) -> StepTime:
        """The time of a step in which each copy of the network has `rows` images."""
        device, columns = self.device, layout.columns
        work = (rows * device.image + device.update) / columns + device.overhead
        crossings = 0.0
        if columns > 1:
            crossings = sum(self._exposed_crossing(layer, rows) for layer in self._crossings)
        return StepTime(work, crossings, self._exposed_gradients(rows, layout))

    def rate(self, batch: float, layout: Layout) -> float:
        """Images per second at `batch` images over all devices together."""
        return batch / self.step(batch / layout.copies, layout).total

    def level_batch(self, devices: int) -> float | None:
        """The batch, over all devices together, at which copies of two columns are as fast as
        copies. Below it the columns are faster; None where one layout is faster at every batch."""
        copies, pairs = Layout(1, devices), Layout(2, devices // 2)

        def columns_lead(batch: float) -> bool:
            return self.rate(batch, pairs) > self.rate(batch, copies)

        low, high = float(devices), MOST_IMAGES
        if columns_lead(low) == columns_lead(high):
            return None
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if columns_lead(middle) else (low, middle)
        return (low + high) / 2

    @property
    def _crossings(self) -> list[str]:
        return [layer for layer, row in self.layers.items() if row["sends"]]

    @property
    def _peer_link(self) -> Link:
        cluster = self.cluster
        return cluster.near if cluster.devices_per_node > 1 else cluster.far

    def _exposed_crossing(self, layer: str, rows: float) -> float:
        """The seconds of one crossing that its own layer's half does not hide."""
        row = self.layers[layer]
        transfer = self._peer_link.seconds(rows * row["sends"] * self.value_bytes)
        if layer == "fc8":
            return transfer  # a sum at the very end; its gradient is everywhere
        # A rank has half of the network, and half of what a crossing multiplies is its own.
        own = rows * self.device.image / 2 * row["multiply_adds"] / self.work / 2
        forward, backward = own * (1 - BACKWARD), own * BACKWARD
        return max(0.0, transfer - forward) + max(0.0, transfer - backward)

    def _exposed_gradients(self, rows: float, layout: Layout) -> float:
        """The seconds from the end of the backward pass to the last layer's sum of gradients."""
        if layout.copies == 1:
            return 0.0
        columns, size = layout.columns, self.cluster.devices_per_node
        # With one device a node, a column's ranks meet in the other nodes only.
        ranks_in_node = max(1, min(layout.devices, size) // columns)
        nodes = math.ceil(layout.copies / ranks_in_node)
        now = free = 0.0
        for layer, row in reversed(self.layers.items()):
            share = row["multiply_adds"] / self.work
            now += rows * self.device.image / columns * share * BACKWARD
            count = 4 * self.parameters(columns, layer)
            start = max(free, now) if self.overlap else free
            free = start + self.cluster.all_reduce(count, ranks_in_node, nodes)
        return max(0.0, free - now) if self.overlap else free


def device_at(
    model_rate: float, batch: float, bandwidth: float, parameters: int, overhead: float
) -> Device:
    """The device with `model_rate` images/s at `batch` whose memory has `bandwidth` bytes/s."""
    return Device.of(model_rate, batch, UPDATE_PASSES * 4 * parameters / bandwidth, overhead)


def describe(step: StepTime) -> dict[str, Any]:
    """The parts of a step for the JSON, in seconds."""
    return {
        "seconds": round(step.total, 7),
        "exposed_crossings_seconds": round(step.crossings, 7),
        "exposed_gradients_seconds": round(step.gradients, 7),
    }
