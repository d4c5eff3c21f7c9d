#!/usr/bin/env python
"""The paper's claims, measured: trains pairs of networks that differ in one thing.

    python benchmarks/ablations.py --data folder --data-dir DIR --epochs 20 --seeds 3 --jobs 2
    python benchmarks/ablations.py --quick     trains every pair for a moment

Trainings are kept in --out and found again, so a longer call (more seeds, more claims) trains only
the missing ones, and a call that was stopped goes on where it stopped. Whole pairs come first: all
claims of seed 0, then of seed 1. `--help` lists the flags.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from claims_picture import draw_claims, rows_with_interval
from paired import Interval, interval, ratio_interval, verdict
from training_request import Table, TrainingRequest, print_table
from trainings import Training, epochs_until, found

from alexnet_mp import preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import Config
from alexnet_mp.inference.finished_run import read_history
from alexnet_mp.plotting.curves import compare_curves

DESCRIPTION = """Trains pairs that differ in one thing and prints the difference beside the
paper's: ReLU and tanh, LRN, overlapping pooling, two columns and one, talking and isolated columns,
color noise, crops and flips, dropout, ten views."""
TARGET = 0.25  # training error, P figure 1
SPEED, POINTS, VIEWS = "speed", "points", "views"


@dataclass(frozen=True)
class Claim:
    """One claim: the network that has the feature, the changes that remove it, and the measure."""

    name: str
    text: str
    paper: str  # the paper's figure, or the source's where the paper has none
    without: dict[str, Any]  # fields of the network that lacks it
    # POINTS: top-1 and top-5 error on the test images; SPEED: epochs to TARGET; VIEWS: one net,
    # tested with one view and with ten.
    measure: str = POINTS
    base: str = ""  # preset of both; default: the request's
    extra: bool = False  # measured only if it is named


def _network(name: str, *fields: str) -> dict[str, Any]:
    """These fields of the network of preset `name`."""
    return {field: getattr(preset(name).model, field) for field in fields}


OVERFITS = "without it: substantial overfitting"
CLAIMS = (
    Claim("lrn", "LRN", "top-1 -1.4, top-5 -1.2", {"lrn": False, "map_norm": False}),
    Claim(
        "overlap", "pooling 3x3, not 2x2, at stride 2", "top-1 -0.4, top-5 -0.3", {"pool_size": 2}
    ),
    Claim(
        "columns",
        "two columns, not the one-GPU net",
        "top-1 -1.7, top-5 -1.2",
        _network("original-half", "columns", "kernels", "hidden"),
    ),
    Claim(
        "talking",
        "columns that talk, not isolated ones",
        "top-1 -1.2, top-5 -1.1 (source)",
        _network("original-isolated", "crossings", "kernels", "hidden"),
    ),
    Claim("color", "color noise", "top-1 more than -1", {"color_noise": 0.0}),
    Claim("crops", "random crops and flips", OVERFITS, {"random_crop": False, "flip": False}),
    Claim("dropout", "dropout", OVERFITS, {"dropout_rate": 0.0}),
    Claim("views", "ten views, not one", "top-1 -1.5, top-5 -1.3", {}, VIEWS),
    Claim(
        "relu",
        f"ReLU, not tanh: epochs to {TARGET:.0%} training error",
        "6 times fewer",
        {"activation": "tanh"},
        SPEED,
        "four-layers",
    ),
    Claim(
        "lrn-four-layers",
        "LRN in the four-layer net",
        "13 to 11 % on CIFAR-10",
        {"lrn": False},
        POINTS,
        "four-layers",
        extra=True,
    ),
    Claim(
        "start",
        "conv3-5 start at 0.03 (source), not 0.01 (paper)",
        "not said",
        _network("paper", "initial_weights"),
        extra=True,
    ),
)


@dataclass(frozen=True)
class ClaimsRequest(TrainingRequest):
    """What is trained, for how long, on what?"""

    preset: Literal["original", "paper", "demo"] = "original"
    """What pairs have in common, but for those of the four-layer net."""
    claims: tuple[str, ...] = tuple(claim.name for claim in CLAIMS if not claim.extra)
    """Which claims; beside these there are lrn-four-layers and start."""
    cifar_dir: str = ""
    """Image folder for the four-layer net, the paper's CIFAR-10; without it: --data."""
    relu_epochs: int = 60
    """Upper limit for --claims relu, whose trainings end at the target."""
    seeds: int = 3
    """Each pair is trained with the seeds 0 to N - 1."""
    rates: tuple[float, ...] = (0.016, 0.008, 0.004, 0.002)
    """Learning rates of the four-layer net for --claims relu, which begins with the first. Each net
    counts with its fastest one, as in the paper, and the others end where that one has ended."""
    out: str = "runs/ablations"
    """Folder for the trainings, the table (ablations.json) and pictures (claims.png, relu.png)."""

    def __post_init__(self) -> None:
        names = [claim.name for claim in CLAIMS]
        unknown = [name for name in self.claims if name not in names]
        if unknown:
            raise ValueError(f"--claims {' '.join(unknown)}: not one of {' '.join(names)}")
        super().__post_init__()
        self.check_positive("relu_epochs", "seeds")
        if not self.rates:
            raise ValueError("--rates: name at least one")

    def of_claim(self, claim: Claim, seed: int, **changes: Any) -> Config:
        """One training for `claim`, with `changes`."""
        if claim.base:
            size = preset(claim.base).model.image_size
            changes = {"image_size": size} | changes
            if self.cifar_dir:
                changes |= {"data": "folder", "data_dir": self.cifar_dir}
        return self.config(
            claim.base or self.preset, **{"seed": seed, "epochs": self.epochs} | changes
        )


Sides = tuple[list[Training], list[Training]]
"""The trainings with the feature and without it: one each, or one for each rate."""


def trainings(claim: Claim, request: ClaimsRequest, seed: int) -> Sides:
    """The trainings of one seed; without is empty for VIEWS, which tests one network twice."""

    def one(name: str, more: dict[str, Any], **changes: Any) -> Training:
        config = request.of_claim(claim, seed, **changes)
        name = f"{name}-{config.recipe.epochs}-epochs-seed-{seed}"
        return Training(name, config, keep=request.keep_checkpoints, **more)

    if claim.measure == SPEED:
        relu, tanh = (
            [
                one(
                    f"{claim.base}-{activation}-{rate:g}",
                    {"target": TARGET},
                    activation=activation,
                    lr=rate,
                    bias_lr=2 * rate,
                    epochs=request.relu_epochs,
                )
                for rate in request.rates
            ]
            for activation in ("relu", claim.without["activation"])
        )
        return rivals(relu), rivals(tanh)
    if claim.name == "lrn-four-layers":  # whose preset has none
        return [one("four-layers-lrn", {}, lrn=True)], [one("four-layers", {}, **claim.without)]
    having = [one(request.preset, {"ten_views": True})]
    without = f"{request.preset}-no-{claim.name}"
    return having, [one(without, {}, **claim.without)] if claim.without else []


def rivals(side: list[Training]) -> list[Training]:
    """The trainings of one side, of which only the fastest counts."""
    names = {one.name for one in side}
    return [dataclasses.replace(one, rivals=tuple(sorted(names - {one.name}))) for one in side]


def chosen_claims(request: ClaimsRequest) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.name in request.claims]


def in_order(request: ClaimsRequest) -> list[Training]:
    """Every training once: all that seed 0 needs, then seed 1, so that pairs are whole early."""
    needed = {
        training.name: training
        for seed in range(request.seeds)
        for claim in chosen_claims(request)
        for side in trainings(claim, request, seed)
        for training in side
    }
    return list(needed.values())


def complete_pairs(claim: Claim, request: ClaimsRequest) -> list[tuple[int, Sides]]:
    """Seeds whose trainings are all finished, with these."""
    out = Path(request.out)
    pairs = [(seed, trainings(claim, request, seed)) for seed in range(request.seeds)]
    return [
        (seed, sides)
        for seed, sides in pairs
        if all(found(training, out) is not None for side in sides for training in side)
    ]


def measured(claim: Claim, request: ClaimsRequest) -> dict[str, Any]:
    """One row of the table. Errors are in points; less than 0 is as claimed."""
    pairs = complete_pairs(claim, request)
    row = {
        "claim": claim.name,
        "text": claim.text,
        "paper": claim.paper,
        "asked_seeds": request.seeds,
        "measure": claim.measure,
    }
    measure = _speed if claim.measure == SPEED else _points
    row |= measure(claim, request, pairs)
    if request.quick:
        row["verdict"] = row["verdict_top5"] = "smoke run"
    return row


def _speed(claim: Claim, request: ClaimsRequest, pairs: list[tuple[int, Sides]]) -> dict[str, Any]:
    """How many times the epochs of ReLU tanh needs, each at its fastest rate."""
    out, seeds, having, without, rates = Path(request.out), [], [], [], []
    unreached = 0
    for seed, sides in pairs:
        best = [_fastest(side, out) for side in sides]
        if not all(best):
            unreached += 1
            continue
        seeds.append(seed)
        having.append(round(best[0][0], 2))
        without.append(round(best[1][0], 2))
        rates.append([best[0][1], best[1][1]])
    ratios = [tanh / relu for relu, tanh in zip(having, without, strict=True)]
    spread = ratio_interval(ratios)
    return {
        "seeds": seeds,
        "with": having,
        "without": without,
        "fastest_rates": rates,
        "rates": list(request.rates),
        "target_not_reached": unreached,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "interval": _as_list(spread),
        "verdict": verdict(spread, 1.0, claimed_below=False),
    }


def _fastest(side: list[Training], out: Path) -> tuple[float, float] | None:
    """Epochs to the target and the rate of the training that needed the fewest, or None."""
    times = [
        (epochs, training.config.recipe.lr)
        for training in side
        if (epochs := epochs_until(read_history(out / training.name), TARGET)) is not None
    ]
    return min(times, default=None)


def _points(claim: Claim, request: ClaimsRequest, pairs: list[tuple[int, Sides]]) -> dict[str, Any]:
    """Differences of the errors on the test images, seed by seed."""
    out, row = Path(request.out), dict[str, Any]()
    scores = []
    for seed, (having, without) in pairs:
        a, b = found(having[0], out), found((without or having)[0], out)
        if a and b and "diverged" not in (a["end"], b["end"]):
            scores.append(
                (seed, a["ten_views" if claim.measure == VIEWS else "one_view"], b["one_view"])
            )
    row["seeds"] = [seed for seed, *_ in scores]
    row["diverged"] = len(pairs) - len(scores)
    for top, suffix in (("top1", ""), ("top5", "_top5")):
        errors = [[100 * (1 - one[top]) for one in pair] for _, *pair in scores]
        differences = [mine - other for mine, other in errors]
        spread = interval(differences)
        row |= {
            f"with{suffix}": [round(mine, 3) for mine, _ in errors],
            f"without{suffix}": [round(other, 3) for _, other in errors],
            f"differences{suffix}": [round(value, 3) for value in differences],
            f"interval{suffix}": _as_list(spread),
            f"verdict{suffix}": verdict(spread),
        }
    return row


def _as_list(spread: Interval | None) -> list[float] | None:
    """Mean, low, high."""
    return spread and [round(value, 4) for value in dataclasses.astuple(spread)]


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if row["measure"] == SPEED:
        ours = _with_interval(row["ratios"], row["interval"], "") + " times"
    else:
        ours = "  ".join(
            f"{name} {_with_interval(row['differences' + suffix], row['interval' + suffix], '+')}"
            for name, suffix in (("top-1", ""), ("top-5", "_top5"))
        )
    said = row["verdict"] + (f", {row['verdict_top5']}" if "verdict_top5" in row else "")
    return f"{row['text']:46s}  {row['paper']:35s}  {len(row['seeds']):5d}  {ours:60s}  {said}"


def _with_interval(values: list[float], spread: list[float] | None, sign: str) -> str:
    if not values:
        return "-"
    if spread is None:
        return f"{values[0]:{sign}.2f}"
    mean, low, high = (f"{value:{sign}.2f}" for value in spread)
    return f"{mean} ({low} to {high})"


def draw_relu(request: ClaimsRequest) -> None:
    """Draws training error over epochs of both nets at their fastest rate, as the paper's figure
    1."""
    out = Path(request.out)
    claim = next(claim for claim in CLAIMS if claim.measure == SPEED)
    pairs = complete_pairs(claim, request)
    if not pairs:
        return
    curves = {}
    for name, side in zip(("ReLU", "tanh"), pairs[0][1], strict=True):
        fastest = _fastest(side, out)
        for training in side:
            rate = training.config.recipe.lr
            if fastest is None or rate == fastest[1]:
                curves[f"{name}, lr {rate:g}"] = read_history(out / training.name)
    if all(curves.values()):
        compare_curves(curves, "train_top1", out / "relu.png", target=TARGET)


def table(request: ClaimsRequest) -> dict[str, Any]:
    """A row for each claim, of what is complete so far."""
    return {"claims": [measured(claim, request) for claim in chosen_claims(request)]}


def lines(content: dict[str, Any]) -> list[str]:
    """The table for people."""
    head = f"{'claim':46s}  {'paper':35s}  seeds  {'ours, with a 95 % interval':60s}  verdict"
    return [head, *(line(row) for row in content["claims"])]


def main() -> int:
    request = parse_request(ClaimsRequest, sys.argv[1:], DESCRIPTION)
    if request.quick:
        request = request.shortened(cifar_dir="", epochs=2, relu_epochs=2, seeds=1)
    made = Table("ablations", request, in_order, table)
    code = print_table(made, lines)
    if rows := rows_with_interval(table(made.request)["claims"]):  # --fit has shortened its epochs
        draw_claims(rows, Path(request.out) / "claims.png")
    if "relu" in request.claims:
        draw_relu(request)
    return code


if __name__ == "__main__":
    run_main(main)
