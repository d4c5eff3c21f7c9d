"""Which device and how many CPU threads a rank gets."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping

import torch

from alexnet_mp.ops.cpu_cores import affinity, available_cores
from alexnet_mp.parallel.launcher import Environment, started_by_torchrun

_pinned: tuple[list[int], list[int]] | None = None
"""The affinity that this process had before `set_threads` narrowed it, and the narrowed one."""


def choose_device(asked: str = "auto", environment: Environment | None = None) -> torch.device:
    """This rank's device: its own GPU, the GPU that all share, MPS for a single rank, or the CPU.

    Without `environment` there is one rank. ValueError if the asked device is missing, if there are
    fewer GPUs than ranks (but for one, which all may share), or if this build of torch has no
    kernels for the GPU.

        device = choose_device("auto")  # CUDA, else Apple's MPS, else the CPU
    """
    environment = environment or Environment()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not count:
        raise ValueError(
            "--device cuda: this rank sees no CUDA device (CUDA_VISIBLE_DEVICES, driver); "
            "--device cpu works without one"
        )
    if count and asked in ("auto", "cuda"):
        ranks = environment.local_world_size
        if 1 < count < ranks:
            raise ValueError(
                f"{ranks} ranks on this host but {count} GPUs: use --nproc_per_node={count}, "
                "CUDA_VISIBLE_DEVICES=0 to let all share one, or --device cpu"
            )
        index = environment.local_rank if count > 1 else 0
        _check_kernels(index)
        return torch.device("cuda", index)
    mps = torch.backends.mps.is_available()
    if asked == "mps" and not mps:
        raise ValueError("--device mps: this machine has no MPS")
    if asked == "mps" and environment.world_size > 1:
        raise ValueError("--device mps: MPS serves one rank only; start one, or use --device cpu")
    alone = environment.world_size == 1
    return torch.device("mps" if mps and alone and asked in ("auto", "mps") else "cpu")


def _check_kernels(index: int) -> None:
    """ValueError where this build of torch has no kernels for the GPU.

    Torch only warns, and fails at the GPU's first use.
    """
    compiled_for = torch.cuda.get_arch_list()
    if torch.version.cuda is None or not compiled_for:  # ROCm names its architectures otherwise
        return
    capability = torch.cuda.get_device_capability(index)
    if not any(_runs_on(architecture, capability) for architecture in compiled_for):
        raise ValueError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(index)} "
            f"(sm_{capability[0]}{capability[1]}; it has {', '.join(compiled_for)}): "
            "install a build for it (https://pytorch.org/get-started/locally/), or use --device cpu"
        )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architecture` runs on a GPU of this compute capability.

    Machine code (sm_86) serves later minor versions of its generation, intermediate code
    (compute_90) all later ones; an "a" (sm_90a) that very one only, an "f" its generation.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return True  # a name of a kind that is not known here: torch will tell
    kind, suffix = match[1], match[4]
    built = (int(match[2]), int(match[3]))
    if suffix == "a":
        return built == capability
    if kind == "sm" or suffix == "f":
        return built[0] == capability[0] and built[1] <= capability[1]
    return built <= capability


def gpu_identity(device: torch.device) -> str:
    """The UUID of this rank's GPU; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def is_mig_slice(device: torch.device) -> bool:
    """Whether the device is a slice of a GPU (MIG).

    NCCL takes two slices of one GPU for the same device and refuses them.
    """
    return device.type == "cuda" and "MIG" in torch.cuda.get_device_name(device)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def tf32(device: torch.device) -> dict[str, bool] | None:
    """Whether a GPU may round float32 to ten bits of mantissa, in products and in convolutions.

    Torch's defaults are no and yes.
    """
    if device.type != "cuda":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # builds around 2.9 warn of these names when they are read
        return {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        }


def set_threads(asked: int, environment: Environment, device: torch.device) -> int:
    """Sets torch's CPU threads for this rank and returns their number.

    In this order: `asked`; the user's OMP_NUM_THREADS; this host's share of the cores that may be
    used (affinity and quota). Ranks that compute on the CPU and share out all of its cores each
    keep to their own: otherwise the system moves them about at every message. Not under a quota,
    where other processes use the same cores.
    """
    global _pinned
    cores = affinity()
    if _pinned is not None and cores == _pinned[1]:
        cores = _pinned[0]
        os.sched_setaffinity(0, cores)
        _pinned = None
    ranks, available = environment.local_world_size, available_cores()
    threads = asked or _users_threads(ranks) or max(1, available // ranks)
    torch.set_num_threads(threads)
    pins = device.type == "cpu" and ranks > 1 and hasattr(os, "sched_setaffinity")
    if pins and threads * ranks == len(cores) == available:
        own = cores[environment.local_rank * threads :][:threads]
        os.sched_setaffinity(0, own)
        _pinned = (cores, own)
    return threads


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """A block in which threads that are started may use all cores that `set_threads` shared out.

    For work that one rank does while the others wait. Torch's own threads are not started in it:
    they would stay on all cores, and training uses them later.
    """
    if _pinned is None:
        yield
        return
    cores, own = _pinned
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
        torch.set_num_threads(threads)


def _users_threads(ranks: int, variables: Mapping[str, str] = os.environ) -> int:
    """OMP_NUM_THREADS where the user set it, else 0.

    torchrun sets it to 1 for several ranks of a host where the user set nothing: that 1 does not
    count.
    """
    value = variables.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" where nested
    threads = int(value) if value.isdigit() else 0
    return 0 if threads == 1 and ranks > 1 and started_by_torchrun() else threads
