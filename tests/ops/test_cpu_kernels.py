"""The compiled norm against torch's operations, for all types, formats and combinations in use.

The two round float32 differently, and so are compared within roundings; exact comparisons compare
the kernel with itself, or numbers that no operation rounds.
"""

import ctypes
import itertools
import threading

import pytest
import torch
from torch import Tensor

from alexnet_mp.ops import cpu_kernels
from alexnet_mp.ops.response_norm import LocalResponseNorm

# Large: with the paper's alpha of 1e-4 the norm is hardly more than a division.
NORM = LocalResponseNorm(alpha=0.3)
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# bfloat16 is rounded once from float32 on both sides: now and then a unit of its last place, 2^-8.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7}

pytestmark = pytest.mark.skipif(
    bool(cpu_kernels.unavailable_reason()), reason=cpu_kernels.unavailable_reason() or "compiled"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "supports", lambda *_: False)


def outcome(
    z: Tensor, pool: tuple[int, int] | None, relu: bool, gradient_format: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """The result and the gradient for z of one pass."""
    z = z.detach().requires_grad_()
    y = NORM(z, relu=relu, pool=pool)
    gradient = random(*y.shape, seed=1).to(z.dtype)
    gradient = gradient.contiguous(memory_format=FORMATS[gradient_format])
    return y.detach(), torch.autograd.grad(y, z, gradient)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format, gradient_format", [*itertools.product(FORMATS, FORMATS)])
@pytest.mark.parametrize(
    "pool, relu",
    [(None, False), ((3, 2), False), ((3, 2), True), ((2, 2), True), ((3, 3), True)],
)
@pytest.mark.parametrize(
    "shape", [(5, 6, 15, 15), (2, 48, 8, 7), (3, 130, 4, 5), (1, 1, 5, 5), (2, 3, 3, 3)], ids=str
)
def test_the_compiled_norm_is_what_torchs_operations_compute(
    shape, pool, relu, memory_format, gradient_format, dtype, monkeypatch
) -> None:
    z = random(*shape).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    assert cpu_kernels.supports(z, 5, 0.75)
    compiled = outcome(z, pool, relu, gradient_format)
    by_operations(monkeypatch)
    plain = outcome(z, pool, relu, gradient_format)
    if dtype == torch.bfloat16 and pool:
        # two of a window may round to one value: the gradient then goes to either
        compiled, plain = compiled[:1], plain[:1]
    torch.testing.assert_close(compiled, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("pool, relu", [(None, False), ((3, 2), True)])
def test_the_compiled_gradient_is_that_of_the_values(pool, relu) -> None:
    z = (random(2, 6, 5, 7) + 0.05).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: NORM(x, relu=relu, pool=pool), z)


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_neither_threads_nor_the_rest_of_the_batch_change_an_image(memory_format) -> None:
    z = random(7, 48, 9, 9).float().contiguous(memory_format=memory_format)
    torch.set_num_threads(1)
    whole = outcome(z, (3, 2), True)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(whole, outcome(z, (3, 2), True), strict=True))
    alone = NORM(z[4:5].contiguous(memory_format=memory_format), relu=True, pool=(3, 2))
    assert torch.equal(alone, whole[0][4:5])


@pytest.mark.usefixtures("_threads")
def test_two_threads_of_the_program_may_use_it_at_once() -> None:
    torch.set_num_threads(2)
    inputs = [
        random(6, 48, 15, 15, seed=seed).float().contiguous(memory_format=torch.channels_last)
        for seed in range(4)
    ]
    expected = [outcome(z, (3, 2), True) for z in inputs]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: outcome(inputs[i], (3, 2), True)}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(a, b) for i in range(4) for a, b in zip(expected[i], found[i], strict=True)
    )


# every place in a window, between the windows that share it
@pytest.mark.parametrize("row, column", [*itertools.product((3, 4), (3, 4))])
@pytest.mark.parametrize("pool", [(3, 2), (2, 2)])
def test_not_a_number_reaches_the_windows_of_its_own_image_only(pool, row, column) -> None:
    z = random(3, 8, 9, 9).float().contiguous(memory_format=torch.channels_last)
    clean = NORM(z, relu=True, pool=pool)
    z[1, 3, row, column] = torch.nan
    y, size = NORM(z, relu=True, pool=pool), pool[0]
    windows = torch.zeros(8, *y.shape[2:], dtype=torch.bool)
    for i, j in itertools.product(*map(range, y.shape[2:])):
        # the maps whose norm has map 3 in it
        windows[1:6, i, j] = 2 * i <= row < 2 * i + size and 2 * j <= column < 2 * j + size
    assert windows.any()
    assert torch.equal(torch.isnan(y[1]), windows) and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_only_the_input_and_a_byte_for_each_maximum_are_kept() -> None:
    z = random(2, 6, 15, 15).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = NORM(z, relu=True, pool=(3, 2))
    kept = [(tuple(x.shape), x.dtype) for x in y.grad_fn.saved_tensors]
    assert kept == [((2, 6, 15, 15), torch.float32), ((2, 6, 7, 7), torch.uint8)]


def test_other_sizes_exponents_and_types_are_left_to_torchs_operations() -> None:
    z = random(2, 8, 5, 5)
    assert (
        not cpu_kernels.supports(z, 3, 0.75)
        and not cpu_kernels.supports(z, 5, 0.5)
        and not cpu_kernels.supports(z.half(), 5, 0.75)
        and not cpu_kernels.supports(z[:0], 5, 0.75)
    )
    assert torch.isfinite(LocalResponseNorm(3, alpha=0.3)(z, relu=True, pool=(3, 2))).all()


# --- numbers that no operation rounds


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_of_equal_values_in_a_window_the_first_gets_the_gradient(dtype) -> None:
    z = torch.ones(2, 6, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    z.requires_grad_()
    y = NORM(z, relu=True, pool=(3, 2))
    (places,) = (x for x in y.grad_fn.saved_tensors if x.dtype == torch.uint8)
    assert not places.any()
    gradient = torch.autograd.grad(y, z, torch.ones_like(y))[0]
    beyond = torch.ones(7, 9, dtype=torch.bool)
    beyond[0:5:2, 0:7:2] = False  # the upper left corners of the windows
    assert (gradient[:, :, beyond] == 0).all() and (gradient[:, :, ~beyond] != 0).all()


def test_bfloat16_ties_are_rounded_to_even() -> None:
    # One map, x = 1, k = 1 and alpha = 15: d = 16, and the gradient is
    # g / 8 - 2 * 15 * 0.75 * g / 128 = -13/256 g, exact in float32. 21 * 13 = 273 lies half-way
    # between 272 and 274, 23 * 13 = 299 between 298 and 300: even are 272 and 300.
    norm, x = LocalResponseNorm(k=1.0, alpha=15.0), torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    assert cpu_kernels.supports(x, norm.size, norm.beta)
    x.requires_grad_()
    g = torch.tensor([21.0, 23.0, -21.0, -23.0], dtype=torch.bfloat16).view(1, 1, 2, 2)
    found = torch.autograd.grad(norm(x), x, g)[0].flatten()
    assert found.tolist() == [-272 / 256, -300 / 256, 272 / 256, 300 / 256]


# --- what the library and this module must agree on


@pytest.mark.parametrize("structure", [cpu_kernels.NormSettings, cpu_kernels.CropSettings])
def test_a_structure_of_another_size_than_in_the_library_is_refused(
    structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = [*structure._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr(cpu_kernels, structure.__name__, Longer)
    cpu_kernels._function.cache_clear()
    with pytest.raises(RuntimeError, match=r"Longer: .* both must have the same fields"):
        NORM(random(1, 5, 3, 3))
    monkeypatch.undo()
    assert torch.isfinite(NORM(random(1, 5, 3, 3))).all()


# --- gradients of gradients


@pytest.mark.parametrize("pool, relu", [(None, False), ((3, 2), True)])
def test_the_gradient_of_the_gradient_is_that_of_its_values(pool, relu) -> None:
    z = (random(2, 6, 5, 7) + 0.05).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: NORM(x, relu=relu, pool=pool), z, fast_mode=True)
