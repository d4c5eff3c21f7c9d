"""HEIC, AVIF and JPEG through packages that may be missing or broken: pillow-heif, torchvision."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_mp.data import decode
from alexnet_mp.data.decode import read_image, try_read

HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def picture(height: int, width: int) -> np.ndarray:
    """Smooth, different everywhere, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] / 40
    return (
        np.stack([np.sin(x) * np.cos(y), np.sin(x / 2 + y), np.cos(x - y / 3)], 2) * 100 + 128
    ).astype(np.uint8)


@pytest.fixture
def fresh_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plugins are looked for again, and those that a test registers are gone after it."""
    Image.init()
    for table in ("OPEN", "EXTENSION", "MIME", "SAVE"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    for function in (decode._formats, decode._register_heif):
        function.cache_clear()
    yield
    for function in (decode._formats, decode._register_heif):
        function.cache_clear()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, fresh_plugins: None) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = picture(120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6  # as a telephone writes it
    upright = Image.fromarray(pixels)
    for name, image, options in (
        ("a.heic", upright, {}),
        ("turned.HEIC", upright.transpose(Image.Transpose.ROTATE_90), {"exif": exif.tobytes()}),
        ("photo.png", upright, {}),  # HEIC under another name
    ):
        encoded = pillow_heif.from_pillow(image)
        encoded.save(tmp_path / "x.heic", quality=95, **options)
        (tmp_path / "x.heic").rename(tmp_path / name)
        found = read_image(tmp_path / name).transpose(1, 2, 0).astype(int)
        expected = pixels[15:105].astype(int)
        assert found.shape == (90, 90, 3) and np.abs(found - expected).mean() < 4, name


def test_heic_without_pillow_heif_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.OPEN.pop("HEIF", None)
    for name in ("IMG_0001.HEIC", "photo.jpg"):
        (tmp_path / name).write_bytes(HEIC_HEAD + bytes(500))
        assert try_read(tmp_path / name) == (
            "a HEIC image, which Pillow alone does not read; pip install pillow-heif"
        )


def test_a_pillow_heif_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    broken = types.ModuleType("pillow_heif")
    broken.register_heif_opener = lambda: (_ for _ in ()).throw(OSError("libheif.so is missing"))
    monkeypatch.setitem(sys.modules, "pillow_heif", broken)
    Image.OPEN.pop("HEIF", None)
    (tmp_path / "a.heic").write_bytes(HEIC_HEAD + bytes(500))
    assert "pillow-heif is installed but cannot be used (OSError: libheif" in try_read(
        tmp_path / "a.heic"
    )


def test_avif_that_pillow_lacks_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    Image.OPEN.pop("AVIF", None)
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(500))
    assert "pip install pillow-avif-plugin" in try_read(tmp_path / "a.avif")


def test_a_torchvision_that_does_not_fit_costs_speed_only(tmp_path: Path) -> None:
    """In a process of its own: torchvision may be imported here already."""
    Image.fromarray(picture(90, 90)).save(tmp_path / "a.jpg")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    program = (
        "import alexnet_mp, sys; from alexnet_mp.data import load\n"
        "from alexnet_mp.config import DataConfig; from alexnet_mp.data.decode import read_image\n"
        "print(read_image(sys.argv[1]).sum())\n"
        "try: load(DataConfig(data='cifar10', data_dir=sys.argv[2]), 0)\n"
        "except ValueError as error: print(error)\n"
    )
    paths = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.jpg"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    total, refusal = done.stdout.splitlines()
    assert int(total) == read_image(tmp_path / "a.jpg").sum()
    assert refusal.startswith(
        "--data cifar10: torchvision cannot be imported (operator torchvision::nms does not exist)"
    )
