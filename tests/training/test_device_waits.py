"""A step whose flags are read later waits for no device: no value is read or copied across.

The model lies on the meta device, whose tensors have no values: `.item()`, `.cpu()`, `float()` and
`if tensor` raise there. A copy from the host, which CUDA would wait for as well, is seen by the
dispatcher.
"""

from typing import Any

import pytest
import torch
from small_nets import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_mp import AlexNet, Trainer, preset
from alexnet_mp.training.batch_gradient import BatchGradient
from alexnet_mp.training.sgd2012 import build_optimizer
from alexnet_mp.training.step_sync import Outcome, StepSync


class NoCopies(TorchDispatchMode):
    """Raises where a value crosses between the host and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "copy" in func.name():
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            if len(devices) > 1:
                raise AssertionError(f"{func.name()} between {' and '.join(sorted(devices))}")
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value is read")
        if func is torch.ops.aten.scalar_tensor.default:  # as `x[0] = 1.0` does: CUDA copies it
            raise AssertionError("a number is assigned")
        return func(*args, **kwargs)


def trained_on_meta(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Trainer:
    """An epoch of three steps on the meta device, without the reading of flags a step later."""
    model = AlexNet(TINY).to("meta")
    optimizer = build_optimizer(model, preset("demo").recipe)
    one = Trainer(
        model, nn.CrossEntropyLoss(reduction="sum"), optimizer, "meta", 0, verbose=False, **options
    )
    one.step_sync = StepSync(one.context, model, optimizer, one.loss_scale, deferred=True)
    optimizer.found_inf = None  # the kernel that reads it on the device is CUDA's
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # meta has none
    monkeypatch.setattr(one.step_sync, "_resolve", lambda step: Outcome(1.0, False, step.sums))
    images, labels = torch.zeros(4, 3, 67, 67, device="meta"), torch.zeros(4, device="meta").long()
    loader = [(images, labels)] * 3
    one._checked[0] = loader  # the first batch of all is looked at, once
    with NoCopies():
        assert one._train_epoch(loader)
    return one


def test_no_step_waits_for_the_device(monkeypatch) -> None:
    one = trained_on_meta(monkeypatch)
    assert one.step == one.metrics.steps == 3 and one.metrics.sums.device.type == "meta"


def test_steps_between_saves_do_not_wait_either(monkeypatch) -> None:
    saved = []
    trained_on_meta(monkeypatch, save_every=2, on_save=lambda: saved.append(1))
    assert saved == [1]


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss),
        lambda loss: loss.cpu(),
        lambda loss: bool(loss > 0),
        lambda loss: loss.tolist(),
        lambda loss: loss + torch.zeros(3).to(loss.device).sum(),
        lambda loss: loss.detach().clone().copy_(torch.zeros(())),
        lambda loss: torch.zeros(2, device=loss.device).__setitem__(0, 1.0),
    ],
    ids=["item", "float", "cpu", "bool", "tolist", "to", "copy_", "setitem"],
)
def test_a_wait_in_a_step_is_noticed(wait, monkeypatch) -> None:
    original = BatchGradient._share

    def waiting(self, loss, rows):
        wait(loss)
        return original(self, loss, rows)

    monkeypatch.setattr(BatchGradient, "_share", waiting)
    words = "value is read|number is assigned|meta tensor|between cpu and meta"
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=words):
        trained_on_meta(monkeypatch)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
def test_on_cuda_no_step_after_the_first_ones_synchronizes() -> None:
    model = AlexNet(TINY).to("cuda", memory_format=torch.channels_last)
    optimizer = build_optimizer(model, preset("demo").recipe)
    one = Trainer(model, nn.CrossEntropyLoss(reduction="sum"), optimizer, "cuda", 0, verbose=False)
    images, labels = torch.zeros(4, 3, 67, 67, device="cuda"), torch.zeros(4, device="cuda").long()

    class Batches(list[tuple[torch.Tensor, torch.Tensor]]):
        """From the fourth step on every call that waits for the device raises."""

        def __iter__(self):
            for number in range(8):
                if number == 3:  # the kernels are chosen, the first batch has been looked at
                    torch.cuda.set_sync_debug_mode("error")
                yield images, labels
            torch.cuda.set_sync_debug_mode("default")

    try:
        assert one._train_epoch(Batches([(images, labels)] * 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
