"""Functions of tensors compiled by torch, as a GPU has them, shown on the CPU.

CPUs themselves have the compiled library of cpu_kernels.py.
"""

import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from alexnet_mp.ops import compile as compile_ops
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="torch.compile needs a C++ compiler for a CPU"
)
ACROSS = LocalResponseNorm(3, alpha=0.3)  # of 3 maps: the compiled library has none


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_ops, "DEVICES", {"cpu"})
    torch._dynamo.reset()
    counters.clear()
    compile_ops.unavailable_reason.cache_clear()
    compile_ops.compiled.cache_clear()
    yield
    compile_ops.unavailable_reason.cache_clear()
    compile_ops.compiled.cache_clear()


def norm_and_gradient(
    norm: nn.Module, images: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    x, gradient = (
        torch.randn(images, 8, 7, 6, generator=generator, dtype=torch.float64)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    y = norm(x.requires_grad_())
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


@needs_compiler
@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(
    ("norm", "dtype", "memory_format", "tolerance"),
    [
        # float64: sums in another order, contracted products; bfloat16: float32 inside, rounded
        # once, so a last bit (2^-8) where that falls on an edge
        (ACROSS, torch.float64, torch.contiguous_format, 1e-13),
        (MapNorm(alpha=0.3), torch.float64, torch.channels_last, 1e-13),
        (ACROSS, torch.bfloat16, torch.channels_last, 2**-8),
    ],
    ids=["across maps", "within maps", "bfloat16"],
)
def test_a_compiled_norm_is_the_plain_one_for_any_number_of_images(
    norm: nn.Module,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not compile_ops.unavailable_reason("cpu")
    counters.clear()
    compiled = {
        images: norm_and_gradient(norm, images, dtype, memory_format) for images in (4, 3, 5)
    }
    # forward and backward: it was indeed compiled, and once for any number of images
    assert compile_ops.compiled.cache_info().currsize == 2
    assert counters["stats"]["unique_graphs"] == 2
    monkeypatch.setattr(compile_ops, "DEVICES", set())
    for images, found in compiled.items():
        plain = norm_and_gradient(norm, images, dtype, memory_format)
        torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)
        assert [x.stride() for x in found] == [x.stride() for x in plain]


@pytest.mark.usefixtures("_on_cpu")
def test_where_torch_cannot_compile_the_reason_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(function):
        def call(x):
            raise RuntimeError("Cannot find a working triton installation.\nMore information")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    assert compile_ops.unavailable_reason("cpu") == (
        "response normalization on cpu is not compiled and takes several times as long: "
        "RuntimeError: Cannot find a working triton installation."
    )
    y, _ = norm_and_gradient(ACROSS, 4, torch.float64, torch.contiguous_format)
    assert torch.isfinite(y).all() and compile_ops.compiled.cache_info().currsize == 0


def test_a_cpu_and_apples_gpu_are_not_compiled_for() -> None:
    assert not compile_ops.fuses("cpu") and not compile_ops.fuses("mps")


@pytest.mark.usefixtures("_on_cpu")
def test_a_warning_of_the_compiler_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(function):
        warnings.warn("TensorFloat32 tensor cores are available but not enabled", stacklevel=1)
        return function

    monkeypatch.setattr(torch, "compile", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_ops.unavailable_reason("cpu") == ""


def test_a_card_without_kernels_in_this_torch_is_a_reason_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_ops.unavailable_reason.cache_clear()

    def failing(*arguments, **others):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nCompile with")

    monkeypatch.setattr(torch, "arange", failing)
    assert compile_ops.unavailable_reason("cuda").endswith(
        "RuntimeError: CUDA error: no kernel image is available for execution"
    )
    monkeypatch.undo()
    compile_ops.unavailable_reason.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("_on_cpu")
def test_training_testing_and_two_layers_are_compiled_once_each() -> None:
    compile_ops.unavailable_reason("cpu")
    counters.clear()
    for images in (4, 3, 5):
        for shape in ((8, 7, 6), (6, 5, 5)):  # two layers
            x = torch.randn(images, *shape)
            ACROSS(x.requires_grad_()).sum().backward()
            with torch.no_grad():
                ACROSS(x)
    # forward and backward of two shapes; neither testing nor a tail is compiled apart
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", [ACROSS, MapNorm(alpha=0.3)], ids=["across maps", "within maps"])
def test_on_a_gpu_the_norm_is_compiled_and_the_plain_one(norm, monkeypatch) -> None:
    assert compile_ops.unavailable_reason("cuda") == ""
    x, gradient = (torch.randn(5, 8, 7, 6, dtype=torch.float64, device="cuda") for _ in range(2))
    compiled = norm(x.requires_grad_())
    found = (compiled, torch.autograd.grad(compiled, x, gradient)[0])
    assert counters["stats"]["unique_graphs"] >= 1
    monkeypatch.setattr(compile_ops, "DEVICES", set())
    plain = norm(x)
    expected = (plain, torch.autograd.grad(plain, x, gradient)[0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
