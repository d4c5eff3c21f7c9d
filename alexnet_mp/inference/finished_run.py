"""A finished run, opened again from its folder: configuration, history, network and images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_mp.config import Config
from alexnet_mp.config.progress import progress
from alexnet_mp.config.seeds import combine
from alexnet_mp.data import Loader, Splits, Store, load, needs_statistics
from alexnet_mp.inference.load_network import TrainedNetwork, class_difference, read_network
from alexnet_mp.inference.neighbors import class_balanced_sample
from alexnet_mp.model.alexnet import AlexNet


class FinishedRun:
    """A run's configuration, history and whole network on one device.

    Its network and its images are opened when they are first asked for.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        data_dir: str = "",
        show_progress: bool = False,
    ) -> None:
        """Opens the run in `folder`, with its images in `data_dir` if they have moved.

        Raises ValueError or OSError, naming the file, where the folder is not that of a run.
        """
        self.folder, self.device = Path(folder), torch.device(device)
        self.show_progress = show_progress
        self.config = read_config(self.folder)
        if data_dir:
            self.config = self.config.with_fields(data_dir=data_dir)
        self.history = read_history(self.folder)
        self._splits: Splits | None = None

    @cached_property
    def network(self) -> TrainedNetwork:
        """The best weights, or the last ones, with what belongs to them.

        Raises FileNotFoundError where the run has saved none, ValueError for a damaged file.
        """
        return read_network(_best_weights(self.folder))

    @cached_property
    def model(self) -> AlexNet:
        """The whole network on the device."""
        return self.network.build().to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.network.classes

    @property
    def kernels(self) -> list[Tensor]:
        """The weights of conv1, (K, 3, 11, 11) for each column."""
        return [
            column.get_parameter("conv1.weight").detach().cpu()
            for column in self.model.columns.values()
        ]

    @property
    def splits(self) -> Splits:
        """The run's images. Raises ValueError where they are of other classes than in training."""
        if self._splits is None:
            data = self.config.data
            if self.network.statistics is not None:  # then nothing is measured on the images
                data = replace(data, mean="none", color_noise=0.0)
            splits = load(
                data, self.config.run.seed, progress=self.show_progress, side=self.network.side
            )
            found = tuple(splits.train.classes)
            if found != self.classes:
                raise ValueError(
                    f"--data-dir {data.data_dir}: {class_difference(found, self.classes)}, unlike "
                    f"in the images that {self.folder} was trained on"
                )
            self._splits = splits
        return self._splits

    def loader(self, store: Store) -> Loader:
        """Batches of `store` in stored order, preprocessed as in testing."""
        if self.network.statistics is None and needs_statistics(self.config.data):
            statistics = self.splits.train.statistics(self.network.side)  # an old checkpoint
            self.network = replace(self.network, statistics=statistics)
        augment = self.network.augment(self.device)
        return Loader(store, augment, self.config.recipe.batch_size, device=self.device)

    def logits_and_fc7(self, store: Store, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and features, those that fc8 reads, of each batch of `store`, in float32."""
        batches = progress(
            self.loader(store),
            description=description,
            unit="batches",
            enabled=self.show_progress,
        )
        for images, *_ in batches:
            last = self.config.model.layers[-2]  # fc7; conv3 in the four-layer net
            logits, features = self.model.logits_and_features(images, last)
            yield logits.float(), features.float()

    def sample(self, store: Store, count: int, purpose: str) -> Store:
        """`count` images of `store` for a picture, class-balanced, chosen by the run's seed."""
        seed = combine(self.config.run.seed, "figures", purpose)
        return store.subset(class_balanced_sample(store.labels, count, seed))


def _best_weights(folder: Path) -> Path:
    for name in ("best.pt", "last.pt"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"{folder}: neither best.pt nor last.pt is there; has the run saved anything yet?"
    )


def read_config(folder: Path) -> Config:
    """The configuration in a run's config.json. Raises OSError or ValueError naming the file."""
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
    """The epochs in a run's history.jsonl, which may be none.

    Raises OSError or ValueError naming the file.
    """
    path = folder / "history.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: not a run's history ({error})") from None
