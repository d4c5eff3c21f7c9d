"""One training step as rows of time: what each rank works on, its messages, its waits.

A step is the dictionary in a profiled run's timeline.json (`training/step_timeline.py` lists its
keys); times are in seconds. The forward pass is drawn above, backward and the update below, each on
a scale of its own; a step whose batch was computed in parts (`--accumulate`) has one scale. The
messages of a rank lie in rows beside its work: a bar while one is on its way, an arrow from its
sending to its arrival at the peer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from alexnet_mp.plotting.fonts import text_width
from alexnet_mp.plotting.page import Page, save_figure

Record = Mapping[str, Any]

CONV_COLOR, FC_COLOR, OTHER_COLOR = "#9ec5e8", "#a8d8a0", "#dedede"
WAIT_COLOR, MESSAGE_COLOR, ARROW_COLOR = "#d62728", "#f5b041", "#555555"
PALE = 0.45
"""Opacity of the peers' half of a crossing."""

WIDTH, LEFT, RIGHT = 8.3, 0.85, 0.12  # inches; a README shows 830 pixels
WORK, LANE, GAP, BETWEEN_RANKS = 0.3, 0.15, 0.05, 0.3  # heights in inches
BLOCK_SIZE, SMALL_SIZE = 8.0, 7.0  # points
PIXELS_PER_INCH = 160  # nearly two for one of the README, for sharp screens

PANELS: dict[str, tuple[str, ...]] = {
    "Forward": ("forward",),
    "Backward and update": ("backward", "between"),
}
ONE_PANEL = {"Forward, backward and update": ("forward", "backward", "between")}


@dataclass(frozen=True)
class _Placed:
    """A message in one of the rows of its sender; `label_at` is in seconds."""

    message: Record
    row: int
    label_at: float
    align: str


@dataclass(frozen=True)
class _Lanes:
    """A rank's messages in rows. None overlaps with its neighbors or their labels."""

    messages: list[_Placed]
    count: int

    @property
    def height(self) -> float:
        return LANE * self.count


def draw_timeline(step: Record, path: str | Path | None = None) -> Figure:
    """Draws one step of all its ranks, and writes it to `path` if that is given.

    Blocks are layers with what follows them (ReLU, norm, pooling, dropout), the paler part of a
    crossing is its peers' half, red is waiting. Raises ValueError for a step without blocks.
    """
    if not any(rank["blocks"] for rank in step["ranks"]):
        raise ValueError("no blocks: there is nothing to draw")
    chosen = ONE_PANEL if _goes_forward_again(step) else PANELS
    panels = [_Panel(step, title, passes) for title, passes in chosen.items()]
    head, foot = 0.42, 0.42
    page = Page(WIDTH, head + sum(panel.height for panel in panels) + foot)
    page.text(0.08, 0.22, _title(step), size=10, weight="bold")
    top = head
    for panel in panels:
        panel.draw(page, top)
        top += panel.height
    _legend(page, top + 0.12, step)
    return save_figure(page.figure, path, PIXELS_PER_INCH)


class _Panel:
    """Some passes of a step, on one axis of time."""

    def __init__(self, step: Record, title: str, passes: Sequence[str]) -> None:
        self.step, self.passes = step, passes
        self.ranks = step["ranks"]
        spans = [
            span
            for rank in self.ranks
            for span in (*rank["blocks"], *rank["waits"])
            if span["pass"] in passes
        ]
        self.begin = min((span["begin"] for span in spans), default=0.0)
        self.end = max((span["end"] for span in spans), default=1.0)
        self.title = f"{title}: {1e3 * (self.end - self.begin):,.0f} ms"
        self.inches = (WIDTH - LEFT - RIGHT) / (self.end - self.begin)  # of a second
        self.sent = [message for message in step["messages"] if message["pass"] in passes]
        self.lanes = {rank["rank"]: self._lanes(rank["rank"]) for rank in self.ranks}
        self._place_rows()

    def _lanes(self, rank: int) -> _Lanes:
        """Each message that `rank` sends in a row in which there is place for it and its label."""
        ends: list[float] = []  # of what is in each row, in seconds
        placed = []
        for message in self.sent:
            if message["from"] != rank:
                continue
            begin, end = message["sent"], message["arrived"]
            space = 0.04 / self.inches
            label = text_width(_message_label(message), SMALL_SIZE) / self.inches + 2 * space
            align, label_at = "left", begin + space  # on the bar
            if label > end - begin and end + label <= self.end:  # behind it
                label_at, end = end + space, end + label
            elif label > end - begin:  # before it
                align, label_at, begin = "right", begin - space, begin - label
            row = next((n for n, before in enumerate(ends) if before <= begin), len(ends))
            ends[row : row + 1] = [end]
            placed.append(_Placed(message, row, label_at, align))
        return _Lanes(placed, len(ends))

    def _place_rows(self) -> None:
        """The top of each rank's work and messages. Odd ranks have their messages above."""
        self.work, self.messages = {}, {}
        between = BETWEEN_RANKS if self.sent else 0.04
        top = 0.26
        for place, rank in enumerate(self.lanes):
            lanes = self.lanes[rank].height
            if place % 2:
                self.messages[rank], self.work[rank] = top, top + lanes + GAP
            else:
                self.work[rank], self.messages[rank] = top, top + WORK + GAP
            top += WORK + GAP + lanes + between
        self.rows = top - between + 0.06
        self.height = self.rows + 0.34

    def draw(self, page: Page, top: float) -> None:
        """Draws the panel, its upper edge `top` inches below the page's."""
        waits = [self._waited(rank) for rank in self.ranks]
        exposed = ", ".join(
            f"rank {rank['rank']} waits {1e3 * seconds:.1f} ms"
            for rank, seconds in zip(self.ranks, waits, strict=True)
            if max(waits) > 0
        )
        page.text(LEFT, top + 0.17, self.title, size=9, weight="bold")
        if exposed:
            right = WIDTH - RIGHT
            page.text(right, top + 0.17, exposed, size=SMALL_SIZE, color=WAIT_COLOR, ha="right")
        axes = page.axes(LEFT, top, WIDTH - LEFT - RIGHT, self.rows)
        axes.set(xlim=(1e3 * self.begin, 1e3 * self.end), ylim=(self.rows, 0), yticks=[])
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=SMALL_SIZE, length=2)
        axes.patch.set_visible(False)
        page.text(0.08, top + self.rows + 0.16, "milliseconds", size=SMALL_SIZE, color="#555555")
        for rank in self.ranks:
            self._label_rows(page, top, rank)
            self._draw_work(axes, rank)
            self._draw_messages(axes, rank["rank"])

    def _waited(self, rank: Record) -> float:
        return float(
            sum(wait["end"] - wait["begin"] for wait in rank["waits"] if self._is_mine(wait))
        )

    def _is_mine(self, span: Record) -> bool:
        return span["pass"] in self.passes

    def _label_rows(self, page: Page, top: float, rank: Record) -> None:
        number = rank["rank"]
        y = top + self.work[number] + WORK / 2
        page.text(0.08, y - 0.01, f"rank {number}", size=BLOCK_SIZE, weight="bold")
        page.text(0.08, y + 0.12, _columns(rank), size=SMALL_SIZE, color="#555555")
        if self.lanes[number].count:
            y = top + self.messages[number] + self.lanes[number].height / 2 + 0.04
            page.text(0.08, y, "messages", size=SMALL_SIZE, color="#555555")

    def _draw_work(self, axes: Axes, rank: Record) -> None:
        top = self.work[rank["rank"]]
        for block in filter(self._is_mine, rank["blocks"]):
            pale = PALE if block["half"] == "peers" else 1.0
            self._box(axes, block, top, WORK, _color(block["layer"]), alpha=pale)
        for block, width in self._widest(rank):
            middle = 1e3 * (block["begin"] + block["end"]) / 2
            name = block["layer"]
            options: dict[str, Any] = {"ha": "center", "va": "center"}
            if text_width(name, BLOCK_SIZE) + 0.04 <= width:
                axes.text(middle, top + WORK / 2, name, size=BLOCK_SIZE, **options)
            elif width >= 0.1 and text_width(name, SMALL_SIZE - 1) <= WORK:
                axes.text(middle, top + WORK / 2, name, size=SMALL_SIZE - 1, rotation=90, **options)
        for wait in filter(self._is_mine, rank["waits"]):
            # The edge keeps the shortest wait visible.
            self._box(axes, wait, top, WORK, WAIT_COLOR, edgecolor=WAIT_COLOR)

    def _widest(self, rank: Record) -> list[tuple[Record, float]]:
        """Of each layer and pass the widest piece, which bears its name, and its inches."""
        widest: dict[tuple[str, str], tuple[Record, float]] = {}
        for block in filter(self._is_mine, rank["blocks"]):
            width = (block["end"] - block["begin"]) * self.inches
            key = (block["layer"], block["pass"])
            if key not in widest or width > widest[key][1]:
                widest[key] = (block, width)
        return list(widest.values())

    def _box(
        self, axes: Axes, span: Record, top: float, height: float, color: str, **options: Any
    ) -> None:
        width = 1e3 * (span["end"] - span["begin"])
        look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5} | options
        axes.barh(top, width, height, left=1e3 * span["begin"], align="edge", color=color, **look)

    def _draw_messages(self, axes: Axes, rank: int) -> None:
        top, height = self.messages[rank], self.lanes[rank].height
        for placed in self.lanes[rank].messages:
            message, y = placed.message, top + LANE * placed.row
            bar = {"begin": message["sent"], "end": message["arrived"]}
            self._box(axes, bar, y + 0.02, LANE - 0.04, MESSAGE_COLOR, edgecolor=MESSAGE_COLOR)
            axes.text(
                1e3 * placed.label_at,
                y + LANE / 2 + 0.005,
                _message_label(message),
                size=SMALL_SIZE,
                va="center",
                ha=placed.align,
            )
            theirs = self.messages[message["to"]]
            down = theirs > top
            edge = top + height if down else top
            self._draw_arrow(
                axes,
                message,
                y,
                edge,
                theirs if down else theirs + self.lanes[message["to"]].height,
            )

    def _draw_arrow(
        self, axes: Axes, message: Record, row: float, edge: float, target: float
    ) -> None:
        """From the message's `row` to the `edge` of its sender's rows, and on to the `target`."""
        sent, arrived = 1e3 * message["sent"], 1e3 * message["arrived"]
        axes.plot(
            [sent, sent], [row + LANE / 2, edge], color=ARROW_COLOR, linewidth=0.6, zorder=0.5
        )
        style = {"arrowstyle": "-|>", "color": ARROW_COLOR, "linewidth": 0.8, "mutation_scale": 7}
        style |= {"shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (arrived, target), (sent, edge), arrowprops=style, annotation_clip=False)


def _goes_forward_again(step: Record) -> bool:
    """Whether a rank goes forward after it has gone backward: its batch came in parts."""
    passes = [[block["pass"] for block in rank["blocks"]] for rank in step["ranks"]]
    return any("backward" in p and "forward" in p[p.index("backward") :] for p in passes)


def _title(step: Record) -> str:
    ranks, copies = len(step["ranks"]), step["data_ranks"]
    kinds = {"model": step["column_ranks"] > 1, "data": copies > 1}
    how = " and ".join(kind for kind, there in kinds.items() if there)
    return (
        "One training step"
        + (f", {how} parallel" if how else "")
        + f": {ranks} rank{'s' * (ranks > 1)} on {step['device']}, batch {step['batch']}"
    )


def _columns(rank: Record) -> str:
    numbers = " + ".join(map(str, rank["columns"]))
    return f"column{'s' * (len(rank['columns']) > 1)} {numbers}"


def _color(layer: str) -> str:
    kinds = {"conv": CONV_COLOR, "fc": FC_COLOR}
    return next((color for name, color in kinds.items() if layer.startswith(name)), OTHER_COLOR)


def _message_label(message: Record) -> str:
    first, *others = message["layer"].split(", ")
    name = f"{first}–{others[-1]}" if others else first
    return f"{name} {readable_bytes(message['bytes'])}"


def readable_bytes(count: float) -> str:
    """`count` bytes with three digits at most: 384 B, 65.5 kB, 2.77 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _legend(page: Page, top: float, step: Record) -> None:
    """Says what the colors mean, of those that appear."""
    blocks = [block for rank in step["ranks"] for block in rank["blocks"]]
    kinds = {_color(block["layer"]) for block in blocks}
    entries: list[tuple[str, str, float, bool]] = [
        ("convolution", CONV_COLOR, 1.0, CONV_COLOR in kinds),
        ("fully connected", FC_COLOR, 1.0, FC_COLOR in kinds),
        ("paler: the peers' half", CONV_COLOR, PALE, any(b["half"] == "peers" for b in blocks)),
        ("waiting (exposed)", WAIT_COLOR, 1.0, any(rank["waits"] for rank in step["ranks"])),
        ("message on its way", MESSAGE_COLOR, 1.0, bool(step["messages"])),
    ]
    handles = [
        Patch(facecolor=color, alpha=alpha, label=label)
        for label, color, alpha, there in entries
        if there
    ]
    page.figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - top / page.height),
        ncols=len(handles),
        fontsize=SMALL_SIZE,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.4,
    )
