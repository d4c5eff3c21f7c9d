"""One file holds the whole network at any placement; damaged and hostile files are refused."""

import os
import random
import resource
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from alexnet_mp import AlexNet, preset
from alexnet_mp.config.files import temporary_path
from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.training import checkpoint
from alexnet_mp.training.sgd2012 import build_optimizer, velocity_of

CONFIG = preset("demo").with_fields(kernels=(4, 4, 4, 4, 4), hidden=(6, 5), classes=3)


def stepped(seed: int = 0):
    """A small network and its optimizer after one step, so that velocities are not zero."""
    model = AlexNet(CONFIG.model, seed=seed)
    optimizer = build_optimizer(model, CONFIG.recipe)
    model(
        torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(1))
    ).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(path: Path, model, optimizer, loop: dict | None = None, **more) -> None:
    place = ParallelContext(Environment(), torch.device("cpu"), (0, 1))
    checkpoint.save(
        path,
        place,
        model,
        optimizer,
        CONFIG,
        loop or {"step": 1},
        {"classes": ["a", "b", "c"], "images": [1, 1, 1]},
        **more,
    )


def test_weights_velocities_and_loop_come_back(tmp_path) -> None:
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer)
    content = checkpoint.read(tmp_path / "last.pt")
    other, its_optimizer = stepped(seed=1)
    checkpoint.load_model(content, other)
    checkpoint.load_velocity(content, other, its_optimizer)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(velocity_of(optimizer, mine), velocity_of(its_optimizer, theirs))
    assert content["loop"] == {"step": 1} and content["data"]["classes"] == ["a", "b", "c"]


def test_one_column_reads_its_part_of_the_whole_file(tmp_path) -> None:
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer)
    half = AlexNet(CONFIG.model, columns=(1,), link=object())
    checkpoint.load_model(checkpoint.read(tmp_path / "last.pt"), half)
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in half.state_dict().items()
    )


def test_best_is_the_same_file_and_stays_when_last_goes_on(tmp_path) -> None:
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer, links=(tmp_path / "best.pt",))
    first = (tmp_path / "best.pt").read_bytes()
    optimizer.step()
    save(tmp_path / "last.pt", model, optimizer)
    assert (tmp_path / "best.pt").read_bytes() == first != (tmp_path / "last.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_a_file_system_without_hard_links_gets_a_copy(tmp_path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer, links=(tmp_path / "best.pt",))
    both = [checkpoint.read(tmp_path / name)["model"] for name in ("last.pt", "best.pt")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch) -> None:
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer)
    before = (tmp_path / "last.pt").read_bytes()

    def half_written(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(
        OSError,
        match=r"last.pt: the checkpoint could not be written .*No space left.*"
        "the one before it is intact",
    ):
        save(tmp_path / "last.pt", model, optimizer)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    events, sync, rename = [], os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("folder synced" if stat.S_ISDIR(status.st_mode) else status.st_size)
        sync(descriptor)

    def replace(source, target) -> None:
        events.append(f"named {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "last.pt", *stepped(), links=(tmp_path / "best.pt",))
    assert events == [
        (tmp_path / "last.pt").stat().st_size,  # the whole file
        "named last.pt",
        "folder synced",
        "named best.pt",
        "folder synced",
    ]


def test_a_missing_file_and_a_folder_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pt: no such checkpoint"):
        checkpoint.read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="a folder, not a checkpoint; name a file"):
        checkpoint.read(tmp_path)
    (tmp_path / "last.pt").touch()
    with pytest.raises(ValueError, match=r"did you mean .*last\.pt"):
        checkpoint.read(tmp_path)
    (tmp_path / "best.pt").touch()
    with pytest.raises(ValueError, match=r"did you mean .*best\.pt"):
        checkpoint.read(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean .*last\.pt"):  # where a run goes on
        checkpoint.read(tmp_path, usual="last.pt")


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    "damage", ["empty", "html", "truncated", "flipped", "foreign", "hostile", "future"]
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save(path, *stepped())
    good = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "html":
        path.write_text("<!DOCTYPE html><html>not found</html>")
    elif damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "flipped":
        path.write_bytes(good[:-200] + bytes(200))
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    elif damage == "hostile":
        torch.save({"format": Hostile(tmp_path / "executed")}, path)
    elif damage == "future":
        torch.save(dict(checkpoint.read(path), version=99), path)
    with pytest.raises(ValueError, match=r"last\.pt: ") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


def test_another_networks_checkpoint_is_refused_by_its_first_tensor(tmp_path) -> None:
    save(tmp_path / "last.pt", *stepped())
    wider = AlexNet(CONFIG.with_fields(hidden=(6, 7)).model)
    with pytest.raises(
        ValueError,
        match=r"last.pt: columns.0.fc7.weight should be \(7, 12\), the file has \(5, 12\)",
    ):
        checkpoint.load_model(checkpoint.read(tmp_path / "last.pt"), wider, tmp_path / "last.pt")


def same(a, b) -> bool:
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path) -> None:
    path = tmp_path / "last.pt"
    save(path, *stepped())
    good, content = path.read_bytes(), checkpoint.read(path)
    draw, found, tries = random.Random(0), 0, 150
    for _ in range(tries):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.read(path), content)  # padding between the tensors
        except ValueError:
            found += 1
    assert found > tries * 0.5  # torch.load alone finds about one in twelve


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path) -> None:
    path = tmp_path / "last.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match=r"last.pt: .*compressed"):
        checkpoint.read(path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path) -> None:
    os.mkfifo(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last.pt: not a file"):
        checkpoint.read(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("model", None, "model cannot be"),
        ("loop", [], "loop cannot be"),
        ("data", {"classes": 3, "images": []}, "what data"),
        ("velocity", {"x": 1}, "tensors cannot be"),
        ("version", "1", "version '1'"),
        ("format", 5, "not a checkpoint of alexnet_mp"),
    ],
)
def test_parts_of_another_kind_are_named(tmp_path, part: str, value, words: str) -> None:
    path = tmp_path / "last.pt"
    save(path, *stepped())
    torch.save(checkpoint.read(path) | {part: value}, path)
    with pytest.raises(ValueError, match=words):
        checkpoint.read(path)


def test_of_the_epochs_the_newest_stay(tmp_path) -> None:
    model, optimizer = stepped()
    for epoch in range(1, 6):
        save(
            tmp_path / "last.pt",
            model,
            optimizer,
            links=(tmp_path / f"epoch-{epoch:04}.pt",),
            keep=2,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0004.pt",
        "epoch-0005.pt",
        "last.pt",
    ]
    save(
        tmp_path / "last.pt", model, optimizer
    )  # a run that keeps none leaves those of an earlier one alone
    assert len(checkpoint.epoch_files(tmp_path)) == 2


def test_a_damaged_file_is_refused_with_the_newest_good_one_beside_it(tmp_path) -> None:
    model, optimizer = stepped()
    for epoch in range(1, 4):
        save(
            tmp_path / "last.pt",
            model,
            optimizer,
            loop={"step": epoch},
            links=(tmp_path / f"epoch-{epoch:04}.pt",),
            keep=3,
        )
    for name in ("last.pt", "epoch-0003.pt"):  # one file under two names: both go, as on a bad disk
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(
        ValueError,
        match=r"last.pt: not a readable checkpoint.*newest good one is .*epoch-0002.pt, "
        "of step 2: .*--resume",
    ):
        checkpoint.read_to_resume(tmp_path / "last.pt")


def test_the_systems_own_reason_for_a_failed_write_is_given(tmp_path) -> None:
    model, optimizer = stepped()
    save(tmp_path / "last.pt", model, optimizer)
    before = (tmp_path / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"last.pt: the checkpoint could not be written \(File too large\); "
            "the one before it is intact",
        ):
            save(tmp_path / "last.pt", model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before and [
        path.name for path in tmp_path.iterdir()
    ] == ["last.pt"]


def test_a_temporary_of_a_killed_process_is_never_read(tmp_path) -> None:
    stale = tmp_path / temporary_path(tmp_path / "last.pt").name
    stale.write_bytes(b"half a checkpoint")
    save(tmp_path / "last.pt", *stepped())
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.read(tmp_path / "last.pt")


def test_best_becomes_the_file_of_the_best_epoch_wherever_that_is(tmp_path) -> None:
    model, optimizer = stepped()
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    for epoch, batch in ((1, 0), (2, 0), (2, 3)):
        loop = {"step": epoch, "epoch": epoch, "batch": batch}
        links = () if batch else (tmp_path / f"epoch-000{epoch}.pt",)
        save(last, model, optimizer, loop=loop, links=links)
    for wanted in (1, 2):  # best.pt is missing, then of another epoch
        checkpoint.link_best(best, wanted, last)
        assert checkpoint.read(best)["loop"]["epoch"] == wanted
        assert checkpoint.read(best)["loop"]["batch"] == 0
    with pytest.raises(ValueError, match="of epoch 3, should be beside the checkpoint"):
        checkpoint.link_best(best, 3, last)
