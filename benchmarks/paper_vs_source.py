#!/usr/bin/env python
"""Trains the paper's words and the 2012 source side by side, and finds the difference that matters.

    python benchmarks/paper_vs_source.py --data folder --data-dir DIR --steps 600
    python benchmarks/paper_vs_source.py --classes 1000 --steps 600     1000 generated classes

Trains `paper`, `original`, `paper` with one difference taken over from `original`, and `original`
with one given back, each from the same seed on the same images. One process on one device. `--help`
lists the flags.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from plateau import WINDOW, RecordingLoss, left_plateau, means_of_window
from tqdm.auto import tqdm
from tyro.conf import arg

from alexnet_mp import Config, Trainer, build_network, preset
from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import printing_json, run_main
from alexnet_mp.data import Splits, Store, build_loaders, load
from alexnet_mp.ops.allocator import keep_freed_memory
from alexnet_mp.parallel.devices import choose_device, set_threads
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.plotting.curves import moving_average
from alexnet_mp.plotting.page import save_figure
from alexnet_mp.training.schedule import build_schedule
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.trainer import NonFiniteError

DESCRIPTION = """Trains the paper to the letter, the 2012 source, and every net one difference away
from either, for some hundred steps. Prints when each loss leaves ln(classes), and draws them."""
DIFFERENCES = {
    "start of conv3-5": ("initial_weights",),
    "LRN before ReLU": ("layer1_order",),
    "LRN's alpha": ("lrn_alpha",),
    "second norm": ("map_norm",),
    "biases' rate, decay": ("bias_lr", "bias_decay"),
    "crops, mean, color": (
        "last_offset",
        "images_per_crop",
        "mean",
        "color_unit",
        "color_divides",
    ),
}
"""What `original` has otherwise than `paper`; the schedules do not differ in the first epochs."""


@dataclass(frozen=True)
class ReadingsRequest:
    """On what, for how long?"""

    data: Literal["generated", "shapes", "cifar10", "fashion-mnist", "folder", "store"] = (
        "generated"
    )
    """The images; generated: --classes colored patterns, shifted and noisy."""
    data_dir: str = "data"
    """Where they are."""
    classes: int = 1000
    """Classes of generated images."""
    steps: int = 600
    """Optimizer steps of each network."""
    image_size: int = 64
    """Side of the crop."""
    batch_size: int = 128
    """Images in one step."""
    single: bool = True
    """Also train what lies one difference away; --no-single: the two readings only."""
    differences: tuple[str, ...] = tuple(DIFFERENCES)
    """Which differences --single tries."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    seed: int = 0
    """Of weights, order, crops, colors and dropout."""
    out: str = "readings.png"
    """The picture."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the table and all losses into this file too; -: only them, to the standard output."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.differences if name not in DIFFERENCES]
        if unknown:
            names = ", ".join(map(repr, DIFFERENCES))
            raise ValueError(f"--differences {unknown[0]!r}: not one of {names}")
        for name in ("classes", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1"
                )

    def config(self, name: str, **changes: Any) -> Config:
        """The reading `name` with `changes`, on this request's images."""
        source = {} if self.data == "generated" else {"data": self.data, "data_dir": self.data_dir}
        return preset(name).with_fields(
            image_size=self.image_size,
            batch_size=self.batch_size,
            max_steps=self.steps,
            precision=self.precision,
            seed=self.seed,
            **source,
            **changes,
        )


def variants(request: ReadingsRequest) -> dict[str, Config]:
    """Label -> configuration: the two readings, then what lies one difference away from either."""
    readings = {name: request.config(name) for name in ("paper", "original")}
    if not request.single:
        return readings
    for base, other, word in (
        ("paper", "original", "+ the source's"),
        ("original", "paper", "+ the paper's"),
    ):
        theirs = readings[other]
        for what in request.differences:
            names = DIFFERENCES[what]
            values = {
                name: getattr(part, name)
                for part in (theirs.model, theirs.data, theirs.recipe)
                for name in names
                if hasattr(part, name)
            }
            readings[f"{base} {word} {what}"] = request.config(base, **values)
    return readings


def generated(classes: int, side: int, seed: int, per_class: int = 16) -> Splits:
    """Draws images of `classes` smooth color patterns (8x8 random colors, enlarged), each image
    shifted, dimmed and noisy."""
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(
        torch.rand(classes, 3, 8, 8, generator=generator), size=side, mode="bilinear"
    ).mul_(255)
    labels = torch.arange(classes).repeat(per_class)
    images = torch.empty((len(labels), 3, side, side), dtype=torch.uint8)
    for i, label in enumerate(
        tqdm(labels.tolist(), desc="drawing", unit=" images", leave=False, disable=None)
    ):
        down, right = torch.randint(-side // 8, side // 8 + 1, (2,), generator=generator).tolist()
        noisy = patterns[label].roll((down, right), (1, 2)) * (
            0.7 + 0.3 * torch.rand(1, generator=generator)
        )
        images[i] = noisy.add_(20 * torch.randn(noisy.shape, generator=generator)).clamp_(0, 255)
    store = Store([images.numpy()], labels.numpy(), [f"pattern {k}" for k in range(classes)])
    few = store.subset(np.arange(min(len(store), 128)))
    return Splits(store, few, few)


def losses_of(config: Config, splits: Splits, device: torch.device) -> list[float]:
    """The loss of each step; shorter where it stopped being a number."""
    config = config.with_fields(classes=len(splits.train.classes))
    train, val, _, _ = build_loaders(config, splits, device=device)
    model = build_network(config.model, seed=config.run.seed)
    optimizer, criterion = build_optimizer(model, config.recipe), RecordingLoss()
    trainer = Trainer(
        model,
        criterion,
        optimizer,
        device,
        patience=0,
        schedule=build_schedule(optimizer, config.recipe),
        precision=config.run.precision,
        seed=config.run.seed,
        max_steps=config.recipe.max_steps,
        verbose=False,
    )
    try:
        trainer.train(train, val, -(-config.recipe.max_steps // len(train)))
    except NonFiniteError as error:
        print(error, file=sys.stderr)
    return criterion.losses()[: config.recipe.max_steps]


def row(label: str, losses: list[float], classes: int) -> dict[str, Any]:
    """What the table says of one network."""
    return {
        "label": label,
        "classes": classes,
        "left_plateau": left_plateau(losses, classes),
        "last_loss": round(means_of_window(losses)[-1], 5),
        "losses": [round(loss, 5) for loss in losses],
    }


def draw(rows: list[dict[str, Any]], classes: int, path: str) -> None:
    """Draws both readings in one panel, and the nets one difference away from each in another."""
    panels = [[r for r in rows if r["label"] in ("paper", "original")]]
    panels += [
        group
        for base in ("paper", "original")
        if len(group := [r for r in rows if r["label"].startswith(base)]) > 1
    ]
    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    for axes, group in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True
    ):
        for number, one in enumerate(group):
            smooth = moving_average(one["losses"], WINDOW)
            steps = np.arange(len(one["losses"]) - len(smooth) + 1, len(one["losses"]) + 1)
            style = {
                "linestyle": ("-", "--", "-.", ":")[number % 4],
                "linewidth": 1.3 if " " in one["label"] else 2,
            }
            axes.plot(steps, smooth, label=one["label"], **style)
        axes.axhline(math.log(classes), color="gray", linewidth=0.8)
        axes.text(
            0.01,
            math.log(classes),
            f"ln {classes}",
            transform=axes.get_yaxis_transform(),
            va="bottom",
            fontsize=8,
            color="gray",
        )
        axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
        axes.grid(alpha=0.3)
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False
        )  # below: curves fill the panel
    save_figure(figure, path)


def trained(request: ReadingsRequest) -> Iterator[dict[str, Any]]:
    """One row after another, as they are ready."""
    device = choose_device(request.device, Environment())
    set_threads(request.threads, Environment(), device)
    if device.type == "cpu":
        keep_freed_memory()
    configs = variants(request)
    first = configs["paper"]
    side = first.data.resized_side(request.image_size)
    if request.data == "generated":
        splits = generated(request.classes, side, request.seed)
    else:
        splits = load(first.data, request.seed, progress=True, side=side)
    classes = len(splits.train.classes)
    for label, config in tqdm(configs.items(), unit="net", leave=False, disable=None):
        yield row(label, losses_of(config, splits, device), classes)


def main() -> int:
    request = parse_request(ReadingsRequest, sys.argv[1:], DESCRIPTION)
    with printing_json(request.json) as write:
        rows = []
        print(f"{'':44s} {'left ln(classes)':>18s} {'last loss':>10s}", flush=True)
        for one in trained(request):
            left = "never" if one["left_plateau"] is None else f"step {one['left_plateau']}"
            print(f"{one['label']:44s} {left:>18s} {one['last_loss']:10.4f}", flush=True)
            rows.append(one)
        classes = rows[0]["classes"]
        draw(rows, classes, request.out)
        print(f"{Path(request.out)}: the losses; ln {classes} is {math.log(classes):.4f}")
        write({"request": dataclasses.asdict(request), "classes": classes, "rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
