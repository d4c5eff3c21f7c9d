"""The command `figures`: the pictures of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alexnet_mp.cli.parser import parse_figures
from alexnet_mp.cli.process import printing_json, refuse_several_ranks
from alexnet_mp.inference.finished_run import FinishedRun
from alexnet_mp.inference.run_pictures import draw
from alexnet_mp.parallel.devices import choose_device, set_threads
from alexnet_mp.parallel.launcher import Environment


def figures(argv: Sequence[str]) -> int:
    """Draws the pictures of the run that `argv` names and prints a line about each. Returns 0."""
    request = parse_figures(argv)
    refuse_several_ranks("figures")
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
            known = {"file": str(picture.file), "caption": picture.caption}
            facts[picture.file.stem] = known | picture.facts
            print(f"{picture.file}: {picture.caption}", flush=True)
        if not run.history:
            print("no epoch has ended, so there is no curves.png")
        write(facts)
    return 0
