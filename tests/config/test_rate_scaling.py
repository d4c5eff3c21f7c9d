"""--lr-scale: rates follow the batch, by the preset's own."""

import math

import pytest

from alexnet_mp import Config, preset
from alexnet_mp.config.rate_scaling import described_rates, scaled_recipe, scaling_note


def test_without_a_scale_the_rates_stay_whatever_the_batch_is() -> None:
    config = preset("paper").with_fields(batch_size=1024)
    assert scaled_recipe(config) == config.recipe and scaling_note(config) == ""


@pytest.mark.parametrize(("scale", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_all_rates_are_multiplied_and_nothing_else(scale: str, factor: float) -> None:
    config = preset("paper").with_fields(batch_size=512, lr_scale=scale, bias_lr=0.02)
    recipe = scaled_recipe(config)
    assert recipe.lr == pytest.approx(0.01 * factor)
    assert recipe.bias_lr == pytest.approx(0.02 * factor)
    assert recipe.lr_min == pytest.approx(1e-5 * factor)  # as many falls on a plateau as before
    same = [name for name, value in vars(config.recipe).items() if vars(recipe)[name] == value]
    assert set(vars(recipe)) - set(same) == {"lr", "bias_lr", "lr_min"}


def test_a_smaller_batch_has_smaller_rates() -> None:
    config = preset("tutorial").with_fields(batch_size=32, lr_scale="sqrt")
    assert scaled_recipe(config).lr == pytest.approx(0.01 / math.sqrt(2))


def test_a_rate_that_was_given_is_the_one_for_the_presets_batch() -> None:
    config = preset("demo").with_fields(batch_size=64, lr=0.05, lr_scale="linear")
    assert scaled_recipe(config).lr == pytest.approx(0.1)


def test_the_screen_and_config_json_say_what_the_rates_are() -> None:
    config = preset("original").with_fields(batch_size=256, lr_scale="linear")
    assert scaling_note(config) == (
        "--lr-scale linear: batch 256, where preset original has 128: learning rates times 2: "
        "--lr 0.02, --bias-lr 0.04"
    )
    assert described_rates(config) == {"factor": 2.0, "lr": 0.02, "bias_lr": 0.04}
    assert described_rates(preset("paper")) == {"factor": 1.0, "lr": 0.01, "lr_min": 1e-5}


def test_a_configuration_of_ones_own_has_no_batch_to_compare_with() -> None:
    with pytest.raises(ValueError, match=r"--lr-scale sqrt: .*--preset mine: not one of demo"):
        scaled_recipe(Config("mine").with_fields(lr_scale="sqrt"))
    assert scaled_recipe(Config("mine")).lr == 0.01
