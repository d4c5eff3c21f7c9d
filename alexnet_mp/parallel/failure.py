"""Reads the errors of failed collectives, and writes the cause where torchrun looks for it."""

from __future__ import annotations

import contextlib
import json
import os
import time

WORDS_OF_BACKENDS = (
    "connection",
    "timed out",
    "timeout",
    "gloo",
    "nccl",
    "socket",
    "peer",
    "store",
)
"""One of them is in torch's error where a collective fails, mostly because a peer is gone."""

LAST_ERROR = "Last error:"
"""NCCL's own reason follows it, on the lines below."""


def is_backend_error(error: BaseException) -> bool:
    """Whether `error` is a collective's or the store's, not one of the program's."""
    return any(word in str(error).lower() for word in WORDS_OF_BACKENDS)


def explain_nccl_error(error: BaseException | str) -> str | None:
    """NCCL's reason for `error` and the way out, in one line; None where it gives no reason.

    E.g. a container with too little /dev/shm, two ranks on one GPU, a missing network interface.
    """
    _, found, reason = str(error).partition(LAST_ERROR)
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    if not found or not lines or lines[0].startswith("Exception raised from"):
        return None
    text = lines[0][:300]
    lowered = text.lower()
    if "shared memory" in lowered or "/dev/shm" in lowered or "no space left" in lowered:
        hint = "in a container, start it with --shm-size=1g"
    elif "duplicate gpu" in lowered:
        hint = "give each rank a GPU of its own, or use --backend gloo"
    else:
        hint = (
            "NCCL_DEBUG=WARN tells more; a container may need --shm-size=1g; "
            "--backend gloo works without NCCL"
        )
    return f"NCCL: {text}; {hint}"


def tell_torchrun(message: str) -> None:
    """Writes the cause where torchrun looks for it, so that torchrun's last lines end with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    content = {"message": {"message": message, "extraInfo": extra}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)  # without the file torchrun says only where to look
