"""When a function of ours has to consist of torch's own operations; torch's calls, typed.

A compiled kernel reads memory through pointers, and a `torch.autograd.Function` hides its
operations. That is fast, and wrong or refused where torch itself takes a function apart: in
torch.func, torch.compile, jit.trace and others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """`function.apply(*arguments)`, with a type."""
    return cast(Tensor, function.apply(*arguments))


def not_compiled(function: AnyCallable) -> AnyCallable:
    """torch.compiler.disable, with a type."""
    return cast(AnyCallable, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def needs_plain_operations(x: Tensor) -> bool:
    """Whether what is computed from `x` has to consist of torch's operations alone.

    True in torch.compile and torch.export, jit.trace, torch.func (grad, jvp, vmap), forward-mode
    differentiation, and for tensors of other kinds (fake, distributed), which have no memory here.
    """
    return (
        torch.compiler.is_compiling()
        or is_traced()
        # Private, and the question that torch.autograd.Function.apply asks; there is no public one.
        or torch._C._are_functorch_transforms_active()
        or type(x) not in (Tensor, nn.Parameter)
        or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
    )


def has_symbolic_shape(x: Tensor) -> bool:
    """Whether the sizes of `x` are no numbers: torch.fx and jit.trace record their uses."""
    return isinstance(x, fx.Proxy) or is_traced()


def is_traced() -> bool:
    """Whether torch.jit.trace runs, under which torch's ONNX exporter may run as well."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]  # no types
