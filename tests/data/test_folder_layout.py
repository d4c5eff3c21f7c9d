"""Folders of images as people have them: which folder is which split, and what is refused how."""

import tarfile
import unicodedata
from pathlib import Path

import pytest
from image_sets import levels, load_folder, make_folder, write_image

from alexnet_mp.config import DataConfig
from alexnet_mp.data import Splits, load, load_split
from alexnet_mp.data.image_sets import list_source

TINY_100 = Path(__file__).resolve().parents[3] / "shared/data/tiny-imagenet-100.tar.gz"
pytestmark = pytest.mark.usefixtures("cache")
Output = pytest.CaptureFixture[str]


def sizes(splits: Splits) -> list[int]:
    return [len(splits.train), len(splits.val), len(splits.test)]


def message(root: Path | str) -> str:
    """The one line with which training on `root` is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(DataConfig(data="folder", data_dir=str(root)), 0)
    assert "\n" not in str(caught.value) and "--data-dir" in str(caught.value)
    return str(caught.value)


# ---- splits ----


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Valid", "VAL"])
def test_a_validation_folder_of_any_spelling_validates(
    tmp_path: Path, name: str, capsys: Output
) -> None:
    root = make_folder(tmp_path / "set", ("train", name, "test"))
    splits = load_folder(root)
    assert [levels(store) for store in (splits.train, splits.val, splits.test)] == [
        list(range(k, k + 20)) for k in (0, 20, 40)
    ]
    assert splits.validation == "own split"
    line = f"train: {root}/train; validation: {root}/{name}; test: {root}/test\n"
    assert line in capsys.readouterr().out


def test_packing_says_which_folder_became_which_split(tmp_path: Path) -> None:
    root, lines = make_folder(tmp_path / "set", ("train", "valid", "test", "extra")), []
    listings = list_source(root, say=lines.append)
    assert {split: len(listing) for split, listing in listings.items()} == {
        "train": 20,
        "val": 20,
        "test": 20,
    }
    assert lines == [
        f"{root}: ignored the folder extra",
        f"train: {root}/train; val: {root}/valid; test: {root}/test",
    ]


def test_two_validation_folders_are_refused_with_both_names(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train", "val", "valid", "test"))
    assert "has both val and valid, and each may be the val split" in message(root)


def test_the_only_other_split_is_the_test_and_the_screen_says_so(
    tmp_path: Path, capsys: Output
) -> None:
    root = make_folder(tmp_path / "set", ("train", "val"))
    splits = load_folder(root)
    assert sizes(splits) == [18, 2, 20] and splits.validation == "held out from train"
    assert (
        f"train: {root}/train; validation: a tenth of train, chosen by --seed; "
        f"test: {root}/val (the only other split)\n"
    ) in capsys.readouterr().out


def test_validating_on_val_trains_on_all_of_train(tmp_path: Path, capsys: Output) -> None:
    root = make_folder(tmp_path / "set", ("train", "val"))
    splits = load_folder(root, validation="val")
    assert sizes(splits) == [20, 20, 20] and levels(splits.val) == levels(splits.test)
    assert splits.validation == "test images"
    assert "validation: the test images (--validation val)" in capsys.readouterr().out
    both = load_folder(make_folder(tmp_path / "both", ("train", "val", "test")), validation="val")
    assert sizes(both) == [20, 20, 20] and both.validation == "own split"
    assert levels(both.val) != levels(both.test)


@pytest.mark.parametrize("split", ["train", ""])
def test_training_images_alone_give_both_other_splits(
    tmp_path: Path, split: str, capsys: Output
) -> None:
    root = make_folder(tmp_path / "set", (split,), count=20)
    splits = load_folder(root)
    assert sizes(splits) == [32, 4, 4] and splits.validation == "held out from train"
    found = [level for s in (splits.train, splits.val, splits.test) for level in levels(s)]
    assert sorted(found) == list(range(40))
    assert splits.test.labels.tolist() == splits.val.labels.tolist() == [0, 0, 1, 1]
    assert (
        f"train: {root / split}; validation: a tenth of the rest, chosen by --seed; "
        f"test: a tenth of {root / split}, the same for every --seed\n"
    ) in capsys.readouterr().out


def test_held_out_test_images_are_the_same_for_every_seed(tmp_path: Path) -> None:
    config = DataConfig(data="folder", data_dir=str(make_folder(tmp_path / "set", ("train",))))
    one, two = load(config, 1), load(config, 2)
    assert levels(one.test) == levels(two.test) and levels(one.val) != levels(two.val)


def test_other_folders_beside_train_are_named_as_ignored(tmp_path: Path, capsys: Output) -> None:
    root = make_folder(tmp_path / "set", ("train", "test", "extra", "unlabeled"))
    (root / ".git").mkdir()
    assert sizes(load_folder(root)) == [18, 2, 20]
    out = capsys.readouterr().out
    assert f"{root}: ignored the folders extra, unlabeled\n" in out and ".git" not in out


def test_one_folder_around_the_set_is_looked_through(tmp_path: Path, capsys: Output) -> None:
    root = make_folder(tmp_path / "download" / "pets v2" / "pets", ("train", "val"))
    (tmp_path / "download" / "README.txt").write_text("hello")
    (tmp_path / "download" / "__MACOSX").mkdir()
    assert sizes(load_folder(tmp_path / "download")) == [18, 2, 20]
    assert f"{tmp_path / 'download'}: the images are those of {root}\n" in capsys.readouterr().out


# ---- only what is asked for ----


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_measuring_on_test_needs_no_training_images(tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path / "set", (name,))
    config = DataConfig(data="folder", data_dir=str(root))
    assert levels(load_split(config, "test", 0)) == list(range(20))
    with pytest.raises(FileNotFoundError, match="no folder train in it; expected train/CLASS/"):
        load(config, 0)
    with pytest.raises(
        FileNotFoundError, match="no folder train in it, and val would be held out from it"
    ):
        load_split(config, "val", 0)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_split_is_packed_and_is_the_same_as_in_training(
    tmp_path: Path, cache: Path, split: str
) -> None:
    config = DataConfig(
        data="folder", data_dir=str(make_folder(tmp_path / "set", ("train", "test")))
    )
    one = load_split(config, split, 3)
    assert len(list(cache.glob("folder-*/*/header.json"))) == 1
    assert levels(one) == levels(getattr(load(config, 3), split))


def test_training_images_that_cannot_be_read_do_not_keep_from_testing(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set")
    (root / "train" / "cat" / "0.png").write_bytes(b"")
    config = DataConfig(data="folder", data_dir=str(root))
    assert len(load_split(config, "test", 0)) == 20


# ---- one level too many, one class ----


@pytest.mark.parametrize("inner", ["images", "train"])
def test_a_level_too_many_is_refused_with_the_folder_meant(tmp_path: Path, inner: str) -> None:
    root = make_folder(tmp_path / "set", (f"train/{inner}", f"test/{inner}"))
    assert (
        f"{root}/train has 1 class ({inner}), which has folders cat, dog in it: "
        f"did you mean {root}/train/{inner}?"
    ) in message(root)


def test_train_within_train_is_refused_as_a_level_too_many(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("train/train", "test/test"))
    assert f"did you mean {root}/train/train?" in message(root)
    config = DataConfig(data="folder", data_dir=str(root))
    with pytest.raises(ValueError, match=r"did you mean .*/train/train"):
        load_split(config, "test", 0)


def test_a_bare_level_too_many_is_refused_and_the_folder_meant_trains(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("photos",), count=20)
    assert f"did you mean {root}/photos?" in message(root)
    assert sizes(load_folder(root / "photos")) == [32, 4, 4]


def test_one_class_is_refused_with_the_reason(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", classes=("cat",))
    assert "train has 1 class (cat), and training needs two or more" in message(root)
    with pytest.raises(ValueError, match=r"SOURCE: .* has 1 class \(cat\)"):
        list_source(root)


def test_splits_under_other_names_do_not_pass_for_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("seg_train/seg_train", "seg_test/seg_test"))
    for name in ("seg_train", "seg_test"):  # Kaggle's Intel scenes, the inner level removed
        for inner in list((root / name / name).iterdir()):
            inner.rename(root / name / inner.name)
        (root / name / name).rmdir()
    assert "seg_test, seg_train look like splits, not like classes; rename them" in message(root)


def test_training_runs_beside_the_classes_do_not_pass_for_a_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "set", ("",))
    write_image(root / "runs" / "photos-folder-20260101" / "curves.png")
    (root / "runs" / "photos-folder-20260101" / "history.jsonl").write_text("")
    assert "runs holds training runs, whose pictures would pass for a class" in message(root)


def test_a_class_that_is_called_train_is_told_from_a_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "vehicles", ("",), ("bus", "train"))
    assert f"if it is a class of its own, move all of them into a folder: {root}/train/train" in (
        message(root)
    )


def test_classes_whose_folders_hold_folders_are_noted(tmp_path: Path, capsys: Output) -> None:
    root = make_folder(tmp_path / "set", ("train/animal", "train/vehicle"))
    load_folder(root)
    assert "images in folders within a class are of that class: animal, vehicle" in (
        capsys.readouterr().out
    )


# ---- sets as they are published ----


def make_tiny_imagenet(root: Path) -> Path:
    """Tiny-ImageNet's files: two classes, four training and three validation images of each."""
    wnids, level = ("n01443537", "n02012849"), 0
    for wnid in wnids:
        for k in range(4):
            path = root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG"
            write_image(path, (64, 64), (level := level + 10,) * 3)
        boxes = "".join(f"{wnid}_{k}.JPEG\t0\t10\t63\t58\n" for k in range(4))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for k in range(6):
        write_image(root / "val" / "images" / f"val_{k}.JPEG", (64, 64), (level := level + 10,) * 3)
        lines.append(f"val_{k}.JPEG\t{wnids[k % 2]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines[::-1]))
    for k in range(5):
        write_image(root / "test" / "images" / f"test_{k}.JPEG", (64, 64))
    (root / "wnids.txt").write_text("n02012849\nn01443537\n")
    (root / "words.txt").write_text(
        "n00000001\tentity\nn02012849\tcrane\nn01443537\tgoldfish, Carassius auratus\n"
    )
    return root


def test_tiny_imagenet_packs_and_trains_as_it_is_unpacked(tmp_path: Path, capsys: Output) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    splits = load_folder(root, validation_share=0.3)
    out = capsys.readouterr().out
    assert sizes(splits) == [6, 2, 6]
    assert splits.train.classes == ("goldfish", "crane")  # in the order of n01443537, n02012849
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]  # as if each class had its folder
    assert levels(splits.test) == pytest.approx([90, 110, 130, 100, 120, 140], abs=1)
    assert f"{root}/test: left out, its 5 images have no labels\n" in out and "note" not in out
    listings = list_source(root)
    assert {split: len(listing) for split, listing in listings.items()} == {"train": 8, "val": 6}
    assert listings["val"].name(0) == "n01443537/val_0.JPEG"


def test_tiny_imagenets_val_alone_can_be_measured_on(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny")
    config = DataConfig(data="folder", data_dir=str(root))
    whole = load_split(config, "test", 0)
    (root / "train").rename(tmp_path / "elsewhere")
    alone = load_split(config, "test", 0)
    assert levels(alone) == levels(whole) and alone.labels.tolist() == whole.labels.tolist()
    assert alone.classes == whole.classes


def test_words_that_two_classes_share_are_told_apart(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny")
    (root / "words.txt").write_text("n02012849\tcrane\nn01443537\tcrane, Grus\n")
    assert list_source(root)["train"].classes == ("crane, Grus", "crane")
    (root / "words.txt").write_text("n02012849\tcrane\nn01443537\tcrane\n")
    assert list_source(root)["train"].classes == ("crane (n01443537)", "crane (n02012849)")
    (root / "words.txt").write_text("n02012849\tcrane\n")  # not all are there
    assert list_source(root)["train"].classes == ("n01443537", "n02012849")


def test_cub_trains_from_its_folder_of_images_which_is_named(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    make_folder(root, ("images",), ("001.Black_footed_Albatross", "002.Laysan_Albatross"))
    for name in ("attributes", "parts"):
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("x")
    (root / "images.txt").write_text("1 001.Black_footed_Albatross/0.png\n")
    assert f"or did you mean {root}/images, which has folders 001.Black" in message(root)
    assert sizes(load_folder(root / "images")) == [16, 2, 2]


def test_caltechs_background_is_a_class_and_noted(tmp_path: Path, capsys: Output) -> None:
    root = make_folder(tmp_path / "101_ObjectCategories", ("",), ("BACKGROUND_Google", "accordion"))
    assert load_folder(root).train.classes == ("BACKGROUND_Google", "accordion")
    assert "BACKGROUND_Google is trained as a class" in capsys.readouterr().out


def test_flat_images_are_refused_with_the_classes_of_their_names(tmp_path: Path) -> None:
    for name in ("Abyssinian_1", "Abyssinian_201", "great_dane_12", "great_dane_3"):
        write_image(tmp_path / "images" / f"{name}.jpg")
    assert (
        f"but 4 images: sort them into {tmp_path}/images/CLASS/ "
        "(by their names they are of 2 classes: Abyssinian, great_dane)"
    ) in message(tmp_path / "images")
    for k in range(4):
        write_image(tmp_path / "dogs" / "train" / f"{'cat' if k % 2 else 'dog'}.{k}.jpg")
    assert "by their names they are of 2 classes: cat, dog" in message(tmp_path / "dogs")


def test_a_table_of_labels_beside_flat_images_is_named(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        for k in range(4):
            write_image(tmp_path / "set" / split / f"img{k}_jpg.rf.0{k}f.jpg")
        (tmp_path / "set" / split / "_classes.csv").write_text("filename, cat, dog\n")
    assert "(_classes.csv seems to say which class each is of)" in message(tmp_path / "set")


def test_a_detection_set_is_told_apart(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "train" / "images" / "1.jpg")
    (tmp_path / "set" / "train" / "labels").mkdir()
    (tmp_path / "set" / "train" / "labels" / "1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert "images beside labels are a detection set's" in message(tmp_path / "set")


@pytest.mark.skipif(not TINY_100.is_file(), reason=f"{TINY_100} is not there")
def test_real_photographs_of_two_classes_are_listed_and_held_out(tmp_path: Path) -> None:
    wanted = {"n01443537": 40, "n01641577": 40}
    with tarfile.open(TINY_100, "r|gz") as archive:
        for member in archive:
            split, wnid, *_ = Path(member.name).parts
            if (
                split == "train"
                and wanted.get(wnid, 0)
                and (content := archive.extractfile(member))
            ):
                wanted[wnid] -= 1
                (tmp_path / "set" / split / wnid).mkdir(parents=True, exist_ok=True)
                (tmp_path / "set" / member.name).write_bytes(content.read())
            if not any(wanted.values()):
                break
    splits = load_folder(tmp_path / "set")
    assert sizes(splits) == [64, 8, 8] and splits.train.sides == (64,)
    assert splits.train.classes == ("n01443537", "n01641577")


# ---- names and paths ----


def test_composed_and_decomposed_letters_are_the_same_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = make_folder(tmp_path / "set", ("train",), (composed, "thé noir"))
    make_folder(root, ("test",), (decomposed, "thé noir"))
    assert load_folder(root).test.classes == (composed, "thé noir")
    write_image(root / "train" / decomposed / "1.png")
    assert "two folders whose names look alike (café)" in message(root)


def test_a_data_dir_in_the_other_encoding_of_accents_is_found(tmp_path: Path) -> None:
    make_folder(tmp_path / unicodedata.normalize("NFD", "Fotos Zoë"))
    assert sizes(load_folder(tmp_path / unicodedata.normalize("NFC", "Fotos Zoë"))) == [18, 2, 20]


def test_the_home_is_found_in_a_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "my 'pets'")
    splits = load(DataConfig(data="folder", data_dir="~/my 'pets'"), 0)
    assert sizes(splits) == [18, 2, 20]
    assert "no_such_user" in message("~no_such_user/pets")


def test_a_mistyped_data_dir_names_the_folder_meant(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "my pets")
    for typed in (f"'{root}'", str(root).replace(" ", "\\ "), str(root).replace("pets", "pet")):
        assert f"no such folder (did you mean {root}?)" in message(typed)


def test_links_to_the_set_and_to_its_splits_are_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for split in ("train", "test"):
        (tmp_path / "linked" / split).symlink_to(root / split)
    (tmp_path / "set").symlink_to(tmp_path / "linked")
    assert sizes(load_folder(tmp_path / "set")) == [18, 2, 20]
    (tmp_path / "linked" / "val").symlink_to(tmp_path / "nowhere")
    assert sizes(load_folder(tmp_path / "set")) == [18, 2, 20]


def test_a_packed_store_given_as_a_folder_is_told(tmp_path: Path) -> None:
    from image_sets import random_store

    random_store().save(tmp_path / "set" / "train")
    assert "a packed store; use --data store" in message(tmp_path / "set")
