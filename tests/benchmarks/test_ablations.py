"""ablations.py, recipes.py and paper_vs_source.py on tiny networks: trainings, files and tables."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
from image_sets import make_folder

from alexnet_mp import preset
from alexnet_mp.data import Store

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script in it; processes of a pool inherit it

claims, recipes, readings, requests, trainings, pools, paired, plateau = (
    importlib.import_module(name)
    for name in (
        *("ablations", "recipes", "paper_vs_source", "training_request"),
        *("trainings", "training_pool", "paired", "plateau"),
    )
)


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache) -> list[str]:
    """Flags for a moment's training of a tiny network on a folder of twenty images."""
    folder = make_folder(tmp_path / "images")

    def small(name: str):
        sizes = {"kernels": (2, 3), "hidden": ()} if name == "four-layers" else {"hidden": (6, 6)}
        kernels = (3, 4, 4) if name == "four-layers" else (4, 4, 4, 4, 4)
        return preset(name).with_fields(**sizes | {"kernels": kernels})

    for module in (claims, recipes, readings, requests, trainings):
        monkeypatch.setattr(module, "preset", small)
    monkeypatch.setattr(pools, "PROBE_STEPS", 2)
    monkeypatch.setattr(pools, "PROBE_SECONDS", (0.0, 0.1))
    return f"--data folder --data-dir {folder} --image-size 67 --batch-size 8 --threads 1".split()


def call(module, argv: list[str], monkeypatch, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
    assert module.main() == code


def read(out: Path, name: str = "ablations") -> dict:
    return json.loads((out / f"{name}.json").read_text())


def one_training(tiny: list[str], **more) -> "trainings.Training":
    values = dict(zip([flag[2:].replace("-", "_") for flag in tiny[::2]], tiny[1::2], strict=True))
    numbers = {name: int(values[name]) for name in ("image_size", "batch_size", "threads")}
    request = claims.ClaimsRequest(**values | numbers, epochs=3)
    claim = next(claim for claim in claims.CLAIMS if claim.name == "color")
    having, _ = claims.trainings(claim, request, 0)
    return dataclasses.replace(having[0], **{"ten_views": False} | more)


# --- the statistics


def test_an_interval_is_students_t_over_the_seeds() -> None:
    """By hand: mean 2, deviation 1, t(2) = 4.303, so 2 +- 4.303 / sqrt(3)."""
    found = paired.interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - found.mean == pytest.approx(4.303 / math.sqrt(3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert paired.interval([1.0]) is None
    ratios = paired.ratio_interval([2.0, 8.0])
    assert ratios.mean == pytest.approx(4) and ratios.low * ratios.high == pytest.approx(16)


def test_more_seeds_have_the_smaller_quantile() -> None:
    assert len(paired.T_975) == 30 and list(paired.T_975) == sorted(paired.T_975, reverse=True)
    assert paired.T_975[0] == 12.706 and paired.T_975[9] == 2.228 and paired.T_975[29] == 2.042


@pytest.mark.parametrize(
    "differences, said",
    [
        ([-3.0, -2.0, -2.5], "holds"),
        ([3.0, 2.0, 2.5], "opposite"),
        ([-3.0, -2.0, 1.0], "cannot tell"),
        ([-3.0, -0.1, -0.2], "cannot tell"),  # one sign, but too far apart
        ([-3.0], "cannot tell"),
        ([], "cannot tell"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side(differences: list[float], said: str) -> None:
    assert paired.verdict(paired.interval(differences)) == said


def test_a_ratio_is_judged_against_one() -> None:
    def said(*ratios: float) -> str:
        return paired.verdict(paired.ratio_interval(ratios), 1.0, claimed_below=False)

    assert (said(5.0, 6.0, 7.0), said(0.2, 0.21, 0.19)) == ("holds", "opposite")
    assert said(0.9, 1.2, 1.1) == "cannot tell"


def test_epochs_to_a_target_are_counted_to_a_fraction() -> None:
    history = [{"epoch": k + 1, "train_top1": 1 - e} for k, e in enumerate((0.5, 0.3, 0.2))]
    assert trainings.epochs_until(history, 0.25) == pytest.approx(2.5)
    assert (
        trainings.epochs_until(history, 0.5) == 1 and trainings.epochs_until(history, 0.1) is None
    )


def test_a_plateau_is_left_where_the_mean_of_25_losses_falls_below_its_share() -> None:
    losses = [math.log(10)] * 40 + [0.0] * 10
    # One zero among 25 lowers the mean by 4 %, and 2 % are enough.
    assert plateau.left_plateau(losses, 10) == 41
    assert plateau.left_plateau(losses[:40], 10) is None


# --- the plan


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
        "crops": {"random_crop", "flip"},
        "dropout": {"dropout_rate"},
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
            assert one.name != other.name


def test_a_seed_is_whole_before_the_next_begins_and_the_baseline_is_trained_once_a_seed() -> None:
    request = claims.ClaimsRequest(seeds=3)
    order = claims.in_order(request)
    seeds = [one.config.run.seed for one in order]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    names = [one.name for one in order]
    assert len(set(names)) == len(names) and names.count("original-20-epochs-seed-1") == 1
    assert len(order) == 3 * (1 + 7 + 2 * 4)  # the baseline, seven without, ReLU and tanh at four


def test_cifar_is_for_the_four_layer_net_alone() -> None:
    request = claims.ClaimsRequest(data="folder", data_dir="tiny", cifar_dir="cifar")
    places = {(one.config.preset, one.config.data.data_dir) for one in claims.in_order(request)}
    assert places == {("original", "tiny"), ("four-layers", "cifar")}
    data = {one.config.data.validation for one in claims.in_order(request)}
    assert data == {"val"}  # all training images train


# --- trainings


def test_claims_are_measured_kept_and_found_again(tiny, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "claims"
    argv = [*tiny, *"--claims color views --epochs 1 --seeds 2 --out".split(), str(out)]
    file = tmp_path / "copy.json"
    call(claims, [*argv, "--json", str(file)], monkeypatch)
    first = capsys.readouterr().out
    assert "4 trainings, 0 of them found" in first and "1 at a time" in first
    content = read(out)
    assert json.loads(file.read_text()) == content
    assert (out / "claims.png").stat().st_size > 5_000
    rows = {row["claim"]: row for row in content["claims"]}

    def errors(name: str, views: str = "one_view") -> list[float]:
        return [
            100 * (1 - content["runs"][f"{name}-1-epochs-seed-{seed}"][views]["top1"])
            for seed in (0, 1)
        ]

    mine, other, ten = (
        errors("original"),
        errors("original-no-color"),
        errors("original", "ten_views"),
    )
    assert [rows["color"]["with"], rows["color"]["without"]] == [mine, other]
    assert [rows["views"]["with"], rows["views"]["without"]] == [ten, mine]
    assert rows["color"]["differences"] == pytest.approx(
        [a - b for a, b in zip(mine, other, strict=True)]
    )
    assert content["runs"]["original-no-color-1-epochs-seed-0"]["differs"]["color_noise"] == 0
    assert not list(out.glob("*/*.pt"))
    call(claims, argv, monkeypatch)
    assert "4 trainings, 4 of them found" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"original-1-epochs-seed-0 in it is of other settings"):
        call(claims, [*argv, "--batch-size", "4"], monkeypatch)


def test_differences_are_of_the_same_seed_though_one_of_a_pair_is_missing(tmp_path) -> None:
    """Seed 1 lacks its other half: neither its error nor another seed's takes its place."""
    request = claims.ClaimsRequest(claims=("color",), out=str(tmp_path))
    claim = claims.chosen_claims(request)[0]
    for seed, top1 in ((0, (0.9, 0.7)), (1, (0.5, None)), (2, (0.6, 0.65))):
        for side, value in zip(claims.trainings(claim, request, seed), top1, strict=True):
            folder = tmp_path / side[0].name
            folder.mkdir()
            scores = {"end": "finished", "one_view": {"top1": value, "top5": value}}
            if value is not None:
                (folder / "scores.json").write_text(json.dumps(scores))
    row = claims.measured(claim, request)
    assert row["seeds"] == [0, 2]
    assert row["differences"] == pytest.approx([-20.0, 5.0])
    assert row["verdict"] == "cannot tell"


def test_a_network_that_diverges_costs_its_seed_and_not_the_table(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    run = trainings.run

    def sometimes(config, *more):
        if "original-no-color-1-epochs-seed-1" in config.run.out:
            (Path(config.run.out) / "history.jsonl").touch()
            raise trainings.NonFiniteError("step 3: the loss is not finite")
        return run(config, *more)

    monkeypatch.setattr(trainings, "run", sometimes)
    argv = [*tiny, *"--claims color --epochs 1 --seeds 2 --out".split(), str(tmp_path / "claims")]
    call(claims, argv, monkeypatch)
    (row,) = read(tmp_path / "claims")["claims"]
    assert len(row["differences"]) == 1 and row["diverged"] == 1
    assert row["verdict"] == "cannot tell"


def test_a_training_that_fails_is_named_and_the_others_go_on(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    run = trainings.run

    def sometimes(config, *more):
        if config.run.out.endswith("original-1-epochs-seed-0"):
            raise RuntimeError("no kernel\nmore")
        return run(config, *more)

    monkeypatch.setattr(trainings, "run", sometimes)
    argv = [*tiny, *"--claims color --epochs 1 --seeds 1 --out".split(), str(tmp_path / "claims")]
    call(claims, argv, monkeypatch, code=1)
    content = read(tmp_path / "claims")
    assert content["failed"] == {"original-1-epochs-seed-0": "RuntimeError: no kernel"}
    assert list(content["runs"]) == ["original-no-color-1-epochs-seed-0"]


def test_a_training_for_speed_ends_at_the_target_and_the_ratio_is_of_epochs(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(claims, "TARGET", 0.6)  # two classes: an error that is reached at once
    out = tmp_path / "claims"
    flags = f"--claims relu --relu-epochs 4 --seeds 1 --rates 0.001 --out {out}"
    call(claims, [*tiny, *flags.split()], monkeypatch)
    content = read(out)
    (row,) = content["claims"]
    lengths = [
        len(content["runs"][f"four-layers-{name}-0.001-4-epochs-seed-0"]["history"]["lr"])
        for name in ("relu", "tanh")
    ]
    assert [row["with"][0], row["without"][0]] == lengths and max(lengths) < 4
    assert row["ratios"] == [lengths[1] / lengths[0]] and row["verdict"] == "cannot tell"
    assert (out / "relu.png").stat().st_size > 5_000


def test_a_training_gives_up_when_a_rival_was_faster(tiny, tmp_path) -> None:
    """Target 0 is never reached; the rival reached it in one epoch."""
    training = one_training(tiny, target=1e-9, rivals=("rival", "diverged"))
    for name, scores in (
        ("rival", {"end": "target", "epochs": 1}),
        ("diverged", {"end": "diverged"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    pools.share_images(training.config, tmp_path)
    assert trainings.train(training, tmp_path, trainings.Stop(tmp_path / "stop"))
    scores = trainings.found(training, tmp_path)
    assert (scores["end"], scores["epochs"]) == ("outrun", 1)


def test_a_training_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(tiny, tmp_path) -> None:
    training = one_training(tiny, record_losses=True)
    stop = trainings.Stop(tmp_path / "stop")
    folders = [tmp_path / "stopped", tmp_path / "whole"]
    for folder in folders:
        pools.share_images(training.config, folder)
    stop.set()
    assert not trainings.train(training, folders[0], stop)
    assert trainings.found(training, folders[0]) is None
    assert (folders[0] / training.name / "last.pt").exists()
    stop.clear()
    for folder in folders:
        assert trainings.train(training, folder, stop)

    def left(folder: Path) -> tuple:
        history = (folder / training.name / "history.jsonl").read_text().splitlines()
        times = ("images_per_second", "seconds")
        kept = [{k: v for k, v in json.loads(line).items() if k not in times} for line in history]
        return kept, (folder / training.name / "losses.json").read_text()

    assert left(folders[0]) == left(folders[1])
    assert len(json.loads(left(folders[0])[1])) == 9  # 20 images, 8 a step, 3 epochs


def test_two_jobs_train_what_one_does_and_after_the_time_limit_the_table_is_written(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    argv = [*tiny, *"--claims color --epochs 2 --seeds 1".split()]
    two, one = tmp_path / "two", tmp_path / "one"
    late = [*argv, "--jobs", "2", "--out", str(two), "--time-limit", "0.001"]
    call(claims, late, monkeypatch)
    assert "2 of 2 trainings are not done (the time is over)" in capsys.readouterr().out
    assert read(two)["claims"][0]["seeds"] == []
    call(claims, [*argv, "--jobs", "2", "--out", str(two)], monkeypatch)
    call(claims, [*argv, "--out", str(one)], monkeypatch)
    assert read(two)["claims"] == read(one)["claims"]
    runs = [{name: run["history"] for name, run in read(out)["runs"].items()} for out in (two, one)]
    assert runs[0] == runs[1] and len(runs[0]) == 2
    estimated = read(two)["time"]
    assert estimated["seconds"] > 0 and estimated["slowdown"] > 0 and estimated["not_done"] == 0


def test_with_fit_as_many_epochs_are_trained_as_the_time_holds(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    """20 seconds whatever the epochs and 250 an epoch: 0.9 * 1000 seconds hold three."""
    made = pools.Estimate({"original": 0.1}, 1.0, 20.0, 250.0, 100.0)
    monkeypatch.setattr(pools.Pool, "estimate", lambda self, missing: made)
    asked = claims.ClaimsRequest(
        claims=("color",), epochs=8, seeds=1, time_limit=1000, fit=True, out=str(tmp_path)
    )
    monkeypatch.setattr(requests, "STARTED", requests.time.monotonic())
    monkeypatch.setattr(pools.Pool, "_work", lambda *_: iter(()))
    table = requests.Table("ablations", asked, claims.in_order, claims.table)
    table.train()
    assert "--fit: 3 epochs, not 8: about 0:12:50" in capsys.readouterr().out
    assert [one.config.recipe.epochs for one in table.order(table.request)] == [3, 3]


def test_a_schedule_that_fit_shortened_has_its_picture(tiny, tmp_path, monkeypatch) -> None:
    made = pools.Estimate({"original": 0.1}, 1.0, fixed=0.0, per_epoch=500.0, longest=500.0)
    monkeypatch.setattr(pools, "estimate", lambda *_: made)
    monkeypatch.setattr(requests, "STARTED", requests.time.monotonic())
    flags = f"--claims views --epochs 2 --seeds 2 --time-limit 1000 --fit --out {tmp_path / 'out'}"
    call(claims, [*tiny, *flags.split()], monkeypatch)
    assert read(tmp_path / "out")["request"]["epochs"] == 1
    assert (tmp_path / "out" / "claims.png").stat().st_size > 5_000


def test_no_number_of_jobs_makes_the_longest_training_shorter() -> None:
    made = pools.Estimate({"original": 0.1}, 1.0, fixed=10.0, per_epoch=20.0, longest=50.0)
    assert made.seconds(4) == 200 and made.epochs_within(210) == 4
    assert made.epochs_within(0) == 1


def test_images_are_resized_once_for_all_trainings(tiny, tmp_path, monkeypatch) -> None:
    training = one_training(tiny)
    pools.share_images(training.config, tmp_path)
    fields = trainings.shared_images(training.config, tmp_path)
    side = training.config.data.resized_side(67)
    store = Store.open(Path(fields["data_dir"]) / "train")
    assert store.sides == (side,) and len(store) == 20
    before = sorted(path.stat().st_mtime_ns for path in Path(fields["data_dir"]).rglob("*"))
    pools.share_images(training.config, tmp_path)
    assert before == sorted(path.stat().st_mtime_ns for path in Path(fields["data_dir"]).rglob("*"))


def test_a_smoke_run_gives_no_verdict(tmp_path) -> None:
    request = claims.ClaimsRequest(claims=("color", "relu"), quick=True, out=str(tmp_path))
    rows = [claims.measured(claim, request) for claim in claims.chosen_claims(request)]
    assert {row["verdict"] for row in rows} == {"smoke run"}
    assert claims.ClaimsRequest(quick=True).shortened(seeds=1).limit_train > 0


# --- recipes


def test_recipes_are_trained_tested_with_ten_views_and_averaged(
    tiny, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "recipes"
    argv = [*tiny, *f"--epochs 2 --seeds 2 --out {out}".split()]
    call(recipes, argv, monkeypatch)
    content = read(out, "recipes")
    rows = {row["recipe"]: row for row in content["recipes"]}
    assert rows["original"]["seeds"] == [0, 1] and rows["tutorial"]["seeds"] == [0]
    for row in rows.values():
        for views in ("one_view", "ten_views"):
            for top in ("top1", "top5"):
                values = [
                    content["runs"][f"{row['recipe']}-2-epochs-seed-{seed}"][views][top]
                    for seed in row["seeds"]
                ]
                found = row[f"{views}_{top}"]
                assert found["values"] == values
                assert found["mean"] == pytest.approx(sum(values) / len(values))
    assert (
        len(content["average"]["networks"]) == 2
        and 0 <= content["average"]["ten_views"]["top1"] <= 1
    )
    assert rows["paper"]["left_plateau"] == [None] and rows["tutorial"]["left_plateau"] == []
    assert {path.parent.name for path in out.glob("*/last.pt")} == {
        "original-2-epochs-seed-0",
        "original-2-epochs-seed-1",
    }
    assert "the average of 2 of original" in capsys.readouterr().out


def test_the_exchanged_starts_are_the_other_readings_and_nothing_else() -> None:
    request = recipes.RecipesRequest()
    by_name = {recipe.name: recipe for recipe in recipes.RECIPES}
    for mine, exchanged, other in (
        ("paper", "paper-started-as-original", "original"),
        ("original", "original-started-as-paper", "paper"),
    ):
        a, b, c = (
            recipes.training(by_name[name], request, 0).config for name in (mine, exchanged, other)
        )
        assert b.model.initial_weights == c.model.initial_weights != a.model.initial_weights
        assert b.with_fields(initial_weights=a.model.initial_weights) == a


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
