"""What a run writes for TensorBoard (`--tensorboard`): scalars by step and by epoch, the kernels.

The package is imported only where the flag is given.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alexnet_mp.parallel.context import ParallelContext
from alexnet_mp.training.step_sync import Step

EVERY = 20
"""Steps between two points of a curve within an epoch: each waits for the device and the ranks."""

SPLITS = {"train": "training", "val": "validation"}
MEASURES = {"loss": "loss", "top1": "top-1 accuracy", "top5": "top-5 accuracy"}


def require_tensorboard() -> None:
    """Raises ValueError, with the way to install it, where the package is missing."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise ValueError(
            "--tensorboard: needs the package tensorboard: pip install tensorboard, "
            "or pip install 'alexnet_mp[tensorboard]'"
        ) from None


class TensorBoard:
    """Writes into `folder` on rank 0. All ranks call its methods, at the same steps.

    `steps_done` is where a resumed run goes on: what was written of later steps, before it was
    stopped, is hidden by TensorBoard, so that no step appears twice.
    """

    def __init__(self, folder: Path, context: ParallelContext, steps_done: int = 0) -> None:
        self.context, self.writer = context, None
        if context.is_rank0:
            from torch.utils.tensorboard import SummaryWriter

            new_writer: Any = SummaryWriter  # torch's has no types
            self.writer = new_writer(str(folder), purge_step=steps_done + 1 if steps_done else None)

    def record_step(self, step: Step, loss_scale: float) -> None:
        """Every `EVERY` steps: loss, accuracy and rate of the step, norms of its gradients.

        `loss_scale` is what fp16 multiplied the gradients with. The step may turn out not to count.
        """
        if step.number % EVERY:
            return
        norms = {}
        if self.context.data_rank == 0:  # the copies of the network have the same gradients
            norms = layer_norms(step.names, step.norms / loss_scale)
        everywhere = self.context.gather((step.sums.tolist(), norms))
        if self.writer is None:
            return
        firsts = everywhere[:: self.context.column_ranks]  # the ranks of a copy have the same sums
        loss, weight, images, correct = map(sum, zip(*(sums for sums, _ in firsts), strict=True))
        scalars = {
            "step/learning rate": step.lr,
            "step/training loss": loss / weight if weight else float("nan"),
            "step/training top-1 accuracy": correct / images if images else float("nan"),
        }
        for _, found in everywhere:
            for (column, layer), norm in found.items():
                scalars[f"gradient norm column {column}/{layer}"] = norm
        self._write(scalars, step.number)

    def record_epoch(self, record: Mapping[str, Any], model: nn.Module) -> None:
        """Writes a line of history.jsonl, and the first layer's kernels, of all ranks' columns."""
        kernels = self.context.gather_to_rank0(
            {
                name: parameter.detach()
                for name, parameter in model.named_parameters()
                if name.endswith("conv1.weight")
            }
        )
        if self.writer is None:
            return
        scalars = {
            f"epoch/{split} {measure}": record[f"{short}_{key}"]
            for short, split in SPLITS.items()
            for key, measure in MEASURES.items()
            if f"{short}_{key}" in record
        }
        scalars |= {
            "epoch/gradient norm": record["grad_norm"],
            "epoch/images per second": record["images_per_second"],
            "epoch/learning rate": record["lr"],
        }
        self._write(scalars, record["step"])
        from alexnet_mp.plotting.kernels import kernel_sheet  # matplotlib takes a second to import

        for column, (_, weights) in enumerate(sorted(kernels.items())):
            sheet = kernel_sheet(weights)  # (height, width, 3)
            tag = f"conv1 kernels/column {column}"
            self.writer.add_image(tag, sheet, record["step"], dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Writes what is left. A second call does nothing."""
        if self.writer is not None:
            self.writer.close()

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        assert self.writer is not None
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)


def layer_norms(names: Sequence[str], norms: Tensor) -> dict[tuple[int, str], float]:
    """(column, layer) -> the norm of its gradient, from the `norms` (P,) of the parameters `names`.

    Parameters that do not lie in `columns.<i>.<layer>` are left out.
    """
    squares: dict[tuple[int, str], float] = defaultdict(float)
    for name, norm in zip(names, norms.tolist(), strict=True):
        root, *place = name.split(".")
        if root == "columns" and len(place) > 2:
            squares[int(place[0]), place[1]] += norm**2
    return {key: square**0.5 for key, square in squares.items()}
