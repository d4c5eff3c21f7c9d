"""Random configurations, shapes, files and kills."""

import dataclasses
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ranks import process_group
from ranks import run as run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz
import soak

from alexnet_mp import Config, preset
from alexnet_mp.config import DataConfig, ModelConfig, RecipeConfig, RunConfig
from alexnet_mp.data import Store
from alexnet_mp.data.decode import read_image
from alexnet_mp.data.store_writer import StoreWriter
from alexnet_mp.parallel.exchange import GroupLink
from alexnet_mp.training import checkpoint

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 64), max_size=9),
    st.sampled_from(["cpu", "plateau", "half", "2012", "conv3", "he"]),
)
FIELDS = [
    field.name
    for part in (ModelConfig, DataConfig, RecipeConfig, RunConfig)
    for field in dataclasses.fields(part)
]


@QUICK
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_a_configuration_is_refused_or_comes_back_from_its_dictionary(
    changes: dict,
) -> None:
    values = preset("paper").to_dict()
    for name, value in changes.items():
        part = next(part for part in ("model", "data", "recipe", "run") if name in values[part])
        values[part][name] = value
    try:
        config = Config.from_dict(values)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal and "\n" not in refusal
        return
    again = Config.from_dict(config.to_dict())
    assert repr(again) == repr(config)  # by repr, in which nan equals nan


@QUICK
@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**40), 2**40),
            st.floats(allow_nan=False),
            st.text(max_size=8),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=12,
    ),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_any_plain_state_that_is_saved_comes_back(tmp_path, state, shape: list[int]) -> None:
    path = tmp_path / "last.pt"
    content = {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "config": {},
        "model": {"w": torch.rand(shape)},
        "velocity": {},
        "loop": {"state": state},
        "data": {"classes": [], "images": []},
    }
    checkpoint.write_atomically(path, content)
    back = checkpoint.read(path)
    assert back["loop"] == content["loop"] and torch.equal(
        back["model"]["w"], content["model"]["w"]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@QUICK
@given(
    st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 32),
    st.sampled_from(["PNG", "JPEG", "TIFF"]),
)
def test_an_image_of_any_mode_and_shape_is_read_as_its_center_square(
    tmp_path, mode: str, width: int, height: int, side: int, kind: str
) -> None:
    path = tmp_path / "image"
    try:
        Image.new(mode, (width, height)).save(path, kind)
    except (OSError, KeyError):  # a mode that this format has not
        return
    image = read_image(path, side)
    least = min(side, width, height)
    assert image.shape == (3, least, least) and image.dtype == np.uint8 and image.flags.c_contiguous


@QUICK
@given(
    st.sampled_from(
        [
            "format",
            "version",
            "classes",
            "shards",
            "checksums",
            "encode",
            "files",
            "sizes",
            "skipped",
        ]
    ),
    VALUES,
    st.booleans(),
)
def test_a_changed_header_is_refused_in_one_line_or_the_store_opens(
    tmp_path, key: str, value: object, gone: bool
) -> None:
    store = tmp_path / "store"
    if not store.exists():
        with StoreWriter(store, ["a", "b"]) as writer:
            for label in (0, 1):
                writer.add(np.full((3, 4, 4), label, np.uint8), label)
        (tmp_path / "whole.json").write_bytes((store / "header.json").read_bytes())
    header = json.loads((tmp_path / "whole.json").read_text())
    header = (
        {name: old for name, old in header.items() if name != key}
        if gone
        else header | {key: value}
    )
    (store / "header.json").write_text(json.dumps(header))
    refusal = None
    try:
        opened = Store.open(store)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert opened.gather([1]).max() == 1
    else:
        assert str(store) in refusal and "\n" not in refusal


def exchanged(rank: int, shapes: list[tuple[tuple[int, ...], bool]]) -> list[tuple[bool, bool]]:
    """For every shape: (the peer's tensor arrived exactly, its gradient came back exactly)."""
    with process_group():
        import torch.distributed as dist

        link, results = GroupLink(dist.group.WORLD), []
        for number, (shape, sliced) in enumerate(shapes):
            whole = [
                torch.rand(
                    (shape[0], 2 * shape[1], *shape[2:]),
                    generator=torch.Generator().manual_seed(2 * number + r),
                )
                for r in (0, 1)
            ]
            # a slice is not contiguous: gloo itself would send it wrong, without an error
            x = [
                (w[:, ::2] if sliced else w[:, : shape[1]].contiguous()).requires_grad_()
                for w in whole
            ]
            (others,) = link.start_exchange("conv3", [x[rank]])()
            factor = 2.0 + rank
            (others * factor).sum().backward()
            gradient = x[rank].grad if x[rank].is_leaf else None
            results.append(
                (
                    torch.equal(others, x[1 - rank]),
                    gradient is None
                    or torch.equal(gradient, torch.full_like(gradient, 3.0 - rank)),
                )
            )
        return results


def test_tensors_of_any_shape_are_exchanged_exactly() -> None:
    draw = random.Random(0)
    shapes = [
        (
            (draw.randint(1, 5), draw.randint(1, 7), *[draw.randint(1, 6)] * draw.choice((0, 2))),
            draw.random() < 0.5,
        )
        for _ in range(60)
    ]
    shapes.append(((160, 32, 32, 32), True))  # 21 MB: more than any socket's buffer holds
    for results in run_ranks(exchanged, 2, shapes):
        assert [
            shape for shape, result in zip(shapes, results, strict=True) if result != (True, True)
        ] == []


@pytest.mark.parametrize("reader", fuzz.READERS.values(), ids=fuzz.READERS)
def test_mutated_files_give_the_documented_errors_only(reader: fuzz.Reader, tmp_path) -> None:
    with warnings.catch_warnings():
        outcomes, wrong, megabytes = fuzz.fuzz(reader, 120, seed=2, folder=tmp_path)
    assert wrong == [] and megabytes < fuzz.MEGABYTES
    if "sums.npz" in reader.name:
        assert set(outcomes) == {
            "bytes: read",
            "resealed: read",
            "altered: read",
        }  # damaged sums are measured again
    else:
        assert all(
            outcomes[f"{kind}: refused"] > 5 for kind in ("bytes", "resealed", "altered")
        )  # the damage does reach the reader


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.faults
def test_random_kills_lose_nothing(tmp_path) -> None:
    kills, _, lost = soak.soak(3, 2, seed=3, folder=tmp_path)
    assert kills == 3 and lost == 0
