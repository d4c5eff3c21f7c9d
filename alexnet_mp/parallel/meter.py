"""Counts what a rank sends, and times how long it waits for its peers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

TRAINING, EVALUATION = "training", "evaluation"

Timestamp: TypeAlias = "float | torch.cuda.Event"
"""Seconds of the host's clock, or an event on the device's current stream."""


@dataclass
class Exchange:
    """One exchange of this rank with all its peers, and when its parts happened."""

    layer: str
    direction: str
    """forward or backward."""
    group: str
    """The peers: column, those that hold the other columns; data, those that hold the same ones."""
    bytes: int
    """Sent to each peer."""
    sent: Timestamp
    asked: Timestamp
    """The wait begins."""
    arrived: Timestamp
    """All peers' parts are here; with NCCL, which does not tell, as `received`."""
    received: Timestamp
    """The wait is over."""


class Meter:
    """Values and bytes that this rank sends, by (phase, layer, direction); seconds by phase.

    A phase is "training", "evaluation", "control" or "checkpoint"; a direction is "forward" or
    "backward".

    `in_flight_seconds` last from each send to the end of its wait, `exposed_seconds` from the
    beginning of the wait: that part of the exchange has no work beside it, the rest is hidden. Both
    are read off the host's clock. NCCL lets the GPU wait instead of the host; to see that, set
    `times_device`, and call `resolve_device_times` where the device has been synchronized.

        meter = Meter()
        half = AlexNet(config, (rank,), GroupLink(group, meter))
        half(images)
        meter.total_values("conv3", "forward", "training") / len(images)  # 21,632 in paper
    """

    def __init__(self) -> None:
        self.phase = TRAINING
        self.values: dict[tuple[str, str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str, str], int] = defaultdict(int)
        self.exposed_seconds: dict[str, float] = defaultdict(float)
        self.in_flight_seconds: dict[str, float] = defaultdict(float)
        self.exchanges: list[Exchange] | None = None
        """Each exchange with its times, for as long as this is a list."""
        self.times_device = False
        self._unresolved: list[
            tuple[str, torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]
        ] = []

    def count(self, layer: str, direction: str, sent: Tensor, copies: int = 1) -> None:
        """`copies` of `sent` leave this rank."""
        key = (self.phase, layer, direction)
        self.values[key] += copies * sent.numel()
        self.bytes[key] += copies * sent.numel() * sent.element_size()

    def total_bytes(self, phase: str = TRAINING) -> int:
        """All bytes sent so far in `phase`, both directions."""
        return sum(count for (counted_in, _, _), count in self.bytes.items() if counted_in == phase)

    def total_values(self, layer: str, direction: str, phase: str = TRAINING) -> int:
        """Values sent so far for one layer in one direction."""
        return self.values.get((phase, layer, direction), 0)

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Counts what is sent inside the block under `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def timestamp(self, device_waits: bool = False) -> Timestamp:
        """Now. `device_waits`: what is timed makes the GPU wait, not the host."""
        if not (device_waits and self.times_device):
            return time.perf_counter()
        new_event = cast(Callable[..., torch.cuda.Event], torch.cuda.Event)  # it has no types
        event = new_event(enable_timing=True)
        event.record()
        return event

    def add_wait(self, sent: Timestamp, asked: Timestamp, arrived: Timestamp) -> None:
        """A transfer left at `sent`, was waited for from `asked` on, and was there at `arrived`."""
        if isinstance(sent, float) and isinstance(asked, float) and isinstance(arrived, float):
            self.exposed_seconds[self.phase] += arrived - asked
            self.in_flight_seconds[self.phase] += arrived - sent
        elif not (
            isinstance(sent, float) or isinstance(asked, float) or isinstance(arrived, float)
        ):
            # Reading an event before it has happened would stop the host.
            self._unresolved.append((self.phase, sent, asked, arrived))

    def resolve_device_times(self) -> None:
        """Adds up the waits that were timed on the device, which has been synchronized since."""
        for phase, sent, asked, arrived in self._unresolved:
            self.exposed_seconds[phase] += asked.elapsed_time(arrived) / 1000  # milliseconds
            self.in_flight_seconds[phase] += sent.elapsed_time(arrived) / 1000
        self._unresolved.clear()
