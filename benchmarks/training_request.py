"""The flags that ablations.py and recipes.py share: images, machine, pool of processes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from common import choose_device, machine
from training_pool import Pool, minutes, threads_of
from trainings import Training, found, report
from tyro.conf import arg

from alexnet_mp import preset
from alexnet_mp.cli.process import printing_json
from alexnet_mp.config import Config
from alexnet_mp.config.files import write_atomically

STARTED = time.monotonic()
"""When the program began, from which --time-limit is counted."""

FILLED = 0.9
"""Share of the time that --fit fills: an estimate is one."""

Request = TypeVar("Request", bound="TrainingRequest")


@dataclass(frozen=True)
class TrainingRequest:
    """On what, how, and how many at a time?"""

    data: Literal["shapes", "cifar10", "fashion-mnist", "folder", "store"] = "shapes"
    """The images."""
    data_dir: str = "data"
    """Where they are, or are to be put."""
    image_size: int = 64
    """Side of the crop; the paper's is 224. The four-layer net always sees 32."""
    limit_train: int = 0
    """Use the first N training images, after the seeded shuffle; 0: all."""
    limit_test: int = 0
    """Likewise for the test images."""
    batch_size: int = 128
    """Images in one step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    jobs: int = 1
    """Trainings at a time, each in a process of its own. One alone leaves a large GPU idle; under
    NVIDIA's Multi-Process Service (nvidia-cuda-mps-control -d) 16 were 14 times as fast."""
    threads: int = 0
    """CPU threads of each training; 0: its share of the cores, beside a GPU two at most."""
    epochs: int = 20
    """Passes over the training images, to which schedules are scaled."""
    time_limit: float = 0.0
    """Seconds after which no training begins, those that run save and stop, and the table is made
    of what is complete; 0: no limit. Writing it may take some seconds more."""
    fit: bool = False
    """Train for fewer epochs than --epochs where the estimate says that all would not end within
    --time-limit; schedules are scaled to as many."""
    keep_checkpoints: bool = False
    """Keep the weights of every training; otherwise they are deleted once they are tested."""
    out: str = "runs/trainings"
    """Folder for the trainings and the table."""
    quick: bool = False
    """Train some steps on generated images with one seed: about a minute, no verdict."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the table and all histories into this file too, again whenever a training is done; -:
    to the standard output, once, and nothing else there."""

    def __post_init__(self) -> None:
        self.check_positive("jobs", "epochs")
        if not self.time_limit >= 0:
            raise ValueError(f"--time-limit {self.time_limit}: must not be negative")
        if self.fit and not self.time_limit:
            raise ValueError("--fit: into what? name --time-limit SECONDS")

    def check_positive(self, *names: str) -> None:
        """Raises ValueError that names the flag of the first of these fields below 1."""
        for name in names:
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: must be at least 1")

    def shortened(self: Request, **more: Any) -> Request:
        """What --quick means: everything else as asked."""
        small = {"limit_train": 128, "limit_test": 64, "batch_size": 32}
        return dataclasses.replace(self, data="shapes", out=f"{self.out}-quick", **small | more)

    def config(self, base: str, **changes: Any) -> Config:
        """A training of preset `base` on these images with `changes`.

        All training images train, and the test images validate, as in the paper.
        """
        names = ("data", "data_dir", "limit_train", "limit_test", "batch_size")
        mine = {name: getattr(self, name) for name in (*names, "precision", "device", "threads")}
        own = {"validation": "val", "limit_val": self.limit_test, "image_size": self.image_size}
        return preset(base).with_fields(**mine | own | changes)


class Table(Generic[Request]):
    """A request's trainings, and what is known of them so far: NAME.json in --out, and --json."""

    def __init__(
        self,
        name: str,
        request: Request,
        order: Callable[[Request], list[Training]],
        rows: Callable[[Request], dict[str, Any]],
    ) -> None:
        """`order` gives the trainings of a request, `rows` what its table says."""
        device = choose_device(request.device)
        threads = threads_of(request.threads, request.jobs, device.type)
        self.name, self.order, self.rows = name, order, rows
        self.request = dataclasses.replace(request, threads=threads)
        self.pool = Pool(Path(request.out), request.jobs, request.time_limit, STARTED)
        self.about: dict[str, Any] = {
            "machine": machine(device, threads * request.jobs),
            "time": {},
        }
        smoke = ": A SMOKE RUN, its figures mean nothing" if request.quick else ""
        self.title = (
            f"{name} on {request.data}, {request.image_size} pixels, {request.precision}, "
            f"{device.type}{smoke}"
        )

    def train(self) -> int:
        """Trains all that is missing, keeping the files up to date; returns the exit code."""
        print(self.title, flush=True)
        with self.pool as pool:
            trainings = self.order(self.request)
            missing = pool.missing(trainings)
            there = len(trainings) - len(missing)
            print(f"{len(trainings)} trainings, {there} of them found in {pool.out}", flush=True)
            if missing and pool.seconds_left() > 0:
                self._estimate(missing)
            if missing:
                self.about["time"] |= pool.train(self.order(self.request), self.write)
        return pool.exit_code

    def _estimate(self, missing: list[Training]) -> None:
        """Says how long it will take, and with --fit makes it short enough."""
        pool, asked = self.pool, self.request.epochs
        found = pool.estimate(missing)
        seconds = found.seconds(asked)
        self.about["time"] = dataclasses.asdict(found) | {"seconds": round(seconds, 1)}
        steps = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in found.seconds_per_step.items())
        print(
            f"{len(missing)} trainings, {pool.jobs} at a time: about {minutes(seconds)} (a step: "
            f"{steps}; {found.slowdown:.2f} times that beside the others)",
            flush=True,
        )
        room = FILLED * pool.seconds_left()
        if self.request.fit and seconds > room:
            epochs = min(found.epochs_within(room), asked)
            self.request = dataclasses.replace(self.request, epochs=epochs)
            seconds = found.seconds(epochs)
            print(f"--fit: {epochs} epochs, not {asked}: about {minutes(seconds)}", flush=True)
            self.about["time"]["seconds"] = round(seconds, 1)

    def write(self) -> dict[str, Any]:
        """Writes and returns everything that is known: the table, and each finished training."""
        out = self.pool.out
        ready = [one for one in self.order(self.request) if found(one, out) is not None]
        content = {
            "request": dataclasses.asdict(self.request),
            **self.about,
            "failed": self.pool.failed,
            **self.rows(self.request),
            "runs": {one.name: report(one, out) for one in ready},
        }
        text = json.dumps(content, separators=(",", ":")) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{self.name}.json", text)
        if self.request.json not in ("", "-"):
            write_atomically(Path(self.request.json), text)
        written: dict[str, Any] = json.loads(text)
        return written


def print_table(table: Table[Any], lines: Callable[[dict[str, Any]], list[str]]) -> int:
    """Trains what `table` lacks, then prints its `lines`; returns the exit code.

    With --json - the standard output has the JSON and nothing else.
    """
    target = table.request.json
    with printing_json(target if target == "-" else "") as write:
        code = table.train()
        content = table.write()
        print("\n".join(lines(content)), flush=True)
        write(content)
    return code
