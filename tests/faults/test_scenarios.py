"""Every fault of the table ends as the table says, and leaves nothing behind but the last good checkpoint."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Scenario, run
from scenarios import SCENARIOS

from alexnet_mp.training import checkpoint


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_is_noticed_in_time_and_said_once(scenario: Scenario, tmp_path) -> None:
    outcome = run(scenario, tmp_path / "run")
    assert outcome.codes == scenario.codes, outcome.screen
    assert outcome.seconds < scenario.within, outcome.screen
    if scenario.words.startswith(("saved", "test:", "curves.png")):
        assert outcome.screen.count(scenario.words) == 1 and not outcome.errors, outcome.screen
    elif scenario.words:
        assert scenario.words in outcome.last_line, outcome.screen
        assert len(outcome.errors) == 1 or not scenario.once, outcome.screen
    if "injected fault" not in scenario.words:
        assert "Traceback" not in outcome.screen, outcome.screen
    assert outcome.left == []
    if scenario.last is not None:
        assert checkpoint.read(tmp_path / "run" / "last.pt")["loop"]["step"] == scenario.last
