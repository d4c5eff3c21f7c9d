"""ImageNet's own layout: validation images in one folder, with a file of labels."""

from pathlib import Path

import pytest
from image_sets import make_folder, write_image

from alexnet_mp.data.image_sets import list_source
from alexnet_mp.data.listing import Listing

CLASSES = ("n01440764", "n01443537", "n02007558")
VAL = [f"ILSVRC2012_val_0000000{k}" for k in range(1, 7)]
TRUE = [2, 0, 1, 1, 2, 0]  # places of the sorted class names
DEVKIT = {2: 1, 0: 3, 1: 2}  # the devkit's own numbers of the same classes
SYNSETS = "n02007558\nn01443537\nn01440764\n"  # in the devkit's order


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_folder(tmp_path / "set", ("train",), CLASSES, 2)
    for name in VAL:
        write_image(tmp_path / "set" / "val" / f"{name}.JPEG")
    return tmp_path / "set"


def labels(source: Path, text: str, synsets: str = "", name: str = "labels.txt") -> list[int]:
    file = source.parent / name
    file.write_text(text, encoding="utf-8")
    if synsets:
        (source.parent / "synsets.txt").write_text(synsets)
    listing = list_source(source, file, source.parent / "synsets.txt" if synsets else None)["val"]
    assert listing.classes == CLASSES
    assert all(
        listing.name(k).split("/")[0] == CLASSES[listing.labels[k]] for k in range(len(listing))
    )
    return in_order_of_names(listing)


def in_order_of_names(listing: Listing) -> list[int]:
    found = {Path(listing.name(k)).stem: int(listing.labels[k]) for k in range(len(listing))}
    assert sorted(found) == VAL
    return [found[name] for name in VAL]


def test_a_class_a_line_is_in_the_order_of_the_files_names(source: Path) -> None:
    assert labels(source, "".join(f"{CLASSES[k]}\n" for k in TRUE)) == TRUE


@pytest.mark.parametrize("suffix", ["", ".JPEG"])
@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_a_file_and_its_class_a_line_may_stand_in_any_order(
    source: Path, suffix: str, separator: str
) -> None:
    lines = [f"{name}{suffix}{separator}{CLASSES[k]}\n" for name, k in zip(VAL, TRUE, strict=True)]
    assert labels(source, "".join(lines[::-1])) == TRUE


def test_kaggles_solution_file_is_read_without_its_boxes(source: Path) -> None:
    rows = [
        f"{name},{CLASSES[k]} 85 1 499 272 {CLASSES[k]} 1 2 3 4 \n"
        for name, k in zip(VAL, TRUE, strict=True)
    ]
    assert (
        labels(
            source, "ImageId,PredictionString\n" + "".join(rows[::-1]), name="LOC_val_solution.csv"
        )
        == TRUE
    )


def test_the_devkits_numbers_alone_are_refused_with_what_they_are(source: Path) -> None:
    words = r"has numbers for classes, .* ILSVRC's devkit \(1 to 1000\) are its own.*--val-synsets"
    with pytest.raises(ValueError, match=words) as caught:
        labels(source, "".join(f"{DEVKIT[k]}\n" for k in TRUE))
    assert "\n" not in str(caught.value)


def test_the_devkits_numbers_with_its_synsets_are_the_classes_meant(source: Path) -> None:
    assert labels(source, "".join(f"{DEVKIT[k]}\n" for k in TRUE), SYNSETS) == TRUE


@pytest.mark.parametrize("line", ["{name} a fish, a bird", "{k} {name}"])
def test_caffes_numbers_count_from_zero(source: Path, line: str) -> None:
    synsets = "".join(line.format(k=k, name=name) + "\n" for k, name in enumerate(CLASSES))
    lines = [f"{name}.JPEG {k}\n" for name, k in zip(VAL, TRUE, strict=True)]
    assert labels(source, "".join(lines), synsets) == TRUE


def test_numbers_that_may_count_from_either_are_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="whether counting starts at 0 or 1 is not clear"):
        labels(source, "1\n2\n1\n2\n1\n2\n", SYNSETS)


def test_numbers_that_are_the_names_of_the_classes_are_just_names(tmp_path: Path) -> None:
    make_folder(tmp_path / "set", ("train",), ("1", "10", "2"), 2)
    for name in VAL:
        write_image(tmp_path / "set" / "val" / f"{name}.JPEG")
    (tmp_path / "labels.txt").write_text("2\n1\n10\n10\n2\n1\n")
    listing = list_source(tmp_path / "set", tmp_path / "labels.txt")["val"]
    assert in_order_of_names(listing) == TRUE


@pytest.mark.parametrize(
    "text, words",
    [
        ("n01440764\n", "1 classes for 6 images"),
        ("n99999999\n" * 6, "'n99999999' is not a class of the training images"),
        (
            "".join(f"{name} {CLASSES[0]}\n" for name in VAL[:5]),
            "does not name the class of .*val_00000006",
        ),
        ("".join(f"{name} {CLASSES[0]}\n" for name in [*VAL, VAL[0]]), "names a file twice"),
        ("\0\n", "1 classes for 6"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(
    source: Path, text: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        labels(source, text)
    assert "\n" not in str(caught.value)


def test_a_labels_file_that_is_no_text_is_named(source: Path) -> None:
    (source.parent / "labels.mat").write_bytes(b"MATLAB 5.0\xff\xfe")
    with pytest.raises(ValueError, match=r"labels\.mat: not a text file in UTF-8"):
        list_source(source, source.parent / "labels.mat")


def test_a_labels_file_that_is_not_there_is_named(source: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt: cannot be read"):
        list_source(source, source / "nowhere.txt")


def test_a_flat_val_folder_without_labels_is_refused_with_both_ways_out(source: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"but 6 images: sort them into .*/val/CLASS/, or .*launch/pack\.py --val-labels",
    ):
        list_source(source)


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_imagenets_archives_are_found_whichever_of_their_folders_is_named(
    tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", ("train", "val"), CLASSES, 2)
    write_image(root / "test" / "ILSVRC2012_test_00000001.JPEG")
    listings = list_source(tmp_path / given)
    assert {name: len(listing) for name, listing in listings.items()} == {
        "train": 6,
        "val": 6,
    }
    assert "test: left out, its 1 images have no labels" in capsys.readouterr().out


def test_a_source_without_train_is_refused(tmp_path: Path) -> None:
    for splits in ((), ("val", "test")):
        (tmp_path / "set").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no folder train in it"):
            list_source(make_folder(tmp_path / "set", splits))
