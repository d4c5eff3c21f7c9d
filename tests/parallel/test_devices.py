"""A rank's device and threads: chosen before any work, or refused in one line."""

import contextlib
import os
import warnings

import pytest
import torch

from alexnet_mp.ops import cpu_cores
from alexnet_mp.parallel import devices
from alexnet_mp.parallel.devices import (
    all_cores,
    choose_device,
    is_mig_slice,
    set_threads,
    tf32,
)
from alexnet_mp.parallel.launcher import Environment

CPU = torch.device("cpu")


def on_a_machine(
    monkeypatch, gpus: int, capability: tuple[int, int] = (9, 0), compiled_for: str = "sm_90"
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled_for.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "device"),
    [
        (0, 1, "cpu"),
        (1, 0, "cuda:0"),
        (1, 1, "cuda:0"),
        (2, 0, "cuda:0"),
        (2, 1, "cuda:1"),
        (8, 1, "cuda:1"),
    ],
)
def test_each_rank_takes_its_own_gpu_or_shares_the_only_one(
    monkeypatch, gpus: int, local_rank: int, device: str
) -> None:
    on_a_machine(monkeypatch, gpus)
    assert choose_device("auto", Environment(local_rank, 2, local_rank, 2)) == torch.device(device)


def test_fewer_gpus_than_ranks_is_one_line_with_the_ways_out(monkeypatch) -> None:
    on_a_machine(monkeypatch, 2)
    with pytest.raises(ValueError, match="4 ranks on this host but 2 GPUs: use --nproc_per_node=2"):
        choose_device("cuda", Environment(3, 4, 3, 4))


def test_a_device_that_is_not_there_is_refused(monkeypatch) -> None:
    on_a_machine(monkeypatch, 0)
    with pytest.raises(ValueError, match="--device cuda: this rank sees no CUDA device"):
        choose_device("cuda", Environment())
    with pytest.raises(ValueError, match="--device mps: this machine has no MPS"):
        choose_device("mps", Environment())


def test_apples_gpu_serves_one_rank_only(monkeypatch) -> None:
    on_a_machine(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", Environment()).type == "mps"
    assert choose_device("auto", Environment(0, 2, 0, 2)).type == "cpu"
    with pytest.raises(ValueError, match="MPS serves one rank only"):
        choose_device("mps", Environment(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("compiled_for", "capability", "runs"),
    [
        ("sm_50 sm_80 sm_86 sm_90", (12, 0), False),  # torch 2.6 on a card of 2025
        ("sm_50 sm_80 sm_86 sm_90", (8, 9), True),  # a later minor version of its generation
        ("sm_80 sm_90 compute_90", (12, 0), True),  # compiled when it is loaded
        ("sm_90a", (9, 0), True),
        ("sm_90a compute_90a", (10, 0), False),
        ("sm_100 sm_120", (7, 5), False),  # too old for the build
        ("sm_75 sm_100f", (10, 3), True),
        ("gfx90a", (9, 0), True),  # of a kind that is not known here
        ("", (9, 0), True),
    ],
)
def test_a_gpu_without_kernels_in_this_build_is_refused_in_one_line(
    monkeypatch, compiled_for: str, capability: tuple[int, int], runs: bool
) -> None:
    on_a_machine(monkeypatch, 1, capability, compiled_for)
    if runs:
        assert choose_device("auto", Environment()) == torch.device("cuda:0")
        return
    with pytest.raises(ValueError, match="has no kernels for NVIDIA Test") as caught:
        choose_device("auto", Environment())
    assert f"sm_{capability[0]}{capability[1]}" in str(caught.value)
    assert "--device cpu" in str(caught.value) and "\n" not in str(caught.value)
    assert choose_device("cpu", Environment()) == CPU


@pytest.mark.parametrize(
    ("name", "sliced"),
    [("NVIDIA A100-SXM4-40GB MIG 1g.5gb", True), ("NVIDIA H100 80GB HBM3", False)],
)
def test_a_slice_of_a_gpu_is_known_by_its_name(monkeypatch, name: str, sliced: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert is_mig_slice(torch.device("cuda:0")) is sliced
    assert not is_mig_slice(CPU)


class Warns:
    """torch's settings as builds around 2.9 have them: reading the old name warns."""

    @property
    def allow_tf32(self) -> bool:
        warnings.warn("Please use the new API settings", UserWarning, stacklevel=2)
        return True


def test_reading_whether_tf32_is_allowed_does_not_warn(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", Warns())
    monkeypatch.setattr(torch.backends, "cudnn", Warns())
    assert tf32(torch.device("cuda")) == {"matmul": True, "cudnn": True}
    assert tf32(CPU) is None


class Machine:
    """A host with so many cores and a quota, whose threads and affinity are noted."""

    def __init__(self, monkeypatch, cores: int, quota: float | None = None) -> None:
        self.affinity, self.threads = set(range(10, 10 + cores)), 0
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: self.affinity, raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", self.pin, raising=False)
        monkeypatch.setattr(torch, "set_num_threads", self.use)
        monkeypatch.setattr(cpu_cores, "cpu_quota", lambda: quota)
        monkeypatch.setattr(devices, "_pinned", None)
        for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)

    def pin(self, pid: int, cores) -> None:
        self.affinity = set(cores)

    def use(self, threads: int) -> None:
        self.threads = threads


def rank(local_rank: int, ranks: int = 2) -> Environment:
    return Environment(local_rank, ranks, local_rank, ranks)


def test_each_rank_of_a_host_keeps_to_its_own_share_of_the_cores(monkeypatch) -> None:
    shares = []
    for local_rank in range(4):
        machine = Machine(monkeypatch, 8)
        assert set_threads(0, rank(local_rank, 4), CPU) == machine.threads == 2
        shares.append(machine.affinity)
    assert shares == [{10, 11}, {12, 13}, {14, 15}, {16, 17}]


def test_setting_threads_again_in_one_process_finds_the_same_cores(monkeypatch) -> None:
    machine = Machine(monkeypatch, 8)
    assert [set_threads(0, rank(1), CPU) for _ in range(3)] == [4, 4, 4]
    assert machine.affinity == {14, 15, 16, 17}
    assert set_threads(0, Environment(), CPU) == 8 and len(machine.affinity) == 8


def test_work_that_one_rank_does_for_all_may_use_all_cores(monkeypatch) -> None:
    machine = Machine(monkeypatch, 8)
    set_threads(0, rank(1, 4), CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    with contextlib.suppress(OSError), all_cores():
        assert machine.affinity == {10, 11, 12, 13, 14, 15, 16, 17}
        assert machine.threads == 1  # torch's threads would stay where they are started
        raise OSError("the disk is full")
    assert machine.affinity == {12, 13} and machine.threads == 2


def test_a_rank_that_is_not_pinned_stays_as_it_is(monkeypatch) -> None:
    machine = Machine(monkeypatch, 64, quota=2.0)
    set_threads(0, rank(1), CPU)
    with all_cores():
        assert len(machine.affinity) == 64 and machine.threads == 1


def test_one_rank_takes_all_cores_and_is_not_pinned(monkeypatch) -> None:
    machine = Machine(monkeypatch, 3)
    assert set_threads(0, Environment(), CPU) == 3 and len(machine.affinity) == 3


def test_a_quota_limits_the_threads_and_nothing_is_pinned(monkeypatch) -> None:
    machine = Machine(monkeypatch, 64, quota=2.0)
    assert set_threads(0, rank(1), CPU) == 1 and len(machine.affinity) == 64
    assert set_threads(0, Environment(), CPU) == 2 and len(machine.affinity) == 64


def test_threads_that_leave_a_core_free_are_not_pinned(monkeypatch) -> None:
    machine = Machine(monkeypatch, 8)
    assert set_threads(3, rank(1), CPU) == 3 and len(machine.affinity) == 8
    assert set_threads(0, rank(1), torch.device("cuda")) == 4 and len(machine.affinity) == 8


@pytest.mark.parametrize(
    ("value", "ranks", "torchrun", "threads"),
    [
        ("3", 2, True, 3),  # not torchrun's 1, so the user's
        ("1", 2, True, 4),  # torchrun's, or cannot be told from it
        ("1", 1, True, 1),  # torchrun sets nothing for one rank
        ("1", 2, False, 1),
        ("6,2", 1, False, 6),  # nested levels
        ("", 1, False, 8),
        ("many", 1, False, 8),
    ],
)
def test_the_users_number_of_threads_counts(
    monkeypatch, value: str, ranks: int, torchrun: bool, threads: int
) -> None:
    Machine(monkeypatch, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert set_threads(0, rank(0, ranks), CPU) == threads
    assert set_threads(2, rank(0, ranks), CPU) == 2  # --threads comes first
