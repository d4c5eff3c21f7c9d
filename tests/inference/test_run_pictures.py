"""What the pictures of a finished run show, and the command that draws them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from PIL import Image
from small_nets import SMALL

from alexnet_mp.data import load
from alexnet_mp.inference.finished_run import FinishedRun
from alexnet_mp.inference.neighbors import class_balanced_sample, nearest
from alexnet_mp.inference.run_pictures import draw, kernels
from alexnet_mp.training.run import run


@pytest.mark.parametrize("sizes", [(50,), (7, 7, 7, 7, 7, 7, 7, 1), (1, 49), (20, 0, 30)])
def test_nearest_equals_brute_force_however_the_rows_are_cut(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, rows = (
        torch.randn(4, 64, generator=generator),
        torch.randn(50, 64, generator=generator),
    )
    rows[[9, 30, 44]] = rows[3].clone()  # equally near ones: the first comes first
    rows[20] = queries[1] + 1e-6  # a distance that a matrix product would lose
    distances, numbers = nearest(queries, rows.split(sizes), 6)
    exact = (queries.double()[:, None] - rows.double()[None]).norm(dim=2)
    for q in range(4):
        order = sorted(range(50), key=lambda i, q=q: (exact[q, i].item(), i))[:6]
        assert numbers[q].tolist() == order
        assert distances[q].tolist() == pytest.approx(exact[q, order].tolist(), rel=1e-4)
    assert nearest(queries, rows[:2].split(1), 6)[1].shape == (4, 2)


def test_images_for_a_picture_are_one_of_each_class_before_a_second_of_any() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 3, 1, 20])
    chosen = class_balanced_sample(labels, 9, seed=5)
    assert len(set(chosen.tolist())) == 9
    assert sorted(labels[chosen[:4]]) == [0, 1, 2, 3] and sorted(labels[chosen[4:7]]) == [
        0,
        1,
        3,
    ]  # class 2 has one image only
    assert len(set(labels[chosen[7:]])) == 2
    assert (class_balanced_sample(labels, 9, 5) == chosen).all() and (
        class_balanced_sample(labels, 9, 6) != chosen
    ).any()
    assert sorted(class_balanced_sample(labels, 1000, 5)) == list(range(74))


TWO_EPOCHS = SMALL.with_fields(epochs=2)
FILES = [
    "kernels.png",
    "curves.png",
    "compare.png",
    "samples.png",
    "predictions.png",
    "confusion.png",
    "neighbors.png",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose preprocessing needs the training images' statistics."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(TWO_EPOCHS.with_fields(out=str(out), mean="image-center"))
    return out


def command(*flags: str) -> subprocess.CompletedProcess:
    return start(
        [sys.executable, "launch/figures.py"], *flags, "--threads", "1", PYTHONWARNINGS="error"
    )


def test_the_command_draws_a_finished_runs_pictures_and_says_what_is_to_be_seen(
    finished, tmp_path
) -> None:
    done = command(
        str(finished),
        "--out",
        str(tmp_path / "pictures"),
        "--images",
        "5",
        "--window",
        "9",
        "--compare",
        str(finished),
        "--target",
        "0.5",
        "--json",
        str(tmp_path / "facts.json"),
    )
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / "pictures" / name) for name in FILES
    ]
    assert all((tmp_path / "pictures" / name).stat().st_size > 5000 for name in FILES)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (
        list(facts) == [Path(name).stem for name in FILES]
        and [fact["caption"] in done.stdout for fact in facts.values()] == [True] * 7
    )
    assert [len(scores) for scores in facts["kernels"]["color_selectivity_of_kernels"]] == [4, 4]
    assert facts["curves"]["epochs"] == 2 and facts["predictions"]["images"] == 5
    assert facts["confusion"]["images"] == 40
    assert facts["neighbors"]["searched"] == 72 and facts["neighbors"]["neighbors"] == 30


def test_with_json_on_the_standard_output_nothing_else_is_there_and_pictures_go_into_the_run(
    finished,
) -> None:
    done = command(str(finished), "--json", "-")
    assert done.returncode == 0 and list(json.loads(done.stdout)) == [
        Path(name).stem for name in FILES if name != "compare.png"
    ]
    assert {name for name in FILES if name != "compare.png"} <= {
        path.name for path in finished.iterdir()
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["/none"], "/none/config.json: no such file"),
        (["RUN", "--images", "0"], "--images 0"),
        (["RUN", "--out", "/proc/x"], "--out /proc/x"),
        (["RUN", "--compare", "/none"], "/none/history.jsonl: no such file"),
        (["RUN", "--compare", "RUN", "--key", "nonsense"], "key nonsense"),
        ([], "RUN"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(finished, flags: list[str], words: str) -> None:
    done = command(*[flag.replace("RUN", str(finished)) for flag in flags])
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and words in done.stderr
        and done.stdout == ""
    )


def test_a_run_that_stopped_in_its_first_epoch_has_all_pictures_but_the_curves(tmp_path) -> None:
    run(TWO_EPOCHS.with_fields(out=str(tmp_path / "run"), max_steps=1))
    pictures = list(draw(FinishedRun(tmp_path / "run"), tmp_path / "out", images=2))
    assert [picture.file.name for picture in pictures] == [
        "kernels.png",
        "samples.png",
        "predictions.png",
        "confusion.png",
        "neighbors.png",
    ]


def test_kernels_near_their_random_start_are_said_to_be_expected(finished, tmp_path) -> None:
    opened = FinishedRun(finished)
    words = "noise is expected after a short training"
    assert words in kernels(opened, tmp_path).caption
    with torch.no_grad():
        for column in opened.model.columns.values():  # gray kernels have learned something
            column.conv1.weight.copy_(
                column.conv1.weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
            )
    assert words not in kernels(opened, tmp_path).caption


@pytest.mark.parametrize("stored", [True, False])
def test_the_network_sees_the_images_as_the_runs_test_did(finished, stored: bool) -> None:
    """Whether the checkpoint has the statistics of the training images or, being old, has not."""
    opened = FinishedRun(finished)
    assert opened.network.statistics is not None
    if not stored:
        opened.network = replace(opened.network, statistics=None)
    splits = load(opened.config.data, 0, side=opened.config.data.resized_side(67))
    logits = torch.cat([logits for logits, _ in opened.logits_and_fc7(splits.test, "")])
    top1 = (logits.argmax(1).numpy() == splits.test.labels).mean()
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(splits.test.labels))
    result = json.loads((finished / "result.json").read_text())
    assert top1 == result["top1"] and loss.item() == pytest.approx(result["test_loss"], rel=1e-6)


def test_images_of_other_classes_are_refused(finished, tmp_path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (70, 70), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    opened = FinishedRun(finished, data_dir=str(tmp_path))
    opened.config = opened.config.with_fields(
        data="folder", limit_train=0, limit_val=0, limit_test=0
    )
    with pytest.raises(
        ValueError, match=r"there is a class 'cat', unlike in the images that .*run was trained on"
    ):
        _ = opened.splits
