"""The compiled crop and sums against NumPy's operations, to the bit."""

import itertools

import numpy as np
import pytest
import torch

from alexnet_mp.config import DataConfig
from alexnet_mp.data.statistics import Statistics, Sums, sums_of
from alexnet_mp.data.transforms import Augment
from alexnet_mp.ops import cpu_kernels

pytestmark = pytest.mark.skipif(
    bool(cpu_kernels.unavailable_reason()), reason=cpu_kernels.unavailable_reason() or "compiled"
)

SIDE, SIZE = 37, 31
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 3, SIDE, SIDE), np.uint8)
FOUND = Statistics(
    torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 255,
    torch.eye(3).double() * 400 + 100,
)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "unavailable_reason", lambda: "no compiler")


@pytest.mark.parametrize(
    "mean, noise, divides, layout",
    list(
        itertools.product(
            ("image-aligned", "image-center", "half", "none"),
            (0.0, 0.1),
            (False, True),
            ("channels first", "channels last"),
        )
    ),
)
def test_the_compiled_crop_is_numpys_to_the_bit(mean, noise, divides, layout, monkeypatch) -> None:
    config = DataConfig(
        stored_side=SIDE, crop_of=SIZE, mean=mean, color_noise=noise, color_divides=divides
    )
    augment, draw = (
        Augment(config, SIZE, FOUND),
        Augment(config, SIZE, FOUND).draw(0, 1, 2, len(IMAGES)),
    )
    assert 0 < draw.flip.sum() < len(IMAGES)
    images = (
        IMAGES
        if layout == "channels first"
        else np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    )
    outcomes = []
    for _ in ("compiled", "NumPy"):
        outcomes.append(
            augment.on_cpu(
                images.__getitem__, draw, torch.full((len(images), 3, SIZE, SIZE), torch.nan)
            )
        )
        without_compiler(monkeypatch)
    assert torch.equal(*outcomes)


def test_a_crop_that_is_not_inside_the_image_is_refused_not_read() -> None:
    out = np.empty((3, SIZE, SIZE), np.float32)
    for top, left in ((0, SIDE - SIZE + 1), (SIDE - SIZE + 1, 0), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=rf"31 pixels at \({top}, {left}\)"):
            cpu_kernels.crop(IMAGES[0], top, left, False, None, 0.0, None, 1.0, 1.0, out)


@pytest.mark.parametrize("side", [1, 37, 256])  # less than a block, one that is not whole, several
def test_the_compiled_sums_are_numpys_to_the_bit(side, monkeypatch) -> None:
    images = np.random.default_rng(side).integers(0, 256, (3, 3, side, side), np.uint8)
    images[0] = 255  # the largest sums of a block
    compiled = sums_of(images)
    without_compiler(monkeypatch)
    assert compiled.to_bytes() == sums_of(images).to_bytes()


def test_an_image_in_another_layout_counts_the_same() -> None:
    other, plain = Sums(), Sums()
    other.add(IMAGES[0].transpose(0, 2, 1))
    plain.add(np.ascontiguousarray(IMAGES[0].transpose(0, 2, 1)))
    assert other.to_bytes() == plain.to_bytes()
