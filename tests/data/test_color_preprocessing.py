"""Preprocessing of other programs' weights: color order, mean values, deviations, warped images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Augment
from alexnet_mp.data.decode import read_image

SIZE, SIDE = 9, 13
MEANS, DEVIATIONS = (122.67891, 116.66877, 104.00699), (58.395, 57.12, 57.375)


def augment(**fields: object) -> Augment:
    return Augment(DataConfig(stored_side=SIDE, crop_of=SIZE, **fields), SIZE)


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("deviations", [(1.0, 1.0, 1.0), DEVIATIONS])
def test_each_color_has_its_own_mean_and_deviation(
    order: str, deviations: tuple[float, float, float]
) -> None:
    made = augment(mean="values", mean_values=MEANS, deviations=deviations, color_order=order)
    expected = images()[:, :, 2:11, 2:11].double()
    for color in range(3):
        expected[:, color] = (expected[:, color] - MEANS[color]) / deviations[color]
    if order == "bgr":
        expected = expected[:, [2, 1, 0]]
    assert (made.test(images()).double() - expected).abs().max() < 1e-4
    assert torch.equal(made.ten_crop(images())[:, 4], made.test(images()))


def test_a_device_gives_the_same_bits_as_the_rows_of_the_processor() -> None:
    made = augment(mean="values", mean_values=MEANS, deviations=DEVIATIONS, color_order="bgr")
    values = made._scaled(made._centered(images(), made.center(4)))
    assert torch.equal(values, made.test(images()))


@pytest.mark.parametrize(
    "fields",
    [
        {"mean_values": (1.0, 2.0)},
        {"mean_values": (0.0, 0.0, float("nan"))},
        {"deviations": (1.0, 0.0, 1.0)},
        {"deviations": (1.0, -1.0, 1.0)},
    ],
)
def test_numbers_that_no_color_has_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"--(mean-values|deviations)"):
        augment(**fields)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_warped_image_keeps_its_edges_and_not_its_aspect(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((60, 200), np.uint8)
    pixels[:, 100:] = 240  # the right half, which a center square cuts in another place
    file = tmp_path / "wide.png"
    Image.fromarray(pixels).convert(mode).save(file)
    warped = read_image(file, 20, warp=True)
    assert warped.shape == (3, 20, 20)
    assert (warped[:, :, :9] == 0).all() and (warped[:, :, 11:] == 240).all()
    assert read_image(tmp_path / "wide.png", 100, warp=True).shape == (3, 100, 100)  # enlarged
