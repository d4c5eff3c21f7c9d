"""The environment that a launcher sets, or half of it."""

import pytest

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
    "missing", [["LOCAL_RANK"], ["LOCAL_WORLD_SIZE"], ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]]
)
def test_without_local_variables_the_host_is_not_known_yet(missing: list[str]) -> None:
    variables = {name: value for name, value in LAUNCHED.items() if name not in missing}
    environment = Environment.read(variables)
    assert not environment.knows_host
    assert (environment.rank, environment.world_size) == (1, 2)


def test_one_rank_knows_its_host_without_local_variables() -> None:
    environment = Environment.read({"RANK": "0", "WORLD_SIZE": "1"})
    assert environment == Environment() and environment.knows_host


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE=None"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=''"),
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
