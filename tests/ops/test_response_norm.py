"""Response normalization by itself, by each of its paths."""

import time

import numpy as np
import pytest
import reference
import torch
from torch import nn

from alexnet_mp.ops import cpu_kernels, response_norm
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm

# Wherever a formula is checked, alpha is large: with the paper's 1e-4 the norm is hardly more than
# a division by 2^0.75.
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


def test_the_papers_constants_are_the_default_and_alpha_is_not_divided() -> None:
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
def test_the_norm_within_maps_sums_over_pixels_and_has_its_gradient(
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
def test_the_norm_is_the_same_however_the_input_lies_in_memory(
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
    # the same numbers; a window sum over other strides may add in another order, a rounding apart
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
    # Operations and kernel round differently, and fp16 has operations only: both take one path.
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
    monkeypatch.setattr(cpu_kernels, "supports", lambda *_: False)  # the kernels have no chunks
    x, gradient = random(7, 6, 5, 5), random(7, 6, 5, 5, seed=1)
    before = norm_and_gradient(LocalResponseNorm(**STRONG), x, gradient)
    calls, plain = [], response_norm._norm
    monkeypatch.setattr(response_norm, "_norm", lambda *a: calls.append(len(a[0])) or plain(*a))
    monkeypatch.setattr(response_norm, "CHUNK_BYTES", chunk_bytes)
    after = norm_and_gradient(LocalResponseNorm(**STRONG), x, gradient)
    assert calls == {1: [1] * 7, 3000: [5, 2], 10**9: [7]}[chunk_bytes]
    # float64: a vector's value and one behind the last vector may differ by a contracted product
    torch.testing.assert_close(after, before, rtol=1e-14, atol=1e-15)


def test_the_norm_of_no_images_is_none() -> None:
    y, gradient = norm_and_gradient(
        LocalResponseNorm(), torch.empty(0, 6, 3, 3), torch.empty(0, 6, 3, 3)
    )
    assert y.shape == gradient.shape == (0, 6, 3, 3)


@pytest.fixture
def _one_thread():
    """Two threads wait for each other at every small operation, and so would times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_the_compiled_norm_is_at_least_twice_as_fast_as_torchs() -> None:
    x = random(32, 128, 27, 27, dtype=torch.float32)  # what arrives in layer 2
    ours = LocalResponseNorm()
    if not cpu_kernels.supports(x, ours.size, ours.beta):
        pytest.skip(cpu_kernels.unavailable_reason())
    norms = {"ours": ours, "torch": nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)}
    gradient = torch.ones_like(x)
    seconds: dict[str, list[float]] = {name: [] for name in norms}
    for turn in range(6):  # A B A B, the first to warm up
        for name, norm in norms.items():
            start = time.process_time()  # this process alone: other load does not count
            norm_and_gradient(norm, x, gradient)
            if turn:
                seconds[name].append(time.process_time() - start)
    ours_least, torchs_least = (min(times) for times in seconds.values())
    # measured 4 to 5 times: half of that is left for noise
    assert torchs_least > 2 * ours_least, f"{torchs_least:.3f} s against {ours_least:.3f} s"


def test_an_even_window_is_refused() -> None:
    with pytest.raises(ValueError, match="size 4: must be odd"):
        LocalResponseNorm(4)
