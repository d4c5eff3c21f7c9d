"""Pooling."""

import pytest
import torch

from alexnet_mp.ops.pooling import adaptive_average_pool, overlapping_max_pool
from alexnet_mp.ops.response_norm import LocalResponseNorm


def test_pooling_takes_the_largest_of_3x3_every_2_pixels() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    x[0, 0, 2, 2] = 99  # the middle belongs to all four windows
    assert overlapping_max_pool(x).tolist() == [[[[99, 99], [99, 99]]]]
    x[0, 0, 2, 2] = -1
    assert overlapping_max_pool(x).tolist() == [[[[11, 14], [22, 24]]]]


@pytest.mark.parametrize("before, after", [(55, 27), (27, 13), (13, 6), (3, 1)])
def test_overlapping_pooling_halves_the_maps_as_in_the_paper(before: int, after: int) -> None:
    assert overlapping_max_pool(torch.zeros(2, 3, before, before)).shape == (2, 3, after, after)


def test_an_adaptive_pool_leaves_maps_of_its_size_as_they_are() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert adaptive_average_pool(x, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert adaptive_average_pool(x, 4) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_values_the_first_gets_the_gradient(dtype: torch.dtype) -> None:
    x = torch.ones(1, 8, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    LocalResponseNorm(k=1.0, alpha=0.0)(x, pool=(3, 2)).sum().backward()
    expected = torch.zeros(8, 3, 3)
    expected[:, 0, 0] = 1
    assert torch.equal(x.grad[0].float(), expected)


@pytest.mark.parametrize("first, total", [(1.0, 1.0), (1.0078125, 1.015625)])
def test_a_gradient_between_two_bf16_numbers_goes_to_the_even_one(first, total) -> None:
    x = torch.ones(1, 8, 3, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[:, :, 1, 2] = 4  # the largest of both windows
    x.requires_grad_()
    gradient = torch.tensor([first, 2.0**-8]).bfloat16().expand(1, 8, 1, 2)
    LocalResponseNorm(k=1.0, alpha=0.0)(x, pool=(3, 2)).backward(gradient)
    assert x.grad[0, :, 1, 2].tolist() == [total] * 8  # the sum is just between two numbers
