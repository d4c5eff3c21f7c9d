"""Image files of every kind are read as what they show, or named with the reason."""

import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_sets import load_folder, make_folder, write_image
from PIL import Image, ImageOps

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Augment, Loader, Store, dataset_packer, decode
from alexnet_mp.data.decode import read_image, try_read
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_sets import list_source
from alexnet_mp.inference.load_network import read_square

pytestmark = pytest.mark.usefixtures("cache")
RED, BLUE = (200, 30, 60), (20, 40, 220)


def color(path: Path) -> list[int]:
    """Of the middle of the stored image."""
    image = read_image(path)
    return image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()


def picture(height: int, width: int) -> np.ndarray:
    """Smooth, different everywhere, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] / 40
    return (
        np.stack([np.sin(x) * np.cos(y), np.sin(x / 2 + y), np.cos(x - y / 3)], 2) * 100 + 128
    ).astype(np.uint8)


def png(
    kind: int, depth: int, pixel: bytes, side: int = 8, claim: tuple[int, int] | None = None
) -> bytes:
    """A PNG of one color, of any color type and depth; `claim`: a size that it pretends to have."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", *(claim or (side, side)), depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress((b"\0" + pixel * side) * side))
        + chunk(b"IEND", b"")
    )


# ---- colors ----


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("1", 1, [255] * 3),
        ("L", 90, [90] * 3),
        ("P", 0, None),
        ("YCbCr", (81, 90, 240), [238, 14, 14]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)
def test_every_color_mode_of_a_tiff_becomes_rgb(
    tmp_path: Path, mode: str, value: object, expected: list[int] | None
) -> None:
    path = tmp_path / "a.tif"
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(path)
    else:
        Image.new(mode, (8, 8), value).save(path)
    assert color(path) == pytest.approx(expected or [10, 20, 30], abs=3)


def test_a_cmyk_jpeg_as_photoshop_writes_it_is_not_a_negative(tmp_path: Path) -> None:
    path = write_image(
        tmp_path / "a.jpg", mode="CMYK", color=(0, 0, 0, 230), quality=100
    )  # dark; stored as 255 - ink, with Adobe's mark
    assert b"Adobe" in path.read_bytes() and max(color(path)) < 40


@pytest.mark.parametrize(
    "kind, pixel, expected",
    [
        (2, struct.pack(">HHH", 65535, 32896, 1000), [255, 128, 4]),
        (0, struct.pack(">H", 32896), [128] * 3),
        (4, struct.pack(">HH", 1000, 65535), [4] * 3),
        (6, struct.pack(">HHHH", 65535, 0, 0, 0), [255] * 3),
    ],
    ids=["RGB", "gray", "gray and alpha", "transparent RGB"],
)
def test_sixteen_bits_a_channel_are_scaled(
    tmp_path: Path, kind: int, pixel: bytes, expected: list[int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(kind, 16, pixel))
    assert color(tmp_path / "a.png") == pytest.approx(expected, abs=1)


def test_floating_point_levels_of_unknown_scale_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert "floating point" in try_read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "name, mode", [("a.webp", "RGBA"), ("a.gif", "P"), ("a.tif", "RGBA"), ("a.png", "LA")]
)
def test_hidden_colors_of_transparent_pixels_do_not_appear(
    tmp_path: Path, name: str, mode: str
) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, *RED])
        image.save(tmp_path / name, transparency=1)
    else:
        write_image(
            tmp_path / name,
            mode=mode,
            color=(*RED, 0) if mode == "RGBA" else (30, 0),
            lossless=True,
        )
    assert color(tmp_path / name) == [255] * 3


# ---- formats ----


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.mpo"])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (16, 16), value) for value in (RED, BLUE))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with Image.open(tmp_path / name) as opened:
        assert opened.n_frames == 2
    assert color(tmp_path / name) == pytest.approx(RED, abs=12)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG", "PPM", "JPEG2000"])
def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path: Path, format: str) -> None:
    for name in ("n02105855_2933.JPEG", "b.png"):
        assert color(write_image(tmp_path / name, color=RED, format=format)) == pytest.approx(
            RED, abs=6
        )


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 2},
        {"optimize": True},
        {"restart_marker_blocks": 1},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_of_any_making_has_the_pixels_that_pillow_gives(
    tmp_path: Path, options: dict, mode: str
) -> None:
    Image.fromarray(picture(90, 90)).convert(mode).save(tmp_path / "a.jpg", **options)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.asarray(opened.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)


def test_without_torchvisions_operator_the_pixels_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture(300, 400)).save(tmp_path / "a.jpg")
    assert decode.has_jpeg_operator()
    expected = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(decode, "has_jpeg_operator", lambda: False)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
    with pytest.raises(RuntimeError):
        decode.decode_jpeg(b"no")


def test_what_follows_the_end_of_a_jpeg_does_not_matter(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", color=RED)
    path.write_bytes(path.read_bytes() + b"trailing " * 100)
    assert color(path) == pytest.approx(RED, abs=6)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "an empty file"),
        (b"  <!DOCTYPE html><html>", "not an image that"),
        (b"<?xml version='1.0'?><svg/>", "not an image that"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "Git LFS pointer; fetch the files with `git lfs pull`",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that Pillow knows"),
        (b"\0" * 4096, "not an image that Pillow knows"),
        (b"PK\x03\x04", "not an image that Pillow knows"),
        (b"\xff\xd8\xff", ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"GIF89a", ""),
    ],
)
def test_what_is_no_image_is_told_with_the_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    found = try_read(tmp_path / "a.jpg")
    assert isinstance(found, str) and found and reason in found and "\n" not in found


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused_whatever_its_format(
    tmp_path: Path, name: str, share: float
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(
        tmp_path / name
    )
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    assert isinstance(try_read(tmp_path / name), str)


def test_a_file_that_may_not_be_read_is_named_with_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:  # tests may run as root, whom nothing is refused
        raise PermissionError(13, "Permission denied", str(self))

    path = write_image(tmp_path / "a.jpg")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert try_read(path) == "Permission denied"


# ---- sizes ----


@pytest.mark.parametrize("size", [(20000, 3), (3, 20000), (1, 1), (5000, 1)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_strip_is_its_center_square_and_keeps_its_size(
    tmp_path: Path, size: tuple[int, int], name: str
) -> None:
    image = read_image(write_image(tmp_path / name, size, RED))
    assert image.shape == (3, min(size), min(size)) and image[:, 0, 0].tolist() == pytest.approx(
        RED, abs=6
    )


@pytest.mark.parametrize("claim", [(14000, 14000), (2**31 - 1, 2**31 - 1), (2**20, 2**20)])
def test_a_bomb_is_refused_before_its_pixels_take_memory(
    tmp_path: Path, claim: tuple[int, int]
) -> None:
    (tmp_path / "a.png").write_bytes(png(2, 8, bytes(RED), claim=claim))
    started = time.perf_counter()
    assert "pixels" in try_read(tmp_path / "a.png") and time.perf_counter() - started < 5


def test_a_jpeg_that_claims_to_be_giant_is_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 65000, 65000)
    path.write_bytes(content)
    assert "pixels" in try_read(path)


def test_a_giant_jpeg_is_decoded_at_a_fraction_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (9000, 6000), 90).save(tmp_path / "a.jpg")
    sizes, square = [], decode._center_square
    monkeypatch.setattr(
        decode,
        "_center_square",
        lambda pixels: (sizes.append(tuple(pixels.shape)), square(pixels))[1],
    )
    assert color(tmp_path / "a.jpg") == [90] * 3
    assert sizes == [(3, 750, 1125)]


@pytest.mark.parametrize("side, decoded", [(1024, 512), (1030, 515), (2047, 1024), (2048, 512)])
def test_a_large_jpeg_is_decoded_at_no_less_than_twice_the_stored_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, decoded: int
) -> None:
    Image.new("L", (side, side), 90).save(tmp_path / "a.jpg")
    sizes, square = [], decode._center_square
    monkeypatch.setattr(
        decode,
        "_center_square",
        lambda pixels: (sizes.append(pixels.shape[-1]), square(pixels))[1],
    )
    read_image(tmp_path / "a.jpg")
    assert sizes == [decoded]


def test_images_of_many_pixels_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "LARGE", 100)
    rgb, held = decode._rgb, []
    monkeypatch.setattr(
        decode, "_rgb", lambda image: (held.append(decode._one_large.locked()), rgb(image))[1]
    )
    for name, size in (("small.png", (10, 10)), ("large.png", (11, 10))):
        read_image(write_image(tmp_path / name, size))
    assert held == [False, True] and not decode._one_large.locked()


def test_an_image_smaller_than_the_crop_gets_no_black_border(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    for split in ("train", "test"):
        write_image(root / split / "cat" / "small.png", (40, 30), RED)
        write_image(root / split / "cat" / "one.png", (1, 1), RED)
        for number in range(10):
            (root / split / "cat" / f"{number}.png").unlink()
    splits = load_folder(root)
    for train in (True, False):
        store = splits.train if train else splits.test
        for batch in Loader(store, Augment(DataConfig(mean="none"), 227), 8, train=train):
            reds = batch.images[batch.labels == 0]
            assert (reds == reds[:, :, :1, :1]).all() and reds.shape[2:] == (227, 227)


# ---- EXIF ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_a_turned_image_is_stored_and_predicted_on_as_pillow_turns_it(
    tmp_path: Path, orientation: int, name: str
) -> None:
    path = tmp_path / "set" / "train" / "cat" / name
    path.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(60, 90)).save(
        path, exif=exif, **({"lossless": True} if name == "a.webp" else {})
    )
    with Image.open(path) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).transpose(2, 0, 1)
    top, left = (upright.shape[1] - 60) // 2, (upright.shape[2] - 60) // 2
    expected = upright[:, top : top + 60, left : left + 60]
    for folder in ("train/dog", "test/cat", "test/dog"):
        write_image(tmp_path / "set" / folder / "b.png")
    dataset_packer.pack(
        list_source(tmp_path / "set"),
        tmp_path / "store",
        Packing(),
        say=lambda text: None,
    )
    assert np.array_equal(Store.open(tmp_path / "store" / "train").image(0), expected)
    assert np.array_equal(read_square(str(path), 60).numpy(), expected)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(picture(60, 60)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png").transpose(1, 2, 0), picture(60, 60))
