"""The command line: every field is a flag, every mistake one line that names it."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from alexnet_mp import PRESETS, Config, preset
from alexnet_mp.cli.flags import UsageError
from alexnet_mp.cli.parser import _refuse_changes, parse_train
from alexnet_mp.training import checkpoint


def test_no_flags_are_the_demo() -> None:
    assert parse_train([]) == preset("demo")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_complete_configuration(name: str) -> None:
    assert parse_train(["--preset", name]) == preset(name)
    assert parse_train([f"--preset={name}"]) == preset(name)


def test_a_flag_changes_one_field_of_the_preset_wherever_it_stands() -> None:
    changed = preset("paper").with_fields(lr=0.02, image_size=227)
    assert parse_train(["--lr", "0.02", "--preset", "paper", "--image-size", "227"]) == changed


@pytest.mark.parametrize("word", ["--local-rank=1", "--local_rank=1"])
def test_the_flag_that_torch_distributed_launch_adds_is_not_the_users(word: str) -> None:
    assert parse_train([word, "--seed", "3"]) == parse_train(["--seed", "3"])


def test_every_flag_of_the_contract_is_there() -> None:
    argv = (
        "--preset demo --data shapes --data-dir d --epochs 1 --max-steps 2 --batch-size 3 "
        "--image-size 99 --lr 0.1 --seed 5 --limit-train 6 "
        "--limit-val 7 --limit-test 8 --device cpu --backend gloo --precision bf16 --compile "
        "--deterministic --threads 1 --column-ranks 2 "
        "--out o --timeout 9"
    ).split()
    config = parse_train(argv)
    assert (
        config.recipe.max_steps,
        config.data.limit_test,
        config.run.timeout,
        config.run.compile,
    ) == (2, 8, 9.0, True)


def test_every_field_has_its_flag_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (Config().model, Config().data, Config().recipe, Config().run):
        for field in dataclasses.fields(part):
            assert f"--{field.name.replace('_', '-')}" in text, field.name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning-rate", "1"], "--learning-rate"),
        (["--epochs", "abc"], "'abc'"),
        (["--preset", "papr"], "papr.*demo, .*paper"),
        (["--data", "mnist"], "'mnist'.*fashion-mnist"),
        (["--image-size", "60"], "60.*smallest that works is 67"),
        (["--lr", "-1"], "--lr -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--crossings", "conv9", "fc8"], "conv9"),
        (["--crossings", "conv3"], "fc8 must be among them"),
        (["--kernels", "1", "2"], "kernels"),
        (["--resume"], "--out"),
        (["--resume", "none.pt"], "none.pt: no such checkpoint"),
        (["--dropout-rate", "1"], "--dropout-rate 1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--initial-weights", "he"], "needs 8 values"),
        (["--device", "tpu"], "tpu"),
        (["--schedule", "log"], "called 2012 now"),
        (["--resume", "a.pt", "b.pt"], "--resume: one checkpoint, not a.pt b.pt"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag_or_value(
    argv: list[str], words: str, capsys
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_train(argv)
    assert "\n" not in str(caught.value) and capsys.readouterr() == ("", "")


@pytest.fixture
def checkpoint_file(tmp_path):
    config = preset("paper").with_fields(
        lr=0.02,
        batch_size=32,
        seed=7,
        classes=3,
        device="cuda",
        threads=3,
        column_ranks=1,
        profile=True,
        max_steps=10,
        accumulate=4,
    )
    path = tmp_path / "last.pt"
    torch.save(
        {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "config": config.to_dict(),
            "model": {},
            "velocity": {},
            "loop": {},
            "data": {"classes": [], "images": []},
        },
        path,
    )
    return path


def test_resume_continues_the_checkpoints_configuration_on_this_machine(checkpoint_file) -> None:
    for argv in (
        ["--resume", str(checkpoint_file)],
        ["--out", str(checkpoint_file.parent), "--resume"],
        ["--resume", "--out", str(checkpoint_file.parent)],
    ):
        config = parse_train([*argv, "--epochs", "120"])
        assert (config.preset, config.recipe.lr, config.recipe.batch_size, config.run.seed) == (
            "paper",
            0.02,
            32,
            7,
        )
        assert config.recipe.epochs == 120 and config.recipe.max_steps == 0
        assert (config.run.device, config.run.threads, config.run.column_ranks) == ("auto", 0, 0)
        assert not config.run.profile
        assert (config.run.resume, config.run.out) == (
            str(checkpoint_file),
            str(checkpoint_file.parent),
        )


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "0.1"],
        ["--seed", "1"],
        ["--image-size", "227"],
        ["--preset", "demo"],
        ["--data", "cifar10"],
        ["--precision", "bf16"],
        ["--batch-size", "64"],
        ["--lr-scale", "linear"],
    ],
)
def test_resume_refuses_a_flag_that_would_make_it_another_run(
    checkpoint_file, argv: list[str]
) -> None:
    with pytest.raises(UsageError, match=f"{argv[0]} {argv[1]}: .*last.pt was trained with"):
        parse_train(["--resume", str(checkpoint_file), *argv])


def test_resume_goes_on_in_as_many_parts_as_before_or_as_asked(checkpoint_file) -> None:
    resume = ["--resume", str(checkpoint_file)]
    assert parse_train(resume).run.accumulate == 4
    assert parse_train([*resume, "--accumulate", "2"]).run.accumulate == 2


def test_resume_takes_the_flags_that_the_run_already_had(checkpoint_file) -> None:
    argv = ["--preset", "paper", "--lr", "0.02", "--batch-size", "32", "--seed", "7"]
    assert parse_train([*argv, "--resume", str(checkpoint_file)]) == parse_train(
        ["--resume", str(checkpoint_file)]
    )


@pytest.mark.parametrize(("flag", "value"), [("--data", "folder"), ("--classes", "7")])
def test_resuming_on_other_images_says_that_it_is_not_fine_tuning(
    checkpoint_file, flag: str, value: str
) -> None:
    with pytest.raises(UsageError, match=r"--init-from .*--reset fc8"):
        parse_train(["--resume", str(checkpoint_file), flag, value])


def test_a_preset_of_ones_own_is_in_the_help(monkeypatch, capsys) -> None:
    def mine() -> Config:
        """A preset that is not in the package."""
        return preset("demo").with_fields(preset="mine", lr=0.125)

    monkeypatch.setitem(PRESETS, "mine", mine)
    with pytest.raises(SystemExit):
        parse_train(["--preset", "mine", "--help"])
    text = capsys.readouterr().out
    assert "A preset that is not in the package." in text and "(default: 0.125)" in text
    assert all(f"\n  {name} " in text for name in PRESETS)


@pytest.mark.parametrize("no_color", ["1", ""])
def test_the_help_fits_the_terminal_and_has_color_unless_that_is_unwanted(
    monkeypatch, capsys, no_color: str
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    text = capsys.readouterr().out
    assert ("\x1b" in text) == (not no_color)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())) <= 60


def test_only_the_first_rank_prints_the_help(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    assert capsys.readouterr().out == ""


# ---- --data-dir without --data ----


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("train/cat/1.png", "folder"),
        ("cat/1.png", "folder"),
        ("train/header.json", "store"),
        ("unfinished.json", "store"),
    ],
)
def test_a_data_dir_alone_is_taken_as_it_is(tmp_path, capsys, path: str, kind: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    config = parse_train(["--data-dir", str(tmp_path)])
    assert config == preset("demo").with_fields(data=kind, data_dir=str(tmp_path))
    assert capsys.readouterr().out == f"--data-dir {tmp_path}: taken as --data {kind}\n"


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip", "train-0.parquet"])
def test_an_archive_alone_is_taken_as_images_without_being_read(
    tmp_path, capsys, name: str
) -> None:
    (tmp_path / name).touch()  # what is wrong in it is found when it is listed, by one rank
    config = parse_train(["--data-dir", str(tmp_path / name)])
    assert config.data.data == "folder"
    assert capsys.readouterr().out == f"--data-dir {tmp_path / name}: taken as --data folder\n"


def test_a_preset_for_folders_takes_a_packed_one_too(tmp_path, capsys) -> None:
    assert parse_train(["--preset", "photos", "--data-dir", "mine"]).data.data == "folder"
    assert capsys.readouterr().out == ""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "header.json").touch()
    config = parse_train(["--preset", "photos", "--data-dir", str(tmp_path)])
    assert config.data.data == "store"
    assert capsys.readouterr().out == f"--data-dir {tmp_path}: taken as --data store\n"


def test_a_data_dir_alone_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=f"^--data-dir {tmp_path}/none: .*--data says what else"):
        parse_train(["--data-dir", str(tmp_path / "none")])


def test_a_data_dir_beside_a_data_set_is_only_its_place(tmp_path, capsys) -> None:
    for argv in (["--data", "shapes"], ["--data", "cifar10"], ["--preset", "tutorial"]):
        config = parse_train([*argv, "--data-dir", str(tmp_path)])
        assert config.data.data == (argv[1] if argv[0] == "--data" else "cifar10")
    assert capsys.readouterr().out == ""


def test_a_configuration_survives_its_dictionary() -> None:
    for name in PRESETS:
        config = preset(name)
        assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="not a configuration of this version"):
        Config.from_dict({"preset": "demo"})


def test_a_resumed_run_may_change_these_fields_and_no_others() -> None:
    stored, free = preset("demo"), set()
    fields = [
        (part, field.name)
        for part in ("model", "data", "recipe")
        for field in dataclasses.fields(getattr(stored, part))
    ]
    for part, name in [*fields, ("run", "seed"), ("run", "precision")]:
        changed = copy.deepcopy(stored)
        object.__setattr__(getattr(changed, part), name, "another")
        refusal = ""
        try:
            _refuse_changes(changed, stored, Path("last.pt"))
            free.add(name)
        except UsageError as error:
            refusal = str(error)
        words = f"--{name.replace('_', '-')} another: last.pt was trained with"
        assert name in free or words in refusal
    assert free == {"epochs", "max_steps", "patience", "delta", "data_dir", "cache_dir"}


def test_a_resumed_run_may_go_on_in_another_folder(checkpoint_file, tmp_path) -> None:
    config = parse_train(["--resume", str(checkpoint_file), "--out", str(tmp_path / "new")])
    assert (config.run.resume, config.run.out) == (str(checkpoint_file), str(tmp_path / "new"))
