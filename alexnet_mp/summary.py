"""Tables for people: the layers of a network, and the epochs of a run."""

from __future__ import annotations

from typing import Any

from alexnet_mp.config import ModelConfig

EPOCH_HEAD = "epoch    step        lr   train loss  train top-1   val loss  val top-1  val top-5  grad norm  images/s  seconds"


def layer_table(config: ModelConfig) -> list[dict]:
    """One dictionary per layer and column: layer, column, kernels, output (shape), parameters, multiply_adds, reads."""
    sizes, windows, rows = config.map_sizes(), config.kernel_sizes, []
    classes = config.classes or 1000
    outputs = (*config.kernels, *config.hidden, classes)
    for column in range(config.columns):
        own = 3
        for name, out in zip(config.layers, outputs, strict=True):
            if name not in windows and name in sizes:            # the first fully connected layer
                own *= sizes[name][0] * sizes[name][1]
            # fc8 is split by its inputs: each column has its own share of the sum
            inputs = own * (config.columns if config.crosses(name) and name != "fc8" else 1)
            size = windows.get(name, 1)
            weights = out * inputs * size * size
            positions = sizes[name][0] * sizes[name][1] if name in windows else 1
            bias = 0 if name == "fc8" and column else out
            rows.append({
                "layer": name, "column": column, "kernels": f"{out}, {size}x{size}" if name in windows else str(out),
                "output": (out, *sizes[name]) if name in windows else (out,), "parameters": weights + bias,
                "multiply_adds": weights * positions,
                "reads": "the image" if name == "conv1" else "all columns" if config.crosses(name) else "its own column",
            })
            own = out
    return sorted(rows, key=lambda row: config.layers.index(row["layer"]))


def summary(config: ModelConfig) -> str:
    """The layers of `config` as a table for people, with totals."""
    rows = layer_table(config)
    head = ("layer", "column", "kernels", "output", "parameters", "multiply-adds", "reads")
    cells = [(row["layer"], str(row["column"]), row["kernels"], " x ".join(map(str, row["output"])),
              f"{row['parameters']:,}", f"{row['multiply_adds']:,}", row["reads"]) for row in rows]
    total = ("total", "", "", "", f"{sum(r['parameters'] for r in rows):,}", f"{sum(r['multiply_adds'] for r in rows):,}", "")
    widths = [max(len(row[i]) for row in (head, *cells, total)) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(c.rjust(w) if 4 <= i <= 5 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(head), rule, *map(line, cells), rule, line(total)])


def epoch_line(record: dict[str, Any]) -> str:
    """One object of history.jsonl as a line under EPOCH_HEAD."""
    return (f"{record['epoch']:5d} {record['step']:7d} {record['lr']:9.2g} {record['train_loss']:12.4f} {record['train_top1']:12.1%} "
            f"{record['val_loss']:10.4f} {record['val_top1']:10.1%} {record['val_top5']:10.1%} {record['grad_norm']:10.3f} "
            f"{record['images_per_second']:9.0f} {record['seconds']:8.1f}")


def scores_table(result: dict[str, Any], classes: int) -> str:
    """What launch/evaluate.py found, as the JSON has it, for people."""
    lines = [f"{'weight':>8s}  checkpoint"] if len(result["checkpoints"]) > 1 else []
    lines += [f"{weight:8.3f}  {path}" for path, weight in zip(result["checkpoints"], result["weights"], strict=True)] if lines else []
    top = f"top-{min(5, classes)}"
    return "\n".join([
        *lines, f"{'data':>14s} {'split':>6s} {'loss':>9s} {'top-1':>8s} {top:>8s} {'images':>9s} {'views':>6s} {'seconds':>8s} {'images/s':>9s}",
        f"{result['data']:>14s} {result['split']:>6s} {result['loss']:9.4f} {result['top1']:8.2%} {result['top5']:8.2%} {result['images']:9,d} "
        f"{result['views']:6d} {result['seconds']:8.1f} {result['images_per_second']:9.0f}"])


def prediction_lines(answer: dict[str, Any]) -> list[str]:
    """One file's most probable classes, with a bar of up to 30 signs for each."""
    return [answer["file"], *(f"{entry['probability']:8.1%}  {'#' * round(30 * entry['probability']):30s}  {entry['class']}"
                              for entry in answer["top"])]
