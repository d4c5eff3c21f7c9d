"""The command `predict`: what is on images?"""

from __future__ import annotations

from collections.abc import Sequence

from alexnet_mp.cli.flags import is_main_process
from alexnet_mp.cli.parser import parse_predict
from alexnet_mp.cli.process import fail, printing_json
from alexnet_mp.inference.predict import predict_files


def predict(argv: Sequence[str]) -> int:
    """Prints the most probable classes of each image that `argv` names.

    Returns 2 if a file could not be read.
    """
    request = parse_predict(argv)
    with printing_json(request.json) as write:
        answers = predict_files(request)
        write(answers)
    bad = [f"{answer['file']}: {answer['error']}" for answer in answers if "error" in answer]
    return max((fail(line, 2) for line in bad), default=0) if is_main_process() else 0
