"""benchmarks/ablations.py and paper_vs_source.py on tiny networks: the runs, files and tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from image_sets import make_folder

from alexnet_mp import preset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims, readings = script("ablations"), script("paper_vs_source")


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache) -> list[str]:
    """Flags for a moment's training of a tiny network on a folder of twenty images."""
    folder = make_folder(tmp_path / "images")

    def small(name: str):
        sizes = {"kernels": (2, 3), "hidden": ()} if name == "four-layers" else {"hidden": (6, 6)}
        kernels = (3, 4, 4) if name == "four-layers" else (4, 4, 4, 4, 4)
        return preset(name).with_fields(**sizes | {"kernels": kernels})

    for module in (claims, readings):
        monkeypatch.setattr(module, "preset", small)
    return f"--data folder --data-dir {folder} --image-size 67 --batch-size 8 --threads 1".split()


def call(module, argv: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
    assert module.main() == 0


def test_each_claims_networks_differ_in_what_is_claimed_and_nothing_else() -> None:
    request = claims.ClaimsRequest()
    changed = {
        "relu": {"activation"},
        "lrn": {"lrn", "map_norm"},
        "lrn-four-layers": {"lrn"},
        "overlap": {"pool_size"},
        "columns": {"columns", "kernels", "hidden"},
        "talking": {"crossings", "kernels", "hidden"},
        "color": {"color_noise"},
        "start": {"initial_weights"},
    }
    for claim in claims.CLAIMS:
        having, without = claims.trainings(claim, request, 0)
        if claim.name == "views":
            assert not without
            continue
        for one, other in zip(having, without, strict=True):
            a, b = (
                {
                    k: v
                    for part in ("model", "data", "recipe", "run")
                    for k, v in vars(getattr(x.config, part)).items()
                }
                for x in (one, other)
            )
            assert {name for name in a if a[name] != b[name]} == changed[claim.name], claim.name
            assert one.folder != other.folder


def test_claims_are_measured_kept_and_found_again(tiny, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "claims"
    argv = [
        *tiny,
        "--claims",
        "color",
        "views",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--out",
        str(out),
    ]
    call(claims, argv, monkeypatch)
    first = capsys.readouterr().out
    assert "4 trainings, 0 of them found" in first
    rows = {row["claim"]: row for row in json.loads((out / "ablations.json").read_text())["claims"]}
    errors = [
        [
            1 - json.loads((out / f"{name}-{seed}" / "result.json").read_text())["top1"]
            for seed in (0, 1)
        ]
        for name in ("original", "original-no-color")
    ]
    assert [rows["color"]["with"], rows["color"]["without"]] == errors and rows["views"][
        "without"
    ] == errors[0]
    assert rows["color"]["differences"] == pytest.approx(
        [100 * (a - b) for a, b in zip(*errors, strict=True)]
    )
    call(claims, argv, monkeypatch)
    assert "4 trainings, 4 of them found" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"original-0 is of other settings; name another folder"):
        call(claims, [*argv, "--epochs", "2"], monkeypatch)


def test_a_network_that_diverges_costs_its_seed_and_not_the_table(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    run = claims.run

    def sometimes(config, *more):
        if config.run.out.endswith("original-no-color-1"):
            raise claims.NonFiniteError("step 3: the loss is not finite")
        return run(config, *more)

    monkeypatch.setattr(claims, "run", sometimes)
    call(
        claims,
        [
            *tiny,
            "--claims",
            "color",
            "--epochs",
            "1",
            "--seeds",
            "2",
            "--out",
            str(tmp_path / "claims"),
        ],
        monkeypatch,
    )
    (row,) = json.loads((tmp_path / "claims" / "ablations.json").read_text())["claims"]
    assert len(row["differences"]) == 1 and row["verdict"] == "not every seed could be trained"


def test_a_training_for_speed_ends_at_the_target_and_the_ratio_is_of_epochs(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(claims, "TARGET", 0.6)  # two classes: an error that is reached at once
    call(
        claims,
        [
            *tiny,
            "--claims",
            "relu",
            "--epochs",
            "4",
            "--seeds",
            "1",
            "--rates",
            "0.001",
            "--out",
            str(tmp_path / "claims"),
        ],
        monkeypatch,
    )
    (row,) = json.loads((tmp_path / "claims" / "ablations.json").read_text())["claims"]
    lines = [
        len(
            (tmp_path / "claims" / f"four-layers-{name}-0.001-0" / "history.jsonl")
            .read_text()
            .splitlines()
        )
        for name in ("relu", "tanh")
    ]
    assert [row["with"][0], row["without"][0]] == lines and max(lines) < 4
    assert row["differences"] == [lines[1] / lines[0]] and row["verdict"] == "one seed says little"
    assert (tmp_path / "claims" / "relu.png").stat().st_size > 5_000


def test_a_smoke_run_gives_no_verdict() -> None:
    row = {"differences": [-3.0, -2.0], "seeds": 2, "unit": "points"}
    assert (
        claims.verdict(row, quick=True) == "smoke run"
        and claims.verdict(row, quick=False) == "as claimed"
    )
    assert claims.verdict(row | {"differences": [3.0, 2.0]}, False) == "the other way"
    assert claims.verdict(row | {"differences": [-3.0, 2.0]}, False) == "seeds disagree"
    assert (
        claims.verdict({"differences": [5.0, 7.0], "seeds": 2, "unit": "times the epochs"}, False)
        == "as claimed"
    )
    assert claims.ClaimsRequest(quick=True).shortened().seeds == 1


def test_the_readings_differ_only_in_what_is_named_and_the_schedule() -> None:
    configs = readings.variants(readings.ReadingsRequest())

    def all_fields(config) -> dict:
        return {
            k: v
            for part in ("model", "data", "recipe")
            for k, v in vars(getattr(config, part)).items()
        }

    paper, original = all_fields(configs["paper"]), all_fields(configs["original"])
    named = {name for names in readings.DIFFERENCES.values() for name in names}
    assert {name for name in paper if paper[name] != original[name]} == named | {"schedule"}
    for what, names in readings.DIFFERENCES.items():
        one = all_fields(configs[f"paper + the source's {what}"])
        assert {name for name in paper if paper[name] != one[name]} == set(names)


def test_readings_are_trained_drawn_and_their_losses_written(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    file = tmp_path / "readings.json"
    call(
        readings,
        [
            *tiny,
            "--steps",
            "4",
            "--no-single",
            "--out",
            str(tmp_path / "a.png"),
            "--json",
            str(file),
        ],
        monkeypatch,
    )
    content = json.loads(file.read_text())
    assert content["classes"] == 2 and [len(row["losses"]) for row in content["rows"]] == [4, 4]
    assert (tmp_path / "a.png").stat().st_size > 5_000
    splits = readings.generated(20, 73, seed=0, per_class=3)
    assert (len(splits.train), len(splits.train.classes), splits.train.sides) == (60, 20, (73,))


def test_a_wrong_claim_or_number_is_named(monkeypatch) -> None:
    for module, flag, words in (
        (claims, "--claims sigmoid", "sigmoid: not one of"),
        (claims, "--seeds 0", "--seeds 0"),
        (readings, "--steps 0", "--steps 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call(module, flag.split(), monkeypatch)
