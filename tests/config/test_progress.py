"""Progress shows a bar on a terminal, a line a minute in a log, and never ends the work."""

import io

import pytest

from alexnet_mp.config import progress as module
from alexnet_mp.config.progress import progress


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ClosedTerminal(Terminal):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_one_plain_line_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress(range(1000), description="packing train", unit="images"):
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "packing train: 60 of 1,000 images (6 %), 1 images/s, 0:15:40 left"
    assert len(lines) == 1000 // 60


def test_short_work_says_nothing_in_a_log(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), description="validation", unit="batches")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_other_ranks_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(3), description="epoch 1", unit="steps", enabled=False):
        clock.now += 100
    assert capsys.readouterr().err == ""


def test_a_loader_without_length_gets_lines_without_total(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress(iter(range(2)), description="epoch 1", unit="steps"):
        clock.now += 100
    assert capsys.readouterr().err.splitlines()[0] == "epoch 1: 1 steps, 0.01 steps/s"


def test_what_was_done_before_is_not_this_runs_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = progress(total=1000, description="packing", unit="images", initial=900)
    clock.now += 100
    shown.update(50)
    assert capsys.readouterr().err == (
        "packing: 950 of 1,000 images (95 %), 0.5 images/s, 0:01:40 left\n"
    )
    shown.restart(960)
    clock.now += 100
    shown.update(20)
    assert capsys.readouterr().err.splitlines()[0] == (
        "packing: 980 of 1,000 images (98 %), 0.2 images/s, 0:01:40 left"
    )


def test_a_postfix_is_computed_only_for_a_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    shown = progress(total=100, description="epoch 1", unit="steps")
    for step in range(100):
        shown.set_postfix(lambda step=step: calls.append(step) or f"loss {step}")
        clock.now += 1
        shown.update()
    assert calls == [59]
    assert capsys.readouterr().err.endswith(" left, loss 59\n")


def test_a_terminal_gets_a_bar_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    shown = progress(total=4, description="validation", unit="batches")
    shown.set_postfix("loss 1.5")
    shown.update(4)
    shown.close()
    assert "validation" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_screen_that_is_gone_does_not_end_the_work(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = ClosedTerminal()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", stream)
    done = 0
    for _ in progress(range(200), description="epoch 1", unit="steps"):
        clock.now += 1
        done += 1
    assert done == 200
