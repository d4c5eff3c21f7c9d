"""The command `check`: will two columns work on this machine, and how fast?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence

from alexnet_mp.cli.flags import is_main_process, parse_request
from alexnet_mp.cli.process import printing_json
from alexnet_mp.config import Config
from alexnet_mp.config.arguments import CheckRequest
from alexnet_mp.parallel.context import init_parallel
from alexnet_mp.parallel.rendezvous import code_version
from alexnet_mp.training.machine_check import Row, run_checks, versions

DESCRIPTION = """Tells in under a minute whether training will work on this machine, and how fast:
`torchrun --nproc_per_node=2 launch/check.py`. Compares the exchange with one device, forward and
backward, in each precision; measures the link, images/s, limits. Paste its output into a
bug report.
Exit code 1 where a check fails; its row names the remedy."""

REMEDIES = (
    ("cannot be opened", "free the port, or name another: torchrun --master-port 29501"),
    ("did not answer", "open the port in the firewall, or GLOO_SOCKET_IFNAME=eth0 for the network"),
    ("did not start", "start all ranks: torchrun --nproc_per_node=2"),
    ("gpu", "use --nproc_per_node with the number of GPUs, or --device cpu"),
    ("nccl", "NCCL_P2P_DISABLE=1, --shm-size=1g in a container, or --backend gloo"),
    ("gloo", "GLOO_SOCKET_IFNAME=eth0 names the network"),
)


def check(argv: Sequence[str]) -> int:
    """Runs the checks on all ranks and prints a table; returns 1 where one fails, else 0."""
    request = parse_request(CheckRequest, list(argv), DESCRIPTION)
    rows = []
    with printing_json(request.json) as write:
        for row in _rows(request):
            rows.append(row)
            if is_main_process() or row.name == "set-up":  # of which rank 0 may not know
                print(_line(row), flush=True)
        failed = [row for row in rows if row.status == "FAIL"]
        write({"ok": not failed, "rows": [dataclasses.asdict(row) for row in rows]})
        if is_main_process():
            print(_verdict(failed), flush=True)
    return 1 if failed else 0


def _rows(request: CheckRequest) -> Iterator[Row]:
    yield versions(code_version())
    try:
        context = init_parallel(_config(request))
    except (ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        rank = os.environ.get("RANK", "0")
        yield Row("set-up", f"rank {rank}: {message}", "FAIL", remedy_for(message))
        return
    yield from run_checks(context, request.seconds)
    context.close()


def _config(request: CheckRequest) -> Config:
    return Config().with_fields(
        device=request.device,
        backend=request.backend,
        threads=request.threads,
        timeout=request.timeout,
    )


def remedy_for(message: str) -> str:
    """The way out of a failed set-up, by words of its message."""
    lower = message.lower()
    return next((remedy for word, remedy in REMEDIES if word in lower), "see launch/README.md")


def _line(row: Row) -> str:
    line = f"{row.status:4s}  {row.name:16s}  {row.detail}"
    return line + (f"\n      {'':16s}  -> {row.remedy}" if row.remedy else "")


def _verdict(failed: list[Row]) -> str:
    if not failed:
        return "all checks passed"
    return f"FAILED: {', '.join(row.name for row in failed)} (each row names its remedy)"
