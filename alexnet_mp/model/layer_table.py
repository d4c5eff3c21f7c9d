"""The table of a network's layers, as data and for people."""

from __future__ import annotations

import math
from typing import Any

from alexnet_mp.config import ModelConfig
from alexnet_mp.ops.precision import DTYPES

HEADINGS = {
    "layer": "layer",
    "column": "column",
    "kernels": "kernels",
    "output": "output",
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "reads": "reads",
    "sends": "sends",
    "bytes": "bytes",
}
NUMBERS = ("parameters", "multiply_adds", "sends", "bytes")


def layer_table(
    config: ModelConfig, precision: str = "fp32", exchange_precision: str = "same"
) -> list[dict[str, Any]]:
    """One dictionary per layer and column, in the order of the layers.

    "layer" and "column" name it; "kernels" (words), "output" (shape), "parameters" and
    "multiply_adds" (for an image) are its sizes; "reads" says whose outputs it multiplies; "sends"
    is the number of values that its column sends to each other column for an image in the forward
    pass, 0 where nothing crosses; "bytes" is what they take at these precisions of RunConfig, where
    the columns are on different ranks. Backward sends the same once more, but for fc8 nothing. Of
    norms across columns (Caffe's) the edges of the maps are not counted.
    """
    size = DTYPES[precision].itemsize
    narrow = size if exchange_precision == "same" else DTYPES[exchange_precision].itemsize
    sizes, windows, rows = config.map_sizes(), config.kernel_sizes, []
    outputs = (*config.kernels, *config.hidden, config.classes or 1000)
    for column in range(config.columns):
        below = 3  # kernels or units of the layer below in this column
        for name, out in zip(config.layers, outputs, strict=True):
            convolves, crosses = name in windows, config.crosses(name)
            # Pixels of each map that the layer reads; a convolution's output has as many (but
            # conv1's, which is read from the image).
            area = math.prod(sizes.get(name, (1, 1)))
            # fc8 is split by its inputs: each column multiplies its own; the products are summed.
            reads_all = crosses and name != "fc8"
            inputs = below * (config.columns if reads_all else 1)
            sends = 0 if not crosses else below * area if reads_all else out
            weights = out * inputs * (windows[name] ** 2 if convolves else area)
            rows.append(
                {
                    "layer": name,
                    "column": column,
                    "kernels": f"{out}, {windows[name]}x{windows[name]}" if convolves else str(out),
                    "output": (out, *sizes[name]) if convolves else (out,),
                    "parameters": weights + (0 if name == "fc8" and column else out),
                    "multiply_adds": weights * (area if convolves else 1),
                    "reads": "the image"
                    if name == "conv1"
                    else "all columns"
                    if reads_all
                    else "its own column",
                    "sends": sends,
                    # The logits that fc8 sums are sent as they are: all ranks need the same.
                    "bytes": sends * (narrow if reads_all else size),
                }
            )
            below = out
    return sorted(rows, key=lambda row: config.layers.index(row["layer"]))


def summary(config: ModelConfig, precision: str = "fp32", exchange_precision: str = "same") -> str:
    """The layers of `config` as a table for people, with totals.

    "sends" counts the values that the layer's column sends to each other column for an image, and
    "bytes" what they take at these precisions; at fc8 these are its share of the logits, which are
    summed.
    """
    rows = layer_table(config, precision, exchange_precision)
    totals = dict.fromkeys(HEADINGS, "") | {
        "layer": "total",
        **{name: f"{sum(row[name] for row in rows):,}" for name in NUMBERS},
    }
    cells = [
        {name: _words(value) for name, value in row.items()}
        | {name: f"{row[name]:,}" for name in NUMBERS}
        for row in rows
    ]
    lines = [HEADINGS, *cells, totals]
    widths = {name: max(len(line[name]) for line in lines) for name in HEADINGS}

    def line(row: dict[str, str]) -> str:
        return "  ".join(
            row[name].rjust(width) if name in NUMBERS else row[name].ljust(width)
            for name, width in widths.items()
        ).rstrip()

    rule = "  ".join("-" * width for width in widths.values())
    return "\n".join([line(HEADINGS), rule, *map(line, cells), rule, line(totals)])


def _words(value: object) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
