"""What earlier versions wrote is read under today's names, and what was typed then is refused with
them."""

import pytest

from alexnet_mp import Config, preset
from alexnet_mp.config.renamed import (
    RENAMED_FIELDS,
    RENAMED_VALUES,
    refuse_old_spellings,
)


def old_dictionary() -> dict:
    """A configuration as the versions before the renaming wrote it into checkpoints and
    config.json."""
    values = preset("original").to_dict()
    values["data"] |= {"mean": "image-centre", "crop_chunk": 32, "colour_noise": 0.1}
    values["data"] |= {"colour_unit": "deviation", "colour_divides": True}
    values["recipe"] |= {"schedule": "log", "log_epochs": [25, 51, 67, 72, 79]}
    values["run"] |= {"keep": 3, "wire_precision": "bf16"}
    for part, names in {
        "data": ("images_per_crop", "color_noise", "color_unit", "color_divides"),
        "recipe": ("schedule_epochs",),
        "run": ("keep_checkpoints", "exchange_precision"),
    }.items():
        for name in names:
            del values[part][name]
    return values


def test_an_old_configuration_is_read_under_todays_names() -> None:
    expected = preset("original").with_fields(keep_checkpoints=3, exchange_precision="bf16")
    assert Config.from_dict(old_dictionary()) == expected


def test_the_example_has_every_renamed_field_and_value() -> None:
    written = {
        name: value for part in list(old_dictionary().values())[1:] for name, value in part.items()
    }
    assert set(RENAMED_FIELDS) <= set(written)
    assert all(written[name] == old for name, old in RENAMED_VALUES)


def test_every_new_name_is_a_field_of_the_configuration() -> None:
    values = preset("demo").to_dict()
    names = {name for part in ("model", "data", "recipe", "run") for name in values[part]}
    assert set(RENAMED_FIELDS.values()) <= names and not set(RENAMED_FIELDS) & names
    for (name, _), new in RENAMED_VALUES.items():
        assert preset("demo").with_fields(**{name: new}).preset == "demo"


def test_an_unknown_field_is_still_refused() -> None:
    values = preset("demo").to_dict()
    values["recipe"]["learning_rate"] = 1
    with pytest.raises(ValueError, match=r"not a configuration of this version.*learning_rate"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--log-epochs", "1"], "--log-epochs: this flag is called --schedule-epochs now"),
        (["--log_epochs=1"], "--log-epochs: this flag is called --schedule-epochs now"),
        (["--keep", "3"], "--keep: this flag is called --keep-checkpoints now"),
        (["--wire-precision", "bf16"], "--wire-precision: .* --exchange-precision now"),
        (["--crop-chunk", "32"], "--crop-chunk: .* --images-per-crop now"),
        (["--colour-noise", "0.1"], "--colour-noise: .* --color-noise now"),
        (["--no-colour-divides"], "--no-colour-divides: .* --no-color-divides now"),
        (["--lr", "1", "--schedule", "log"], "--schedule log: this value is called 2012 now"),
        (["--schedule=log"], "--schedule log: this value is called 2012 now"),
        (["--mean", "image-centre"], "--mean image-centre: .* image-center now"),
    ],
)
def test_an_old_spelling_is_refused_with_the_new_one(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        refuse_old_spellings(argv)


def test_todays_spellings_and_the_tutorials_flags_pass() -> None:
    refuse_old_spellings(
        [
            "--patience",
            "7",
            "--delta",
            "0",
            "--schedule",
            "2012",
            "--out",
            "log",
            "--keep-checkpoints",
            "2",
        ]
    )
