#!/usr/bin/env python
"""Measures trained networks: loss, top-1, top-5 over the images of a split.

    python launch/evaluate.py --checkpoint RUN/best.pt --ten-crop
    torchrun --nproc_per_node=2 launch/evaluate.py --checkpoint A/best.pt B/best.pt --weights 3 2

`--help` lists the flags; without --data, the data is what the first checkpoint was trained on.
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
    run_command("evaluate", sys.argv[1:])
