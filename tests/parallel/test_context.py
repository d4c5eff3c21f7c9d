"""A rank's place: how many ranks share a copy, which groups it is in, and how long they wait."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch.distributed.device_mesh import DeviceMesh

from alexnet_mp.config import Config, ModelConfig, RunConfig
from alexnet_mp.parallel import context as context_module
from alexnet_mp.parallel.context import (
    GROUP_TIMEOUT,
    ParallelContext,
    _make_groups,
    init_parallel,
)
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.rendezvous import Meeting


def test_one_rank_holds_all_columns_and_has_no_groups(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    context = init_parallel(Config(run=RunConfig(device="cpu", threads=torch.get_num_threads())))
    assert context.columns == (0, 1) and context.mesh is None and context.heart is None
    with pytest.raises(RuntimeError, match="one rank has no groups"):
        _ = context.model_group
    context.close()


def test_the_timeout_that_is_asked_for_is_the_heartbeats(monkeypatch) -> None:
    limits = []

    def meet(timeout: float) -> Meeting:
        limits.append(timeout)
        return Meeting(Environment())

    monkeypatch.setattr(context_module, "meet", meet)
    asked = RunConfig(device="cpu", threads=torch.get_num_threads(), timeout=7.0)
    context = init_parallel(Config(run=asked))
    assert limits == [7.0] and context.timeout == 7.0


def place_of(rank: int, column_ranks: int, timeout: float) -> tuple:
    """The rank's place, groups and their limits, and whether NCCL would have had its priority."""
    limits: list[tuple[str, list[int] | None, timedelta]] = []
    patch = pytest.MonkeyPatch()
    new_group, init = dist.new_group, dist.init_process_group

    def noted_group(ranks=None, timeout=None, backend=None):
        limits.append((backend or "same", ranks, timeout))
        return new_group(ranks, timeout=timeout, backend=backend)

    def noted_init(backend, **options):
        limits.append((backend, None, options["timeout"]))
        return init(backend, **options)

    patch.setattr(dist, "new_group", noted_group)
    patch.setattr(dist, "init_process_group", noted_init)
    config = Config(
        model=ModelConfig(columns=4),
        run=RunConfig(device="cpu", threads=1, column_ranks=column_ranks, timeout=timeout),
    )
    context = init_parallel(config)
    try:
        return (
            context.columns,
            (context.data_rank, context.column_rank),
            dist.get_process_group_ranks(context.data_group),
            dist.get_process_group_ranks(context.model_group),
            limits,
        )
    finally:
        context.close()
        patch.undo()


@pytest.mark.ranks
@pytest.mark.parametrize(("timeout", "limit"), [(45.0, GROUP_TIMEOUT), (700.0, 700.0)])
def test_activations_may_wait_ten_minutes_and_control_as_long_as_asked(
    timeout: float, limit: float
) -> None:
    long, short = timedelta(seconds=limit), timedelta(seconds=timeout)
    expected = [
        ("gloo", None, long),
        ("same", [0, 2], long),
        ("same", [1, 3], long),
        ("same", [0, 1], long),
        ("same", [2, 3], long),
        ("gloo", [0, 1, 2, 3], short),
        ("gloo", [0, 1, 2, 3], timedelta(days=30)),
    ]
    for rank, place in enumerate(run(place_of, 4, 2, timeout)):
        columns, coordinates, data_group, model_group, limits = place
        assert columns == ((0, 1), (2, 3))[rank % 2]
        assert coordinates == (rank // 2, rank % 2)
        assert data_group == [rank % 2, rank % 2 + 2]
        assert model_group == [rank - rank % 2, rank - rank % 2 + 1]
        assert limits == expected  # in one order on every rank


def place_without_local_rank(rank: int) -> tuple[Environment, int]:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    context = init_parallel(Config(run=RunConfig(device="cpu", threads=1)))
    try:
        return context.environment, context.threads
    finally:
        context.close()


@pytest.mark.ranks
def test_ranks_without_local_rank_number_themselves_by_host() -> None:
    for rank, (environment, _) in enumerate(run(place_without_local_rank, 2)):
        assert environment.knows_host
        assert (environment.local_rank, environment.local_world_size) == (rank, 2)


@pytest.mark.parametrize(("users", "expected"), [(None, "1"), ("0", "0")])
def test_nccl_gets_a_stream_of_high_priority_unless_the_user_set_it(
    monkeypatch, users: str | None, expected: str
) -> None:
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY", raising=False)
    if users is not None:
        monkeypatch.setenv("TORCH_NCCL_HIGH_PRIORITY", users)
    seen: list[str | None] = []
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda *args, **options: seen.append(os.environ.get("TORCH_NCCL_HIGH_PRIORITY")),
    )
    monkeypatch.setattr(dist, "new_group", lambda *args, **options: None)
    monkeypatch.setattr(DeviceMesh, "from_group", lambda *args, **options: None)
    place = ParallelContext(Environment(0, 2), torch.device("cuda:0"), (0,), column_ranks=2)
    place.backend = "nccl"
    _make_groups(place, store=dist.HashStore())
    assert seen == [expected]  # before the first group, which reads it
