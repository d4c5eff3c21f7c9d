"""Lets test modules import the helpers beside this file; importlib mode adds no folder to
sys.path."""

import os
import signal
import sys
from pathlib import Path

import pytest

# Without a GPU the Triton kernels run in Triton's interpreter; Triton reads this when it is
# imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `nohup pytest &` starts with both ignored, and then they reach no test that sends them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TESTS = Path(__file__).resolve().parent

sys.path[:0] = [path for path in (str(TESTS), str(TESTS.parent)) if path not in sys.path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "alexnet_mp"


SLOW_MODULES = {
    # They start the commands as processes, train whole runs, or wait on purpose.
    "benchmarks/test_ablations.py",
    "benchmarks/test_benchmarks.py",
    "benchmarks/test_imagenet_scale.py",
    "benchmarks/test_scaling_model.py",
    "cli/test_check.py",
    "cli/test_clusters.py",
    "cli/test_commands.py",
    "cli/test_evaluate_command.py",
    "cli/test_pack_command.py",
    "cli/test_process.py",
    "cli/test_train_command.py",
    "data/test_pack.py",
    "inference/test_ensemble.py",
    "inference/test_evaluate_folder.py",
    "inference/test_run_pictures.py",
    "inference/test_run_report.py",
    "ops/test_allocator.py",
    "ops/test_triton_kernels.py",
    "parallel/test_layouts.py",
    "parallel/test_parity.py",
    "test_ranks.py",
    "test_ranks_failures.py",
    "training/test_recipes.py",
    "training/test_run.py",
    "training/test_run_settings.py",
    "training/test_step_timeline.py",
    "training/test_tensorboard.py",
}


def pytest_xdist_auto_num_workers() -> int:
    """Three workers on two cores: many tests wait for processes that they have started."""
    return max(3, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks whole modules, and all of faults/, so that `-m "not slow"` is a minute or two."""
    for item in items:
        place = item.path.relative_to(TESTS)
        if place.parts[0] == "faults":
            item.add_marker(pytest.mark.faults)
        if place.as_posix() in SLOW_MODULES or place.parts[0] == "faults":
            item.add_marker(pytest.mark.slow)
