"""The user's cache: what has to be generated or packed is made once, by one rank of a host, and every rank then opens it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from alexnet_mp.config.files import commit_folder, temporary_path

RunOncePerHost = Callable[[Callable[[], None]], None]
"""Runs work on one rank of each host while the others wait, and raises its failure on all."""


def cache_folder() -> Path | None:
    """The user's cache for this package, whether it exists or not; None where there is no home."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_mp"
    return None


def cached(
    name: str,
    build: Callable[[Path], None],
    what: str,
    images: int,
    directory: Path,
    run_once_per_host: RunOncePerHost,
    print_line: Callable[[str], None],
    unfinished: str = "",
) -> Path:
    """The folder `name` in the user's cache, or in `directory` where that cannot be written; `build(folder)` makes it if it is nowhere.

    `unfinished`: the name under which `build` finds what it had made when it was stopped; without one it starts anew.
    """
    places = [place for place in (cache_folder(), directory) if place is not None]

    def find() -> Path | None:
        return next((place / name for place in places if (place / name).is_dir()), None)

    def work() -> None:
        if find() is None:
            path = _writable(places) / name
            print_line(f"{what} into {path}, once")
            temporary, started = (
                path.with_name(unfinished) if unfinished else temporary_path(path),
                time.perf_counter(),
            )
            try:
                build(temporary)
                commit_folder(temporary, path)
            except BaseException as error:
                if (
                    isinstance(error, OSError) and find() is not None
                ):  # another run was faster: its folder serves
                    return
                if not unfinished:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise
            seconds = time.perf_counter() - started
            print_line(f"done in {seconds:.1f} s, {images / seconds:,.0f} images/s")

    run_once_per_host(work)
    found = find()
    if found is None:
        raise ValueError(
            f"{places[0] / name}: made by another rank of this host, but not to be seen here; set XDG_CACHE_HOME to a shared folder"
        )
    return found


def _writable(places: list[Path]) -> Path:
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise ValueError(
        f"none of {', '.join(map(str, places))} can be written: set XDG_CACHE_HOME or --data-dir to a folder with room for the images"
    )
