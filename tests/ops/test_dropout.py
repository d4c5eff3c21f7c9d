"""Dropout as of 2012 and its masks."""

import numpy as np
import pytest
import reference
import torch

from alexnet_mp.ops import dropout
from alexnet_mp.ops.dropout import Dropout, dropout_keys, dropout_mask


def mask(
    seed: int = 0,
    step: int = 0,
    layer: str = "fc6",
    column: int = 0,
    rows: int = 64,
    units: int = 2048,
    rate: float = 0.5,
) -> np.ndarray:
    return dropout_mask(
        dropout_keys(seed, step, torch.arange(rows)), layer, column, units, rate
    ).numpy()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_the_share_that_it_is_told(rate: float) -> None:
    drawn = mask(rows=256, rate=rate)
    # the mean of 256 x 2048 draws has a standard deviation below 0.0007, that of one row of 2048
    # below 0.011; six of them
    assert abs(drawn.mean() - rate) < 0.0042
    assert np.abs(drawn.mean(1) - rate).max() < 0.066
    assert np.abs(drawn.mean(0) - rate).max() < 0.19  # a unit over 256 rows: 0.031


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": 2**32}, {"step": 1}, {"layer": "fc7"}, {"column": 1}], ids=str
)
def test_masks_of_another_seed_step_layer_or_column_are_unrelated(change: dict) -> None:
    a, b = mask(rows=256), mask(rows=256, **change)
    # correlation of 524,288 independent pairs: standard deviation 0.0014
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.0084
    by_row = ((a == b).mean(1) - 0.5) * 2  # and in no single row: 1/sqrt(2048) = 0.022
    assert np.abs(by_row).max() < 0.132


def test_masks_of_different_rows_and_of_different_units_are_unrelated() -> None:
    rows = np.corrcoef(mask(rows=200)) - np.eye(200)
    units = np.corrcoef(mask(rows=2048, units=200).T) - np.eye(200)
    # 19,900 pairs of 2048 draws each: standard deviation 0.022, the largest of so many lies near
    # 4.3 of them
    assert np.abs(rows).max() < 0.14
    assert np.abs(units).max() < 0.14


def test_a_rank_that_has_some_rows_draws_their_part_of_the_whole_mask() -> None:
    rows = torch.tensor([5, 6, 7, 63])
    part = dropout_mask(dropout_keys(0, 3, rows), "fc6", 1, 100, 0.5)
    np.testing.assert_array_equal(part.numpy(), mask(step=3, column=1, units=100)[rows])


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1])
@pytest.mark.parametrize(
    "seed, step, layer, column",
    [(0, 0, "fc6", 0), (7, 123456, "fc7", 1), (2**40 + 3, 1, "conv5", 3)],
)
def test_the_mask_is_the_hash_that_numpy_computes(
    seed: int, step: int, layer: str, column: int, rate: float
) -> None:
    rows = np.array([0, 1, 2, 127, 100_000, 2**31 + 5])
    ours = dropout_mask(dropout_keys(seed, step, torch.from_numpy(rows)), layer, column, 333, rate)
    np.testing.assert_array_equal(
        ours.numpy(), reference.dropped_units(seed, step, rows, layer, column, 333, rate)
    )


@pytest.mark.parametrize("kind, kept, tested", [("2012", 3.0, 2.25), ("inverted", 4.0, 3.0)])
def test_2012_scales_in_testing_and_inverted_in_training(
    kind: str, kept: float, tested: float
) -> None:
    layer, x = Dropout(0.25, "fc6", 0, kind), torch.full((4, 100), 3.0)
    keys = dropout_keys(0, 0, torch.arange(4))
    dropped = dropout_mask(keys, "fc6", 0, 100, 0.25)
    assert dropped.any()
    assert torch.equal(layer(x, keys), torch.where(dropped, 0.0, kept))
    assert torch.equal(layer.eval()(x), torch.full((4, 100), tested))


@pytest.mark.parametrize("kind, factor", [("2012", 1.0), ("inverted", 2.0)])
def test_no_gradient_passes_a_dropped_unit(kind: str, factor: float) -> None:
    x, keys = (
        torch.randn(4, 50, dtype=torch.float64).requires_grad_(),
        dropout_keys(0, 0, torch.arange(4)),
    )
    Dropout(0.5, "fc6", 0, kind)(x, keys).sum().backward()
    assert torch.equal(
        x.grad, torch.where(dropout_mask(keys, "fc6", 0, 50, 0.5), 0.0, factor).double()
    )


def test_the_remembered_part_of_a_mask_changes_no_bit_and_is_not_changed() -> None:
    first = mask(step=3)
    assert dropout._unit_hash.cache_info().currsize > 0
    np.testing.assert_array_equal(mask(step=3), first)
    dropout._unit_hash.cache_clear()
    np.testing.assert_array_equal(mask(step=3), first)


def test_a_mask_under_torch_func_leaves_nothing_behind_for_eager_code() -> None:
    keys = dropout_keys(0, 0, torch.arange(4))
    dropout._unit_hash.cache_clear()
    each = torch.func.vmap(lambda key: dropout_mask(key[None], "fc6", 0, 50, 0.5)[0])(keys)
    assert dropout._unit_hash.cache_info().currsize == 0
    assert torch.equal(each, dropout_mask(keys, "fc6", 0, 50, 0.5))


def test_training_without_keys_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="give one key per image, from `dropout_keys`"):
        Dropout(0.5, "fc6", 0)(torch.ones(2, 3))
    assert torch.equal(Dropout(0.5, "fc6", 0).eval()(torch.ones(2, 3)), torch.full((2, 3), 0.5))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_masks_of_the_cpu() -> None:
    keys = dropout_keys(7, 5, torch.arange(100))
    on_gpu = dropout_mask(dropout_keys(7, 5, torch.arange(100).cuda()), "fc6", 1, 2048, 0.5)
    assert torch.equal(on_gpu.cpu(), dropout_mask(keys, "fc6", 1, 2048, 0.5))
