"""The table of a network's layers, as data and for people."""

from __future__ import annotations

from alexnet_mp.config import ModelConfig


def layer_table(config: ModelConfig) -> list[dict]:
    """One dictionary per layer and column: layer, column, kernels, output (shape), parameters, multiply_adds, reads."""
    sizes, windows, rows = config.map_sizes(), config.kernel_sizes, []
    classes = config.classes or 1000
    outputs = (*config.kernels, *config.hidden, classes)
    for column in range(config.columns):
        own = 3
        for name, out in zip(config.layers, outputs, strict=True):
            if name not in windows and name in sizes:  # the first fully connected layer
                own *= sizes[name][0] * sizes[name][1]
            # fc8 is split by its inputs: each column has its own share of the sum
            inputs = own * (config.columns if config.crosses(name) and name != "fc8" else 1)
            size = windows.get(name, 1)
            weights = out * inputs * size * size
            positions = sizes[name][0] * sizes[name][1] if name in windows else 1
            bias = 0 if name == "fc8" and column else out
            rows.append(
                {
                    "layer": name,
                    "column": column,
                    "kernels": f"{out}, {size}x{size}" if name in windows else str(out),
                    "output": (out, *sizes[name]) if name in windows else (out,),
                    "parameters": weights + bias,
                    "multiply_adds": weights * positions,
                    "reads": "the image"
                    if name == "conv1"
                    else "all columns"
                    if config.crosses(name)
                    else "its own column",
                }
            )
            own = out
    return sorted(rows, key=lambda row: config.layers.index(row["layer"]))


def summary(config: ModelConfig) -> str:
    """The layers of `config` as a table for people, with totals."""
    rows = layer_table(config)
    head = ("layer", "column", "kernels", "output", "parameters", "multiply-adds", "reads")
    cells = [
        (
            row["layer"],
            str(row["column"]),
            row["kernels"],
            " x ".join(map(str, row["output"])),
            f"{row['parameters']:,}",
            f"{row['multiply_adds']:,}",
            row["reads"],
        )
        for row in rows
    ]
    total = (
        "total",
        "",
        "",
        "",
        f"{sum(r['parameters'] for r in rows):,}",
        f"{sum(r['multiply_adds'] for r in rows):,}",
        "",
    )
    widths = [max(len(row[i]) for row in (head, *cells, total)) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            c.rjust(w) if 4 <= i <= 5 else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(head), rule, *map(line, cells), rule, line(total)])
