"""How a command ends: one readable line for what a user can mend, an exit code, and nothing lost.

Exit codes: 0 done; 1 training failed; 2 the command, its files or its ranks are wrong; 128 + n
stopped by signal n, with everything saved; 141 the reader of the output has gone.

`run_main` decides what is printed. `heartbeat.report` prints it, once for all ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from alexnet_mp.config.command import typed_program
from alexnet_mp.config.errors import first_line
from alexnet_mp.config.files import OUT_OF_SPACE
from alexnet_mp.ops.compile import explain_compile_error
from alexnet_mp.parallel import failure, heartbeat
from alexnet_mp.training.step_sync import NonFiniteError
from alexnet_mp.training.trainer import Trainer

HEAD_START = 3.0
"""Seconds that rank 0 has to print what all ranks know, before another one prints it."""
CONNECTED = 0.5
"""Likewise once the ranks are connected, when a rank sees whether rank 0 has printed it."""
ONE_PRESS = 0.3
"""Seconds within which a second Ctrl-C is the first one again, forwarded by torchrun."""
STOPPING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
"""SLURM warns by USR1 before the time limit; HUP comes when a terminal or a connection closes."""


class Signals:
    """A signal of STOPPING ends the run after the current step, with everything saved.

    A second Ctrl-C or Ctrl-\\ ends it at once. Signals are seen by a thread of their own: the main
    thread may be inside a collective, where Python's handlers wait until it returns.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first = 0.0  # when the first one came
        self._trainer: Trainer | None = None

    def install(self, trainer: Trainer) -> None:
        """From now on signals ask `trainer` to stop."""
        self._trainer = trainer
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for name in STOPPING:
            number = getattr(signal, name, None)  # Windows has no SIGHUP, SIGQUIT, SIGUSR1
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
            ):  # nohup asks to go on when the terminal closes
                continue
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def _watch(self, reader: socket.socket) -> None:
        while number := reader.recv(1)[0]:
            self._receive(number)

    def _receive(self, number: int) -> None:
        """Asks the trainer to stop, or ends the process where a person insists."""
        now = time.monotonic()
        pressed = number in (signal.SIGINT, getattr(signal, "SIGQUIT", None))
        if pressed and number == self.received and now - self._first > ONE_PRESS:
            os._exit(128 + number)
        if self.received is None or pressed:
            self._first = now
        self.received = number
        if self._trainer is not None:
            self._trainer.stop_requested = True


def survive_lost_screen() -> None:
    """From now on a terminal or reader that has gone does not end the process; what is printed is
    then lost.

    A closed terminal answers EIO to each write, `| head` EPIPE. What a training saves is worth more
    than its screen.
    """
    sys.stdout, sys.stderr = _SurvivingStream(sys.stdout), _SurvivingStream(sys.stderr)


class _SurvivingStream(io.TextIOBase):
    """A text stream that turns to the null device when its first write fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unless_gone():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unless_gone():
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base class declares an attribute
        return self._stream.encoding

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in OUT_OF_SPACE:  # a full disk under a log file may have room again
                return
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            if self is sys.stdout:
                reason = error.strerror or error
                print(f"note: the standard output is gone ({reason}); going on", file=sys.stderr)


def refuse_several_ranks(command: str) -> None:
    """Raises ValueError where a launcher started several: `command` is one process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"{typed_program(command)} is one process, which uses all cores: "
            "start it with python, not with torchrun, srun or mpirun"
        )


def run_main(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with its exit code.

    An error that a user can cause becomes one line on the screen, a fault of the program a
    traceback, of the rank where it began.
    """
    _prepare_streams()
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output has gone, as after `| head`
        code = fail("the standard output was closed", 141) if heartbeat.current() else 141
    except NonFiniteError as error:
        code = fail(error, 1, alike=True)
    except (ValueError, OSError) as error:
        code = fail(error, 2)
    except (torch.OutOfMemoryError, MemoryError) as error:
        code = fail(f"out of memory: {first_line(error)}; a smaller --batch-size needs less", 1)
    except RuntimeError as error:
        heart = heartbeat.current()
        if heart and failure.is_backend_error(error):
            code = _fail_with_peer(heart, error)
        elif explained := explain_compile_error(error):
            code = fail(explained, 1)
        else:
            code = _fail_unexpected(error)
    except BaseException as error:
        code = _fail_unexpected(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not sys.exit: a gloo thread that waits for a dead peer would keep the interpreter from ending.
    os._exit(code)


def _prepare_streams() -> None:
    """Lets the streams print any name, and tqdm leave nothing behind."""
    # tqdm's own lock has a semaphore of multiprocessing. Where that is not fork (Python 3.14), a
    # process that ends without Python's clean-up, by os._exit or a kill, leaves it to a helper,
    # which complains after the last line.
    tqdm.set_lock(threading.RLock())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files and classes may hold letters that the locale lacks.
            stream.reconfigure(errors="backslashreplace")


def fail(error: BaseException | str, code: int, alike: bool = False) -> int:
    """Reports `error` and returns `code`.

    It is printed once for all ranks, and not at all where another rank's error came first: that one
    is the cause. `alike`: all ranks raise the same error, so that no rank is named.
    """
    rank = os.environ.get("RANK", "0")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    message = first_line(error) if isinstance(error, BaseException) else error
    heart = heartbeat.current()
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun may end this rank while it waits
        # An error that all ranks have is rank 0's to print.
        if heart:
            heart.wait_for_cause(CONNECTED)
        else:
            time.sleep(HEAD_START)
        message = message if alike else f"rank {rank}: {message}"
    elif several and code == 1 and not alike:
        message = f"rank 0: {message}"
    heartbeat.report(message)
    return code


def _fail_with_peer(heart: heartbeat.Heartbeat, error: RuntimeError) -> int:
    """Ends after a failed collective, mostly because another rank has ended, whose error is the
    cause.
    """
    cause = heart.wait_for_cause(3 * heart.interval + 1)
    if cause is not None:
        failure.tell_torchrun(cause)
        return 1
    if heart.store_lost and (reason := heart.why_store_is_lost()):
        return fail(reason, 1, alike=True)
    lost = f"lost another rank, or it did not answer within --timeout ({first_line(error)})"
    return fail(failure.explain_nccl_error(error) or lost, 1)


def _fail_unexpected(error: BaseException) -> int:
    """Ends after a fault of the program: the traceback of the rank where it began, the cause below
    it.
    """
    message = f"{type(error).__name__}: {first_line(error)}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        message = f"rank {os.environ.get('RANK', '0')}: {message}"
    heartbeat.report(message, details=lambda: traceback.print_exception(error))
    return 1


@contextlib.contextmanager
def printing_json(target: str) -> Iterator[Callable[[Any], None]]:
    """Gives a function that writes its argument as JSON to the file `target`, on rank 0.

    "" writes nowhere. "-" is the standard output; what is printed inside the block then goes to
    the standard error instead.
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
    """`content` with null for each number that is not finite, which JSON cannot hold."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
