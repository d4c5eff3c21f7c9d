"""Ctrl-C during training, as a notebook's "interrupt" sends it: the step is finished first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_interrupt(request_stop: Callable[[], None]) -> Iterator[list[int]]:
    """A first SIGINT calls `request_stop`, a second raises KeyboardInterrupt.

    Gives the list of the signals that came. Handlers that somebody has installed, as launch/ does,
    are left alone; so are threads other than the main one, which get no signals.
    """
    seen: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def handler(number: int, frame: Any) -> None:
        if seen:
            signal.default_int_handler(number, frame)
        seen.append(number)
        request_stop()

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
