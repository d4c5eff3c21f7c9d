"""The compiled norm against torch's operations: every type, format and combination that the network uses, on any number of threads."""

import itertools
import threading

import pytest
import torch
from torch import Tensor

from alexnet_mp.ops import cpu_kernels
from alexnet_mp.ops.response_norm import LocalResponseNorm

NORM = LocalResponseNorm(
    alpha=0.3
)  # large: with the paper's 1e-4 the norm is hardly more than a division
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# Rounded once from float32 on both sides, which round float32 differently: half a unit of bfloat16's last place, 2^-8, now and then.
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
    x = (
        z * 1.0
        if not cpu_kernels.is_channels_last(z)
        else (z * 1.0).contiguous(memory_format=torch.channels_last)
    )  # the plain way overwrites it
    y = NORM(x, relu=relu, pool=pool)
    gradient = (
        random(*y.shape, seed=1).to(z.dtype).contiguous(memory_format=FORMATS[gradient_format])
    )
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
    if (
        dtype == torch.bfloat16 and pool
    ):  # two of a window may round to one value: the gradient then goes to either
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


@pytest.mark.parametrize(
    "row, column", [*itertools.product((3, 4), (3, 4))]
)  # every place in a window, between the windows that share it
@pytest.mark.parametrize("pool", [(3, 2), (2, 2)])
def test_what_is_not_a_number_stays_in_its_own_image_and_reaches_its_own_windows(
    pool, row, column
) -> None:
    z = random(3, 8, 9, 9).float().contiguous(memory_format=torch.channels_last)
    clean = NORM(z, relu=True, pool=pool)
    z[1, 3, row, column] = torch.nan
    y, size = NORM(z, relu=True, pool=pool), pool[0]
    windows = torch.zeros(8, *y.shape[2:], dtype=torch.bool)
    for i, j in itertools.product(*map(range, y.shape[2:])):
        windows[1:6, i, j] = (
            2 * i <= row < 2 * i + size and 2 * j <= column < 2 * j + size
        )  # the maps whose norm has map 3 in it
    assert windows.any()
    assert torch.equal(torch.isnan(y[1]), windows) and torch.equal(y[[0, 2]], clean[[0, 2]])


def test_relu_norm_and_pooling_keep_their_input_and_a_byte_for_each_maximum_and_nothing_else() -> (
    None
):
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
