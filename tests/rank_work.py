"""A function of a test module and its arguments, in a form that another process can read."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def can_be_imported(name: str) -> bool:
    """Tries it here first: in the server, a failing import would end the server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except Exception:
            return False
    return True


@dataclass(frozen=True)
class Work:
    """A rank's work, in a form that needs no import before the test's module is found by its FILE.

    pytest's importlib mode calls tests/test_x.py `tests.test_x`; others may not find that name.
    """

    module: str
    file: str
    name: str
    payload: bytes  # pickled (args, warning filters), which may hold classes of the module
    environment: dict[str, str]

    @staticmethod
    def of(function: Callable[..., Any], args: tuple[Any, ...]) -> Work:
        name = getattr(function, "__qualname__", repr(function))
        module = sys.modules.get(getattr(function, "__module__", ""))
        if getattr(module, name, None) is not function or not getattr(module, "__file__", None):
            raise ValueError(
                f"run needs a function at the top level of a module, for other processes to find; "
                f"{name} is none"
            )
        filters = [
            (action, _pattern(message), category, _pattern(where), line)
            for action, message, category, where, line in warnings.filters
        ]
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")
        }
        return Work(
            module.__name__,
            os.path.abspath(module.__file__),
            name,
            pickle.dumps((args, filters)),
            environment,
        )

    def load(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function and its arguments; sets the caller's warning filters."""
        module = sys.modules.get(self.module)
        if getattr(module, "__file__", None) is None or not os.path.samefile(
            module.__file__, self.file
        ):
            parent = self.module.rpartition(".")[0]
            if parent and not can_be_imported(parent):
                sys.modules[parent] = types.ModuleType(parent)
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        args, filters = pickle.loads(self.payload)
        warnings.resetwarnings()
        for entry in reversed(filters):
            warnings.filterwarnings(*entry)
        return getattr(module, self.name), args


def _pattern(value: Any) -> str:
    """A warning filter's regular expression (None, text or compiled) as text."""
    return "" if value is None else getattr(value, "pattern", value)
