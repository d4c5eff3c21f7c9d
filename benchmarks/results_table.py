#!/usr/bin/env python
"""Writes the measured figures of benchmarks/results into the READMEs.

    python benchmarks/results_table.py             rewrites the blocks
    python benchmarks/results_table.py --check     fails if a block is not what the files say

A block stands between `<!-- results: NAME FILE -->` and `<!-- end -->`. NAME is one of BLOCKS, FILE
a file in benchmarks/results; where it is not there, the block says that this was not measured. A
new file needs a new pair of comments only.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paired import CANNOT_TELL, HOLDS, OPPOSITE

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import run_main
from alexnet_mp.config.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READMES = ("README.md", "benchmarks/README.md")
BLOCK = re.compile(r"(<!-- results: ([\w-]+) ([^ ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
VIEWS = ("one_view", "ten_views")
PRECISIONS = {"fp32": "float32", "bf16": "bf16", "fp16": "fp16"}

Content = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to do with the blocks."""

    check: bool = False
    """Write nothing; name the blocks that are not what the files say, and fail."""


# --- words


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["|".join(f" {cell} " if cell else " " for cell in row) for row in [head, *rows]]
    lines.insert(1, "|".join(["---"] * len(head)))
    return "".join(f"|{line}|\n" for line in lines)


def number(value: float) -> str:
    """Three digits or all before the point, with commas for thousands."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"


def spread(median: float, least: float, most: float) -> str:
    return f"{number(median)} ({number(least)} to {number(most)})"


def with_interval(found: list[float] | None, values: list[float], sign: str = "+") -> str:
    """A mean with its interval, or the single value that has none."""
    if not found:
        return f"{values[0]:{sign}.2f}" if values else "-"
    mean, low, high = (f"{value:{sign}.2f}" for value in found)
    return f"{mean} ({low} to {high})"


def per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


# --- blocks


def throughput(content: Content) -> str:
    """Images a second of each row, and how many times those of torchvision's network."""
    rows = [row for row in content["rows"] if row.get("images_per_second")]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    found = {(row["row"], row["batch_size"], row["precision"]): row for row in rows}
    kept = any(row["row"] == "torchvision-kept" for row in rows)
    several = len({row["batch_size"] for row in rows}) > 1
    head = ["images/s"] + ["batch"] * several
    for precision in precisions:
        head += [PRECISIONS[precision], "x torchvision"] + ["x torchvision, memory kept"] * kept
    table = []
    for name, batch in dict.fromkeys((row["row"], row["batch_size"]) for row in rows):
        same = [found.get((name, batch, precision)) for precision in precisions]
        cells = [next(row for row in same if row)["label"]] + [f"{batch:,}"] * several
        for precision, row in zip(precisions, same, strict=True):
            other = found.get(("torchvision-kept", batch, precision))
            cells += _speeds(row, other)[: 2 + kept]
        table.append(cells)
    return markdown(head, table)


def _speeds(row: Content | None, kept: Content | None) -> list[str]:
    """The cells of one row in one precision."""
    if row is None:
        return ["-", "-", "-"]
    ratio = row.get("ratio_to_torchvision")
    mine, theirs = row.get("ratio_to_one_device"), kept and kept.get("ratio_to_one_device")
    return [
        spread(row["images_per_second"], *row["spread"]),
        f"{ratio:.2f}" if ratio else "-",
        f"{mine / theirs:.2f}" if mine and theirs else "-",
    ]


def exchange(content: Content) -> str:
    """A sentence on messages and bytes."""
    transfers = content["transfers"]
    ratios = [one["ratio_to_raw"] for one in transfers]
    return (
        f"The pair of ranks takes {min(ratios):.2f} to {max(ratios):.2f} times as long as raw "
        f"torch.distributed for messages of\n{transfers[0]['bytes']:,} bytes to "
        f"{transfers[-1]['bytes'] / 2**20:.0f} MiB (the largest at "
        f"{transfers[-1]['ours_gigabytes_per_second']:.1f} GB/s). A step of batch "
        f"{content['batch_size']:,} sends\n{content['bytes_per_step']:,} bytes a rank, data "
        f"parallelism's gradients {content['bytes_per_step_data_parallel']:,},\n"
        f"{content['ratio_data_parallel_to_ours']:.1f} times as much; they are level at batch "
        f"{content['batch_size_of_equal_bytes']:,}.\n"
    )


def loader(content: Content) -> str:
    """Images a second and core, with and without color noise."""
    found = {row["name"].replace("colour", "color"): row for row in content["rows"]}

    def cell(name: str, ratio: float | None = None) -> str:
        row = found.get(name)
        if row is None:
            return ""
        text = spread(row["images_per_second_per_core"], row["least"], row["most"])
        return text + (f", {ratio:.1f} times" if ratio else "")

    ratios = content["ratio_store_to_imagefolder"], content["ratio_jpeg_store_to_imagefolder"]
    packing = found["pack: launch/pack.py"]
    whole = spread(packing["images_per_second"], packing["least"], packing["most"])
    rows = [
        [text, cell(f"load: {name}", ratio), cell(f"load: {name}, color noise")]
        for text, name, ratio in (
            (
                "torchvision's ImageFolder in a DataLoader",
                "ImageFolder and DataLoader",
                None,
            ),
            ("store, raw", "store, raw", ratios[0]),
            ("store, JPEG", "store, JPEG", ratios[1]),
        )
    ]
    rows += [
        ["packing: Pillow in a loop", cell("pack: Pillow in a loop"), ""],
        [
            "packing: `launch/pack.py`, statistics and checksums included",
            f"{whole}, {content['pack_ratio_to_pillow']:.2f} times",
            "",
        ],
    ]
    return markdown(["images/s and core", "plain", "with color noise"], rows)


def claims(content: Content) -> str:
    """The claims with a 95 % interval over paired seeds, and a verdict on top-1 and top-5."""
    rows = []
    for row in content["claims"]:
        if row["measure"] == "speed":
            cells = _speed_cells(row)
        else:
            cells = [
                with_interval(row[f"interval{top}"], row[f"differences{top}"])
                for top in ("", "_top5")
            ]
        said = [row["verdict"], *([row["verdict_top5"]] if "verdict_top5" in row else [])]
        verdict = said[0] if len(set(said)) == 1 else ", ".join(said)
        rows.append([row["text"], row["paper"], *cells, str(len(row["seeds"])), verdict])
    head = ["claim", "paper", "top-1", "top-5", "seeds", "verdict"]
    request, machine = content["request"], content["machine"]
    if all(row["measure"] == "speed" for row in content["claims"]):
        rates = ", ".join(f"{rate:g}" for rate in request["rates"])
        length = f"Up to {request['relu_epochs']} epochs at each of the rates {rates}"
    else:
        length = f"{request['epochs']} epochs, {request['image_size']} pixels"
    return markdown(head, rows) + (
        f"\n{length}, batch {request['batch_size']}, {request['precision']}; "
        f"{machine['device_name']}, torch {machine['torch']}.\n"
    )


def _speed_cells(row: Content) -> list[str]:
    """Epochs of ReLU and of tanh, each at its best rate, and how many times as many."""
    if not row["ratios"]:
        return ["target not reached", ""]
    times = with_interval(row["interval"], row["ratios"], "")
    pairs = zip(row["with"], row["without"], row["fastest_rates"], strict=True)
    each = "; ".join(f"{a:.1f} and {b:.1f} (rates {r:g}, {t:g})" for a, b, (r, t) in pairs)
    return [f"{times} times", f"epochs: {each}"]


def recipes(content: Content) -> str:
    """Accuracies of each recipe, with one view and ten, and where the plateau was left."""
    rows = [
        [
            row["text"],
            str(len(row["seeds"])),
            str(max(row["epochs"], default="-")),
            *(_accuracy(row[f"{v}_{top}"]) for v in VIEWS for top in ("top1", "top5")),
            ", ".join("never" if step is None else f"{step:,}" for step in row["left_plateau"]),
        ]
        for row in content["recipes"]
    ]
    if average := content["average"]:
        cells = [per_cent(average[v][top]) for v in VIEWS for top in ("top1", "top5")]
        count = len(average["networks"])
        rows.append([f"the average of {count} of `original`", str(count), "", *cells, ""])
    head = ["", "seeds", "epochs", "one view, top-1", "top-5", "ten views, top-1", "top-5"]
    return markdown([*head, "left ln(classes) at step"], rows)


def _accuracy(cell: Content) -> str:
    if cell["mean"] is None:
        return "-"
    deviation = cell["deviation"]
    return per_cent(cell["mean"]) + (
        f" (sd {100 * deviation:.1f})" if deviation is not None else ""
    )


def readings(content: Content) -> str:
    """Where both readings, and what lies one difference away, leave the plateau, and end."""
    found = {row["label"].replace("colour", "color"): row for row in content["rows"]}

    def cells(label: str) -> list[str]:
        row = found[label]
        left = "never" if row["left_plateau"] is None else str(row["left_plateau"])
        return [left, f"{row['last_loss']:.3f}"]

    rows = [["**`paper`**", *cells("paper"), "**`original`**", *cells("original")]]
    for label in found:
        if label.startswith("paper + "):
            mine = label.removeprefix("paper ")
            other = mine.replace("the source's", "the paper's")
            rows.append([mine, *cells(label), other, *cells(f"original {other}")])
    left = f"left ln {content['classes']}"
    return markdown(["", left, "last loss", "", left, "last loss"], rows)


def cifar10(content: Content) -> str:
    """Accuracies on CIFAR-10's test images, of the best epoch's weights and of the last one's."""
    rows = []
    for preset in dict.fromkeys(network["preset"] for network in content["networks"]):
        members = [one for one in content["networks"] if one["preset"] == preset]
        for weights in ("best", "last"):
            scores = [one["weights"][weights] for one in members]
            ended = [one["best_epoch" if weights == "best" else "epochs"] for one in members]
            rows.append(
                [
                    f"`{preset}`",
                    ", ".join(str(one["seed"]) for one in members),
                    f"{weights} epoch: {', '.join(map(str, ended))}",
                    *(_each_and_mean([score.get(v) for score in scores]) for v in VIEWS),
                ]
            )
    machine = content["machine"]
    return markdown(["", "seeds", "weights of", "top-1, one view", "ten views"], rows) + (
        f"\n{content['images']:,} test images, {content['image_size']} pixels, "
        f"{content['precision']}; {machine['device_name']}, torch {machine['torch']}.\n"
    )


def _each_and_mean(scores: list[Content | None]) -> str:
    """Top-1 of each network and, of several, their mean."""
    values = [100 * score["top1"] for score in scores if score]
    each = ", ".join(f"{value:.2f}" for value in values)
    if len(values) < 2:
        return f"{each} %" if values else "-"
    return f"{each}; mean {statistics.mean(values):.2f} %"


BLOCKS: dict[str, Callable[[Content], str]] = {
    "throughput": throughput,
    "exchange": exchange,
    "loader": loader,
    "claims": claims,
    "recipes": recipes,
    "readings": readings,
    "cifar10": cifar10,
}


# --- the front page, which takes its figures from several files


def headline(contents: dict[str, Content]) -> str:
    """The front page's table and its notes. `contents`: the files by their names."""
    speed, sent = contents["throughput-2-cores.json"], contents["exchange-2-cores.json"]
    cifar, tiny = contents["cifar10-224px-h200.json"], contents["recipes-tiny-imagenet.json"]
    (original,) = (row for row in tiny["recipes"] if row["recipe"] == "original")
    (large,) = (one for one in cifar["networks"] if one["preset"] == "original")
    rows = {row["row"]: row for row in speed["rows"] if row["precision"] == "fp32"}
    two, plain = rows["two"], rows["plain"]
    theirs, kept = rows["torchvision"], rows["torchvision-kept"]
    top1, top5 = (per_cent(original[f"ten_views_{top}"]["mean"]) for top in ("top1", "top5"))
    averaged = per_cent(tiny["average"]["ten_views"]["top1"])

    def images(row: Content) -> str:
        return spread(row["images_per_second"], *row["spread"])

    table = [
        [
            "two ranks equal one device",
            "losses, gradients, weights, bit for bit",
            "`pytest tests/parallel/test_parity.py`",
        ],
        [
            "fast, with LRN",
            f"{speed['ratio_two_ranks_to_torchvision']:.2f} times torchvision's images/s, which "
            "has no LRN",
            "`python benchmarks/throughput.py`",
        ],
        [
            "few bytes",
            f"{sent['bytes_per_step']:,} a rank and step of {sent['batch_size']} images",
            "`python benchmarks/exchange.py`",
        ],
        [
            "it learns",
            f"100 ImageNet classes at {tiny['request']['image_size']} pixels: top-1 {top1}, top-5 "
            f"{top5} ({len(original['seeds'])} seeds); averaged {averaged}. "
            f"CIFAR-10 at {cifar['image_size']}: "
            f"{per_cent(large['weights']['last']['ten_views']['top1'])}",
            "[the commands][recipes]",
        ],
        [
            "as the paper says",
            _verdicts(
                contents["ablations-tiny-imagenet.json"]["claims"]
                + contents["relu-cifar10.json"]["claims"]
            ),
            "[the table][claims]",
        ],
    ]
    return markdown(["claim", "result", "command"], table) + (
        "\n- **Equal**: also 1e-10 from an independent network in float64; a resumed run equals an"
        " uninterrupted one bit\n  for bit.\n"
        f"- **Fast**: two ranks train {images(two)} images a second; torchvision's AlexNet "
        f"{images(theirs)} in\n  one process of two threads, {images(kept)} if it keeps freed "
        f"memory as we do; the paper written down\n  with `nn.LocalResponseNorm` "
        f"{number(plain['images_per_second'])}. The exchange is exposed for "
        f"{100 * two['exposed_share']:.1f} % of a step.\n"
        f"- **Few bytes**: data parallelism sends {sent['bytes_per_step_data_parallel']:,}, "
        f"{sent['ratio_data_parallel_to_ours']:.1f} times as many.\n"
    )


def _verdicts(rows: list[Content]) -> str:
    """How many claims hold; top-5 counts where top-1 does not tell."""
    first = [row["verdict"] for row in rows]
    second = [row.get("verdict_top5") for row in rows if row["verdict"] == CANNOT_TELL]
    (speed,) = (row["interval"][0] for row in rows if row["measure"] == "speed")
    parts = [
        f"{first.count(HOLDS)} of {len(rows)} claims hold",
        f"{second.count(HOLDS)} more in top-5",
        f"{first.count(OPPOSITE) + second.count(OPPOSITE)} the opposite",
        f"{second.count(CANNOT_TELL)} cannot be told",
    ]
    counted = ", ".join(part for part in parts if not part.startswith("0 "))
    return f"{counted}; ReLU: {speed:.1f} times fewer epochs"


# --- files


def filled(text: str, where: str, results: Path = RESULTS) -> str:
    """`text` with every block written anew. Raises ValueError that names an unknown block."""

    def fill(match: re.Match[str]) -> str:
        head, name, files, _, end = match.groups()
        names = files.split(",")
        missing = [file for file in names if not (results / file).is_file()]
        if missing:
            return f"{head}*Not measured yet: results/{missing[0]} is not there.*\n{end}"
        contents = {file: json.loads((results / file).read_text("utf-8")) for file in names}
        if name == "headline":
            return head + headline(contents) + end
        if name not in BLOCKS:
            raise ValueError(f"{where}: results: {name} is not one of {' '.join(BLOCKS)} headline")
        return head + BLOCKS[name](contents[names[0]]) + end

    return BLOCK.sub(fill, text)


def main() -> int:
    request = parse_request(Request, sys.argv[1:], "Writes measured figures into the READMEs.")
    stale = []
    for name in READMES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, name)
        if after != before:
            stale.append(name)
            if not request.check:
                write_atomically(path, after)
    if request.check and stale:
        print(f"{' '.join(stale)}: not what benchmarks/results says; run {sys.argv[0]}")
        return 1
    print(f"{' '.join(stale) or 'nothing'} to change" if request.check else f"written: {stale}")
    return 0


if __name__ == "__main__":
    run_main(main)
