"""Prediction for files: names that are no files are refused, each with the way out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alexnet_mp.cli import predict as predict_command
from alexnet_mp.cli.parser import parse_predict
from alexnet_mp.config import preset
from alexnet_mp.inference import predict as predict_module
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


def test_an_answer_belongs_to_its_file_though_others_cannot_be_read(monkeypatch) -> None:
    """Each image of this test is filled with the number of its class."""

    def read(file: str, network: TrainedNetwork) -> torch.Tensor | str:
        name = file.removesuffix(".png")
        return torch.full((3, 4, 4), int(name)) if name.isdigit() else "an empty file"

    def probabilities(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[images[:, 0, 0, 0]]

    monkeypatch.setattr(predict_module, "_read", read)
    ensemble = SimpleNamespace(probabilities=probabilities, first=SimpleNamespace(classes="abcd"))
    files = ["2.png", "broken.png", "0.png", "other.png", "3.png"]
    answers = list(predict_module._predict_batch(ensemble, files, top=1))
    assert [answer["file"] for answer in answers] == files
    best = [answer["top"][0]["class"] if "top" in answer else answer["error"] for answer in answers]
    assert best == ["c", "an empty file", "a", "an empty file", "d"]
