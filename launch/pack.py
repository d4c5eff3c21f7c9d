#!/usr/bin/env python
"""Packs an image folder into a store that training reads at full speed.

    python launch/pack.py SOURCE STORE [--encode jpeg]
    python launch/pack.py SOURCE --check

`--help` lists the flags. Repeat the command after an interruption: finished shards are kept.
Exit code 2 if files cannot be read.
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
    run_command("pack", sys.argv[1:])
