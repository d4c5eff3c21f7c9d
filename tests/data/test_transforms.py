"""Crops, flips, means and colors against slices and formulas written out here."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_mp.config import DataConfig
from alexnet_mp.config.presets import preset
from alexnet_mp.data import Augment, AugmentParams, Statistics
from alexnet_mp.data.transforms import batched_crop, color_axes

IMAGENET_SD = torch.tensor([19.7208, 37.0939, 121.7801], dtype=torch.float64)
IMAGENET_AXES = torch.tensor(
    [[0.41796, -0.81698, 0.39732], [-0.71258, -0.02354, 0.70119], [-0.56351, -0.57618, -0.59200]],
    dtype=torch.float64,
).T
GENERATOR = torch.Generator().manual_seed(0)


def random_images(count: int = 6, side: int = 20) -> Tensor:
    return torch.randint(256, (count, 3, side, side), generator=GENERATOR, dtype=torch.uint8)


def imagenet_statistics(side: int = 256) -> Statistics:
    """ImageNet's colors and a mean image that is different everywhere."""
    mean = torch.arange(3 * side * side).reshape(3, side, side) * (255 / (3 * side * side))
    return Statistics(mean.float(), IMAGENET_AXES @ torch.diag(IMAGENET_SD**2) @ IMAGENET_AXES.T)


def small(**fields: object) -> Augment:
    """Crops of 16 from 20."""
    return Augment(
        DataConfig(**{"stored_side": 20, "crop_of": 16, "mean": "none"} | fields),
        16,
        imagenet_statistics(20),
    )


def draw_of(
    top: list[int], left: list[int], flip: list[bool], color: Tensor | None = None
) -> AugmentParams:
    return AugmentParams(torch.tensor(top), torch.tensor(left), torch.tensor(flip), color)


def many_draws(augment: Augment, batches: int = 200, rows: int = 128) -> AugmentParams:
    draws = [augment.draw(1, 0, batch, rows) for batch in range(batches)]
    color = torch.cat([draw.color for draw in draws]) if draws[0].color is not None else None
    return AugmentParams(
        torch.cat([draw.top for draw in draws]),
        torch.cat([draw.left for draw in draws]),
        torch.cat([draw.flip for draw in draws]),
        color,
    )


# ---- crops and flips ----


def test_a_crop_is_the_slice_at_its_place_mirrored_where_drawn() -> None:
    images = random_images(4)
    top, left, flip = [0, 4, 2, 1], [4, 0, 3, 1], [False, True, True, False]
    crops = batched_crop(images, torch.tensor(top), torch.tensor(left), torch.tensor(flip), 16)
    for i in range(4):
        expected = images[i, :, top[i] : top[i] + 16, left[i] : left[i] + 16]
        assert torch.equal(crops[i], expected.flip(2) if flip[i] else expected)


@pytest.mark.parametrize("name, offsets", [("original", 33), ("paper", 32)])
def test_crops_reach_33_offsets_of_the_2012_source_or_the_papers_32(
    name: str, offsets: int
) -> None:
    draw = many_draws(
        Augment(preset(name).with_fields(images_per_crop=1).data, 224, imagenet_statistics())
    )
    for places in (draw.top, draw.left):
        assert sorted(places.unique().tolist()) == list(range(offsets))
        assert (places.bincount() / len(places) * offsets - 1).abs().max() < 0.25


def test_rows_and_columns_are_drawn_apart() -> None:
    draw = many_draws(small(), 50)
    assert (
        torch.corrcoef(torch.stack([draw.top, draw.left, draw.flip]).double()).triu(1).abs().max()
        < 0.05
    )


def test_half_of_the_images_are_flipped() -> None:
    assert many_draws(small()).flip.double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_flips_and_random_crops_can_be_turned_off() -> None:
    draw = many_draws(small(flip=False, random_crop=False), 5)
    assert not draw.flip.any() and set(draw.top.tolist()) == set(draw.left.tolist()) == {2}


def test_a_crop_as_large_as_the_image_has_one_place() -> None:
    for last_offset in (True, False):
        augment = Augment(
            DataConfig(stored_side=224, crop_of=224, last_offset=last_offset, mean="none"), 224
        )
        assert set(augment.draw(0, 0, 0, 50).top.tolist()) == {0}


def test_images_per_crop_share_crop_and_flip_but_not_color() -> None:
    draw = small(images_per_crop=32, color_noise=0.1).draw(0, 0, 0, 80)
    for first, last in ((0, 32), (32, 64), (64, 80)):
        assert all(
            len(set(values[first:last].tolist())) == 1
            for values in (draw.top, draw.left, draw.flip)
        )
    drawn = {
        draw.rows(k, k + 1).top.item() * 100 + draw.left[k].item() * 10 + draw.flip[k].item()
        for k in (0, 32, 64)
    }
    assert len(drawn) > 1
    assert len(draw.color.unique(dim=0)) == 80


def test_draws_depend_on_seed_epoch_and_batch_and_on_nothing_else() -> None:
    augment = small(color_noise=0.1)
    first = augment.draw(1, 2, 3, 64)
    augment.draw(9, 9, 9, 9)
    torch.manual_seed(5)
    again = augment.draw(1, 2, 3, 64)
    assert torch.equal(first.top, again.top) and torch.equal(first.color, again.color)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert not torch.equal(augment.draw(*other, 64).top, first.top)


def test_a_rank_takes_its_rows_of_the_draws_of_the_whole_batch() -> None:
    whole = small(color_noise=0.1).draw(0, 0, 0, 10)
    part = whole.rows(4, 7)
    assert torch.equal(part.left, whole.left[4:7]) and torch.equal(part.color, whole.color[4:7])


# ---- test views ----


@pytest.mark.parametrize("side, size, first", [(256, 224, 16), (256, 227, 14), (20, 16, 2)])
def test_the_test_view_is_the_center_crop(side: int, size: int, first: int) -> None:
    images = random_images(2, side)
    view = Augment(DataConfig(stored_side=side, crop_of=size, mean="none"), size).test(images)
    assert torch.equal(view, images[:, :, first : first + size, first : first + size].float())


def test_the_ten_views_are_corners_center_and_their_mirrors() -> None:
    images = random_images()
    views = small().ten_crop(images)
    assert views.shape == (6, 10, 3, 16, 16)
    for k, (top, left) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))):
        expected = images[:, :, top : top + 16, left : left + 16].float()
        assert torch.equal(views[:, k], expected) and torch.equal(views[:, k + 5], expected.flip(3))


@pytest.mark.parametrize("mean", ["image-center", "image-aligned", "half", "none"])
def test_the_fifth_of_the_ten_views_is_the_test_view_whatever_the_mean(mean: str) -> None:
    augment, images = small(mean=mean), random_images()
    assert torch.equal(augment.ten_crop(images)[:, 4], augment.test(images))


# ---- means ----


def test_the_2012_mean_is_the_mean_images_center_wherever_the_crop_lies() -> None:
    augment, images = small(mean="image-center"), random_images(2)
    mean = imagenet_statistics(20).mean_image
    values = augment.train(images, draw_of([0, 4], [1, 3], [False, True]))
    assert torch.equal(values[0], images[0, :, 0:16, 1:17].float() - mean[:, 2:18, 2:18])
    assert torch.equal(values[1], images[1, :, 4:20, 3:19].flip(2).float() - mean[:, 2:18, 2:18])


def test_the_aligned_mean_is_cropped_and_flipped_with_the_image() -> None:
    augment, images = small(mean="image-aligned"), random_images(2)
    mean = imagenet_statistics(20).mean_image
    values = augment.train(images, draw_of([0, 4], [1, 3], [False, True]))
    assert torch.equal(values[0], images[0, :, 0:16, 1:17].float() - mean[:, 0:16, 1:17])
    assert torch.equal(values[1], (images[1, :, 4:20, 3:19].float() - mean[:, 4:20, 3:19]).flip(2))


def test_the_aligned_mean_of_the_mean_image_itself_is_zero_in_all_views() -> None:
    images = torch.randint(256, (1, 3, 20, 20), dtype=torch.uint8, generator=GENERATOR)
    config = DataConfig(stored_side=20, crop_of=16, mean="image-aligned")
    augment = Augment(config, 16, Statistics(images[0].float(), torch.eye(3).double()))
    assert augment.ten_crop(images).abs().max() == 0


def test_half_maps_black_to_minus_one_and_white_to_one() -> None:
    images = (
        torch.tensor([0, 51, 255], dtype=torch.uint8)
        .reshape(3, 1, 1, 1)
        .expand(3, 3, 20, 20)
        .contiguous()
    )
    values = small(mean="half").test(images)[:, 0, 0, 0]
    torch.testing.assert_close(values, (torch.tensor([0, 51, 255]) / 255 - 0.5) / 0.5)


def test_a_mean_image_needs_statistics() -> None:
    with pytest.raises(ValueError, match="--mean image-center"):
        Augment(DataConfig(), 67)


# ---- color noise ----


@pytest.mark.parametrize(
    "unit, scale", [("deviation", IMAGENET_SD), ("eigenvalue", IMAGENET_SD**2 / 255**2 * 255)]
)
def test_color_noise_has_the_covariance_of_the_formula_in_gray_levels(
    unit: str, scale: Tensor
) -> None:
    noise = many_draws(small(color_noise=0.1, color_unit=unit), 400).color.double()
    expected = IMAGENET_AXES @ torch.diag((0.1 * scale) ** 2) @ IMAGENET_AXES.T
    assert noise.mean(0).abs().max() < 0.2
    torch.testing.assert_close(
        torch.cov(noise.T), expected, rtol=0.03, atol=0.03 * expected.max().item()
    )


def test_the_brightest_axis_moves_12_levels_in_2012_and_6_in_the_paper() -> None:
    largest = {
        unit: color_axes(DataConfig(color_noise=0.1, color_unit=unit), imagenet_statistics())
        .norm(dim=0)
        .max()
        .item()
        * 0.1
        for unit in ("deviation", "eigenvalue")
    }
    assert largest["deviation"] == pytest.approx(12.18, abs=0.01)
    assert largest["eigenvalue"] == pytest.approx(5.82, abs=0.01)


def test_each_image_gets_one_color_of_its_own_in_all_its_pixels() -> None:
    augment, images = small(color_noise=0.1), random_images(2)
    draw = augment.draw(0, 0, 0, 2)
    plain = augment.train(images, AugmentParams(draw.top, draw.left, draw.flip, None))
    added = augment.train(images, draw) - plain
    assert (added - draw.color[:, :, None, None]).abs().max() < 1e-4
    assert not torch.equal(draw.color[0], draw.color[1])


def test_the_2012_source_divides_the_noisy_image() -> None:
    augment, images = (
        small(color_noise=0.1, color_divides=True, mean="image-center"),
        random_images(2),
    )
    color = torch.tensor([[5.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    values = augment.train(images, draw_of([2, 2], [2, 2], [False, False], color))
    torch.testing.assert_close(values, (augment.test(images) + color[:, :, None, None]) / 1.1)


def test_noise_is_a_matter_of_training_and_can_be_ended_with_its_division() -> None:
    augment, images = small(color_noise=0.1, color_divides=True), random_images(2)
    center = images[:, :, 2:18, 2:18].float()
    assert torch.equal(augment.test(images), center)
    augment.noise_off = True
    assert torch.equal(
        augment.train(images, draw_of([2, 2], [2, 2], [False, False], torch.ones(2, 3))), center
    )


def test_noise_is_scaled_with_the_image_where_that_is_scaled() -> None:
    augment, images = small(color_noise=0.1, mean="half"), random_images(1)
    color = torch.tensor([[12.75, 0.0, -25.5]])
    added = augment.train(images, draw_of([2], [2], [False], color)) - augment.test(images)
    torch.testing.assert_close(
        added.mean((2, 3)), torch.tensor([[0.1, 0.0, -0.2]]), rtol=1e-4, atol=1e-5
    )


def test_gray_images_have_no_color_to_vary_but_brightness() -> None:
    statistics = Statistics(torch.zeros(3, 20, 20), torch.full((3, 3), 400.0).double())
    augment = Augment(
        DataConfig(stored_side=20, crop_of=16, mean="none", color_noise=0.1), 16, statistics
    )
    color = augment.draw(0, 0, 0, 100).color
    assert (color - color[:, :1]).abs().max() < 1e-3 and color.std() > 1


# ---- sizes ----


@pytest.mark.parametrize("size, side", [(67, 76), (227, 256), (99, 112)])
def test_images_of_another_side_are_resized_before_they_are_cropped(size: int, side: int) -> None:
    augment = Augment(DataConfig(mean="none"), size)
    assert augment.side == side
    flat = torch.full((2, 3, 28, 28), 9, dtype=torch.uint8)
    assert torch.equal(augment.test(flat), torch.full((2, 3, size, size), 9.0))


@pytest.mark.parametrize("mean", ["image-center", "image-aligned", "half", "none"])
@pytest.mark.parametrize("side", [20, 12])
def test_no_images_give_no_crops(mean: str, side: int) -> None:
    augment, none = (
        small(mean=mean, color_noise=0.1),
        torch.empty((0, 3, side, side), dtype=torch.uint8),
    )
    assert (
        augment.test(none).shape
        == augment.train(none, augment.draw(0, 0, 0, 4).rows(4, 4)).shape
        == (0, 3, 16, 16)
    )
    assert augment.ten_crop(none).shape == (0, 10, 3, 16, 16)


def test_what_comes_in_is_not_changed() -> None:
    augment, images = small(mean="image-aligned", color_noise=0.1), random_images()
    before = images.clone()
    augment.train(images, augment.draw(0, 0, 0, 6))
    augment.ten_crop(images)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mean", ["image-center", "image-aligned", "half", "none"])
def test_a_gpu_makes_the_same_batch(mean: str) -> None:
    images, config = (
        random_images(),
        DataConfig(stored_side=20, crop_of=16, mean=mean, color_noise=0.1),
    )
    on_cpu, on_gpu = (
        Augment(config, 16, imagenet_statistics(20), device) for device in ("cpu", "cuda")
    )
    draw = on_cpu.draw(0, 0, 0, 6)
    torch.testing.assert_close(on_gpu.train(images.cuda(), draw).cpu(), on_cpu.train(images, draw))
    np.testing.assert_allclose(
        on_gpu.ten_crop(images.cuda()).cpu(), on_cpu.ten_crop(images), rtol=1e-6
    )


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes that go from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.device.type != "cpu"
            and isinstance(args[0] if args else None, torch.Tensor)
            and args[0].device.type == "cpu"
        ):
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("mean", ["none", "image-aligned", "image-center"])
def test_a_device_is_sent_the_places_of_crops_not_an_index_for_each_row(mean: str) -> None:
    rows = 128
    augment = Augment(
        DataConfig(stored_side=20, crop_of=16, mean=mean, color_noise=0.1),
        16,
        imagenet_statistics(20),
        "meta",
    )
    images = torch.empty((rows, 3, 20, 20), dtype=torch.uint8, device="meta")
    params = augment.draw(0, 0, 0, rows)
    with CopiedBytes() as copied:
        assert augment.train(images, params).shape == (rows, 3, 16, 16)
    assert copied.bytes == rows * (3 * 8 + 3 * 4)  # top, left and flip, and three colors
    with CopiedBytes() as copied:
        assert len(list(augment.ten_views(images))) == 10
    assert copied.bytes == 0
