"""Writes a folder of images in the other forms that people hold: tars, webdataset, Parquet, and
ImageNet's own archives.
"""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

WNIDS = ("n01440764", "n01443537", "n02007558")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def make_tar(folder: Path, target: Path, mode: str = "w", seed: int | None = None) -> Path:
    """A tar of `folder`, SPLIT/CLASS/FILE; with a seed its members are shuffled."""
    files = images_of(folder)
    if seed is not None:
        random.Random(seed).shuffle(files)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, mode) as archive:
        for path in files:
            add(archive, path.relative_to(folder).as_posix(), path.read_bytes())
    return target


def samples_of(folder: Path, seed: int) -> Iterator[tuple[int, Path]]:
    """The images of CLASS/FILE with the numbers of their classes, shuffled."""
    names = sorted(path.name for path in folder.iterdir())
    files = images_of(folder)
    random.Random(seed).shuffle(files)
    return ((names.index(path.parent.name), path) for path in files)


def make_shards(folder: Path, target: Path, each: int = 50, classes: bool = True) -> Path:
    """webdataset shards of all splits, `jpg` and `cls`, as its ShardWriter writes them."""
    target.mkdir(parents=True, exist_ok=True)
    for split in sorted(path.name for path in folder.iterdir()):
        samples = list(samples_of(folder / split, seed=1))
        unique = len({path.stem for _, path in samples}) == len(samples)
        for number, start in enumerate(range(0, len(samples), each)):
            with tarfile.open(target / f"set-{split}-{number:04d}.tar", "w") as archive:
                for label, path in samples[start : start + each]:
                    key = path.stem if unique else f"{path.parent.name}/{path.stem}"
                    add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.jpg", path.read_bytes())
    if classes:
        names = sorted(path.name for path in (folder / "train").iterdir())
        (target / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return target


def make_parquet(
    folder: Path,
    target: Path,
    each: int = 80,
    group: int = 16,
    names: list[str] | None = None,
    extension: bool = True,
) -> Path:
    """Parquet files of all splits as `datasets` writes them, image {bytes, path} and label.

    Without `extension` a path is only the name before it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if names is None:
        names = sorted(path.name for path in (folder / "train").iterdir())
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = json.dumps({"info": {"features": features}})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], {"huggingface": about})
    (target / "data").mkdir(parents=True, exist_ok=True)

    def name_of(path: Path) -> str:
        return path.name if extension else path.stem

    for split in sorted(path.name for path in folder.iterdir()):
        samples = list(samples_of(folder / split, seed=2))
        starts = range(0, len(samples), each)
        for number, start in enumerate(starts):
            rows = [
                {"image": {"bytes": path.read_bytes(), "path": name_of(path)}, "label": label}
                for label, path in samples[start : start + each]
            ]
            name = {"val": "validation"}.get(split, split)
            file = target / "data" / f"{name}-{number:05d}-of-{len(starts):05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=group)
    return target


def make_ilsvrc(folder: Path, target: Path) -> Path:
    """ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, whose members are in no order.

    The images of val get the names that they have there, by which their classes are known.
    """
    target.mkdir(parents=True)
    wnids = sorted(path.name for path in (folder / "train").iterdir())
    with tarfile.open(target / "ILSVRC2012_img_train.tar", "w") as train:
        for wnid in [*wnids[1:], wnids[0]]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for path in sorted((folder / "train" / wnid).iterdir(), reverse=True):
                    add(archive, path.name, path.read_bytes())
            add(train, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(target / "ILSVRC2012_img_val.tar", "w") as val:
        for number, path in enumerate(validation_images(folder)):
            add(val, f"ILSVRC2012_val_{number + 1:08d}.JPEG", path.read_bytes())
    return target


def validation_images(folder: Path) -> list[Path]:
    """The images of val in the order of their numbers, in which the classes take turns."""
    return sorted((folder / "val").rglob("*.*"), key=lambda path: (path.name, path.parent.name))


def make_devkit(path: Path, folder: Path, numbers: list[int] | None = None) -> Path:
    """The devkit of the images of `folder`, with an inner node of the tree besides the leaves.

    `numbers`: other classes of the validation images than the true ones.
    """
    import numpy as np
    from scipy.io import savemat

    wnids = sorted(path.name for path in (folder / "train").iterdir())
    number_of = {wnid: k + 1 for k, wnid in enumerate([*wnids[1:], wnids[0]])}  # not in their order
    rows = [(number, wnid, 0) for wnid, number in number_of.items()] + [(1001, "n00001740", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, kinds).reshape(-1, 1)})
    if numbers is None:
        numbers = [number_of[path.parent.name] for path in validation_images(folder)]
    truth = "data/ILSVRC2012_validation_ground_truth.txt"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", mat.getvalue())
        text = "".join(f"{number}\n" for number in numbers)
        add(archive, f"ILSVRC2012_devkit_t12/{truth}", text.encode())
    return path
