"""launch/pack.py as it is typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_sets import make_folder

from alexnet_mp.cli.flags import UsageError
from alexnet_mp.cli.parser import parse_pack
from alexnet_mp.data import Store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("cache")


def run_pack(*argv: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch/pack.py", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def test_the_command_packs_tells_and_writes_its_report(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "café", classes=("狗", "chat"))
    done = run_pack(
        source,
        tmp_path / "store",
        "--json",
        tmp_path / "report.json",
        LANG="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        LC_ALL="C",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "packing 40 images into" in done.stdout and "train: 20 images of 2 classes" in done.stdout
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["splits"]["test"]["images"] == 20 and Store.open(
        tmp_path / "store" / "train"
    ).classes == ("chat", "狗")


def test_the_commands_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_pack(tmp_path / "nowhere", tmp_path / "store")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: SOURCE {tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "SOURCE"),
        (["a"], "STORE: name a folder"),
        (["a", "b", "--check"], "leave STORE out"),
        (["a", "b", "--encode", "png"], "png"),
        (["a", "b", "--workers", "-1"], "--workers -1"),
    ],
)
def test_a_mistaken_command_line_is_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_pack(argv)
    assert "\n" not in str(caught.value)
