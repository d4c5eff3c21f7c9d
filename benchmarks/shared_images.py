"""Images that many trainings share: brought to the side of their crops once, then mapped by all."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from alexnet_mp.config import Config
from alexnet_mp.config.files import commit_folder, temporary_path
from alexnet_mp.data import load


def shared_images(config: Config, out: Path) -> dict[str, str]:
    """The fields that make `config` read the images that `share_images` has prepared in `out`."""
    side = config.data.resized_side(config.model.image_size)
    if config.data.data == "shapes":
        return {}
    key = f"{config.data.data} {config.data.data_dir} {side}"
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    return {"data": "store", "data_dir": str(out / "images" / name)}


def share_images(config: Config, out: Path) -> None:
    """Brings all images of `config` to the side that its crops are cut from, once, as a store."""
    fields = shared_images(config, out)
    if not fields or Path(fields["data_dir"]).exists():
        return
    path, side = Path(fields["data_dir"]), config.data.resized_side(config.model.image_size)
    whole = {"validation": "val", "limit_train": 0, "limit_val": 0, "limit_test": 0}
    unchanged = {"mean": "none", "color_noise": 0.0}  # so that nothing is measured on the images
    splits = load(replace(config.data, **whole | unchanged), 0, progress=True)
    stores = {"train": splits.train, "test": splits.test}
    if splits.validation == "own split":
        stores["val"] = splits.val
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    for split, store in stores.items():
        print(f"{split}: {len(store):,} images, to {side} pixels, once for all", flush=True)
        store.resized(side).save(temporary / split)
    try:
        commit_folder(temporary, path)
    except OSError:  # another program with this --out was faster
        if not path.exists():
            raise
        shutil.rmtree(temporary)
