"""What is said of an error in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
