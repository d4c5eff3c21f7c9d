"""The commands as people type them: what is on the screen, the exit code, and how long it takes."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import PYTHON, ROOT, TORCHRUN, clean_environment, own_lines, start, start_warm
from image_sets import make_folder

SMALL = (
    "--kernels 4 6 8 6 4 --hidden 24 20 --batch-size 32 --limit-train 72 --limit-val 30 "
    "--limit-test 40 --threads 1"
).split()


def torchrun(ranks: int, *flags: str) -> subprocess.CompletedProcess:
    return start([*TORCHRUN, str(ranks), "launch/train.py"], *flags)


def test_two_ranks_under_torchrun_say_everything_once_and_nothing_for_a_terminal(tmp_path) -> None:
    done = torchrun(2, *SMALL, "--epochs", "2", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (
        sum(
            line.startswith(
                "alexnet_mp: preset demo, 2 columns at 67 px, 2 ranks on cpu through gloo"
            )
            for line in lines
        )
        == 1
    )
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["1", "2"]
    assert sum(line.startswith("test: loss") for line in lines) == 1
    assert (
        f"files in {tmp_path / 'run'}: best.pt  config.json  curves.png  history.jsonl  last.pt "
        " result.json" in lines
    )
    assert not any(c in done.stdout + done.stderr for c in "\r\x1b")


def test_one_process_needs_no_launcher(tmp_path) -> None:
    done = start(PYTHON, *SMALL, "--epochs", "1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "run" / "result.json").exists()


def test_a_bad_file_whose_name_the_locale_cannot_write_is_listed_and_training_goes_on(
    tmp_path,
) -> None:
    root = make_folder(tmp_path / "set", count=20)
    (root / "train" / "cat" / "café.png").write_bytes(b"")
    done = start(
        PYTHON,
        *SMALL[:-8],
        "--threads",
        "1",
        "--data",
        "folder",
        "--data-dir",
        str(root),
        "--on-error",
        "skip",
        "--max-steps",
        "1",
        "--out",
        str(tmp_path / "run"),
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert r"cat/caf\xe9.png: an empty file" in done.stdout


def test_a_progress_bar_leaves_no_semaphore_for_a_helper_to_complain_of() -> None:
    # What Python 3.14 does without being asked; the helper's warning would come after our last
    # line.
    done = start(
        [
            sys.executable,
            "-c",
            """
import multiprocessing
multiprocessing.set_start_method("forkserver")
from tqdm.auto import tqdm
from alexnet_mp.cli.process import run_main
run_main(lambda: sum(tqdm(range(3), disable=False)))""",
        ]
    )
    assert done.returncode == 3 and "3/3" in done.stderr
    assert "semaphore" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", "50"], "smallest that works is 67"),
        (["--data", "folder", "--data-dir", "/none"], "--data-dir /none: no such folder"),
        (["--resume", "/none.pt"], "/none.pt: no such checkpoint"),
        (["--backend", "nccl", "--device", "cpu"], "--backend nccl"),
        (["--limit-train", "99999"], "--limit-train 99999"),
        (["--out", "/proc/run"], "--out /proc/run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    done = start_warm(PYTHON, *SMALL, *flags)
    assert done.returncode == 2
    assert (
        len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("error: ")
        and words in done.stderr
    )


def test_a_compiler_that_is_not_there_is_one_line(tmp_path) -> None:
    environment = {"CXX": "/none/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = start(PYTHON, *SMALL, "--compile", **environment)
    (error,) = own_lines(done)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--compile: torch.compile failed: InvalidCxxCompiler" in error and str(tmp_path) in error


def test_under_torchrun_the_cause_is_said_once_and_again_at_the_very_end() -> None:
    done = torchrun(2, "--image-size", "50")
    assert done.returncode == 1  # torchrun's own
    assert len(own_lines(done)) == 1 and "smallest that works is 67" in own_lines(done)[0]
    assert "Traceback (most recent call last)" not in done.stderr.split("error: --image-size")[0]
    assert "smallest that works is 67" in "\n".join(done.stderr.splitlines()[-6:])


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_that_cannot_share_two_columns_are_refused_before_any_work(ranks: int) -> None:
    started = time.monotonic()
    done = torchrun(ranks)
    assert done.returncode == 1 and done.stdout == "" and len(own_lines(done)) == 1
    assert (
        f"{ranks} ranks cannot share 2 columns: --nproc_per_node must be 1 or a multiple of 2"
        in own_lines(done)[0]
    )
    assert time.monotonic() - started < 60


def free_port() -> str:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return str(holder.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "missing"), [("0", "rank 1, which did not start"), ("1", "rank 0 did not answer")]
)
def test_leftover_variables_of_a_launcher_do_not_hang_a_plain_start(
    rank: str, missing: str
) -> None:
    started = time.monotonic()
    done = start_warm(
        PYTHON,
        *SMALL,
        "--timeout",
        "3",
        RANK=rank,
        WORLD_SIZE="2",
        LOCAL_RANK=rank,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
    )
    assert done.returncode == 2 and time.monotonic() - started < 40
    assert missing in own_lines(done)[-1] and "unset RANK WORLD_SIZE" in own_lines(done)[-1]


def test_a_rank_0_that_is_not_there_is_one_line_without_torchs_frames() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = start(PYTHON, *SMALL, "--timeout", "1", RANK="1", WORLD_SIZE="2", **address)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Connection refused: is rank 0 running there?" in done.stderr


def test_half_of_a_launchers_variables_are_named() -> None:
    done = start_warm(PYTHON, RANK="0")
    assert done.returncode == 2 and "WORLD_SIZE=None" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(
    tmp_path, number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*PYTHON, *SMALL, "--epochs", "100000", "--out", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert (
        "saved; continue with the same command and --out" in stdout.splitlines()[-1]
        and stderr == ""
    )
    steps = int(stdout.splitlines()[-1].split("at step ")[1].split(",")[0])
    done = start(PYTHON, "--out", str(out), "--resume", "--max-steps", str(steps + 2))
    assert done.returncode == 0 and f"{steps % 3} steps done" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "number"), [([], signal.SIGTERM), (["nohup"], signal.SIGHUP)])
def test_a_signal_to_torchrun_saves_on_all_ranks(tmp_path, prefix: list[str], number: int) -> None:
    """nohup does not keep torchrun from ending at HUP: it handles the signal and hands it to the
    ranks."""
    out = tmp_path / "run"
    command = [*prefix, *TORCHRUN, "2", "launch/train.py", *SMALL]
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--out", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and "saved; continue" in stdout.splitlines()[-1], stderr
    assert start(PYTHON, "--out", str(out), "--resume", "--max-steps", "1").returncode == 0


@pytest.mark.slow
def test_a_training_goes_on_when_its_terminal_closes(tmp_path) -> None:
    out, (master, slave) = tmp_path / "run", os.openpty()
    process = subprocess.Popen(
        [*PYTHON, *SMALL, "--epochs", "2", "--out", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    assert os.read(master, 10)  # it has begun to print
    os.close(master)
    assert process.wait(timeout=120) == 0
    assert len((out / "history.jsonl").read_text().splitlines()) == 2
    assert (out / "result.json").exists() and (out / "last.pt").exists()


@pytest.mark.slow
def test_a_training_goes_on_when_the_reader_of_its_output_ends(tmp_path) -> None:
    command = (
        f"{sys.executable} launch/train.py {' '.join(SMALL)} --epochs 2 --out "
        f"{tmp_path}/run | head -1"
    )
    done = start(["bash", "-c", f"set -o pipefail; {command}"])
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    assert "the standard output is gone" in done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_help_into_head_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} launch/train.py --help | head -1"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.stdout.startswith("usage: python launch/train.py")
        and done.stderr == ""
        and done.returncode in (0, 141)
    )
