#!/usr/bin/env python
"""Times our network against torchvision's AlexNet, a plain transcription, and itself on two ranks.

    python benchmarks/throughput.py                    float32, batch 128, training and inference
    python benchmarks/throughput.py --quick            training only, fewer steps
    python benchmarks/throughput.py --batch-size 32 128 --precision fp32 bf16

Every row has processes of its own, which take turns in rounds; each row is timed in the memory
format that was faster in a trial. Medians over rounds after a warm-up, ratios round by round. LRN
is on wherever the network has one: torchvision's has none. The last line is JSON.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import common
from cases import FORMATS, ROWS, Case
from cases import Worker as Rank
from common import Contestant, ContestantFailed, Spread, available_cores, rounded
from tqdm import tqdm
from tyro.conf import arg

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import check

RowName = Literal[
    "torchvision",
    "torchvision-kept",
    "one",
    "half",
    "two",
    "data-parallel",
    "four",
    "data-parallel-four",
    "plain",
]
Turn = list[dict[str, float]]  # what each rank measured in one turn
QUICK_SECONDS = 130.0  # for all cases together, beside the start of the processes
HEADLINES = {  # key of the JSON's top level: whose ratio to what
    "ratio_to_torchvision": ("one", "ratio_to_torchvision"),
    "ratio_two_ranks_to_one": ("two", "ratio_to_one_device"),
    "ratio_two_ranks_to_torchvision": ("two", "ratio_to_torchvision"),
    "ratio_to_plain_transcription": ("one", "ratio_to_plain_transcription"),
}


@dataclass(frozen=True)
class Request:
    """How fast does it train?"""

    batch_size: tuple[int, ...] = (128,)
    """Images in a step, over all ranks together; several make a table each."""
    precision: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """Arithmetic of the layers, by autocast on every side."""
    mode: tuple[Literal["training", "inference"], ...] = ("training", "inference")
    """training: forward, backward and the optimizer's step. inference: forward only."""
    rows: tuple[RowName, ...] = (
        "torchvision",
        "torchvision-kept",
        "one",
        "half",
        "two",
        "data-parallel",
        "plain",
    )
    """What to time. `four` and `data-parallel-four` have four ranks, which share two cores where
    there are no more: they are for scaling_model.py --check."""
    quick: bool = False
    """Training only, one step a turn, a trial of 32 images, and as many rounds as two minutes
    allow."""
    rounds: int = 7
    """Turns that each row has; the median is over them."""
    steps: int = 2
    """Steps in a turn."""
    compile: Literal["no", "yes", "cuda-graphs"] = "no"
    """Compile every row's network; cuda-graphs also replays it, with the exchange outside the
    graphs."""
    image_size: int = 224
    """Side of the images, in pixels."""
    classes: int = 1000
    """Logits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; two ranks share one GPU if there is only one."""
    threads: int = 0
    """CPU threads of a row, over all its ranks together; 0: one for each core."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        check(
            min(self.batch_size, default=0) >= max([2, *(ROWS[name].ranks for name in self.rows)]),
            f"--batch-size {self.batch_size}: two images or more, one for each rank",
        )
        check(
            bool(self.rows and self.precision and self.mode),
            "--rows --precision --mode: name at least one of each",
        )
        check(
            self.rounds >= 1 and self.steps >= 1,
            f"--rounds {self.rounds} --steps {self.steps}: one or more",
        )
        check(
            self.image_size >= 64,
            f"--image-size {self.image_size}: 64 or more, below that nothing is left of the image",
        )
        check(
            self.threads == 0 or self.threads >= 2,
            f"--threads {self.threads}: two or more, so that two ranks have as many as one process",
        )
        check(self.classes >= 1, f"--classes {self.classes}: one or more")
        check(
            self.compile != "cuda-graphs" or common.choose_device(self.device).type == "cuda",
            "--compile cuda-graphs: needs a GPU of NVIDIA's",
        )

    def cases(self) -> list[Case]:
        modes = (
            [mode for mode in self.mode if mode == "training"] or list(self.mode)
            if self.quick
            else self.mode
        )
        return [
            Case(batch, precision, mode, self.image_size, self.classes, self.compile)
            for mode in modes
            for precision in self.precision
            for batch in self.batch_size
        ]


class Runner:
    """All rows, alive together; measures one case after another."""

    def __init__(self, request: Request, stack: ExitStack, device: str, threads: int) -> None:
        self.request, self.stack, self.setting = request, stack, (device, threads)
        self.rows = {name: self._start(name) for name in ROWS if name in request.rows}
        self.seconds_each = QUICK_SECONDS / len(request.cases()) if request.quick else math.inf
        self.failed: dict[str, str] = {}

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """The table of one case: a dictionary per row."""
        began, self.failed = time.monotonic(), {}
        formats = {
            name: self._attempt(name, self._choose_format, case)
            for name in tqdm(self.rows, "memory formats", leave=False, disable=None)
        }
        for name in self._left():
            self._attempt(name, self._warm_up)
        turns: dict[str, list[Turn]] = {name: [] for name in self.rows}
        steps, rounds = (1, 5) if self.request.quick else (self.request.steps, self.request.rounds)
        for count in tqdm(
            range(rounds),
            f"{case.mode} {case.precision} batch {case.batch_size}",
            unit="round",
            leave=False,
            disable=None,
        ):
            if (
                count >= 2
                and (time.monotonic() - began) * (1 + 1 / (count + 1)) > self.seconds_each
            ):
                break
            for name in self._left():
                turns[name].append(self._attempt(name, self._turn, steps))
        rates = {
            name: Spread.of([case.batch_size * steps / seconds_of(turn) for turn in turns[name]])
            for name in self._left()
        }
        rows = [self._row(name, case, steps, turns[name], rates) | formats[name] for name in rates]
        return rows + [
            {"row": name, "label": ROWS[name].label, **vars(case), "failed": why}
            for name, why in self.failed.items()
        ]

    def _start(self, name: str) -> Contestant:
        return self.stack.enter_context(Contestant(Rank, ROWS[name].ranks, name, *self.setting))

    def _left(self) -> list[str]:
        return [name for name in self.rows if name not in self.failed]

    def _attempt(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the result of `work`; a row that cannot do this case is left out, with its
        reason."""
        try:
            return work(name, *arguments)
        except ContestantFailed as error:
            self.failed[name], self.rows[name] = str(error), self._start(name)
            return None

    def _choose_format(self, name: str, case: Case) -> dict[str, Any]:
        """Prepares the row in the memory format that is faster in a trial; returns images/s of
        each."""
        contestant, rates, quick = self.rows[name], {}, self.request.quick
        trial = replace(case, batch_size=min(case.batch_size, 32)) if quick else case
        for memory_format in FORMATS:
            contestant.ask("prepare", trial, memory_format)
            contestant.ask("run", 1)
            rates[memory_format] = trial.batch_size / min(
                seconds_of(contestant.ask("run", 1)) for _ in range(1 if quick else 2)
            )
        best = max(rates, key=rates.__getitem__)
        contestant.ask("prepare", case, best)
        return {
            "memory_format": best,
            "trial_images_per_second": {key: round(rate, 2) for key, rate in rates.items()},
        }

    def _warm_up(self, name: str) -> None:
        self.rows[name].ask("reset_memory")
        self.rows[name].ask("run", 1 if self.request.quick else 2)

    def _turn(self, name: str, steps: int) -> Turn:
        return self.rows[name].ask("run", steps)

    def _row(
        self, name: str, case: Case, steps: int, turns: list[Turn], rates: dict[str, Spread]
    ) -> dict[str, Any]:
        exposed = Spread.of(
            [min(rank["waited"] / rank["seconds"] for rank in turn) for turn in turns]
        )
        columns = ROWS[name].column_ranks > 1
        return {
            "row": name,
            "label": ROWS[name].label,
            **vars(case),
            "ranks": ROWS[name].ranks,
            "steps": steps,
            "rounds": len(turns),
            "images_per_second": round(rates[name].median, 3),
            "spread": [round(value, 3) for value in rates[name].range],
            "ratio_to_torchvision": ratio(rates, name, "torchvision"),
            "ratio_to_one_device": ratio(rates, name, "one"),
            "ratio_to_plain_transcription": ratio(rates, name, "plain"),
            "memory_bytes_per_rank": max(self.rows[name].ask("memory")),
            # The meter sees the link's bytes; DistributedDataParallel's are counted by exchange.py.
            "bytes_per_step": int(turns[0][0]["bytes"] / steps)
            if ROWS[name].ranks == 1 or columns
            else None,
            "exposed_share": rounded(exposed.median) if columns else None,
        }


def seconds_of(turn: list[dict[str, float]]) -> float:
    """The slowest rank's."""
    return max(rank["seconds"] for rank in turn)


def ratio(rates: dict[str, Spread], name: str, other: str) -> float | None:
    """The median over rounds of one row's rate by another's; None where a row was not measured."""
    return (
        rounded(rates[name].over(rates[other]).median) if name in rates and other in rates else None
    )


def show(case: Case, rows: list[dict[str, Any]]) -> str:
    head = (
        "",
        "images/s",
        "lowest",
        "highest",
        "x torchvision",
        "x one device",
        "MiB a rank",
        "MB sent a step",
        "exposed",
        "memory format",
    )
    lines = [
        (
            row["label"],
            f"{row['images_per_second']:.1f}",
            *(f"{value:.1f}" for value in row["spread"]),
            number(row["ratio_to_torchvision"]),
            number(row["ratio_to_one_device"]),
            f"{row['memory_bytes_per_rank'] / 2**20:.0f}",
            number((row["bytes_per_step"] or 0) / 1e6 or None),
            "-" if row["exposed_share"] is None else f"{row['exposed_share']:.1%}",
            row["memory_format"],
        )
        for row in rows
        if "failed" not in row
    ]
    failures = [f"{row['label']}: not measured, {row['failed']}" for row in rows if "failed" in row]
    compiled = {"no": "", "yes": ", compiled", "cuda-graphs": ", compiled, as CUDA graphs"}[
        case.compile
    ]
    return "\n".join(
        [
            f"\n{case.mode}, {case.precision}, batch {case.batch_size}, {case.image_size} "
            f"pixels, {case.classes} classes{compiled}",
            common.table(head, lines),
            *failures,
        ]
    )


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def headline(cases: list[Case], tables: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the ratios of float32, batch 128, training, or of the first case where that was left
    out."""
    chosen = next(
        (
            i
            for i, case in enumerate(cases)
            if (case.batch_size, case.precision, case.mode) == (128, "fp32", "training")
        ),
        0,
    )
    rows = {row["row"]: row for row in tables[chosen]}
    return {
        key: rows.get(name, {}).get(ratio_of) for key, (name, ratio_of) in HEADLINES.items()
    } | {"headline_case": vars(cases[chosen])}


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    device = common.choose_device(request.device)
    threads = request.threads or max(2, available_cores())
    place = common.machine(device, threads)
    print(common.describe(place), flush=True)
    cases, tables = request.cases(), []
    with ExitStack() as stack:
        runner = Runner(request, stack, device.type, threads)
        for case in cases:
            tables.append(runner.measure(case))
            print(show(case, tables[-1]), flush=True)
    common.finish(
        headline(cases, tables)
        | {"rows": [row for rows in tables for row in rows], "machine": place},
        request.json,
    )
    return 0


if __name__ == "__main__":
    run_main(main)
