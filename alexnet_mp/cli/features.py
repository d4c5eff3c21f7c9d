"""The command `features`: the activations of a trained network for the images of a folder."""

from __future__ import annotations

from collections.abc import Sequence

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import fail, printing_json, refuse_several_ranks
from alexnet_mp.config.arguments import FeaturesRequest
from alexnet_mp.inference.features import save_features
from alexnet_mp.parallel.devices import choose_device, set_threads
from alexnet_mp.parallel.launcher import Environment

DESCRIPTION = """Writes the activations of a trained network for the images of a folder: OUT.npz has
`features` (images, values), float32, and `files`, the names in FOLDER. fc7 has 4,096 values in the
paper's network, conv5 9,216. Files that cannot be read are named, and the exit code is then 2."""


def features(argv: Sequence[str]) -> int:
    """Writes the features that `argv` asks for. Returns 2 if a file could not be read."""
    request = parse_request(FeaturesRequest, argv, DESCRIPTION)
    refuse_several_ranks("features")
    device = choose_device(request.device, Environment())
    set_threads(request.threads, Environment(), device)
    with printing_json(request.json) as write:
        report = save_features(request, device)
        print(
            f"{request.out}: {request.layer} of {report['images']:,} images, "
            f"{report['values']:,} values each"
        )
        write(report)
    return max((fail(line, 2) for line in report["unreadable"]), default=0)
