#!/usr/bin/env python
"""Times the exchange between two ranks against raw torch.distributed, and counts bytes.

    python benchmarks/exchange.py [--batch-size 128] [--image-size 224] [--device cpu]

Both directions run at once, as at a crossing. `ours` is the link's own start and wait, `raw` is
batch_isend_irecv on buffers made beforehand. Bytes are counted during one training step of the
paper's net: ours by the link's meter, data parallelism's in the hook through which
DistributedDataParallel reduces its gradients. The last line is JSON.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import common
import torch
import torch.distributed as dist
from cases import Case
from cases import Worker as Rank
from common import Contestant, Spread, available_cores, rounded
from tqdm import tqdm
from tyro.conf import arg

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config import ModelConfig, check
from alexnet_mp.model.layer_table import layer_table
from alexnet_mp.parallel.exchange import GroupLink, Transfer

SIZES = (1, 1024, 16_384, 131_072, 1_048_576, 4_194_304)  # float32 values each way


@dataclass(frozen=True)
class Request:
    """What does the exchange cost?"""

    batch_size: int = 128
    """Images in the training step whose bytes are counted."""
    image_size: int = 224
    """Side of its images, in pixels."""
    classes: int = 1000
    """Its logits."""
    rounds: int = 15
    """Turns of each side at each size; the median is over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tensors are; two ranks share one GPU if there is only one."""
    threads: int = 0
    """CPU threads, of both ranks together; 0: one for each core."""
    json: Annotated[str, arg(metavar="FILE")] = ""
    """Write the JSON into this file too."""

    def __post_init__(self) -> None:
        check(
            self.batch_size >= 2 and self.rounds >= 1,
            f"--batch-size {self.batch_size} --rounds {self.rounds}: two images and one round, "
            "or more",
        )
        check(
            self.image_size >= 64,
            f"--image-size {self.image_size}: 64 or more, below that nothing is left of the image",
        )
        check(self.threads >= 0, f"--threads {self.threads}: must not be negative")


class Pair(Rank):
    """One of two ranks, which also sends by hand."""

    def ours(self, numel: int) -> float:
        """Seconds until `numel` values have gone each way through the link's own transfer."""
        link, x = (
            GroupLink(self.context.model_group),
            torch.ones(numel, device=self.device),
        )
        return self._timed(lambda: Transfer([x], link).wait())

    def raw(self, numel: int) -> float:
        """Times raw torch.distributed, from host memory where the backend sends only from there."""
        group = self.context.model_group
        where = "cpu" if self.context.backend == "gloo" else self.device
        sent, received, peer = (
            torch.ones(numel, device=where),
            torch.empty(numel, device=where),
            1 - self.context.rank,
        )

        def swap() -> None:
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
                    dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
                ]
            ):
                work.wait()

        return self._timed(swap)

    def _timed(self, swap: Any) -> float:
        swap()  # both are here now
        common.synchronize(self.device)
        start = time.perf_counter()
        swap()
        common.synchronize(self.device)
        return time.perf_counter() - start

    def gradient_bytes(self) -> int:
        """Returns the bytes that a rank sends in one data-parallel step.

        An all-reduce of n bytes over r ranks takes 2 (r - 1) / r n from each.
        """
        reduced: list[int] = []

        def hook(group: dist.ProcessGroup, bucket: Any) -> Any:
            buffer = bucket.buffer()
            reduced.append(buffer.numel() * buffer.element_size())
            return (
                dist.all_reduce(buffer.div_(group.size()), group=group, async_op=True)
                .get_future()
                .then(lambda f: f.value()[0])
            )

        hook.__annotations__ = {}  # torch compares types, which are strings in this file
        self.replica.register_comm_hook(self.context.data_group, hook)
        self.run(1)
        ranks = self.context.data_ranks
        return 2 * (ranks - 1) * sum(reduced) // ranks


def transfers(pair: Contestant, rounds: int) -> list[dict[str, Any]]:
    """Seconds and bandwidth at each size."""
    rows = []
    for numel in tqdm(SIZES, "transfers", leave=False, disable=None):
        seconds: dict[str, list[float]] = {"raw": [], "ours": []}
        for turn in range(rounds + 1):
            for side, values in seconds.items():
                taken = max(pair.ask(side, numel))
                if turn:  # the first warms up
                    values.append(taken)
        row: dict[str, Any] = {"bytes": 4 * numel}
        for side, values in seconds.items():
            spread = Spread.of(values)
            row |= {
                f"{side}_seconds": rounded(spread.median, 7),
                f"{side}_spread": [round(value, 7) for value in spread.range],
                f"{side}_gigabytes_per_second": rounded(4 * numel / spread.median / 1e9),
            }
        rows.append(
            row
            | {
                "ratio_to_raw": rounded(
                    Spread.of(seconds["ours"]).over(Spread.of(seconds["raw"])).median
                )
            }
        )
    return rows


def least_values_per_image(config: ModelConfig) -> int:
    """Returns the values that one of two ranks must send for an image.

    Each crossing's inputs travel there and their gradients back; the logits of fc8 travel once.
    """
    rows = {row["layer"]: row["output"] for row in layer_table(config) if row["column"] == 0}
    height, width = rows["conv3"][1:]
    pooled = config.map_sizes()["fc6"]
    crossing = (
        config.kernels[1] * height * width
        + config.kernels[4] * pooled[0] * pooled[1]
        + config.hidden[0]
    )
    return 2 * crossing + config.classes


def count_bytes(request: Request, device: str, threads: int) -> dict[str, Any]:
    """One step of each kind, counted."""
    case = Case(request.batch_size, "fp32", "training", request.image_size, request.classes)
    with Contestant(Pair, 2, "data-parallel", device, threads) as copies:
        copies.ask("prepare", case, "contiguous")
        gradients = copies.ask("gradient_bytes")[0]
    with Contestant(Pair, 2, "two", device, threads) as pair:
        pair.ask("prepare", case, "contiguous")
        ours = [int(rank["bytes"]) for rank in pair.ask("run", 1)]
    least = 4 * least_values_per_image(case.model("two")) * request.batch_size
    ratio = gradients / max(ours)
    return {
        "batch_size": request.batch_size,
        "bytes_per_step": max(ours),
        "least_bytes_per_step": least,
        "bytes_per_step_data_parallel": gradients,
        "ratio_data_parallel_to_ours": rounded(ratio),
        "batch_size_of_equal_bytes": round(ratio * request.batch_size),
    }


def show(rows: list[dict[str, Any]], counted: dict[str, Any]) -> str:
    head = ("bytes each way", "ours, us", "raw, us", "ours / raw", "ours, GB/s", "raw, GB/s")
    lines = [
        (
            f"{row['bytes']:,}",
            f"{row['ours_seconds'] * 1e6:.0f}",
            f"{row['raw_seconds'] * 1e6:.0f}",
            f"{row['ratio_to_raw']:.2f}",
            f"{row['ours_gigabytes_per_second']:.2f}",
            f"{row['raw_gigabytes_per_second']:.2f}",
        )
        for row in rows
    ]
    return "\n".join(
        [
            common.table(head, lines),
            "",
            f"one training step at batch {counted['batch_size']}: each rank sends "
            f"{counted['bytes_per_step']:,} bytes "
            f"(the least that the layout allows: {counted['least_bytes_per_step']:,})",
            f"data parallelism's gradients: {counted['bytes_per_step_data_parallel']:,} bytes, "
            f"{counted['ratio_data_parallel_to_ours']:.1f} times as much; they are level at "
            f"batch {counted['batch_size_of_equal_bytes']:,}",
        ]
    )


def main() -> int:
    request = parse_request(Request, sys.argv[1:], __doc__.split("\n\n")[0])
    device = common.choose_device(request.device)
    threads = request.threads or max(2, available_cores())
    place = common.machine(device, threads)
    print(common.describe(place), flush=True)
    counted = count_bytes(request, device.type, threads)
    with Contestant(Pair, 2, "two", device.type, threads) as pair:
        rows = transfers(pair, request.rounds)
    print(show(rows, counted))
    common.finish(counted | {"transfers": rows, "machine": place}, request.json)
    return 0


if __name__ == "__main__":
    run_main(main)
