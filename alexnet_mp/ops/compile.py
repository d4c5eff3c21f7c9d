"""torch.compile: for whole networks, and for single functions on the devices where it makes one kernel of them. A norm is thirty operations, each
of them a pass through a GPU's memory. (CPUs have native.py; Apple's MPS and machines without Triton run the operations one by one.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

DEVICES = {"cuda"}


def fuses(device: str) -> bool:
    """Whether functions of tensors on `device` ("cuda", "cpu", ...) are to be compiled."""
    return device in DEVICES and not unavailable_reason(device)


@functools.cache
def unavailable_reason(device: str) -> str:
    """Why functions of tensors on `device`, one of DEVICES, cannot be compiled; empty where they can. Tried once, on a small one, for seconds."""
    x = torch.arange(8.0, device=device)
    try:
        if torch.equal(torch.compile(_trial)(x), _trial(x)):
            return ""
        reason = "a trial gave other numbers"
    except Exception as error:  # of many kinds: no Triton, no compiler for its launcher, a card too old, a folder that cannot be written to
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return f"response normalization on {device} is not compiled and takes several times as long: {reason}"


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled when it is first called, again for a batch of another size, and then for any size."""
    return torch.compile(function)


def compile_network(network: nn.Module, cuda_graphs: bool) -> None:
    """Compiles what lies between two crossings, in place, when it is first called; with `cuda_graphs` it is also recorded and replayed."""
    network.compile(mode="reduce-overhead" if cuda_graphs else "default")


def _trial(x: Tensor) -> Tensor:
    return x * 2 + x[:1]
