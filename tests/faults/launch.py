#!/usr/bin/env python
"""launch/train.py with a fault: FAULT RANK NOTE [flags].

Strikes that rank, in the job's first start only (torchrun --max-restarts). FAULTS_HOST is the name
of the host that this process is to believe it runs on.
"""

import os
import runpy
import signal
import socket
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)

FAULTS = Path(__file__).resolve().parent

if __name__ == "__main__":
    fault, rank, note, *flags = sys.argv[1:]
    sys.path[:0] = [str(FAULTS), str(FAULTS.parents[1])]
    if (
        fault != "none"
        and rank in ("all", os.environ.get("RANK", "0"))
        and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    ):
        import inject

        inject.install(fault, Path(note))
    if "FAULTS_HOST" in os.environ:
        socket.gethostname = lambda: os.environ["FAULTS_HOST"]
    sys.argv = ["launch/train.py", *flags]
    runpy.run_path(str(FAULTS.parents[1] / "launch" / "train.py"), run_name="__main__")
