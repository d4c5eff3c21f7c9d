"""The table of layers, against the modules that it describes."""

import pytest
import torch
from tiny_networks import images, tiny

from alexnet_mp import AlexNet, build_network, preset
from alexnet_mp.config import LAYERS, ModelConfig
from alexnet_mp.model.cross_column import LocalLink
from alexnet_mp.model.layer_table import layer_table, summary

CASES = {
    "paper": {},
    "isolated": {"crossings": ("fc8",)},
    "all cross": {"crossings": LAYERS[1:]},
    "99 pixels": {"image_size": 99},
    "padded": {"image_size": 64, "conv1_padding": (0, 3, 0, 3)},
}


class Counting(LocalLink):
    """Counts the values of the first column that leave it for one image, by layer."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}

    def start_exchange(self, layer, x):
        self.sent[layer] = x[0][0].numel()
        return super().start_exchange(layer, x)

    def sum(self, layer, x):
        self.sent[layer] = x[0][0].numel() if len(x) > 1 else 0
        return super().sum(layer, x)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_table_says_what_the_modules_have_and_send(columns: int, case: str) -> None:
    config, link = tiny(columns=columns, **CASES[case]), Counting()
    model, outputs = AlexNet(config, link=link), {}
    for index, column in model.columns.items():
        for layer in LAYERS:
            getattr(column, layer).register_forward_hook(
                lambda m, i, y, key=(layer, int(index)): outputs.update({key: tuple(y.shape)})
            )
    model.eval()(images(2, config.image_size))
    rows = layer_table(config)
    for row in rows:
        layer = getattr(model.columns[str(row["column"])], row["layer"])
        assert outputs[row["layer"], row["column"]] == (2, *row["output"])
        assert row["parameters"] == parameters(layer)
        weights = parameters(layer) - (0 if layer.bias is None else layer.bias.numel())
        positions = row["output"][1] * row["output"][2] if len(row["output"]) == 3 else 1
        assert row["multiply_adds"] == weights * positions
        assert row["sends"] == link.sent.get(row["layer"], 0)
    assert len(rows) == len(outputs) == 8 * columns
    assert f"{parameters(model):,}" in model.summary().splitlines()[-1]
    assert model.summary() == summary(config)


def test_the_papers_table_says_what_crosses_and_who_reads_it() -> None:
    for column in (0, 1):
        rows = {row["layer"]: row for row in layer_table(ModelConfig()) if row["column"] == column}
        assert {name: row["reads"] for name, row in rows.items()} == {
            "conv1": "the image",
            "conv2": "its own column",
            "conv3": "all columns",
            "conv4": "its own column",
            "conv5": "its own column",
            "fc6": "all columns",
            "fc7": "all columns",
            "fc8": "its own column",  # its own 2,048 inputs; the products are summed
        }
        sends = {name: row["sends"] for name, row in rows.items() if row["sends"]}
        assert sends == {"conv3": 21_632, "fc6": 4_608, "fc7": 2_048, "fc8": 1_000}
    one = layer_table(tiny(columns=1))
    assert {row["reads"] for row in one} == {"the image", "its own column"}
    assert not any(row["sends"] for row in one)


def test_the_summary_is_a_table_for_people() -> None:
    lines = summary(ModelConfig()).splitlines()
    assert (
        lines[0].split()
        == "layer column kernels output parameters multiply-adds reads sends bytes".split()
    )
    assert lines[6].split() == (
        "conv3 0 192, 3x3 192 x 13 x 13 442,560 74,760,192 all columns 21,632 86,528".split()
    )
    assert lines[-1].split() == [
        "total",
        "60,965,224",
        "724,406,816",
        "58,576",
        "234,304",
    ]
    assert len({len(line) for line in lines}) == 1  # numbers end below each other


@pytest.mark.parametrize(
    ("precision", "exchange", "conv3", "fc8"),
    [
        ("fp32", "same", 86_528, 4_000),
        ("bf16", "same", 43_264, 2_000),
        ("fp32", "bf16", 43_264, 4_000),  # the logits are sent as they are
    ],
)
def test_the_bytes_are_those_of_the_precisions(
    precision: str, exchange: str, conv3: int, fc8: int
) -> None:
    rows = {row["layer"]: row for row in layer_table(ModelConfig(), precision, exchange)}
    assert (rows["conv3"]["bytes"], rows["fc8"]["bytes"]) == (conv3, fc8)
    assert f"{conv3:,}" in summary(ModelConfig(), precision, exchange)


def test_the_four_layer_net_has_a_table_too() -> None:
    config = preset("four-layers").model
    rows = layer_table(config)
    assert [row["parameters"] for row in rows] == [
        parameters(getattr(build_network(config).columns["0"], layer)) for layer in config.layers
    ]
