"""How many CPU cores this process may use: the smaller of its affinity and its container's quota.

A quota (`docker run --cpus=2`, Kubernetes' `limits.cpu`) does not show in the affinity: a process
on a host of 64 cores still sees all of them, and threads beyond the quota only stop one another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may keep busy, at least 1."""
    cores, quota = len(affinity()), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def affinity() -> list[int]:
    """The numbers of the cores on which the calling thread may run, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_quota(groups: Path | None = None, own: Path | None = None) -> float | None:
    """The least limit of this process's control groups in cores, e.g. 2.5; None without one.

    Reads `cpu.max` (cgroup v2) or `cpu.cfs_quota_us` (v1) of the process's group and all above it.
    Inside a container the group's path may be the host's, which does not exist there: then the
    root of the container's own groups counts.
    """
    limits = []
    for folder in _groups(groups or CONTROL_GROUPS, own or OWN_GROUPS):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = _quota_and_period(folder)
            if quota > 0:
                limits.append(quota / period)
    return min(limits, default=None)


def _quota_and_period(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time in a period of so many; ValueError or OSError without a limit."""
    version_2 = folder / "cpu.max"
    if version_2.exists():
        quota, period = version_2.read_text().split()
        return int(quota), int(period)
    return tuple(  # type: ignore[return-value]  # two names, two numbers
        int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
    )


def _groups(groups: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's CPU control groups, each with all above it."""
    yield from (groups, groups / "cpu", groups / "cpu,cpuacct")
    lines = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:  # "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root = groups
        elif "cpu" in controllers.split(","):
            root = groups / controllers
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder
            folder = folder.parent
        yield root
