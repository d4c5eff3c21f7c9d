"""torch.compile for whole networks."""

from __future__ import annotations

import os
import sys

from torch import nn

from alexnet_mp.config.errors import first_line


def compile_network(network: nn.Module, cuda_graphs: bool) -> None:
    """Compiles what lies between two crossings, in place, when the network is first called.

    With `cuda_graphs` it is also recorded and replayed.
    """
    network.compile(mode="reduce-overhead" if cuda_graphs else "default")


def explain_compile_error(error: BaseException) -> str | None:
    """Why torch.compile failed and the way out, in one line; None for errors of other origin.

    E.g. there is no C++ compiler, or a process was killed while its compiler wrote into the cache.
    """
    # Not imported: where nothing was compiled, an error need not wait two seconds for it.
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo is None or not isinstance(error, dynamo.BackendCompilerFailed):
        return None
    cause = error.inner_exception
    # torch sets the variable once it has used the cache.
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's cache")
    return (
        f"--compile: torch.compile failed: {type(cause).__name__}: {first_line(cause)}; leave the "
        f"flag out, or, if a run was killed while it compiled, remove {cache}"
    )
