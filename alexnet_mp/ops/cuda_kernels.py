"""Whether the Triton kernels can be used, and why not.

`triton_kernels` needs Triton, which some builds of torch lack, and a card that it has a compiler
for. Without it the norms are torch's operations one by one, each a pass through the GPU's memory,
and a run says so.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

DEVICE_TYPES = {"cuda"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE, BETA, POOL = 5, 0.75, 3  # written into the kernels


def usable(device: str) -> bool:
    """Whether the kernels run on `device` ("cpu", "cuda", ...)."""
    return device in DEVICE_TYPES and not unavailable_reason(device)


def supports(x: Tensor, size: int, beta: float) -> bool:
    """Whether the kernels compute the norm of `x` (N, C, H, W) over `size` maps or pixels."""
    return (
        x.dtype in DTYPES
        and x.ndim == 4
        and size == SIZE
        and beta == BETA
        and usable(x.device.type)
    )


@functools.cache
def unavailable_reason(device: str) -> str:
    """Why the kernels cannot be used on `device`, one of DEVICE_TYPES; empty if they can.

    The smallest norm is computed and compared, once in a process, which takes seconds.
    """
    try:
        # Triton warns, e.g. of its cache; where warnings are errors that would become the reason.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from alexnet_mp.ops import triton_kernels

            x = torch.ones(1, 5, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
            found, _ = triton_kernels.forward(x, 1.0, 1.0, True, 2)
        wanted = (1 + torch.tensor([3.0, 4, 5, 4, 3])) ** -0.75
        if torch.allclose(found.flatten().cpu(), wanted, rtol=1e-4):
            return ""
        reason = "a trial gave other numbers"
    except Exception as error:
        # Of many kinds: no Triton, no compiler for its launcher, a card that is too old or too new,
        # a folder that cannot be written to.
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return (
        f"response normalization on {device} has no Triton kernel and takes several times as long: "
        f"{reason}"
    )
