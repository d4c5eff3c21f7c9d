"""The commands of launch/README.md's section on clusters, as printed, with stand-ins for the
schedulers; two nodes are two torchruns on this host, or srun's and mpirun's tasks."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cluster_programs
import pytest
import yaml
from commands import ROOT, clean_environment

pytestmark = pytest.mark.ranks

SECTION = (
    (ROOT / "launch" / "README.md").read_text("utf-8").split("## Clusters")[1].split("\n## ")[0]
)
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]
IMAGES = "--preset original --data store --data-dir STORE"
SMALL = (
    "--kernels 4 4 4 4 4 --hidden 6 5 --batch-size 8 --limit-train 24 --limit-val 16 "
    "--limit-test 16 --threads 1 --lr 0.01 --timeout 20"
)
ROUNDS = 400
"""Epochs of a training that a test ends before its time; an epoch is a tenth of a second."""


def line_with(word: str) -> str:
    """The one printed command with `word` in it."""
    (line,) = [line for line in LINES if word in line]
    return line


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def port() -> str:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return str(holder.getsockname()[1])


@dataclass
class Node:
    """A command under way; all that it starts has a name in its environment."""

    process: subprocess.Popen
    screen: Path
    name: str

    @property
    def text(self) -> str:
        return self.screen.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def says(self, words: str) -> None:
        """Waits until it has printed `words`."""
        self.wait_until(lambda: words in self.text)

    def writes(self, path: Path) -> None:
        """Waits until `path` is there."""
        self.wait_until(path.exists)

    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def fails(self) -> None:
        """Kills all of its processes, the launcher first, as a loss of power would."""
        self.process.kill()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if f"TEST_NODE={self.name}\0".encode() in (entry / "environ").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
        self.process.wait()

    def ends(self) -> int:
        return self.process.wait(120)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node; what still runs when the test ends is killed."""
    nodes = []

    def start_node(words: list[str], **environment: str) -> Node:
        name = f"{tmp_path.name}-{len(nodes)}"
        screen = tmp_path / f"node{len(nodes)}.screen"
        with open(screen, "ab") as file:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=clean_environment(GLOO_SOCKET_IFNAME="lo", TEST_NODE=name, **environment),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        nodes.append(Node(process, screen, name))
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.fails()


def arguments(line: str, out: Path, port: str = "", epochs: int = 1, ranks: int = 1) -> list[str]:
    """The words of a printed command, of which a node has `ranks` ranks on a CPU."""
    line = line.replace(IMAGES, f"{SMALL} --epochs {epochs}")
    line = re.sub(r"--nproc_per_node=\d+", f"--nproc_per_node={ranks}", line)
    line = re.sub(r"\bRUN\b", str(out), re.sub(r"\bHOST\b", "127.0.0.1", line))
    line = line.replace("29500", port).replace("29400", port)
    torchrun = f"{sys.executable} -m torch.distributed.run"
    line = re.sub(r"(?<!\S)\.venv/bin/torchrun", torchrun, line)
    words = shlex.split(re.sub(r"(?<!\S)\.venv/bin/python", sys.executable, line))
    return ["env", *words] if "=" in words[0] else words


def first_or_other(first: bool) -> dict[str, str]:
    """More for torchrun: of two on one host the first is to be HOST, and neither waits as long for
    another node as it would by default."""
    waits = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"
    conf = f"is_host={str(first).lower()},{waits}"
    return {"PET_RDZV_CONF": conf, "PET_LOCAL_ADDR": "127.0.0.1"}


def finished(out: Path) -> bool:
    return json.loads((out / "result.json").read_text())["epochs"] >= 1


def test_of_two_nodes_one_dies_the_other_ends_and_the_job_goes_on_with_one(
    start, out, port
) -> None:
    line = line_with("--node_rank=0").replace(
        "launch/train.py", f"tests/faults/launch.py none 0 {out}.note"
    )  # which takes FAULTS_HOST for the name of its host
    nodes = [
        start(
            arguments(line.replace("node_rank=0", f"node_rank={n}"), out, port, ROUNDS, ranks=2),
            FAULTS_HOST=f"node{n}",
        )
        for n in (0, 1)
    ]
    nodes[0].writes(out / "last.pt")
    assert "4 ranks on cpu through gloo, 2 copies of the network" in nodes[0].text
    nodes[1].fails()
    died = time.monotonic()
    assert nodes[0].ends() == 1 and time.monotonic() - died < 10, nodes[0].text
    (error,) = nodes[0].errors()
    assert "died: its process" in error and "on node1 ended" in error
    flags = ["--out", str(out), "--resume", "--epochs", "2"]
    resumed = start([sys.executable, "launch/train.py", *flags])
    assert resumed.ends() == 0 and "resumed from" in resumed.text, resumed.text
    assert finished(out)


def test_torchruns_that_find_each_other_train_on_two_nodes(start, out, port) -> None:
    (line,) = (line for line in LINES if "--nnodes=2" in line and "c10d" in line)
    words = arguments(line, out, port)
    nodes = [start(words, **first_or_other(n == 0)) for n in (0, 1)]
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text
    assert finished(out)


def test_a_node_may_come_and_leave_while_training_goes_on(start, out, port) -> None:
    words = arguments(line_with("--nnodes=1:2"), out, port, ROUNDS)
    nodes = [start(words, **first_or_other(True))]
    nodes[0].writes(out / "last.pt")
    nodes.append(start(words, **first_or_other(False)))
    nodes[0].says("2 ranks on cpu")
    nodes[0].says("resumed from")
    nodes[1].process.terminate()
    nodes[0].says("started again by torchrun (1): resumed from")
    assert nodes[0].text.count("1 rank on cpu") == 2, nodes[0].text
    assert nodes[0].ends() == 0 and finished(out), nodes[0].text


def test_a_slurm_job_saves_before_its_time_is_over_and_goes_on_in_the_next(
    start, tmp_path, out
) -> None:
    programs = cluster_programs.install(tmp_path / "bin")
    programs |= {"OUT": str(out), "PYTHON": sys.executable}
    line = line_with("sbatch")
    job = start(arguments(line, out, epochs=ROUNDS), **programs)
    job.writes(out / "last.pt")
    os.kill(int((tmp_path / "bin" / "step.pid").read_text()), signal.SIGUSR1)
    assert job.ends() == 138, job.text
    assert (tmp_path / "bin" / "scontrol.txt").read_text() == f"requeue {cluster_programs.JOB}"
    assert job.text.count("saved; continue") == 1 and not job.errors(), job.text
    again = start(arguments(line, out, epochs=2), **programs)
    assert again.ends() == 0 and "resumed from" in again.text, again.text
    assert finished(out)


@pytest.mark.parametrize("program", ["srun", "mpirun"])
def test_a_scheduler_starts_the_ranks_itself(program: str, start, tmp_path, out) -> None:
    programs = cluster_programs.install(tmp_path / "bin")
    job = start(arguments(line_with(f"{program} "), out), **programs)
    assert job.ends() == 0, job.text
    assert "2 ranks on cpu through gloo" in job.text and finished(out)


def test_the_pods_of_a_pytorchjob_are_nodes(start, out, port) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    job = yaml.safe_load(block)["spec"]
    kinds = job["pytorchReplicaSpecs"]
    pods = []
    for rank, kind in enumerate(("Master", "Worker")):
        (container,) = kinds[kind]["template"]["spec"]["containers"]
        line = " ".join(container["command"]).replace("torchrun", ".venv/bin/torchrun")
        variables = {
            "PET_NNODES": str(sum(one["replicas"] for one in kinds.values())),
            "PET_NPROC_PER_NODE": "1",  # the operator's is nprocPerNode
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
            "RANK": str(rank),  # of the pod
            "WORLD_SIZE": str(2 * int(job["nprocPerNode"])),
        }
        pods.append(start(arguments(line, out), **variables))
    assert [pod.ends() for pod in pods] == [0, 0], pods[0].text
    assert finished(out)


def test_there_is_no_other_command_in_the_section() -> None:
    assert len(LINES) == 6
