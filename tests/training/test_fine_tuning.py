"""Training that starts from a file: layers taken, drawn anew, frozen."""

from pathlib import Path

import pytest
import torch
from foreign_networks import random_network
from ranks import run as run_ranks
from small_nets import SMALL

from alexnet_mp import Config
from alexnet_mp.training import checkpoint
from alexnet_mp.training.run import Run, run
from alexnet_mp.weights.convert import write_network_file
from alexnet_mp.weights.network_file import NetworkFile

ONE_EPOCH = SMALL.with_fields(epochs=1)  # of shapes, which have 12 classes


@pytest.fixture
def trained(tmp_path) -> tuple[Path, NetworkFile]:
    """A network of 7 classes in a file, which is not a checkpoint."""
    network = random_network("demo")
    write_network_file(network, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors", network


def tune(file: Path, out: Path, **fields: object) -> Config:
    flags = {"init_from": str(file), "reset": ("fc8",), "out": str(out)} | fields
    return ONE_EPOCH.with_fields(**flags)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(out / "last.pt")["model"]


def on_rank(rank: int, config: Config) -> None:
    run(config)


def test_training_starts_from_the_file_and_a_reset_layer_from_its_draw(
    trained, tmp_path, capsys
) -> None:
    file, network = trained
    run(tune(file, tmp_path / "a", max_steps=1, lr=0.0))
    drawn = ONE_EPOCH.with_fields(out=str(tmp_path / "b"), max_steps=1, lr=0.0)
    fresh = (run(drawn), weights(tmp_path / "b"))[1]
    for name, value in weights(tmp_path / "a").items():
        expected = fresh[name] if ".fc8." in name else network.tensors[name]
        assert torch.equal(value, expected), name
    lines = capsys.readouterr().out
    assert f"initialized from {file}: conv1 conv2 conv3 conv4 conv5 fc6 fc7" in lines
    names = "columns.0.fc8.bias, columns.0.fc8.weight, columns.1.fc8.weight"
    assert f"drawn anew: {names}" in lines and "note:" not in lines


def test_frozen_layers_keep_their_weights_and_have_no_gradient(trained, tmp_path) -> None:
    file, network = trained
    frozen = ("conv1", "conv2", "conv3")
    config = tune(file, tmp_path / "a", freeze=frozen)
    built: list[Run] = []
    original = Run.__init__

    def keep(self: Run, *arguments: object) -> None:
        original(self, *arguments)
        built.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__init__", keep)
        run(config)
    gradients = {name: p.grad for name, p in built[0].model.named_parameters()}
    for name, value in weights(tmp_path / "a").items():
        layer = name.split(".")[2]
        if layer != "fc8":
            assert torch.equal(value, network.tensors[name]) == (layer in frozen), name
    assert {name.split(".")[2] for name, gradient in gradients.items() if gradient is None} == set(
        frozen
    )


def test_a_frozen_run_goes_on_where_it_stopped(trained, tmp_path) -> None:
    file, _ = trained
    config = tune(file, tmp_path / "whole", freeze=("conv1", "conv2"), epochs=2)
    run(config)
    run(config.with_fields(out=str(tmp_path / "half"), max_steps=3))
    last = str(tmp_path / "half" / "last.pt")
    run(config.with_fields(out=str(tmp_path / "half"), resume=last))
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(half[name], value) for name, value in whole.items())


@pytest.mark.ranks
def test_two_ranks_with_frozen_layers_equal_one_device(trained, tmp_path) -> None:
    file, network = trained
    config = tune(file, tmp_path / "two", freeze=("conv1", "conv2", "conv3"))
    run_ranks(on_rank, 2, config, timeout=120)
    run(config.with_fields(out=str(tmp_path / "one")))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        assert (two[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), name
        if name.split(".")[2] in config.recipe.freeze:
            assert torch.equal(two[name], network.tensors[name])


def test_a_shape_that_does_not_fit_is_one_line_with_both_shapes(trained, tmp_path) -> None:
    file, _ = trained
    with pytest.raises(ValueError, match=r"net.safetensors: columns.0.fc8.weight is") as caught:
        run(tune(file, tmp_path / "a", reset=()))
    text = str(caught.value)
    assert "(12, 20) here, the file has (7, 20); --reset fc8" in text and "\n" not in text
    with pytest.raises(ValueError, match=r"fc6.weight is .*; --reset fc8 fc6 draws"):
        run(tune(file, tmp_path / "a", image_size=99))
    with pytest.raises(FileNotFoundError, match="no such"):
        run(tune(tmp_path / "none.pt", tmp_path / "a"))


def test_another_preprocessing_is_named(trained, tmp_path, capsys) -> None:
    write_network_file(random_network("caffe", image_size=67), tmp_path / "caffe.pt")
    run(tune(tmp_path / "caffe.pt", tmp_path / "a", max_steps=1))
    note = next(line for line in capsys.readouterr().out.splitlines() if "trained with" in line)
    for flag in ("--mean values", "--color-order bgr", "--lrn-across-columns True", "--lrn-k 1.0"):
        assert flag in note
    assert "--columns" not in note and "--classes" not in note


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("conv9",)}, "--freeze conv9: not one of conv1"),
        ({"reset": ("fc9",)}, "--reset fc9: not one of"),
        ({"init_from": ""}, "--reset fc8: says which layers --init-from leaves out"),
    ],
)
def test_layers_that_are_none_are_refused(tmp_path, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tune(tmp_path, tmp_path / "a", **fields)


def test_a_run_without_a_layer_to_train_is_refused(trained, tmp_path) -> None:
    with pytest.raises(ValueError, match="no layer is left to train"):
        run(tune(trained[0], tmp_path / "a", freeze=ONE_EPOCH.model.layers))
