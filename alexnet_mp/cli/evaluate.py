"""The command `evaluate`: how good are trained networks?"""

from __future__ import annotations

from collections.abc import Sequence

from alexnet_mp.cli.parser import parse_evaluate
from alexnet_mp.cli.process import printing_json
from alexnet_mp.inference.evaluate import evaluate_checkpoints


def evaluate(argv: Sequence[str]) -> int:
    """Prints loss, top-1 and top-5 of the networks that the flags `argv` name. Returns 0."""
    request = parse_evaluate(argv)
    with printing_json(request.json) as write:
        write(evaluate_checkpoints(request))
    return 0
