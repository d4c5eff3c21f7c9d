"""Named, complete configurations, each number with its source beside it.

A preset is a function that changes some fields of the paper's numbers, the defaults of
`configuration.py` and `model.py`. To add one, write the function and a line in PRESETS.

Sources, and how the comments cite them:
    P           A. Krizhevsky, I. Sutskever, G. E. Hinton: ImageNet Classification with Deep
                Convolutional Neural Networks. NIPS 2012. P 3.5 is its section 3.5.
    S           the 2012 ImageNet source by Alex Krizhevsky, cuda-convnet as it trained the paper's
                nets (github.com/computerhistory/AlexNet-Source-Code); S: layer.py:1004 is a line
    L145, LP145 its files layers/layers-145.cfg and layers/layer-params-145.cfg: layers of net 145,
                the paper's, and their rates with the log of its training; likewise 145-half, 150
    CJ          its file convdata_jpeg.py, which crops, flips and colors the images
    18pct       example-layers/layers-18pct.cfg and layer-params-18pct.cfg of cuda-convnet by Alex
                Krizhevsky, the first release, in the Google Code archive
                (code.google.com/archive/p/cuda-convnet); cuda-convnet2 is its successor there
    T           the tutorial "The Math Behind Deep CNN - AlexNet", 2024
A net is called by its number in the 2012 source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from alexnet_mp.config.configuration import Config, DataConfig, RecipeConfig
from alexnet_mp.config.model import ModelConfig

# The 2012 source draws conv3 to conv5 with 0.03 where the paper says 0.01 for all
# (L145:17, 73, 143, 171, 200, 242, 270, 298).
WEIGHTS_2012 = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)

# The paper's own start needs a thousand steps before the loss moves. Here each layer keeps the size
# of its inputs: he, and he / 0.59 in the two layers that read LRN's output, which is 2^-0.75 = 0.59
# times its input (k = 2, small activations).
QUICK_WEIGHTS: tuple[float | Literal["he", "torch"], ...] = (
    "he",
    0.07,
    0.05,
    "he",
    "he",
    "he",
    "he",
    0.02,
)
QUICK_BIASES = (0.0,) * 8


def paper() -> Config:
    """The paper to the letter, at 224 pixels; the loss needs a thousand steps to move."""
    return Config(
        "paper",
        ModelConfig(
            image_size=224,  # P 3.5
            conv1_padding=(0, 3, 0, 3),  # gives the paper's maps of 55x55 (S: layer.py:1004)
        ),
        DataConfig(
            crop_of=224,
            last_offset=False,  # P 4.1: 224 of 256, "a factor of 2048" = 32 * 32 * 2
            mean="image-aligned",  # P 2: the mean over the training set of each pixel
            color_noise=0.1,  # P 4.1
            color_unit="eigenvalue",  # P 4.1
            validation="val",  # P 6: trained on all training images, reported on val
        ),
    )


def original() -> Config:
    """The paper's two-GPU net as it really ran: net 145 of the 2012 source."""
    return paper().with_fields(
        preset="original",
        layer1_order="lrn-pool-relu",  # L145:9-63
        lrn_alpha=1e-4 / 5,  # LP145:137-155; divided by the window's size, S: layer.py:1183
        map_norm=True,  # L145:107-117, with the default map_norm_alpha
        initial_weights=WEIGHTS_2012,
        bias_lr=0.02,  # LP145: epsB at the end of the run
        bias_decay=False,  # S: layer.cu:565
        last_offset=True,  # CJ:237-246: 33 offsets
        images_per_crop=32,  # CJ:77
        mean="image-center",  # CJ:95, 209-211
        color_unit="deviation",  # CJ:65
        color_divides=True,  # CJ:155-179
        schedule="2012",  # at the default schedule_epochs, which are net 145's
    )


def original_half() -> Config:
    """The one-GPU net that the paper compares with (P 3.2): net 145-half."""
    return original().with_fields(
        preset="original-half",
        columns=1,
        kernels=(48, 128, 192, 192, 256),  # L145-half:9-165
        hidden=(4096, 4096),
        # LP145-half:92-100 does not say when the last change was: net 145's.
        schedule_epochs=(20, 48, 66, 72, 79),
    )


def original_isolated() -> Config:
    """Net 150: the columns exchange nothing before fc8; conv2 and fc6 are wider instead."""
    return original().with_fields(
        preset="original-isolated",
        crossings=("fc8",),
        kernels=(48, 160, 192, 192, 128),  # L150:65-290
        hidden=(4096, 2048),
        schedule_epochs=(25, 49, 66, 72, 79),  # LP150:165-179
    )


def tutorial() -> Config:
    """The one-tower net and the recipe of "The Math Behind Deep CNN - AlexNet" (T)."""
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
    """The paper's kernels and hidden units at 67 pixels; learns within minutes on two CPU cores."""
    return Config(
        "demo",
        ModelConfig(
            image_size=67,
            initial_weights=QUICK_WEIGHTS,
            initial_biases=QUICK_BIASES,
        ),
        DataConfig(mean="half", random_crop=False, flip=False),
        RecipeConfig(epochs=6, batch_size=32, lr=0.02, schedule="cosine"),
    )


def photos() -> Config:
    """For some hundred to some thousand photographs of one's own: demo's start, crops and flips."""
    return demo().with_fields(
        preset="photos",
        data="folder",
        image_size=131,  # no row is left over at any convolution or pool
        random_crop=True,
        flip=True,
        epochs=60,
        warmup_epochs=2.0,  # at this size the first gradients are twice as large as the demo's
    )


def four_layers() -> Config:
    """The four-layer CIFAR-10 net of the paper's figure 1, "no regularization of any kind".

    That is 18pct without its weight decay and normalization.
    """
    return Config(
        "four-layers",
        ModelConfig(
            network="four-layers",
            columns=1,
            kernels=(32, 32, 64),  # 18pct
            hidden=(),
            crossings=("fc8",),
            image_size=32,
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
            epochs=40,
            lr=0.001,  # 18pct
            bias_lr=0.002,  # 18pct
            momentum=0.9,
            weight_decay=0.0,  # P, figure 1
            schedule="constant",
        ),
    )


def caffe() -> Config:
    """bvlc_alexnet of Caffe, the network of models/bvlc_alexnet/train_val.prototxt and its solver.

    Its groups are the columns, but the norm's window runs over the maps of both. Caffe divides
    alpha by the size (0.0001 / 5). The mean image is replaced by its mean color, as in deploying.
    It trains on ilsvrc12_train_lmdb, all training images, and tests on ilsvrc12_val_lmdb.
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
            validation="val",
        ),
        RecipeConfig(batch_size=256, bias_decay=False),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "photos": photos,
    "paper": paper,
    "original": original,
    "original-half": original_half,
    "original-isolated": original_isolated,
    "tutorial": tutorial,
    "four-layers": four_layers,
    "caffe": caffe,
}


def preset(name: str) -> Config:
    """The configuration called `name`. ValueError lists the names that exist.

    >>> from alexnet_mp import preset
    >>> preset("paper").model.image_size
    224
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: not one of {', '.join(PRESETS)}")
    return PRESETS[name]()
