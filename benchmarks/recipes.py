#!/usr/bin/env python
"""What the recipes reach: the 2012 source's beside the paper's and the tutorial's.

    python benchmarks/recipes.py --data folder --data-dir DIR --epochs 40 --seeds 3 --jobs 2
    python benchmarks/recipes.py --quick     trains every network for a moment

`original` with several seeds, each network alone and their average, with one view and with ten;
`paper` and `tutorial` for as many epochs; and both readings with the start of conv3-5 exchanged:
the step at which each leaves ln(classes). Trainings are kept in --out and found again. `--help`
lists the flags.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plateau import WINDOW, left_plateau, means_of_window
from training_request import Table, TrainingRequest, print_table
from trainings import Training, evaluated, found, log_to

from alexnet_mp import preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config.files import write_atomically

DESCRIPTION = """Trains original with several seeds and tests each network and their average, with
one view and with ten; beside it paper, tutorial, and paper and original with the start of conv3-5
exchanged."""
VIEWS = ("one_view", "ten_views")


@dataclass(frozen=True)
class Recipe:
    """One way to train: a preset, with the start of another one if it is named."""

    name: str
    text: str
    preset: str
    start_of: str = ""


RECIPES = (
    Recipe("original", "original", "original"),
    Recipe("paper", "paper", "paper"),
    Recipe("tutorial", "tutorial", "tutorial"),
    Recipe("paper-started-as-original", "paper, conv3-5 start at 0.03", "paper", "original"),
    Recipe("original-started-as-paper", "original, conv3-5 start at 0.01", "original", "paper"),
)


@dataclass(frozen=True)
class RecipesRequest(TrainingRequest):
    """What is trained, for how long, on what?"""

    epochs: int = 40
    """Passes over the training images, to which schedules are scaled; tutorial may stop early."""
    seeds: int = 3
    """original is trained with the seeds 0 to N - 1."""
    other_seeds: int = 1
    """Likewise for the other recipes."""
    out: str = "runs/recipes"
    """Folder for the trainings, the weights of original, and the table (recipes.json)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("seeds", "other_seeds")


def training(recipe: Recipe, request: RecipesRequest, seed: int) -> Training:
    """One network. `tutorial` keeps its own batch, its held-out images and its best epoch."""
    changes: dict[str, Any] = {"seed": seed, "epochs": request.epochs}
    is_tutorial = recipe.preset == "tutorial"
    if is_tutorial:
        own = preset("tutorial")
        changes |= {"validation": own.data.validation, "limit_val": 0}
        changes |= {"batch_size": min(own.recipe.batch_size, request.batch_size)}
    if recipe.start_of:
        changes["initial_weights"] = preset(recipe.start_of).model.initial_weights
    return Training(
        f"{recipe.name}-{request.epochs}-epochs-seed-{seed}",
        request.config(recipe.preset, **changes),
        ten_views=True,
        best_epoch=is_tutorial,
        record_losses=not is_tutorial,
        keep=request.keep_checkpoints or recipe.name == "original",
    )


def trainings(recipe: Recipe, request: RecipesRequest) -> list[Training]:
    """The networks of one recipe, one for each seed."""
    seeds = request.seeds if recipe.name == "original" else request.other_seeds
    return [training(recipe, request, seed) for seed in range(seeds)]


def in_order(request: RecipesRequest) -> list[Training]:
    """Every training: the first seed of all recipes, then the second."""
    sides = [trainings(recipe, request) for recipe in RECIPES]
    longest = max(map(len, sides))
    return [side[seed] for seed in range(longest) for side in sides if seed < len(side)]


def measured(recipe: Recipe, request: RecipesRequest) -> dict[str, Any]:
    """One row of the table; accuracies are fractions of 1, one for each finished seed."""
    out = Path(request.out)
    done = [
        (seed, one, scores)
        for seed, one in enumerate(trainings(recipe, request))
        if (scores := found(one, out)) and scores["end"] == "finished"
    ]
    row: dict[str, Any] = {"recipe": recipe.name, "text": recipe.text}
    row["seeds"] = [seed for seed, *_ in done]
    row["epochs"] = [scores["epochs"] for *_, scores in done]
    row["seconds"] = [scores["seconds"] for *_, scores in done]
    for views in VIEWS:
        for top in ("top1", "top5"):
            row[f"{views}_{top}"] = summary([scores[views][top] for *_, scores in done])
    losses = [step_losses(one, out) for _, one, _ in done if one.record_losses]
    row["left_plateau"] = [
        left_plateau(steps, classes(one, out))
        for (_, one, _), steps in zip(done, losses, strict=False)
    ]
    row["means_of_losses"] = [
        [float(f"{mean:.5g}") for mean in means_of_window(steps)[::WINDOW]] for steps in losses
    ]
    return row


def summary(values: list[float]) -> dict[str, Any]:
    """All values, their mean, and their standard deviation where there are several."""
    return {
        "values": [round(value, 6) for value in values],
        "mean": round(statistics.mean(values), 6) if values else None,
        "deviation": round(statistics.stdev(values), 6) if len(values) > 1 else None,
    }


def step_losses(one: Training, out: Path) -> list[float]:
    """The loss of each step of a finished training."""
    content: list[float] = json.loads((out / one.name / "losses.json").read_text("utf-8"))
    return content


def classes(one: Training, out: Path) -> int:
    """The number of classes that its images have."""
    content = json.loads((out / one.name / "config.json").read_text("utf-8"))
    return len(content["data"]["classes"])


def average(request: RecipesRequest) -> dict[str, Any] | None:
    """Scores of the average of all seeds of `original`; None before all are there."""
    out, members = Path(request.out), trainings(RECIPES[0], request)
    if len(members) < 2 or any(found(one, out) is None for one in members):
        return None
    names = [one.name for one in members]
    file = out / "average.json"
    if file.exists():
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if content["networks"] == names:
            return content
    files = [out / one.name / one.weights_name for one in members]
    content = {"networks": names}
    with log_to(out / "average.txt"):
        for views in VIEWS:
            content[views] = evaluated(files, members[0].config, ten_views=views == "ten_views")
    write_atomically(file, json.dumps(content) + "\n")
    return content


def table(request: RecipesRequest) -> dict[str, Any]:
    """A row for each recipe, of what is complete so far, and the average of original's seeds."""
    rows = [measured(recipe, request) for recipe in RECIPES]
    return {"recipes": rows, "average": average(request)}


HEAD = (
    f"{'':34s} {'seeds':>5s} {'one view: top-1':>17s} {'top-5':>16s} "
    f"{'ten views: top-1':>17s} {'top-5':>16s}  left ln(classes)"
)


def lines(content: dict[str, Any]) -> list[str]:
    """The table for people."""
    printed = [HEAD]
    for row in content["recipes"]:
        cells = [row[f"{views}_{top}"] for views in VIEWS for top in ("top1", "top5")]
        steps = ", ".join(
            "never" if step is None else f"step {step}" for step in row["left_plateau"]
        )
        printed.append(
            f"{row['text']:34s} {len(row['seeds']):5d} "
            + " ".join(f"{percent(cell):>16s} " for cell in cells)
            + f" {steps}"
        )
    if content["average"]:
        found = content["average"]
        cells = [f"{found[views][top]:.2%}" for views in VIEWS for top in ("top1", "top5")]
        count = len(found["networks"])
        printed.append(
            f"{f'the average of {count} of original':34s} {count:5d} "
            + " ".join(f"{cell:>16s} " for cell in cells)
        )
    return printed


def percent(cell: dict[str, Any]) -> str:
    if cell["mean"] is None:
        return "-"
    spread = "" if cell["deviation"] is None else f" +-{100 * cell['deviation']:.2f}"
    return f"{100 * cell['mean']:.2f}{spread} %"


def main() -> int:
    request = parse_request(RecipesRequest, sys.argv[1:], DESCRIPTION)
    if request.quick:
        request = request.shortened(epochs=2, seeds=2, other_seeds=1)
    return print_table(Table("recipes", request, in_order, table), lines)


if __name__ == "__main__":
    run_main(main)
