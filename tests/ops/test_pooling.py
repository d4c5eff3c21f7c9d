"""Pooling."""

import pytest
import torch

from alexnet_mp.ops.pooling import overlapping_max_pool


def test_overlapping_pooling_takes_the_largest_of_three_by_three_every_two_pixels() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    x[0, 0, 2, 2] = 99  # the middle belongs to all four windows
    assert overlapping_max_pool(x).tolist() == [[[[99, 99], [99, 99]]]]
    x[0, 0, 2, 2] = -1
    assert overlapping_max_pool(x).tolist() == [[[[11, 14], [22, 24]]]]


@pytest.mark.parametrize("before, after", [(55, 27), (27, 13), (13, 6), (3, 1)])
def test_overlapping_pooling_halves_the_maps_as_in_the_paper(before: int, after: int) -> None:
    assert overlapping_max_pool(torch.zeros(2, 3, before, before)).shape == (2, 3, after, after)
