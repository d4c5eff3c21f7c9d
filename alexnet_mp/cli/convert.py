"""The command `convert`: a network in a file of one format becomes a file of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alexnet_mp.cli.flags import parse_request
from alexnet_mp.cli.process import printing_json, refuse_several_ranks
from alexnet_mp.config.arguments import ConvertRequest
from alexnet_mp.config.presets import preset
from alexnet_mp.weights.convert import (
    FORMATS,
    detect,
    read_network_file,
    with_classes,
    write_network_file,
)

DESCRIPTION = """Converts trained networks between formats: checkpoint (.pt), safetensors, grouped
(a plain state dict, .pth), torchvision, onnx, caffe (.caffemodel), npy (caffe-tensorflow). IN is
told by its content, OUT by its name, or by --from and --to. evaluate, predict and features take
files of all formats as --checkpoint too."""


def convert(argv: Sequence[str]) -> int:
    """Converts the file that `argv` names, and prints one line about it. Returns 0."""
    request = parse_request(ConvertRequest, argv, DESCRIPTION)
    refuse_several_ranks("convert")
    with printing_json(request.json) as write:
        source = Path(request.source).expanduser()
        base = preset(request.preset) if request.preset else None
        network = read_network_file(source, request.from_kind, base)
        if request.classes:
            network = with_classes(network, Path(request.classes).expanduser())
        target = Path(request.target).expanduser()
        write_network_file(network, target, request.to_kind)
        model = network.config.model
        kinds = [request.from_kind or detect(source), request.to_kind or detect(target)]
        print(
            f"{source}, {FORMATS[kinds[0]].name}: {model.columns} column"
            f"{'s' * (model.columns > 1)}, {len(network.classes)} classes, images of "
            f"{model.image_size} pixels; written to {target}, {FORMATS[kinds[1]].name}"
        )
        write(
            {
                "source": str(source),
                "from": kinds[0],
                "target": str(target),
                "to": kinds[1],
                "classes": len(network.classes),
                "config": network.config.to_dict(),
            }
        )
    return 0
