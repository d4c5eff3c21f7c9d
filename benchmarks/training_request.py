"""The flags that ablations.py and recipes.py share: images, machine, pool of processes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from common import choose_device, machine
from training_pool import Pool, threads_of
from trainings import Training, found, report
from tyro.conf import arg

from alexnet_mp import preset
from alexnet_mp.cli.process import printing_json
from alexnet_mp.config import Config
from alexnet_mp.config.files import write_atomically

STARTED = time.monotonic()
"""When the program began, from which --time-limit is counted."""

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
    """Trainings at a time, each in a process of its own. One alone leaves a large GPU idle."""
    threads: int = 0
    """CPU threads of each training; 0: its share of the cores, beside a GPU two at most."""
    time_limit: float = 0.0
    """Seconds after which no training begins, those that run save and stop, and the table is made
    of what is complete; 0: no limit."""
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
        self.check_positive("jobs")
        if not self.time_limit >= 0:
            raise ValueError(f"--time-limit {self.time_limit}: must not be negative")

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


@contextmanager
def trained(
    request: Request,
    name: str,
    order: Callable[[Request], list[Training]],
    table: Callable[[Request], dict[str, Any]],
) -> Iterator[tuple[Pool, Callable[[], dict[str, Any]]]]:
    """Trains what `order` says and keeps `name`.json in --out, and --json, up to date.

    Gives the pool, and a function that writes and returns everything once more: what `table` says,
    the machine and the time, and each finished training.
    """
    device = choose_device(request.device)
    threads = threads_of(request.threads, request.jobs, device.type)
    request = dataclasses.replace(request, threads=threads)
    pool = Pool(Path(request.out), request.jobs, request.time_limit, STARTED)
    about = {"machine": machine(device, threads * request.jobs)}

    def write_all() -> dict[str, Any]:
        ready = [one for one in order(request) if found(one, pool.out) is not None]
        content = {
            "request": dataclasses.asdict(request),
            **about,
            "failed": pool.failed,
            **table(request),
            "runs": {one.name: report(one, pool.out) for one in ready},
        }
        text = json.dumps(content, separators=(",", ":")) + "\n"
        pool.out.mkdir(parents=True, exist_ok=True)
        write_atomically(pool.out / f"{name}.json", text)
        if request.json not in ("", "-"):
            write_atomically(Path(request.json), text)
        return json.loads(text)  # type: ignore[no-any-return]

    with printing_json(request.json if request.json == "-" else "") as write:
        print(
            f"{name} on {request.data}, {request.image_size} pixels, {request.precision}, "
            f"{device.type}" + (": A SMOKE RUN, its figures mean nothing" * request.quick),
            flush=True,
        )
        about["time"] = pool.train(order(request), write_all)
        yield pool, write_all
        write(write_all())
        sys.stdout.flush()
