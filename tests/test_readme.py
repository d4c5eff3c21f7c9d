"""The README's Python cells run as they are printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
CELLS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def cell(word: str) -> str:
    found = [text for text in CELLS if word in text]
    assert len(found) == 1, f"{len(found)} cells with {word}"
    return found[0]


def test_the_first_cell_makes_the_papers_network(capsys) -> None:
    scope: dict = {}
    exec(cell("ModelConfig"), scope)
    assert scope["logits"].shape == (1, 1000)
    assert "60,965,224" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_the_tutorials_cells_train_evaluate_and_draw(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(cell("Trainer"), scope)
    trainer, printed = scope["trainer"], capsys.readouterr().out
    assert len(trainer.train_losses) == len(trainer.val_losses) == len(trainer.gradient_norms) == 2
    assert f"accuracy {trainer.accuracy(scope['test_loader']):.2%}" in printed
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("samples.png", "losses.png"))


def test_the_tutorials_initialization_describes_eight_layers(capsys) -> None:
    exec(cell("describe_layers"), {})
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 8 and "96 x 3 x 11 x 11" in lines[0] and "0.0147" in lines[5]
    )  # sqrt(2 / 9216) = 0.01473


def test_every_cell_is_run_by_a_test_above() -> None:
    assert len(CELLS) == 3
