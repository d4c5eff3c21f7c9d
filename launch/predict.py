#!/usr/bin/env python
"""Names what is on images.

    python launch/predict.py --checkpoint RUN/best.pt cat.jpg dog.png
    python launch/predict.py --checkpoint A/best.pt --checkpoint B/best.pt --ten-crop --top 3 --json - photos/*.jpg

`--help` lists the flags. Exit code 2 if a file could not be read; the others are shown all the same.
"""

import signal
import sys

signal.signal(
    signal.SIGINT, signal.SIG_DFL
)  # Ctrl-C during the seconds that torch takes to import leaves no traceback

from alexnet_mp.cli.parser import is_main_process, parse_predict  # noqa: E402
from alexnet_mp.cli.process import fail, printing_json, run_main  # noqa: E402
from alexnet_mp.inference.predict import predict_files  # noqa: E402


def main() -> int:
    request = parse_predict(sys.argv[1:])
    with printing_json(request.json) as write:
        answers = predict_files(request)
        write(answers)
    bad = [f"{answer['file']}: {answer['error']}" for answer in answers if "error" in answer]
    return max((fail(line, 2) for line in bad), default=0) if is_main_process() else 0


if __name__ == "__main__":
    run_main(main)
