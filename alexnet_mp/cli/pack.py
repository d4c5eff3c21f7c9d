"""The command `pack`: a folder or an archive of images becomes a store, read at full speed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from alexnet_mp.cli.parser import parse_pack
from alexnet_mp.cli.process import printing_json, refuse_several_ranks
from alexnet_mp.config.command import typed_command
from alexnet_mp.data import dataset_packer, folder_layout
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_sets import SetOptions, list_source


def pack(argv: Sequence[str]) -> int:
    """Packs, or with --check only reads, the images that `argv` names.

    Returns 2 if --check found unreadable files.
    """
    request = parse_pack(argv)
    refuse_several_ranks("pack")
    labels, synsets, devkit = (
        Path(name).expanduser() if name else None
        for name in (request.val_labels, request.val_synsets, request.devkit)
    )
    options = SetOptions(labels, synsets, devkit, request.on_error == "skip", progress=True)
    packing = Packing(request.encode, request.on_error, request.workers, progress=True)
    with printing_json(request.json) as write:
        source = Path(request.source).expanduser()
        listings = list_source(source, say=_print_line, options=options)
        folder_layout.report(listings, _print_line)
        if request.check:
            report = dataset_packer.check(listings, packing)
            _print_line("\n".join(dataset_packer.report_lines(report)))
        else:
            command = f"{typed_command('pack')} {shlex.join(argv)}"
            store = Path(request.store).expanduser()
            report = dataset_packer.pack(listings, store, packing, command, _print_line)
            _print_line("\n".join(dataset_packer.report_lines(report)))
            _print_line(
                f"{report['seconds']:.1f} s, {report['images_per_second']:,.0f} images/s; "
                f"train with --data store --data-dir {request.store}"
            )
        write(report)
    skipped = any(split["skipped"] for split in report["splits"].values())
    return 2 if request.check and skipped else 0


def _print_line(text: str) -> None:
    print(text, flush=True)
