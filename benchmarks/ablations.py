#!/usr/bin/env python
"""The paper's claims, measured: trains pairs of networks that differ in one thing.

    python benchmarks/ablations.py --data folder --data-dir DIR --epochs 20 --seeds 3
    python benchmarks/ablations.py --quick     trains every pair for a moment

Runs are kept in --out and found again, so a longer call (more seeds, more claims) trains only the
missing ones, and a call that was stopped goes on where it stopped. One process on one device.
`--help` lists the flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm.auto import tqdm
from tyro.conf import arg

from alexnet_mp import preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import printing_json, run_main
from alexnet_mp.config import Config
from alexnet_mp.config.arguments import EvaluateRequest, Networks
from alexnet_mp.inference.evaluate import evaluate_checkpoints
from alexnet_mp.inference.finished_run import read_config, read_history
from alexnet_mp.plotting.curves import compare_curves, epochs_to
from alexnet_mp.training.run import run
from alexnet_mp.training.trainer import NonFiniteError, Trainer

DESCRIPTION = """Trains pairs that differ in one thing and prints the difference beside the
paper's: ReLU and tanh, LRN, overlapping pooling, two columns and one, talking and isolated columns,
color noise, ten views, the initialization of the paper and of the source."""
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


def _network(name: str, *fields: str) -> dict[str, Any]:
    """These fields of the network of preset `name`."""
    return {field: getattr(preset(name).model, field) for field in fields}


CLAIMS = (
    Claim(
        "relu",
        f"ReLU instead of tanh: epochs to {TARGET:.0%} training error",
        "6 times fewer",
        {"activation": "tanh"},
        SPEED,
        "four-layers",
    ),
    Claim("lrn", "LRN", "top-1 -1.4, top-5 -1.2", {"lrn": False, "map_norm": False}),
    Claim(
        "lrn-four-layers",
        "LRN in the four-layer net",
        "13 to 11 % on CIFAR-10",
        {"lrn": False},
        POINTS,
        "four-layers",
    ),
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
    Claim("views", "ten views, not one", "top-1 -1.5, top-5 -1.3", {}, VIEWS),
    Claim(
        "start",
        "conv3-5 start at 0.03 (source), not 0.01 (paper)",
        "not said",
        _network("paper", "initial_weights"),
    ),
)


@dataclass(frozen=True)
class ClaimsRequest:
    """What is trained, for how long, on what?"""

    preset: Literal["original", "paper", "demo"] = "original"
    """What pairs have in common, but for those of the four-layer net."""
    claims: tuple[str, ...] = tuple(claim.name for claim in CLAIMS)
    """Which claims."""
    data: Literal["shapes", "cifar10", "fashion-mnist", "folder", "store"] = "shapes"
    """The images."""
    data_dir: str = "data"
    """Where they are, or are to be put."""
    image_size: int = 64
    """Side of the crop; the paper's is 224. The four-layer net always sees 32."""
    epochs: int = 20
    """Passes over the training images, to which schedules are scaled. With --claims relu it is the
    upper limit: a run ends at the target."""
    seeds: int = 3
    """Each pair is trained with the seeds 0 to N - 1."""
    rates: tuple[float, ...] = (0.001, 0.003)
    """Learning rates of the four-layer net for --claims relu. Each net counts with its fastest one,
    as in the paper."""
    limit_train: int = 0
    """Use the first N training images, after the seeded shuffle; 0: all."""
    limit_test: int = 0
    """Likewise for the test images."""
    batch_size: int = 128
    """Images in one step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    out: str = "runs/ablations"
    """Folder for the runs, the table (ablations.json) and the picture (relu.png)."""
    quick: bool = False
    """Train a few hundred steps on generated images with one seed: some minutes, no verdict."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the table into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.claims if name not in {claim.name for claim in CLAIMS}]
        if unknown:
            raise ValueError(
                f"--claims {' '.join(unknown)}: not one of "
                f"{' '.join(claim.name for claim in CLAIMS)}"
            )
        for name in ("epochs", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.rates:
            raise ValueError("--rates: name at least one")

    def shortened(self) -> ClaimsRequest:
        """What --quick means: everything else as asked."""
        return dataclasses.replace(
            self,
            data="shapes",
            epochs=2,
            seeds=1,
            rates=self.rates[:1],
            limit_train=1024,
            limit_test=256,
            batch_size=32,
            out=f"{self.out}-quick",
        )

    def config(self, base: str, seed: int, **changes: Any) -> Config:
        """One training: `base` or the request's preset, with `changes`."""
        size = {} if base else {"image_size": self.image_size}
        mine = {
            name: getattr(self, name)
            for name in (
                "data",
                "data_dir",
                "epochs",
                "limit_train",
                "limit_test",
                "batch_size",
                "precision",
                "device",
                "threads",
            )
        }
        return preset(base or self.preset).with_fields(seed=seed, **size, **mine, **changes)


@dataclass(frozen=True)
class Training:
    """One run, in its folder, found there or to be made."""

    folder: Path
    config: Config
    until: float = 0.0  # training error at which it may end

    def reached(self) -> int | None:
        """Epochs to the training error `until`."""
        return epochs_to(
            [1 - record["train_top1"] for record in read_history(self.folder)], self.until
        )

    def done(self) -> bool:
        """Whether the folder has it. ValueError if it has something else."""
        if not (self.folder / "config.json").exists():
            return False
        there = read_config(self.folder).with_fields(
            classes=self.config.model.classes
        )  # a run writes the number that it found
        if any(
            getattr(there, part) != getattr(self.config, part)
            for part in ("model", "data", "recipe")
        ):
            raise ValueError(
                f"--out {self.folder.parent}: {self.folder.name} is of other settings; name "
                "another folder"
            )
        return (
            (self.folder / "result.json").exists()
            or (self.folder / "diverged").exists()
            or (bool(self.until) and self.reached() is not None)
        )

    def train(self) -> None:
        """Trains, or goes on; what it prints goes to log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.folder / "last.pt"
        config = self.config.with_fields(
            out=str(self.folder), resume=str(last) if last.exists() else ""
        )
        with (
            open(self.folder / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
        ):
            try:
                run(config, self._end_at_target if self.until else None)
            except (
                NonFiniteError
            ) as error:  # a rate that is too high for one of the pair is an answer
                (self.folder / "diverged").write_text(f"{error}\n")

    def _end_at_target(self, trainer: Trainer) -> None:
        keep = trainer.on_epoch

        def end_epoch(record: dict[str, Any], improved: bool) -> None:
            keep(record, improved)
            trainer.stop_requested = 1 - record["train_top1"] <= self.until

        trainer.on_epoch = end_epoch

    def errors(self, ten_views: bool = False) -> tuple[float, float]:
        """Top-1 and top-5 error on the test images, of the best epoch's weights."""
        result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        if ten_views:
            machine = {name: getattr(self.config.run, name) for name in ("device", "threads")}
            networks = Networks(
                checkpoint=(str(self.folder / "best.pt"),), ten_crop=True, **machine
            )
            with (
                open(self.folder / "log.txt", "a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
            ):
                result = evaluate_checkpoints(
                    EvaluateRequest(networks, limit_test=self.config.data.limit_test)
                )
        return 1 - result["top1"], 1 - result["top5"]


def trainings(
    claim: Claim, request: ClaimsRequest, seed: int
) -> tuple[list[Training], list[Training]]:
    """Returns the runs of one seed with the feature and without it (one for each rate tried)."""

    def one(name: str, until: float = 0.0, **changes: Any) -> Training:
        return Training(
            Path(request.out) / f"{name}-{seed}", request.config(claim.base, seed, **changes), until
        )

    if claim.measure == SPEED:
        return tuple(
            [
                one(
                    f"{claim.base}-{activation}-{rate:g}",
                    TARGET,
                    activation=activation,
                    lr=rate,
                    bias_lr=2 * rate,
                )
                for rate in request.rates
            ]
            for activation in ("relu", claim.without["activation"])
        )
    if claim.name == "lrn-four-layers":  # whose preset has none
        return [one("four-layers-lrn", lrn=True)], [one("four-layers", **claim.without)]
    return [one(request.preset)], [
        one(f"{request.preset}-no-{claim.name}", **claim.without)
    ] if claim.without else []


def measured(claim: Claim, request: ClaimsRequest) -> dict[str, Any]:
    """Returns one row of the table. Differences have the paper's direction: negative is better."""
    pairs = [trainings(claim, request, seed) for seed in range(request.seeds)]
    row = {"claim": claim.name, "text": claim.text, "paper": claim.paper, "seeds": request.seeds}
    if claim.measure == SPEED:
        fastest = [
            [min((n for t in side if (n := t.reached())), default=None) for side in pair]
            for pair in pairs
        ]
        ratios = [without / having for having, without in fastest if having and without]
        return row | {
            "with": [f[0] for f in fastest],
            "without": [f[1] for f in fastest],
            "differences": ratios,
            "unit": "times the epochs",
        }
    scores = [
        (having[0].errors(ten_views=claim.measure == VIEWS), (without or having)[0].errors())
        for having, without in pairs
        if not any((training.folder / "diverged").exists() for training in (*having, *without))
    ]
    return row | {
        "with": [having[0] for having, _ in scores],
        "without": [without[0] for _, without in scores],
        "unit": "points",
        "differences": [100 * (having[0] - without[0]) for having, without in scores],
        "differences_top5": [100 * (having[1] - without[1]) for having, without in scores],
    }


def verdict(row: dict[str, Any], quick: bool) -> str:
    """What the seeds say together; nothing for a smoke run or a single seed."""
    differences = row["differences"]
    if quick:
        return "smoke run"
    if len(differences) < max(row["seeds"], 2):
        lacking = (
            "target not always reached"
            if row["unit"] != "points"
            else "not every seed could be trained"
        )
        return "one seed says little" if row["seeds"] < 2 else lacking
    signs = [d - 1 if row["unit"] != "points" else -d for d in differences]
    return (
        "as claimed" if min(signs) > 0 else "the other way" if max(signs) < 0 else "seeds disagree"
    )


def line(row: dict[str, Any], quick: bool) -> str:
    """One row for people: the mean over seeds and its spread."""

    def spread(values: list[float], sign: str) -> str:
        if not values:
            return "not reached" if row["unit"] != "points" else "diverged"
        return f"{statistics.mean(values):{sign}.2f}" + (
            f" ({min(values):{sign}.2f} to {max(values):{sign}.2f})" if len(values) > 1 else ""
        )

    points = row["unit"] == "points"
    ours = spread(row["differences"], "+" if points else "") + ("" if points else " times")
    if points:
        ours = f"top-1 {ours}, top-5 {spread(row['differences_top5'], '+')}"
    return f"{row['text']:52s}  {row['paper']:32s}  {ours:56s}  {verdict(row, quick)}"


def draw_relu(request: ClaimsRequest) -> None:
    """Draws training error over epochs of both nets at their fastest rate, as the paper's figure
    1."""
    claim = next(claim for claim in CLAIMS if claim.measure == SPEED)
    sides = zip(("ReLU", "tanh"), trainings(claim, request, 0), strict=True)
    best = {
        name: min(side, key=lambda training: training.reached() or float("inf"))
        for name, side in sides
    }
    curves = {
        f"{name}, lr {training.config.recipe.lr:g}": read_history(training.folder)
        for name, training in best.items()
    }
    if all(curves.values()):
        compare_curves(curves, "train_top1", Path(request.out) / "relu.png", target=TARGET)


def rows(request: ClaimsRequest, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Trains what is missing, claim by claim, and measures."""
    chosen = [claim for claim in CLAIMS if claim.name in request.claims]
    needed = {
        training.folder: training
        for claim in chosen
        for seed in range(request.seeds)
        for side in trainings(claim, request, seed)
        for training in side
    }
    missing = [training for training in needed.values() if not training.done()]
    say(f"{len(needed)} trainings, {len(needed) - len(missing)} of them found in {request.out}")
    for training in tqdm(missing, unit="run", leave=False, disable=None):
        training.train()
    for claim in chosen:
        yield measured(claim, request)


def main() -> int:
    request = parse_request(ClaimsRequest, sys.argv[1:], DESCRIPTION)
    request = request.shortened() if request.quick else request
    with printing_json(request.json) as write:
        print(
            f"{request.preset} at {request.image_size} px on {request.data}, {request.epochs} "
            f"epochs, {request.seeds} seed(s), {request.precision}"
            + (": A SMOKE RUN, its figures mean nothing" if request.quick else ""),
            flush=True,
        )
        table = []
        for row in rows(request, lambda text: print(text, flush=True)):
            if not table:
                print(f"{'claim':52s}  {'paper':32s}  {'ours: error, or epochs':56s}  verdict")
            print(line(row, request.quick), flush=True)
            table.append(row | {"verdict": verdict(row, request.quick)})
        if "relu" in request.claims:
            draw_relu(request)
        content = {"request": dataclasses.asdict(request), "claims": table}
        (Path(request.out) / "ablations.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        write(content)
    return 0


if __name__ == "__main__":
    run_main(main)
