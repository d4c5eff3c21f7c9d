"""The command train, which also notes when this rank's first step ended and what it took.

    torchrun --nproc_per_node=2 benchmarks/first_step.py NOTES IMAGES [flags of train]

Rank R writes NOTES/R.json. Files below the folder IMAGES that it opens are counted.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

notes, images = Path(sys.argv[1]), os.path.abspath(sys.argv[2]) + os.sep
opened = 0


def count_open(event: str, arguments: tuple[Any, ...]) -> None:
    global opened
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened += os.path.abspath(os.fsdecode(arguments[0])).startswith(images)


def note(*_: Any) -> None:
    """Called after every step; writes the first one's file."""
    file = notes / f"{os.environ.get('RANK', '0')}.json"
    if file.exists():
        return
    status = Path("/proc/self/status")  # only Linux has it
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if value.endswith(" kB")
    }
    descriptors = Path("/proc/self/fd")
    content = {
        "ended_at": time.time(),
        "cpu_seconds": time.process_time(),
        "peak_memory_bytes": 1024 * kilobytes.get("VmHWM", 0),
        "own_memory_bytes": 1024 * kilobytes.get("RssAnon", 0),
        "open_files": len(list(descriptors.iterdir())) if descriptors.exists() else None,
        "image_files_opened": opened,
    }
    file.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.addaudithook(count_open)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from alexnet_mp.cli.commands import run_command

    register_optimizer_step_post_hook(note)
    run_command("train", sys.argv[3:])
