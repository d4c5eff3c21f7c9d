#!/usr/bin/env python
"""Trains AlexNet in columns.

    torchrun --nproc_per_node=2 launch/train.py [flags]     one column on each of two GPUs
    python launch/train.py [flags]                          all columns on one device

`--help` lists the flags; without any, the demo preset trains on generated images.
"""

import signal
import sys

# Ctrl-C during the seconds that torch takes to import leaves no traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    from alexnet_mp.cli.commands import run_command
except ModuleNotFoundError:
    print("error: alexnet_mp is not installed: pip install -e .", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    run_command("train", sys.argv[1:])
