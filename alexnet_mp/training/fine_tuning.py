"""Fine-tuning: a network that starts from trained weights, some layers drawn anew or frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from torch import nn

from alexnet_mp.config import Config
from alexnet_mp.model.alexnet import AlexNet
from alexnet_mp.weights.convert import read_network_file
from alexnet_mp.weights.network_file import NetworkFile

FREE = {
    "columns",
    "classes",
    "image_size",
    "initial_weights",
    "initial_biases",
    "dropout_rate",
    "dropout_after",
}
"""Fields of a ModelConfig that may differ without a note: the shapes tell, or only training
reads."""
PREPROCESSING = ("mean", "mean_values", "deviations", "color_order")


def initialize_from(
    model: AlexNet, path: str | Path, config: Config, reset: Collection[str] = ()
) -> list[str]:
    """Copies the weights in the file `path` into `model`, but for the layers in `reset`.

    The file may be of any format that launch/convert.py reads. Returns lines for people: which
    layers were taken, and what the file's network computes otherwise than `config`. Raises
    ValueError or FileNotFoundError that names the file and, where a tensor does not fit, both
    shapes and the flag that helps.
    """
    network = read_network_file(path)
    _check_layers(reset, config, "--reset")
    state = model.state_dict()
    for name, mine in state.items():
        layer = layer_of(name)
        if layer in reset:
            continue
        theirs = network.tensors.get(name)
        if theirs is None or theirs.shape != mine.shape:
            found = "lacks it" if theirs is None else f"has {tuple(theirs.shape)}"
            raise ValueError(
                f"--init-from {path}: {name} is {tuple(mine.shape)} here, the file {found}; "
                f"--reset {' '.join([*reset, layer])} draws the layer anew"
            )
        state[name] = theirs
    model.load_state_dict(state)
    taken = [layer for layer in config.model.layers if layer not in reset]
    lines = [f"initialized from {path}: {' '.join(taken) or 'nothing'}"]
    if reset:
        names = sorted(name for name in state if layer_of(name) in reset)
        lines[0] += f"; drawn anew: {', '.join(names)}"
    return lines + _notes(network, config)


def _notes(network: NetworkFile, config: Config) -> list[str]:
    """Returns the flags with which this network would compute as the file's does."""
    flags = []
    mine = vars(config.model) | {name: getattr(config.data, name) for name in PREPROCESSING}
    theirs = vars(network.config.model) | vars(network.config.data)
    for name, value in mine.items():
        if name not in FREE and theirs[name] != value:
            text = (
                " ".join(map(str, theirs[name]))
                if isinstance(theirs[name], tuple)
                else theirs[name]
            )
            flags.append(f"--{name.replace('_', '-')} {text}")
    if not flags:
        return []
    return [f"note: {network.path} was trained with {', '.join(flags)}; this run differs"]


def freeze(model: AlexNet, layers: Collection[str], config: Config) -> None:
    """Takes `layers` out of training: no gradient, no decay, no backward work below the others.

    Raises ValueError for a layer that the network does not have, or if none is left to train.
    """
    _check_layers(layers, config, "--freeze")
    if set(layers) >= set(config.model.layers):
        raise ValueError(f"--freeze {' '.join(layers)}: no layer is left to train")
    for parameter in parameters_of(model, layers):
        parameter.requires_grad_(False)


def parameters_of(model: nn.Module, layers: Collection[str]) -> Iterable[nn.Parameter]:
    """The parameters of `layers`, of all columns here."""
    return (p for name, p in model.named_parameters() if layer_of(name) in layers)


def layer_of(name: str) -> str:
    """The layer in a parameter's name, `columns.<i>.<layer>.weight`."""
    return name.split(".")[2]


def _check_layers(layers: Iterable[str], config: Config, flag: str) -> None:
    known = config.model.layers
    for layer in layers:
        if layer not in known:
            raise ValueError(f"{flag} {layer}: not a layer of this network ({' '.join(known)})")
