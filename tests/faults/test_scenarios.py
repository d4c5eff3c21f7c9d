"""Every fault of the table ends as the table says, and leaves only the last good checkpoint."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Outcome, Scenario, run
from scenarios import SCENARIOS

from alexnet_mp.training import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.ranks]

AT_ONCE = 3
"""Scenarios that run beside each other: most of them wait for a time limit most of the time."""


class Outcomes:
    """Runs scenarios ahead of the tests that ask for them, in the order of collection."""

    def __init__(self, chosen: list[Scenario], folder: Path, pool: ThreadPoolExecutor) -> None:
        self.chosen, self.folder, self.pool = chosen, folder, pool
        self.started: dict[str, Future[Outcome]] = {}

    def __getitem__(self, scenario: Scenario) -> Outcome:
        place = self.chosen.index(scenario)
        for later in self.chosen[place : place + AT_ONCE]:
            if later.name not in self.started:
                self.started[later.name] = self.pool.submit(run, later, self.out(later))
        return self.started[scenario.name].result()

    def out(self, scenario: Scenario) -> Path:
        """The folder of the scenario's run."""
        return self.folder / str(SCENARIOS.index(scenario))


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> Iterator[Outcomes]:
    chosen = [
        item.callspec.params["scenario"]
        for item in request.session.items
        if "scenario" in getattr(getattr(item, "callspec", None), "params", ())
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield Outcomes(chosen, tmp_path_factory.mktemp("scenarios"), pool)
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_is_noticed_in_time_and_said_once(scenario: Scenario, outcomes: Outcomes) -> None:
    outcome = outcomes[scenario]
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
        last = checkpoint.read(outcomes.out(scenario) / "last.pt")
        assert last["loop"]["step"] == scenario.last
