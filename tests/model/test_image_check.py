"""Images that a network cannot read: one line with both shapes and the way out."""

import pytest
import torch
from tiny_networks import images, tiny

from alexnet_mp import AlexNet, build_network, preset

READS = r"this network reads \(N, 3, 67, 67\)"


@pytest.mark.parametrize(
    "wrong, words",
    [
        (images(1)[0], rf"images \(3, 67, 67\): {READS}; .*images\[None\]"),
        (
            images(2).permute(0, 2, 3, 1),
            rf"images \(2, 67, 67, 3\): {READS}; .*permute\(0, 3, 1, 2\)",
        ),
        (images(2)[:, :1], rf"images \(2, 1, 67, 67\): {READS}; .*expand\(-1, 3, -1, -1\)"),
        (torch.zeros(2, 4, 67, 67), rf"images \(2, 4, 67, 67\): {READS}; .*images\[:, :3\]"),
        (torch.zeros(2, 5, 67, 67), rf"images \(2, 5, 67, 67\): {READS}; the second axis"),
        (torch.zeros(67, 67), rf"images \(67, 67\): {READS}, a batch"),
        (images(2, 64), rf"images \(2, 3, 64, 64\): {READS}; .*image_size=64"),
        (images(2, 224), rf"images \(2, 3, 224, 224\): {READS}; .*image_size=224"),
        (torch.zeros(2, 3, 67, 131), rf"images \(2, 3, 67, 131\): {READS}; "),
        (torch.zeros(2, 3, 67, 67, dtype=torch.uint8), "images are torch.uint8: .* floating-point"),
        (torch.zeros(2, 3, 67, 67, dtype=torch.int64), "images are torch.int64"),
    ],
    ids=str,
)
def test_images_of_another_kind_are_refused_in_one_line(wrong: torch.Tensor, words: str) -> None:
    for model in (AlexNet(tiny()), AlexNet(tiny(columns=1)).eval()):
        with pytest.raises(ValueError, match=words) as caught:
            model(wrong)
        assert "\n" not in str(caught.value)


def test_the_ways_out_lead_out() -> None:
    model = AlexNet(tiny()).eval()
    for x in (
        images(1)[0][None],
        images(2).permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        images(2)[:, :1].expand(-1, 3, -1, -1),
        torch.zeros(2, 4, 67, 67)[:, :3],
    ):
        assert model(x).shape == (len(x), 5)
    assert AlexNet(tiny(image_size=131))(images(2, 131)).shape == (2, 5)


def test_a_size_that_leaves_the_same_maps_is_read() -> None:
    model = AlexNet(tiny()).eval()
    x = torch.randn(2, 3, 69, 70)  # conv1's kernels reach no farther than 67 pixels
    assert torch.equal(model(x), model(x[:, :, :67, :67]))


def test_the_four_layer_net_and_an_adaptive_pool_are_checked_as_well() -> None:
    with pytest.raises(ValueError, match=r"images \(1, 3, 64, 64\): .*\(N, 3, 32, 32\)"):
        build_network(preset("four-layers").model)(images(1, 64))
    fields = {"kernels": (4, 6, 8, 6, 4), "hidden": (12, 10), "classes": 5}
    model = AlexNet(preset("tutorial").with_fields(**fields).model).eval()
    assert model(images(1, 192)).shape == (1, 5)  # it pools whatever is there
    with pytest.raises(ValueError, match=r"images \(1, 3, 32, 32\): .*\(N, 3, 224, 224\)"):
        model(images(1, 32))


def test_an_empty_batch_has_logits_of_its_shape() -> None:
    assert AlexNet(tiny())(torch.empty(0, 3, 67, 67)).shape == (0, 5)
