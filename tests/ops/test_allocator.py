"""What the C library's allocator does with freed memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import os, resource, sys
from alexnet_mp.ops.allocator import keep_freed_memory
import torch
torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
if sys.argv[1] == "run":
    from small_nets import SMALL
    from alexnet_mp.training.run import run
    run(SMALL.with_fields(out=sys.argv[2], epochs=1, limit_train=32, limit_val=32, limit_test=32))
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**26)            # small blocks of other uses find their places
before = count()
for _ in range(8):
    torch.ones(2**26)            # 256 MiB
print(kept, (count() - before) * os.sysconf("SC_PAGE_SIZE") // 2**20)
"""


def faulted(*arguments: str, **environment: str) -> tuple[str, int]:
    """The result of `keep_freed_memory`, and MiB of new pages in allocating 8 x 256 MiB again.

    Measured in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )
    kept, new = done.stdout.splitlines()[-1].split()
    return kept, int(new)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_is_kept_unless_the_user_tuned_the_allocator(tmp_path) -> None:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("pages are large here, their number says nothing")
    assert faulted("as it comes")[1] > 1800
    for kept, new in (faulted("kept"), faulted("run", str(tmp_path / "run"))):
        # a few may find a small block of another thread in their way
        assert kept != "False" and new <= 768
    kept, new = faulted("kept", MALLOC_TRIM_THRESHOLD_="100000")
    assert kept == "False" and new > 1800
