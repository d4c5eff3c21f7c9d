"""Whole runs on generated images: equal on two ranks and one, resumed or not, with all files."""

import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import RanksFailed
from ranks import run as run_ranks
from small_nets import SMALL

import alexnet_mp
from alexnet_mp import AlexNet, Config
from alexnet_mp.cli.flags import UsageError
from alexnet_mp.cli.parser import parse_train
from alexnet_mp.parallel.rendezvous import code_version
from alexnet_mp.training import checkpoint, run_messages
from alexnet_mp.training import trainer as trainer_module
from alexnet_mp.training.metrics import Scores
from alexnet_mp.training.run import run
from alexnet_mp.training.trainer import NonFiniteError


def history(out: Path) -> list[dict]:
    """history.jsonl without what the clock says."""
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k}
        for line in (out / "history.jsonl").read_text().splitlines()
    ]


def one(out: Path, config: Config = SMALL, **changes) -> dict:
    return run(config.with_fields(out=str(out), **changes))


def on_rank(rank: int, config: Config) -> dict:
    return run(config)


def two(out: Path, config: Config = SMALL, ranks: int = 2, **changes) -> dict:
    # Two compilers on busy cores take minutes.
    return run_ranks(on_rank, ranks, config.with_fields(out=str(out), **changes), timeout=270)[0]


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.read(path)
    return content["model"] | {
        f"velocity {name}": value for name, value in content["velocity"].items()
    }


def assert_equal_files(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of one process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    one(out)
    return out


def test_a_run_writes_its_files(finished) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "best.pt",
        "config.json",
        "curves.png",
        "history.jsonl",
        "last.pt",
        "result.json",
    ]
    result = json.loads((finished / "result.json").read_text())
    assert list(result) == [
        "test_loss",
        "top1",
        "top5",
        "best_epoch",
        "epochs",
        "steps",
        "seconds",
        "images_per_second",
        "ranks",
        "device",
        "precision",
        "validation",
        "exchange",
    ]
    assert (result["epochs"], result["steps"], result["ranks"], result["device"]) == (
        3,
        9,
        1,
        "cpu",
    )
    assert (
        result["exchange"]["values_per_image"] == {} and 0 <= result["top1"] <= result["top5"] <= 1
    )
    lines = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert list(lines[0]) == [
        "epoch",
        "step",
        "lr",
        "train_loss",
        "train_top1",
        "val_loss",
        "val_top1",
        "val_top5",
        "grad_norm",
        "images_per_second",
        "seconds",
    ]
    assert [line["epoch"] for line in lines] == [1, 2, 3] and [line["step"] for line in lines] == [
        3,
        6,
        9,
    ]
    assert (
        Config.from_dict(json.loads((finished / "config.json").read_text())["config"]).recipe
        == SMALL.recipe
    )


@pytest.mark.ranks
def test_two_ranks_train_exactly_as_one_device_does(finished, tmp_path) -> None:
    result = two(tmp_path / "run")
    ours, theirs = history(tmp_path / "run"), history(finished)
    for mine, other in zip(ours, theirs, strict=True):
        norm, other_norm = mine.pop("grad_norm"), other.pop("grad_norm")
        assert norm == pytest.approx(
            other_norm, rel=1e-6
        )  # a sum over ranks of sums over columns: another order
        assert mine == other  # everything else bit for bit: own half plus peers' half everywhere
    assert_equal_files(tmp_path / "run" / "last.pt", finished / "last.pt")
    # An image is sent once, to one peer: 6 maps of 3x3, 4 values after pool5, 24, 12 classes.
    assert result["exchange"]["values_per_image"] == {
        "conv3": 6 * 9,
        "fc6": 4,
        "fc7": 24,
        "fc8": 12,
    }
    assert result["exchange"]["values_per_image_backward"] == {
        "conv3": 6 * 9,
        "fc6": 4,
        "fc7": 24,
        "fc8": 0,
    }
    assert result["exchange"]["bytes_per_step"] == 32 * 4 * (2 * (54 + 4 + 24) + 12)


@pytest.mark.ranks
def test_four_ranks_as_two_copies_train_as_one_device_to_rounding(finished, tmp_path) -> None:
    result = two(tmp_path / "run", ranks=4)
    for mine, other in zip(history(tmp_path / "run"), history(finished), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)  # float32 sums over rows in another order
    assert result["exchange"]["values_per_image"]["conv3"] == 6 * 9


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler for a CPU")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # torch.compile looks at it itself
def test_two_compiled_ranks_train_as_one_device_to_rounding(tmp_path) -> None:
    # Whole batches: each other size is compiled once more, and two cold compilers take minutes.
    sizes = {"limit_train": 64, "limit_val": 32, "limit_test": 32}
    one(tmp_path / "one", epochs=1, **sizes)
    result = two(tmp_path / "two", compile=True, epochs=1, **sizes)
    assert history(tmp_path / "two")[0] == pytest.approx(
        history(tmp_path / "one")[0], rel=1e-4
    )  # fused operations round otherwise
    assert result["exchange"]["values_per_image"] == {
        "conv3": 6 * 9,
        "fc6": 4,
        "fc7": 24,
        "fc8": 12,
    }


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::UserWarning")  # Inductor's advice on TF32 and small GPUs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own, in Inductor's imports
def test_a_run_replayed_as_cuda_graphs_trains_as_one_that_is_not(tmp_path) -> None:
    for name, graphs in (("plain", False), ("graphs", True)):
        one(tmp_path / name, device="cuda", cuda_graphs=graphs)
    for mine, other in zip(history(tmp_path / "graphs"), history(tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(other, rel=1e-3)  # float32, convolutions chosen anew


def test_cuda_graphs_on_a_cpu_are_refused_before_the_images_are_read(tmp_path) -> None:
    with pytest.raises(
        ValueError,
        match="--cuda-graphs: cpu has none; leave the flag out, or give --compile instead",
    ):
        one(tmp_path / "run", device="cpu", cuda_graphs=True, data="folder", data_dir="/none")


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    finished, tmp_path, steps: int
) -> None:
    out = tmp_path / "run"
    one(out, max_steps=steps)  # within the first epoch, at its end, within the second
    one(out, resume=str(out / "last.pt"))
    assert history(out) == history(finished)
    assert_equal_files(out / "last.pt", finished / "last.pt")
    assert_equal_files(out / "best.pt", finished / "best.pt")


@pytest.mark.ranks
def test_one_device_and_two_ranks_continue_each_others_runs(finished, tmp_path) -> None:
    out = tmp_path / "run"
    one(out, max_steps=4)
    two(out, resume=str(out / "last.pt"), max_steps=7)
    one(out, resume=str(out / "last.pt"))
    assert_equal_files(out / "last.pt", finished / "last.pt")


@pytest.mark.ranks
def test_a_run_goes_on_with_more_ranks_and_in_more_parts(finished, tmp_path) -> None:
    out = tmp_path / "run"
    one(out, max_steps=2, accumulate=4)
    result = two(out, ranks=4, resume=str(out / "last.pt"), column_ranks=1, accumulate=2)
    for mine, other in zip(history(out), history(finished), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)  # DESIGN's float32: sums in other orders
    ours, theirs = weights(out / "last.pt"), weights(finished / "last.pt")
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-4 * value.abs().max()), name
    assert result["ranks"] == 4 and result["exchange"]["values_per_image"] == {}


@pytest.mark.ranks
def test_more_parts_than_images_are_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="--accumulate 33: a batch of 32 images has at most 32 parts that are not"
    ):
        one(tmp_path / "run", accumulate=33)
    words = "--accumulate 9: a batch of 32 images, 8 for each of 4 data ranks, has at most 8 parts"
    with pytest.raises(RanksFailed, match=words):
        two(tmp_path / "run", ranks=4, column_ranks=1, accumulate=9)


def test_rates_that_follow_the_batch_are_those_of_training(tmp_path, capsys) -> None:
    out, trainers = tmp_path / "run", []
    flags = {"lr_scale": "linear", "batch_size": 64, "accumulate": 2}
    config = SMALL.with_fields(out=str(out), epochs=1, schedule="constant", **flags)
    run(config, trainers.append)
    assert trainers[0].gradient.parts == 2
    printed = capsys.readouterr().out
    assert "batch 64 in 2 parts\n" in printed
    assert "batch 64, where preset demo has 32: learning rates times 2: --lr 0.04\n" in printed
    assert json.loads((out / "config.json").read_text())["rates"] == {"factor": 2.0, "lr": 0.04}
    assert history(out)[0]["lr"] == 0.04


def test_a_resume_into_another_folder_takes_the_best_weights_along(finished, tmp_path) -> None:
    one(tmp_path / "first", max_steps=5)
    one(tmp_path / "second", resume=str(tmp_path / "first" / "last.pt"))
    assert_equal_files(tmp_path / "second" / "best.pt", finished / "best.pt")
    (tmp_path / "first" / "best.pt").unlink()
    with pytest.raises(
        ValueError, match="best weights so far, of epoch 1, should be beside the checkpoint"
    ):
        one(tmp_path / "third", resume=str(tmp_path / "first" / "last.pt"))


def test_max_steps_before_the_first_epochs_end_tests_the_current_weights(tmp_path) -> None:
    result = one(tmp_path / "run", max_steps=2)
    assert result["best_epoch"] is None and result["steps"] == 2
    assert not (tmp_path / "run" / "best.pt").exists() and history(tmp_path / "run") == []


def test_the_result_is_of_the_best_weights_not_of_the_last(finished) -> None:
    losses = [line["val_loss"] for line in history(finished)]
    result = json.loads((finished / "result.json").read_text())
    assert result["best_epoch"] == losses.index(min(losses)) + 1
    assert checkpoint.read(finished / "best.pt")["loop"]["epoch"] == result["best_epoch"]


def test_a_matplotlib_that_does_not_work_costs_the_picture_only(
    tmp_path, monkeypatch, capsys
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to process string with tex")

    monkeypatch.setattr("alexnet_mp.plotting.curves.draw_curves", broken)
    one(tmp_path / "run", epochs=1)
    assert (
        "curves.png could not be drawn: Failed to process string with tex"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "result.json").exists()


def test_a_folder_with_another_run_is_not_overwritten(finished) -> None:
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run's last.pt.*--resume"):
        one(finished)
    assert (finished / "last.pt").read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(finished) -> None:
    with pytest.raises(
        ValueError, match=r"--data-dir .*last.pt was trained on other data, \[72, 30, 40\] images"
    ):
        one(finished, resume=str(finished / "last.pt"), limit_train=71)


@pytest.mark.parametrize("train", [one, pytest.param(two, marks=pytest.mark.ranks)])
def test_an_infinite_loss_stops_all_ranks_and_keeps_the_weights(tmp_path, train) -> None:
    error = RanksFailed if train is two else NonFiniteError
    with pytest.raises(
        error, match=r"step \d+ \(epoch \d\): .* is not finite, so the step was not taken"
    ):
        train(tmp_path / "run", lr=1e20)
    assert all(
        torch.isfinite(value).all()
        for value in checkpoint.read(tmp_path / "run" / "last.pt")["model"].values()
    )


@pytest.mark.ranks
def test_ranks_that_were_given_different_flags_are_told_so(tmp_path) -> None:
    with pytest.raises(
        RanksFailed, match="rank 1 differs from rank 0 in --seed: 0 on rank 0, 1 on rank 1"
    ):
        run_ranks(with_own_seed, 2, SMALL.with_fields(out=str(tmp_path / "run")))


def with_own_seed(rank: int, config: Config) -> dict:
    return run(config.with_fields(seed=rank))


def test_a_run_that_was_stopped_within_a_validation_continues_with_it(tmp_path) -> None:
    config = SMALL.with_fields(limit_val=50)  # two batches: it can be left between them
    out, whole, epochs = tmp_path / "run", tmp_path / "whole", []
    one(whole, config)

    def stop_in_the_second_validation(trainer) -> None:
        def evaluate(*arguments, **options):
            epochs.append(trainer.epoch)
            trainer.stop_requested = len(epochs) == 2
            return original(*arguments, **options)

        original = trainer_module.evaluate
        monkeypatch.setattr(trainer_module, "evaluate", evaluate)

    with pytest.MonkeyPatch.context() as monkeypatch:
        result = run(config.with_fields(out=str(out)), stop_in_the_second_validation)
    assert (
        result == {"stopped": True, "out": str(out)}
        and checkpoint.read(out / "last.pt")["loop"]["batch"] == 3
    )
    one(out, config, resume=str(out / "last.pt"))
    assert history(out) == history(whole)  # the rate of the epoch's last step too
    assert_equal_files(out / "last.pt", whole / "last.pt")


def test_saving_every_step_and_keeping_epochs_changes_no_result(finished, tmp_path) -> None:
    out = tmp_path / "run"
    one(out, save_every=1, keep_checkpoints=2, max_steps=5)
    one(out, save_every=1, keep_checkpoints=2, resume=str(out / "last.pt"))
    assert history(out) == history(finished)
    assert_equal_files(out / "last.pt", finished / "last.pt")
    assert [path.name for path in checkpoint.epoch_files(out)] == ["epoch-0003.pt", "epoch-0002.pt"]
    assert checkpoint.read(out / "epoch-0002.pt")["loop"]["step"] == 6


def test_a_resume_makes_the_files_that_a_kill_left_out(finished, tmp_path) -> None:
    out = tmp_path / "run"
    one(out, keep_checkpoints=2, epochs=1)
    for name in ("best.pt", "epoch-0001.pt"):
        (out / name).unlink()
    one(out, keep_checkpoints=2, resume=str(out / "last.pt"), epochs=2)
    assert [path.name for path in checkpoint.epoch_files(out)] == ["epoch-0002.pt", "epoch-0001.pt"]
    assert_equal_files(
        out / "best.pt", out / f"epoch-000{checkpoint.read(out / 'best.pt')['loop']['epoch']}.pt"
    )


def test_a_damaged_last_checkpoint_is_refused_with_the_one_to_go_back_to(tmp_path) -> None:
    out = tmp_path / "run"
    one(out, keep_checkpoints=3)
    for name in ("last.pt", "epoch-0003.pt", "best.pt"):
        (out / name).unlink()
        (out / name).write_bytes(b"damaged")
    with pytest.raises(
        UsageError,
        match=r"last.pt: not a readable checkpoint.*newest good one is .*epoch-0002.pt, of step 6",
    ):
        parse_train(["--out", str(out), "--resume"])


def train_in_a_folder_of_its_own(rank: int, folder: str, config: Config) -> dict:
    """A rank on a node that does not share --out."""
    own = Path(folder) / f"node{rank}"
    own.mkdir()
    os.chdir(own)
    return run(config)


@pytest.mark.ranks
def test_ranks_that_do_not_share_the_folder_test_the_best_weights(finished, tmp_path) -> None:
    config = SMALL.with_fields(out="run")
    results = run_ranks(train_in_a_folder_of_its_own, 2, str(tmp_path), config, timeout=120)
    expected = json.loads((finished / "result.json").read_text())["test_loss"]
    assert [result["test_loss"] for result in results] == [expected, expected]
    assert (tmp_path / "node0" / "run" / "result.json").exists()
    assert not (tmp_path / "node1" / "run").exists()


@pytest.mark.ranks
def test_each_rank_is_introduced_with_its_columns_and_its_batch(tmp_path, capfd) -> None:
    config = SMALL.with_fields(epochs=0)
    one(tmp_path / "one", config)
    parameters = sum(p.numel() for p in AlexNet(config.with_fields(classes=12).model).parameters())
    assert (
        f"rank 0: columns 0 and 1; {parameters:,} parameters; batch 32\n" in capfd.readouterr().out
    )
    two(tmp_path / "four", config, ranks=4)
    lines = [
        line for line in capfd.readouterr().out.splitlines() if line.startswith("[rank 0] ranks")
    ]
    shares = [int(re.search(r"([\d,]+) parameters", line)[1].replace(",", "")) for line in lines]
    assert sum(shares) == parameters
    assert lines == [
        f"[rank 0] ranks {ranks}: column {column}; {share:,} parameters; batch 16 of 32"
        for column, (ranks, share) in enumerate(zip(("0 and 2", "1 and 3"), shares, strict=True))
    ]


def test_more_epochs_at_resume_say_what_they_do_to_a_cosine(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    config = SMALL.with_fields(epochs=2, schedule="cosine")
    one(out, config)
    assert "schedule is scaled" not in capsys.readouterr().out
    one(out, config, resume=str(out / "last.pt"), epochs=6)
    rates = [record["lr"] for record in history(out)]
    said = re.search(
        r"cosine schedule is scaled to --epochs, now 6 instead of 2: the learning rate goes "
        r"from (\S+) to (\S+)\n",
        capsys.readouterr().out,
    )
    assert float(said[1]) == pytest.approx(rates[1], rel=1e-2)
    assert float(said[2]) == pytest.approx(0.02 * (1 + math.cos(math.pi / 3)) / 2, rel=1e-2)


def test_config_json_names_version_and_digest_of_the_code(finished) -> None:
    environment = json.loads((finished / "config.json").read_text())["environment"]
    assert environment["alexnet_mp"] == alexnet_mp.__version__
    assert environment["code"] == code_version()


def test_a_lost_screen_ends_no_run_and_lines_come_after_the_saving(tmp_path, monkeypatch) -> None:
    saved = []

    class LostScreen(io.StringIO):
        def write(self, text: str) -> int:
            if text.lstrip().startswith("1 "):  # the line of the first epoch
                saved.append(checkpoint.read(tmp_path / "run" / "last.pt")["loop"]["epoch"])
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", LostScreen())
    result = one(tmp_path / "run", epochs=2)
    assert result["epochs"] == 2 and (tmp_path / "run" / "result.json").exists()
    assert saved == [1]


def test_the_result_says_where_its_validation_images_came_from(finished) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["validation"] == "own split"
    found = Scores(loss=1.0, top1=0.5, top5=1.0, images=40)
    line = run_messages.scores(found, 3, 10, "test images")
    assert line == (
        "test: loss 1.0000, accuracy 50.00%, top-5 100.00% "
        "(40 images, weights of epoch 3, which these images chose)"
    )
    assert "chose" not in run_messages.scores(found, 3, 10, "own split")
