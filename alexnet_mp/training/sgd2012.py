"""The optimizer of 2012: stochastic gradient descent with the learning rate inside the velocity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from alexnet_mp.config import RecipeConfig

FUSED = ("cpu", "cuda")  # devices for which every torch since 2.6 has a fused kernel


class SGD2012(torch.optim.Optimizer):
    """v <- momentum * v - weight_decay * lr * w - lr * gradient;  w <- w + v   (paper, section 5).

    torch.optim.SGD keeps lr outside its buffer: equal at a constant lr, but after a drop the 2012
    velocity keeps steps of the old size for about ten iterations. A group whose lr is 0 is frozen:
    no step, no decay, the velocity kept, as in the 2012 source. `gradient` is the mean over the
    minibatch. Raises ValueError for a negative setting.

        optimizer = SGD2012(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0005,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} {value}: must not be negative")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every group from the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights or group["lr"] == 0:
                continue
            # torch's own kernel, one pass over memory where it is fused, does buffer <- momentum *
            # buffer + (1 - dampening) * (gradient + weight_decay * w); w <- w - lr * buffer. With
            # lr = 1 and dampening = 1 - our lr that is the rule above, with the velocity's sign
            # turned. Without momentum it has no buffer and ignores dampening.
            momentum, lr = group["momentum"], group["lr"]
            sgd(
                weights,
                [p.grad for p in weights],
                [self.descent(p) for p in weights],
                lr=1.0 if momentum else lr,
                dampening=1 - lr,
                momentum=momentum,
                weight_decay=group["weight_decay"],
                nesterov=False,
                maximize=False,
                fused=weights[0].device.type in FUSED,
                foreach=weights[0].device.type not in FUSED,
                # a tensor on the device: where it is not 0 the kernel changes nothing
                found_inf=getattr(self, "found_inf", None),
            )
        return loss

    def descent(self, parameter: nn.Parameter) -> Tensor:
        """The negative velocity of `parameter`, of its shape; zero before its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if "descent" not in state:
            state["descent"] = torch.zeros_like(parameter)
        return state["descent"]


def parameter_groups(model: nn.Module, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """Four groups, which the 2012 schedule treats apart: weights and biases, of conv1 and the rest.

    Each carries `layer` (conv1 or rest) and `kind` (weight or bias). A module without a conv1 has
    the rest only.
    """
    groups: dict[tuple[str, str], list[nn.Parameter]] = {
        (layer, kind): [] for layer in ("conv1", "rest") for kind in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        layer = "conv1" if ".conv1." in f".{name}" else "rest"
        groups[layer, "bias" if name.endswith("bias") else "weight"].append(parameter)
    return [
        {
            "params": parameters,
            "layer": layer,
            "kind": kind,
            "lr": recipe.lr if kind == "weight" or recipe.bias_lr is None else recipe.bias_lr,
            "weight_decay": recipe.weight_decay if kind == "weight" or recipe.bias_decay else 0.0,
        }
        for (layer, kind), parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over `model`: SGD2012, or torch.optim.SGD for `optimizer="torch"`."""
    kind = SGD2012 if recipe.optimizer == "2012" else torch.optim.SGD
    return kind(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def velocity_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """The velocity (2012) or momentum buffer (torch) of `parameter`; zeros before a step."""
    state: dict[str, Tensor | None] = optimizer.state.get(parameter, {})
    descent = state.get("descent")
    if descent is not None:
        return -descent
    value = state.get("momentum_buffer")
    return torch.zeros_like(parameter) if value is None else value


def set_velocity(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: Tensor) -> None:
    """Puts back what `velocity_of` gave."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(optimizer, SGD2012):
        optimizer.descent(parameter).copy_(-value)
    else:
        optimizer.state[parameter]["momentum_buffer"] = value.clone()
