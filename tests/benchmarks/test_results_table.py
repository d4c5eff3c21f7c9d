"""benchmarks/results_table.py: the READMEs say what benchmarks/results has, and nothing else."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
results = importlib.import_module("results_table")
pictures = importlib.import_module("claims_picture")

CLAIM = {
    "text": "LRN",
    "paper": "top-1 -1.4",
    "measure": "points",
    "seeds": [0, 1, 2],
    "differences": [-2.0, -1.0, -1.5],
    "interval": [-1.5, -2.74, -0.26],
    "verdict": "holds",
    "differences_top5": [-1.0, 1.0, 0.5],
    "interval_top5": [0.167, -2.4, 2.7],
    "verdict_top5": "cannot tell",
}
SPEED = {
    "text": "ReLU",
    "paper": "6 times fewer",
    "measure": "speed",
    "seeds": [0],
    "with": [4.0],
    "without": [20.0],
    "fastest_rates": [[0.004, 0.002]],
    "ratios": [5.0],
    "interval": None,
    "verdict": "cannot tell",
}
CLAIMS = {
    "request": {"epochs": 20, "image_size": 64, "batch_size": 128, "precision": "bf16"},
    "machine": {"device_name": "a GPU", "torch": "2.11"},
    "claims": [CLAIM, SPEED],
}


def call(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks/results_table.py", *flags])
    return results.main()


def test_the_readmes_say_what_the_files_say(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "--check") == 0, capsys.readouterr().out


def test_a_figure_that_was_changed_by_hand_is_noticed_and_put_right(
    tmp_path, monkeypatch, capsys
) -> None:
    for name in results.READMES:
        text = (results.ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("29,478,912 a rank", "29,478,913 a rank"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert call(monkeypatch, "--check") == 1
    assert "README.md: not what benchmarks/results says" in capsys.readouterr().out
    assert "29,478,913 a rank" in (tmp_path / "README.md").read_text()
    assert call(monkeypatch) == 0 and call(monkeypatch, "--check") == 0
    assert "29,478,912 a rank" in (tmp_path / "README.md").read_text()


def test_a_claims_row_has_both_intervals_and_both_verdicts_where_they_differ() -> None:
    points, speed = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in results.claims(CLAIMS).splitlines()[2:4]
    )
    assert points[2:] == [
        "-1.50 (-2.74 to -0.26)",
        "+0.17 (-2.40 to +2.70)",
        "3",
        "holds, cannot tell",
    ]
    assert speed[2:] == [
        "5.00 times",
        "epochs: 4.0 and 20.0 (rates 0.004, 0.002)",
        "1",
        "cannot tell",
    ]


def test_below_the_row_of_relu_alone_stand_its_own_epochs_and_rates() -> None:
    request = CLAIMS["request"] | {"relu_epochs": 40, "rates": [0.001, 0.002]}
    text = results.claims(CLAIMS | {"claims": [SPEED], "request": request})
    assert "Up to 40 epochs at each of the rates 0.001, 0.002, batch 128, bf16" in text
    assert "pixels" not in text and "20 epochs, 64 pixels" in results.claims(CLAIMS)


def test_a_file_that_is_not_there_is_not_measured(tmp_path) -> None:
    text = "<!-- results: claims new.json -->\nBEFORE\n<!-- end -->\n"
    assert "Not measured yet: results/new.json" in results.filled(text, "README.md", tmp_path)
    (tmp_path / "new.json").write_text(json.dumps(CLAIMS))
    filled = results.filled(text, "README.md", tmp_path)
    assert "holds" in filled and "BEFORE" not in filled
    assert results.filled(filled, "README.md", tmp_path) == filled


def test_a_block_of_an_unknown_kind_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text("{}")
    text = "<!-- results: speeds a.json -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match=r"README.md: results: speeds is not one of throughput"):
        results.filled(text, "README.md", tmp_path)


def test_networks_of_several_seeds_have_each_accuracy_and_their_mean() -> None:
    def network(preset: str, seed: int, top1: float, **views: dict) -> dict:
        weights = {"one_view": {"top1": top1}} | views
        return {
            "preset": preset,
            "seed": seed,
            "best_epoch": 3,
            "epochs": 9,
            "weights": {"best": weights, "last": {"one_view": {"top1": 0.5}}},
        }

    large = network("original", 0, 0.8, ten_views={"top1": 0.85})
    networks = [large, network("tutorial", 0, 0.78), network("tutorial", 1, 0.8)]
    machine = {"device_name": "a GPU", "torch": "2.11"}
    content = {"images": 10_000, "image_size": 224, "precision": "bf16", "machine": machine}
    lines = results.cifar10(content | {"networks": networks}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4]]
    assert cells[0] == ["`original`", "0", "best epoch: 3", "80.00 %", "85.00 %"]
    assert cells[2] == [
        *("`tutorial`", "0, 1", "best epoch: 3, 3", "78.00, 80.00; mean 79.00 %", "-"),
    ]
    assert cells[3][2:4] == ["last epoch: 9, 9", "50.00, 50.00; mean 50.00 %"]
    assert lines[-1] == "10,000 test images, 224 pixels, bf16; a GPU, torch 2.11."


def test_the_front_page_counts_the_claims_and_top5_only_where_top1_does_not_tell() -> None:
    unsure = CLAIM | {"verdict": "cannot tell"}
    in_top5 = unsure | {"verdict_top5": "holds"}
    speed = SPEED | {"interval": [6.43, 6.3, 6.6], "verdict": "holds"}
    text = results._verdicts([CLAIM, unsure, unsure, in_top5, speed])
    assert text == (
        "2 of 5 claims hold, 1 more in top-5, 2 cannot be told; ReLU: 6.4 times fewer epochs"
    )
    opposite = CLAIM | {"verdict": "opposite"}
    assert "1 of 2 claims hold, 1 the opposite; ReLU" in results._verdicts([opposite, speed])


def test_the_picture_of_the_claims_has_each_interval_and_the_paper_s_figure(tmp_path) -> None:
    figure = pictures.draw_claims([CLAIM, SPEED], tmp_path / "claims.png")
    (axes,) = figure.axes
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert [-2.74, -0.26] in drawn and [-2.4, 2.7] in drawn  # both intervals
    assert [-1.5] in drawn and [0.167] in drawn  # both means
    assert [-1.4] in drawn  # what the paper says of top-1; of top-5 it says nothing here
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LRN\n(3 seeds)"]
    assert (tmp_path / "claims.png").stat().st_size > 5_000
    assert pictures.paper_figures("top-1 more than -1") == {}
    with pytest.raises(ValueError, match="no claim has two seeds"):
        pictures.draw_claims([CLAIM | {"interval": None}, SPEED])
