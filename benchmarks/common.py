"""Shared by the benchmarks: processes that take turns, medians, tables, the JSON line at the end.

All contestants live in processes of their own, and one is asked at a time: rounds A B C A B C meet
the same drift of the machine, and whoever is not asked is blocked in a pipe, which costs nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alexnet_mp.ops.cpu_cores import available_cores
from alexnet_mp.parallel.devices import tf32

CACHES = 64 * 2**20  # bytes that push everything else out of the caches of usual machines


class ContestantFailed(RuntimeError):
    """A process raised or died; the message is its last line."""


class Contestant:
    """`ranks` processes that each hold a `factory(rank, ranks, port, *arguments)` and obey `ask`.

    `factory` stands at the top level of a module; `port` is free for a rendezvous of these ranks.
    Used as a context manager, which ends the processes.
    """

    def __init__(self, factory: Callable[..., Any], ranks: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # fork would inherit torch's threads
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, factory, rank, ranks, port, arguments), daemon=True
            )
            process.start()
            theirs.close()  # so that a death is an end of file here
            self.pipes.append(mine)
            self.processes.append(process)

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """Calls the method `what` on all ranks at once; returns their results or raises
        ContestantFailed."""
        for pipe in self.pipes:
            pipe.send((what, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, f"the process of rank {rank} ended (out of memory, perhaps)"
            if not good:
                self.close()
                raise ContestantFailed(value)
            answers.append(value)
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(
    pipe: Any,
    factory: Callable[..., Any],
    rank: int,
    ranks: int,
    port: int,
    arguments: tuple[Any, ...],
) -> None:
    """The process of one rank."""
    worker = None
    while True:
        try:
            what, values = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            worker = worker or factory(rank, ranks, port, *arguments)
            pipe.send((True, getattr(worker, what)(*values)))
        except Exception as error:
            traceback.print_exc(file=sys.stderr) if os.environ.get("BENCHMARK_TRACEBACKS") else None
            pipe.send(
                (
                    False,
                    f"rank {rank}: {type(error).__name__}: "
                    f"{(str(error).splitlines() or [''])[0][:200]}",
                )
            )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def range(self) -> list[float]:
        return [min(self.values), max(self.values)]

    def over(self, other: Spread) -> Spread:
        """Round by round, so that a drift of the machine cancels."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


def synchronize(device: torch.device) -> None:
    """Waits for what `device` has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory` (on a CPU without Linux's /proc it counts from the start of the
    process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: CUDA's largest allocation, or the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            platform.processor() or platform.machine(),
        )
    return {
        "device": device.type,
        "device_name": name,
        "cores": available_cores(),
        "threads_in_all": threads,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
        "tf32": tf32(device),
    }


def describe(place: dict[str, Any]) -> str:
    """The machine in a line, with a warning where it is busy."""
    line = (
        f"{place['device_name']}, {place['cores']} cores, {place['threads_in_all']} threads "
        f"in all, torch {place['torch']}"
    )
    if place["tf32"]:
        line += (
            f", TF32 {'on' if place['tf32']['matmul'] else 'off'} in products, "
            f"{'on' if place['tf32']['cudnn'] else 'off'} in convolutions"
        )
    if place["load_before"] > 0.5:
        line += (
            "\nNOTE: the machine was not idle when this began (load "
            f"{place['load_before']:g}): the figures are not to be quoted"
        )
    return line


def choose_device(asked: str) -> torch.device:
    """The device that a single rank would take."""
    from alexnet_mp.parallel.devices import choose_device as choose
    from alexnet_mp.parallel.launcher import Environment

    return choose(asked, Environment())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for people: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (head, *rows)
    ]
    return "\n".join(
        "  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]]
    )


def finish(result: dict[str, Any], target: str) -> None:
    """Prints the JSON line that ends every benchmark, and writes it to `target` if that is
    named."""
    text = json.dumps(result)
    if target and target != "-":
        Path(target).write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
