"""The compiled norm against torch's operations: every type, format and combination that the network uses, on any number of threads."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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
        if not cpu_kernels.is_last(z)
        else (z * 1.0).contiguous(memory_format=torch.channels_last)
    )  # the plain way overwrites it
    y = NORM.relu_lrn_pool(x, *pool, relu) if pool else NORM(x)
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
    assert torch.autograd.gradcheck(
        lambda x: NORM.relu_lrn_pool(x, *pool, relu) if pool else NORM(x), z
    )


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
    alone = NORM.relu_lrn_pool(z[4:5].contiguous(memory_format=memory_format), 3, 2, True)
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
    clean = NORM.relu_lrn_pool(z, *pool, True)
    z[1, 3, row, column] = torch.nan
    y, size = NORM.relu_lrn_pool(z, *pool, True), pool[0]
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
    y = NORM.relu_lrn_pool(z, 3, 2, True)
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
    assert torch.isfinite(LocalResponseNorm(3, alpha=0.3).relu_lrn_pool(z, 3, 2, True)).all()


@pytest.fixture
def _no_library(monkeypatch, tmp_path):
    """As in a fresh installation elsewhere: nothing compiled yet."""
    (tmp_path / "package" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(
        cpu_kernels,
        "SOURCES",
        tuple(
            Path(shutil.copy(source, tmp_path / "package" / "csrc"))
            for source in cpu_kernels.SOURCES
        ),
    )
    cpu_kernels._library.cache_clear()
    yield
    cpu_kernels._library.cache_clear()


@pytest.mark.usefixtures("_no_library")
def test_without_a_compiler_it_says_so_and_the_network_still_computes(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    assert cpu_kernels.unavailable_reason() == (
        "response normalization is not compiled and takes several times as long: "
        "no C++ compiler (c++, g++, clang++, or what CXX names)"
    )
    z = random(2, 6, 9, 9).float()
    torch.testing.assert_close(
        NORM.relu_lrn_pool(z.clone(), 3, 2, True), F.max_pool2d(NORM(F.relu(z)), 3, 2)
    )


@pytest.mark.usefixtures("_no_library")
def test_a_compiler_that_fails_is_quoted_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "FLAGS", ["--no-such-flag"])
    assert (
        "--no-such-flag" in cpu_kernels.unavailable_reason()
        and "\n" not in cpu_kernels.unavailable_reason()
    )


@pytest.mark.usefixtures("_no_library")
def test_what_has_been_compiled_is_used_again_and_a_changed_source_is_not(monkeypatch) -> None:
    first = cpu_kernels._compiled()
    assert first.parent == cpu_kernels.SOURCES[0].parents[1] / "__pycache__" and list(
        first.parent.iterdir()
    ) == [first]
    compile_it = cpu_kernels.subprocess.run
    monkeypatch.setattr(
        cpu_kernels.subprocess, "run", lambda *_, **__: pytest.fail("compiled again")
    )
    assert cpu_kernels._compiled() == first
    monkeypatch.setattr(cpu_kernels.subprocess, "run", compile_it)
    cpu_kernels.SOURCES[1].write_text(cpu_kernels.SOURCES[1].read_text() + "// changed\n")
    assert cpu_kernels._compiled() != first


FAULTS = """
import os, resource, sys
from alexnet_mp.ops import cpu_kernels
import torch
torch.set_num_threads(1)
kept = cpu_kernels.keep_freed_memory() if sys.argv[1] == "kept" else None
if sys.argv[1] == "run":
    from small_nets import SMALL
    from alexnet_mp.training.run import run
    run(SMALL.with_fields(out=sys.argv[2], epochs=1, limit_train=32, limit_val=32, limit_test=32))
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**22), torch.ones(2**26)
before = count()
for _ in range(8):
    torch.ones(2**26)            # 256 MiB
print(kept, (count() - before) * os.sysconf("SC_PAGE_SIZE") // 2**20)
"""


def faulted(*arguments: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and how many MiB of pages were new in allocating 8 x 256 MiB again, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    kept, new = done.stdout.splitlines()[-1].split()
    return kept, int(new)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_kept_for_the_next_step_by_a_run_too_unless_the_user_has_tuned_the_allocator(
    tmp_path,
) -> None:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("pages are large here, their number says nothing")
    assert faulted("as it comes")[1] > 1800
    for kept, new in (faulted("kept"), faulted("run", str(tmp_path / "run"))):
        assert (
            kept != "False" and new <= 768
        )  # the first ones may find small blocks of other threads in their way
    kept, new = faulted("kept", MALLOC_TRIM_THRESHOLD_="100000")
    assert kept == "False" and new > 1800
