"""Progress of long work: a bar on a terminal, and a plain line once a minute in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from tqdm import tqdm

LINE_INTERVAL = 60.0
"""Seconds between two plain lines."""

T = TypeVar("T")


class Progress(Generic[T]):
    """Counts units of work and shows how far it is, on stderr. Made by `progress`."""

    def __init__(
        self,
        iterable: Iterable[T] | None,
        total: int | None,
        description: str,
        unit: str,
        enabled: bool,
        initial: int,
    ) -> None:
        if total is None and isinstance(iterable, Sized):
            with contextlib.suppress(TypeError):  # a DataLoader over an IterableDataset
                total = len(iterable)
        self.iterable, self.total, self.description, self.unit = iterable, total, description, unit
        self.count = self.initial = initial
        self.enabled = enabled and sys.stderr is not None and not sys.stderr.closed
        self._started = self._last_line = time.monotonic()
        self._postfix: str | Callable[[], str] = ""
        self._bar: tqdm[T] | None = None
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(
                desc=description, total=total, unit=f" {unit}", initial=initial, leave=False
            )

    def __iter__(self) -> Iterator[T]:
        """The items of `iterable`; each counts as done when the next one is asked for."""
        if self.iterable is None:
            raise TypeError("this progress counts by update(n): it was given no iterable")
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self.count += count
        if not self.enabled:
            return
        if self._bar is not None:
            with self._until_the_screen_is_gone():
                self._bar.update(count)
        elif (now := time.monotonic()) - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            with self._until_the_screen_is_gone():
                print(self.line(), file=sys.stderr, flush=True)

    def restart(self, initial: int) -> None:
        """Takes `initial` units as done before: the speed counts from here on."""
        self.count = self.initial = initial
        self._started = time.monotonic()
        if self._bar is not None:
            with self._until_the_screen_is_gone():
                self._bar.reset()
                self._bar.initial = self._bar.n = initial

    def set_postfix(self, text: str | Callable[[], str]) -> None:
        """Sets what stands behind the numbers.

        A function is called only when its text is shown: at once on a terminal, once a minute in a
        log file.
        """
        self._postfix = text
        if self._bar is not None:
            with self._until_the_screen_is_gone():
                self._bar.set_postfix_str(self._postfix_text(), refresh=False)

    def line(self) -> str:
        """The plain line, e.g.

        `packing train: 512 of 2,048 images (25 %), 256 images/s, 0:00:06 left`.
        """
        unit, parts = self.unit, []
        done = f"{self.count:,}" + (f" of {self.total:,}" if self.total else "") + f" {unit}"
        parts.append(done + (f" ({100 * self.count // self.total} %)" if self.total else ""))
        rate = (self.count - self.initial) / max(time.monotonic() - self._started, 1e-9)
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
        if self.total and rate > 0:
            minutes, seconds = divmod(round(max(self.total - self.count, 0) / rate), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        if postfix := self._postfix_text():
            parts.append(postfix)
        return f"{self.description}: {', '.join(parts)}"

    def close(self) -> None:
        """Removes the bar. A second call does nothing."""
        if self._bar is not None:
            with self._until_the_screen_is_gone():
                self._bar.close()
        self.enabled, self._bar = False, None

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _postfix_text(self) -> str:
        return self._postfix if isinstance(self._postfix, str) else self._postfix()

    @contextlib.contextmanager
    def _until_the_screen_is_gone(self) -> Iterator[None]:
        """A terminal that was closed, or a full disk under a log file, must not end the work."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream was closed
            self.enabled, self._bar = False, None


@overload
def progress(
    iterable: Iterable[T],
    *,
    total: int | None = None,
    description: str,
    unit: str,
    enabled: bool = True,
    initial: int = 0,
) -> Progress[T]: ...


@overload
def progress(
    iterable: None = None,
    *,
    total: int | None = None,
    description: str,
    unit: str,
    enabled: bool = True,
    initial: int = 0,
) -> Progress[None]: ...


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    description: str,
    unit: str,
    enabled: bool = True,
    initial: int = 0,
) -> Progress[Any]:
    """Shows the progress over `iterable`, or of work that is counted by `update(n)`.

    On a terminal it is tqdm's bar, which vanishes at the end; elsewhere a plain line every
    LINE_INTERVAL seconds. `total`: units in all; None takes the iterable's length if it has one.
    `unit`: a plural, e.g. "images". `enabled`: False shows nothing, as on all ranks but one.
    `initial`: units that were done before, which is not this run's speed.

        for batch in progress(loader, description="validation", unit="batches"):
            ...
    """
    return Progress(iterable, total, description, unit, enabled, initial)
