"""Pooling."""

import pytest
import torch

from alexnet_mp.ops.pooling import adaptive_average_pool, overlapping_max_pool


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
