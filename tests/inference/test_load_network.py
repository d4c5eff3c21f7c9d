"""A trained network used from Python: load, preprocess, predict in two lines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_networks import random_network
from PIL import Image

import alexnet_mp
from alexnet_mp.config.arguments import Networks, PredictRequest
from alexnet_mp.inference.predict import predict_files
from alexnet_mp.weights.convert import write_network_file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A network whose preprocessing has a mean image."""
    path = tmp_path_factory.mktemp("network") / "network.pt"
    network = random_network("demo", mean="image-center", stored_side=256, crop_of=227)
    write_network_file(network, path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(path)
    return path


def test_python_predicts_as_the_command_does(file, photograph) -> None:
    network = alexnet_mp.load_network(file)
    (found,) = network.predict(str(photograph), top=3)
    command = predict_files(PredictRequest((str(photograph),), Networks((str(file),), threads=1)))
    expected = [(entry["class"], entry["probability"]) for entry in command[0]["top"][:3]]
    assert found == [(name, pytest.approx(share, rel=1e-5)) for name, share in expected]
    assert found[0][1] > found[1][1] > found[2][1] > 0


def test_an_image_may_be_a_file_an_array_or_a_tensor(file, photograph) -> None:
    model, classes, preprocess = alexnet_mp.load_network(file)
    assert not model.training and len(classes) == 7
    with Image.open(photograph) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = preprocess(photograph)
    assert expected.shape == (1, 3, 67, 67) and expected.dtype == torch.float32
    for form in (str(photograph), image, pixels, tensor, [tensor], tensor[None]):
        assert torch.equal(preprocess(form), expected)
    assert torch.equal(preprocess([photograph, image]), torch.cat([expected, expected]))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(3, 8, 8), "an image of torch.float32; give gray levels from 0 to 255"),
        (np.zeros((8, 8), np.uint8), "not an image: ndarray"),
        (torch.zeros(1, 3, 8, 8, 8, dtype=torch.uint8), "not an image: Tensor"),
        ("none.jpg", "none.jpg: No such file"),
        ([], "no images"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(file, image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        alexnet_mp.load_network(file).preprocess(image)
    assert "\n" not in str(caught.value)
