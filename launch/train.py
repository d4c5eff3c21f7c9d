#!/usr/bin/env python
"""Trains AlexNet in columns.

    torchrun --nproc_per_node=2 launch/train.py [flags]     one column on each of two GPUs, or CPU processes
    python launch/train.py [flags]                          all columns on one device

`--help` lists the flags; without any, the demo preset trains on generated images.
"""

import signal
import sys

signal.signal(
    signal.SIGINT, signal.SIG_DFL
)  # Ctrl-C during the seconds that torch takes to import leaves no traceback

from alexnet_mp.cli.parser import parse_train  # noqa: E402
from alexnet_mp.cli.process import Signals, run_main  # noqa: E402
from alexnet_mp.training.run import run  # noqa: E402


def main() -> int:
    signals = Signals()
    result = run(parse_train(sys.argv[1:]), signals.install)
    return 128 + (signals.received or 15) if result.get("stopped") else 0


if __name__ == "__main__":
    run_main(main)
