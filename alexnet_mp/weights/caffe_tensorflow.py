"""bvlc_alexnet.npy of guerzh/tf_weights, made with ethereon/caffe-tensorflow.

A pickled dictionary {layer: [weight, bias]}: convolutions (h, w, in / groups, out), fully connected
layers (in, out), and fc6's inputs in the order row, column, channel. The pickle is interpreted here
by a reader that makes dictionaries, lists, strings and numeric arrays, and can call nothing else.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alexnet_mp.config import LAYERS, Config
from alexnet_mp.config.files import atomic_writer
from alexnet_mp.weights.caffe import caffe_config, check_is_caffes
from alexnet_mp.weights.grouped import (
    CONVOLUTIONS,
    config_for,
    from_grouped,
    scale_dropped_inputs,
    to_grouped,
)
from alexnet_mp.weights.network_file import NetworkFile

NUMPY_MODULES = tuple(
    f"numpy.{core}.{module}" for core in ("core", "_core") for module in ("multiarray", "numeric")
)
ARRAY_TYPES = {"f2", "f4", "f8"}
MAGIC = b"\x93NUMPY"


class _Type:
    """Stands for numpy.dtype: keeps the text that names a type, such as f4, and its byte order."""

    def __init__(self, name: Any = "", align: Any = False, copy: Any = False) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]  # (version, byte order, ...)

    def numpy(self) -> np.dtype[Any]:
        if self.name not in ARRAY_TYPES or self.order not in ("<", ">", "="):
            raise pickle.UnpicklingError(f"an array of type {str(self.name)[:20]}")
        return np.dtype(f"{self.order}{self.name}")


class _Array:
    """Stands for numpy.ndarray: made of a shape, a type and as many bytes as they need."""

    def __init__(self, *_: Any) -> None:
        self.values: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if isinstance(content, list):  # the outermost array, of objects: it holds the dictionary
            if shape not in ((), (1,)) or len(content) != 1:
                raise pickle.UnpicklingError("an array of several objects")
            self.values = content[0]
            return
        if isinstance(content, str):  # bytes of Python 2
            content = content.encode("latin1")
        if not isinstance(kind, _Type) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array without a type or content")
        dtype = kind.numpy()
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise pickle.UnpicklingError("an array of an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(content):
            raise pickle.UnpicklingError("an array whose content does not fit its shape")
        array = np.frombuffer(content, dtype)
        self.values = array.reshape(shape, order="F" if fortran else "C")


def _frombuffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Stands for the function with which protocol 5 makes an array."""
    if not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array without content")
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", bytes(content)))
    return array


def _encode(value: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, with which Python 3 writes bytes in old protocols."""
    if not isinstance(value, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return value.encode("latin1")


# In Python, not C: it keeps its memo in a dictionary, so that a damaged index needs no memory.
class _Reader(pickle._Unpickler):
    """An unpickler to which three names of NumPy are known, as the classes above."""

    def find_class(self, module: str, name: str) -> Any:
        if module in NUMPY_MODULES and name in ("_reconstruct", "_frombuffer"):
            return _Array if name == "_reconstruct" else _frombuffer
        known = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type}
        known |= {("_codecs", "encode"): _encode}  # type: ignore[dict-item]  # a function
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])
        return known[module, name]

    def get_extension(self, code: int) -> Any:
        raise pickle.UnpicklingError("it uses the extension registry")


def read(path: Path, base: Config | None = None) -> NetworkFile:
    """Reads a .npy with a pickled dictionary. Raises ValueError that names `path`."""
    try:
        content = path.read_bytes()
        weights = _dictionary(content)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # unpickling damaged files raises nearly everything
        reason = " ".join(f"{error}".split())[:120] or type(error).__name__
        raise ValueError(f"{path}: not a readable dictionary of arrays ({reason})") from None
    grouped = _grouped(weights, path)
    shapes = {name: tuple(value.shape) for name, value in grouped.items()}
    config = config_for(base or caffe_config(path=path), shapes, path)
    classes = tuple(f"class {k}" for k in range(config.model.classes))
    return NetworkFile(path, config, from_grouped(grouped, config.model, path), classes)


def _dictionary(content: bytes) -> dict[str, list[NDArray[Any]]]:
    """{layer: [weight, bias]} of the .npy file `content`."""
    if content[:6] != MAGIC or content[6] not in (1, 2):
        raise ValueError("it has not NumPy's head")
    size = 2 if content[6] == 1 else 4
    length = int.from_bytes(content[8 : 8 + size], "little")
    head = content[8 + size : 8 + size + length]
    if b"O" not in head:
        raise ValueError("it holds an array of numbers, not a dictionary")
    value = _plain(_Reader(io.BytesIO(content[8 + size + length :]), encoding="latin1").load())
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dictionary")
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` with arrays in the place of what stands for them; nothing else may be in it."""
    if depth > 4:
        raise ValueError("containers within containers")
    if isinstance(value, _Array):
        return _plain(value.values, depth + 1)
    if isinstance(value, dict):
        return {_name(key): _plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, depth + 1) for part in value]
    if isinstance(value, np.ndarray):
        return value
    raise ValueError(f"it holds a {type(value).__name__}")


def _name(key: Any) -> str:
    text = key.decode("latin1") if isinstance(key, bytes) else key
    if not isinstance(text, str):
        raise ValueError(f"a {type(key).__name__} as a name")
    return text


def _grouped(weights: dict[str, list[NDArray[Any]]], path: Path) -> dict[str, Tensor]:
    """The arrays as one tensor a layer, (out, in, h, w) or (out, in), fc6's inputs by channel."""
    grouped = {}
    for layer in LAYERS:
        pair = weights.get(layer)
        dimensions = 4 if layer in CONVOLUTIONS else 2
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{path}: there is no [weight, bias] of {layer} in it")
        weight, bias = pair
        if not all(isinstance(array, np.ndarray) for array in pair) or weight.ndim != dimensions:
            raise ValueError(
                f"{path}: {layer} should be an array of {dimensions} axes and one of 1"
            )
        axes = (3, 2, 0, 1) if dimensions == 4 else (1, 0)
        grouped[f"{layer}.weight"] = _tensor(weight.transpose(axes))
        grouped[f"{layer}.bias"] = _tensor(bias)
    maps = grouped["conv5.weight"].shape[0]
    outputs, inputs = grouped["fc6.weight"].shape
    side = math.isqrt(inputs // max(maps, 1))
    if inputs != maps * side**2:
        raise ValueError(f"{path}: fc6 reads {inputs} values of {maps} maps, which are not square")
    by_row = grouped["fc6.weight"].reshape(outputs, side, side, maps)
    grouped["fc6.weight"] = by_row.permute(0, 3, 1, 2).reshape(outputs, inputs).contiguous()
    return grouped


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32).copy())


def write(network: NetworkFile, path: Path) -> None:
    """Writes the pickled dictionary. Raises ValueError where the network is not Caffe's."""
    check_is_caffes(network, "a .npy of caffe-tensorflow")
    model = network.config.model
    grouped = scale_dropped_inputs(to_grouped(network.tensors, model), model)
    outputs, inputs = grouped["fc6.weight"].shape
    maps = grouped["conv5.weight"].shape[0]
    side = math.isqrt(inputs // maps)
    by_channel = grouped["fc6.weight"].reshape(outputs, maps, side, side)
    grouped["fc6.weight"] = by_channel.permute(0, 2, 3, 1).reshape(outputs, inputs)
    weights = {}
    for layer in LAYERS:
        weight = grouped[f"{layer}.weight"]
        axes = (2, 3, 1, 0) if weight.dim() == 4 else (1, 0)
        pair = weight.permute(axes).contiguous().numpy(), grouped[f"{layer}.bias"].numpy()
        weights[layer] = list(pair)
    with atomic_writer(path) as file:
        np.save(file, np.array(weights, dtype=object), allow_pickle=True)
