"""launch/convert.py and launch/features.py: files in, files out, mistakes in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_networks import random_network
from PIL import Image

import alexnet_mp
from alexnet_mp.cli.convert import convert
from alexnet_mp.cli.features import features
from alexnet_mp.cli.parser import UsageError
from alexnet_mp.weights.convert import read_network_file, write_network_file


@pytest.fixture
def best(tmp_path) -> Path:
    write_network_file(random_network("demo"), tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Five images in two folders, one of them damaged, and a file that is none."""
    folder = tmp_path / "photographs"
    for number, name in enumerate(("b/1.png", "a/2.png", "a/3.jpg", "4.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (80 + number, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.png").write_bytes(b"not a PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_checkpoint_becomes_onnx_and_comes_back(best, tmp_path, capsys) -> None:
    assert convert([str(best), str(tmp_path / "a.onnx")]) == 0
    assert "a checkpoint of alexnet_mp: 2 columns, 7 classes" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert convert([str(tmp_path / "a.onnx"), str(tmp_path / "b.pt"), "--json", str(report)]) == 0
    one, two = read_network_file(best), read_network_file(tmp_path / "b.pt")
    assert one.config == two.config and one.classes == two.classes
    assert all(torch.equal(two.tensors[name], value) for name, value in one.tensors.items())
    facts = json.loads(report.read_text())
    assert (facts["from"], facts["to"], facts["classes"]) == ("onnx", "checkpoint", 7)


def test_formats_classes_and_preset_can_be_named(best, tmp_path) -> None:
    plain, out = tmp_path / "plain.bin", tmp_path / "out.bin"
    assert convert([str(best), str(plain), "--to", "grouped"]) == 0
    torch.save(dict(torch.load(plain, weights_only=True)), plain)
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefg"))
    flags = ["--from", "grouped", "--to", "safetensors", "--preset", "demo"]
    assert convert([str(plain), str(out), *flags, "--classes", str(names)]) == 0
    assert read_network_file(out).classes == tuple("abcdefg")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["IN", "a.xyz"], r"a\.xyz: no format has names with this end"),
        (["none.pt", "a.onnx"], r"none\.pt: no such"),
        (["IN", "a.onnx", "--preset", "nothing"], "--preset nothing"),
        (["IN", "a.onnx", "--classes", "none.txt"], r"--classes none\.txt: cannot be read"),
        (["IN", "a.pth", "--to", "torchvision"], "torchvision's alexnet has --columns 1"),
    ],
)
def test_a_mistake_is_one_line(best, words: list[str], error: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=error) as caught:
        convert([str(best) if word == "IN" else word for word in words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["conv5", "fc6", "fc7"])
def test_features_are_the_networks_for_each_file_in_order(
    best, photographs, tmp_path, capsys, layer: str
) -> None:
    out = tmp_path / "features.npz"
    words = ["--checkpoint", str(best), str(photographs), str(out), "--layer", layer]
    assert features([*words, "--batch-size", "2", "--threads", "1"]) == 2
    assert "broken.png: not an image that Pillow knows" in capsys.readouterr().err
    with np.load(out, allow_pickle=False) as content:
        files, values = content["files"].tolist(), content["features"]
    assert files == ["4.png", "a/2.png", "a/3.jpg", "b/1.png"]
    model, _, preprocess = alexnet_mp.load_network(best)
    expected = model.features(preprocess([photographs / name for name in files]), layer)
    assert values.dtype == np.float32 and np.allclose(values, expected.numpy(), atol=1e-5)


def test_a_folder_without_images_and_a_name_without_npz_are_named(best, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has no images"):
        features(["--checkpoint", str(best), str(tmp_path / "empty"), "out.npz"])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        features(["--checkpoint", str(best), str(tmp_path / "nowhere"), "out.npz"])
    with pytest.raises(UsageError, match=r"must end in \.npz"):
        features(["--checkpoint", str(best), str(tmp_path), "out.txt"])
