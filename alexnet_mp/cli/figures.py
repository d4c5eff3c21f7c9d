"""The command `figures`: the pictures of a finished run, and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alexnet_mp.cli.parser import parse_figures
from alexnet_mp.cli.process import printing_json, refuse_several_ranks
from alexnet_mp.inference.finished_run import FinishedRun
from alexnet_mp.inference.run_pictures import Picture, drawings
from alexnet_mp.inference.run_report import Parts, write_report
from alexnet_mp.parallel.devices import choose_device, set_threads
from alexnet_mp.parallel.launcher import Environment


def figures(argv: Sequence[str]) -> int:
    """Draws the pictures of the run that `argv` names and prints a line about each. Returns 0.

    With `--html` a picture that cannot be drawn is named instead, here and in the report.
    """
    request = parse_figures(argv)
    refuse_several_ranks("figures")
    device = choose_device(request.device, Environment())
    set_threads(request.threads, Environment(), device)
    facts: dict[str, Any] = {}
    with printing_json(request.json) as write:
        run = FinishedRun(request.run, device, request.data_dir, show_progress=True)
        out, parts = Path(request.out or request.run), Parts()
        planned = drawings(
            run,
            out,
            request.images,
            request.window,
            request.compare,
            request.key,
            request.target,
        )
        found: Iterable[Picture] = (
            parts.draw(planned) if request.html else (one.draw() for one in planned)
        )
        for picture in found:
            known = {"file": str(picture.file), "caption": picture.caption}
            facts[picture.file.stem] = known | picture.facts
            print(f"{picture.file}: {picture.caption}", flush=True)
        if not run.history:
            print("no epoch has ended, so there is no curves.png")
        if request.html:
            path, missing = write_report(run, parts, out, request.compare)
            without = f"; missing: {', '.join(missing)}" if missing else ""
            print(f"{path}: the whole run on one page{without}")
            facts["report"] = {"file": str(path), "missing": missing}
        write(facts)
    return 0
