"""The report of a run: all that it left behind, and the name of all that is missing."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from small_nets import TINY_RUN

from alexnet_mp import PRESETS, preset
from alexnet_mp.cli.figures import figures
from alexnet_mp.cli.parser import parse_train
from alexnet_mp.inference.run_facts import (
    changed_fields,
    command_of,
    differences,
    readable,
    readable_seconds,
    result_rows,
)
from alexnet_mp.inference.run_pictures import timeline
from alexnet_mp.training.run import run

STEP = {
    "step": 14,
    "device": "cpu",
    "batch": 4,
    "column_ranks": 1,
    "data_ranks": 1,
    "ranks": [
        {
            "rank": 0,
            "columns": [0, 1],
            "seconds": 0.2,
            "exposed_seconds": 0.0,
            "blocks": [
                {"layer": "conv1", "pass": passes, "half": "", "begin": begin, "end": begin + 0.1}
                for passes, begin in (("forward", 0.0), ("backward", 0.1))
            ],
            "waits": [],
        }
    ],
    "messages": [],
}
PICTURES = ["curves", "kernels", "predictions", "neighbors", "confusion", "timeline", "samples"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all its files."""
    out = tmp_path_factory.mktemp("report") / "run"
    run(TINY_RUN.with_fields(out=str(out)))
    (out / "timeline.json").write_text(json.dumps(STEP))
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to take files from."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def made(folder: Path, *flags: str) -> tuple[str, dict]:
    """The page that the command writes, and its facts."""
    facts = folder / "facts.json"
    words = [str(folder), "--html", "--images", "2", "--threads", "1", "--json", str(facts)]
    assert figures([*words, *flags]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, json.loads(facts.read_text())


def pictures_of(text: str) -> list[str]:
    return re.findall(r'<img src="data:image/png;base64,[^"]{100,}" alt="([^"]*)"', text)


def cells(text: str, row: str) -> list[str]:
    """The cells of the table row that begins with `row`."""
    (found,) = re.findall(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', text)
    return re.findall("<td>(.*?)</td>", found)


def test_the_page_of_a_whole_run_has_every_part_and_nothing_is_missing(copied) -> None:
    text, facts = made(copied)
    assert pictures_of(text) == PICTURES
    assert facts["report"]["missing"] == [] and "Missing:" not in text
    result = json.loads((copied / "result.json").read_text())
    assert f"<dd>{result['top1']:.2%}</dd>" in text
    config = json.loads((copied / "config.json").read_text())
    assert cells(text, "torch") == [config["environment"]["torch"]]
    assert cells(text, "--batch-size") == ["16", "32"]  # the run's, and its preset's
    assert not re.search(r"https?://", text)


def missing(text: str) -> str:
    return "\n".join(re.findall(r'<p class="missing">Missing: ([^<]*)</p>', text))


def test_a_run_that_goes_on_names_what_is_still_to_come(copied) -> None:
    for name in ("timeline.json", "result.json"):
        (copied / name).unlink()
    (copied / "history.jsonl").write_text("")
    text, facts = made(copied)
    assert facts["report"]["missing"] == ["Result", "Curves", "Exchange and timeline"]
    for reason in ("train with --profile", "the run has not ended", "no epoch has ended"):
        assert reason in missing(text)
    assert pictures_of(text) == [p for p in PICTURES if p not in ("curves", "timeline")]


def test_without_a_checkpoint_there_is_all_that_needs_none(copied) -> None:
    for name in ("best.pt", "last.pt"):
        (copied / name).unlink()
    text, facts = made(copied)
    assert pictures_of(text) == ["curves", "timeline"]
    assert {"First-layer kernels", "Predictions"} <= set(facts["report"]["missing"])
    assert "neither best.pt nor last.pt is there" in missing(text)


def test_images_that_are_gone_leave_what_needs_none(copied, capsys) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["config"]["data"] |= {"data": "folder", "data_dir": str(copied / "gone")}
    config["config"]["preset"] = "of-mine"  # nor is the user's own preset there
    (copied / "config.json").write_text(json.dumps(config))
    text, facts = made(copied)
    assert pictures_of(text) == ["curves", "kernels", "timeline"]
    named = {"Configuration", "Predictions", "Nearest neighbors", "Confusion of the worst classes"}
    assert named <= set(facts["report"]["missing"])
    assert "; missing: Configuration, Predictions" in capsys.readouterr().out
    assert re.search(r"Missing: [^<]*gone", text) and "--preset of-mine" in missing(text)


@pytest.mark.parametrize("content", ['{"ranks": [{}]}', "[]", "{", '{"ranks": 3}'])
def test_a_timeline_that_is_damaged_is_named_in_one_line(tmp_path, content: str) -> None:
    (tmp_path / "timeline.json").write_text(content)
    with pytest.raises(ValueError, match=r"timeline\.json: not") as caught:
        timeline(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_runs_are_compared_by_curves_differences_and_results(copied, tmp_path) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "<b>other"))
    config = json.loads((other / "config.json").read_text())
    config["config"]["recipe"]["lr"] = 0.5
    config["environment"]["device_name"] = "another"
    (other / "config.json").write_text(json.dumps(config))
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps(result | {"top1": 0.875}))
    unfinished = Path(shutil.copytree(copied, tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    text, facts = made(copied, "--compare", str(other), str(unfinished))
    overlaid = pictures_of(text)[: -len(PICTURES)]
    assert overlaid == [
        "training loss (in training mode)",
        "validation loss",
        "training error (in training mode)",
        "validation error",
    ]
    table = text.partition('id="comparison"')[2].partition("</section>")[0]
    assert cells(table, "lr") == ["0.02", "0.5", "0.02"]
    assert cells(table, "environment: device_name")[1] == "another"
    assert cells(table, "top-1 accuracy") == [f"{result['top1']:.2%}", "87.50%", "–"]
    assert "&lt;b&gt;other" in text and "<b>" not in text
    assert facts["report"]["missing"] == ["Comparison"]  # the unfinished run's result


# ---- what the files say ----


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_run_makes_its_configuration_again(name: str) -> None:
    changed = {"lr": 0.5, "flip": False, "limit_train": 2000, "data_dir": "my pictures"}
    config = preset(name).with_fields(**changed, tensorboard=True)
    words = shlex.split(command_of(config, 1))
    assert words[:2] == ["python", "launch/train.py"]
    assert parse_train(words[2:]) == config


def test_the_command_of_several_ranks_is_torchruns_and_without_changes_is_bare() -> None:
    assert command_of(preset("demo"), 1) == "python launch/train.py"
    assert command_of(preset("paper"), 2) == (
        "torchrun --nproc_per_node=2 launch/train.py --preset paper"
    )


def test_a_folder_and_what_the_images_decided_are_no_changes_of_a_preset() -> None:
    config = preset("demo").with_fields(out="runs/mine", classes=12, resume="last.pt")
    assert changed_fields(config) == {}


def test_only_fields_that_differ_are_listed() -> None:
    runs = {"a": {"lr": 0.1, "seed": 1}, "b": {"lr": 0.1, "seed": 2, "new": True}}
    assert differences(runs) == [["seed", "1", "2"], ["new", "–", "yes"]]


def test_values_are_readable() -> None:
    assert readable((4, 0.5, None, False)) == "4 0.5 – no" and readable(20000) == "20,000"
    assert [readable_seconds(s) for s in (42.4, 725, 11400)] == ["0:42", "12:05", "3:10:00"]
    rows = result_rows([{"top1": 0.5, "exchange": {"bytes_per_step": 1024}}, {}])
    assert rows[0] == ["top-1 accuracy", "50.00%", "–"]
    assert rows[-1] == ["bytes that a rank sends a step", "1,024", "–"]
