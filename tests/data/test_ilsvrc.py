"""ImageNet's own archives: a tar of tars, a flat tar, and the devkit."""

import io
import tarfile
from pathlib import Path

import pytest
from data_forms import add
from image_sets import write_image

from alexnet_mp.data import dataset_packer
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.ilsvrc import DEVKIT, TRUTH
from alexnet_mp.data.image_sets import SetOptions, list_source

WNIDS = ("n01440764", "n01443537", "n02007558")
NUMBERS = {"n01440764": 3, "n01443537": 1, "n02007558": 2}  # the devkit's own
TRUE = [2, 0, 1, 1, 2, 0]  # places of the sorted wnids of the validation images


def image(path: Path, level: int) -> bytes:
    return write_image(path, (20, 24), (level,) * 3).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same images as class folders."""
    root = tmp_path / "folder"
    for label, wnid in enumerate(WNIDS):
        for k in range(4):
            image(root / "train" / wnid / f"{wnid}_{k * 37}.JPEG", 10 * label + k)
    for k, label in enumerate(TRUE):
        image(root / "val" / WNIDS[label] / f"ILSVRC2012_val_0000000{k + 1}.JPEG", 100 + k)
    return root


@pytest.fixture
def archives(folder: Path, tmp_path: Path) -> Path:
    """ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, whose members are in no order."""
    place = tmp_path / "ILSVRC"
    place.mkdir()
    with tarfile.open(place / "ILSVRC2012_img_train.tar", "w") as train:
        for wnid in (WNIDS[1], WNIDS[0], WNIDS[2]):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path in sorted((folder / "train" / wnid).iterdir(), reverse=True):
                    add(archive, path.name, path.read_bytes())
            add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(place / "ILSVRC2012_img_val.tar", "w") as val:
        for path in sorted((folder / "val").rglob("*.JPEG")):
            add(val, path.name, path.read_bytes())
    return place


def make_devkit(path: Path, numbers: list[int] | None = None) -> Path:
    """The devkit's archive, with an inner node of the tree besides the leaves."""
    savemat, np = pytest.importorskip("scipy.io").savemat, pytest.importorskip("numpy")
    rows = [(number, wnid, 0) for wnid, number in NUMBERS.items()] + [(1001, "n00001740", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, kinds).reshape(-1, 1)})
    truth = [NUMBERS[WNIDS[label]] for label in TRUE] if numbers is None else numbers
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        add(archive, f"ILSVRC2012_devkit_t12/{TRUTH}", "".join(f"{n}\n" for n in truth).encode())
    return path


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
    archives: Path, folder: Path, tmp_path: Path, given: str, source: str
) -> None:
    options = (
        SetOptions(devkit=make_devkit(tmp_path / DEVKIT))
        if given == "devkit"
        else SetOptions(labels_file=labels_file(tmp_path / "val.txt"))
    )
    expected = pack(folder, tmp_path / "expected", SetOptions())
    assert pack(archives / source, tmp_path / "store", options) == expected


def test_the_devkit_beside_the_archives_is_taken_and_named(
    archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_devkit(archives / DEVKIT)
    listings = list_source(archives)
    assert listings["val"].labels.tolist() == sorted(TRUE)
    assert f"val: the classes are those of {archives / DEVKIT}" in capsys.readouterr().out


def test_the_devkit_also_names_the_classes_of_unpacked_validation_images(
    folder: Path, archives: Path, tmp_path: Path
) -> None:
    (folder / "val").rename(tmp_path / "sorted")
    for path in (tmp_path / "sorted").rglob("*.JPEG"):
        (folder / "val").mkdir(exist_ok=True)
        path.rename(folder / "val" / path.name)
    options = SetOptions(devkit=make_devkit(tmp_path / DEVKIT))
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
        ([3, 1, 2, 2, 9, 3], r"has no synset with number 9"),
        ([2, 3], r"has the classes of 2 validation images, and not of ILSVRC2012_val_00000003"),
    ],
)
def test_a_devkit_of_other_images_is_refused(
    archives: Path, tmp_path: Path, numbers: list[int], words: str
) -> None:
    options = SetOptions(devkit=make_devkit(tmp_path / DEVKIT, numbers))
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
