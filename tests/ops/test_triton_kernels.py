"""The Triton kernels against torch's operations: on a GPU, or with Triton's interpreter on the
CPU."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from alexnet_mp.ops import cuda_kernels
from alexnet_mp.ops import triton_kernels as kernels
from alexnet_mp.ops.dropout import Dropout, dropout_keys, dropout_mask
from alexnet_mp.ops.response_norm import sum_over_pixels

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (kernels.INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA device or TRITON_INTERPRET=1",
    ),
]
DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
K, ALPHA = 2.0, 0.3
# fp32: 1e-6 of the largest value. fp16: one rounding of the result. bf16: the interpreter cuts bits
# off instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
TYPES = list(TOLERANCE)
SHAPES = [(2, 5, 15, 13), (1, 48, 7, 7), (3, 1, 3, 3), (1, 130, 5, 4)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def reference(z: torch.Tensor, relu: bool, stride: int) -> torch.Tensor:
    """In float64, from the paper's formula."""
    x = F.relu(z) if relu else z
    padded = F.pad(x * x, (0, 0, 0, 0, 2, 2))
    total = sum(padded[:, i : i + x.shape[1]] for i in range(5))
    y = x * (K + ALPHA * total) ** -0.75
    return F.max_pool2d(y, 3, stride) if stride else y


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    scale = wanted.abs().max().clamp(min=1e-3).item() if wanted.numel() else 1.0
    difference = (found.double() - wanted).abs().max().item() if wanted.numel() else 0.0
    assert difference <= TOLERANCE[dtype] * scale, difference / scale


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("relu, stride", [(True, 2), (False, 2), (True, 0), (True, 3), (False, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_pooling_equal_the_formula_forward_and_backward(
    shape, relu, stride, dtype
) -> None:
    z = random(*shape, dtype=dtype)
    found, places = kernels.forward(z, K, ALPHA, relu, stride)
    exact = z.double().requires_grad_()
    wanted = reference(exact, relu, stride)
    assert_close(found, wanted.detach(), dtype)

    gradient = random(*found.shape, dtype=dtype, seed=1)
    dz = kernels.backward(z, gradient, places, K, ALPHA, relu, stride)
    assert_close(dz, torch.autograd.grad(wanted, exact, gradient.double())[0], dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 8), (1, 48, 5, 5), (1, 3, 2, 1)], ids=str)
def test_the_map_norm_equals_the_formula_forward_and_backward(shape, dtype) -> None:
    z = random(*shape, dtype=dtype)
    exact = z.double().requires_grad_()
    wanted = exact * (1.0 + ALPHA * sum_over_pixels(exact * exact, 5)) ** -0.75
    assert_close(kernels.map_norm_forward(z, 5, 1.0, ALPHA), wanted.detach(), dtype)

    gradient = random(*shape, dtype=dtype, seed=1)
    dz = kernels.map_norm_backward(z, gradient, 5, 1.0, ALPHA)
    assert_close(dz, torch.autograd.grad(wanted, exact, gradient.double())[0], dtype)


def test_the_first_of_equal_values_takes_the_gradient() -> None:
    z = torch.ones(1, 5, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    _, places = kernels.forward(z, K, ALPHA, True, 2)
    assert places is not None and places.eq(0).all()


def test_a_value_that_is_not_a_number_wins_and_stays() -> None:
    z = random(1, 5, 3, 3, dtype=torch.float32)
    z[0, 2, 1, 1] = float("nan")
    found, places = kernels.forward(z, K, ALPHA, True, 2)
    assert found.isnan().all() and places is not None and places.eq(4).all()


@pytest.mark.parametrize("images", [0, 1])
def test_an_empty_batch_and_a_single_image_are_taken(images: int) -> None:
    z = random(images, 6, 5, 5, dtype=torch.float32)
    found, places = kernels.forward(z, K, ALPHA, True, 2)
    assert found.shape == (images, 6, 2, 2)
    assert kernels.backward(z, found, places, K, ALPHA, True, 2).shape == z.shape
    assert kernels.map_norm_forward(z, 5, K, ALPHA).shape == z.shape


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mean", ["aligned", "center", "none"])
@pytest.mark.parametrize("color", [True, False])
def test_the_crop_equals_slices_of_each_image(mean: str, color: bool, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    side, size, images = 13, 9, 3
    pixels = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    places = torch.tensor([[0, 4, 2], [3, 0, 1], [0, 1, 1]], dtype=torch.int32)
    mean_image = torch.rand(3, side, side, generator=generator) * 255
    center = mean_image[:, 2 : 2 + size, 2 : 2 + size].contiguous()
    noise = torch.randn(images, 3, generator=generator) * 9 if color else None
    given = {"aligned": mean_image, "center": center, "none": None}[mean]
    on_device = [None if t is None else t.to(DEVICE) for t in (pixels, places, given, noise)]
    found = kernels.crop(
        *on_device[:2],
        size,
        dtype,
        on_device[2],
        mean == "aligned",
        127.5 * (mean == "none"),
        on_device[3],
        1.1,
        127.5,
    )
    wanted = []
    for image, (top, left, flip) in zip(pixels.double(), places.T.tolist(), strict=True):
        values = image[:, top : top + size, left : left + size]
        if mean == "aligned":
            values = values - mean_image.double()[:, top : top + size, left : left + size]
        values = values.flip(2) if flip else values
        values = values - center.double() if mean == "center" else values
        wanted.append(values - 127.5 * (mean == "none"))
    result = torch.stack(wanted)
    if noise is not None:
        result = (result + noise.double()[:, :, None, None]) / 1.1
    assert_close(found, (result / 127.5).to(DEVICE), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind, keep", [("2012", 1.0), ("inverted", 0.7)])
@pytest.mark.parametrize("images, units", [(3, 50), (1, 1), (2, 1500), (0, 4)])
def test_dropout_by_the_kernel_drops_what_the_mask_drops(
    images, units, kind, keep, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "usable", lambda device: True)
    calls: list[str] = []
    drop = kernels.drop
    monkeypatch.setattr(kernels, "drop", lambda *args: calls.append("drop") or drop(*args))
    keys = dropout_keys(7, 5, torch.arange(images, device=DEVICE))
    x = torch.randn(images, units, device=DEVICE).to(dtype).requires_grad_()
    y = Dropout(0.3, "fc6", 1, kind)(x, keys)
    gradient = torch.randn(images, units, device=DEVICE).to(dtype)
    kept = ~dropout_mask(keys, "fc6", 1, units, 0.3)
    # One division, as exact as TOLERANCE says; without it and for dropped units: no bit differs.
    tolerance = {"rtol": TOLERANCE[dtype] if kind == "inverted" else 0.0, "atol": 0.0}
    torch.testing.assert_close(y, x.detach() * kept.to(dtype) / keep, **tolerance)
    found = torch.autograd.grad(y, x, gradient)[0]
    torch.testing.assert_close(found, gradient * kept.to(dtype) / keep, **tolerance)
    assert calls == ["drop", "drop"]
