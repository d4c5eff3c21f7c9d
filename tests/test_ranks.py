"""The helper of several ranks returns what ranks return and gives each its place."""

import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, process_group, run

pytestmark = pytest.mark.ranks


@dataclass
class Answer:
    """Travels only if the ranks know this module under the name that pytest gave it."""

    rank: int
    value: float


def answer(rank: int, question: Answer) -> Answer:
    return Answer(rank, question.value + rank)


def test_results_come_back_by_rank_and_classes_of_the_test_travel() -> None:
    assert run(answer, 3, Answer(0, 0.5)) == [Answer(0, 0.5), Answer(1, 1.5), Answer(2, 2.5)]


def module_and_file(rank: int) -> tuple[str, str, bool]:
    import ranks

    return __name__, __file__, Path(ranks.__file__).parent == Path(__file__).parent


def test_a_rank_imports_the_test_module_from_its_file() -> None:
    assert run(module_and_file, 1) == [(__name__, __file__, True)]


def imported_package(rank: int) -> str:
    import alexnet_mp.config.configuration

    return alexnet_mp.config.configuration.__file__


def test_a_rank_imports_the_package_of_this_repository() -> None:
    assert Path(run(imported_package, 1)[0]).parents[2] == Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "mode"),
    [
        ([sys.executable, "-m", "pytest"], "importlib"),
        ([str(Path(sys.executable).with_name("pytest"))], "prepend"),
    ],
    ids=["python -m pytest, importlib", "pytest, prepend"],
)
def test_ranks_find_the_function_however_pytest_is_started(
    tmp_path: Path, launcher: list[str], mode: str
) -> None:
    (tmp_path / "site" / "tests").mkdir(parents=True)
    (tmp_path / "site" / "tests" / "__init__.py").write_text(
        "# an installed package of the same name, as some distributions have\n"
    )
    (tmp_path / "repo" / "tests").mkdir(parents=True)
    folder = Path(__file__).parent
    (tmp_path / "repo" / "tests" / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
    )
    (tmp_path / "repo" / "tests" / "test_copy.py").write_text(
        "from ranks import run\n\ndef twice(rank, x):\n    return 2 * x + rank\n\n"
        "def test_twice():\n    assert run(twice, 2, 5) == [10, 11]\n"
    )
    command = [
        *launcher,
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        f"--import-mode={mode}",
        "tests/test_copy.py",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path / "repo",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def add_up(rank: int, world_size: int) -> torch.Tensor:
    with process_group(rank, world_size):
        x = torch.tensor([rank + 1.0])
        dist.all_reduce(x)
    with process_group():  # a second group in the same rank meets at another file
        dist.all_reduce(x)
    return x


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_process_group_connects_the_ranks(world_size: int) -> None:
    expected = world_size * world_size * (world_size + 1) / 2
    assert [x.item() for x in run(add_up, world_size, world_size)] == [expected] * world_size


def meet_at_the_port(rank: int) -> float:
    dist.init_process_group("gloo")  # env://, as under torchrun
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    dist.destroy_process_group()
    return x.item()


def test_the_environment_is_a_launchers_and_its_port_is_free() -> None:
    assert run(meet_at_the_port, 3) == [3.0] * 3


def place(rank: int) -> tuple:
    names = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "SAID_BY_THE_TEST",
        "TORCHELASTIC_USE_AGENT_STORE",
    )
    return *(os.environ.get(name) for name in names), torch.get_num_threads(), os.getcwd()


def test_a_rank_has_its_place_and_the_callers_environment_and_folder(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAID_BY_THE_TEST", "yes")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.chdir(tmp_path)
    assert run(place, 2) == [
        (str(rank), str(rank), "2", "2", "127.0.0.1", "yes", None, 1, str(tmp_path))
        for rank in range(2)
    ]


def tensors(rank: int, x: torch.Tensor) -> dict:
    own = torch.nn.Parameter(x[:, ::2] + rank)
    return {
        "view": x.t()[1:],
        "parameter": own,
        "graph": own * 2,
        "bfloat16": own.detach().bfloat16(),
        "array": x.numpy() + rank,
        "shared": x.is_shared(),
    }


def test_tensors_travel_as_copies_with_their_type_and_strides() -> None:
    x = torch.arange(12, dtype=torch.float64).view(3, 4)
    for rank, got in enumerate(run(tensors, 2, x)):
        own = x[:, ::2] + rank
        assert torch.equal(got["view"], x.t()[1:]) and got["view"].stride() == x.t()[1:].stride()
        assert isinstance(got["parameter"], torch.nn.Parameter) and torch.equal(
            got["parameter"], own
        )
        assert torch.equal(got["graph"].detach(), own * 2)
        assert got["bfloat16"].dtype == torch.bfloat16 and torch.equal(
            got["bfloat16"], own.bfloat16()
        )
        assert isinstance(got["array"], np.ndarray) and (got["array"] == x.numpy() + rank).all()
        assert not got["shared"] and not got["view"].is_shared()


def many_values(rank: int, x: torch.Tensor) -> torch.Tensor:
    return x + rank


def test_large_arguments_and_results_fill_no_pipe() -> None:
    x = torch.zeros(4_000_000)
    assert [int(y.sum()) for y in run(many_values, 2, x)] == [0, 4_000_000]


def warn(rank: int) -> str:
    warnings.warn("as a deprecated collective would", FutureWarning, stacklevel=1)
    return "no error"


def test_a_warning_in_a_rank_is_what_it_would_be_in_the_test() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RanksFailed, match="FutureWarning: as a deprecated collective would"):
            run(warn, 1)
        warnings.filterwarnings("ignore", "as a deprecated", FutureWarning)
        assert run(warn, 1) == ["no error"]


def speak(rank: int) -> None:
    print("printed")
    os.write(2, b"written\n")


def test_what_ranks_print_is_the_tests_output(capsys) -> None:
    run(speak, 2)
    assert capsys.readouterr().out.splitlines() == [
        "[rank 0] printed",
        "[rank 0] written",
        "[rank 1] printed",
        "[rank 1] written",
    ]


def nothing(rank: int) -> None:
    pass


def test_a_run_of_two_ranks_takes_less_than_a_second() -> None:
    run(nothing, 2)

    def seconds() -> float:
        start = time.perf_counter()
        assert run(add_up, 2, 2)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1
