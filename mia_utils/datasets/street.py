"""Street scenes that need an account at their owners: Cityscapes, BDD100K, Mapillary Vistas; folders you place."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mia_utils.datasets import folders, pairs
from mia_utils.datasets.labels import get_label_space, make_mapillary_table
from mia_utils.datasets.pool import VOID, make_blocks

# Every layout a data set is distributed in: images, what to replace in their paths to name the masks, and the file
# that lists the classes where the data set has its own.
LAYOUTS = {
    "cityscapes": [
        ("leftImg8bit/{split}/*/*_leftImg8bit.png", {"leftImg8bit/": "gtFine/", "leftImg8bit.": "gtFine_labelIds."}, "")
    ],
    "bdd100k": [
        ("images/10k/{split}/*.jpg", {"images/10k/": "labels/sem_seg/masks/", ".jpg": ".png"}, ""),
        ("seg/images/{split}/*.jpg", {"images/": "labels/", ".jpg": "_train_id.png"}, ""),
    ],
    "mapillary": [
        ("{split}/images/*.jpg", {"images/": "v1.2/labels/", ".jpg": ".png"}, "config_v1.2.json"),
        ("{split}/images/*.jpg", {"images/": "labels/", ".jpg": ".png"}, "config.json"),
        ("{split}/images/*.jpg", {"images/": "v2.0/labels/", ".jpg": ".png"}, "config_v2.0.json"),
    ],
}
SPLITS = {"mapillary": {"training": "train", "validation": "val"}}
WHERE = {
    "cityscapes": "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com",
    "bdd100k": "'10K Images' and 'Segmentation' of the Berkeley DeepDrive download page",
    "mapillary": "Mapillary Vistas from mapillary.com",
}


def load_street(name: str, root: Path, *, size: tuple[int, int]) -> dict[str, Any]:
    """Read street scenes in any layout they are distributed in, with Cityscapes' 19 classes, as arrays of a ``Pool``.

    Cityscapes' groups are blocks of neighbors within each city: no corner is on two sides, every city on both.
    """
    folder, splits = Path(root) / name, SPLITS.get(name, {"train": "train", "val": "val"})
    for images, changes, config in LAYOUTS[name]:
        files, official = [], []
        for split, its_official in splits.items():
            found = [(image, _name_mask(image, folder, changes)) for image in folder.glob(images.format(split=split))]
            if any(mask.parent.is_dir() for _, mask in found) and (folder / config).exists():
                files += sorted(found)
                official += [its_official] * len(found)
        if files:
            break
    else:
        images, changes, config = LAYOUTS[name][0]
        images = images.format(split="{" + ",".join(splits) + "}")
        parts = " and ".join(filter(None, [images, _name_mask(Path(images), Path(), changes).as_posix(), config]))
        raise FileNotFoundError(f"{name}: expected {folder} with {parts}: unpack {WHERE[name]} (free account) there")
    out, heads = pairs.part(folders.decode(partial(pairs.read_pair, size=size), files, title=name)), official
    if name == "cityscapes":
        heads, out["masks"] = [image.parent.name for image, _ in files], _make_cityscapes_table()[out["masks"]]
    elif config:
        out["masks"] = read_mapillary_table(folder / config)[out["masks"]]
    out["image_ids"] = np.array([f"{head}/{image.name}" for head, (image, _) in zip(heads, files, strict=True)])
    if name == "cityscapes":
        out["groups"] = make_blocks(out["image_ids"], np.array(heads))
    classes = get_label_space("cityscapes")
    pairs.check_ids(out["masks"], [mask for _, mask in files], len(classes))
    return out | {"official_split": np.array(official), "class_names": classes}


def _name_mask(image: Path, folder: Path, changes: dict[str, str]) -> Path:
    name = image.relative_to(folder).as_posix()
    for old, new in changes.items():
        name = name.replace(old, new)
    return folder / name


def _make_cityscapes_table() -> np.ndarray:
    from torchvision.datasets import Cityscapes  # slow to import

    table = np.full(256, VOID, np.uint8)
    for entry in Cityscapes.classes:
        if 0 <= entry.train_id < VOID and entry.id >= 0:
            table[entry.id] = entry.train_id
    return table


def read_mapillary_table(config: Path) -> np.ndarray:
    """Read the ids of a Mapillary Vistas release from its ``config*.json``. -> (256,) uint8 id -> class of the 19"""
    try:
        names = [str(label["name"]) for label in json.loads(Path(config).read_text(encoding="utf-8"))["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: expected a list 'labels' of classes with a 'name' ({error})") from None
    table = make_mapillary_table(names)
    if (table == VOID).all():
        raise ValueError(f"{config}: none of its {len(names)} class names is known: expected version 1.2 or 2.0")
    return table
