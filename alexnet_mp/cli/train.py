"""The command `train`: one whole run, which a signal stops with everything saved."""

from __future__ import annotations

from collections.abc import Sequence

from alexnet_mp.cli.parser import parse_timeout, parse_train
from alexnet_mp.cli.process import Signals, survive_lost_screen
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.rendezvous import Meeting, meet
from alexnet_mp.training.run import run


def train(argv: Sequence[str]) -> int:
    """Trains as the flags `argv` say. Returns 0, or 128 + n after a stop by signal n."""
    helps = {"-h", "--help"} & {*argv}
    meeting = Meeting(Environment()) if helps else meet(parse_timeout(argv))
    config = parse_train(argv, meeting)
    survive_lost_screen()
    signals = Signals()
    result = run(config, signals.install, meeting)
    return 128 + (signals.received or 15) if result.get("stopped") else 0
