#!/usr/bin/env python
"""Draws the pictures of a finished run, and puts them with all else on one page.

    python launch/figures.py RUN [--html] [--out FOLDER] [--images N] [--compare RUN2 ...]

RUN is a folder that launch/train.py wrote. `--help` lists the flags.
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
    run_command("figures", sys.argv[1:])
