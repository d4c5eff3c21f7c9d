"""How an entry script ends: one readable line for what a user can mend, a stated exit code, and a stop that loses nothing.

Exit codes: 0 done; 1 training failed; 2 the command, its files or its ranks are wrong; 128 + n stopped by signal n, with everything saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from alexnet_mp.trainer import NonFiniteError, Trainer

HEAD_START = 3.0     # seconds that rank 0 has to say what all ranks know, before another one speaks for itself
LOST = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer", "store")   # words of torch's errors when a peer is gone


class Signals:
    """SIGTERM and SIGINT end the run after the current step; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.trainer: Trainer | None = None

    def install(self, trainer: Trainer) -> None:
        """From now on signals ask `trainer` to stop."""
        self.trainer = trainer
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        self.trainer.stop_requested = True


def guarded(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its code; errors that a user can cause become one line on the screen."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except NonFiniteError as error:
        code = fail(error, 1)
    except (ValueError, OSError) as error:
        code = fail(error, 2)
    except torch.OutOfMemoryError as error:
        code = fail(f"out of memory: {_first_line(error)}; a smaller --batch-size needs less", 1)
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error).lower() for word in LOST):
            raise
        code = fail(f"lost another rank, or it did not answer within --timeout ({_first_line(error)})", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a gloo thread that still waits for a dead peer would keep the interpreter from ending.
    os._exit(code)


def fail(error: BaseException | str, code: int) -> int:
    """Says `error` once for all ranks: rank 0 speaks; another rank only if rank 0, given a head start, has not ended everything."""
    rank = os.environ.get("RANK", "0")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    message = _first_line(error) if isinstance(error, BaseException) else error
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)
        message = f"rank {rank}: {message}"
    elif several and code == 1:
        message = f"rank 0: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    _tell_torchrun(message)
    return code


def _tell_torchrun(message: str) -> None:
    """Leaves the cause where torchrun looks for it, so that its own last lines end with the cause too."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    content = {"message": {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        pass                 # torchrun then says where to look; the line above has said it already


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def printing_json(target: str) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes its argument to the file `target` ("-": standard output; "": nowhere), on the main rank.

    With "-" all that is printed inside the block goes to the standard error instead.
    """
    output = sys.stdout

    def write(content: Any) -> None:
        text = json.dumps(_finite(content), indent=1) + "\n"
        if os.environ.get("RANK", "0") != "0" or not target:
            return
        if target == "-":
            output.write(text)
        else:
            with open(target, "w", encoding="utf-8") as file:
                file.write(text)

    with contextlib.redirect_stdout(sys.stderr if target == "-" else output):
        yield write


def _finite(content: Any) -> Any:
    """JSON has no number for what is not finite; null says that there is none."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
