#!/usr/bin/env python
"""Runs the scenarios; prints name | fault | seconds to the end | exit codes | last line of each.

python tests/faults/table.py [WORD ...]     only scenarios whose name has one of the words
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import run
from scenarios import SCENARIOS


def main() -> None:
    words, started = sys.argv[1:], time.monotonic()
    chosen = [
        scenario
        for scenario in SCENARIOS
        if not words or any(word in scenario.name for word in words)
    ]
    print("| scenario | fault | seconds | exit codes | last line |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, scenario in enumerate(chosen):
            outcome = run(scenario, Path(folder) / f"run{number}")
            codes = " ".join("stopped" if code is None else str(code) for code in outcome.codes)
            as_expected = (
                ""
                if outcome.codes == scenario.codes and scenario.words in outcome.screen
                else " **not as expected**"
            )
            line = outcome.last_line.replace(folder, "").replace("|", "/")[:200]
            cells = (
                scenario.name,
                scenario.fault or scenario.differs or "flags",
                f"{outcome.seconds:.1f}",
                codes,
                line + as_expected,
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{len(chosen)} scenarios in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
