"""Fields and values of a configuration that were renamed: the one table for old checkpoints and for
old flags.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

RENAMED_FIELDS = {
    "log_epochs": "schedule_epochs",
    "keep": "keep_checkpoints",
    "wire_precision": "exchange_precision",
    "crop_chunk": "images_per_crop",
    "colour_noise": "color_noise",
    "colour_unit": "color_unit",
    "colour_divides": "color_divides",
}
RENAMED_VALUES = {
    ("schedule", "log"): "2012",
    ("mean", "image-centre"): "image-center",
}
"""(field, old value) -> new value."""


def with_current_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a configuration that an earlier version wrote, in today's names and values."""
    renamed = {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}
    return {
        name: RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
        for name, value in renamed.items()
    }


def refuse_old_spellings(argv: Sequence[str]) -> None:
    """Raises ValueError, naming the new spelling, for the first old flag or value in `argv`."""
    words = [part for word in argv for part in _flag_and_value(word)]
    for flag, value in itertools.pairwise([*words, ""]):
        negation = "no-" if flag.startswith("--no-") else ""
        name = flag.removeprefix(f"--{negation}").replace("-", "_")
        if flag.startswith("--") and name in RENAMED_FIELDS:
            new = RENAMED_FIELDS[name].replace("_", "-")
            raise ValueError(f"{flag}: this flag is called --{negation}{new} now")
        if flag.startswith("--") and (name, value) in RENAMED_VALUES:
            raise ValueError(
                f"{flag} {value}: this value is called {RENAMED_VALUES[name, value]} now"
            )


def _flag_and_value(word: str) -> tuple[str, ...]:
    """`--flag=value` in two words; underscores in flags are hyphens, as the command line takes
    them.
    """
    if not word.startswith("--"):
        return (word,)
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    return (flag, value) if equals else (flag,)
