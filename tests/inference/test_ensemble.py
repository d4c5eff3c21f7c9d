"""Ten views and several networks, averaged: against sums written out by hand, at any batch size and
placement."""

import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run as run_ranks
from small_nets import MEASURED
from torch import nn

from alexnet_mp import Trainer
from alexnet_mp.config import DataConfig, progress
from alexnet_mp.config.arguments import EvaluateRequest, Networks
from alexnet_mp.data import Augment, Loader, Statistics, Store, load
from alexnet_mp.inference.ensemble import (
    EnsembleModel,
    EnsembleRunner,
    average_outputs,
)
from alexnet_mp.inference.evaluate import evaluate_checkpoints
from alexnet_mp.training import checkpoint
from alexnet_mp.training.metrics import Scores, evaluate
from alexnet_mp.training.run import run

CPU = torch.device("cpu")
SIDE, SIZE, CLASSES, COUNT = 13, 9, 7, 23
MEANS = ("image-aligned", "image-center", "half", "none")


class Wide(nn.Module):
    """A linear classifier of pixels in float64, sharp enough that the views disagree."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = (
            torch.randn(
                CLASSES,
                3 * SIZE**2,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            / 100
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def store() -> Store:
    rng = np.random.default_rng(0)
    return Store(
        [rng.integers(0, 256, (COUNT, 3, SIDE, SIDE), np.uint8)],
        rng.integers(0, CLASSES, COUNT),
        [f"class {k}" for k in range(CLASSES)],
    )


def augment_of(store: Store, mean: str) -> Augment:
    return Augment(
        DataConfig(stored_side=SIDE, crop_of=SIZE, mean=mean), SIZE, store.statistics(SIDE)
    )


def scored(store: Store, augment: Augment, model: nn.Module, batch_size: int = 5) -> Scores:
    return evaluate(model, Loader(store, augment, batch_size, raw=True), device=CPU)


def reference_views(image: np.ndarray, mean: str, mean_image: np.ndarray) -> list[np.ndarray]:
    """The ten views of one image, by slices."""
    views = []
    for mirrored in (False, True):
        for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)):
            crop = image[:, y : y + 9, x : x + 9].astype(np.float64)
            if mean == "image-aligned":
                crop = crop - mean_image[:, y : y + 9, x : x + 9]
            crop = crop[:, :, ::-1] if mirrored else crop
            if mean == "image-center":
                crop = crop - mean_image[:, 2:11, 2:11]
            views.append((crop - 127.5) / 127.5 if mean == "half" else crop)
    return views


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def reference_probabilities(
    store: Store, model: Wide, mean: str, average: str = "probabilities"
) -> np.ndarray:
    """(COUNT, CLASSES): image by image, view by view."""
    weight, mean_image = model.weight.numpy(), store.statistics(SIDE).mean_image.double().numpy()
    rows = []
    for image in store.gather(range(COUNT)).numpy():
        logits = [weight @ view.ravel() for view in reference_views(image, mean, mean_image)]
        rows.append(
            softmax(sum(logits) / 10)
            if average == "logits"
            else sum(softmax(one) for one in logits) / 10
        )
    return np.array(rows)


def reference_scores(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    mine = probabilities[np.arange(COUNT), labels]
    better = (probabilities > mine[:, None]).sum(1)
    return Scores(-np.log(mine).mean(), (better < 1).mean(), (better < 5).mean(), COUNT)


def assert_close(ours: Scores, theirs: Scores, rel: float = 1e-12) -> None:
    assert vars(ours) == pytest.approx(vars(theirs), rel=rel, abs=0)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("mean", MEANS)
def test_ten_views_score_as_slices_and_sums_by_hand_do(store, mean: str, average: str) -> None:
    augment, model = augment_of(store, mean), Wide(0)
    ours = scored(store, augment, EnsembleModel([model], [augment.ten_views], average=average))
    # What is subtracted or divided by is float32; gray levels as they are have no rounding
    assert_close(
        ours,
        reference_scores(reference_probabilities(store, model, mean, average), store.labels),
        1e-12 if mean == "none" else 1e-5,
    )


def test_averaged_probabilities_are_not_averaged_logits_nor_the_center_view(store) -> None:
    augment, model = augment_of(store, "image-aligned"), Wide(0)
    losses = [
        scored(store, augment, EnsembleModel([model], [views], average=average)).loss
        for views, average in (
            (augment.ten_views, "probabilities"),
            (augment.ten_views, "logits"),
            (lambda images: (augment.test(images),), "probabilities"),
        )
    ]
    assert (
        min(abs(losses[0] - losses[1]), abs(losses[1] - losses[2]), abs(losses[0] - losses[2]))
        > 1e-2
    )


@pytest.mark.parametrize("batch_size", [1, 2, 22, 23, 64])
def test_scores_do_not_depend_on_the_batch_size_nor_on_the_tail(store, batch_size: int) -> None:
    augment = augment_of(store, "image-aligned")
    model = EnsembleModel([Wide(0), Wide(1)], [augment.ten_views] * 2, [0.3, 0.7])
    assert_close(scored(store, augment, model, batch_size), scored(store, augment, model, 4))


def test_networks_are_averaged_after_their_views_each_with_its_own_mean(store) -> None:
    models, means, weights = (
        [Wide(0), Wide(1), Wide(2)],
        ("image-aligned", "half", "none"),
        [1.0, 2.0, 5.0],
    )
    augments = [augment_of(store, mean) for mean in means]
    views = [augment.ten_views for augment in augments]
    parts = [
        reference_probabilities(store, model, mean)
        for model, mean in zip(models, means, strict=True)
    ]
    expected = sum(weight / 8 * part for weight, part in zip(weights, parts, strict=True))
    assert_close(
        scored(store, augments[0], EnsembleModel(models, views, weights)),
        reference_scores(expected, store.labels),
        1e-5,
    )
    # Logits are averaged over views only: networks differ in scale
    parts = [
        reference_probabilities(store, model, mean, "logits")
        for model, mean in zip(models, means, strict=True)
    ]
    expected = sum(weight / 8 * part for weight, part in zip(weights, parts, strict=True))
    assert_close(
        scored(store, augments[0], EnsembleModel(models, views, weights, "logits")),
        reference_scores(expected, store.labels),
        1e-5,
    )


def test_only_the_ratios_of_weights_matter_and_a_weight_of_zero_leaves_a_network_out(store) -> None:
    augment = augment_of(store, "none")
    models, views = [Wide(0), Wide(1)], [augment.ten_views] * 2
    assert_close(
        scored(store, augment, EnsembleModel(models, views, [3, 1])),
        scored(store, augment, EnsembleModel(models, views, [0.75, 0.25])),
    )
    assert_close(
        scored(store, augment, EnsembleModel(models, views)),
        scored(store, augment, EnsembleModel(models, views, [7, 7])),
    )
    assert_close(
        scored(store, augment, EnsembleModel(models, views, [0, 2])),
        scored(store, augment, EnsembleModel(models[1:], views[1:])),
    )


def test_a_mean_probability_too_small_for_a_float_still_has_its_logarithm() -> None:
    outputs = [torch.tensor([[0.0, -4000.0]]), torch.tensor([[0.0, -5000.0]])]
    loss = nn.functional.cross_entropy(average_outputs(outputs, [1, 1]), torch.tensor([1]))
    assert loss.item() == pytest.approx(4000 + math.log(2), rel=1e-12)


def test_a_single_output_comes_back_bit_for_bit_whatever_the_average() -> None:
    output = torch.randn(3, 4)
    assert (
        average_outputs([output], [0.3]) is output
        and average_outputs([output], [1.0], "logits") is output
    )


def test_the_ten_views_are_in_memory_one_at_a_time(store) -> None:
    seen: list[weakref.ref] = []

    class Watching(Wide):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert not any(reference() is not None for reference in seen)
            assert images.shape[1:] == (3, SIZE, SIZE) and len(images) <= 5
            seen.append(weakref.ref(images))
            return super().forward(images)

    augment = augment_of(store, "none")
    scored(store, augment, EnsembleModel([Watching(0)], [augment.ten_views]))
    assert len(seen) == 10 * 5


# ---- whole checkpoints, at their places ----

NOISY = MEASURED.with_fields(color_noise=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run, with weights that give the classes different probabilities."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(NOISY.with_fields(out=str(out)))
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same for a network of one column, which has seen other images."""
    out = tmp_path_factory.mktemp("other") / "run"
    run(NOISY.with_fields(out=str(out), columns=1, seed=1, limit_train=80, mean="image-center"))
    return out


def asked(
    *folders: Path, ten_crop: bool = True, batch_size: int = 0, **networks
) -> EvaluateRequest:
    files = tuple(str(folder / "last.pt") for folder in folders)
    return EvaluateRequest(
        Networks(files, ten_crop=ten_crop, threads=1, **networks),
        limit_test=50,
        batch_size=batch_size,
    )


def on_rank(rank: int, request: EvaluateRequest) -> dict:
    return evaluate_checkpoints(request)


def scores_of(result: dict) -> dict:
    return {name: result[name] for name in ("loss", "top1", "top5", "images", "views")}


def test_one_view_repeats_the_test_of_the_run_bit_for_bit(trained) -> None:
    content = checkpoint.read(trained / "last.pt")
    ensemble = EnsembleRunner(Networks((str(trained / "last.pt"),), threads=1))
    splits = load(NOISY.data, NOISY.run.seed, side=76)
    trainer = Trainer(
        ensemble.model.networks[0],
        nn.CrossEntropyLoss(reduction="sum"),
        torch.optim.SGD(ensemble.model.parameters(), lr=0.1),
        "cpu",
        verbose=False,
    )
    augment = Augment(NOISY.data, 67, Statistics(**content["data"]["statistics"]))
    expected = trainer.scores(Loader(splits.test, augment, 32))
    result = evaluate_checkpoints(asked(trained, ten_crop=False))
    assert Scores(result["loss"], result["top1"], result["top5"], result["images"]) == expected
    assert (
        expected.images == 50 and 0 < expected.top1 < expected.top5 < 1
    )  # neither all right nor all wrong


def test_the_ten_views_of_a_checkpoint_are_the_stack_that_the_augmentation_gives(trained) -> None:
    ensemble = EnsembleRunner(Networks((str(trained / "last.pt"),), ten_crop=True, threads=1))
    test = load(NOISY.data, NOISY.run.seed, side=76).test
    images = test.gather(range(50))
    stack = ensemble.augment.ten_crop(images)
    with torch.no_grad():
        mean = (
            ensemble.model.networks[0](stack.flatten(0, 1))
            .double()
            .softmax(1)
            .reshape(50, 10, -1)
            .mean(1)
        )
    assert (ensemble.probabilities(images) - mean).abs().max() < 1e-6
    assert (mean.max(1).values - mean.min(1).values).min() > 1e-3
    loss = -mean[torch.arange(50), torch.from_numpy(test.labels)].log().mean().item()
    assert evaluate_checkpoints(asked(trained))["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("split", ["test", "val"])
def test_only_the_split_that_is_asked_for_has_to_be_there(trained, tmp_path, split, cache) -> None:
    classes = checkpoint.read(trained / "last.pt")["data"]["classes"]
    for number, name in enumerate(classes):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (80, 80), (number, 0, 0)).save(tmp_path / split / name / "image.png")
    result = evaluate_checkpoints(
        EvaluateRequest(
            Networks((str(trained / "last.pt"),), threads=1), "test", "folder", str(tmp_path)
        )
    )
    assert result["images"] == len(classes)


def test_a_log_shows_how_far_the_evaluation_is(trained, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    evaluate_checkpoints(asked(trained, ten_crop=False, batch_size=25))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "evaluating test: 1 of 2 batches (50 %)",
        "evaluating test: 2 of 2 batches (100 %)",
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_a_checkpoints_scores_do_not_depend_on_the_batch_size(trained, batch_size: int) -> None:
    assert scores_of(evaluate_checkpoints(asked(trained, batch_size=batch_size))) == pytest.approx(
        scores_of(evaluate_checkpoints(asked(trained))), rel=1e-6
    )


@pytest.mark.parametrize("column_ranks", [2, 1])
def test_two_ranks_score_as_one_device_does_as_columns_and_as_copies(
    trained, column_ranks: int
) -> None:
    request = asked(
        trained, batch_size=7, column_ranks=column_ranks
    )  # 50 images: the tail is one, so that one copy has none
    results = run_ranks(on_rank, 2, request, timeout=120)
    alone = scores_of(evaluate_checkpoints(asked(trained, batch_size=7)))
    assert (
        scores_of(results[0])
        == scores_of(results[1])
        == pytest.approx(alone, rel=1e-6 if column_ranks == 1 else 1e-12)
    )


def test_networks_of_one_and_of_two_columns_are_averaged_on_two_ranks_as_on_one(
    trained, other
) -> None:
    request = asked(trained, other, weights=(1.0, 3.0))
    result = run_ranks(on_rank, 2, request, timeout=120)[0]
    alone = evaluate_checkpoints(request)
    assert scores_of(result) == pytest.approx(scores_of(alone), rel=1e-6)
    singles = [evaluate_checkpoints(asked(folder))["loss"] for folder in (trained, other)]
    assert (
        alone["weights"] == [0.25, 0.75]
        and min(abs(alone["loss"] - single) for single in singles) > 1e-3
    )


def test_a_checkpoint_among_others_answers_as_it_does_alone(trained, other) -> None:
    files = [str(folder / "last.pt") for folder in (trained, other)]
    images = load(NOISY.data, NOISY.run.seed, side=76).test.gather(range(9))
    alone = [
        EnsembleRunner(Networks((file,), ten_crop=True, threads=1)).probabilities(images)
        for file in files
    ]
    both = EnsembleRunner(
        Networks(tuple(files), (1.0, 3.0), ten_crop=True, threads=1)
    ).probabilities(images)
    assert (both - (0.25 * alone[0] + 0.75 * alone[1])).abs().max() < 1e-12 and (
        alone[0] - alone[1]
    ).abs().max() > 1e-3


@pytest.mark.parametrize(("split", "images"), [("test", 1000), ("val", 400)])
def test_the_whole_split_is_taken_however_few_images_training_took(
    trained, split: str, images: int
) -> None:
    result = evaluate_checkpoints(
        EvaluateRequest(Networks((str(trained / "last.pt"),), threads=1), split)
    )
    assert (result["images"], result["split"]) == (images, split)


def test_the_mean_image_is_the_training_images_whatever_is_evaluated(
    trained, other, monkeypatch
) -> None:
    expected = load(NOISY.data, NOISY.run.seed, side=76).train.statistics(76)
    kept = checkpoint.read(trained / "last.pt")["data"]["statistics"]
    assert torch.equal(kept["mean_image"], expected.mean_image) and torch.equal(
        kept["covariance"], expected.covariance
    )
    before = scores_of(evaluate_checkpoints(asked(trained)))
    monkeypatch.setattr(
        Store, "statistics", lambda *_: pytest.fail("measured the images that are evaluated")
    )
    assert scores_of(evaluate_checkpoints(asked(trained))) == before
    ensemble = EnsembleRunner(
        Networks((str(trained / "last.pt"), str(other / "last.pt")), threads=1)
    )
    assert not torch.equal(
        ensemble.members[0].statistics.mean_image, ensemble.members[1].statistics.mean_image
    )


def test_a_run_that_needs_no_mean_image_keeps_none_and_one_that_does_resumes_with_it(
    trained, tmp_path
) -> None:
    run(NOISY.with_fields(out=str(tmp_path / "half"), mean="half", color_noise=0.0, max_steps=1))
    assert checkpoint.read(tmp_path / "half" / "last.pt")["data"]["statistics"] is None
    run(NOISY.with_fields(out=str(tmp_path / "second"), resume=str(trained / "last.pt"), epochs=2))
    assert checkpoint.read(tmp_path / "second" / "last.pt")["loop"]["epoch"] == 2


def changed(source: Path, target: Path, change) -> Path:
    content = checkpoint.read(source / "last.pt")
    change(content)
    target.mkdir()
    torch.save(content, target / "last.pt")
    return target


def larger(content: dict) -> None:
    content["config"]["data"].update(stored_side=300, mean="none", color_noise=0.0)
    content["data"]["statistics"] = None


def test_an_old_checkpoint_without_its_mean_image_is_refused(trained, tmp_path) -> None:
    old = changed(trained, tmp_path / "old", lambda content: content["data"].pop("statistics"))
    with pytest.raises(ValueError, match=r"old/last.pt: holds no mean image"):
        evaluate_checkpoints(asked(old))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: content["data"]["classes"].__setitem__(3, "cube"),
            "there is a class 'cube', unlike in .*run/last.pt",
        ),
        (lambda content: content["data"]["classes"].pop(), "there is no class '.*', unlike in"),
        (
            lambda content: content["data"]["classes"].reverse(),
            "the classes stand in another order",
        ),
        (lambda content: content["config"]["model"].update(classes=13), "has 13 logits, .* 12"),
        (
            larger,
            "crops from images of 89 pixels, .* of 76",
        ),
    ],
)
def test_networks_that_cannot_be_averaged_are_refused_with_the_reason(
    trained, tmp_path, change, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"odd/last.pt: .*{words}"):
        evaluate_checkpoints(asked(trained, changed(trained, tmp_path / "odd", change)))


@pytest.mark.parametrize(("asked", "expected"), [(None, "fp32"), ("bf16", "bf16")])
def test_the_precision_that_is_asked_for_is_computed_in(trained, asked, expected) -> None:
    request = Networks((str(trained / "last.pt"),), precision=asked, threads=1)
    ensemble, seen = EnsembleRunner(request), []
    assert ensemble.precision == ensemble.config.run.precision == expected
    fc7 = ensemble.model.networks[0].columns["0"].fc7
    fc7.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    ensemble.probabilities(torch.zeros(1, 3, 76, 76, dtype=torch.uint8))
    assert seen[-1] == {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]


@pytest.mark.parametrize(("asked", "expected"), [(0, NOISY.recipe.batch_size), (7, 7)])
def test_the_batch_size_that_is_asked_for_is_read(trained, monkeypatch, asked, expected) -> None:
    sizes, loader = [], EnsembleRunner.loader

    def recorded(self: EnsembleRunner, store: Store, batch_size: int) -> Loader:
        sizes.append(batch_size)
        return loader(self, store, batch_size)

    monkeypatch.setattr(EnsembleRunner, "loader", recorded)
    networks = Networks((str(trained / "last.pt"),), threads=1)
    evaluate_checkpoints(EvaluateRequest(networks, batch_size=asked, limit_test=12))
    assert sizes == [expected]


def test_the_average_and_the_weights_that_are_asked_for_are_taken(trained) -> None:
    files = (str(trained / "last.pt"), str(trained / "best.pt"))
    request = Networks(files, (1.0, 3.0), average="logits", ten_crop=True, threads=1)
    model = EnsembleRunner(request).model
    assert model.average == "logits" and model.weights[1] == 3 * model.weights[0]
