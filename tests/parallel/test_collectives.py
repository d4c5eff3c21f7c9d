"""Sums, gathers and work for all between steps, on four ranks of two simulated hosts."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run

from alexnet_mp.config import Config, RunConfig
from alexnet_mp.ops.cpu_cores import affinity
from alexnet_mp.parallel import devices
from alexnet_mp.parallel.context import ParallelContext, init_parallel
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.rendezvous import meet

pytestmark = pytest.mark.ranks


def connected(work: Callable[[ParallelContext], Any], hosts: int = 2) -> Any:
    """`work` in a context whose ranks are spread over `hosts`, two copies of two columns."""
    place = Environment.read()
    local = place.world_size // hosts
    place = dataclasses.replace(place, local_rank=place.rank % local, local_world_size=local)
    config = Config(run=RunConfig(device="cpu", threads=1))
    context = init_parallel(config, meet(config.run.timeout, place))
    try:
        return work(context)
    finally:
        context.close()


def sums(rank: int) -> dict[str, Any]:
    def work(context: ParallelContext) -> dict[str, Any]:
        values = torch.tensor([float(rank), 1.0])
        later = context.start_sum(values)
        values += 100  # the sum is of what they were
        copies = context.all_reduce_replicas(torch.tensor([float(context.data_rank + 1)]))
        return {
            "sum": later().tolist(),
            "values": values.tolist(),
            "copies": copies.tolist(),
            "gather": context.gather(rank * rank),
            "no timeout": context.gather_no_timeout(str(rank)),
            "metered": sorted(context.meter.values),
        }

    return connected(work)


def test_sums_and_gathers_are_the_same_on_every_rank() -> None:
    for rank, found in enumerate(run(sums, 4)):
        assert found == {
            "sum": [6.0, 4.0],
            "values": [100.0 + rank, 101.0],
            "copies": [3.0],
            "gather": [0, 1, 4, 9],
            "no timeout": ["0", "1", "2", "3"],
            "metered": [("control", "control", "forward")],
        }


def weight(column: int) -> torch.Tensor:
    """Transposed, so that its values do not lie in memory as they are read."""
    return (torch.arange(6.0).view(2, 3) + 10 * column).t()


def weights(rank: int) -> dict[str, Any]:
    def work(context: ParallelContext) -> dict[str, Any]:
        column = context.column_rank
        own = {f"w{column}": weight(column), "shared": torch.ones(1)}
        own[f"count{column}"] = torch.tensor(column, dtype=torch.int64)
        whole = context.gather_to_rank0(own)
        back = context.broadcast_from_rank0(whole, [f"w{column}"])
        sent = context.meter.total_bytes("checkpoint")
        return {"whole": whole, "back": back, "sent": sent}

    return connected(work)


def test_weights_travel_to_rank_0_and_back() -> None:
    outcomes = run(weights, 4)
    whole = outcomes[0]["whole"]
    assert set(whole) == {"w0", "w1", "shared", "count0", "count1"}
    assert torch.equal(whole["w0"], weight(0)) and torch.equal(whole["w1"], weight(1))
    assert whole["count1"].dtype == torch.int64
    for rank, outcome in enumerate(outcomes):
        column = rank % 2
        assert set(outcome["back"]) == {f"w{column}"}
        assert torch.equal(outcome["back"][f"w{column}"], weight(column))
        if rank:
            assert set(outcome["whole"]) == {f"w{column}", "shared", f"count{column}"}
    assert [outcome["sent"] > 0 for outcome in outcomes] == [True, True, False, False]


def on_rank0(rank: int, kind: str) -> Any:
    def work() -> dict[str, Any]:
        if kind == "OSError":
            raise OSError(28, "No space left on device")
        if kind == "ValueError":
            raise ValueError("x.jpg: not an image")
        return {"rank": rank, "weights": torch.arange(3)}

    def attempt(context: ParallelContext) -> Any:
        try:
            return context.run_on_rank0(work)
        except (OSError, ValueError) as error:
            return type(error).__name__, str(error)

    return connected(attempt)


def test_every_rank_gets_rank_0s_result() -> None:
    for result in run(on_rank0, 2, "result"):
        assert result["rank"] == 0 and torch.equal(result["weights"], torch.arange(3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("OSError", "[Errno 28] No space left on device"), ("ValueError", "x.jpg: not an image")],
)
def test_every_rank_gets_rank_0s_error(kind: str, message: str) -> None:
    assert run(on_rank0, 2, kind) == [(kind, message)] * 2


def leave_at_once(rank: int) -> str:
    """Rank 0 closes its connections as soon as its work has failed, before rank 1 looks."""

    def work() -> None:
        raise ValueError("x.jpg: not an image")

    def attempt(context: ParallelContext) -> str:
        time.sleep(0.5 * rank)
        try:
            context.run_on_rank0(work)
        except ValueError as error:
            if rank == 0:
                dist.destroy_process_group()
                context.control = None
            return str(error)
        return "no error"

    return connected(attempt)


def test_an_error_arrives_though_rank_0_ends_at_once() -> None:
    assert run(leave_at_once, 2) == ["x.jpg: not an image"] * 2


def once_per_host(rank: int, folder: Path, fails_on: int) -> str:
    """Notes in the folder who began and ended the work, in this order."""

    def work() -> None:
        note(f"{rank} begins")
        time.sleep(0.05)
        if rank == fails_on:
            raise FileNotFoundError("no room on this host")
        note(f"{rank} ends")

    def note(text: str) -> None:
        with open(folder / "notes", "a") as file:
            file.write(text + "\n")

    def attempt(context: ParallelContext) -> str:
        try:
            context.run_once_per_host(work)
        except ValueError as error:
            return str(error)
        return "done"

    return connected(attempt, hosts=2)


def test_work_is_done_by_one_rank_of_each_host_before_the_others(tmp_path: Path) -> None:
    assert run(once_per_host, 4, tmp_path, -1) == ["done"] * 4
    lines = (tmp_path / "notes").read_text().splitlines()
    first, then = set(lines[:4]), set(lines[4:])
    assert first == {f"{rank} {event}" for rank in (0, 2) for event in ("begins", "ends")}
    assert then == {f"{rank} {event}" for rank in (1, 3) for event in ("begins", "ends")}


def test_a_failure_on_one_host_is_raised_on_all_ranks(tmp_path: Path) -> None:
    assert run(once_per_host, 4, tmp_path, 2) == ["no room on this host"] * 4
    assert not {"1 begins", "3 begins"} & set((tmp_path / "notes").read_text().splitlines())


def result_of_a_host(rank: int) -> str:
    """Ranks 0 and 2 are the first of their hosts; rank 3 does not see what rank 2 made."""
    return connected(
        lambda context: context.run_once_per_host(
            lambda: f"made by {rank}", lambda result: (rank, result) != (3, "made by 2")
        )
    )


def test_ranks_take_the_result_of_their_hosts_first_rank_where_they_can_use_it() -> None:
    assert run(result_of_a_host, 4) == ["made by 0", "made by 0", "made by 2", "made by 3"]


def cores_of_work(rank: int) -> tuple[int, int]:
    """On how many cores a rank that keeps to one may work for all, and afterwards."""

    def work(context: ParallelContext) -> tuple[int, int]:
        cores, seen = devices._pinned[0] if devices._pinned else affinity(), list[int]()
        devices._pinned = (cores, cores[:1])
        os.sched_setaffinity(0, cores[:1])
        context.run_once_per_host(lambda: seen.append(len(affinity())))
        return seen[0], len(affinity())

    return connected(work, hosts=1)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(affinity()) < 2, reason="needs two cores"
)
def test_the_rank_that_works_for_its_host_has_all_cores_meanwhile() -> None:
    monopoly, other = run(cores_of_work, 2)
    assert monopoly == (len(affinity()), 1) and other == (1, 1)


def test_one_rank_alone_does_its_work_and_gets_its_own_error(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    context = ParallelContext(Environment(), torch.device("cpu"), (0, 1))
    assert context.run_on_rank0(lambda: os.getpid()) == os.getpid()
    done: list[int] = []
    context.run_once_per_host(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(FileNotFoundError):
        context.run_once_per_host(lambda: os.stat("/no/such/file"))
    values = torch.ones(2)
    assert context.sum(values) is not values and context.gather(3) == [3]
