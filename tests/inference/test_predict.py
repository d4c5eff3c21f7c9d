"""Prediction for files: names that are no files are refused, each with the way out."""

from pathlib import Path

import pytest
import torch

from alexnet_mp.cli import predict as predict_command
from alexnet_mp.cli.parser import parse_predict
from alexnet_mp.config import preset
from alexnet_mp.inference.load_network import TrainedNetwork, best_classes
from alexnet_mp.inference.predict import _read

NETWORK = TrainedNetwork(Path("best.pt"), {}, preset("demo"), (), None)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("-", "the standard input is not read; save the image"),
        ("https://example.org/cat.jpg", "an address, not a file; download the image"),
        ("file:///tmp/cat.jpg", "an address, not a file"),
    ],
)
def test_a_name_that_is_no_file_is_refused_with_the_way_out(file: str, words: str) -> None:
    assert parse_predict(["--checkpoint", "a", file]).images == (file,)
    reason = _read(file, NETWORK)
    assert isinstance(reason, str) and reason.startswith(words)


def test_a_file_with_a_colon_in_its_name_is_a_file() -> None:
    assert _read("C:cat.jpg", NETWORK) == "No such file or directory"


def test_the_most_probable_classes_come_first() -> None:
    row = torch.tensor([0.1, 0.6, 0.3])
    expected = [("b", pytest.approx(0.6)), ("class 2", pytest.approx(0.3))]
    assert best_classes(row, ["a", "b"], top=2) == expected  # class 2 is a logit without a class
    assert len(best_classes(row, ["a", "b"], top=9)) == 3


def test_a_file_that_cannot_be_read_makes_the_exit_code_2(monkeypatch, capsys) -> None:
    answers = [{"file": "a.png", "top": []}, {"file": "b.png", "error": "an empty file"}]
    monkeypatch.setattr(predict_command, "predict_files", lambda request: answers[: request.top])
    arguments = ["--checkpoint", "best.pt", "a.png", "b.png", "--top"]
    assert predict_command.predict([*arguments, "1"]) == 0
    assert predict_command.predict([*arguments, "2"]) == 2
    assert capsys.readouterr().err == "error: b.png: an empty file\n"
