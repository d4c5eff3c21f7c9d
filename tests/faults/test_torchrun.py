"""Real torchrun jobs: exit code, last lines on the screen, seconds, and no process left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed.run

sys.path.insert(0, str(Path(__file__).resolve().parent))

from commands import clean_environment
from harness import FAULTS, ROOT, TINY
from impatient_torchrun import PATIENCE

from alexnet_mp.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.ranks]

MARK = "FAULTS_JOB"


def processes(mark: str) -> list[int]:
    """All processes with `mark` in their environment: torchrun, its ranks, what they started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if (
                    f"{MARK}={mark}".encode() in (entry / "environ").read_bytes()
                    and state not in "ZX"
                ):
                    found.append(int(entry.name))
    return found


@dataclass
class Job:
    """A job under way, in its own session."""

    process: subprocess.Popen
    screen: Path
    note: Path
    out: Path
    mark: str = field(default="")

    @staticmethod
    def start(
        folder: Path,
        fault: str = "none",
        rank: str = "1",
        flags: tuple[str, ...] = (),
        launcher: tuple[str, ...] = (),
        out: str = "run",
        torchrun: tuple[str, ...] = ("-m", "torch.distributed.run"),
    ) -> "Job":
        mark, screen, note = uuid.uuid4().hex, folder / "screen", folder / "note"
        environment = clean_environment(**{MARK: mark})
        command = [
            sys.executable,
            *torchrun,
            "--standalone",
            "--nproc_per_node",
            "2",
            *launcher,
            str(FAULTS / "launch.py"),
            fault,
            rank,
            str(note),
            *TINY,
            "--timeout",
            "6",
            "--out",
            str(folder / out),
            *flags,
        ]
        with open(screen, "ab") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        return Job(process, screen, note, folder / out, mark)

    def until_struck(self) -> None:
        deadline = time.monotonic() + 90
        while not (self.note.exists() and self.note.read_text()) and self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        assert self.note.exists(), self.text

    def ends(self, within: float) -> int:
        """torchrun's exit code; fails if the job ends too late or leaves a process."""
        try:
            code = self.process.wait(90)
            struck = float(self.note.read_text()) if self.note.exists() else None
            assert struck is None or time.monotonic() - struck < within, self.text
            deadline = time.monotonic() + 1
            while processes(self.mark) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not processes(self.mark), self.text
            return code
        finally:
            self.kill()

    def kill(self) -> None:
        for pid in processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.screen.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def end(self) -> str:
        """The last lines, which are what is seen."""
        return "\n".join(self.text.splitlines()[-12:])

    @property
    def step(self) -> int:
        return checkpoint.read(self.out / "last.pt")["loop"]["step"]


def shared_memory() -> set[str]:
    """Names in the shared memory, but for semaphores of multiprocessing, which other tests use."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_a_job_without_a_fault_ends_quietly_and_leaves_nothing(tmp_path) -> None:
    shared = shared_memory()
    job = Job.start(tmp_path)
    assert job.ends(60) == 0 and job.step == 6
    assert not any(word in job.text for word in ("error", "warning", "Traceback")), job.text
    assert shared_memory() <= shared


@pytest.mark.parametrize(
    ("fault", "words", "step"),
    [
        ("kill@step:5", "Signal 9 (SIGKILL)", 3),
        ("raise@step:5", "rank 1: RuntimeError: injected fault", 3),
        ("nan@flags:5", "the gradient of columns.1.fc8.weight on rank 1 is not finite", 4),
    ],
)
def test_the_cause_is_the_last_thing_on_the_screen(
    tmp_path, fault: str, words: str, step: int
) -> None:
    job = Job.start(tmp_path, fault)
    assert job.ends(10) == 1
    assert words in job.end and len(job.errors) == 1 and "rank 1" in job.errors[0], job.text
    assert job.step == step


def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(tmp_path) -> None:
    job = Job.start(tmp_path, "limit:20000@save:2", "0")
    assert job.ends(10) == 1 and job.step == 3
    assert "File too large); the one before it is intact" in job.end and len(job.errors) == 1, (
        job.text
    )


def test_a_frozen_rank_is_noticed_and_torchrun_clears_it_away(tmp_path) -> None:
    job = Job.start(tmp_path, "stop@step:5", torchrun=(str(FAULTS / "impatient_torchrun.py"),))
    assert job.ends(6 + PATIENCE + 10) == 1
    assert (
        len(job.errors) == 1
        and "rank 1 has been silent for" in job.errors[0]
        and "its process is stopped" in job.errors[0]
    ), job.text
    assert job.step == 3


@pytest.mark.parametrize(
    ("number", "fault", "step"),
    [
        (signal.SIGTERM, "slow:1@step:5", 5),
        (signal.SIGTERM, "slow:1@validation:2", 6),
        (signal.SIGHUP, "slow:1@step:5", 5),
        (signal.SIGINT, "slow:1@step:5", 5),
        (signal.SIGUSR1, "slow:1@step:5", 5),
    ],
)
def test_a_signal_to_torchrun_saves_once_and_says_how_to_go_on(
    tmp_path, number: int, fault: str, step: int
) -> None:
    if (
        number == signal.SIGUSR1
        and "signals-to-handle" not in Path(torch.distributed.run.__file__).read_text()
    ):
        pytest.skip("this version's torchrun can only die of SIGUSR1")
    launcher = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1") if number == signal.SIGUSR1 else ()
    job = Job.start(tmp_path, fault, flags=("--epochs", "3"), launcher=launcher)
    job.until_struck()
    job.process.send_signal(number)
    assert job.ends(15) != 0 and job.step == step, job.text
    assert (
        job.text.count(
            f"stopped at step {step}, saved; "
            f"continue with the same command and --out {job.out} --resume"
        )
        == 1
    ), job.text


def test_ctrl_c_during_the_imports_leaves_no_traceback_of_a_rank(tmp_path) -> None:
    job = Job.start(tmp_path)
    deadline = time.monotonic() + 60
    while len(processes(job.mark)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    assert job.ends(10) != 0
    assert "import torch" not in job.text and "alexnet_mp/" not in job.text, job.text


def test_a_killed_launcher_leaves_no_orphans_and_work_is_saved(tmp_path) -> None:
    job = Job.start(tmp_path, "slow:1@step:5", flags=("--epochs", "100000"))
    job.until_struck()
    os.kill(job.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    while processes(job.mark) and time.monotonic() < killed + 20:
        time.sleep(0.05)
    left, seconds = processes(job.mark), time.monotonic() - killed
    job.kill()
    assert not left and seconds < 10, job.text
    assert (
        job.step >= 5
        and job.text.count("saved; continue") == 1
        and "the launcher is gone" in job.text
    ), job.text


def test_max_restarts_continues_by_itself_to_the_same_weights(tmp_path) -> None:
    whole = Job.start(tmp_path, out="whole")
    assert whole.ends(60) == 0
    job = Job.start(
        tmp_path, "kill@step:5", launcher=("--max-restarts", "1"), flags=("--save-every", "2")
    )
    assert job.ends(60) == 0 and "started again by torchrun (1): resumed from" in job.text, job.text
    one, other = (checkpoint.read(each.out / "last.pt") for each in (whole, job))
    for part in ("model", "velocity"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


def test_max_restarts_does_not_continue_another_jobs_run(tmp_path) -> None:
    assert Job.start(tmp_path, flags=("--epochs", "1")).ends(60) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    job = Job.start(tmp_path, launcher=("--max-restarts", "1"))
    assert job.ends(60) == 1 and "holds another run's last.pt" in job.end, job.text
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_two_jobs_do_not_write_into_one_folder(tmp_path) -> None:
    first = Job.start(tmp_path, "slow:50@step:5", flags=("--timeout", "60"))
    first.until_struck()
    (tmp_path / "second").mkdir()
    second = Job.start(tmp_path / "second", flags=("--out", str(first.out)))
    code = second.ends(60)
    first.kill()
    assert code == 1 and "another run writes there: process" in second.end, second.text
    assert first.step == 3
