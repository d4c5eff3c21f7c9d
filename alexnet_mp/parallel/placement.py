"""Which ranks share one copy of the network: adjacent ones, of one host wherever that can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def choose_column_ranks(
    columns: int, world_size: int, asked: int = 0, hosts: Sequence[str] = ()
) -> int:
    """How many ranks share one copy of a network of `columns` columns.

    Default: the largest divisor of `columns` that divides `world_size` and keeps each copy on one
    of `hosts` (of each rank; none: all ranks share one), but never 1 in a larger world with two or
    more columns: that is data parallelism, which has to be asked for. Where no host has ranks
    enough for a copy, copies span hosts. ValueError names the sizes that work.
    """
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    if asked:
        if asked not in divisors:
            raise ValueError(
                f"--column-ranks {asked}: {columns} columns divide among "
                f"{', '.join(map(str, divisors))} ranks"
            )
        if world_size % asked:
            raise ValueError(
                f"--column-ranks {asked}: {world_size} ranks do not divide into groups of {asked}; "
                f"--nproc_per_node must be a multiple of {asked}"
            )
        return asked
    fitting = [n for n in divisors if world_size % n == 0]
    several = [n for n in fitting if n > 1]
    if not several:
        if world_size > 1 and columns > 1:
            raise ValueError(
                f"{world_size} ranks cannot share {columns} columns: --nproc_per_node must be 1 or "
                f"a multiple of {' or '.join(str(n) for n in divisors[1:])} "
                "(or --column-ranks 1 for pure data parallelism)"
            )
        return 1
    inside = [n for n in several if not spanning_copy(hosts, n)]
    if not inside and max(Counter(hosts).values()) >= several[0]:
        raise ValueError(_avoidable(hosts, several[0]))
    return max(inside or several)


def spanning_copy(hosts: Sequence[str], column_ranks: int) -> tuple[int, ...]:
    """The ranks of the first copy of the network that is on several hosts; () if none is."""
    for first in range(0, len(hosts), column_ranks):
        if len(set(hosts[first : first + column_ranks])) > 1:
            return tuple(range(first, first + column_ranks))
    return ()


def describe_copy(hosts: Sequence[str], ranks: Sequence[int]) -> str:
    """ "ranks 2 and 3 ... on hosts a and b"."""
    names = dict.fromkeys(hosts[rank].partition(" ")[0] for rank in ranks)
    return f"ranks {_and(ranks)} share one copy of the network but are on hosts {_and(list(names))}"


def _avoidable(hosts: Sequence[str], smallest: int) -> str:
    return (
        f"{describe_copy(hosts, spanning_copy(hosts, smallest))}: start a multiple of {smallest} "
        f"ranks on each host, numbered host by host (srun --distribution=block); "
        f"--column-ranks {smallest} lets activations cross the network between hosts, and "
        "--column-ranks 1 is pure data parallelism"
    )


def _and(items: Sequence[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
