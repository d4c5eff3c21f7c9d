"""Small networks with random weights, and their logits by plain PyTorch with groups."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_mp.config import preset
from alexnet_mp.model.four_layer import build_network
from alexnet_mp.weights.network_file import NetworkFile

CLASSES = tuple(f"kind {k}" for k in range(7))
SMALL = {"kernels": (4, 6, 8, 6, 4), "hidden": (24, 20), "classes": 7}


def random_network(name: str, seed: int = 0, **fields: object) -> NetworkFile:
    """The preset `name`, small unless `fields` say otherwise, its weights and biases random.

    The weights are large enough for the norm to matter and the biases differ from each other.
    """
    config = preset(name).with_fields(**(SMALL | fields))
    model = build_network(config.model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, value in model.state_dict().items():
        scale = 0.1 if key.endswith("bias") else 1.5 / value[0].numel() ** 0.5
        tensors[key] = torch.randn(value.shape, generator=generator) * scale
    statistics = None
    if config.data.mean.startswith("image") or config.data.color_noise:
        side = config.data.resized_side(config.model.image_size)
        mean_image = 255 * torch.rand(3, side, side, generator=generator)
        statistics = {"mean_image": mean_image, "covariance": torch.eye(3, dtype=torch.float64)}
    return NetworkFile(Path("network.pt"), config, tensors, CLASSES, statistics)


def images_for(network: NetworkFile, count: int = 3, seed: int = 1) -> Tensor:
    size = network.config.model.image_size
    generator = torch.Generator().manual_seed(seed)
    return 60 * torch.randn(count, 3, size, size, generator=generator)


@torch.no_grad()
def our_logits(network: NetworkFile, images: Tensor) -> Tensor:
    model = build_network(network.config.model).eval()
    model.load_state_dict(network.tensors)
    return model(images)


@torch.no_grad()
def plain_logits(
    weights: dict[str, Tensor],
    images: Tensor,
    *,
    groups: int = 1,
    norm: tuple[float, float] | None = None,  # alpha as torch divides it, k
    norm_before_pool: bool = True,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),  # left right top bottom
) -> Tensor:
    """AlexNet written with torch's own layers, of grouped weights; the norm over all maps."""

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2)

    def normed(x: Tensor) -> Tensor:
        if norm is None:
            return pool(x)
        if norm_before_pool:
            return pool(F.local_response_norm(x, 5, norm[0], 0.75, norm[1]))
        return F.local_response_norm(pool(x), 5, norm[0], 0.75, norm[1])

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, groups=x.shape[1] // weight.shape[1], **options).relu()

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = normed(conv(F.pad(images, padding), "conv1", stride=4))
    x = normed(conv(x, "conv2", padding=2))
    for name in ("conv3", "conv4", "conv5"):
        x = conv(x, name, padding=1)
    x = pool(x).flatten(1)
    x = linear(x, "fc6").relu()
    x = linear(x, "fc7").relu()
    return linear(x, "fc8")
