"""The cores that a process may use: its affinity and its container's quota, the smaller of both."""

from pathlib import Path

import pytest

from alexnet_mp.ops import cpu_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of the test's own; without a file in them there is no limit."""
    monkeypatch.setattr(cpu_cores, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpu_cores, "OWN_GROUPS", tmp_path / "own")
    write(tmp_path / "own", "0::/\n")
    return tmp_path / "cgroup"


def test_without_control_groups_there_is_no_quota(groups: Path) -> None:
    assert cpu_cores.cpu_quota() is None


@pytest.mark.parametrize(
    ("text", "quota"), [("200000 100000\n", 2.0), ("150000 100000", 1.5), ("max 100000\n", None)]
)
def test_docker_with_cpus_2_is_a_quota_of_two_cores(
    groups: Path, text: str, quota: float | None
) -> None:
    write(groups / "cpu.max", text)
    assert cpu_cores.cpu_quota() == quota


@pytest.mark.parametrize(
    ("microseconds", "quota"), [("250000", 2.5), ("-1", None), ("no number", None)]
)
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_version_1_of_the_control_groups_is_read_as_well(
    groups: Path, folder: str, microseconds: str, quota: float | None
) -> None:
    write(groups / folder / "cpu.cfs_quota_us", microseconds)
    write(groups / folder / "cpu.cfs_period_us", "100000")
    assert cpu_cores.cpu_quota() == quota


def test_the_least_quota_of_all_groups_above_the_process_counts(groups: Path) -> None:
    write(groups.parent / "own", "0::/job/step\n")
    write(groups / "job" / "step" / "cpu.max", "800000 100000")
    write(groups / "job" / "cpu.max", "300000 100000")
    assert cpu_cores.cpu_quota() == 3.0


def test_a_group_of_version_1_is_found_by_its_path(groups: Path) -> None:
    write(groups.parent / "own", "7:memory:/other\n4:cpu,cpuacct:/job\n")
    write(groups / "cpu,cpuacct" / "job" / "cpu.cfs_quota_us", "400000")
    write(groups / "cpu,cpuacct" / "job" / "cpu.cfs_period_us", "100000")
    assert cpu_cores.cpu_quota() == 4.0


@pytest.mark.parametrize(
    ("limit", "cores"), [("200000", 2), ("250000", 2), ("50000", 1), ("9900000", 64), ("max", 64)]
)
def test_available_cores_are_the_smaller_of_affinity_and_quota(
    groups: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cores: int
) -> None:
    monkeypatch.setattr(cpu_cores, "affinity", lambda: list(range(64)))
    write(groups / "cpu.max", f"{limit} 100000")
    assert cpu_cores.available_cores() == cores
