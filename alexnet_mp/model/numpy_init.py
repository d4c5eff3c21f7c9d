"""The tutorial's initialization in NumPy alone, to read and to play with (tutorial, section 4.2).

The networks of this package draw theirs in `initialization.py`. With these flags they start alike:
`--initial-weights 0.01 0.01 0.01 0.01 0.01 he he he --initial-biases 0 1 1 1 1 1 1 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ALEXNET_SHAPES = (
    (96, 3, 11, 11),  # conv1 to conv5, in one tower
    (256, 96, 5, 5),
    (384, 256, 3, 3),
    (384, 384, 3, 3),
    (256, 384, 3, 3),
    (4096, 256 * 6 * 6),  # fc6 to fc8
    (4096, 4096),
    (1000, 4096),
)
"""The weights of the tutorial's AlexNet: (kernels, inputs, height, width) or (outputs, inputs)."""
CONV_DEVIATION = 0.01


def standard_deviation(shape: Sequence[int]) -> float:
    """0.01 for a convolution's 4-d shape, He's sqrt(2 / fan-in) for a full layer's 2-d one.

    ValueError for any other number of axes, and for an axis without entries.
    """
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise ValueError(
            f"shape {tuple(shape)}: must be 4-d (kernels, inputs, height, width) or 2-d "
            "(outputs, inputs), each at least 1"
        )
    return CONV_DEVIATION if len(shape) == 4 else float(np.sqrt(2 / shape[1]))


def initialize_weights(
    layer_shapes: Sequence[Sequence[int]] = ALEXNET_SHAPES, seed: int | None = None
) -> list[NDArray[np.float64]]:
    """One array per shape, drawn from N(0, standard_deviation(shape)).

    `seed` None draws others at every call. ValueError as for `standard_deviation`, before anything
    is drawn.

        weights = initialize_weights(seed=0)  # eight arrays, float64
    """
    deviations = [standard_deviation(shape) for shape in layer_shapes]
    rng = np.random.default_rng(seed)
    return [
        rng.normal(0, deviation, tuple(shape))
        for shape, deviation in zip(layer_shapes, deviations, strict=True)
    ]


def initialize_biases(
    layer_shapes: Sequence[Sequence[int]] = ALEXNET_SHAPES,
    behind_relu: Sequence[bool] | None = None,
) -> list[NDArray[np.float64]]:
    """One array per shape: ones in the layers behind a ReLU, zeros elsewhere.

    Ones start the units of a layer with inputs that are not negative in their own ReLU's positive
    half. `behind_relu` says which layers read the output of a ReLU; by default all but the first,
    which reads the image. ValueError for a shape that is no layer's, or another number of entries
    than of layers.

        biases = initialize_biases()  # eight arrays, float64
    """
    if behind_relu is None:
        behind_relu = [number > 0 for number in range(len(layer_shapes))]
    if len(behind_relu) != len(layer_shapes):
        raise ValueError(f"behind_relu: {len(behind_relu)} entries for {len(layer_shapes)} layers")
    for shape in layer_shapes:
        standard_deviation(shape)
    return [
        np.full(shape[0], float(behind))
        for shape, behind in zip(layer_shapes, behind_relu, strict=True)
    ]


def describe_layers(
    weights: Sequence[NDArray[np.float64]], biases: Sequence[NDArray[np.float64]]
) -> str:
    """A line for each layer: shape, mean and standard deviation of its weights, and its bias.

    >>> print(describe_layers(initialize_weights(seed=0), initialize_biases()))
    """
    return "\n".join(
        f"layer {number}: weights {' x '.join(map(str, weight.shape)):>18s}  "
        f"mean {weight.mean():9.6f}  standard deviation {weight.std():.6f}  bias {bias[0]:g}"
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1)
    )
