"""The norms as CUDA computes them, through Triton's interpreter on the CPU: chosen, used, or said
to be missing."""

import pytest
import torch

from alexnet_mp import AlexNet, ModelConfig
from alexnet_mp.config import DataConfig
from alexnet_mp.data import Augment, Statistics
from alexnet_mp.ops import cpu_kernels, cuda_kernels, triton_kernels
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.response_norm import LocalResponseNorm, MapNorm, slow_norm

pytest.importorskip("triton", reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(
    not triton_kernels.INTERPRETED, reason="TRITON_INTERPRET=1 is not set: this machine has a GPU"
)
SMALL = ModelConfig(
    kernels=(6, 5, 4, 4, 4),
    hidden=(8, 7),
    classes=5,
    image_size=67,
    map_norm=True,
    initial_weights=("he",) * 8,
    lrn_alpha=0.1,
    map_norm_alpha=0.1,
)


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch):
    """The CPU's tensors are taken for CUDA's."""
    monkeypatch.setattr(cuda_kernels, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(cpu_kernels, "supports", lambda *_: False)
    cuda_kernels.unavailable_reason.cache_clear()
    yield
    cuda_kernels.unavailable_reason.cache_clear()


def norm_and_gradient(norm: torch.nn.Module, **options) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 9, 8, generator=generator).requires_grad_()
    y = norm(x, **options)
    gradient = torch.randn(y.shape, generator=generator)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Grows by `name` whenever the kernel of that name is used."""
    calls: list[str] = []
    kernel = getattr(triton_kernels, name)
    monkeypatch.setattr(
        triton_kernels, name, lambda *arguments: calls.append(name) or kernel(*arguments)
    )
    return calls


@needs_interpreter
@pytest.mark.parametrize(
    ("norm", "options", "kernel"),
    [
        (LocalResponseNorm(alpha=0.3), {"relu": True, "pool": (3, 2)}, "backward"),
        (LocalResponseNorm(alpha=0.3), {"relu": True, "pool": (2, 2)}, "backward"),
        (LocalResponseNorm(alpha=0.3), {}, "backward"),
        (MapNorm(alpha=0.3), {}, "map_norm_backward"),
    ],
    ids=["pooled", "pooled by torch", "alone", "within maps"],
)
def test_the_norms_use_the_kernels_and_equal_torchs_operations(
    norm, options, kernel, monkeypatch, request
) -> None:
    with monkeypatch.context() as plain_only:
        plain_only.setattr(cpu_kernels, "supports", lambda *_: False)
        plain = norm_and_gradient(norm, **options)
    request.getfixturevalue("_as_on_cuda")
    calls = calls_of(monkeypatch, kernel)
    found = norm_and_gradient(norm, **options)
    assert calls == [kernel]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)  # float32, in another order


@needs_interpreter
def test_a_training_step_through_the_kernels_equals_one_without(monkeypatch, request) -> None:
    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = AlexNet(SMALL, seed=0).to(memory_format=torch.channels_last)
        images = torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(0))
        logits = model(images, dropout_keys(0, 0, torch.arange(2)))
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
        return logits.detach(), [p.grad for p in model.parameters()]

    plain = step()
    request.getfixturevalue("_as_on_cuda")
    pooled, within = calls_of(monkeypatch, "backward"), calls_of(monkeypatch, "map_norm_backward")
    found = step()
    assert len(pooled) == 4 and len(within) == 2  # two columns: two layers pooled, one map norm
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_as_on_cuda")
def test_without_a_kernel_the_norm_is_plain_and_the_reason_one_line(monkeypatch) -> None:
    def failing(*_):
        raise RuntimeError("0 active drivers ([]). There should only be one.\nMore information")

    monkeypatch.setattr(triton_kernels, "forward", failing)
    reason = slow_norm("cpu") or cuda_kernels.unavailable_reason("cpu")
    assert "0 active drivers" in reason and "\n" not in reason
    y, _ = norm_and_gradient(LocalResponseNorm())
    assert torch.isfinite(y).all()


@needs_interpreter
@pytest.mark.usefixtures("_as_on_cuda")
def test_a_kernel_that_computes_other_numbers_is_not_used(monkeypatch) -> None:
    forward = triton_kernels.forward
    monkeypatch.setattr(
        triton_kernels, "forward", lambda *arguments: (forward(*arguments)[0] * 1.1, None)
    )
    assert "other numbers" in cuda_kernels.unavailable_reason("cpu")


def test_types_and_windows_without_a_kernel_are_left_to_torch() -> None:
    x = torch.zeros(1, 5, 3, 3, device="meta")
    assert not cuda_kernels.supports(x, 5, 0.75)  # not CUDA
    assert torch.float64 not in cuda_kernels.DTYPES


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_in_use_on_cuda() -> None:
    assert cuda_kernels.unavailable_reason("cuda") == ""
    x = torch.randn(2, 48, 55, 55, device="cuda", dtype=torch.bfloat16)
    assert cuda_kernels.supports(x, 5, 0.75)
    wanted = LocalResponseNorm()(x.double(), relu=True, pool=(3, 2))
    found = LocalResponseNorm()(x, relu=True, pool=(3, 2))
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=1e-3)


@needs_interpreter
@pytest.mark.parametrize("mean", ["image-aligned", "image-center", "half"])
def test_a_batch_cropped_by_the_kernel_equals_the_cpus(mean: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, 20, 20), generator=generator, dtype=torch.uint8)
    statistics = Statistics(torch.rand(3, 20, 20, generator=generator) * 255, torch.eye(3).double())
    config = DataConfig(
        stored_side=20,
        crop_of=16,
        mean=mean,
        color_noise=0.1,
        color_divides=True,
        images_per_crop=2,
    )
    augment = Augment(config, 16, statistics)
    params = augment.draw(0, 0, 0, 5)
    found = augment._by_kernel(images, params)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, augment.train(images, params), rtol=1e-6, atol=1e-5)
