"""webdataset and Parquet as they are published: where names, classes and splits come from."""

import json
import tarfile
from pathlib import Path

import pytest
from data_forms import add, make_parquet, make_shards
from image_sets import levels, load_folder, make_folder, write_image

from alexnet_mp.data import dataset_packer
from alexnet_mp.data.decode_pool import Packing
from alexnet_mp.data.image_sets import SetOptions, list_source

pytestmark = pytest.mark.usefixtures("cache")
Output = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "set", ("train", "val"), ("cat", "dog", "eel"), 6)


def shard(target: Path, samples: list[dict[str, bytes]]) -> Path:
    """One tar; a sample has a __key__, and content by extension."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as archive:
        for sample in samples:
            for kind in sorted(set(sample) - {"__key__"}):
                add(archive, f"{sample['__key__']}.{kind}", sample[kind])
    return target


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    return write_image(tmp_path / "picture.png").read_bytes()


# ---- webdataset ----


def test_a_pattern_of_shards_and_a_single_shard_are_sources_too(
    folder: Path, tmp_path: Path
) -> None:
    shards = make_shards(folder, tmp_path / "shards", each=5)
    listing = list_source(shards / "set-train-{0000..0003}.tar")["train"]
    assert len(listing) == 18 and listing.classes == ("cat", "dog", "eel")
    assert len(list_source(shards / "set-train-000?.tar")["train"]) == 18
    assert len(list_source(shards / "set-train-0001.tar")["train"]) == 5


def test_shards_train_as_their_folder_does(folder: Path, tmp_path: Path) -> None:
    shards = load_folder(make_shards(folder, tmp_path / "shards", each=5))
    plain = load_folder(folder)
    assert levels(shards.train) == levels(plain.train) and levels(shards.test) == levels(plain.test)


def test_a_split_may_be_the_name_of_a_folder_of_shards(tmp_path: Path, picture: bytes) -> None:
    samples = [{"__key__": f"s{k:07d}", "png": picture, "cls": b"%d" % (k % 2)} for k in range(4)]
    for split in ("train", "test"):
        shard(tmp_path / "shards" / split / "0.tar", samples)
    (tmp_path / "shards" / "classnames.txt").write_text("tench\ngoldfish\n")
    listings = list_source(tmp_path / "shards")
    assert {split: len(listing) for split, listing in listings.items()} == {"train": 4, "test": 4}
    # Classes are sorted by name, whatever their numbers were.
    assert listings["test"].classes == ("goldfish", "tench")
    assert [listings["test"].name(k) for k in range(4)] == [
        "goldfish/s0000001.png",
        "goldfish/s0000003.png",
        "tench/s0000000.png",
        "tench/s0000002.png",
    ]


@pytest.mark.parametrize(
    "about, classes",
    [
        ({"label": 3, "wnid": "n01440764"}, ("n01440764", "n01443537")),
        ({"class_name": "tench"}, ("goldfish", "tench")),
        ({"label": "tench"}, ("goldfish", "tench")),
    ],
)
def test_classes_may_be_named_in_the_json(
    tmp_path: Path, picture: bytes, about: dict, classes: tuple[str, ...]
) -> None:
    other = {
        "label": "goldfish" if about.get("label") == "tench" else 1,
        "wnid": "n01443537",
        "class_name": "goldfish",
    }
    texts = [about, {key: other[key] for key in about}] * 2
    samples = [
        {"__key__": f"{k:05d}", "png": picture, "json": json.dumps(text).encode()}
        for k, text in enumerate(texts)
    ]
    listing = list_source(shard(tmp_path / "a-train-0.tar", samples))["train"]
    assert listing.classes == classes and listing.labels.tolist() == [0, 0, 1, 1]


def test_the_wnids_in_imagenets_file_names_are_the_classes(tmp_path: Path, picture: bytes) -> None:
    """timm/imagenet-1k-wds has train's wnids in the keys, and numbers in the order of the wnids."""
    train = [
        {"__key__": f"{wnid}_{k}", "jpg": picture, "cls": b"%d" % label}
        for k in range(2)
        for label, wnid in enumerate(("n01440764", "n01443537"))
    ]
    val = [
        {"__key__": f"ILSVRC2012_val_0000000{k}", "jpg": picture, "cls": b"%d" % (k % 2)}
        for k in range(3)
    ]
    shard(tmp_path / "shards" / "imagenet1k-train-0000.tar", train)
    shard(tmp_path / "shards" / "imagenet1k-validation-00.tar", val)
    listings = list_source(tmp_path / "shards")
    assert listings["val"].classes == ("n01440764", "n01443537")
    assert listings["val"].labels.tolist() == [0, 0, 1]
    assert listings["train"].name(0) == "n01440764/n01440764_0.jpg"


def test_numbers_without_names_stay_in_their_order_and_a_note_says_so(
    tmp_path: Path, picture: bytes, capsys: Output
) -> None:
    samples = [{"__key__": f"{k:05d}", "png": picture, "cls": b"%d" % k} for k in (10, 2, 9)]
    listing = list_source(shard(tmp_path / "a-train-0.tar", samples))["train"]
    assert listing.classes == ("02", "09", "10")
    assert "its classes have no names but numbers, 2 to 10; classes.txt" in capsys.readouterr().out


def test_keys_that_begin_anew_in_each_shard_are_told_apart(tmp_path: Path, picture: bytes) -> None:
    samples = [{"__key__": f"{k:05d}", "png": picture, "cls": b"%d" % k} for k in range(2)]
    for number in range(2):
        shard(tmp_path / "shards" / f"a-train-{number}.tar", samples)
    listing = list_source(tmp_path / "shards")["train"]
    assert [listing.name(k) for k in range(2)] == ["0/a-train-0/00000.png", "0/a-train-1/00000.png"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: [*s, s[0]], "k0 is in it twice"),
        (lambda s: [*s, {**s[0], "__key__": "x", "jpg": b""}], "x has 2 images, and a sample has"),
    ],
)
def test_a_sample_that_cannot_be_taken_is_one_line_or_left_out(
    tmp_path: Path, picture: bytes, change: object, words: str
) -> None:
    samples = [{"__key__": f"k{k}", "png": picture, "cls": b"%d" % (k % 2)} for k in range(4)]
    path = shard(tmp_path / "a-train-0.tar", change(samples))
    with pytest.raises(ValueError, match=words):
        list_source(path)
    assert len(list_source(path, options=SetOptions(skip=True))["train"]) == 4


@pytest.mark.parametrize(
    "classes, words",
    [
        ("cat\ndog\n", "has label 2, and 2 classes are named, 0 to 1"),
        ("cat\ndog\ncat\n", "two labels mean the same class"),
    ],
)
def test_a_class_list_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, classes: str, words: str
) -> None:
    shards = make_shards(folder, tmp_path / "shards")
    (shards / "classes.txt").write_text(classes)
    with pytest.raises(ValueError, match=words):
        list_source(shards)


def test_a_shard_of_no_split_beside_others_is_refused(folder: Path, tmp_path: Path) -> None:
    shards = make_shards(folder, tmp_path / "shards")
    (shards / "set-val-0000.tar").rename(shards / "set-more-0000.tar")
    with pytest.raises(ValueError, match=r"set-more-0000\.tar does not say of which split it is"):
        list_source(shards)


def test_shards_that_webdatasets_own_writer_wrote_are_read(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "own-train-0.tar")) as writer:
        for path in sorted((folder / "train").rglob("*.png")):
            name = path.parent.name
            sample = {"png": path.read_bytes(), "cls": ["cat", "dog", "eel"].index(name)}
            writer.write({"__key__": f"{name}_{path.stem}", **sample})
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    listing = list_source(tmp_path / "own-train-0.tar")["train"]
    assert listing.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


# ---- Parquet ----


def test_a_test_split_without_labels_is_left_out_with_a_note(
    folder: Path, tmp_path: Path, capsys: Output
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = make_parquet(folder, tmp_path / "parquet")
    (file,) = (source / "data").glob("validation-*")
    table = pq.read_table(file)
    test = table.set_column(1, "label", pa.array([-1] * len(table), pa.int64()))
    test = test.replace_schema_metadata(table.schema.metadata)
    pq.write_table(test, source / "data" / "test-0.parquet")
    assert list(list_source(source)) == ["train", "val"]
    assert "test: left out, its 18 images have no labels" in capsys.readouterr().out


def test_classes_of_parquet_are_sorted_whatever_their_numbers(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = make_parquet(folder, tmp_path / "parquet", names=["eel", "dog", "cat"])
    listing = list_source(source)["train"]
    assert listing.classes == ("cat", "dog", "eel")
    # The files of class 0 of the folder are now those of a class that sorts last.
    splits = load_folder(source)
    assert splits.test.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert levels(splits.test)[12:] == list(range(18, 24))


def test_imagenets_parquet_has_the_names_and_classes_of_its_tars(tmp_path: Path) -> None:
    """Its classes are words, and its files say the wnid: n01440764_18_n01440764.JPEG."""
    pytest.importorskip("pyarrow")
    root = tmp_path / "set"
    for wnid in ("n01440764", "n01443537"):
        for name in (f"{wnid}_100", f"{wnid}_1"):
            write_image(root / "train" / wnid / f"{name}_{wnid}.JPEG")
    source = make_parquet(root, tmp_path / "parquet", names=["tench, Tinca", "goldfish"])
    listing = list_source(source)["train"]
    assert listing.classes == ("n01440764", "n01443537")
    assert [listing.name(k) for k in range(2)] == [
        "n01440764/n01440764_1.JPEG",
        "n01440764/n01440764_100.JPEG",
    ]


def test_parquet_without_pyarrow_is_one_line_that_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    source = make_parquet(folder, tmp_path / "parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'alexnet_mp\[parquet\]'") as caught:
        list_source(source)
    assert "\n" not in str(caught.value)


def test_damaged_and_strange_parquet_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = make_parquet(folder, tmp_path / "parquet", each=9)
    file = sorted((source / "data").glob("train-*"))[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"train-00000-of-00002\.parquet: not a Parquet file, or"):
        list_source(source)
    assert len(list_source(source, options=SetOptions(skip=True))["train"]) == 9
    for column, words in (
        ("image", r"no column of labels \(label\), but"),
        ("text", "images"),
    ):
        pq.write_table(pa.table({column: [b"x"]}), tmp_path / "one.parquet")
        with pytest.raises(ValueError, match=words):
            list_source(tmp_path / "one.parquet")


def test_a_damaged_row_group_is_one_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = make_parquet(folder, tmp_path / "parquet")
    (file,) = (source / "data").glob("train-*")
    content = bytearray(file.read_bytes())
    content[4:40] = bytes(36)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        dataset_packer.pack(list_source(source), tmp_path / "store", Packing(workers=2))
    assert "\n" not in str(caught.value)


def test_rows_without_names_are_named_by_their_places(folder: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [path.read_bytes() for path in sorted((folder / "train").rglob("*.png"))]
    labels = [k // 6 for k in range(18)]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "train-0.parquet")
    listing = list_source(tmp_path / "train-0.parquet")["train"]
    assert listing.name(0) == "0/train-0/00" and listing.labels.tolist() == labels
