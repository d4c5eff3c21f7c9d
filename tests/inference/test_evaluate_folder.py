"""A network is measured on a folder that has only the split that is asked for."""

import shutil
from pathlib import Path

import pytest
from image_sets import make_folder

from alexnet_mp import preset
from alexnet_mp.config.arguments import EvaluateRequest, Networks
from alexnet_mp.inference.evaluate import evaluate_checkpoints
from alexnet_mp.training.run import run

pytestmark = pytest.mark.usefixtures("cache")


def test_the_papers_network_trains_on_all_of_train_and_is_measured_without_it(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "set", ("train", "val"))
    config = preset("paper").with_fields(
        kernels=(4, 4, 4, 4, 4),
        hidden=(8, 8),
        image_size=64,
        data="folder",
        data_dir=str(root),
        batch_size=8,
        epochs=1,
        out=str(tmp_path / "run"),
    )
    result = run(config)
    assert result["validation"] == "test images" and result["steps"] == 3  # 20 images in eights
    assert "20 / 20 / 20" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(root / "val", tmp_path / "elsewhere" / "valid")
    shutil.rmtree(root)
    shutil.rmtree(cache)
    scores = evaluate_checkpoints(
        EvaluateRequest(
            Networks(checkpoint=(str(tmp_path / "run" / "best.pt"),)),
            data_dir=str(tmp_path / "elsewhere"),
        )
    )
    assert scores["loss"] == pytest.approx(result["test_loss"], rel=1e-6) and scores["images"] == 20
    assert len(list(cache.glob("folder-*"))) == 1
    assert f"test: {tmp_path}/elsewhere/valid (the only other split)" in capsys.readouterr().out
