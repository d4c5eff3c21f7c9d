"""Lets test modules import the helpers beside this file; importlib mode adds no folder to
sys.path."""

import os
import sys
from pathlib import Path

import pytest

# Without a GPU the Triton kernels run in Triton's interpreter; Triton reads this when it is
# imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).resolve().parent

sys.path[:0] = [path for path in (str(TESTS), str(TESTS.parent)) if path not in sys.path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alexnet_mp"
