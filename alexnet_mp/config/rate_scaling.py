"""Learning rates for another batch than the preset's, for which they were meant: --lr-scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from alexnet_mp.config.configuration import Config, RecipeConfig
from alexnet_mp.config.presets import preset


def rate_factor(config: Config) -> float:
    """The factor of --lr-scale: 1, batch / preset's batch (linear), or the root of that (sqrt).

    Linear is the rule of Goyal et al., 2017 (arXiv:1706.02677), and of "One weird trick" by
    A. Krizhevsky, 2014 (arXiv:1404.5997), which names the root as what theory says. ValueError
    where `config` has a preset of its own, whose batch is not known.
    """
    scale, batch = config.recipe.lr_scale, config.recipe.batch_size
    if scale == "none":
        return 1.0
    try:
        usual = preset(config.preset).recipe.batch_size
    except ValueError as error:
        raise ValueError(
            f"--lr-scale {scale}: compares the batch with the preset's; {error}"
        ) from None
    return batch / usual if scale == "linear" else math.sqrt(batch / usual)


def scaled_recipe(config: Config) -> RecipeConfig:
    """The recipe of `config` with the rates at which training begins. Raises as `rate_factor`."""
    factor, recipe = rate_factor(config), config.recipe
    return dataclasses.replace(
        recipe,
        lr=recipe.lr * factor,
        bias_lr=None if recipe.bias_lr is None else recipe.bias_lr * factor,
        lr_min=recipe.lr_min * factor,
    )


def described_rates(config: Config) -> dict[str, Any]:
    """The factor and the rates after it, for config.json."""
    return {"factor": rate_factor(config), **_rates(scaled_recipe(config))}


def scaling_note(config: Config) -> str:
    """A line about the rates that --lr-scale changes, or ""."""
    if config.recipe.lr_scale == "none":
        return ""
    rates = ", ".join(
        f"--{name.replace('_', '-')} {rate:.4g}"
        for name, rate in _rates(scaled_recipe(config)).items()
    )
    return (
        f"--lr-scale {config.recipe.lr_scale}: batch {config.recipe.batch_size}, where preset "
        f"{config.preset} has {preset(config.preset).recipe.batch_size}: learning rates times "
        f"{rate_factor(config):.4g}: {rates}"
    )


def _rates(recipe: RecipeConfig) -> dict[str, float]:
    """The learning rates that the recipe's optimizer and schedule read, by field."""
    rates = {"lr": recipe.lr, "bias_lr": recipe.bias_lr}
    if recipe.schedule == "plateau":
        rates["lr_min"] = recipe.lr_min
    return {name: rate for name, rate in rates.items() if rate is not None}
