#!/usr/bin/env python
"""Packs an image folder into a store that training reads at full speed.

    python launch/pack.py SOURCE STORE [--encode jpeg]
    python launch/pack.py SOURCE --check

`--help` lists the flags. Repeat the command after an interruption: finished shards are kept. Exit code 2 if files cannot be read.
"""

import shlex
import sys
from pathlib import Path

from alexnet_mp.cli import parser
from alexnet_mp.cli.process import printing_json, run_main
from alexnet_mp.data import dataset_packer
from alexnet_mp.data.shard_writer import Packing
from alexnet_mp.parallel.launcher import Environment


def main() -> int:
    request = parser.parse_pack(sys.argv[1:])
    if Environment.read().world_size > 1:
        raise ValueError(
            "launch/pack.py is one process, which uses all cores: start it with python, not with torchrun"
        )
    source, labels, synsets = (
        Path(name).expanduser() if name else None
        for name in (request.source, request.val_labels, request.val_synsets)
    )
    packing = Packing(request.encode, request.on_error, request.workers, progress=True)
    with printing_json(request.json) as write:
        listings = dataset_packer.list_source(source, labels, synsets, say)
        dataset_packer.tell(listings, say)
        if request.check:
            report = dataset_packer.check(listings, packing)
        else:
            command = shlex.join(["python", "launch/pack.py", *sys.argv[1:]])
            report = dataset_packer.pack(
                listings, Path(request.store).expanduser(), packing, command, say
            )
        say("\n".join(dataset_packer.report_lines(report)))
        if not request.check:
            say(
                f"{report['seconds']:.1f} s, {report['images_per_second']:,.0f} images/s; train with --data store --data-dir {request.store}"
            )
        write(report)
    return (
        2 if request.check and any(split["skipped"] for split in report["splits"].values()) else 0
    )


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_main(main)
