"""bvlc_alexnet.npy: read without unpickling, in TensorFlow's layouts."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_networks import images_for, our_logits, random_network
from mutated_files import check_mutated

from alexnet_mp.weights.convert import detect, read_network_file, write_network_file
from alexnet_mp.weights.grouped import to_grouped
from alexnet_mp.weights.network_file import NetworkFile


def tensorflow_weights(network: NetworkFile) -> dict[str, list[np.ndarray]]:
    """The dictionary as caffe-tensorflow lays it out, by loops over single kernels."""
    grouped = to_grouped(network.tensors, network.config.model)
    weights = {}
    for layer in network.config.model.layers:
        weight, bias = (grouped[f"{layer}.{part}"].numpy() for part in ("weight", "bias"))
        if weight.ndim == 4:
            theirs = np.stack([kernel.transpose(1, 2, 0) for kernel in weight], axis=-1)
        elif layer == "fc6":
            maps = grouped["conv5.weight"].shape[0]
            rows = [row.reshape(maps, -1).T.reshape(-1) for row in weight]  # by pixel, then by map
            theirs = np.stack(rows, axis=1)
        else:
            theirs = weight.T
        weights[layer] = [np.ascontiguousarray(theirs), bias]
    return weights


def tensorflow_logits(weights: dict, images: torch.Tensor) -> torch.Tensor:
    """The network as the script beside the file runs it: channels last, groups split by hand."""

    def conv(x: torch.Tensor, layer: str, groups: int, stride: int, padding: int) -> torch.Tensor:
        weight, bias = map(torch.from_numpy, weights[layer])
        parts = zip(x.chunk(groups, 3), weight.chunk(groups, 3), strict=True)
        outputs = [
            F.conv2d(
                a.permute(0, 3, 1, 2), b.permute(3, 2, 0, 1), stride=stride, padding=padding
            ).permute(0, 2, 3, 1)
            for a, b in parts
        ]
        return (torch.cat(outputs, 3) + bias).relu()

    def norm_pool(x: torch.Tensor, norm: bool = True) -> torch.Tensor:
        squares = F.pad(x.square(), (2, 2)).unfold(3, 5, 1).sum(4)
        x = x / (1 + 2e-5 * squares) ** 0.75 if norm else x
        return F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2).permute(0, 2, 3, 1)

    x = norm_pool(conv(images.permute(0, 2, 3, 1), "conv1", 1, 4, 0))
    x = norm_pool(conv(x, "conv2", 2, 1, 2))
    x = conv(conv(x, "conv3", 1, 1, 1), "conv4", 2, 1, 1)
    x = norm_pool(conv(x, "conv5", 2, 1, 1), norm=False).flatten(1)  # by row, column, channel
    for layer in ("fc6", "fc7", "fc8"):
        weight, bias = map(torch.from_numpy, weights[layer])
        x = x @ weight + bias
        x = x if layer == "fc8" else x.relu()
    return x


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "bvlc_alexnet.npy"


@pytest.fixture(params=[67, 99])
def network(request) -> NetworkFile:
    """At 99 pixels fc6 reads 2x2 maps, whose order matters."""
    return random_network("caffe", image_size=request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_file_gives_the_logits_of_tensorflows_layout(file, network, protocol: int) -> None:
    weights, images = tensorflow_weights(network), images_for(network)
    with file.open("wb") as target:  # np.save, with the protocols of old Pythons too
        np.lib.format.write_array_header_1_0(
            target, {"descr": "|O", "fortran_order": False, "shape": ()}
        )
        pickle.dump(np.array(weights, dtype=object), target, protocol=protocol)
    assert detect(file) == "npy"
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())
    assert close(our_logits(back, images), tensorflow_logits(weights, images))


def test_fc6_in_another_order_gives_other_logits(file) -> None:
    network = random_network("caffe", image_size=99)
    weights, images = tensorflow_weights(network), images_for(network)
    grouped = to_grouped(network.tensors, network.config.model)
    weights["fc6"][0] = np.ascontiguousarray(grouped["fc6.weight"].numpy().T)  # by channel
    np.save(file, weights)
    assert not close(our_logits(read_network_file(file), images), our_logits(network, images))


def test_numpy_reads_what_we_write_and_we_read_what_numpy_writes(file, network) -> None:
    write_network_file(network, file)
    theirs = np.load(file, allow_pickle=True).item()
    for layer, (weight, bias) in tensorflow_weights(network).items():
        assert np.array_equal(theirs[layer][0], weight) and np.array_equal(theirs[layer][1], bias)
    np.save(file, theirs)
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())


def test_big_endian_float64_arrays_are_read(file) -> None:
    network = random_network("caffe", image_size=67)
    weights = tensorflow_weights(network)
    np.save(file, {layer: [a.astype(">f8") for a in pair] for layer, pair in weights.items()})
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())


class Hostile:
    def __init__(self, function: object, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple:
        return self.parts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Hostile(os.system, "touch HERE"), "it names (posix|nt).system"),
        (Hostile(np.zeros, 10**12), "it names numpy.zeros"),
        (Hostile(bytearray, 10**12), "it names builtins.bytearray"),
        (np.zeros(3), "it holds an array of numbers"),
        ({"conv1": 3}, "it holds a int"),
        ([1.5], "it holds a float"),
        ({"conv1": [np.zeros(3), np.zeros(3)]}, "conv1 should be an array of 4 axes"),
        ({"conv1": [np.array(["a"]), np.zeros(3)]}, "an array of type U1"),
        ({}, "no .weight, bias. of conv1"),
    ],
)
def test_nothing_but_dictionaries_of_arrays_is_read(tmp_path, file, content, words: str) -> None:
    if isinstance(content, Hostile) and content.parts[0] is os.system:
        content = Hostile(os.system, f"touch {tmp_path / 'here'}")
    array = content if isinstance(content, np.ndarray) else np.array(None, dtype=object)
    if array is not content:
        array[()] = content
    np.save(file, array, allow_pickle=True)
    with pytest.raises(ValueError, match=words) as caught:
        read_network_file(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "here").exists()


def test_a_network_of_another_kind_is_not_written(file) -> None:
    with pytest.raises(ValueError, match=r"a .npy of caffe-tensorflow cannot say --conv1-padding"):
        write_network_file(random_network("paper", image_size=64), file)


def test_dropout_as_of_2012_is_written_as_scaled_weights(file) -> None:
    network = random_network("caffe", image_size=67, dropout="2012")
    write_network_file(network, file)
    images = images_for(network)
    assert close(our_logits(read_network_file(file), images), our_logits(network, images))


@pytest.mark.slow
def test_a_damaged_file_is_one_line(file) -> None:
    small = {"image_size": 67, "kernels": (2, 2, 2, 1, 1), "hidden": (2, 2)}
    np.save(file, tensorflow_weights(random_network("caffe", **small)))
    assert check_mutated(file, file.read_bytes()) > 400
