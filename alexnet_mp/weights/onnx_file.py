"""ONNX: a whole network as a graph of standard operators, and the zoo's bvlcalexnet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_mp.config import LAYERS, Config, ModelConfig
from alexnet_mp.config.files import atomic_writer
from alexnet_mp.config.model import CONV1_STRIDE
from alexnet_mp.weights import protobuf
from alexnet_mp.weights.caffe import caffe_config
from alexnet_mp.weights.extras import require
from alexnet_mp.weights.grouped import config_for, from_grouped, scale_dropped_inputs, to_grouped
from alexnet_mp.weights.network_file import METADATA, NetworkFile, from_metadata, to_metadata

OPSET, IR_VERSION = 13, 8
MAP_NORM_SIZE, MAP_NORM_BETA = 5, 0.75  # the defaults of ops' MapNorm, whose k is 1
INITIALIZER = re.compile(r"(conv[1-5]|fc[678])(\.weight|\.bias|_w_0|_b_0)")
"""Our names of the initializers and, conv1_w_0, those of the zoo's bvlcalexnet."""


def write(network: NetworkFile, path: Path) -> None:
    """Writes `network` as an ONNX model: `images` (N, 3, S, S), preprocessed, to `logits`.

    The preprocessing is in the metadata, not in the graph. Raises ValueError where ONNX's operators
    cannot say what the network computes.
    """
    onnx: Any = require("onnx")
    model = network.config.model
    _check_operators(model, network.path)
    grouped = scale_dropped_inputs(to_grouped(network.tensors, model), model)
    graph = _Graph(onnx, model, grouped)
    proto = onnx.helper.make_model(
        graph.build(),
        producer_name="alexnet_mp",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    onnx.helper.set_model_props(proto, to_metadata(network))
    onnx.checker.check_model(proto)
    with atomic_writer(path) as file:
        file.write(proto.SerializeToString())


def _check_operators(model: ModelConfig, path: Path) -> None:
    if model.network != "alexnet":
        raise ValueError(
            f"{path}: the ONNX writer knows AlexNet only, not --network {model.network}"
        )
    sizes = model.map_sizes()
    if model.adaptive_pool and sizes["pool5"] != sizes["fc6"]:
        raise ValueError(
            f"{path}: ONNX has no adaptive pooling, which this network needs at --image-size "
            f"{model.image_size}, where its last maps are {sizes['pool5']}, not {sizes['fc6']}"
        )


class _Graph:
    """The nodes of a network; each method adds nodes and returns the name of their output."""

    def __init__(self, onnx: Any, model: ModelConfig, grouped: Mapping[str, Tensor]) -> None:
        self.onnx, self.model, self.grouped = onnx, model, grouped
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def build(self) -> Any:
        model, make = self.model, self.onnx.helper.make_tensor_value_info
        side, float32 = model.image_size, self.onnx.TensorProto.FLOAT
        x = self._conv("conv1", "images")
        for name, order in (("1", model.layer1_order), ("2", model.layer2_order)):
            x = self._conv("conv2", x) if name == "2" else x
            for step in order.split("-"):
                x = self._step(step, name, x)
        x = self._activate("conv3", self._conv("conv3", x))
        x = self._activate("conv4", self._conv("conv4", x))
        x = self._activate("conv5", self._pool("5", self._conv("conv5", x)))
        x = self._add("Flatten", [x], "flat", axis=1)
        for layer in ("fc6", "fc7"):
            x = self._activate(layer, self._linear(layer, x, layer))
        self._linear("fc8", x, "logits")
        weights = [
            self.onnx.numpy_helper.from_array(value.contiguous().numpy(), name)
            for name, value in self.grouped.items()
        ]
        return self.onnx.helper.make_graph(
            self.nodes,
            "AlexNet",
            [make("images", float32, ["N", 3, side, side])],
            [make("logits", float32, ["N", model.classes])],
            initializer=weights + self.constants,
        )

    def _step(self, step: str, name: str, x: str) -> str:
        """One of relu (or tanh), lrn and pool of layer 1 or 2."""
        if step == "relu":
            return self._activate(f"conv{name}", x)
        if step == "pool":
            if name == "2" and self.model.map_norm:
                x = self._map_norm(x)
            return self._pool(name, x)
        return self._lrn(name, x) if self.model.lrn else x

    def _add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _conv(self, layer: str, x: str) -> str:
        inputs = self.grouped[f"{layer}.weight"].shape[1]
        previous = {"conv1": 3}.get(layer) or self.grouped[f"conv{int(layer[-1]) - 1}.bias"].shape[
            0
        ]
        left, right, top, bottom = self.model.conv1_padding
        half = self.model.kernel_sizes[layer] // 2
        first = layer == "conv1"
        return self._add(
            "Conv",
            [x, f"{layer}.weight", f"{layer}.bias"],
            f"{layer}_out",
            group=previous // inputs,
            pads=[top, left, bottom, right] if first else [half] * 4,
            strides=[CONV1_STRIDE] * 2 if first else [1, 1],
        )

    def _linear(self, layer: str, x: str, output: str) -> str:
        return self._add("Gemm", [x, f"{layer}.weight", f"{layer}.bias"], output, transB=1)

    def _activate(self, layer: str, x: str) -> str:
        kind = {"relu": "Relu", "tanh": "Tanh"}[self.model.activation]
        return self._add(kind, [x], f"{layer}_active")

    def _pool(self, name: str, x: str) -> str:
        size, stride = self.model.pool_size, self.model.pool_stride
        return self._add(
            "MaxPool", [x], f"pool{name}", kernel_shape=[size] * 2, strides=[stride] * 2
        )

    def _lrn(self, name: str, x: str) -> str:
        """The norm, by ONNX's operator, which divides alpha by the size; a column at a time."""
        model = self.model
        settings = {
            "size": model.lrn_size,
            "alpha": model.lrn_alpha * model.lrn_size,
            "beta": model.lrn_beta,
            "bias": model.lrn_k,
        }
        if model.columns == 1 or model.lrn_across_columns:
            return self._add("LRN", [x], f"norm{name}", **settings)
        parts = [f"norm{name}_in_{i}" for i in range(model.columns)]
        self.nodes.append(self.onnx.helper.make_node("Split", [x], parts, axis=1))
        normed = [
            self._add("LRN", [part], f"norm{name}_{i}", **settings) for i, part in enumerate(parts)
        ]
        return self._add("Concat", normed, f"norm{name}", axis=1)

    def _map_norm(self, x: str) -> str:
        """x / (1 + alpha * the sum of squares over 5 x 5 pixels)^0.75."""
        area = MAP_NORM_SIZE**2
        alpha = np.float32(self.model.map_norm_alpha * area)
        squares = self._add("Mul", [x, x], "map_norm_squares")
        mean = self._add(
            "AveragePool",
            [squares],
            "map_norm_mean",
            kernel_shape=[MAP_NORM_SIZE] * 2,
            strides=[1, 1],
            pads=[MAP_NORM_SIZE // 2] * 4,
            count_include_pad=1,
        )
        scaled = self._add(
            "Mul", [mean, self._constant("map_norm_alpha", alpha)], "map_norm_scaled"
        )
        one = self._constant("map_norm_one", np.float32(1))
        base = self._add("Add", [scaled, one], "map_norm_base")
        power = self._constant("map_norm_beta", np.float32(MAP_NORM_BETA))
        denominator = self._add("Pow", [base, power], "map_norm_denominator")
        return self._add("Div", [x, denominator], "map_norm")


def is_onnx(content: bytes) -> bool:
    """Whether `content` is a ModelProto: an ir_version (field 1) and a graph (field 7)."""
    try:
        found = {(number, kind) for number, kind, _ in protobuf.fields(memoryview(content))}
    except protobuf.WireError:
        return False
    return {(1, protobuf.VARINT), (7, protobuf.BYTES)} <= found


def read(path: Path, base: Config | None = None) -> NetworkFile:
    """Reads a model of `write`, or the zoo's bvlcalexnet, by the names of its initializers.

    Raises ValueError that names `path` and says what is wrong.
    """
    onnx: Any = require("onnx")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        grouped = _grouped(onnx, proto, path)
        norms = [node for node in proto.graph.node if node.op_type == "LRN"]
        settings = [_attributes(onnx, node) for node in norms]
        order = [node.op_type for node in proto.graph.node if node.op_type in ("LRN", "MaxPool")]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise
    except Exception as error:  # protobuf's DecodeError, and errors of onnx for odd tensors
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not a readable ONNX model ({reason})") from None
    if metadata.get("format") == METADATA:
        config, classes, statistics = from_metadata(metadata, path)
        plain = scale_dropped_inputs(grouped, config.model, inverse=True)
        tensors = from_grouped(plain, config.model, path)
        return NetworkFile(path, config, tensors, classes, statistics)
    if base is None:
        base = caffe_config(
            settings[0] if settings else None,
            pools_first=order[:1] == ["MaxPool"],
            path=path,
        )
    shapes = {name: tuple(value.shape) for name, value in grouped.items()}
    config = config_for(base, shapes, path)
    classes = tuple(f"class {k}" for k in range(config.model.classes))
    return NetworkFile(path, config, from_grouped(grouped, config.model, path), classes)


def _attributes(onnx: Any, node: Any) -> dict[str, float]:
    """The settings of an LRN node by their names in ModelConfig; alpha is for the plain sum."""
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    size = int(values.get("size", 5))
    alpha = float(values.get("alpha", 1e-4)) / max(size, 1)
    return {
        "lrn_size": size,
        "lrn_alpha": alpha,
        "lrn_beta": float(values.get("beta", 0.75)),
        "lrn_k": float(values.get("bias", 1.0)),
    }


def _grouped(onnx: Any, proto: Any, path: Path) -> dict[str, Tensor]:
    """The initializers under our names, float32."""
    grouped = {}
    for tensor in proto.graph.initializer:
        found = INITIALIZER.fullmatch(tensor.name)
        if found is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError(f"{path}: keeps {tensor.name} in another file, which is not read")
        size = int(np.prod(list(tensor.dims), dtype=object))
        held = max(len(tensor.raw_data) // 4, len(tensor.float_data))
        if tensor.data_type != onnx.TensorProto.FLOAT or size != held:
            raise ValueError(
                f"{path}: {tensor.name} does not hold the float32 numbers of its shape"
            )
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        part = "weight" if found[2] in (".weight", "_w_0") else "bias"
        grouped[f"{found[1]}.{part}"] = values
    missing = [layer for layer in LAYERS if f"{layer}.weight" not in grouped]
    if missing:
        raise ValueError(f"{path}: an ONNX model without {missing[0]}'s weights; is it an AlexNet?")
    return grouped
