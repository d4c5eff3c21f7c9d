"""Packages that only some formats need: imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """The module `name`. Raises ValueError with the way to install it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ValueError(
            f"this format needs the package {package}: pip install {package}, "
            "or pip install 'alexnet_mp[weights]' for all formats"
        ) from None
