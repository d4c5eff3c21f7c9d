"""ImageNet's own archives: a tar of tars, a flat tar, and the devkit."""

import shutil
import tarfile
from pathlib import Path

import pytest
from data_forms import DEVKIT, WNIDS, add, make_devkit, make_ilsvrc
from image_sets import write_image

from alexnet_mp.data import dataset_packer
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.ilsvrc import TRUTH
from alexnet_mp.data.image_sets import SetOptions, list_source

TRUE = [0, 1, 2, 0, 1, 2]  # places of the sorted wnids of the validation images
Request = pytest.FixtureRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same images as class folders, val's under the names that they have in the archive."""
    root = tmp_path / "folder"
    for label, wnid in enumerate(WNIDS):
        for k in range(4):
            write_image(
                root / "train" / wnid / f"{wnid}_{k * 37}.JPEG", color=(20 * label + k,) * 3
            )
    for k, label in enumerate(TRUE):
        name = f"ILSVRC2012_val_0000000{k + 1}.JPEG"
        write_image(root / "val" / WNIDS[label] / name, color=(100 + k,) * 3)
    return root


@pytest.fixture
def archives(folder: Path, tmp_path: Path) -> Path:
    return make_ilsvrc(folder, tmp_path / "ILSVRC")


@pytest.fixture
def devkit(folder: Path, tmp_path: Path) -> Path:
    pytest.importorskip("scipy")
    return make_devkit(tmp_path / DEVKIT, folder)


def pack(source: Path, store: Path, options: SetOptions) -> dict[str, bytes]:
    listings = list_source(source, options=options)
    dataset_packer.pack(listings, store, Packing(workers=2), say=lambda text: None)
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def labels_file(path: Path) -> Path:
    lines = (f"ILSVRC2012_val_0000000{k + 1} {WNIDS[label]}\n" for k, label in enumerate(TRUE))
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("given", ["devkit", "labels"])
@pytest.mark.parametrize("source", [".", "ILSVRC2012_img_train.tar"])
def test_the_original_archives_give_the_store_of_the_class_folders(
    archives: Path, folder: Path, tmp_path: Path, given: str, source: str, request: Request
) -> None:
    options = (
        SetOptions(devkit=request.getfixturevalue("devkit"))
        if given == "devkit"
        else SetOptions(labels_file=labels_file(tmp_path / "val.txt"))
    )
    expected = pack(folder, tmp_path / "expected", SetOptions())
    assert pack(archives / source, tmp_path / "store", options) == expected


def test_the_devkit_beside_the_archives_is_taken_and_named(
    archives: Path, devkit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(devkit, archives / DEVKIT)
    listings = list_source(archives)
    assert listings["val"].labels.tolist() == sorted(TRUE)
    assert f"val: the classes are those of {archives / DEVKIT}" in capsys.readouterr().out


def test_the_devkit_also_names_the_classes_of_unpacked_validation_images(
    folder: Path, devkit: Path, tmp_path: Path
) -> None:
    (folder / "val").rename(tmp_path / "sorted")
    for path in (tmp_path / "sorted").rglob("*.JPEG"):
        (folder / "val").mkdir(exist_ok=True)
        path.rename(folder / "val" / path.name)
    options = SetOptions(devkit=devkit)
    assert list_source(folder, options=options)["val"].labels.tolist() == sorted(TRUE)


def test_validation_images_without_classes_are_refused_with_both_ways_out(archives: Path) -> None:
    with pytest.raises(ValueError, match=r"--devkit ILSVRC2012_devkit_t12\.tar\.gz, or .*--val-l"):
        list_source(archives)


def test_the_train_archive_alone_is_packed_and_a_note_says_so(
    archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    assert list(list_source(archives)) == ["train"]
    assert "no validation archive lies beside it" in capsys.readouterr().out


def test_a_damaged_class_is_one_line_and_the_others_can_be_packed(
    archives: Path, tmp_path: Path
) -> None:
    train = archives / "ILSVRC2012_img_train.tar"
    content = bytearray(train.read_bytes())
    with tarfile.open(train) as opened:
        start = opened.getmember(f"{WNIDS[0]}.tar").offset_data
    second = start + 512 + 1024  # the header of its second image
    content[second : second + 512] = b"x" * 512
    train.write_bytes(content)
    options = SetOptions(labels_file=labels_file(tmp_path / "val.txt"))
    with pytest.raises(ValueError, match=rf"{WNIDS[0]}\.tar: cut short or damaged") as caught:
        list_source(archives, options=options)
    assert "\n" not in str(caught.value)
    options = SetOptions(labels_file=labels_file(tmp_path / "val.txt"), skip=True)
    listing = list_source(archives, options=options)["train"]
    assert listing.labels.tolist() == [0] + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "numbers, words",
    [
        ([3, 1, 2, 2, 9, 3], r"has no leaf with number 9"),
        ([3, 1, 2, 2, 1001, 3], r"has no leaf with number 1001"),  # a node with children
        ([2, 3], r"has the classes of 2 validation images, and not of ILSVRC2012_val_00000003"),
    ],
)
def test_a_devkit_of_other_images_is_refused(
    archives: Path, folder: Path, tmp_path: Path, numbers: list[int], words: str
) -> None:
    pytest.importorskip("scipy")
    options = SetOptions(devkit=make_devkit(tmp_path / DEVKIT, folder, numbers))
    with pytest.raises(ValueError, match=words):
        list_source(archives, options=options)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"<html>", "damaged, or not ILSVRC2012_devkit_t12"),
    ],
)
def test_what_is_no_devkit_is_refused(
    archives: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "devkit").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"--devkit .*{words}"):
        list_source(archives, options=SetOptions(devkit=tmp_path / "devkit"))


def test_without_scipy_the_devkit_is_one_line_that_names_the_extra(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / DEVKIT, "w:gz") as archive:
        add(archive, "devkit/data/meta.mat", b"MATLAB")
        add(archive, f"devkit/{TRUTH}", b"1\n")
    for name in ("scipy", "scipy.io"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'alexnet_mp\[imagenet\]'") as caught:
        list_source(archives, options=SetOptions(devkit=tmp_path / DEVKIT))
    assert "\n" not in str(caught.value)
