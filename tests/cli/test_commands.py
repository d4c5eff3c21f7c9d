"""`python -m alexnet_mp COMMAND`, the scripts in launch/, and what messages call the command."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, TORCHRUN, clean_environment, start

import alexnet_mp
from alexnet_mp.cli.commands import COMMANDS, load_command, overview
from alexnet_mp.config import command

MODULE = [sys.executable, "-m", "alexnet_mp"]


def test_the_help_lists_every_command_and_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['x', '--help']\nfrom alexnet_mp.cli.commands import main\n"
    code += (
        "try: main(['--help'])\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = start([sys.executable, "-c", code])
    assert done.stdout.splitlines()[-1] == "0 False" and done.stderr == ""
    assert done.stdout.startswith("usage: python -m alexnet_mp COMMAND")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["trian"], ["--epochs", "1"]])
def test_an_unknown_command_is_one_line_that_lists_them(argv: list[str]) -> None:
    done = start(MODULE, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "train, evaluate, predict" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_function_and_has_a_script(name: str) -> None:
    assert callable(load_command(name))
    text = (ROOT / "launch" / f"{name}.py").read_text()
    assert f'run_command("{name}", sys.argv[1:])' in text
    assert overview().count(f"\n  {name} ") == 1


@pytest.mark.parametrize(
    ("prefix", "program"),
    [
        ([sys.executable, "launch/check.py"], "launch/check.py"),
        ([*MODULE, "check"], "-m alexnet_mp check"),
    ],
)
def test_messages_name_the_command_that_was_typed(prefix: list[str], program: str) -> None:
    done = start(prefix, RANK="0")  # and no WORLD_SIZE
    assert done.returncode == 1, done.stdout
    assert f"`torchrun --nproc_per_node=2 {program}`" in done.stdout
    assert f"`python {program}`" in done.stdout and "train" not in done.stdout


def test_two_ranks_train_as_a_module(tmp_path: Path) -> None:
    flags = (
        "--kernels 4 6 8 6 4 --hidden 24 20 --batch-size 32 --limit-train 72 --limit-val 30 "
        "--limit-test 40"
    )
    module = [*TORCHRUN, "2", "-m", "alexnet_mp", "train"]
    done = start(
        module, *flags.split(), "--threads", "1", "--max-steps", "2", "--out", str(tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_without_the_package_a_script_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "launch" / "train.py")],  # no site-packages
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: alexnet_mp is not installed: pip install -e .\n"


def test_without_a_dependency_a_command_says_what_to_install(monkeypatch, capsys) -> None:
    from alexnet_mp.cli import commands

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'tyro.conf'", name="tyro.conf")

    monkeypatch.setattr(commands, "load_command", missing)
    with pytest.raises(SystemExit) as stop:
        commands.run_command("train", [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: tyro is not installed: pip install tyro\n"


@pytest.mark.parametrize(
    ("argv", "name", "program"),
    [
        (["launch/train.py", "--lr", "1"], None, "launch/train.py"),
        (["launch/train.py"], "pack", "launch/pack.py"),
        (["/usr/lib/alexnet_mp/__main__.py", "evaluate", "x"], None, "-m alexnet_mp evaluate"),
        (["/usr/lib/alexnet_mp/__main__.py", "evaluate"], "pack", "-m alexnet_mp pack"),
        (["/usr/bin/pytest"], None, "-m alexnet_mp train"),
        (["/usr/bin/pytest"], "pack", "-m alexnet_mp pack"),
        (["tests/commands.py"], None, "tests/commands.py"),
    ],
)
def test_the_program_is_spelled_as_it_was_typed(
    monkeypatch, argv: list[str], name: str | None, program: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    assert command.typed_program(name) == program
    assert command.torchrun_command(name) == f"torchrun --nproc_per_node=2 {program}"


def test_inside_its_folder_a_script_is_named_without_it(monkeypatch) -> None:
    monkeypatch.chdir(ROOT / "launch")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command.typed_command("pack") == "python pack.py"


@pytest.mark.parametrize("name", sorted({*alexnet_mp.__all__} - {"PRESETS"}))
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = getattr(alexnet_mp, name).__doc__
    assert re.search(r"^( {8}|    >>> )\S", text, re.MULTILINE), text


def test_importing_the_package_is_cheap_and_every_public_name_is_found() -> None:
    assert set(alexnet_mp._MODULE_OF) == set(alexnet_mp.__all__) <= set(dir(alexnet_mp))
    code = (
        "import sys, alexnet_mp; alexnet_mp.preset('demo'); "
        "print({'torch', 'tyro', 'matplotlib'} & {*sys.modules})"
    )
    code += "\nalexnet_mp.Trainer; print('matplotlib' in sys.modules)"
    assert start([sys.executable, "-c", code]).stdout.split("\n")[:2] == ["set()", "False"]
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        alexnet_mp.Trainr  # noqa: B018


def test_the_wheel_finds_every_file_that_the_package_needs() -> None:
    origin = Path(importlib.util.find_spec("alexnet_mp").origin).parent
    assert (origin / "py.typed").exists()
    text = (ROOT / "pyproject.toml").read_text()
    assert "csrc/*.cpp" in text and "py.typed" in text
    assert 'attr = "alexnet_mp.__version__"' in text
