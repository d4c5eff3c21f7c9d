"""Every preset against numbers typed from the references (paper.md, original-2012.md, tutorial.md),
not from the code."""

import pytest

from alexnet_mp import preset

# name: (paper, original, tutorial); sources: P = paper.md, O = original-2012.md with its section, T
# = tutorial.md
TABLE = {
    "network": ("alexnet", "alexnet", "alexnet"),
    "columns": (2, 2, 1),  # P network; T one tower
    "kernels": ((48, 128, 192, 192, 128), (48, 128, 192, 192, 128), (64, 192, 384, 256, 256)),
    "hidden": ((2048, 2048), (2048, 2048), (4096, 4096)),
    "image_size": (224, 224, 224),  # P 224; O 1c; T 224
    "conv1_padding": (
        (0, 3, 0, 3),
        (0, 3, 0, 3),
        (2, 2, 2, 2),
    ),  # O 1c: right and bottom only; T padding 2
    "crossings": (("conv3", "fc6", "fc7", "fc8"), ("conv3", "fc6", "fc7", "fc8"), ("fc8",)),
    "layer1_order": ("relu-lrn-pool", "lrn-pool-relu", "relu-lrn-pool"),  # O 1b
    "lrn": (True, True, False),
    "lrn_size": (5, 5, 5),
    "lrn_k": (2, 2, 2),  # O 2: minDiv 2
    "lrn_alpha": (1e-4, 2e-5, 1e-4),  # O 2: 1e-4 / 5
    "lrn_beta": (0.75, 0.75, 0.75),
    "map_norm": (False, True, False),  # O 1a: cnorm2
    "map_norm_alpha": (4e-5, 4e-5, 4e-5),  # O 2: .001 / 25
    "pool_size": (3, 3, 3),
    "pool_stride": (2, 2, 2),
    "activation": ("relu", "relu", "relu"),
    "dropout": ("2012", "2012", "inverted"),  # O 6; T nn.Dropout
    "dropout_rate": (0.5, 0.5, 0.5),
    "dropout_after": (("fc6", "fc7"), ("fc6", "fc7"), ("conv5", "fc6")),  # T: before fc6 and fc7
    "initial_weights": (
        (0.01,) * 8,
        (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
        ("torch",) * 8,
    ),  # O 3
    "initial_biases": ((0, 1, 0, 1, 1, 1, 1, 0), (0, 1, 0, 1, 1, 1, 1, 0), ("torch",) * 8),
    "adaptive_pool": (0, 0, 6),
    "stored_side": (256, 256, 224),  # P training; T resized to 224, no crop
    "crop_of": (224, 224, 224),
    "random_crop": (True, True, False),
    "flip": (True, True, False),
    "last_offset": (False, True, False),  # P 2048 = 32 * 32 * 2; O 5: 0..32 inclusive
    "images_per_crop": (1, 32, 1),  # O 5
    "color_noise": (0.1, 0.1, 0.0),
    "color_unit": ("eigenvalue", "deviation", "deviation"),  # P; O 5: color_stdevs
    "color_divides": (False, True, False),  # O 5: / (1 + 0.1)
    "mean": ("image-aligned", "image-center", "half"),  # O 5: always the center crop
    "validation_share": (0.1, 0.1, 0.2),  # T 80/20
    "validation": ("val", "val", "held-out"),  # P 6, O: all training images, results on val
    "epochs": (90, 90, 50),
    "batch_size": (128, 128, 64),
    "optimizer": ("2012", "2012", "torch"),
    "lr": (0.01, 0.01, 0.01),
    "lr_scale": ("none", "none", "none"),
    "bias_lr": (None, 0.02, None),  # O 4: epsB, not scheduled
    "momentum": (0.9, 0.9, 0.9),
    "weight_decay": (0.0005, 0.0005, 0.0),
    "bias_decay": (True, False, True),  # P one rule; O 4: layer.cu:565
    "schedule": ("plateau", "2012", "plateau"),
    "schedule_epochs": ((25, 51, 67, 72, 79),) * 3,  # O 4: net 145; others do not read it
    "lr_factor": (0.1, 0.1, 0.5),  # P / 10; T 0.5
    "lr_patience": (3, 3, 3),
    "lr_min": (1e-5, 1e-5, 1e-6),  # P three falls from 0.01; T
    "patience": (0, 0, 7),
    "delta": (0.0, 0.0, 0.0),
}
FREE = {
    "classes",
    "data",
    "data_dir",
    "cache_dir",
    "limit_train",
    "limit_val",
    "limit_test",
    "max_steps",
    "warmup_epochs",  # not of the recipe
    "on_error",
    "shuffle",
    "init_from",
    "reset",
    "freeze",
    "mean_values",  # of other programs' networks
    "deviations",
    "color_order",
    "resize",
    "layer2_order",
    "lrn_across_columns",
}


def fields(name: str) -> dict:
    config = preset(name)
    return vars(config.model) | vars(config.data) | vars(config.recipe)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("field", TABLE)
def test_a_preset_has_its_sources_number(field: str, column: int) -> None:
    name = ("paper", "original", "tutorial")[column]
    if name == "tutorial" and field == "last_offset":
        pytest.skip("without a crop there is no offset")
    assert (
        fields(name)[field] == pytest.approx(TABLE[field][column])
        if isinstance(TABLE[field][column], float)
        else fields(name)[field] == TABLE[field][column]
    )


def test_the_table_has_every_field_that_a_recipe_can_differ_in() -> None:
    assert set(fields("paper")) - FREE == set(TABLE)


def differences(name: str, base: str) -> dict:
    return {key: value for key, value in fields(name).items() if fields(base)[key] != value}


def test_the_half_net_is_the_original_in_one_column_with_conv5_and_fc_whole() -> None:
    # O 1a: conv 48/128/192/192/256, fc 4096/4096; O 4: dropped after 20 and 48, conv1 from 66,
    # frozen from 72, the last one not logged
    assert differences("original-half", "original") == {
        "columns": 1,
        "kernels": (48, 128, 192, 192, 256),
        "hidden": (4096, 4096),
        "schedule_epochs": (20, 48, 66, 72, 79),
    }


def test_the_isolated_net_talks_at_fc8_only_and_is_wider_in_exchange() -> None:
    # O 4, net 150: no communication before fc1000; conv2 160 a column, first fc 4096 a column;
    # dropped after 25, 49 and 79, conv1 66 and 72
    assert differences("original-isolated", "original") == {
        "crossings": ("fc8",),
        "kernels": (48, 160, 192, 192, 128),
        "hidden": (4096, 2048),
        "schedule_epochs": (25, 49, 66, 72, 79),
    }


def test_the_demo_has_the_papers_kernels_hidden_units_and_crossings() -> None:
    same = (
        "columns",
        "kernels",
        "hidden",
        "crossings",
        "lrn",
        "lrn_alpha",
        "dropout",
        "dropout_rate",
        "optimizer",
        "momentum",
        "weight_decay",
    )
    assert {name: fields("demo")[name] for name in same} == {
        name: fields("paper")[name] for name in same
    }


def test_photos_is_the_demo_with_crops_and_flips_at_a_larger_size() -> None:
    assert differences("photos", "demo") == {
        "data": "folder",
        "image_size": 131,
        "random_crop": True,
        "flip": True,
        "epochs": 60,
        "warmup_epochs": 2.0,
    }


def test_photos_leaves_no_row_over_at_any_convolution_or_pool() -> None:
    model = preset("photos").model
    side = model.image_size
    assert (side - 11) % 4 == 0
    for layer in ("conv1", "conv2", "conv5"):
        height, _ = model.map_sizes()[layer]
        assert (height - model.pool_size) % model.pool_stride == 0


def test_the_four_layer_net_is_cuda_convnets_without_its_normalization_and_decay() -> None:
    # example-layers/layers-18pct.cfg and layer-params-18pct.cfg; P, figure 1: no regularisation of
    # any kind
    fields_there = fields("four-layers")
    expected = {
        "network": "four-layers",
        "columns": 1,
        "kernels": (32, 32, 64),
        "hidden": (),
        "image_size": 32,
        "activation": "relu",
        "lrn": False,
        "pool_size": 3,
        "pool_stride": 2,
        "initial_weights": (1e-4, 0.01, 0.01, 0.01),
        "initial_biases": (0, 0, 0, 0),
        "dropout_rate": 0,
        "data": "cifar10",
        "random_crop": False,
        "flip": False,
        "color_noise": 0,
        "mean": "image-center",
        "batch_size": 128,
        "optimizer": "2012",
        "lr": 0.001,
        "bias_lr": 0.002,
        "momentum": 0.9,
        "weight_decay": 0,
        "schedule": "constant",
    }
    assert {name: fields_there[name] for name in expected} == expected
