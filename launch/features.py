#!/usr/bin/env python
"""Writes the activations of a trained network for the images of a folder into an .npz file.

    python launch/features.py --checkpoint RUN/best.pt FOLDER OUT.npz --layer fc7

`--help` lists the flags. Exit code 2 if a file could not be read; the others are in OUT.npz all the
same.
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
    run_command("features", sys.argv[1:])
