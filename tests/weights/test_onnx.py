"""ONNX: our graph in onnxruntime, and the zoo's bvlcalexnet as its converter wrote it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from foreign_networks import images_for, our_logits, plain_logits, random_network
from mutated_files import check_mutated
from onnx import TensorProto, helper, numpy_helper

from alexnet_mp.weights.convert import detect, read_network_file, write_network_file
from alexnet_mp.weights.grouped import to_grouped
from alexnet_mp.weights.network_file import NetworkFile

NETWORKS = [
    ("paper", {"image_size": 64}),
    ("original", {"image_size": 64}),
    ("original", {"image_size": 96, "columns": 4}),
    ("original-half", {"image_size": 64}),
    ("original-isolated", {"image_size": 64}),
    ("tutorial", {"image_size": 224}),
    ("caffe", {"image_size": 67}),
    ("caffe", {"image_size": 67, "layer1_order": "relu-pool-lrn", "layer2_order": "relu-pool-lrn"}),
    ("demo", {"activation": "tanh", "lrn": False}),
]


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "net.onnx"


def runtime_logits(file: Path, images: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize(("preset", "fields"), NETWORKS)
def test_onnxruntime_gives_our_logits(file, preset: str, fields: dict) -> None:
    network = random_network(preset, **fields)
    write_network_file(network, file)
    assert detect(file) == "onnx"
    images = images_for(network, 5)
    logits = our_logits(network, images)
    assert close(runtime_logits(file, images), logits)
    assert close(runtime_logits(file, images[:1]), logits[:1])  # any batch
    assert not close(logits[:1], logits[1:2])


@pytest.mark.parametrize(("preset", "fields"), NETWORKS)
def test_a_network_comes_back_bit_for_bit(file, preset: str, fields: dict) -> None:
    network = random_network(preset, **fields)
    write_network_file(network, file)
    back = read_network_file(file)
    assert back.config == network.config and back.classes == network.classes
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())
    for name, value in (network.statistics or {}).items():
        assert torch.equal(back.statistics[name], value)


@pytest.mark.parametrize(
    ("preset", "fields", "words"),
    [
        ("four-layers", {"kernels": (4, 4, 4), "hidden": ()}, "--network four-layers"),
        ("tutorial", {"image_size": 96}, "no adaptive pooling.*--image-size 96"),
    ],
)
def test_what_onnx_cannot_say_is_refused(file, preset: str, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_network_file(random_network(preset, **fields), file)
    assert not file.exists()


def zoo_model(network: NetworkFile, pools_first: bool = False, external: bool = False) -> bytes:
    """The graph of the zoo's bvlcalexnet, with its names, for 67 pixels."""
    grouped = to_grouped(network.tensors, network.config.model)
    nodes, last = [], "data_0"

    def add(kind: str, inputs: list[str], **attributes: object) -> None:
        nonlocal last
        output = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, [last, *inputs], [output], **attributes))
        last = output

    for number in range(1, 9):
        name = f"conv{number}" if number <= 5 else f"fc{number}"
        weights = [f"{name}_w_0", f"{name}_b_0"]
        if number <= 5:
            pads, strides = {1: ([0] * 4, [4, 4]), 2: ([2] * 4, [1, 1])}.get(
                number, ([1] * 4, [1, 1])
            )
            group = 2 if number in (2, 4, 5) else 1
            add("Conv", weights, group=group, pads=pads, strides=strides)
        else:
            add("Gemm", weights, transB=1)
        if number < 8:
            add("Relu", [])
        pool = ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2]})
        norm = ("LRN", {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0})
        if number <= 2:
            for kind, attributes in (pool, norm) if pools_first else (norm, pool):
                add(kind, [], **attributes)
        if number == 5:
            add(pool[0], [], **pool[1])
            add("Flatten", [], axis=1)
    add("Softmax", [], axis=1)
    initializers = [
        numpy_helper.from_array(
            value.numpy(), name.replace(".weight", "_w_0").replace(".bias", "_b_0")
        )
        for name, value in grouped.items()
    ]
    if external:
        initializers[0].data_location = TensorProto.EXTERNAL
    graph = helper.make_graph(
        nodes,
        "bvlcalexnet",
        [helper.make_tensor_value_info("data_0", TensorProto.FLOAT, ["N", 3, 67, 67])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["N", 7])],
        initializer=initializers,
    )
    opsets = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


@pytest.mark.parametrize("pools_first", [False, True])
def test_the_zoos_graph_is_read_by_its_initializers(file, pools_first: bool) -> None:
    network = random_network("caffe", image_size=67)
    file.write_bytes(zoo_model(network, pools_first))
    back = read_network_file(file)
    images = images_for(network)
    logits = our_logits(back, images)
    grouped = to_grouped(network.tensors, network.config.model)
    options = {"norm": (1e-4, 1.0), "norm_before_pool": not pools_first}
    assert close(logits, plain_logits(grouped, images, **options))
    assert close(logits.softmax(1), runtime_logits(file, images))
    assert back.config.data.color_order == "bgr" and back.config.data.mean == "values"


def test_weights_in_another_file_are_refused(file) -> None:
    file.write_bytes(zoo_model(random_network("caffe", image_size=67), external=True))
    with pytest.raises(ValueError, match=r"keeps conv1_w_0 in another file"):
        read_network_file(file)


def test_a_model_of_another_network_is_one_line(file) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), file)
    with pytest.raises(ValueError, match="without conv1's weights"):
        read_network_file(file)


def test_a_tensor_that_does_not_fill_its_shape_is_one_line(file) -> None:
    model = onnx.load_model_from_string(zoo_model(random_network("caffe", image_size=67)))
    model.graph.initializer[0].dims[0] = 10**12
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="conv1_w_0 does not hold the float32 numbers"):
        read_network_file(file)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.zeros((8, 3, 11, 11), np.int64), "conv1_w_0")
    )
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="conv1_w_0 does not hold"):
        read_network_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("zoo", [False, True])
def test_a_damaged_model_is_one_line(file, zoo: bool) -> None:
    small = {"image_size": 67, "kernels": (2, 2, 2, 1, 1), "hidden": (2, 2)}
    network = random_network("caffe", **small)
    write_network_file(network, file)
    assert check_mutated(file, zoo_model(network) if zoo else file.read_bytes()) > 400
