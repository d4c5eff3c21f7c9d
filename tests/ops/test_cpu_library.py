"""Compiling csrc/ on first use: the compiler, its flags, where the library lies and when it is made again."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from alexnet_mp.ops import cpu_library
from alexnet_mp.ops.response_norm import LocalResponseNorm

pytestmark = pytest.mark.skipif(
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
    cpu_library._load.cache_clear()
    yield
    cpu_library._load.cache_clear()


@pytest.mark.usefixtures("_no_library")
def test_without_a_compiler_it_says_so_and_the_network_still_computes(monkeypatch) -> None:
    monkeypatch.setattr(cpu_library.shutil, "which", lambda name: None)
    assert cpu_library.unavailable_reason() == (
        "response normalization is not compiled and takes several times as long: "
        "no C++ compiler (c++, g++, clang++, or what CXX names)"
    )
    z = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(NORM(z, relu=True, pool=(3, 2)), F.max_pool2d(NORM(F.relu(z)), 3, 2))


@pytest.mark.usefixtures("_no_library")
def test_a_compiler_that_fails_is_quoted_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(cpu_library, "FLAGS", ["--no-such-flag"])
    assert (
        "--no-such-flag" in cpu_library.unavailable_reason()
        and "\n" not in cpu_library.unavailable_reason()
    )


@pytest.mark.usefixtures("_no_library")
def test_what_has_been_compiled_is_used_again_and_a_changed_source_is_not(monkeypatch) -> None:
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
