"""The rows of throughput.py: the networks, their number of ranks, and the step that is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import common
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from alexnet_mp import AlexNet, preset
from alexnet_mp.config import Config, ModelConfig
from alexnet_mp.ops.allocator import keep_freed_memory
from alexnet_mp.ops.compile import compile_network
from alexnet_mp.ops.dropout import dropout_keys
from alexnet_mp.ops.precision import autocast
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.launcher import Environment
from alexnet_mp.parallel.meter import TRAINING
from alexnet_mp.parallel.rendezvous import meet
from alexnet_mp.training.sgd2012 import build_optimizer

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    ranks: int = 1
    column_ranks: int = 1
    keeps: bool = True  # what it frees for its next step, on a CPU, as launch/train.py does


ROWS = {
    "torchvision": Row("torchvision's AlexNet, one device, no LRN", keeps=False),
    "torchvision-kept": Row("the same, its freed memory kept like ours"),
    "one": Row("ours, one device"),
    "half": Row("our half net, one device"),
    "two": Row("ours, two ranks of a column each", 2, 2),
    "data-parallel": Row("ours, two data-parallel ranks", 2, 1),
    "four": Row("ours, four ranks: two copies of two columns", 4, 2),
    "data-parallel-four": Row("ours, four data-parallel ranks", 4, 1),
    "plain": Row("plain transcription, one device", keeps=False),
}


@dataclass(frozen=True)
class Case:
    """What all rows of one table do. `batch_size` is the global batch."""

    batch_size: int
    precision: str
    mode: str  # training, with the optimizer's step, or inference
    image_size: int = 224
    classes: int = 1000
    compile: str = "no"  # or yes, or cuda-graphs

    def model(self, row: str) -> ModelConfig:
        """Returns the paper's network; for `half` one of its columns, which reads only itself."""
        config = preset("paper").with_fields(image_size=self.image_size, classes=self.classes).model
        return Config(model=config).with_fields(columns=1).model if row == "half" else config


class PlainTranscription(nn.Module):
    """The paper's network written down plainly: groups=2 for the two GPUs, and torch's own norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        k1, k2, k3, k4, k5 = (2 * kernels for kernels in config.kernels)
        u6, u7 = (2 * units for units in config.hidden)
        height, width = config.map_sizes()["fc6"]

        def norm() -> nn.Module:
            return nn.LocalResponseNorm(
                config.lrn_size,
                alpha=config.lrn_alpha * config.lrn_size,
                beta=config.lrn_beta,
                k=config.lrn_k,
            )

        self.features = nn.Sequential(
            nn.ZeroPad2d(config.conv1_padding),
            nn.Conv2d(3, k1, 11, stride=4),
            nn.ReLU(inplace=True),
            norm(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(k1, k2, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            norm(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(k2, k3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(k3, k4, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(k4, k5, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(k5 * height * width, u6),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(u6, u7),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(u7, config.classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Worker:
    """One rank of one row."""

    def __init__(
        self, rank: int, ranks: int, port: int, name: str, device: str, threads: int
    ) -> None:
        """`threads` of all ranks together: the same on both sides of a comparison."""
        self.name, row = name, ROWS[name]
        config = preset("paper").with_fields(
            device=device,
            threads=max(1, threads // ranks),
            column_ranks=row.column_ranks,
            timeout=600.0,
        )
        place = Environment(rank, ranks, rank, ranks, "127.0.0.1", port)
        self.context = init_parallel(config, meet(config.run.timeout, place))
        self.device = self.context.device
        if row.keeps and self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(0)

    def prepare(self, case: Case, memory_format: str) -> None:
        """Builds the network, its optimizer and a batch."""
        self.case, place = case, self.context
        self.network = self.replica = self.optimizer = (
            None  # before the next is built: never two at once
        )
        training = case.mode == "training"
        self.network = self._network(case).to(memory_format=FORMATS[memory_format]).train(training)
        if case.compile != "no":
            compile_network(self.network, case.compile == "cuda-graphs")
        self.replica = place.wrap_ddp(self.network) if training else self.network
        self.optimizer = self._optimizer() if training else None
        first, last = (case.batch_size * (place.data_rank + k) // place.data_ranks for k in (0, 1))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(
            case.batch_size, 3, case.image_size, case.image_size, generator=generator
        )[first:last]
        self.images = images.to(self.device).contiguous(memory_format=FORMATS[memory_format])
        self.labels = torch.randint(case.classes, (case.batch_size,), generator=generator)[
            first:last
        ].to(self.device)
        self.rows, self.steps = torch.arange(first, last, device=self.device), 0

    def _network(self, case: Case) -> nn.Module:
        if self.name.startswith("torchvision"):
            return torchvision.models.alexnet(num_classes=case.classes).to(self.device)
        if self.name == "plain":
            return PlainTranscription(case.model("plain")).to(self.device)
        if self.name == "half":
            return AlexNet(case.model("half"), seed=0).to(self.device)
        return self.context.build_model(case.model(self.name), seed=0)

    def _optimizer(self) -> torch.optim.Optimizer:
        if isinstance(self.network, AlexNet):
            return build_optimizer(self.network, preset("paper").recipe)
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.SGD(
            self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005, fused=fused
        )

    def reset_memory(self) -> None:
        common.reset_peak_memory(self.device)

    def memory(self) -> int:
        return common.peak_memory(self.device)

    def run(self, steps: int) -> dict[str, float]:
        """Returns seconds of `steps` steps, seconds spent waiting for the peer, and bytes sent."""
        meter = self.context.meter
        sent, waited = meter.total_bytes(), meter.exposed_seconds[TRAINING]
        common.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self._train() if self.optimizer else self._infer()
        common.synchronize(self.device)
        return {
            "seconds": time.perf_counter() - start,
            "waited": meter.exposed_seconds[TRAINING] - waited,
            "bytes": meter.total_bytes() - sent,
        }

    def _train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.case.precision):
            logits = self.replica(self.images, *self._keys())
        loss = F.cross_entropy(logits.float(), self.labels, reduction="sum") / self.case.batch_size
        (
            loss * self.context.data_ranks
        ).backward()  # as the Trainer: undoes DistributedDataParallel's mean
        self.optimizer.step()
        self.steps += 1

    @torch.inference_mode()
    def _infer(self) -> None:
        with autocast(self.device, self.case.precision):
            self.network(self.images)

    def _keys(self) -> tuple[Any, ...]:
        return (
            (dropout_keys(0, self.steps, self.rows),) if isinstance(self.network, AlexNet) else ()
        )
