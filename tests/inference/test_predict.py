"""Prediction for files: images that are no files are refused, each with its way out."""

import pytest
import torch

from alexnet_mp.cli.parser import parse_predict
from alexnet_mp.inference.predict import _read, best_classes


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("-", "the standard input is not read; save the image"),
        ("https://example.org/cat.jpg", "an address, not a file; download the image"),
        ("file:///tmp/cat.jpg", "an address, not a file"),
    ],
)
def test_what_is_not_a_file_is_refused_with_the_way_out(file: str, words: str) -> None:
    assert parse_predict(["--checkpoint", "a", file]).images == (file,)
    reason = _read(file, 76)
    assert isinstance(reason, str) and reason.startswith(words)


def test_a_file_with_a_colon_in_its_name_is_a_file() -> None:
    assert _read("C:cat.jpg", 76) == "No such file or directory"


def test_the_most_probable_classes_come_first() -> None:
    row = torch.tensor([0.1, 0.6, 0.3])
    assert best_classes(row, ["a", "b"], top=2) == [
        {"class": "b", "probability": pytest.approx(0.6)},
        {"class": "class 2", "probability": pytest.approx(0.3)},  # a logit without a class
    ]
    assert len(best_classes(row, ["a", "b"], top=9)) == 3
