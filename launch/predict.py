#!/usr/bin/env python
"""Names what is on images.

    python launch/predict.py --checkpoint RUN/best.pt cat.jpg dog.png
    python launch/predict.py --checkpoint A/best.pt --ten-crop --top 3 --json - photos/*.jpg

`--help` lists the flags. Exit code 2 if a file could not be read; the others are shown.
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
    run_command("predict", sys.argv[1:])
