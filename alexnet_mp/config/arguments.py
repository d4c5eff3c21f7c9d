"""The requests of the commands beside train, checked when they are made.

The docstring of a field is its flag's help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from alexnet_mp.config.configuration import RunConfig
from alexnet_mp.config.model import check

WeightFormat = Literal[
    "checkpoint", "safetensors", "grouped", "torchvision", "onnx", "caffe", "npy"
]


@dataclass(frozen=True)
class Networks:
    """The networks that are asked, how their outputs are averaged, and the machine they run on."""

    checkpoint: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FILE")] = ()
    """last.pt or best.pt of a run. Several are averaged: name the flag again for each."""
    weights: Annotated[UseAppendAction[tuple[float, ...]], arg(metavar="W")] = ()
    """Weight of each checkpoint in the average, in their order; only the ratios matter. Default:
    all the same."""
    ten_crop: bool = False
    """Average ten views of each image (corners, center, and those mirrored) instead of the center
    alone (P 4.1)."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """Outputs that are averaged over a network's views: of the softmax (P 4.1), or its inputs. Over
    networks, softmax outputs are averaged always."""
    device: Literal["auto", "cpu", "cuda", "mps"] = RunConfig.device
    """auto: CUDA, else Apple's MPS (one rank), else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = RunConfig.backend
    """auto: nccl where each rank has a GPU of its own, else gloo."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of the layers; None: as the first checkpoint was trained."""
    threads: int = RunConfig.threads
    """CPU threads of each rank; 0 shares the machine's cores evenly."""
    column_ranks: int = RunConfig.column_ranks
    """Ranks that share one copy of the networks; 0: the most that columns and ranks allow. 1: data
    parallel."""
    timeout: float = RunConfig.timeout
    """Seconds that one rank waits for another before it gives up."""

    def __post_init__(self) -> None:
        files, weights = self.checkpoint, self.weights
        check(
            len(files) > 0,
            "--checkpoint FILE: name at least one, last.pt or best.pt of a run's folder",
        )
        check(
            len(weights) in (0, len(files)),
            f"--weights {' '.join(f'{w:g}' for w in weights)}: {len(weights)} for {len(files)} "
            f"checkpoint{'s' * (len(files) > 1)}; give one for each, in their order, or none",
        )
        check(
            all(0 <= w < math.inf for w in weights) and (not weights or sum(weights) > 0),
            f"--weights {' '.join(f'{w:g}' for w in weights)}: "
            "none may be negative, and not all of them 0",
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, one for each checkpoint, adding up to 1."""
        weights = self.weights or (1.0,) * len(self.checkpoint)
        return tuple(weight / sum(weights) for weight in weights)

    def machine(self) -> dict[str, Any]:
        """The fields that a RunConfig has too."""
        return {
            name: getattr(self, name)
            for name in ("device", "backend", "threads", "column_ranks", "timeout")
        }


@dataclass(frozen=True)
class EvaluateRequest:
    """The flags of `evaluate`. A field that is not given is as the first checkpoint was trained."""

    networks: Networks
    split: Literal["test", "val", "train"] = "test"
    """Images to measure; train: the training images, seen as in testing."""
    data: Literal["shapes", "cifar10", "fashion-mnist", "folder", "store"] | None = None
    """The set, of the same classes; None: the one that the first checkpoint was trained on."""
    data_dir: str | None = None
    """Where the set is; None: where it was in training."""
    cache_dir: str | None = None
    """Where generated and packed images are kept; None: alexnet_mp in $XDG_CACHE_HOME or in
    ~/.cache."""
    limit_test: int = 0
    """Only N images of the test split, the same that training takes with this flag; 0: all, also if
    training took fewer."""
    limit_val: int = 0
    """Likewise for --split val."""
    limit_train: int = 0
    """Likewise for --split train."""
    batch_size: int = 0
    """Images at a time, over all ranks together; 0: as in training. Ten views need no more memory
    than one."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the result into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        check(
            self.batch_size >= 0,
            f"--batch-size {self.batch_size}: one image or more, 0 for the checkpoint's own",
        )
        for name in ("test", "val", "train"):
            limit = getattr(self, f"limit_{name}")
            check(limit >= 0, f"--limit-{name} {limit}: must not be negative")
            check(
                not limit or name == self.split,
                f"--limit-{name} {limit}: these are not the images of --split {self.split}; "
                f"--limit-{self.split} limits those",
            )

    def data_fields(self) -> dict[str, Any]:
        """The fields that replace those of a checkpoint's data; its own limits never count."""
        given = {
            name: value
            for name in ("data", "data_dir")
            if (value := getattr(self, name)) is not None
        }
        # The cache of the machine that trained may not be there.
        own = ("limit_train", "limit_val", "limit_test", "cache_dir")
        return given | {name: getattr(self, name) for name in own}


@dataclass(frozen=True)
class PredictRequest:
    """The flags of `predict`."""

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE")]
    """Image files of any format that Pillow reads, told by content."""
    networks: Networks
    top: int = 5
    """Classes shown for each image, the most probable first."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the predictions into this file too; -: to the standard output, with nothing else."""

    def __post_init__(self) -> None:
        check(len(self.images) > 0, "IMAGE: name one image file or more, after the flags")
        check(self.top >= 1, f"--top {self.top}: one class or more")


@dataclass(frozen=True)
class PackRequest:
    """The flags of `pack`."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Folder with CLASS/, or with train/CLASS/ and val or test likewise; an archive of one; the
    folder of ILSVRC2012_img_train.tar; webdataset shards, also DIR/train-{0000..1023}.tar; or a
    folder of Parquet files."""
    store: Annotated[Positional[str], arg(metavar="STORE")] = ""
    """New folder for the packed images, or one whose packing was interrupted and goes on."""
    encode: Literal["raw", "jpeg"] = "raw"
    """raw: 196,608 bytes an image, the fastest to load. jpeg: about an eighth of that, decoded
    again at every load."""
    check: bool = False
    """Only report which files would be packed, left out or refused: read all, write nothing."""
    on_error: Literal["stop", "skip"] = "stop"
    """At files that cannot be read, stop and name them, or leave them out and list them."""
    val_labels: Annotated[str, arg(metavar="FILE")] = ""
    """Classes of a flat folder val: a line an image, CLASS (in the order of the files' names) or
    FILE CLASS; or Kaggle's LOC_val_solution.csv."""
    val_synsets: Annotated[str, arg(metavar="FILE")] = ""
    """Class of each number in --val-labels: line k names class k, or lines are NUMBER CLASS."""
    devkit: Annotated[str, arg(metavar="FILE")] = ""
    """ILSVRC2012_devkit_t12.tar.gz, which has the classes of ImageNet's validation images; taken
    unasked where it lies beside the archives."""
    workers: int = 0
    """Threads; 0: one for each core."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the report into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        check(
            not (self.devkit and self.val_labels),
            f"--devkit {self.devkit}: and --val-labels {self.val_labels} both name the classes of "
            "the validation images; give one of them",
        )
        check(
            self.workers >= 0, f"--workers {self.workers}: one thread or more, 0 for one each core"
        )
        check(
            bool(self.store) != self.check,
            "--check writes nothing: leave STORE out"
            if self.check
            else "STORE: name a folder for the packed "
            "images, after SOURCE, or give --check to see what would be packed",
        )


@dataclass(frozen=True)
class FiguresRequest:
    """The flags of `figures`."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Folder of a run: config.json, history.jsonl, and best.pt or last.pt."""
    out: str = ""
    """Folder for the pictures; default: RUN."""
    html: bool = False
    """Write report.html too: the whole run on one page, which needs no other file and no network.
    Parts that are missing are named there."""
    images: int = 8
    """Test images in predictions.png and in neighbors.png."""
    window: int = 1
    """Epochs that each point of a curve is the mean of."""
    compare: Annotated[tuple[str, ...], arg(metavar="RUN2")] = ()
    """More runs' folders, after RUN: compare.png shows one number of all of them, report.html all
    numbers and what differs."""
    key: str = "train_top1"
    """Name in history.jsonl that compare.png shows; accuracies are shown as errors."""
    target: float | None = None
    """Horizontal line in compare.png, e.g. 0.25; the legend says after how many epochs each run
    reached it."""
    data_dir: str = ""
    """Where the images are; default: where they were in training."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the numbers behind the pictures into this file too; -: to the standard output, and
    nothing else there."""

    def __post_init__(self) -> None:
        for name in ("images", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class CheckRequest:
    """The flags of the command `check`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = RunConfig.device
    """auto: CUDA, else Apple's MPS (one rank), else the CPU."""
    backend: Literal["auto", "gloo", "nccl"] = RunConfig.backend
    """auto: nccl where each rank has a GPU of its own, else gloo."""
    threads: int = RunConfig.threads
    """CPU threads of each rank; 0 shares the machine's cores evenly."""
    timeout: float = RunConfig.timeout
    """Seconds that one rank waits for another before it gives up."""
    seconds: float = 8.0
    """Seconds of each timing of training: on all ranks, and on one."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the rows into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        check(0 < self.seconds < 1e4, f"--seconds {self.seconds}: a positive number of seconds")


@dataclass(frozen=True)
class ConvertRequest:
    """The flags of the command `convert`."""

    source: Annotated[Positional[str], arg(metavar="IN")]
    """The file with a trained network."""
    target: Annotated[Positional[str], arg(metavar="OUT")]
    """The new file; one that is there is replaced. Its end names its format: .pt .safetensors .pth
    .onnx .caffemodel .npy."""
    from_kind: Annotated[WeightFormat | None, arg(name="from")] = None
    """The format of IN; None: as its content shows."""
    to_kind: Annotated[WeightFormat | None, arg(name="to")] = None
    """The format of OUT; None: as the end of its name says."""
    classes: Annotated[str, arg(metavar="FILE")] = ""
    """Names of the classes, one a line, in the order of the logits."""
    preset: str = ""
    """The preset whose norm, pooling and padding the network has, for a state dict that has
    none."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write what was converted into this file too; -: to the standard output, and nothing else
    there."""


@dataclass(frozen=True)
class FeaturesRequest:
    """The flags of the command `features`."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """Folder of image files; folders in it are read too."""
    out: Annotated[Positional[str], arg(metavar="OUT.npz")]
    """The new file, with `features` and `files`."""
    checkpoint: Annotated[str, arg(metavar="FILE")]
    """best.pt of a run, or a network in any format that `convert` reads."""
    layer: Literal["conv5", "fc6", "fc7"] = "fc7"
    """Whose output, after pooling and ReLU, columns side by side."""
    batch_size: int = 64
    """Images at a time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = RunConfig.device
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: int = RunConfig.threads
    """CPU threads; 0: all cores."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the report into this file too; -: to the standard output, and nothing else there."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, f"--batch-size {self.batch_size}: one image or more")
        check(self.out.endswith(".npz"), f"OUT.npz {self.out}: the name must end in .npz")
