"""Keeps image sets that are generated or packed once, by one rank of a host for all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from alexnet_mp.config.files import commit_folder
from alexnet_mp.config.folder_lock import FolderLock
from alexnet_mp.data.pack_size import size_text

Result = TypeVar("Result")


class RunOncePerHost(Protocol):
    """Runs work on one rank of each host while the others wait, and raises its failure on all.

    The others take its result where it is `usable` to them, and else run the work after it.
    """

    def __call__(
        self, work: Callable[[], Result], usable: Callable[[Result], bool] = ..., /
    ) -> Result: ...


def run_here(work: Callable[[], Result], usable: Callable[[Result], bool] | None = None) -> Result:
    """RunOncePerHost where there are no other ranks, or where the others already wait."""
    return work()


Find = Callable[[Path], Path | None]
"""Looks for a set in one folder of the cache."""

ORIGIN = "origin.json"
"""The file in a cached set that says where its images come from."""
UNUSED = 7 * 24 * 3600.0
"""Seconds without a start that used a set, after which it is named as unused."""
SHOWN = 3
"""Unused sets in the cache that one line names."""


def cache_folder(cache_dir: str | None = None) -> Path | None:
    """The folder of cached image sets, whether it exists or not; None where there is no home.

    It is `cache_dir`, or alexnet_mp in $XDG_CACHE_HOME or ~/.cache.
    """
    with contextlib.suppress(RuntimeError):  # no home
        if cache_dir:
            return Path(cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_mp"
    return None


@dataclass(frozen=True)
class Cache:
    """Where image sets are kept, and how this rank works and speaks."""

    folders: Sequence[Path]
    """A set is looked for in all of them, and made in the first that can be written."""
    run_once_per_host: RunOncePerHost
    print_line: Callable[[str], None]

    def get(
        self,
        name: str,
        build: Callable[[Path], None],
        description: str,
        images: int,
        *,
        find: Find | None = None,
        lock: str = "",
        unfinished: str = "",
    ) -> Path:
        """The set `name`: found in one of the folders, or made by `build(path)`.

        `description` of the work and the number of `images` are for the screen. `find` looks for
        the set in one folder of the cache; None takes the one that has the name. `unfinished`: a
        name under which `build` finds what it left when it was stopped; without one it starts anew.
        Of two processes with the same `lock`, or name if there is none, or with the same
        `unfinished`, the second waits for the first. Raises ValueError where no folder can be
        written, and whatever `build` does.
        """
        find = find or (lambda folder: folder / name if (folder / name).is_dir() else None)

        def found() -> Path | None:
            return next((path for folder in self.folders if (path := find(folder))), None)

        def work() -> None:
            if found() is not None:
                return
            folder = self._writable()
            with (
                self._workplace(folder / f".{lock or name}.lock"),
                self._workplace(folder / f".{unfinished or name}.unfinished") as workplace,
            ):
                if found() is not None:  # made by the process that held the lock
                    return
                self.print_line(f"{description} into {folder / name}, once")
                started = time.perf_counter()
                if not unfinished:
                    shutil.rmtree(workplace / "set", ignore_errors=True)
                try:
                    build(workplace / "set")
                    commit_folder(workplace / "set", folder / name)
                except OSError:
                    # Without locks, as on some network file systems, another process may have made
                    # it meanwhile.
                    if found() is None:
                        raise
                    return
                seconds = time.perf_counter() - started
                self.print_line(f"done in {seconds:.1f} s, {images / seconds:,.0f} images/s")
                self._report_others(folder, name)

        self.run_once_per_host(work)
        path = found()
        if path is None:
            raise ValueError(
                f"{self.folders[0] / name}: made by another rank of this host, but not to be seen "
                "here; set --cache-dir or XDG_CACHE_HOME to a shared folder"
            )
        with contextlib.suppress(OSError):  # someone else's, or read-only
            os.utime(path)  # when it was last used
        return path

    def _writable(self) -> Path:
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
        raise ValueError(
            f"{' and '.join(map(str, self.folders))} cannot be written: set --cache-dir or "
            "XDG_CACHE_HOME to a folder with room for the images"
        )

    @contextlib.contextmanager
    def _workplace(self, path: Path) -> Iterator[Path]:
        """The folder `path`, which only this process uses until the block ends.

        It vanishes then if it is empty; what an interrupted process left in it is still there.
        """
        lock = FolderLock(path, "waiting for another process that makes the same image set")
        wait = False
        while True:
            path.mkdir(parents=True, exist_ok=True)
            try:
                lock.take(wait)
                break
            except (
                FileNotFoundError
            ):  # the process that held the lock has finished and removed the folder
                continue
            except OSError as error:
                if error.errno is not None:
                    raise
                self.print_line(str(error).rpartition(";")[0])
                wait = True
        try:
            yield path
        finally:
            lock.release()
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()

    def _report_others(self, folder: Path, name: str) -> None:
        """Names the sets that were not used lately, with their size, when one is added."""
        others = []
        for path in folder.iterdir():
            if path.is_dir() and path.name != name and not path.name.startswith("."):
                with contextlib.suppress(OSError):
                    used = path.stat().st_mtime
                    if time.time() - used > UNUSED:
                        size = sum(file.stat().st_size for file in path.rglob("*"))
                        others.append((size, path.name, used, origin_of(path)))
        if not others:
            return
        others.sort(reverse=True)
        named = [
            f"{name} ({size_text(size)}{f', of {origin}' if origin else ''}, last used "
            f"{time.strftime('%Y-%m-%d', time.localtime(used))})"
            for size, name, used, origin in others[:SHOWN]
        ]
        more = "; ..." if len(others) > SHOWN else ""
        self.print_line(
            f"{folder} also holds {size_text(sum(size for size, *_ in others))} of image sets that "
            f"were not used for a week; delete what is no longer needed: {'; '.join(named)}{more}"
        )


def origin_of(path: Path) -> str:
    """The folder from which the cached set `path` was packed; empty where it is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((path / ORIGIN).read_text(encoding="utf-8"))["folder"])
    return ""
