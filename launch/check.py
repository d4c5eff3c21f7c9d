#!/usr/bin/env python
"""Will training work on this machine, and how fast?

    torchrun --nproc_per_node=2 launch/check.py

`--help` lists the flags. Exit code 1 where a check fails; its row names the remedy.
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
    run_command("check", sys.argv[1:])
