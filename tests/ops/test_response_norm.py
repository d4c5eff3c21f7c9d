"""The layers by themselves: response normalization, dropout as of 2012, overlapping pooling."""

import statistics
import time

import numpy as np
import pytest
import reference
import torch
from torch import nn

from alexnet_mp.ops import cpu_kernels, response_norm
from alexnet_mp.ops.dropout import Dropout, dropout_keys, dropout_mask
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm, overlapping_max_pool

# Wherever a formula is checked, alpha is large: with the paper's 1e-4 the norm is hardly more than a division by 2^0.75.
STRONG = {"k": 2.0, "alpha": 0.3}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_and_gradient(
    norm: nn.Module, x: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("maps", [1, 2, 3, 5, 7, 12])
def test_the_norm_is_the_printed_formula(maps: int, size: int, beta: float) -> None:
    x = random(2, maps, 3, 4)
    y = LocalResponseNorm(size, beta=beta, **STRONG)(x)
    # float64 rounds at 1e-16; a handful of operations apart
    np.testing.assert_allclose(
        y.numpy(), reference.response_norm(x.numpy(), size, beta=beta, **STRONG), rtol=1e-13
    )


def test_the_norm_has_the_papers_constants_by_default_and_does_not_divide_alpha() -> None:
    x = 100 * random(2, 8, 3, 3)  # so large that alpha matters
    np.testing.assert_allclose(
        LocalResponseNorm()(x).numpy(),
        reference.response_norm(x.numpy(), 5, 2, 1e-4, 0.75),
        rtol=1e-13,
    )


def test_torchs_norm_is_the_same_with_alpha_times_five() -> None:
    x, gradient = 100 * random(2, 8, 3, 3), random(2, 8, 3, 3, seed=1)
    torchs = norm_and_gradient(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0), x, gradient)
    torch.testing.assert_close(
        norm_and_gradient(LocalResponseNorm(), x, gradient), torchs, rtol=1e-12, atol=1e-14
    )
    assert not torch.allclose(
        LocalResponseNorm()(x), nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)(x), rtol=1e-3
    )


@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("maps", [1, 3, 5, 7])
def test_the_norms_gradient_is_that_of_its_values(maps: int, size: int, beta: float) -> None:
    x = random(2, maps, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(size, beta=beta, **STRONG), x)


@pytest.mark.parametrize("size", [3, 5])
def test_the_norm_within_maps_sums_over_pixels_and_its_gradient_is_that_of_its_values(
    size: int,
) -> None:
    x = random(2, 3, 4, 6).requires_grad_()
    norm = MapNorm(size, alpha=0.3)
    np.testing.assert_allclose(
        norm(x).detach().numpy(),
        reference.map_norm(x.detach().numpy(), size, alpha=0.3),
        rtol=1e-13,
    )
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize(
    "norm", [LocalResponseNorm(**STRONG), MapNorm(alpha=0.3)], ids=["across maps", "within maps"]
)
@pytest.mark.parametrize(
    "layout", ["channels last", "sliced maps", "sliced pixels", "transposed", "expanded"]
)
def test_the_norms_result_does_not_depend_on_how_the_input_lies_in_memory(
    layout: str, norm: nn.Module
) -> None:
    x = {
        "channels last": lambda: random(3, 6, 4, 4).contiguous(memory_format=torch.channels_last),
        "sliced maps": lambda: random(3, 12, 4, 4)[:, 3:9],
        "sliced pixels": lambda: random(3, 6, 8, 8)[:, :, ::2, 1::2],
        "transposed": lambda: random(4, 4, 6, 3).permute(3, 2, 0, 1),
        "expanded": lambda: random(1, 6, 4, 4).expand(3, 6, 4, 4),
    }[layout]()
    gradient = random(4, 4, 3, 6, seed=1).permute(2, 3, 1, 0)
    assert not x.is_contiguous()
    # the same numbers in the same order; a window sum over other strides may add in another order, one rounding apart
    contiguous = norm_and_gradient(norm, x.contiguous(), gradient.contiguous())
    torch.testing.assert_close(
        norm_and_gradient(norm, x, gradient), contiguous, rtol=1e-14, atol=1e-15
    )


def test_the_norm_of_300_in_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 5, 2, 2), 300.0, dtype=torch.float16)  # 300^2 is beyond fp16's 65504
    y, gradient = norm_and_gradient(LocalResponseNorm(), x, torch.ones_like(x))
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()
    assert (y > 1).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("path", ["operations", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "norm", [LocalResponseNorm(**STRONG), MapNorm(alpha=0.3)], ids=["across maps", "within maps"]
)
def test_half_precision_norm_is_the_float32_norm_rounded_once(
    norm: nn.Module, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gradient = random(2, 8, 5, 5).to(dtype), random(2, 8, 5, 5, seed=1).to(dtype)
    # Operations and kernel round differently, and fp16 has operations only: both sides take one path.
    if path == "operations":
        monkeypatch.setattr(cpu_kernels, "supports", lambda *_: False)
    elif isinstance(norm, MapNorm) or not all(
        cpu_kernels.supports(y, norm.size, norm.beta) for y in (x, x.float())
    ):
        pytest.skip("this norm has no compiled kernel for the type here")
    narrow, wide = (
        norm_and_gradient(norm, x, gradient),
        norm_and_gradient(norm, x.float(), gradient.float()),
    )
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 10**9])
def test_working_in_chunks_of_images_changes_nothing(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gradient = (
        random(7, 6, 5, 5, dtype=torch.float32),
        random(7, 6, 5, 5, seed=1, dtype=torch.float32),
    )
    before = norm_and_gradient(LocalResponseNorm(**STRONG), x, gradient)
    monkeypatch.setattr(response_norm, "CHUNK_BYTES", chunk_bytes)
    after = norm_and_gradient(LocalResponseNorm(**STRONG), x, gradient)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_norm_of_no_images_is_none() -> None:
    y, gradient = norm_and_gradient(
        LocalResponseNorm(), torch.empty(0, 6, 3, 3), torch.empty(0, 6, 3, 3)
    )
    assert y.shape == gradient.shape == (0, 6, 3, 3)


@pytest.fixture
def _one_thread():
    """Under other load on the machine two threads wait for each other at every small operation, and times mean little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_the_norm_is_at_least_twice_as_fast_as_torchs() -> None:
    x = random(32, 128, 27, 27, dtype=torch.float32)  # what arrives in layer 2
    gradient = torch.ones_like(x)
    norms = {
        "ours": LocalResponseNorm(),
        "torch": nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in norms}
    for turn in range(6):  # A B A B, so that other load on the machine meets both
        for name, norm in norms.items():
            start = time.perf_counter()
            norm_and_gradient(norm, x, gradient)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    ours, torchs = (statistics.median(times) for times in seconds.values())
    assert torchs > 2 * ours, (
        f"{torchs:.3f} s against {ours:.3f} s"
    )  # measured 4 to 5 times: half of that is left for noise


def test_an_even_window_is_refused() -> None:
    with pytest.raises(ValueError, match="size 4: must be odd"):
        LocalResponseNorm(4)


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
    # the mean of 256 x 2048 draws has a standard deviation below 0.0007, that of one row (2048) below 0.011; six of them
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
    # 19,900 pairs of 2048 draws each: standard deviation 0.022, the largest of so many lies near 4.3 of them
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
def test_dropout_of_2012_scales_in_testing_and_inverted_dropout_in_training(
    kind: str, kept: float, tested: float
) -> None:
    dropout, x, keys = (
        Dropout(0.25, "fc6", 0, kind),
        torch.full((4, 100), 3.0),
        dropout_keys(0, 0, torch.arange(4)),
    )
    dropped = dropout_mask(keys, "fc6", 0, 100, 0.25)
    assert dropped.any()
    assert torch.equal(dropout(x, keys), torch.where(dropped, 0.0, kept))
    assert torch.equal(dropout.eval()(x), torch.full((4, 100), tested))


@pytest.mark.parametrize("kind, factor", [("2012", 1.0), ("inverted", 2.0)])
def test_no_gradient_passes_a_dropped_unit(kind: str, factor: float) -> None:
    x, keys = random(4, 50).requires_grad_(), dropout_keys(0, 0, torch.arange(4))
    Dropout(0.5, "fc6", 0, kind)(x, keys).sum().backward()
    assert torch.equal(
        x.grad, torch.where(dropout_mask(keys, "fc6", 0, 50, 0.5), 0.0, factor).double()
    )


def test_overlapping_pooling_takes_the_largest_of_three_by_three_every_two_pixels() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    x[0, 0, 2, 2] = 99  # the middle belongs to all four windows
    assert overlapping_max_pool(x).tolist() == [[[[99, 99], [99, 99]]]]
    x[0, 0, 2, 2] = -1
    assert overlapping_max_pool(x).tolist() == [[[[11, 14], [22, 24]]]]


@pytest.mark.parametrize("before, after", [(55, 27), (27, 13), (13, 6), (3, 1)])
def test_overlapping_pooling_halves_the_maps_as_in_the_paper(before: int, after: int) -> None:
    assert overlapping_max_pool(torch.zeros(2, 3, before, before)).shape == (2, 3, after, after)
