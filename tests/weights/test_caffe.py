"""Caffe's .caffemodel: written by Google's protobuf library, run by plain PyTorch and by OpenCV."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_networks import images_for, our_logits, plain_logits, random_network
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from mutated_files import check_mutated
from ranks import run

from alexnet_mp.config import preset
from alexnet_mp.weights.convert import detect, read_network_file, write_network_file
from alexnet_mp.weights.grouped import to_grouped
from alexnet_mp.weights.network_file import NetworkFile

ALPHA = 1e-4  # which Caffe divides by the size, 5
OPTIONAL, REPEATED = 1, 3
INT32, INT64, FLOAT, STRING, MESSAGE, UINT32, DOUBLE, ENUM_AS_INT = 5, 3, 2, 9, 11, 13, 1, 5
FIELDS = {
    "BlobShape": [("dim", 1, INT64, REPEATED, "packed")],
    "BlobProto": [
        ("num", 1, INT32, OPTIONAL, ""),
        ("channels", 2, INT32, OPTIONAL, ""),
        ("height", 3, INT32, OPTIONAL, ""),
        ("width", 4, INT32, OPTIONAL, ""),
        ("data", 5, FLOAT, REPEATED, "packed"),
        ("shape", 7, MESSAGE, OPTIONAL, "BlobShape"),
        ("double_data", 8, DOUBLE, REPEATED, "packed"),
    ],
    "LRNParameter": [
        ("local_size", 1, UINT32, OPTIONAL, ""),
        ("alpha", 2, FLOAT, OPTIONAL, ""),
        ("beta", 3, FLOAT, OPTIONAL, ""),
        ("norm_region", 4, ENUM_AS_INT, OPTIONAL, ""),
        ("k", 5, FLOAT, OPTIONAL, ""),
    ],
    "V1LayerParameter": [
        ("bottom", 2, STRING, REPEATED, ""),
        ("top", 3, STRING, REPEATED, ""),
        ("name", 4, STRING, OPTIONAL, ""),
        ("type", 5, ENUM_AS_INT, OPTIONAL, ""),
        ("blobs", 6, MESSAGE, REPEATED, "BlobProto"),
        ("lrn_param", 18, MESSAGE, OPTIONAL, "LRNParameter"),
    ],
    "LayerParameter": [
        ("name", 1, STRING, OPTIONAL, ""),
        ("type", 2, STRING, OPTIONAL, ""),
        ("bottom", 3, STRING, REPEATED, ""),
        ("top", 4, STRING, REPEATED, ""),
        ("blobs", 7, MESSAGE, REPEATED, "BlobProto"),
        ("lrn_param", 118, MESSAGE, OPTIONAL, "LRNParameter"),
    ],
    "NetParameter": [
        ("name", 1, STRING, OPTIONAL, ""),
        ("layers", 2, MESSAGE, REPEATED, "V1LayerParameter"),
        ("layer", 100, MESSAGE, REPEATED, "LayerParameter"),
    ],
}
"""The fields of caffe.proto that are used: name, number, type, label, and message or packed."""
V1_TYPES = {"Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17, "ReLU": 18}


def net_parameter() -> type:
    """The class NetParameter, made from FIELDS."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe_test.proto", package="caffe_test")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, more in fields:
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if kind == MESSAGE:
                added.type_name = f".caffe_test.{more}"
            elif more == "packed":
                added.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe_test.NetParameter"))


def caffemodel(
    grouped: dict[str, torch.Tensor],
    *,
    v1: bool = False,
    pools_first: bool = False,
    norms: bool = True,
    doubles: bool = False,
    rename: dict[str, str] | None = None,
    alpha: float = ALPHA,
    norm_region: int = 0,
) -> bytes:
    """A file as Caffe writes it; with `v1` in the old messages, whose blobs have four axes."""
    net = net_parameter()(name="CaffeNet" if pools_first else "AlexNet")

    def add(name: str, kind: str, blobs: tuple[torch.Tensor, ...] = ()) -> None:
        layer = (net.layers if v1 else net.layer).add(name=(rename or {}).get(name, name))
        layer.type = V1_TYPES[kind] if v1 else kind
        if kind == "LRN":
            layer.lrn_param.local_size, layer.lrn_param.beta = 5, 0.75
            layer.lrn_param.alpha, layer.lrn_param.norm_region = alpha, norm_region
        for blob in blobs:
            proto = layer.blobs.add()
            values = blob.flatten().double().tolist()
            (proto.double_data if doubles else proto.data).extend(values)
            if v1:
                shape = (1, 1, 1, 1, *blob.shape)[-4:]
                proto.num, proto.channels, proto.height, proto.width = shape
            else:
                proto.shape.dim.extend(blob.shape)

    for number in range(1, 9):
        name = f"conv{number}" if number <= 5 else f"fc{number}"
        kind = "Convolution" if number <= 5 else "InnerProduct"
        add(name, kind, (grouped[f"{name}.weight"], grouped[f"{name}.bias"]))
        if number <= 2 and norms:
            steps = [(f"norm{number}", "LRN"), (f"pool{number}", "Pooling")]
            for step in steps[:: -1 if pools_first else 1]:
                add(*step)
    return net.SerializeToString()


def caffe_network(**fields: object) -> NetworkFile:
    """A small network whose activations are large enough for the norm to change them by much."""
    network = random_network("caffe", **({"image_size": 67} | fields))
    return network


def grouped_of(network: NetworkFile) -> dict[str, torch.Tensor]:
    return to_grouped(network.tensors, network.config.model)


def plain(grouped: dict, images: torch.Tensor, **changes: object) -> torch.Tensor:
    return plain_logits(grouped, images, **({"norm": (ALPHA, 1.0)} | changes))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "net.caffemodel"


@pytest.mark.parametrize("pools_first", [False, True])
@pytest.mark.parametrize("v1", [False, True])
def test_a_caffemodel_gives_the_logits_of_plain_pytorch(file, v1: bool, pools_first: bool) -> None:
    network = caffe_network()
    grouped, images = grouped_of(network), images_for(network)
    file.write_bytes(caffemodel(grouped, v1=v1, pools_first=pools_first))
    assert detect(file) == "caffe"
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())
    expected = plain(grouped, images, norm_before_pool=not pools_first)
    assert close(our_logits(back, images), expected)
    assert not close(plain(grouped, images, norm_before_pool=pools_first), expected)


def test_a_known_mistake_gives_other_logits(file) -> None:
    """What the comparison with plain PyTorch would notice."""
    network = caffe_network()
    grouped, images = grouped_of(network), images_for(network)
    file.write_bytes(caffemodel(grouped))
    back = read_network_file(file)
    expected = plain(grouped, images)
    mistakes = {"RGB for BGR": our_logits(back, images.flip(1))}

    def changed(**fields: object) -> NetworkFile:
        return dataclasses.replace(back, config=back.config.with_fields(**fields))

    mistakes["alpha times 5"] = our_logits(changed(lrn_alpha=1e-4), images)
    mistakes["no halo"] = our_logits(changed(lrn_across_columns=False), images)
    mistakes["k of the paper"] = our_logits(changed(lrn_k=2.0), images)
    mistakes["dropout of 2012"] = our_logits(changed(dropout="2012"), images)
    other = {
        name.replace("columns.0", "columns.x").replace("columns.1", "columns.0"): value
        for name, value in back.tensors.items()
    }
    swapped = {name.replace("columns.x", "columns.1"): value for name, value in other.items()}
    swapped["columns.0.fc8.bias"] = swapped.pop("columns.1.fc8.bias")
    mistakes["columns swapped"] = our_logits(dataclasses.replace(back, tensors=swapped), images)
    assert close(our_logits(back, images), expected)
    assert [name for name, logits in mistakes.items() if close(logits, expected)] == []


def on_rank(rank: int, path: Path, images: torch.Tensor) -> tuple[torch.Tensor, dict, list]:
    """Logits and gradients of one of two ranks, and the values that it sent for each norm."""
    from alexnet_mp.inference.load_network import read_network
    from alexnet_mp.parallel.context import init_parallel

    network = read_network(path)
    context = init_parallel(network.config.with_fields(threads=1, backend="gloo"))
    model = network.build(lambda config: context.build_model(config, 0))
    logits = model(images)
    logits.square().sum().backward()
    gradients = {name: value.clone() for name, value in model.canonical(lambda p: p.grad).items()}
    sent = [
        context.meter.total_values(name, "forward", phase)
        for name in ("lrn1", "lrn2")
        for phase in ("training",)
    ]
    context.close()
    return logits.detach(), gradients, sent


@pytest.mark.ranks
@pytest.mark.parametrize("pools_first", [False, True])
def test_two_ranks_equal_one_device_and_send_two_maps_across_the_border(
    file, pools_first: bool
) -> None:
    network = caffe_network(kernels=(6, 8, 8, 6, 4))
    images = images_for(network)
    file.write_bytes(caffemodel(grouped_of(network), pools_first=pools_first))
    back = read_network_file(file)
    from alexnet_mp.model.four_layer import build_network

    model = build_network(back.config.model).eval()
    model.load_state_dict(back.tensors)
    logits = model(images)
    logits.square().sum().backward()
    alone = model.canonical(lambda p: p.grad)
    results = run(on_rank, 2, file, images, timeout=120)
    sizes = back.config.model.map_sizes()
    layers = ("pool1", "pool2") if pools_first else ("conv1", "conv2")
    expected = [len(images) * 2 * sizes[name][0] * sizes[name][1] for name in layers]
    for theirs, gradients, sent in results:
        assert (theirs - logits).abs().max() <= 1e-5 * logits.abs().max()
        for name, value in gradients.items():
            assert (value - alone[name]).abs().max() <= 1e-4 * alone[name].abs().max(), name
        assert sent == expected


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_the_norm_across_columns_is_that_of_all_maps_side_by_side(columns: int) -> None:
    network = caffe_network(columns=columns, kernels=(4, 4, 4, 4, 4), hidden=(8, 8))
    images = images_for(network)
    assert close(our_logits(network, images), plain(grouped_of(network), images))


def test_layers_are_found_by_their_order_where_names_differ(file) -> None:
    network = caffe_network()
    file.write_bytes(caffemodel(grouped_of(network), rename={"fc8": "fc8_flickr"}))
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())


def test_doubles_are_read_and_a_file_without_norms_has_caffes_own(file) -> None:
    network = caffe_network()
    file.write_bytes(caffemodel(grouped_of(network), doubles=True, norms=False))
    assert (
        read_network_file(file).config.model
        == preset("caffe")
        .with_fields(
            **{
                name: getattr(network.config.model, name)
                for name in ("kernels", "hidden", "classes")
            },
            image_size=67,
        )
        .model
    )


def test_preprocessing_and_norm_are_caffes(file) -> None:
    network = caffe_network()
    file.write_bytes(caffemodel(grouped_of(network), alpha=5e-4))
    config = read_network_file(file).config
    assert config.model.lrn_alpha == pytest.approx(1e-4) and config.model.lrn_k == 1
    assert (config.data.color_order, config.data.mean, config.data.resize) == (
        "bgr",
        "values",
        "warp",
    )
    assert config.data.mean_values == (122.67891, 116.66877, 104.00699)  # red, green, blue


@pytest.mark.parametrize("pools_first", [False, True])
def test_a_network_comes_back_from_our_own_file(file, pools_first: bool) -> None:
    order = "relu-pool-lrn" if pools_first else "relu-lrn-pool"
    network = caffe_network(layer1_order=order, layer2_order=order)
    write_network_file(network, file)
    back = read_network_file(file)
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())
    assert back.config.model.layer1_order == back.config.model.layer2_order == order
    assert net_parameter()().FromString(file.read_bytes()).layer[0].name == "conv1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "tanh"}, "--activation tanh"),
        ({"lrn_across_columns": False}, "--lrn-across-columns False"),
        ({"conv1_padding": (0, 3, 0, 3)}, "--conv1-padding"),
        ({"layer1_order": "lrn-pool-relu"}, "--layer1-order lrn-pool-relu"),
    ],
)
def test_a_network_that_caffe_cannot_say_is_refused(file, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_network_file(caffe_network(**fields), file)
    assert not file.exists()


def test_a_norm_within_channels_is_refused(file) -> None:
    file.write_bytes(caffemodel(grouped_of(caffe_network()), norm_region=1))
    with pytest.raises(ValueError, match="norm1 normalizes within a channel"):
        read_network_file(file)


PROTOTXT = """
name: "AlexNet"
input: "data" input_shape {{ dim: 1 dim: 3 dim: 67 dim: 67 }}
{conv1} {relu1} {after1}
{conv2} {relu2} {after2}
{conv3} {relu3} {conv4} {relu4} {conv5} {relu5} {pool5}
{fc6} {relu6} {fc7} {relu7} {fc8}
layer {{ name: "prob" type: "Softmax" bottom: "fc8" top: "prob" }}
"""


def prototxt(network: NetworkFile, pools_first: bool) -> str:
    model = network.config.model
    outputs = dict(zip(model.layers, (*model.kernels, *model.hidden), strict=False))
    parts, bottom = {}, "data"

    def layer(name: str, kind: str, parameter: str = "", top: str | None = None) -> str:
        nonlocal bottom
        text = f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" '
        bottom = top or name
        return text + f'top: "{bottom}" {parameter} }}'

    pooling = "pooling_param { pool: MAX kernel_size: 3 stride: 2 }"
    norm = f"lrn_param {{ local_size: 5 alpha: {ALPHA} beta: 0.75 }}"
    sizes = {"conv1": "kernel_size: 11 stride: 4", "conv2": "kernel_size: 5 pad: 2"}
    for number in range(1, 9):
        name = f"conv{number}" if number <= 5 else f"fc{number}"
        count = model.classes if name == "fc8" else model.columns * outputs[name]
        if number <= 5:
            size = sizes.get(name, "kernel_size: 3 pad: 1")
            groups = 2 if number in (2, 4, 5) else 1
            parameter = f"convolution_param {{ num_output: {count} {size} group: {groups} }}"
            parts[name] = layer(name, "Convolution", parameter)
        else:
            parameter = f"inner_product_param {{ num_output: {count} }}"
            parts[name] = layer(name, "InnerProduct", parameter)
        if number < 8:
            parts[f"relu{number}"] = layer(f"relu{number}", "ReLU")
        if number <= 2:
            steps = [
                (f"norm{number}", "LRN", norm),
                (f"pool{number}", "Pooling", pooling),
            ]
            parts[f"after{number}"] = " ".join(
                layer(*step) for step in steps[:: -1 if pools_first else 1]
            )
        if number == 5:
            parts["pool5"] = layer("pool5", "Pooling", pooling)
    return PROTOTXT.format(**parts)


@pytest.mark.parametrize("pools_first", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_opencv_gives_the_same_probabilities(tmp_path, file, pools_first, ours: bool) -> None:
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        pytest.skip("OpenCV 5 has no importer for Caffe")
    network = caffe_network()
    if ours:
        order = "relu-pool-lrn" if pools_first else "relu-lrn-pool"
        write_network_file(caffe_network(layer1_order=order, layer2_order=order), file)
    else:
        file.write_bytes(caffemodel(grouped_of(network), pools_first=pools_first))
    (tmp_path / "net.prototxt").write_text(prototxt(network, pools_first))
    net = cv2.dnn.readNetFromCaffe(str(tmp_path / "net.prototxt"), str(file))
    images = images_for(network, 1)
    net.setInput(images.numpy())
    theirs = np.asarray(net.forward()).reshape(-1)
    logits = our_logits(read_network_file(file), images)[0]
    mine = logits.softmax(0).numpy()
    assert np.abs(mine - theirs).max() < 1e-4 and np.ptp(mine) > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.update({"conv2.weight": torch.zeros(12, 3, 5, 5)}), "conv2 reads 3 maps"),
        (lambda g: g.update({"fc6.weight": torch.zeros(48, 7)}), "fc6 reads 7"),
        (lambda g: g.update({"conv3.weight": torch.zeros(16, 12, 5, 5)}), "conv3.weight is"),
    ],
)
def test_blobs_of_another_network_are_one_line(file, change, words: str) -> None:
    grouped = grouped_of(caffe_network())
    change(grouped)
    file.write_bytes(caffemodel(grouped))
    with pytest.raises(ValueError, match=words) as caught:
        read_network_file(file)
    assert str(file) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("v1", [False, True])
def test_a_damaged_caffemodel_is_one_line(file, v1: bool) -> None:
    network = caffe_network(kernels=(2, 2, 2, 1, 1), hidden=(2, 2))
    assert check_mutated(file, caffemodel(grouped_of(network), v1=v1)) > 400
