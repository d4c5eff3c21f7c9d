#!/usr/bin/env python
"""Measures trained networks: loss, top-1, top-5 over the images of a split.

    python launch/evaluate.py --checkpoint RUN/best.pt --ten-crop
    torchrun --nproc_per_node=2 launch/evaluate.py --checkpoint A/best.pt B/best.pt --weights 0.6 0.4 --json result.json

`--help` lists the flags; without --data, the data is what the first checkpoint was trained on.
"""

import signal
import sys

signal.signal(
    signal.SIGINT, signal.SIG_DFL
)  # Ctrl-C during the seconds that torch takes to import leaves no traceback

from alexnet_mp.cli.parser import parse_evaluate  # noqa: E402
from alexnet_mp.cli.process import printing_json, run_main  # noqa: E402
from alexnet_mp.inference.evaluate import evaluate_checkpoints  # noqa: E402


def main() -> int:
    request = parse_evaluate(sys.argv[1:])
    with printing_json(request.json) as write:
        write(evaluate_checkpoints(request))
    return 0


if __name__ == "__main__":
    run_main(main)
