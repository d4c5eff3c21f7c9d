"""Faults, installed into a rank from outside: the product has no hook for them.

A fault is KIND@POINT, e.g. kill@step:3 (the third time that the point is passed) or slow:5@save
(five seconds).
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import alexnet_mp.parallel.context
import alexnet_mp.parallel.exchange
import alexnet_mp.parallel.rendezvous
import alexnet_mp.plotting.curves
import alexnet_mp.training.checkpoint
import alexnet_mp.training.input_checks
import alexnet_mp.training.run
import alexnet_mp.training.run_folder
import alexnet_mp.training.trainer

POINTS = {  # name -> (where the attribute is, its name): what is about to begin
    "arrive": (alexnet_mp.parallel.rendezvous, "rendezvous"),
    "handshake": (alexnet_mp.parallel.context, "shake_hands"),
    "groups": (dist, "init_process_group"),
    "data": (alexnet_mp.training.run, "load"),
    "packing": (
        alexnet_mp.training.run,
        "load",
    ),  # within it, on the one rank that works while the others wait
    "batch": (alexnet_mp.training.trainer, "check_first_batch"),
    "step": (alexnet_mp.training.trainer.Trainer, "_start_step"),
    "flags": (alexnet_mp.training.trainer.StepSync, "start"),
    "exchange": (alexnet_mp.parallel.exchange.GroupLink, "start_exchange"),
    "update": (alexnet_mp.training.trainer.Trainer, "_update"),
    "validation": (alexnet_mp.training.trainer, "evaluate"),
    "save": (alexnet_mp.training.checkpoint, "save"),
    "write": (torch, "save"),
    "rename": (os, "replace"),
    "link": (alexnet_mp.training.checkpoint, "link_atomically"),
    "history": (alexnet_mp.training.run_folder.RunFolder, "write_history"),
    "test": (alexnet_mp.training.run.Run, "_test"),
    "plot": (alexnet_mp.plotting.curves, "draw_curves"),
    "close": (alexnet_mp.parallel.context.ParallelContext, "close"),
}


def install(fault: str, note: Path) -> None:
    """Lets `fault` strike this process, once; `note` then gets the time (monotonic)."""
    kind, _, where = fault.partition("@")
    point, _, count = where.partition(":")
    owner, name = POINTS[point]
    original, passed = getattr(owner, name), 0

    def hooked(*args: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed != int(count or 1):
            return original(*args, **options)
        if point == "packing":
            return _while_packing(kind, note, original, args, options)
        if point == "write" and kind in ("kill", "stop", "full"):  # half a file is there already
            args[1].write(b"half a checkpoint")
        note.write_text(str(time.monotonic()))
        args = strike(kind, args)
        return original(*args, **options)

    setattr(owner, name, hooked)


def _while_packing(kind: str, note: Path, load: Any, args: tuple, options: dict) -> Any:
    """Strikes the rank that prepares the data alone, while the others wait for it."""
    data, seed, alone, *rest = args

    def struck(work: Any) -> Any:
        def slow_work() -> None:
            note.write_text(str(time.monotonic()))
            strike(kind, ())
            work()

        return alone(slow_work)

    if os.environ["LOCAL_RANK"] == "0":
        struck(lambda: None)
    else:
        alone(lambda: None)
    return load(data, seed, alone, *rest, **options)


def strike(kind: str, args: tuple) -> tuple:
    """Does it; the arguments with which the point then goes on, if it does."""
    kind, _, value = kind.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit":
        os._exit(7)
    elif kind in ("term", "int", "usr1"):
        os.kill(os.getpid(), getattr(signal, f"SIG{kind.upper()}"))
        time.sleep(0.2)
    elif kind == "int2":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    elif kind == "slow":
        time.sleep(float(value))
    elif kind == "raise":
        raise RuntimeError("injected fault")
    elif kind == "value":
        raise ValueError("x.jpg: injected fault")
    elif kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif kind == "memory":
        raise MemoryError
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
    elif kind == "vanish":
        shutil.rmtree(value)
    elif kind == "reverse":  # this rank's first batch is in another order
        batch, *rest = args
        return (batch._replace(labels=batch.labels.flip(0)), *rest)
    elif kind == "nan":  # the gradients of this rank are not numbers
        for parameter in args[0].model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(float("nan"))
    elif kind == "garble":  # what this rank sends to its peers is not finite
        link, layer, x, *rest = args
        return (link, layer, [y * float("inf") for y in x], *rest)
    else:
        raise KeyError(f"no such fault: {kind}")
    return args


def differ(how: str) -> None:
    """Makes this rank one that does not fit the others."""
    if how == "code":
        alexnet_mp.parallel.rendezvous.code_version = lambda: "0123456789ab"
    elif how == "torch":
        torch.__version__ = "1.0"
    elif how == "data":
        load = alexnet_mp.training.run.load

        def other(*args: Any, **options: Any) -> Any:
            splits = load(*args, **options)
            splits.train.labels[:] = splits.train.labels[::-1].copy()
            return splits

        alexnet_mp.training.run.load = other
    elif how == "message":  # a rank that says something that is none of ours
        identity = alexnet_mp.parallel.rendezvous.json.dumps
        alexnet_mp.parallel.rendezvous.json = type(sys)("garbled")
        alexnet_mp.parallel.rendezvous.json.dumps = lambda value: identity(value)[:-9] + "\xff\x00"
        alexnet_mp.parallel.rendezvous.json.loads = __import__("json").loads
    else:
        raise KeyError(how)
