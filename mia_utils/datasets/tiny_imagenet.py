"""Tiny ImageNet as its archive is unpacked: 64 x 64, 200 classes, 100,000 train and 10,000 val images."""

from pathlib import Path
from typing import Any

import numpy as np

from mia_utils.datasets import folders


def load_tiny_imagenet(root: Path) -> dict[str, Any]:
    """Read ``tiny-imagenet-200`` in ``root`` as the arrays of a ``Pool``; another layout is one line that names it."""
    folder = Path(root) / "tiny-imagenet-200"
    annotations, words = folder / "val" / "val_annotations.txt", folder / "words.txt"
    wnids = sorted(p.parent.name for p in folder.glob("train/*/images"))
    if not wnids or not annotations.is_file():
        raise FileNotFoundError(
            f"tiny_imagenet: expected {folder} with train/WNID/images/*.JPEG, val/images/*.JPEG and "
            "val/val_annotations.txt: unpack tiny-imagenet-200.zip (240 MB) of the Stanford course CS231n there"
        )
    files = [(p, w, "train") for w in wnids for p in sorted((folder / "train" / w / "images").glob("*.JPEG"))]
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")  # file name, wnid, then a box
        wnid = rest.partition("\t")[0]
        if wnid not in wnids:
            raise ValueError(f"{annotations}, line {number}: expected 'FILE<tab>WNID', got {line[:60]!r}: unpack again")
        files.append((folder / "val" / "images" / name, wnid, "val"))
    lines = [line.partition("\t") for line in words.read_text().splitlines()] if words.is_file() else []
    names = {wnid: text.split(",")[0].strip() for wnid, _, text in lines}
    paths, labels, splits = zip(*files, strict=True)
    return {
        "images": folders.decode(folders.read_image, [(path,) for path in paths], title="tiny_imagenet"),
        "labels": np.searchsorted(wnids, labels), "official_split": np.array(splits),
        "image_ids": np.array([f"{split}/{path.name}" for path, split in zip(paths, splits, strict=True)]),
        "class_names": tuple(names.get(wnid) or wnid for wnid in wnids),
    }  # fmt: skip
