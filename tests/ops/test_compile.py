"""What is said when torch.compile fails."""

import pytest
import torch

from alexnet_mp.ops.compile import explain_compile_error


def refuse(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
    raise ImportError("main.so: file too short\nand more")


def test_a_failed_compilation_is_one_line_with_its_cause_and_the_cache(monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/compiled")
    with pytest.raises(RuntimeError) as error:
        torch.compile(torch.sin, backend=refuse)(torch.ones(2))
    assert explain_compile_error(error.value) == (
        "--compile: torch.compile failed: ImportError: main.so: file too short; leave the flag "
        "out, or, if a run was killed while it compiled, remove /tmp/compiled"
    )


def test_other_errors_are_not_explained_as_such() -> None:
    assert explain_compile_error(RuntimeError("Connection closed by peer")) is None
