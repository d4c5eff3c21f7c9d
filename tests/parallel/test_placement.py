"""How many ranks share a copy of the network, and that a copy stays on one host."""

import pytest

from alexnet_mp.parallel.placement import choose_column_ranks, spanning_copy


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
def test_ranks_that_cannot_share_the_columns_are_refused(
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


@pytest.mark.parametrize(
    ("columns", "hosts", "share"),
    [
        (2, "aabb", 2),
        (2, "aaaabb", 2),
        (4, "aabb", 2),  # two columns a rank, so that no copy spans hosts
        (4, "aaaabbbb", 4),
        (4, "aaaaaabb", 2),
    ],
)
def test_a_copy_stays_on_one_host(columns: int, hosts: str, share: int) -> None:
    assert choose_column_ranks(columns, len(hosts), hosts=hosts) == share
    assert spanning_copy(hosts, share) == ()


@pytest.mark.parametrize(
    ("columns", "hosts", "share"), [(2, "ab", 2), (2, "abcd", 2), (4, "ab", 2)]
)
def test_hosts_of_one_rank_each_share_a_copy(columns: int, hosts: str, share: int) -> None:
    assert choose_column_ranks(columns, len(hosts), hosts=hosts) == share
    assert spanning_copy(hosts, share) == (0, 1)


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (["a 1"] * 3 + ["b 1"] * 3, "ranks 2 and 3 share one copy .* on hosts a and b"),
        (["a", "b"] * 2, "ranks 0 and 1 .*srun --distribution=block"),
        (["a"] * 3 + ["b"], "start a multiple of 2 ranks on each host"),
    ],
)
def test_a_copy_that_need_not_span_hosts_is_refused_unless_asked_for(
    hosts: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        choose_column_ranks(2, len(hosts), hosts=hosts)
    assert "\n" not in str(caught.value)
    assert choose_column_ranks(2, len(hosts), asked=2, hosts=hosts) == 2
    assert choose_column_ranks(2, len(hosts), asked=1, hosts=hosts) == 1
