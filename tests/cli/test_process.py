"""How a process ends: by a signal with everything saved, and not because its screen has gone."""

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from ranks import run

from alexnet_mp.cli import train
from alexnet_mp.cli.process import STOPPING, Signals, refuse_several_ranks, survive_lost_screen


def stop_by(rank: int, names: tuple[str, ...]) -> tuple[bool, int | None]:
    signals, trainer = Signals(), SimpleNamespace(stop_requested=False)
    signals.install(trainer)
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.05)
    deadline = time.monotonic() + 10
    while not trainer.stop_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return trainer.stop_requested, signals.received


@pytest.mark.parametrize("name", STOPPING)
def test_a_signal_asks_the_trainer_to_stop(name: str) -> None:
    assert run(stop_by, 1, (name,)) == [(True, getattr(signal, name))]


def test_a_closed_terminal_and_a_full_quit_are_among_the_signals() -> None:
    assert {"SIGHUP", "SIGQUIT", "SIGTERM", "SIGINT", "SIGUSR1"} == set(STOPPING)


def test_the_same_key_at_once_is_the_same_press() -> None:
    assert run(stop_by, 1, ("SIGQUIT", "SIGQUIT")) == [(True, signal.SIGQUIT)]


def insist(rank: int) -> None:
    Signals().install(SimpleNamespace(stop_requested=False))
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGQUIT)
        time.sleep(0.5)
    raise AssertionError("still here")


def test_a_second_press_ends_the_process_at_once() -> None:
    with pytest.raises(AssertionError, match=f"exit code {128 + signal.SIGQUIT}"):
        run(insist, 1)


def hang_up_under_nohup(rank: int) -> bool:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer = SimpleNamespace(stop_requested=False)
    Signals().install(trainer)
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.3)
    return trainer.stop_requested


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    assert run(hang_up_under_nohup, 1) == [False]


def print_to_nobody(rank: int, gone: str) -> tuple[str, int]:
    """What the standard error shows when the stream `gone` is a pipe without a reader, and a last
    write's length."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    number = {"stdout": 1, "stderr": 2}[gone]
    os.dup2(write_end, number)
    other, shown = os.pipe()
    os.dup2(shown, 3 - number)
    survive_lost_screen()
    for _ in range(3):
        print("to nobody", file=getattr(sys, gone), flush=True)
    length = getattr(sys, gone).write("more")
    print("end", file=sys.stderr if gone == "stdout" else sys.stdout, flush=True)
    return os.read(other, 1000).decode(), length


def test_a_reader_that_has_gone_is_noted_once_and_the_process_goes_on() -> None:
    [(text, length)] = run(print_to_nobody, 1, "stdout")
    assert text == "note: the standard output is gone (Broken pipe); going on\nend\n"
    assert length == 4


def test_an_error_stream_that_has_gone_is_silent() -> None:
    assert run(print_to_nobody, 1, "stderr") == [("end\n", 4)]


def test_one_process_commands_are_refused_under_torchrun(monkeypatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"pack is one process.*with python, not with torchrun, srun or mpirun"
    ):
        refuse_several_ranks("pack")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_ranks("pack")


@pytest.mark.parametrize(("stopped", "code"), [(True, 143), (False, 0)])
def test_a_training_that_was_stopped_has_the_exit_code_of_a_signal(
    monkeypatch, stopped: bool, code: int
) -> None:
    def run(config, install_signals, meeting=None) -> dict:
        return {"stopped": True, "out": "run"} if stopped else {"top1": 1.0}

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "survive_lost_screen", lambda: None)
    assert train.train([]) == code
