"""torch.compile for whole networks."""

from __future__ import annotations

from torch import nn


def compile_network(network: nn.Module, cuda_graphs: bool) -> None:
    """Compiles what lies between two crossings, in place, when the network is first called.

    With `cuda_graphs` it is also recorded and replayed.
    """
    network.compile(mode="reduce-overhead" if cuda_graphs else "default")
