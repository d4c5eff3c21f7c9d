#!/usr/bin/env python
"""Draws the pictures of a finished run.

    python launch/figures.py RUN [--out FOLDER] [--images N] [--window N] [--compare RUN2 ...]

RUN is a folder that launch/train.py wrote. `--help` lists the flags.
"""

import sys
from pathlib import Path

from alexnet_mp.cli import parser
from alexnet_mp.cli.process import printing_json, run_main
from alexnet_mp.config.arguments import FiguresRequest
from alexnet_mp.inference.finished_run import FinishedRun
from alexnet_mp.inference.run_pictures import draw
from alexnet_mp.parallel.devices import choose_device, set_threads
from alexnet_mp.parallel.launcher import Environment

DESCRIPTION = """Draws what a run has learned: kernels.png (the first layer, column above column, with its color selectivity), curves.png,
samples.png (training images), predictions.png (test images with their likeliest classes) and neighbors.png (the training images
nearest to test images by fc7), into RUN or --out. One process on one device, whatever the placement that trained it."""


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
        run = FinishedRun(request.run, device, request.data_dir, show_progress=True)
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
