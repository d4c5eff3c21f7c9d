"""Draws the pictures of a finished run, each with a caption for people and its facts in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.data import Store
from alexnet_mp.inference.finished_run import FinishedRun, read_history
from alexnet_mp.inference.neighbors import nearest
from alexnet_mp.inference.run_facts import read_json
from alexnet_mp.plotting.confusion import draw_confusion, worst_classes
from alexnet_mp.plotting.curves import (
    ACCURACIES,
    AXIS_LABELS,
    Record,
    compare_curves,
    draw_curves,
    epochs_to,
    errors_or_values,
)
from alexnet_mp.plotting.kernels import RANDOM_SELECTIVITY, color_selectivity, draw_kernels
from alexnet_mp.plotting.predictions import (
    class_name,
    draw_neighbors,
    draw_predictions,
    draw_samples,
)
from alexnet_mp.plotting.timeline import draw_timeline, readable_bytes

NEIGHBORS = 6  # as in figure 4 of the paper
SAMPLES = 32
WORST = 12  # classes in confusion.png
TIMELINE = "timeline.json"
STILL_RANDOM = 0.05
"""Kernels count as noise if their color selectivity is this near to that of random weights."""
NOISE_NOTE = (
    "These kernels are close to their random start, which is expected after a short training on "
    "small images, as in the demo.\n"
    "Edges and colors appear over many epochs of large photographs (the paper: 90 epochs of 1.2 "
    "million)."
)


@dataclass(frozen=True)
class Picture:
    """A picture that was written."""

    file: Path
    caption: str
    """One line for people that says what can be seen."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same in numbers."""


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn: its file's name, and the work."""

    name: str
    draw: Callable[[], Picture]


def draw(run: FinishedRun, out: Path, **options: Any) -> Iterator[Picture]:
    """Draws all pictures of `run` into the folder `out`, and yields each as it is ready.

    Options and errors are those of `drawings`; ValueError or OSError where a picture's checkpoint
    or images cannot be read.
    """
    for drawing in drawings(run, out, **options):
        yield drawing.draw()


def drawings(
    run: FinishedRun,
    out: Path,
    images: int = 8,
    window: int = 1,
    others: Sequence[str] = (),
    key: str = "train_top1",
    target: float | None = None,
) -> list[Drawing]:
    """The pictures of `run` that belong into the folder `out`, which is made.

    Those that need no images come first. `images` test images are shown. With `others`, folders of
    more runs, there is a compare.png; without an epoch there is no curves.png, without `--profile`
    no timeline.png. Raises ValueError or OSError for a run that cannot be compared or a folder
    `out` that cannot be made.
    """
    runs = named([run.folder, *map(Path, others)]) if others else {}
    histories = {name: read_history(folder) for name, folder in runs.items()}
    for history in histories.values():
        errors_or_values(history, key)  # raises for a key that a run does not have
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error}") from None
    found = [Drawing("kernels", lambda: kernels(run, out))]
    if run.history:
        found.append(Drawing("curves", lambda: curves(run, out, window)))
    if histories:
        found.append(Drawing("compare", lambda: comparison(histories, out, key, target, window)))
    if (run.folder / TIMELINE).exists():
        found.append(Drawing("timeline", lambda: timeline(run.folder, out)))
    return [
        *found,
        Drawing("samples", lambda: samples(run, out)),
        Drawing("predictions", lambda: predictions(run, out, images)),
        Drawing("confusion", lambda: confusion(run, out)),
        Drawing("neighbors", lambda: neighbors(run, out, images)),
    ]


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders of runs by their names, or by their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return dict(zip(names, folders, strict=True))


def kernels(run: FinishedRun, out: Path) -> Picture:
    """Draws the first layer's kernels and says how selective they are for color."""
    scores = [color_selectivity(column) for column in run.kernels]
    mean = float(torch.cat(scores).mean())
    noisy = abs(mean - RANDOM_SELECTIVITY) < STILL_RANDOM
    draw_kernels(run.kernels, out / "kernels.png", note=NOISE_NOTE if noisy else "")
    means = ", ".join(f"{float(s.mean()):.2f} in column {i}" for i, s in enumerate(scores))
    return Picture(
        out / "kernels.png",
        f"{sum(map(len, scores))} first-layer kernels; color selectivity, the share of their "
        f"energy that is not gray: {means} (random weights {RANDOM_SELECTIVITY:.2f})"
        + ("; noise is expected after a short training on small images" if noisy else ""),
        {
            "color_selectivity": [float(s.mean()) for s in scores],
            "color_selectivity_of_kernels": [s.tolist() for s in scores],
        },
    )


def curves(run: FinishedRun, out: Path, window: int = 1) -> Picture:
    """Draws loss and error over epochs."""
    draw_curves(run.history, out / "curves.png", window, run.config.model.classes)
    best = min(run.history, key=lambda record: record["val_loss"])
    facts = {
        "epochs": len(run.history),
        "best_epoch": best["epoch"],
        "val_loss": best["val_loss"],
        "val_top1": best["val_top1"],
    }
    return Picture(
        out / "curves.png",
        f"{len(run.history)} epoch{'s' * (len(run.history) > 1)}; lowest validation loss "
        f"{best['val_loss']:.4f} after epoch {best['epoch']}, error there "
        f"{1 - best['val_top1']:.2%}",
        facts,
    )


def comparison(
    histories: Mapping[str, Sequence[Record]],
    out: Path,
    key: str,
    target: float | None = None,
    window: int = 1,
) -> Picture:
    """Draws one number of several runs over epochs."""
    compare_curves(histories, key, out / "compare.png", target=target, window=window)
    curves = {name: errors_or_values(history, key) for name, history in histories.items()}
    facts: dict[str, Any] = {name: {"last": values[-1]} for name, values in curves.items()}
    if target is not None:
        facts = {
            name: fact | {"epochs_to_target": epochs_to(curves[name], target, window)}
            for name, fact in facts.items()
        }
    form = ".2%" if key.endswith(ACCURACIES) else ".4g"
    ends = ", ".join(f"{name} {values[-1]:{form}}" for name, values in curves.items())
    return Picture(out / "compare.png", f"{AXIS_LABELS.get(key, key)}, at the end {ends}", facts)


def timeline(folder: Path, out: Path) -> Picture:
    """Draws the step that --profile recorded."""
    step = read_json(folder, TIMELINE)
    try:
        draw_timeline(step, out / "timeline.png")
        waits = ", ".join(
            f"rank {rank['rank']} waits {1e3 * rank['exposed_seconds']:.1f} of its "
            f"{1e3 * rank['seconds']:,.0f} ms for its peers' activations"
            for rank in step["ranks"]
        )
        sent = sum(message["bytes"] for message in step["messages"] if message["from"] == 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / TIMELINE}: not a recorded step ({error!r})") from None
    facts = {"step": step["step"], "bytes": sent, "messages": len(step["messages"])}
    return Picture(
        out / "timeline.png",
        f"step {step['step']}: rank 0 sends {readable_bytes(sent)}; {waits}",
        facts | {"exposed_seconds": [rank["exposed_seconds"] for rank in step["ranks"]]},
    )


def samples(run: FinishedRun, out: Path) -> Picture:
    """Draws training images with their classes."""
    store = run.sample(run.splits.train, SAMPLES, "samples")
    draw_samples(
        _whole_images(store), torch.from_numpy(store.labels), run.classes, out / "samples.png"
    )
    return Picture(
        out / "samples.png",
        f"{len(store)} training images of {len(set(store.labels.tolist()))} classes",
    )


def predictions(run: FinishedRun, out: Path, count: int) -> Picture:
    """Draws test images and their most probable classes."""
    store = run.sample(run.splits.test, count, "test")
    probabilities = (
        torch.cat([logits for logits, _ in run.logits_and_fc7(store, "test images")])
        .softmax(1)
        .cpu()
    )
    labels = torch.from_numpy(store.labels)
    draw_predictions(
        _whole_images(store), labels, probabilities, run.classes, out / "predictions.png"
    )
    best = probabilities.topk(min(5, probabilities.shape[1]), 1).indices == labels[:, None]
    correct, among = int(best[:, 0].sum()), int(best.any(1).sum())
    return Picture(
        out / "predictions.png",
        f"{len(store)} test images; {correct} correct, {among} with their class among the best "
        f"{best.shape[1]}",
        {"images": len(store), "correct": correct, "among_best": among},
    )


def confusion(run: FinishedRun, out: Path) -> Picture:
    """Draws what the worst classes of the test images are taken for."""
    store = run.splits.test
    answers = [logits.argmax(1).cpu() for logits, _ in run.logits_and_fc7(store, "all test images")]
    labels, predicted = torch.from_numpy(store.labels), torch.cat(answers)
    worst = worst_classes(labels, predicted, WORST)
    draw_confusion(worst, run.classes, out / "confusion.png")
    named = [class_name(run.classes, one.label) for one in worst]
    return Picture(
        out / "confusion.png",
        f"the {len(worst)} classes with the most errors among {len(store):,} test images; "
        f"{named[0]} is right in {worst[0].correct / worst[0].images:.1%}",
        {
            "images": len(store),
            "correct": int((labels == predicted).sum()),
            "classes": [
                {
                    "class": name,
                    "images": one.images,
                    "correct": one.correct,
                    "taken_for": {
                        class_name(run.classes, label): count
                        for label, count in one.taken_for.items()
                    },
                }
                for name, one in zip(named, worst, strict=True)
            ],
        },
    )


def neighbors(run: FinishedRun, out: Path, count: int) -> Picture:
    """Draws test images and the training images nearest to them by fc7."""
    store, train = run.sample(run.splits.test, count, "test"), run.splits.train
    queries = torch.cat([fc7 for _, fc7 in run.logits_and_fc7(store, "test images")])
    distances, numbers = nearest(
        queries,
        (fc7 for _, fc7 in run.logits_and_fc7(train, "fc7 of the training images")),
        NEIGHBORS,
    )
    found = train.subset(numbers.flatten().numpy())
    labels = torch.from_numpy(found.labels).reshape(numbers.shape)
    images = _whole_images(found)
    draw_neighbors(
        _whole_images(store),
        images.reshape(*numbers.shape, *images.shape[1:]),
        distances,
        out / "neighbors.png",
        query_labels=torch.from_numpy(store.labels),
        neighbor_labels=labels,
        classes=run.classes,
    )
    same = int((labels == torch.from_numpy(store.labels)[:, None]).sum())
    return Picture(
        out / "neighbors.png",
        f"{len(store)} test images, the nearest of {len(train):,} training images by fc7; "
        f"{same} of {numbers.numel()} are of the test image's class",
        {
            "searched": len(train),
            "neighbors": numbers.numel(),
            "of_the_same_class": same,
            "distances": distances.tolist(),
        },
    )


def _whole_images(store: Store) -> Tensor:
    """All images of a small `store`, whole: uint8 (N, 3, s, s) at the side of the largest."""
    return store.gather(range(len(store)), max(store.sides))
