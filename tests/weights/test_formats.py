"""Round trips through every format, the formats by content, and files that are none."""

import dataclasses
from pathlib import Path

import pytest
import torch
from foreign_networks import CLASSES, images_for, our_logits, plain_logits, random_network
from mutated_files import COUNT, check_mutated
from torchvision.models import alexnet

from alexnet_mp.weights.convert import (
    FORMATS,
    detect,
    read_network_file,
    with_classes,
    write_network_file,
)
from alexnet_mp.weights.grouped import to_grouped
from alexnet_mp.weights.network_file import NetworkFile

OUR_FORMATS = ("checkpoint", "safetensors", "grouped")


def assert_same(ours: NetworkFile, back: NetworkFile) -> None:
    assert list(ours.tensors) == list(ours.tensors) and set(back.tensors) == set(ours.tensors)
    for name, value in ours.tensors.items():
        assert torch.equal(back.tensors[name], value), name
    assert back.config == ours.config and back.classes == ours.classes
    assert (back.statistics is None) == (ours.statistics is None)
    for name, value in (ours.statistics or {}).items():
        assert torch.equal(back.statistics[name], value), name


@pytest.mark.parametrize("kind", OUR_FORMATS)
@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("demo", {}),
        ("paper", {"image_size": 128}),
        ("original", {"image_size": 64, "columns": 4}),
        ("original-isolated", {"image_size": 96}),
        ("original-half", {"image_size": 64}),
        ("tutorial", {"image_size": 224}),
    ],
)
def test_a_network_comes_back_bit_for_bit(tmp_path, kind: str, preset: str, fields: dict) -> None:
    network, path = random_network(preset, **fields), tmp_path / "file"
    write_network_file(network, path, kind)
    assert detect(path) == kind
    assert_same(network, read_network_file(path))


def test_a_format_is_chosen_by_the_name_and_told_by_the_content(tmp_path) -> None:
    network = random_network("demo")
    for kind in OUR_FORMATS:
        path = tmp_path / f"network{FORMATS[kind].suffix.upper()}"
        write_network_file(network, path)
        other = path.rename(tmp_path / "renamed.bin")
        assert detect(other) == kind
    with pytest.raises(ValueError, match=r"network.bin: no format has names with this end"):
        write_network_file(network, tmp_path / "network.bin")


@pytest.mark.parametrize("preset", ["demo", "tutorial", "original-half"])
def test_the_grouped_state_dict_runs_in_plain_pytorch(tmp_path, preset: str) -> None:
    fields = {"image_size": 224} if preset == "tutorial" else {"image_size": 67}
    network = random_network(preset, lrn=False, map_norm=False, **fields)
    if preset == "original-half":
        network = dataclasses.replace(network, config=network.config.with_fields(image_size=64))
    write_network_file(network, tmp_path / "plain.pth", "grouped")
    state = torch.load(tmp_path / "plain.pth", weights_only=True)
    images = images_for(network)
    expected = plain_logits(state, images, padding=network.config.model.conv1_padding)
    assert expected.abs().max() > 0.1
    assert torch.allclose(our_logits(network, images), expected, rtol=1e-4, atol=1e-5)


def test_a_columns_outputs_are_a_group_and_its_order_matters() -> None:
    network = random_network("demo", lrn=False)
    grouped, images = to_grouped(network.tensors, network.config.model), images_for(network)
    for name in ("fc7.weight", "fc8.weight"):  # the keep rate of dropout as of 2012
        grouped[name] = grouped[name] * 0.5
    logits = our_logits(network, images)
    assert torch.allclose(plain_logits(grouped, images), logits, rtol=1e-4, atol=1e-5)
    for name in ("conv1.weight", "conv2.weight", "conv3.weight", "fc6.weight", "fc8.weight"):
        axis = 1 if name == "fc8.weight" else 0
        swapped = grouped | {name: torch.cat(grouped[name].chunk(2, axis)[::-1], axis)}
        assert not torch.allclose(plain_logits(swapped, images), logits, rtol=1e-2, atol=1e-2)


def test_torchvisions_alexnet_is_the_tutorials_network(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = alexnet(weights=None, num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "alexnet.pth")
    network = read_network_file(tmp_path / "alexnet.pth")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (our_logits(network, images) - theirs(images)).abs().max() < 1e-5
    write_network_file(network, tmp_path / "back.pth", "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(theirs.state_dict())
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda state: {"state_dict": state}, lambda state: state])
def test_a_state_dict_of_data_parallel_or_in_a_dictionary_is_found(tmp_path, wrap) -> None:
    state = alexnet(weights=None, num_classes=3).state_dict()
    torch.save(wrap({f"module.{name}": value for name, value in state.items()}), tmp_path / "a.pth")
    network = read_network_file(tmp_path / "a.pth")
    assert network.classes == ("class 0", "class 1", "class 2")
    assert torch.equal(network.tensors["columns.0.fc8.bias"], state["classifier.6.bias"])


def test_only_the_tutorials_network_is_written_as_torchvisions(tmp_path) -> None:
    with pytest.raises(ValueError, match="--columns 1, this network 2; --preset tutorial"):
        write_network_file(random_network("demo"), tmp_path / "a.pth", "torchvision")
    assert not (tmp_path / "a.pth").exists()


def test_a_state_dict_that_says_nothing_wants_a_preset(tmp_path) -> None:
    from alexnet_mp.config import preset

    network, path = random_network("demo", dropout="inverted"), tmp_path / "plain.pth"
    write_network_file(network, path)
    torch.save(dict(torch.load(path, weights_only=True)), path)  # without the metadata
    with pytest.raises(ValueError, match=r"plain.pth: .*name it with --preset"):
        read_network_file(path)
    back = read_network_file(path, base=preset("demo"))
    assert back.config.model == network.config.model
    assert all(torch.equal(back.tensors[name], value) for name, value in network.tensors.items())


def test_classes_come_from_a_file(tmp_path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("\n".join("abcdefg") + "\n", encoding="utf-8")
    network = random_network("demo")
    assert with_classes(network, file).classes == tuple("abcdefg") != CLASSES
    file.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes.txt: 2 names for 7 logits"):
        with_classes(network, file)
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        with_classes(network, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "not weights of a known format"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "of torch before version 1.6"),
    ],
)
def test_a_file_that_is_none_is_named_with_the_reason(tmp_path, content: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_network_file(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_and_no_folder_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pt: no such"):
        read_network_file(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="a folder"):
        write_network_file(random_network("demo"), tmp_path, "checkpoint")
    with pytest.raises(ValueError, match="there is no folder"):
        write_network_file(random_network("demo"), tmp_path / "none" / "a.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("conv3.bias"), "no conv3.bias"),
        (lambda state: state.update({"conv2.weight": torch.zeros(12, 5, 5, 5)}), "conv2 reads 5"),
        (lambda state: state.update({"conv2.weight": torch.zeros(12, 4, 3, 3)}), "conv2.weight is"),
        (lambda state: state.update({"fc6.weight": torch.zeros(48, 9)}), "fc6 reads 9"),
        (lambda state: state.update({"fc7.bias": torch.zeros(3)}), "fc7.bias is"),
        (lambda state: state.update({"conv1.weight": torch.zeros(8, 1, 11, 11)}), "reads 1 colors"),
        (lambda state: state.update({"fc8.weight": torch.zeros(7, 40).long()}), "floating point"),
        (lambda state: state.update({"conv1.weight": 3}), "not a state dict"),
    ],
)
def test_a_network_of_other_shapes_is_one_line_with_the_tensor(tmp_path, change, words) -> None:
    from alexnet_mp.config import preset

    write_network_file(random_network("demo"), tmp_path / "a.pth")
    state = dict(torch.load(tmp_path / "a.pth", weights_only=True))
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=words) as caught:
        read_network_file(tmp_path / "a.pth", base=preset("demo"))
    assert str(tmp_path / "a.pth") in str(caught.value) and "\n" not in str(caught.value)


def test_columns_that_read_each_other_are_not_read_as_isolated_ones(tmp_path) -> None:
    network, path = random_network("original-isolated", image_size=64), tmp_path / "a.pth"
    write_network_file(network, path)
    state = torch.load(path, weights_only=True)
    state["fc7.weight"][0, -1] = 1.0
    torch.save(state, path)
    with pytest.raises(ValueError, match="fc7 connects columns"):
        read_network_file(path)


def test_the_path_of_a_network_is_that_of_its_file(tmp_path) -> None:
    write_network_file(random_network("demo"), tmp_path / "a.safetensors")
    assert read_network_file(str(tmp_path / "a.safetensors")).path == Path(
        tmp_path / "a.safetensors"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "safetensors", "grouped"])
def test_a_damaged_file_is_one_line(tmp_path, kind: str) -> None:
    path = tmp_path / "file"
    write_network_file(random_network("demo", kernels=(1, 1, 1, 1, 1), hidden=(2, 2)), path, kind)
    assert check_mutated(path, path.read_bytes()) > COUNT // 4
