"""One training step of all ranks on one clock: each layer's block, each message, each wait.

A step is a plain dictionary, what timeline.json holds and `plotting/timeline.py` draws:

    {"step": 14, "device": "cpu", "batch": 32, "column_ranks": 2, "data_ranks": 1,
     "ranks": [{"rank": 0, "columns": [0], "seconds": 0.61, "exposed_seconds": 0.002,
                "blocks": [{"layer": "conv3", "pass": "forward", "half": "own",
                            "begin": 0.101, "end": 0.114}, ...],
                "waits": [{"layer": "conv3", "pass": "forward", "half": "",
                           "begin": 0.114, "end": 0.115}, ...]
               }, ...],
     "messages": [{"layer": "conv3", "pass": "forward", "from": 0, "to": 1, "bytes": 2768896,
                   "sent": 0.099, "arrived": 0.103}, ...]}

Times are seconds since the first rank began the step. `step_recorder.py` records the ranks' parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

FORWARD, BACKWARD, BETWEEN = "forward", "backward", "between"
"""Passes; `between` is what lies between a backward and the next forward pass."""


@dataclass(frozen=True)
class Span:
    """A block of work or a wait, in seconds since its rank began the step."""

    layer: str
    direction: str
    begin: float
    end: float
    half: str = ""
    """Of a crossing: own or peers."""

    def as_record(self, later: float) -> dict[str, Any]:
        """The span as timeline.json has it, `later` by that many seconds."""
        return {
            "layer": self.layer,
            "pass": self.direction,
            "half": self.half,
            "begin": round(self.begin + later, 6),
            "end": round(self.end + later, 6),
        }


@dataclass(frozen=True)
class TimedExchange:
    """An exchange of one rank with its `peers`, in seconds since that rank began the step."""

    layer: str
    direction: str
    peers: tuple[int, ...]
    bytes: int
    """Sent to each peer."""
    sent: float
    asked: float
    arrived: float
    received: float


@dataclass
class RankStep:
    """One step on one rank. `wall` is the system time at which it began."""

    rank: int
    columns: tuple[int, ...]
    number: int
    wall: float
    seconds: float
    exposed_seconds: float
    """That the meter counted."""
    blocks: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    exchanges: list[TimedExchange] = field(default_factory=list)


def cut(
    blocks: Sequence[Span], exchanges: Sequence[TimedExchange], gaps: Sequence[Span]
) -> list[Span]:
    """The blocks without the `gaps`, in which the rank waited, and the crossings' in their halves.

    In the forward pass a crossing multiplies its own half before it waits, and the peers' half
    afterwards. In backward the gradient for the peers leaves between the two, the peers' half
    first.
    """
    pieces = []
    for block in blocks:
        here = [x for x in exchanges if block.begin <= x.asked < block.end]
        places = {block.begin, block.end}
        for gap in gaps:
            places |= {place for place in (gap.begin, gap.end) if block.begin < place < block.end}
        turn = None  # where one half ends and the other begins
        if here and block.direction == FORWARD:
            turn, halves = here[0].asked, ("own", "peers")
        elif here and block.direction == BACKWARD and here[0].sent >= block.begin:
            turn, halves = here[0].sent, ("peers", "own")
            places.add(turn)
        bounds = sorted(places)
        for begin, end in pairwise(bounds):
            if any(gap.begin <= begin < gap.end for gap in gaps):
                continue
            half = "" if turn is None else halves[begin >= turn]
            pieces.append(replace(block, begin=begin, end=end, half=half))
    return pieces


def merge(ranks: Sequence[RankStep]) -> dict[str, Any]:
    """`ranks` and `messages` of timeline.json, from one step's records of all ranks.

    The clocks of one host are one. Those of several agree as far as their system times do.
    """
    later = {step.rank: step.wall - min(step.wall for step in ranks) for step in ranks}
    return {
        "ranks": [
            {
                "rank": step.rank,
                "columns": list(step.columns),
                "seconds": round(step.seconds, 6),
                "exposed_seconds": round(step.exposed_seconds, 6),
                "blocks": [span.as_record(later[step.rank]) for span in step.blocks],
                "waits": [span.as_record(later[step.rank]) for span in step.waits],
            }
            for step in ranks
        ],
        "messages": messages(ranks, later),
    }


def messages(ranks: Sequence[RankStep], later: dict[int, float]) -> list[dict[str, Any]]:
    """A message for each rank, exchange and peer, in the order in which they were sent.

    The k-th exchange of a layer and direction on one rank is the k-th on each of its peers.
    """
    sides: dict[tuple[int, str, str, int], TimedExchange] = {}
    for step in ranks:
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for exchange in sorted(step.exchanges, key=lambda exchange: exchange.sent):
            key = (exchange.layer, exchange.direction)
            sides[step.rank, exchange.layer, exchange.direction, seen[key]] = exchange
            seen[key] += 1
    found: list[dict[str, Any]] = []
    for (sender, layer, direction, number), exchange in sides.items():
        for receiver in exchange.peers:
            theirs = sides.get((receiver, layer, direction, number))
            if theirs is not None:
                found.append(
                    {
                        "layer": layer,
                        "pass": direction,
                        "from": sender,
                        "to": receiver,
                        "bytes": exchange.bytes,
                        "sent": round(exchange.sent + later[sender], 6),
                        "arrived": round(theirs.arrived + later[receiver], 6),
                    }
                )
    return sorted(found, key=lambda message: float(message["sent"]))
