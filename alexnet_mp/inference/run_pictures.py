"""The pictures of a finished run: opens what it left in its folder, asks the network what the pictures show, and draws them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from alexnet_mp.config import Config
from alexnet_mp.config.seeds import combine
from alexnet_mp.data import Augment, Loader, Splits, Statistics, Store, load, needs_statistics
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.plotting.curves import (
    ACCURACIES,
    NAMES,
    compare_curves,
    draw_curves,
    epochs_to,
    errors_or_values,
)
from alexnet_mp.plotting.pictures import (
    WHITE_NOISE,
    color_selectivity,
    draw_kernels,
    draw_neighbors,
    draw_predictions,
    draw_samples,
)
from alexnet_mp.training import checkpoint

NEIGHBORS = 6  # as in figure 4 of the paper
SAMPLES = 32


@dataclass(frozen=True)
class Picture:
    """One file that was written."""

    file: Path
    caption: str  # what is to be seen, in a line
    facts: dict[str, Any] = field(default_factory=dict)  # the same in numbers


class FinishedRun:
    """A run's configuration, history and whole network, on one device; its images only when they are asked for."""

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        data_dir: str = "",
        progress: bool = False,
    ) -> None:
        """ValueError or OSError, naming the file, where the folder is not a run's."""
        self.folder, self.device, self.progress = Path(folder), torch.device(device), progress
        self.config = read_config(self.folder)
        if data_dir:
            self.config = self.config.with_fields(data_dir=data_dir)
        self.history = read_history(self.folder)
        weights = next(
            (path for name in ("best.pt", "last.pt") if (path := self.folder / name).exists()), None
        )
        if weights is None:
            raise FileNotFoundError(
                f"{self.folder}: neither best.pt nor last.pt is there; has the run saved anything yet?"
            )
        content = checkpoint.read(weights)
        self.classes, statistics = (
            list(content["data"]["classes"]),
            content["data"].get("statistics"),
        )
        self.statistics = (
            Statistics(**statistics) if statistics else None
        )  # of the training images; None also in old checkpoints
        self.model = build_network(self.config.model)
        checkpoint.load_model(content, self.model, weights)
        self.model.to(self.device).eval()
        self._splits: Splits | None = None

    @property
    def kernels(self) -> list[Tensor]:
        """conv1's weights, column by column."""
        return [column.conv1.weight.detach().cpu() for column in self.model.columns.values()]

    @property
    def splits(self) -> Splits:
        """The run's images. ValueError where they are of other classes than it was trained on."""
        if self._splits is None:
            config = self.config
            source = (
                config.data
                if self.statistics is None
                else replace(config.data, mean="none", color_noise=0.0)
            )  # measures nothing
            splits = load(
                source,
                config.run.seed,
                progress=self.progress,
                side=config.data.resized_side(config.model.image_size),
            )
            if list(splits.train.classes) != self.classes:
                odd = sorted(set(splits.train.classes) ^ set(self.classes)) or ["their order"]
                raise ValueError(
                    f"--data-dir {config.data.data_dir}: these are not the classes that the run was trained on; {odd[0]} differs"
                )
            self._splits = splits
        return self._splits

    def loader(self, store: Store) -> Loader:
        """Batches of `store` in stored order, as the network sees images in testing."""
        config, size = self.config, self.config.model.image_size
        if self.statistics is None and needs_statistics(config.data):
            self.statistics = self.splits.train.statistics(config.data.resized_side(size))
        return Loader(
            store,
            Augment(config.data, size, self.statistics, self.device),
            config.recipe.batch_size,
            device=self.device,
        )

    def logits_and_fc7(self, store: Store, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """`logits_and_fc7` of the network to each batch of `store`."""
        loader = self.loader(store)
        for images, *_ in tqdm(
            loader, desc=what, unit=" batches", leave=False, disable=None if self.progress else True
        ):
            yield logits_and_fc7(self.model, images)

    def chosen(self, store: Store, count: int, purpose: str) -> Store:
        """`count` images of `store` for a picture: one of each class, then a second of each, and so on; the run's seed says which."""
        return store.subset(
            class_balanced_sample(
                store.labels, count, combine(self.config.run.seed, "figures", purpose)
            )
        )


@torch.no_grad()
def logits_and_fc7(model: AlexNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and what fc7 sends on to fc8 (N, hidden units, columns side by side: 4,096), in float32.

    That is fc7 after its nonlinearity and, if dropout as of 2012 follows, the factor that testing has in its place, 0.5.
    """
    parts: dict[str, Tensor] = {}
    hooks = [
        column.fc8.register_forward_pre_hook(
            lambda _, inputs, index=index: parts.update({index: inputs[0]})
        )
        for index, column in model.columns.items()
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits.float(), torch.cat([parts[index] for index in model.columns], 1).float()


def nearest(queries: Tensor, batches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Distances (Q, count) and numbers (Q, count) of the rows nearest to each of `queries` (Q, F), nearest first.

    The rows come in `batches` (N, F) and are counted through; only the best are kept. Of equally near ones the first comes first,
    and fewer rows than `count` give fewer columns.
    """
    distances = queries.new_empty((len(queries), 0))
    numbers = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    seen = 0
    for rows in batches:
        # Not by a matrix product, which loses small distances to rounding.
        theirs = torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.cat(
            [
                numbers,
                torch.arange(seen, seen + len(rows), device=queries.device).expand(
                    len(queries), -1
                ),
            ],
            1,
        )
        distances, order = torch.cat([distances, theirs], 1).sort(dim=1, stable=True)
        distances, numbers = distances[:, :count], numbers.gather(1, order[:, :count])
        seen += len(rows)
    return distances.cpu(), numbers.cpu()


def class_balanced_sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Up to `count` places in `labels`, by chance but evenly: no class for the second time before each had its first."""
    order, seen, turns = np.random.default_rng(seed).permutation(len(labels)), Counter(), []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    return order[np.argsort(turns, kind="stable")][:count]


def images_of(store: Store) -> Tensor:
    """All images of a small `store`, whole, at the side of the largest."""
    return store.gather(range(len(store)), max(store.sides))


def read_config(folder: Path) -> Config:
    """The configuration in a run's config.json. OSError or ValueError naming the file."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the pictures are drawn from a folder that launch/train.py wrote"
        )
    try:
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a run's configuration ({error})") from None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a run's history.jsonl, none if it is empty. OSError or ValueError naming the file."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except ValueError as error:
        raise ValueError(f"{path}: not a run's history ({error})") from None


# ---- the pictures ----------------------------------------------------------------------------------------------------------


def draw(
    run: FinishedRun,
    out: Path,
    images: int = 8,
    window: int = 1,
    others: Sequence[str] = (),
    key: str = "train_top1",
    target: float | None = None,
) -> Iterator[Picture]:
    """All pictures of `run` into folder `out`, which is made, one after another as they are ready; those that need no images first.

    `images` test images are shown. compare.png comes with `others`, more runs' folders. Without an epoch there is no curves.png.
    """
    histories = (
        {
            name: read_history(folder)
            for name, folder in _named([run.folder, *map(Path, others)]).items()
        }
        if others
        else {}
    )
    for history in histories.values():
        errors_or_values(history, key)  # what is wrong with them is said before the work
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error}") from None
    yield kernels(run, out)
    if run.history:
        yield curves(run, out, window)
    if histories:
        yield comparison(histories, out, key, target, window)
    yield samples(run, out)
    yield predictions(run, out, images)
    yield neighbors(run, out, images)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their names, or by their whole paths where two are called the same."""
    names = [folder.resolve().name for folder in folders]
    return dict(
        zip(names if len(set(names)) == len(names) else map(str, folders), folders, strict=True)
    )


def kernels(run: FinishedRun, out: Path) -> Picture:
    """The first layer's kernels and how much they look at color."""
    draw_kernels(run.kernels, out / "kernels.png")
    scores = [color_selectivity(column) for column in run.kernels]
    means = ", ".join(f"{float(s.mean()):.2f} in column {i}" for i, s in enumerate(scores))
    return Picture(
        out / "kernels.png",
        f"{sum(map(len, scores))} first-layer kernels; color selectivity {means} (random weights {WHITE_NOISE:.2f})",
        {
            "color_selectivity": [float(s.mean()) for s in scores],
            "color_selectivity_of_kernels": [s.tolist() for s in scores],
        },
    )


def curves(run: FinishedRun, out: Path, window: int = 1) -> Picture:
    """Loss and error over epochs."""
    draw_curves(run.history, out / "curves.png", window)
    best = min(run.history, key=lambda record: record["val_loss"])
    facts = {
        "epochs": len(run.history),
        "best_epoch": best["epoch"],
        "val_loss": best["val_loss"],
        "val_top1": best["val_top1"],
    }
    return Picture(
        out / "curves.png",
        f"{len(run.history)} epochs; lowest validation loss {best['val_loss']:.4f} after epoch {best['epoch']}, "
        f"error there {1 - best['val_top1']:.2%}",
        facts,
    )


def comparison(
    histories: Mapping[str, Sequence[dict[str, Any]]],
    out: Path,
    key: str,
    target: float | None = None,
    window: int = 1,
) -> Picture:
    """One number of several runs over epochs."""
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
    return Picture(out / "compare.png", f"{NAMES.get(key, key)}, at the end {ends}", facts)


def samples(run: FinishedRun, out: Path) -> Picture:
    """Training images with their classes."""
    store = run.chosen(run.splits.train, SAMPLES, "samples")
    draw_samples(images_of(store), torch.from_numpy(store.labels), run.classes, out / "samples.png")
    return Picture(
        out / "samples.png",
        f"{len(store)} training images of {len(set(store.labels.tolist()))} classes",
    )


def predictions(run: FinishedRun, out: Path, count: int) -> Picture:
    """Test images and the classes that the network finds likeliest."""
    store = run.chosen(run.splits.test, count, "test")
    probabilities = (
        torch.cat([logits for logits, _ in run.logits_and_fc7(store, "test images")])
        .softmax(1)
        .cpu()
    )
    labels = torch.from_numpy(store.labels)
    draw_predictions(images_of(store), labels, probabilities, run.classes, out / "predictions.png")
    best = probabilities.topk(min(5, probabilities.shape[1]), 1).indices == labels[:, None]
    right, among = int(best[:, 0].sum()), int(best.any(1).sum())
    return Picture(
        out / "predictions.png",
        f"{len(store)} test images; {right} right, {among} with their class among the best {best.shape[1]}",
        {"images": len(store), "right": right, "among_best": among},
    )


def neighbors(run: FinishedRun, out: Path, count: int) -> Picture:
    """Test images and the training images nearest to them by fc7."""
    store, train = run.chosen(run.splits.test, count, "test"), run.splits.train
    queries = torch.cat([fc7 for _, fc7 in run.logits_and_fc7(store, "test images")])
    distances, numbers = nearest(
        queries,
        (fc7 for _, fc7 in run.logits_and_fc7(train, "fc7 of the training images")),
        NEIGHBORS,
    )
    found = train.subset(numbers.flatten().numpy())
    labels = torch.from_numpy(found.labels).reshape(numbers.shape)
    images = images_of(found)
    draw_neighbors(
        images_of(store),
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
