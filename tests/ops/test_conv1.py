"""conv1 over blocks of 4x4 pixels, as reduced precision computes it, against conv1 as written."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp import AlexNet, preset
from alexnet_mp.ops.conv1 import Conv1, conv1_input, input_format, space_to_depth

# The same products, summed in another order in float32 and rounded once to bfloat16: now and then a
# unit of its last place, 2^-8.
TOLERANCE = {"rtol": 2**-7, "atol": 2**-7}


def conv1(kernels: int = 6) -> Conv1:
    torch.manual_seed(0)
    return Conv1(kernels).to(memory_format=torch.channels_last)


def plain(layer: Conv1, images: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    return F.conv2d(F.pad(images, padding), layer.weight, layer.bias, stride=4)


@pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels last"],
)
@pytest.mark.parametrize(
    "padding", [(0, 0, 0, 0), (0, 3, 0, 3), (2, 2, 2, 2), (1, 0, 3, 5)], ids=str
)
@pytest.mark.parametrize("size", [(11, 11), (32, 33), (34, 35), (36, 37), (67, 63)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv1_over_blocks_is_conv1(dtype, size, padding, memory_format) -> None:
    layer = conv1()
    images = torch.randn(3, 3, *size).to(dtype).contiguous(memory_format=memory_format)
    expected = plain(layer.double(), images.double(), padding)
    gradient = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (layer.weight, layer.bias), gradient)
    y = layer.float()(
        space_to_depth(images, padding, dtype).float()
    )  # float32: nothing is hidden by rounding
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y, (layer.weight, layer.bias), gradient.float())
    torch.testing.assert_close(
        [g.double() for g in found], list(expected_gradients), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 3, 0, 3)], ids=str)
def test_training_in_bfloat16_reads_blocks_and_computes_the_same(padding) -> None:
    layer, images = conv1(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv1_input(images, padding, layer.weight)
        found, expected = layer(x), plain(layer, images, padding)
    assert x.shape[1] == 48 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("why", ["testing", "frozen", "float32", "images learn"])
def test_otherwise_conv1_reads_pixels(why) -> None:
    layer, images = conv1(), torch.randn(2, 3, 64, 64, requires_grad=why == "images learn")
    layer.requires_grad_(why != "frozen")
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=why != "float32"),
        torch.set_grad_enabled(why != "testing"),
    ):
        x = conv1_input(images, (0, 3, 0, 3), layer.weight)
    assert x.shape == (2, 3, 67, 67) and x.dtype == (
        torch.float32 if why == "float32" else torch.bfloat16
    )


def test_the_columns_read_one_and_the_same_tensor() -> None:
    model = AlexNet(
        preset("demo").with_fields(kernels=(4, 6, 8, 6, 4), hidden=(24, 20), classes=5).model
    )
    seen = []
    for column in model.columns.values():
        column.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 67, 67))
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].shape[1] == 48


@pytest.mark.parametrize(
    "device, weights, expected",
    [
        ("cuda", torch.channels_last, torch.channels_last),  # cuDNN would convert in each column
        ("cuda", torch.contiguous_format, torch.contiguous_format),
        ("cpu", torch.channels_last, torch.preserve_format),
    ],
)
def test_a_gpu_reads_images_in_the_format_of_the_weights(device, weights, expected) -> None:
    weight = Conv1(6).weight.contiguous(memory_format=weights)
    assert input_format(device, torch.randn(2, 3, 64, 64), weight) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learns", [True, False], ids=["training", "testing"])
def test_on_a_gpu_reduced_precision_reads_blocks_and_computes_the_same(dtype, learns) -> None:
    layer, images = conv1().cuda(), torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype), torch.set_grad_enabled(learns):
        x = conv1_input(images, (0, 3, 0, 3), layer.weight)
        found, expected = layer(x), plain(layer, images, (0, 3, 0, 3))
    assert x.shape[1] == 48 and found.dtype == dtype
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (0, 3, 0, 3)], ids=str)
def test_on_a_gpu_the_images_become_channels_last_once(padding) -> None:
    layer = conv1().cuda()
    x = conv1_input(torch.randn(2, 3, 64, 64, device="cuda"), padding, layer.weight)
    assert x.is_contiguous(memory_format=torch.channels_last)
