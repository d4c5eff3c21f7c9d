"""Small configurations and networks that several test modules train."""

from alexnet_mp import ModelConfig, preset

SMALL = preset("demo").with_fields(
    kernels=(4, 6, 8, 6, 4),
    hidden=(24, 20),
    epochs=3,
    batch_size=32,
    limit_train=72,
    limit_val=30,
    limit_test=40,
    threads=1,
    lr=0.02,
)  # 72 images are two batches of 32 and one of 8

MEASURED = SMALL.with_fields(
    epochs=1,
    limit_train=96,
    limit_test=50,
    lr=1e-4,
    initial_weights=("he",) * 8,
    mean="image-aligned",
)
"""A run whose test needs the mean image of its training images."""

TINY = ModelConfig(kernels=(4, 4, 4, 4, 4), hidden=(6, 5), classes=3, image_size=67)

TINY_RUN = preset("demo").with_fields(
    kernels=(4, 4, 4, 4, 4),
    hidden=(6, 5),
    epochs=2,
    batch_size=16,
    limit_train=40,
    limit_val=12,
    limit_test=12,
    threads=1,
    lr=0.02,
)
