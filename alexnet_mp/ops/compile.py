"""torch.compile, for whole networks and for single functions of tensors on a GPU.

A norm is some thirty operations, each of which is a pass through a GPU's memory unless they are
compiled into one kernel. CPUs have cpu_kernels.py; Apple's MPS, and machines without Triton, run
the operations one by one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEVICES = {"cuda"}


def fuses(device: str) -> bool:
    """Whether functions of tensors on `device` ("cuda", "cpu", ...) are to be compiled."""
    return device in DEVICES and not unavailable_reason(device)


@functools.cache
def unavailable_reason(device: str) -> str:
    """Why functions of tensors on `device`, one of DEVICES, are not compiled; empty if they are.

    A small function is compiled and tried, once in a process, which takes seconds.
    """
    try:
        # Inductor warns, e.g. that TF32 is off; where warnings are errors that would be the reason.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.arange(8.0, device=device)
            if torch.equal(torch.compile(_trial)(x), _trial(x)):
                return ""
        reason = "a trial gave other numbers"
    except Exception as error:
        # Of many kinds: no Triton, no compiler for its launcher, a card that this torch has no
        # kernels for, a folder that cannot be written to.
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return (
        f"response normalization on {device} is not compiled and takes several times as long: "
        f"{reason}"
    )


def call_compiled(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], *others: Any
) -> Tensor:
    """function(*tensors, *others), without a gradient, compiled once for each shape of an image.

    The number of images may change. Else a short last batch would be compiled for any shape of an
    image, and those kernels are slower.
    """
    # What requires a gradient would be compiled apart from what does not, as in evaluation.
    tensors = [x.detach() for x in tensors]
    for x in tensors:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.mark_static(x, list(range(1, x.ndim)))
    return compiled(function)(*tensors, *others)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled when it is first called with tensors of a shape."""
    return torch.compile(function)


def compile_network(network: nn.Module, cuda_graphs: bool) -> None:
    """Compiles what lies between two crossings, in place, when the network is first called.

    With `cuda_graphs` it is also recorded and replayed.
    """
    network.compile(mode="reduce-overhead" if cuda_graphs else "default")


def _trial(x: Tensor) -> Tensor:
    return x * 2 + x[:1]
