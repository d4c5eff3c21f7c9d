#!/usr/bin/env python
"""Kills jobs at random moments and continues them: they must end as an uninterrupted run does.

    python tests/faults/soak.py --kills 200 [--seed N] [--ranks 2] [--torchrun N]

Ranks are forked as in harness.py. A random one, or all, is killed, stopped for good, or asked to
end by a signal, at a random time or at a random point of the code. A job that reaches its end is
compared bit for bit, and a new one begins, until there were as many kills. `--torchrun N` then
kills N ranks of a real job, which torchrun --max-restarts starts again. Exit code 1 if anything was
lost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import torch
from harness import FAULTS, ROOT, TINY, Scenario

from alexnet_mp.training import checkpoint

FLAGS = (
    "--epochs",
    "8",
    "--save-every",
    "2",
    "--keep-checkpoints",
    "2",
    "--limit-train",
    "40",
)  # 40 steps
POINTS = (
    "step",
    "flags",
    "exchange",
    "update",
    "validation",
    "save",
    "write",
    "rename",
    "link",
    "history",
    "test",
    "plot",
    "handshake",
    "data",
)


def contents(out: Path) -> dict[str, object]:
    """The files of a finished job, without times."""
    files = {
        name: checkpoint.read(out / name)
        for name in ("last.pt", "best.pt", *(path.name for path in checkpoint.epoch_files(out)))
    }
    found: dict[str, object] = {}
    for name, content in files.items():
        found |= {
            f"{name} {part} {key}": value
            for part in ("model", "velocity")
            for key, value in content[part].items()
        }
        found[f"{name} step"] = content["loop"]["step"]
    found["history"] = [
        {k: v for k, v in json.loads(line).items() if "second" not in k}
        for line in (out / "history.jsonl").read_text().splitlines()
    ]
    # "exchange" is what the last process metered, which may have had no step left to train
    found["result"] = {
        k: v
        for k, v in json.loads((out / "result.json").read_text()).items()
        if "second" not in k and k != "exchange"
    }
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of the entries that are not equal bit for bit."""
    return sorted(
        {*one, *other}
        - {
            name
            for name in {*one} & {*other}
            if (
                torch.equal(one[name], other[name])
                if isinstance(one[name], torch.Tensor)
                else one[name] == other[name]
            )
        }
    )


def attempt(out: Path, ranks: int, draw: random.Random) -> tuple[str, harness.Outcome]:
    """One start of the job, and one fault: (the fault, the outcome)."""
    flags = FLAGS + (("--resume",) if (out / "last.pt").exists() else ())
    kind, victim = (
        draw.choice(("kill", "kill", "kill", "stop", "term", "exit")),
        draw.choice([*range(ranks), None]),
    )
    scenario = Scenario("soak", rank=victim, codes=(), flags=flags, world=ranks)
    if draw.random() < 0.5:
        scenario = dataclasses.replace(
            scenario, fault=f"{kind}@{draw.choice(POINTS)}:{draw.randint(1, 12)}"
        )
        return scenario.fault + f" rank {victim}", harness.run(scenario, out)
    seconds = draw.uniform(0.3, 4.0)
    timer = threading.Timer(seconds, strike, (out, kind, victim))
    timer.start()
    try:
        return f"{kind} after {seconds:.1f} s, rank {victim}", harness.run(scenario, out)
    finally:
        timer.cancel()


def strike(out: Path, kind: str, victim: int | None) -> None:
    """Strikes the ranks of the job that writes to `out`, which are found by their screen."""
    number = {"stop": signal.SIGSTOP, "term": signal.SIGTERM}.get(kind, signal.SIGKILL)
    screen, pids = str(out.with_name(f"{out.name}.screen")), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1") == screen:
                pids.append(int(entry.name))
    for rank, pid in enumerate(sorted(pids)):  # forked in their order
        if victim in (None, rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def soak(kills: int, ranks: int, seed: int, folder: Path) -> tuple[int, int, int]:
    """(kills, finished jobs, jobs that differed)."""
    draw = random.Random(seed)
    whole = folder / "whole"
    harness.run(Scenario("whole", flags=FLAGS, world=ranks), whole)
    expected, struck, finished, lost = contents(whole), 0, 0, 0
    out, starts = folder / "job0", 0
    while struck < kills:
        what, outcome = attempt(out, ranks, draw)
        starts += 1
        ended = all(code == 0 for code in outcome.codes)
        struck += not ended
        if (not ended and "Traceback" in outcome.screen) or outcome.left:
            print(
                f"after {what}: {outcome.codes}, left {outcome.left}\n{outcome.screen}", flush=True
            )
            lost += 1
        if (
            not ended
            and any(code == 2 for code in outcome.codes)
            and "which did not start" not in outcome.screen
        ):
            print(f"could not be continued after {what}:\n{outcome.screen}", flush=True)
            lost += 1
            out = folder / f"job{finished}-{struck}"
        if ended and (out / "result.json").exists():
            finished += 1
            wrong = differences(expected, contents(out))
            lost += bool(wrong)
            print(
                f"{struck} kills, {finished} jobs finished; this one in {starts} starts: "
                f"{wrong[:9] or 'equal bit for bit'}",
                flush=True,
            )
            shutil.rmtree(out)
            starts, out = 0, folder / f"job{finished}"
    return struck, finished, lost


def soak_torchrun(kills: int, seed: int, folder: Path) -> tuple[int, int]:
    """Kills ranks of a real job, which torchrun starts again: (kills, jobs that differed)."""
    draw, whole, out = random.Random(seed), folder / "torchrun-whole", folder / "torchrun"
    flags = ("--epochs", "60", "--save-every", "2", "--limit-train", "40")
    harness.run(Scenario("whole", flags=flags), whole, timeout=300)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        str(kills),
        str(FAULTS / "launch.py"),
        "none",
        "0",
        "none",
        *TINY,
        "--timeout",
        "20",
        "--out",
        str(out),
        *flags,
    ]
    with open(folder / "torchrun.screen", "wb") as screen:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=screen, stderr=screen)
        struck = 0
        while process.poll() is None:
            time.sleep(draw.uniform(4, 9))
            victims = [
                int(entry.name)
                for entry in Path("/proc").iterdir()
                if entry.name.isdigit() and _parent(entry) == process.pid
            ]
            if struck < kills and victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(victims), signal.SIGKILL)
                    struck += 1
    if process.returncode:
        print((folder / "torchrun.screen").read_text(errors="replace")[-3000:])
        return struck, 1
    wrong = differences(contents(whole), contents(out))
    print(f"torchrun: {struck} kills, {wrong[:9] or 'equal bit for bit'}", flush=True)
    return struck, int(bool(wrong))


def _parent(entry: Path) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Random kills; the final weights must not know of them."
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", type=int, default=0, metavar="KILLS")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        struck, finished, lost = soak(asked.kills, asked.ranks, asked.seed, Path(name))
        more, also_lost = (
            soak_torchrun(asked.torchrun, asked.seed, Path(name)) if asked.torchrun else (0, 0)
        )
    print(
        f"{struck + more} kills, {finished + bool(asked.torchrun)} jobs finished, "
        f"{lost + also_lost} wrong, {time.monotonic() - started:.0f} s"
    )
    return int(lost + also_lost > 0)


if __name__ == "__main__":
    sys.exit(main())
