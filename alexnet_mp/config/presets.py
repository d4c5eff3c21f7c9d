"""Named, complete configurations: what each changes of the paper's numbers in config.py, with its source beside it.

Sources: P = the paper (section); L145, LP145 = layer and parameter files of net 145 in the 2012 source; CJ = its
convdata_jpeg.py; T = the tutorial.
"""

from __future__ import annotations

from collections.abc import Callable

from alexnet_mp.config.configuration import Config, DataConfig, RecipeConfig
from alexnet_mp.config.model import ModelConfig

# The 2012 source draws conv3 to conv5 with 0.03 where the paper says 0.01 for all (L145:17, 73, 143, 171, 200, 242, 270, 298).
WEIGHTS_2012 = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)


def paper() -> Config:
    """The paper to the letter: the defaults of config.py, at 224 pixels, with the mean and the color noise of its text."""
    return Config(
        "paper",
        ModelConfig(
            image_size=224, conv1_padding=(0, 3, 0, 3)
        ),  # P 3.5; the padding that gives its 55x55 (S: layer.py:1004)
        DataConfig(
            crop_of=224,
            last_offset=False,  # P 4.1: 224 of 256, "a factor of 2048" = 32 * 32 * 2
            mean="image-aligned",
            color_noise=0.1,
            color_unit="eigenvalue",  # P 2; P 4.1
            validation="val",  # P 6: trained on all training images, reported on val
        ),
    )


def original() -> Config:
    """Net 145 of the 2012 source, the paper's two-GPU net as it really ran."""
    return paper().with_fields(
        preset="original",
        layer1_order="lrn-pool-relu",  # L145:9-63
        lrn_alpha=1e-4 / 5,  # LP145:137-155 with the division by size of S: layer.py:1183
        map_norm=True,
        map_norm_alpha=1e-3 / 25,  # L145:107-117, LP145:157-163, divided by size squared
        initial_weights=WEIGHTS_2012,
        bias_lr=0.02,
        bias_decay=False,  # LP145 epsB at the end; S: layer.cu:565
        last_offset=True,
        images_per_crop=32,  # CJ:237-246 (33 offsets), CJ:77
        mean="image-center",  # CJ:95, 209-211
        color_unit="deviation",
        color_divides=True,  # CJ:65, 155-179
        schedule="2012",  # LP145:165-182, at the epochs that schedule_epochs defaults to
    )


def original_half() -> Config:
    """Net 145-half, the one-GPU net that the paper compares with."""
    return original().with_fields(
        preset="original-half",
        columns=1,
        kernels=(48, 128, 192, 192, 256),
        hidden=(4096, 4096),  # L145-half:9-165
        schedule_epochs=(20, 48, 66, 72, 79),
    )  # LP145-half:92-100, which does not say when the last one was: net 145's


def original_isolated() -> Config:
    """Net 150: the columns do not talk before fc8; conv2 and fc6 are wider in exchange."""
    return original().with_fields(
        preset="original-isolated",
        crossings=("fc8",),
        kernels=(48, 160, 192, 192, 128),
        hidden=(4096, 2048),  # L150:65-290
        schedule_epochs=(25, 49, 66, 72, 79),
    )  # LP150:165-179


def tutorial() -> Config:
    """The one-tower net and the recipe of "The Math Behind Deep CNN - AlexNet"."""
    return Config(
        "tutorial",
        ModelConfig(
            columns=1,
            kernels=(64, 192, 384, 256, 256),
            hidden=(4096, 4096),
            crossings=("fc8",),
            classes=0,
            image_size=224,
            conv1_padding=(2, 2, 2, 2),
            adaptive_pool=6,
            lrn=False,
            dropout="inverted",
            dropout_rate=0.5,
            dropout_after=("conv5", "fc6"),
            initial_weights=("torch",) * 8,
            initial_biases=("torch",) * 8,
        ),
        DataConfig(
            data="cifar10",
            stored_side=224,
            crop_of=224,
            random_crop=False,
            flip=False,
            mean="half",
            validation_share=0.2,
        ),
        RecipeConfig(
            epochs=50,
            batch_size=64,
            optimizer="torch",
            lr=0.01,
            momentum=0.9,
            weight_decay=0.0,
            schedule="plateau",
            lr_factor=0.5,
            lr_patience=3,
            lr_min=1e-6,
            patience=7,
            delta=0.0,
        ),
    )


def demo() -> Config:
    """The paper's kernels and hidden units at 67 pixels, with a start and a recipe that learn within a minute or two on two CPU cores.

    The paper's own start needs a thousand steps before the loss moves. Here each layer keeps the size of its inputs: he, and
    he / 0.59 in the two layers that read what LRN has multiplied by 2^-0.75 (k = 2, small activations).
    """
    return Config(
        "demo",
        ModelConfig(
            image_size=67,
            initial_weights=("he", 0.07, 0.05, "he", "he", "he", "he", 0.02),
            initial_biases=(0.0,) * 8,
        ),
        DataConfig(mean="half", random_crop=False, flip=False),
        RecipeConfig(epochs=6, batch_size=32, lr=0.02, schedule="cosine"),
    )


def four_layers() -> Config:
    """The four-layer CIFAR-10 net of figure 1, "no regularization of any kind": 18pct = cuda-convnet, example-layers/layers-18pct.cfg and
    layer-params-18pct.cfg, without that file's weight decay and normalization."""
    return Config(
        "four-layers",
        ModelConfig(
            network="four-layers",
            columns=1,
            kernels=(32, 32, 64),
            hidden=(),
            crossings=("fc8",),
            image_size=32,  # 18pct
            lrn=False,
            dropout_rate=0.0,
            initial_weights=(1e-4, 0.01, 0.01, 0.01),
            initial_biases=(0.0,) * 4,
        ),
        DataConfig(
            data="cifar10",
            stored_side=32,
            crop_of=32,
            random_crop=False,
            flip=False,
            mean="image-center",
        ),
        RecipeConfig(
            epochs=40, lr=0.001, bias_lr=0.002, momentum=0.9, weight_decay=0.0, schedule="constant"
        ),  # 18pct; P, figure 1
    )


def caffe() -> Config:
    """bvlc_alexnet of Caffe, the network of models/bvlc_alexnet/train_val.prototxt and its solver.

    Its groups are the columns, but the norm's window runs over the maps of both. Caffe divides
    alpha by the size (0.0001 / 5). The mean image is replaced by its mean color, as in deploying.
    """
    return Config(
        "caffe",
        ModelConfig(
            image_size=227,
            lrn_across_columns=True,
            lrn_k=1.0,
            lrn_alpha=1e-4 / 5,
            dropout="inverted",
            initial_weights=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
            initial_biases=(0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0),
        ),
        DataConfig(
            mean="values",
            mean_values=(122.67891, 116.66877, 104.00699),
            color_order="bgr",
            resize="warp",
        ),
        RecipeConfig(batch_size=256, bias_decay=False),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "paper": paper,
    "original": original,
    "original-half": original_half,
    "original-isolated": original_isolated,
    "tutorial": tutorial,
    "four-layers": four_layers,
    "caffe": caffe,
}


def preset(name: str) -> Config:
    """The configuration called `name`. ValueError names those that there are."""
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: not one of {', '.join(PRESETS)}")
    return PRESETS[name]()
