#!/usr/bin/env python
"""Draws the pictures of a finished run.

    python launch/figures.py RUN [--out FOLDER] [--images N] [--window N] [--compare RUN2 ...]

RUN is a folder that launch/train.py wrote. `--help` lists the flags.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from alexnet_mp.cli import parser
from alexnet_mp.cli.process import printing_json, run_main
from alexnet_mp.inference.run_pictures import FinishedRun, draw
from alexnet_mp.parallel.rendezvous import Environment, choose_device, set_threads

DESCRIPTION = """Draws what a run has learned: kernels.png (the first layer, column above column, with its color selectivity), curves.png,
samples.png (training images), predictions.png (test images with their likeliest classes) and neighbours.png (the training images
nearest to test images by fc7), into RUN or --out. One process on one device, whatever the placement that trained it."""


@dataclass(frozen=True)
class FiguresRequest:
    """Which pictures?"""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Folder of a run: config.json, history.jsonl, and best.pt or last.pt."""
    out: str = ""
    """Folder for the pictures; default: RUN."""
    images: int = 8
    """Test images in predictions.png and in neighbours.png."""
    window: int = 1
    """Epochs that each point of a curve is the mean of."""
    compare: Annotated[tuple[str, ...], arg(metavar="RUN2")] = ()
    """More runs' folders, after RUN: compare.png shows one number of all of them."""
    key: str = "train_top1"
    """What compare.png shows, a name in history.jsonl; accuracies as errors."""
    target: float | None = None
    """Horizontal line in compare.png, e.g. 0.25; the legend says after how many epochs each run reached it."""
    data_dir: str = ""
    """Where the images are; default: where they were in training."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write what is to be seen into this file too, in numbers; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        for name in ("images", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


def main() -> int:
    request = parser.parse_request(FiguresRequest, sys.argv[1:], DESCRIPTION)
    if Environment.read().world_size > 1:
        raise ValueError(
            "launch/figures.py is one process: start it with python, not with torchrun"
        )
    device = choose_device(request.device, Environment())
    set_threads(request.threads, Environment(), device)
    facts = {}
    with printing_json(request.json) as write:
        run = FinishedRun(request.run, device, request.data_dir, progress=True)
        for picture in draw(
            run,
            Path(request.out or request.run),
            request.images,
            request.window,
            request.compare,
            request.key,
            request.target,
        ):
            facts[picture.file.stem] = {
                "file": str(picture.file),
                "caption": picture.caption,
            } | picture.facts
            print(f"{picture.file}: {picture.caption}", flush=True)
        if not run.history:
            print("no epoch has ended, so there is no curves.png")
        write(facts)
    return 0


if __name__ == "__main__":
    run_main(main)
