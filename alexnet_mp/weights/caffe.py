"""Caffe's .caffemodel of bvlc_alexnet and bvlc_reference_caffenet, read from the wire format.

Both kinds of layer messages are read, V1LayerParameter and LayerParameter. The numbers of the
fields are those of caffe.proto (BVLC/caffe at 9b891540). A layer's group is a column; the norm's
window runs over the maps of all columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alexnet_mp.config import LAYERS, Config
from alexnet_mp.config.files import atomic_writer
from alexnet_mp.config.presets import preset
from alexnet_mp.weights import protobuf
from alexnet_mp.weights.grouped import (
    CONVOLUTIONS,
    config_for,
    from_grouped,
    scale_dropped_inputs,
    to_grouped,
)
from alexnet_mp.weights.network_file import NetworkFile
from alexnet_mp.weights.protobuf import encode

NAME, V1_LAYERS, LAYER_FIELD = 1, 2, 100  # of NetParameter
NORM = ("lrn_size", "lrn_alpha", "lrn_beta", "lrn_k")
V1_TYPES = {4: "Convolution", 14: "InnerProduct", 15: "LRN", 17: "Pooling"}


@dataclass(frozen=True)
class _Kind:
    """The field numbers of one kind of layer message."""

    name: int
    type: int
    blobs: int
    lrn: int


V1 = _Kind(name=4, type=5, blobs=6, lrn=18)
NEW = _Kind(name=1, type=2, blobs=7, lrn=118)


@dataclass(frozen=True)
class _Layer:
    name: str
    type: str
    blobs: list[Tensor]
    lrn: dict[str, float] | None


def caffe_config(
    norm: Mapping[str, float] | None = None, pools_first: bool = False, path: Path | None = None
) -> Config:
    """The configuration of Caffe's networks, with the settings of the norm that a file has.

    `pools_first`: the norm follows pooling, in both layers, as in bvlc_reference_caffenet.
    """
    changes: dict[str, object] = dict(norm or {})
    if pools_first:
        changes |= {"layer1_order": "relu-pool-lrn", "layer2_order": "relu-pool-lrn"}
    try:
        return preset("caffe").with_fields(**changes)
    except ValueError as error:
        raise ValueError(f"{path}: its norm cannot be used ({error})") from None


def check_is_caffes(network: NetworkFile, kind: str) -> None:
    """ValueError where a file of this `kind` would be read as another network than `network`.

    Such a file says nothing of norm, dropout, padding or activation: they are bvlc_alexnet's.
    """
    theirs, mine = preset("caffe").model, network.config.model
    free = {"columns", "kernels", "hidden", "classes", "image_size", "crossings"}
    free |= {"initial_weights", "initial_biases", "dropout", "dropout_rate", "dropout_after"}
    for field, wanted in vars(theirs).items():
        value = getattr(mine, field)
        same = value == wanted or (isinstance(wanted, float) and math.isclose(value, wanted))
        if field not in free and not same:
            flag = field.replace("_", "-")
            raise ValueError(
                f"{network.path}: {kind} cannot say --{flag} {value}; its networks have {wanted}"
            )


def is_caffe(content: bytes) -> bool:
    """Whether `content` is a NetParameter with layers."""
    try:
        found = {number for number, kind, _ in protobuf.fields(memoryview(content)) if kind == 2}
    except protobuf.WireError:
        return False
    return bool(found & {V1_LAYERS, LAYER_FIELD})


def read(path: Path, base: Config | None = None) -> NetworkFile:
    """Reads a .caffemodel, its layers by their names or else by their order.

    Raises ValueError that names `path` and says what is wrong.
    """
    try:
        net = memoryview(path.read_bytes())
        layers = [_layer(message, V1, path) for message in protobuf.messages(net, V1_LAYERS)]
        layers += [_layer(message, NEW, path) for message in protobuf.messages(net, LAYER_FIELD)]
        title = protobuf.text(net, NAME)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except protobuf.WireError as error:
        raise ValueError(f"{path}: a damaged .caffemodel ({error})") from None
    grouped = _grouped(layers, path)
    norms = [layer.lrn for layer in layers if layer.lrn is not None]
    order = [layer.type for layer in layers if layer.type in ("LRN", "Pooling")]
    if base is None:
        pools_first = order[0] == "Pooling" if order else title == "CaffeNet"
        base = caffe_config(norms[0] if norms else None, pools_first, path)
    if any(norm != norms[0] for norm in norms):
        raise ValueError(f"{path}: its two norms have different settings, which is not supported")
    shapes = {name: tuple(value.shape) for name, value in grouped.items()}
    config = config_for(base, shapes, path)
    classes = tuple(f"class {k}" for k in range(config.model.classes))
    return NetworkFile(path, config, from_grouped(grouped, config.model, path), classes)


def _layer(message: memoryview, kind: _Kind, path: Path) -> _Layer:
    if kind is V1:
        type_ = V1_TYPES.get(protobuf.integer(message, kind.type), "")
    else:
        type_ = protobuf.text(message, kind.type)
    name = protobuf.text(message, kind.name)
    blobs = []
    if type_ in ("Convolution", "InnerProduct"):
        blobs = [_blob(blob, name, path) for blob in protobuf.messages(message, kind.blobs)]
    lrn = None
    if type_ == "LRN":
        settings = next(protobuf.messages(message, kind.lrn), memoryview(b""))
        lrn = _lrn(settings, name, path)
    return _Layer(name, type_, blobs, lrn)


def _lrn(settings: memoryview, name: str, path: Path) -> dict[str, float]:
    """LRNParameter: local_size 1, alpha 2, beta 3, norm_region 4, k 5; alpha is divided by size."""
    if protobuf.integer(settings, 4):
        raise ValueError(f"{path}: {name} normalizes within a channel, not across channels")
    size = protobuf.integer(settings, 1, 5)
    if not 0 < size < 1000:
        raise ValueError(f"{path}: {name} has a window of {size} maps")
    return {
        "lrn_size": size,
        "lrn_alpha": protobuf.float32(settings, 2, 1.0) / size,
        "lrn_beta": protobuf.float32(settings, 3, 0.75),
        "lrn_k": protobuf.float32(settings, 5, 1.0),
    }


def _blob(message: memoryview, name: str, path: Path) -> Tensor:
    """BlobProto: num, channels, height, width 1-4; data 5; shape 7 (dim 1); double_data 8."""
    shapes = list(protobuf.messages(message, 7))
    if shapes:
        shape = protobuf.integers(shapes[-1], 1)
    else:
        shape = [protobuf.integer(message, number) for number in (1, 2, 3, 4)]
    values = protobuf.floats(message, 5)
    if not len(values):
        values = protobuf.floats(message, 8, "<f8")
    if math.prod(shape) != len(values) or not len(values):
        raise ValueError(
            f"{path}: a blob of {name} has {len(values)} numbers for the shape {shape[:8]}"
        )
    return torch.from_numpy(values.astype("float32")).reshape(shape)


def _grouped(layers: list[_Layer], path: Path) -> dict[str, Tensor]:
    """The weights and biases under our names, without the ones in front of old blobs' shapes."""
    with_weights = [layer for layer in layers if layer.blobs]
    names = [layer.name for layer in with_weights]
    if set(LAYERS) <= set(names):
        chosen = {layer.name: layer for layer in with_weights}
    else:  # others have renamed layers, as fine-tuning does with fc8
        wanted = ["Convolution" if name in CONVOLUTIONS else "InnerProduct" for name in LAYERS]
        if [layer.type for layer in with_weights] != wanted:
            raise ValueError(
                f"{path}: has weights for {', '.join(names)[:200] or 'no layer'}; an AlexNet has "
                "five convolutions and three inner products"
            )
        chosen = dict(zip(LAYERS, with_weights, strict=True))
    grouped = {}
    for name in LAYERS:
        blobs = chosen[name].blobs
        if len(blobs) != 2:
            raise ValueError(f"{path}: {name} has {len(blobs)} blobs, not weights and biases")
        dimensions = 4 if name in CONVOLUTIONS else 2
        grouped[f"{name}.weight"] = _without_ones(blobs[0], dimensions)
        grouped[f"{name}.bias"] = _without_ones(blobs[1], 1)
    return grouped


def _without_ones(blob: Tensor, dimensions: int) -> Tensor:
    """`blob` without the axes of one entry that old files have in front."""
    while blob.dim() > dimensions and blob.shape[0] == 1:
        blob = blob[0]
    return blob


def write(network: NetworkFile, path: Path) -> None:
    """Writes a .caffemodel of LayerParameters. Raises ValueError where the network is not Caffe's.

    Only layers with weights and the norms are in it: Caffe takes the rest from its .prototxt.
    """
    model = network.config.model
    pools_first = model.layer1_order == "relu-pool-lrn"
    ours = model if not pools_first else dataclasses.replace(model, layer1_order="relu-lrn-pool")
    if pools_first and model.layer2_order == "relu-pool-lrn":
        ours = dataclasses.replace(ours, layer2_order="relu-lrn-pool")
    norm = {name: getattr(preset("caffe").model, name) for name in NORM}
    known = network.config.with_fields(**(vars(ours) | norm))
    check_is_caffes(dataclasses.replace(network, config=known), "a .caffemodel")
    grouped = scale_dropped_inputs(to_grouped(network.tensors, model), model)
    settings = encode(1, model.lrn_size) + encode(2, model.lrn_alpha * model.lrn_size)
    settings += encode(3, model.lrn_beta) + encode(5, model.lrn_k)
    content = encode(NAME, "CaffeNet" if pools_first else "AlexNet")
    for layer in LAYERS:
        blobs = [grouped[f"{layer}.weight"], grouped[f"{layer}.bias"]]
        kind = "Convolution" if layer in CONVOLUTIONS else "InnerProduct"
        content += _layer_message(layer, kind, blobs)
        if layer in ("conv1", "conv2"):
            steps = {f"norm{layer[-1]}": ("LRN", settings), f"pool{layer[-1]}": ("Pooling", b"")}
            for name in sorted(steps, reverse=pools_first):
                type_, lrn = steps[name]
                content += _layer_message(name, type_, [], lrn)
    with atomic_writer(path) as file:
        file.write(content)


def _layer_message(name: str, type_: str, blobs: list[Tensor], lrn: bytes = b"") -> bytes:
    message = encode(NEW.name, name) + encode(NEW.type, type_)
    for blob in blobs:
        shape = b"".join(encode(1, length) for length in blob.shape)
        data = blob.contiguous().numpy().astype("<f4").tobytes()
        message += encode(NEW.blobs, encode(7, shape) + encode(5, data))
    if lrn:
        message += encode(NEW.lrn, lrn)
    return encode(LAYER_FIELD, message)
