"""--tensorboard: what is read back from the files is what the run did, each step once."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run as on_ranks
from small_nets import TINY_RUN

from alexnet_mp.plotting.kernels import kernel_sheet
from alexnet_mp.training.run import run
from alexnet_mp.training.tensorboard import EVERY, layer_norms

STEPS = 2 * EVERY  # in an epoch
CONFIG = TINY_RUN.with_fields(
    epochs=1, batch_size=4, limit_train=4 * STEPS, limit_val=8, limit_test=8, tensorboard=True
)
NORMS = [f"gradient norm column {i}/{layer}" for i in (0, 1) for layer in ("conv1", "fc8")]


def written(out: Path):
    """What TensorBoard shows of the run in `out`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard")).Reload()


def train(rank: int, out: str, tensorboard: bool) -> bool:
    """Trains; returns whether TensorBoard's package was imported."""
    run(CONFIG.with_fields(out=out, tensorboard=tensorboard))
    return "tensorboard" in sys.modules


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on two ranks, of which rank 0 alone imports the package."""
    out = tmp_path_factory.mktemp("tensorboard") / "run"
    assert on_ranks(train, 2, str(out), True) == [True, False]
    return out


def test_scalars_of_the_epoch_are_those_of_its_line_in_the_history(trained) -> None:
    (record,) = map(json.loads, (trained / "history.jsonl").read_text().splitlines())
    events = written(trained)
    for tag, key in {
        "training loss": "train_loss",
        "validation top-1 accuracy": "val_top1",
        "validation top-5 accuracy": "val_top5",
        "learning rate": "lr",
        "images per second": "images_per_second",
    }.items():
        (event,) = events.Scalars(f"epoch/{tag}")
        assert event.step == STEPS and event.value == pytest.approx(record[key])


def test_each_column_and_layer_has_the_norm_of_its_gradient_on_either_rank(trained) -> None:
    events = written(trained)
    assert set(NORMS) <= set(events.Tags()["scalars"])
    for tag in NORMS:
        assert [event.step for event in events.Scalars(tag)] == [EVERY, 2 * EVERY]
        assert all(event.value > 0 for event in events.Scalars(tag))


def test_the_image_of_each_columns_kernels_is_of_the_trained_weights(trained) -> None:
    from PIL import Image

    weights = torch.load(trained / "last.pt", weights_only=True)["model"]
    events = written(trained)
    for column in (0, 1):
        (image,) = events.Images(f"conv1 kernels/column {column}")
        (trained / "kernels.png").write_bytes(image.encoded_image_string)
        found = np.asarray(Image.open(trained / "kernels.png"), dtype=float) / 255
        sheet = kernel_sheet(weights[f"columns.{column}.conv1.weight"])
        assert image.step == STEPS and np.abs(found - sheet).max() < 0.01


def test_a_run_that_goes_on_from_an_older_checkpoint_has_each_step_once(tmp_path) -> None:
    out, early = tmp_path / "run", tmp_path / "early.pt"
    run(CONFIG.with_fields(out=str(out), max_steps=EVERY + 5))
    shutil.copy(out / "last.pt", early)
    resumed = CONFIG.with_fields(out=str(out))
    run(resumed.with_fields(resume=str(out / "last.pt")))
    run(resumed.with_fields(resume=str(early)))  # as after a kill, which loses steps
    events = written(out)
    for tag in ("step/training loss", *NORMS):
        assert [event.step for event in events.Scalars(tag)] == [EVERY, 2 * EVERY]
    assert [event.step for event in events.Scalars("epoch/validation loss")] == [STEPS]


def test_without_the_flag_nothing_is_imported_and_no_folder_made(tmp_path) -> None:
    assert on_ranks(train, 1, str(tmp_path / "run"), False) == [False]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_package_one_line_names_it_before_the_first_step(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'alexnet_mp\[tensorboard\]'") as caught:
        run(CONFIG.with_fields(out=str(tmp_path / "run")))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_layers_norm_is_that_of_all_its_parameters() -> None:
    names = ["columns.1.conv3.weight_own", "columns.1.conv3.weight_peers", "head.weight"]
    assert layer_norms(names, torch.tensor([3.0, 4.0, 9.0])) == {(1, "conv3"): 5.0}
