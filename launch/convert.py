#!/usr/bin/env python
"""Converts trained networks between formats: checkpoint, safetensors, plain and torchvision's state
dicts, ONNX, Caffe.

    python launch/convert.py bvlc_alexnet.caffemodel alexnet.pt --classes names.txt
    python launch/convert.py RUN/best.pt alexnet.onnx

`--help` lists the flags and formats. Nothing in a file is executed.
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
    run_command("convert", sys.argv[1:])
