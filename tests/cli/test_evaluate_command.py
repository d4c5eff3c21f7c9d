"""launch/evaluate.py and launch/predict.py as people type them; and what their command lines
refuse."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TORCHRUN, own_lines, start, start_warm
from PIL import Image
from small_nets import MEASURED

from alexnet_mp.cli.flags import UsageError
from alexnet_mp.cli.parser import parse_evaluate, parse_predict
from alexnet_mp.config.arguments import Networks, PredictRequest
from alexnet_mp.data import load
from alexnet_mp.inference.ensemble import EnsembleRunner
from alexnet_mp.inference.predict import predict_files
from alexnet_mp.training import checkpoint
from alexnet_mp.training.run import run

EVALUATE, PREDICT = [sys.executable, "launch/evaluate.py"], [sys.executable, "launch/predict.py"]


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> str:
    """A checkpoint on generated images; result.json lies beside it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(MEASURED.with_fields(out=str(out)))
    return str(out / "best.pt")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """The first test images as files, one of them under a wrong name."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / name for name in ("a.png", "b.jpg", "c.png")]
    for file, image in zip(
        files, load(MEASURED.data, 0, side=76).test.gather(range(3)).numpy(), strict=True
    ):
        with open(file, "wb") as target:
            Image.fromarray(image.transpose(1, 2, 0)).save(target, "PNG")
    return [str(file) for file in files]


# ---- evaluate ----


def test_the_checkpoint_alone_repeats_the_test_of_its_run(best, tmp_path) -> None:
    done = start(
        EVALUATE,
        "--checkpoint",
        best,
        "--limit-test",
        "50",
        "--json",
        str(tmp_path / "result.json"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    result, before = (
        json.loads((tmp_path / "result.json").read_text()),
        json.loads(Path(best).with_name("result.json").read_text()),
    )
    assert (result["loss"], result["top1"], result["top5"]) == (
        before["test_loss"],
        before["top1"],
        before["top5"],
    )
    assert (result["images"], result["views"], result["checkpoints"], result["weights"]) == (
        50,
        1,
        [best],
        [1.0],
    )
    assert (result["data"], result["split"], result["average"], result["precision"]) == (
        "shapes",
        "test",
        "probabilities",
        "fp32",
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "alexnet_mp: preset demo, the center view, 1 rank on cpu, fp32"
    assert lines[-1].split()[2:7] == [
        f"{result['loss']:.4f}",
        f"{result['top1']:.2%}",
        f"{result['top5']:.2%}",
        "50",
        "1",
    ]


def test_two_ranks_print_one_json_document_and_nothing_else_on_the_standard_output(best) -> None:
    flags = ["--checkpoint", best, "--ten-crop", "--limit-test", "20", "--json", "-"]
    both, alone = (
        start([*TORCHRUN, "2", "launch/evaluate.py"], *flags, "--threads", "1"),
        start_warm(EVALUATE, *flags),
    )
    assert both.returncode == alone.returncode == 0, both.stderr + alone.stderr
    result, expected = json.loads(both.stdout), json.loads(alone.stdout)
    assert (result["ranks"], result["views"], result["images"]) == (2, 10, 20)
    assert [result[name] for name in ("loss", "top1", "top5")] == pytest.approx(
        [expected[name] for name in ("loss", "top1", "top5")], rel=1e-6
    )
    assert sum(line.startswith("alexnet_mp:") for line in both.stderr.splitlines()) == 1


def test_several_checkpoints_may_follow_one_flag_or_repeat_it(best) -> None:
    repeated = start_warm(
        EVALUATE,
        "--checkpoint",
        best,
        "--weights",
        "3",
        "--checkpoint",
        best,
        "--weights",
        "1",
        "--limit-test",
        "10",
    )
    assert repeated.returncode == 0, repeated.stderr
    assert [line.split() for line in repeated.stdout.splitlines()[2:4]] == [
        ["0.750", best],
        ["0.250", best],
    ]
    forms = (
        ["--checkpoint", "a", "b", "--weights", "3", "1"],
        ["--checkpoint", "a", "--checkpoint", "b", "--weights=3", "1"],
        ["--checkpoint=a", "--weights", "3", "--checkpoint=b", "--weights", "1"],
        ["--weights", "3", "--weights", "1", "--checkpoint=a", "b"],
    )
    requests = [parse_evaluate(argv) for argv in forms]
    assert {(one.networks.checkpoint, one.networks.shares) for one in requests} == {
        (("a", "b"), (0.75, 0.25))
    }


def test_a_split_of_other_classes_is_refused_by_the_first_that_differs(best, tmp_path) -> None:
    for split in ("train", "test"):
        for name in ("circle", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "image.png")
    (tmp_path / "train" / "cat" / "another.png").write_bytes(
        (tmp_path / "train" / "cat" / "image.png").read_bytes()
    )
    done = start_warm(
        EVALUATE,
        "--checkpoint",
        best,
        "--data",
        "folder",
        "--data-dir",
        str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        f"error: --data folder --data-dir {tmp_path}: there is a class 'cat', unlike in the "
        f"images that {best}"
    )


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (EVALUATE, ["--checkpoint", "/none.pt"], "/none.pt: no such checkpoint"),
        (PREDICT, ["--checkpoint", "/none.pt", "x"], "/none.pt: no such"),
    ],
)
def test_a_missing_checkpoint_is_one_line_and_exit_code_2(
    command: list[str], flags: list[str], words: str
) -> None:
    done = start_warm(command, *flags)
    assert (
        (done.returncode, done.stdout) == (2, "")
        and len(done.stderr.splitlines()) == 1
        and words in own_lines(done)[0]
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--checkpoint FILE: name at least one"),
        (["--checkpoint"], "checkpoint"),
        (["--checkpoint", "a", "--weights", "1", "2"], "--weights 1 2: 2 for 1 checkpoint;"),
        (["--checkpoint", "a", "--weights", "0"], "not all"),
        (
            ["--checkpoint", "a", "b", "--weights", "1", "-1"],
            "--weights 1 -1: none may be negative",
        ),
        (["--checkpoint", "a", "--weights", "nan"], "--weights nan"),
        (["--checkpoint", "a", "--split", "dev"], "'dev'"),
        (
            ["--checkpoint", "a", "--split", "val", "--limit-test", "3"],
            "--limit-test 3: .*--limit-val limits those",
        ),
        (
            ["--checkpoint", "a", "--json", "/none/x.json"],
            "--json /none/x.json: cannot be written, there is no folder /none",
        ),
        (["--checkpoint", "a", "--json", "/tmp"], "--json /tmp: a folder"),
        (["--checkpoint", "a", "--batch-size", "-1"], "--batch-size -1"),
        (["--checkpoint", "a", "--average", "votes"], "'votes'"),
        (["--checkpoint", "a", "--lr", "1"], "--lr"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(argv: list[str], words: str, capsys) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_evaluate(argv)
    assert "\n" not in str(caught.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("parse", [parse_evaluate, parse_predict])
def test_the_help_shows_how_to_start_and_every_flag_of_the_contract(parse, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--checkpoint RUN/best.pt" in " ".join(
        text.replace("│", " ").split()
    )
    flags = [
        "--checkpoint",
        "--weights",
        "--ten-crop",
        "--average",
        "--json",
        "--device",
        "--backend",
        "--precision",
        "--threads",
        "--timeout",
    ]
    more = (
        ["--data", "--data-dir", "--split", "--limit-test", "--batch-size", "--column-ranks"]
        if parse is parse_evaluate
        else ["--top", "IMAGE"]
    )
    assert [flag for flag in flags + more if flag not in text] == []


# ---- predict ----


def test_a_bad_file_is_named_and_the_others_are_shown(best, pictures, tmp_path) -> None:
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    files = [pictures[0], str(tmp_path / "page.png"), pictures[1], str(tmp_path / "none.jpg")]
    done = start_warm(PREDICT, "--checkpoint", best, *files, "--top", "3", "--ten-crop")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {files[1]}: not an image that Pillow knows",
        f"error: {files[3]}: No such file or directory",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and [lines[0], lines[4]] == [files[0], files[2]]
    shares = [float(line.split()[0].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
    assert all(line.split()[-1] in checkpoint.read(best)["data"]["classes"] for line in lines[1:4])
    assert lines[1].count("#") == round(0.3 * shares[0])


def test_the_json_alone_is_on_the_standard_output(best, pictures) -> None:
    done = start_warm(PREDICT, "--checkpoint", best, *pictures, "--json", "-")
    answers = json.loads(done.stdout)
    assert done.returncode == 0 and [answer["file"] for answer in answers] == pictures
    assert [len(answer["top"]) for answer in answers] == [5, 5, 5] and set(
        answers[0]["top"][0]
    ) == {"class", "probability"}


def test_a_files_prediction_is_the_networks_answer_to_the_stored_image(best, pictures) -> None:
    ensemble = EnsembleRunner(Networks((best,), threads=1))
    expected = ensemble.probabilities(load(MEASURED.data, 0, side=76).test.gather(range(3)))
    answers = predict_files(
        PredictRequest((*pictures, pictures[0]), Networks((best,), threads=1), top=99)
    )
    classes = ensemble.first.classes
    for answer, row in zip(answers, expected[[0, 1, 2, 0]], strict=True):
        shares = {entry["class"]: entry["probability"] for entry in answer["top"]}
        assert [shares[name] for name in classes] == pytest.approx(row.tolist(), rel=1e-5)
    assert np.ptp(expected.numpy(), axis=1).min() > 1e-3 and torch.allclose(
        expected.sum(1), torch.ones(3).double()
    )


def test_images_of_any_size_and_more_than_a_batch_are_taken(best, tmp_path) -> None:
    rng, files = np.random.default_rng(0), []
    for number in range(35):  # batches of 32 and 3
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (40 + 9 * number, 60, 3), np.uint8)).save(files[-1])
    assert [
        answer["file"]
        for answer in predict_files(PredictRequest(tuple(files), Networks((best,), threads=1)))
    ] == files


def test_predict_wants_an_image() -> None:
    with pytest.raises(UsageError, match="IMAGE: name one image file or more"):
        parse_predict(["--checkpoint", "a"])
    request = parse_predict(
        ["--checkpoint", "a", "--checkpoint", "b", "--top", "2", "x.jpg", "y.jpg"]
    )
    assert (request.images, request.networks.checkpoint, request.top) == (
        ("x.jpg", "y.jpg"),
        ("a", "b"),
        2,
    )
