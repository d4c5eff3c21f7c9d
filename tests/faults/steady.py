#!/usr/bin/env python
"""Measures whether a long training grows: memory and open files of two ranks over time.

    python tests/faults/steady.py --minutes 30 [flags of train.py]

It trains the demo preset on `shapes` without end, unless flags say otherwise. The first fifth of
the time is a warm-up. Exit code 1 if memory grows by more than MEGABYTES an hour, or the number of
open files at all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 60.0  # an hour and rank: a leak of a hundredth of one batch of 32 images a step is more


def children(parent: int) -> list[int]:
    """The processes that `parent` has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if (
                entry.name.isdigit()
                and int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                == parent
            ):
                found.append(int(entry.name))
    return sorted(found)


def sample(pid: int) -> tuple[float, int]:
    """(megabytes resident, open files)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and open files of a long training.")
    parser.add_argument("--minutes", type=float, default=30)
    asked, flags = parser.parse_known_args()
    seconds, samples = asked.minutes * 60, []
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "screen"), "wb") as screen:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "launch/train.py",
            "--epochs",
            "1000000",
            "--out",
            f"{folder}/run",
            "--save-every",
            "50",
            "--keep-checkpoints",
            "2",
            *flags,
        ]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
            stdout=screen,
            stderr=screen,
        ) as process:
            started = time.monotonic()
            while time.monotonic() < started + seconds and process.poll() is None:
                time.sleep(min(5.0, seconds / 50))
                with contextlib.suppress(OSError):
                    if len(pids := children(process.pid)) == 2:
                        samples.append(
                            (
                                time.monotonic() - started,
                                *[value for pid in pids for value in sample(pid)],
                            )
                        )
            ended_itself = process.poll() is not None
            process.send_signal(signal.SIGTERM)
        if ended_itself:
            print(Path(folder, "screen").read_text(errors="replace")[-2000:])
            return 1
    values = np.array([row for row in samples if row[0] > seconds / 5])
    hours, failed = values[:, 0] / 3600, False
    for rank in (0, 1):
        memory, files = values[:, 1 + 2 * rank], values[:, 2 + 2 * rank]
        slope, more = (
            np.polyfit(hours, memory, 1)[0],
            files[len(files) * 3 // 4 :].max() - files[: max(len(files) // 4, 1)].max(),
        )
        failed |= slope > MEGABYTES or more > 0
        print(
            f"rank {rank}: {memory[0]:.0f} MB at first, {memory[-1]:.0f} at last, "
            f"slope {slope:+.1f} MB an hour; open files {files.min():.0f} to {files.max():.0f}, "
            f"{more:+.0f} from the first to the last quarter "
            f"({len(values)} samples, {values[-1, 0] - values[0, 0]:.0f} s)"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
