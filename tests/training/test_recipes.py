"""Every preset trains the same on one device and on two ranks, to the end of its schedule."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run as run_ranks

from alexnet_mp import Config, preset
from alexnet_mp.training import checkpoint
from alexnet_mp.training.run import run

# Each preset's own recipe on a network of some thousand weights. Five epochs: the 2012 schedule,
# scaled, ends the color noise and freezes conv1 in the last of them (67 and 72 of 90).
SMALL = {"image_size": 64, "epochs": 5, "batch_size": 24, "threads": 1, "data": "folder"}
STRONG = (
    "he",
) * 8  # with so few kernels the 2012 deviations leave nothing of a signal, and nothing to compare
SIZES = {
    "demo": {"kernels": (4, 6, 8, 6, 4), "hidden": (12, 10), "image_size": 67},
    "original-half": {"kernels": (4, 6, 8, 6, 8), "hidden": (20, 18)},
    "original-isolated": {"kernels": (4, 7, 8, 6, 4), "hidden": (20, 9)},
    "four-layers": {
        "kernels": (4, 5, 6),
        "hidden": (),
        "image_size": 16,
        "initial_weights": STRONG[:4],
    },
    "tutorial": {"kernels": (4, 6, 8, 6, 4), "hidden": (20, 18), "adaptive_pool": 2},
    "caffe": {"image_size": 67},
}
PRESETS = (
    "demo",
    "paper",
    "original",
    "original-half",
    "original-isolated",
    "tutorial",
    "four-layers",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Colorful noise of three classes, 60 images to train with and 15 to test."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(5)
    for split, count in (("train", 20), ("test", 5)):
        for label in range(3):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 150, (8, 8, 3)) + 100 * (np.arange(3) == label)
                Image.fromarray(coarse.astype(np.uint8)).resize((76, 76)).save(folder / f"{i}.png")
    return root


def small(name: str, images: Path, out: Path) -> Config:
    sizes = {"kernels": (4, 6, 8, 6, 4), "hidden": (12, 10), "initial_weights": STRONG} | SIZES.get(
        name, {}
    )
    return preset(name).with_fields(**SMALL | sizes, data_dir=str(images), out=str(out))


def on_rank(rank: int, config: Config) -> dict:
    return run(config)


def history(out: Path) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k}
        for line in (out / "history.jsonl").read_text().splitlines()
    ]


@pytest.fixture(params=PRESETS)
def pair(request, images, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The folders of two runs of a preset: on one device and on two ranks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / "cache"))
    one, two = tmp_path / "one", tmp_path / "two"
    run(small(request.param, images, one))
    run_ranks(on_rank, 2, small(request.param, images, two), timeout=120)
    return one, two


def test_a_preset_has_one_history_wherever_it_trains(pair) -> None:
    one, two = pair
    config = checkpoint.read(two / "last.pt")["config"]
    columns = config["model"]["columns"]
    for mine, other in zip(history(two), history(one), strict=True):
        # Two columns: bit for bit, but for the norm, a sum over ranks. One column: two copies,
        # whose float32 gradients add up in another order.
        exact = columns == 2
        assert mine.pop("grad_norm") == pytest.approx(
            other.pop("grad_norm"), rel=1e-5 if exact else 1e-3
        )
        assert mine == (other if exact else pytest.approx(other, rel=1e-3))
    a, b = (checkpoint.read(out / "last.pt")["model"] for out in (one, two))
    for key, value in a.items():
        assert (
            torch.equal(value, b[key])
            if columns == 2
            else torch.allclose(value, b[key], rtol=1e-3, atol=1e-5)
        ), key


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["original", "original-half"])
def test_conv1_learns_until_the_2012_schedule_freezes_it(
    name: str, ranks: int, images, tmp_path, monkeypatch
) -> None:
    """With two copies (original-half on two ranks) the freeze also has to reach DDP."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / "cache"))
    config = small(name, images, tmp_path / "run")

    def conv1_after(steps: int) -> dict[str, torch.Tensor]:
        part = config.with_fields(
            max_steps=steps,
            resume=str(tmp_path / "run" / "last.pt")
            if (tmp_path / "run" / "last.pt").exists()
            else "",
        )
        run(part) if ranks == 1 else run_ranks(on_rank, 2, part, timeout=120)
        return {
            key: value
            for key, value in checkpoint.read(tmp_path / "run" / "last.pt")["model"].items()
        }

    steps = -(-54 // 24)  # an epoch's: a tenth of the 60 images validates
    before, at_freeze, after = (conv1_after(n * steps) for n in (3, 4, 5))
    moved = {
        key: (
            not torch.equal(before[key], at_freeze[key]),
            not torch.equal(at_freeze[key], after[key]),
        )
        for key in before
    }
    assert all(moved[key] == (True, False) for key in moved if ".conv1." in key), moved
    assert all(moved[key] == (True, True) for key in moved if ".conv1." not in key), moved


def test_no_gradient_is_computed_for_a_frozen_conv1(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / "cache"))
    trainers = []
    run(small("original", images, tmp_path / "run"), trainers.append)
    gradients = {name: parameter.grad for name, parameter in trainers[0].model.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == {
        name for name in gradients if ".conv1." in name
    }


@pytest.mark.parametrize(
    ("name", "flags", "where", "trained"),
    [
        ("paper", {}, "test images", 60),
        ("original", {}, "test images", 60),
        ("original-half", {}, "test images", 60),
        ("original-isolated", {}, "test images", 60),
        ("caffe", {}, "test images", 60),
        ("demo", {}, "held out from train", 54),
        ("paper", {"validation": "held-out"}, "held out from train", 54),
        ("demo", {"validation": "val"}, "test images", 60),
    ],
)
def test_a_preset_validates_as_its_source_does_and_the_result_says_where(
    name: str, flags: dict, where: str, trained: int, images, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / "cache"))
    out = tmp_path / "run"
    result = run(small(name, images, out).with_fields(**flags, epochs=1, max_steps=1))
    assert result["validation"] == where
    data = json.loads((out / "config.json").read_text())["data"]
    assert data["images"] == [trained, 15 if where == "test images" else 6, 15]
    assert ("validation: the test images" in capsys.readouterr().out) is (trained == 60)
