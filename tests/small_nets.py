"""Small configurations that several test modules train."""

from alexnet_mp import preset

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
