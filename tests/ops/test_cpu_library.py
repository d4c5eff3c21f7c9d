"""Compiling csrc/ on first use: the compiler, its flags, and when the library is made again."""

import platform
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from alexnet_mp.ops import cpu_kernels, cpu_library
from alexnet_mp.ops.response_norm import LocalResponseNorm

needs_compiler = pytest.mark.skipif(
    bool(cpu_library.unavailable_reason()), reason=cpu_library.unavailable_reason() or "compiled"
)
NORM = LocalResponseNorm(alpha=0.3)


@pytest.fixture
def _no_library(monkeypatch, tmp_path):
    """As in a fresh installation elsewhere: nothing compiled yet."""
    (tmp_path / "package" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(
        cpu_library,
        "SOURCES",
        tuple(
            Path(shutil.copy(source, tmp_path / "package" / "csrc"))
            for source in cpu_library.SOURCES
        ),
    )
    forget()
    yield
    forget()


def forget() -> None:
    """What this process has loaded."""
    cpu_library._load.cache_clear()
    cpu_kernels._function.cache_clear()


@pytest.mark.usefixtures("_no_library")
def test_without_a_compiler_the_norm_says_so_and_still_computes(monkeypatch) -> None:
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    assert cpu_library.unavailable_reason() == (
        "response normalization is not compiled and takes several times as long: "
        "no C++ compiler (c++, g++, clang++, or what CXX names)"
    )
    z = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(NORM(z, relu=True, pool=(3, 2)), F.max_pool2d(NORM(F.relu(z)), 3, 2))


@needs_compiler
@pytest.mark.usefixtures("_no_library")
def test_a_compiler_that_fails_is_quoted_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(cpu_library, "FLAGS", ["--no-such-flag"])
    assert (
        "--no-such-flag" in cpu_library.unavailable_reason()
        and "\n" not in cpu_library.unavailable_reason()
    )


@needs_compiler
@pytest.mark.usefixtures("_no_library")
def test_a_compiled_file_is_used_again_until_a_source_changes(monkeypatch) -> None:
    first = cpu_library.compiled_file()
    assert first.parent == cpu_library.SOURCES[0].parents[1] / "__pycache__" and list(
        first.parent.iterdir()
    ) == [first]
    compile_it = cpu_library.subprocess.run
    monkeypatch.setattr(
        cpu_library.subprocess, "run", lambda *_, **__: pytest.fail("compiled again")
    )
    assert cpu_library.compiled_file() == first
    monkeypatch.setattr(cpu_library.subprocess, "run", compile_it)
    cpu_library.SOURCES[1].write_text(cpu_library.SOURCES[1].read_text() + "// changed\n")
    assert cpu_library.compiled_file() != first


@needs_compiler
@pytest.mark.usefixtures("_no_library")
def test_the_environment_chooses_the_architecture_and_so_the_file(monkeypatch) -> None:
    commands = []
    monkeypatch.setattr(
        cpu_library, "_compile", lambda command: commands.append(command) or touch(command)
    )
    monkeypatch.delenv("ALEXNET_MP_MARCH", raising=False)
    files = [cpu_library.compiled_file()]
    for architecture in ("x86-64-v3", "x86-64"):
        monkeypatch.setenv("ALEXNET_MP_MARCH", architecture)
        files.append(cpu_library.compiled_file())
    assert len(set(files)) == 3
    marches = [next(word for word in command if "-march" in word) for command in commands]
    assert marches == ["-march=native", "-march=x86-64-v3", "-march=x86-64"]


def touch(command: list[str]) -> None:
    Path(command[command.index("-o") + 1]).touch()


@needs_compiler
@pytest.mark.usefixtures("_no_library")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64")
def test_another_architecture_computes_the_same_bits(monkeypatch) -> None:
    z = torch.randn(3, 48, 9, 9).contiguous(memory_format=torch.channels_last)
    outcomes = []
    for architecture in ("native", "x86-64"):  # vectors of any width, and the narrowest
        monkeypatch.setenv("ALEXNET_MP_MARCH", architecture)
        forget()
        x = z.clone().requires_grad_()
        y = NORM(x, relu=True, pool=(3, 2))
        assert cpu_kernels.supports(x, 5, 0.75)
        outcomes.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
