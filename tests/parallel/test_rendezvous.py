"""Which rank does what, decided before any work and refused in one line."""

import pytest
import torch

from alexnet_mp.parallel.context import choose_column_ranks
from alexnet_mp.parallel.devices import choose_device
from alexnet_mp.parallel.launcher import Environment

LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_plain_start_is_one_rank() -> None:
    assert Environment.read({}) == Environment(0, 1)


def test_torchruns_variables_are_the_place() -> None:
    assert Environment.read(LAUNCHED) == Environment(1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE=None"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"RANK": "2"}, "RANK=2 but WORLD_SIZE=2"),
        ({"MASTER_ADDR": None}, "no MASTER_ADDR"),
        ({"MASTER_PORT": None}, "no MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_half_an_environment_is_refused_with_the_way_out(change: dict, words: str) -> None:
    variables = {name: value for name, value in (LAUNCHED | change).items() if value is not None}
    with pytest.raises(ValueError, match=words) as caught:
        Environment.read(variables)
    assert "torchrun --nproc_per_node=2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "ranks", "share"),
    [
        (2, 1, 1),
        (2, 2, 2),
        (2, 4, 2),
        (2, 6, 2),
        (4, 2, 2),
        (4, 4, 4),
        (4, 8, 4),
        (4, 6, 2),
        (1, 1, 1),
        (1, 3, 1),
    ],
)
def test_a_copy_takes_the_most_ranks_that_columns_and_world_allow(
    columns: int, ranks: int, share: int
) -> None:
    assert choose_column_ranks(columns, ranks) == share


@pytest.mark.parametrize(
    ("columns", "ranks", "words"),
    [
        (2, 3, "1 or a multiple of 2"),
        (4, 3, "1 or a multiple of 2 or 4"),
        (2, 5, "1 or a multiple of 2"),
    ],
)
def test_ranks_that_cannot_share_the_columns_are_refused_with_the_sizes_that_work(
    columns: int, ranks: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        choose_column_ranks(columns, ranks)


def test_data_parallelism_has_to_be_asked_for() -> None:
    assert choose_column_ranks(2, 3, asked=1) == 1
    with pytest.raises(ValueError, match="--column-ranks 3: 2 columns divide among 1, 2 ranks"):
        choose_column_ranks(2, 3, asked=3)
    with pytest.raises(ValueError, match="multiple of 2"):
        choose_column_ranks(2, 3, asked=2)


def on_a_machine(monkeypatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "device"),
    [
        (0, 1, "cpu"),
        (1, 0, "cuda:0"),
        (1, 1, "cuda:0"),
        (2, 0, "cuda:0"),
        (2, 1, "cuda:1"),
        (8, 1, "cuda:1"),
    ],
)
def test_each_rank_takes_its_own_gpu_or_shares_the_only_one(
    monkeypatch, gpus: int, local_rank: int, device: str
) -> None:
    on_a_machine(monkeypatch, gpus)
    assert choose_device("auto", Environment(local_rank, 2, local_rank, 2)) == torch.device(device)


def test_fewer_gpus_than_ranks_is_one_line_with_the_ways_out(monkeypatch) -> None:
    on_a_machine(monkeypatch, 2)
    with pytest.raises(ValueError, match="4 ranks on this host but 2 GPUs: use --nproc_per_node=2"):
        choose_device("cuda", Environment(3, 4, 3, 4))


def test_a_device_that_is_not_there_is_refused(monkeypatch) -> None:
    on_a_machine(monkeypatch, 0)
    with pytest.raises(ValueError, match="--device cuda: this rank sees no CUDA device"):
        choose_device("cuda", Environment())
    with pytest.raises(ValueError, match="--device mps: this machine has no MPS"):
        choose_device("mps", Environment())


def test_apples_gpu_serves_one_rank_only(monkeypatch) -> None:
    on_a_machine(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", Environment()).type == "mps"
    assert choose_device("auto", Environment(0, 2, 0, 2)).type == "cpu"
    with pytest.raises(ValueError, match="MPS serves one rank only"):
        choose_device("mps", Environment(0, 2, 0, 2))
