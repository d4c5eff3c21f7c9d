"""Ranks that meet: shared hosts, fields that must agree, the backend for all."""

import dataclasses
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alexnet_mp.config import Config, DataConfig, ModelConfig, RecipeConfig, RunConfig
from alexnet_mp.parallel import rendezvous
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.rendezvous import (
    MAY_DIFFER,
    common_fields,
    number_local_ranks,
    shake_hands,
)

CPU = torch.device("cpu")


def new_store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    return store


# --- who shares a host


def places(hosts: list[str]) -> list[tuple[int, int]]:
    """(local rank, local world size) of each rank, all of which have no LOCAL_RANK."""
    numbered = [
        number_local_ranks(Environment(rank, len(hosts), knows_host=False), hosts)
        for rank in range(len(hosts))
    ]
    assert all(environment.knows_host for environment in numbered)
    return [(environment.local_rank, environment.local_world_size) for environment in numbered]


def test_pods_with_one_rank_each_are_hosts_of_their_own() -> None:
    assert places(["pod-0", "pod-1", "pod-2"]) == [(0, 1)] * 3


def test_ranks_of_one_host_are_numbered_in_rank_order() -> None:
    assert places(["a", "a", "b", "b"]) == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert places(["a", "b", "a", "b", "b"]) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_a_launchers_own_numbers_are_kept() -> None:
    environment = Environment(3, 4, 1, 2)
    assert number_local_ranks(environment, ["a"] * 4) is environment


# --- a store that does not answer


def test_a_port_where_nobody_listens_is_told_from_one_that_another_program_has() -> None:
    with socket.socket() as program:
        program.bind(("127.0.0.1", 0))
        port = program.getsockname()[1]
        rank1 = Environment(1, 2, 1, 2, "127.0.0.1", port)
        with pytest.raises(ValueError, match="Connection refused: is rank 0 running there"):
            rendezvous.rendezvous(rank1, timeout=0.5)
        program.listen()
        with pytest.raises(ValueError, match="another program seems to have this port"):
            rendezvous.rendezvous(rank1, timeout=0.5)


# --- what must agree


def test_every_field_must_agree_but_those_that_may_differ() -> None:
    kinds = (ModelConfig, DataConfig, RecipeConfig, RunConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert set(MAY_DIFFER) == {"device", "threads", "workers", "data_dir", "cache_dir"}
    assert set(common_fields(Config())) == names - set(MAY_DIFFER) | {"preset"}


def meet(*configs: Config, **of_rank1: Any) -> list[str]:
    """The backend, or the refusal, of each rank; `of_rank1` changes its handshake."""
    store = new_store()

    def rank(number: int) -> str:
        try:
            return shake_hands(store, Environment(number, len(configs)), CPU, configs[number])
        except ValueError as error:
            return str(error)

    if of_rank1:
        store.set("here/1", json.dumps(of_rank1))
        return [rank(0)]
    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(rank, range(len(configs))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"save_every": 5}, "in --save-every: 0 on rank 0, 5 on rank 1"),
        ({"exchange_precision": "bf16"}, "in --exchange-precision: same on rank 0, bf16 on rank 1"),
        ({"profile": True}, "in --profile: False on rank 0, True on rank 1"),
        ({"seed": 3}, "in --seed: 0 on rank 0, 3 on rank 1"),
        ({"timeout": 5.0}, "in --timeout"),
        ({"epochs": 77}, "in --epochs"),
        ({"hidden": (7, 8)}, "in --hidden"),
        ({"validation_share": 0.3}, "in --validation-share"),
    ],
)
def test_a_rank_with_another_value_is_refused_on_all_ranks(changes: dict, words: str) -> None:
    refusals = meet(Config(), Config(), Config().with_fields(**changes))
    assert len(set(refusals)) == 1
    assert refusals[0].startswith("rank 2 differs from rank 0 ")
    assert words.replace("rank 1", "rank 2") in refusals[0]


@pytest.mark.parametrize(
    "changes",
    [{"threads": 3}, {"workers": 2}, {"device": "cpu"}, {"data_dir": "/local", "cache_dir": "/c"}],
)
def test_each_rank_may_have_its_own_threads_workers_and_folders_of_images(changes: dict) -> None:
    assert meet(Config(), Config().with_fields(**changes)) == ["gloo", "gloo"]


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("device", "cuda", "is a GPU hidden from one of them?"),
        ("torch", "1.0", "torch: "),
        ("code", "0123", "is it installed twice?"),
    ],
)
def test_another_device_or_version_is_named_with_a_hint(name: str, value: str, hint: str) -> None:
    alike = {
        "device": "cpu",
        "torch": torch.__version__,
        "code": rendezvous.code_version(),
        "host": "a",
        "gpu": "",
        "mig": False,
        "config": common_fields(Config()),
    }
    of_rank1 = json.loads(json.dumps(alike | {name: value}))
    (refusal,) = meet(Config(), Config(), **of_rank1)
    assert refusal.startswith(f"rank 1 differs from rank 0 in {name}: ")
    assert f"{value} on rank 1" in refusal and hint in refusal


def test_a_rank_of_another_version_is_refused_by_name() -> None:
    assert meet(Config(), Config(), device="cpu", torch="1.0") == [
        "rank 1 sent an invalid handshake; check that all ranks run the same version"
    ]


# --- which backend


def chosen(asked: str, gpus: list[tuple[str, str]], mig: bool = False) -> str:
    ranks = [{"host": host, "gpu": gpu, "mig": mig} for host, gpu in gpus]
    device = torch.device("cuda:0" if gpus[0][1] else "cpu")
    return rendezvous._choose_backend(asked, device, ranks, prints=True)


OWN, SHARED = [("a", "gpu-0"), ("a", "gpu-1")], [("a", "gpu-0"), ("a", "gpu-0")]
HOSTS, NONE = [("a", "gpu-0"), ("b", "gpu-0")], [("a", ""), ("a", "")]


def test_gpus_of_their_own_exchange_through_nccl(capsys) -> None:
    assert chosen("auto", OWN) == chosen("auto", HOSTS) == chosen("nccl", OWN) == "nccl"
    assert chosen("gloo", OWN) == chosen("auto", NONE) == "gloo"
    assert capsys.readouterr().out == ""


def test_a_shared_gpu_exchanges_through_gloo_and_says_so(capsys) -> None:
    assert chosen("auto", SHARED) == "gloo"
    assert "2 ranks share 1 GPU" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--backend nccl: two ranks share one GPU"):
        chosen("nccl", SHARED)
    with pytest.raises(ValueError, match="--backend nccl: the ranks run on cpu"):
        chosen("nccl", NONE)


def test_slices_of_one_gpu_count_as_sharing_though_their_names_differ(capsys) -> None:
    assert chosen("auto", OWN, mig=True) == "gloo"
    assert "slices of GPUs (MIG)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"slices of GPUs \(MIG\), which NCCL refuses"):
        chosen("nccl", OWN, mig=True)
