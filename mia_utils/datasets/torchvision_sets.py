"""CIFAR-10, CIFAR-100, STL-10 and Oxford-IIIT Pet through torchvision: downloaded on first use, with its progress bar.

An archive that lies in the data folder already is used and not downloaded again. torchvision.datasets is slow to
import, so each function does it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mia_utils.datasets import folders, pairs
from mia_utils.datasets.pool import VOID


def load_cifar10(root: Path) -> dict[str, Any]:
    """Return the 60,000 images of CIFAR-10 (32 x 32, 10 classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import CIFAR10

    return _read_cifar(CIFAR10, root, "cifar10", "cifar-10-python.tar.gz")


def load_cifar100(root: Path) -> dict[str, Any]:
    """Return the 60,000 images of CIFAR-100 (32 x 32, 100 fine classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import CIFAR100

    return _read_cifar(CIFAR100, root, "cifar100", "cifar-100-python.tar.gz")


def _read_cifar(make: Callable[..., Any], root: Path, name: str, archive: str) -> dict[str, Any]:
    parts, ids, split = [], [], []
    for part, train in (("train", True), ("test", False)):
        data = _open(partial(make, str(root), train=train, download=True), root, name, f"{archive} (170 MB)")
        names: list[str] = []
        for file_name, _ in data.train_list if train else data.test_list:
            # the original file names, which torchvision drops: as ids they do not depend on the order of a copy. The
            # files are pickles; torchvision has compared their checksums with the official ones just before
            with open(Path(root) / data.base_folder / file_name, "rb") as file:
                names += pickle.load(file, encoding="latin1")["filenames"]
        if len(set(names)) != len(data.data):
            names = [f"{i:05d}" for i in range(len(data.data))]
        parts.append(data)
        ids += [f"{part}/{file_name}" for file_name in names]
        split += [part] * len(data.data)
    return {
        "images": np.concatenate([data.data for data in parts]),
        "labels": np.concatenate([np.asarray(data.targets, dtype=np.int64) for data in parts]),
        "image_ids": np.array(ids),
        "official_split": np.array(split),
        "class_names": tuple(parts[0].classes),
    }


def load_stl10(root: Path) -> dict[str, Any]:
    """Return the 13,000 labeled images of STL-10 (96 x 96, 10 classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import STL10

    archive = "stl10_binary.tar.gz (2.6 GB)"
    make = partial(STL10, str(root), download=True)
    parts = {split: _open(partial(make, split=split), root, "stl10", archive) for split in ("train", "test")}
    images = np.concatenate([part.data for part in parts.values()])
    return {
        "images": np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
        "labels": np.concatenate([part.labels for part in parts.values()]).astype(np.int64),
        "image_ids": np.array([f"{name}/{i:05d}" for name, part in parts.items() for i in range(len(part.data))]),
        "official_split": np.repeat(list(parts), [len(part.data) for part in parts.values()]),
        "class_names": tuple(parts["train"].classes),
    }


def load_oxford_pets(root: Path, *, size: tuple[int, int]) -> dict[str, Any]:
    """Return the 7,349 images of Oxford-IIIT Pet (37 breeds; masks background, cat, dog) as the arrays of a ``Pool``.

    The outline between pet and background, which its makers did not decide, is void.
    """
    from torchvision.datasets import OxfordIIITPet

    archive = "the unpacked folder oxford-iiit-pet with images and annotations (810 MB)"
    files, kinds, labels, official, classes = [], [], [], [], []
    for split, name in (("trainval", "train"), ("test", "test")):
        data = _open(partial(OxfordIIITPet, str(root), split=split, download=True), root, "oxford_pets", archive)
        files += [(Path(image), Path(mask)) for image, mask in zip(data._images, data._segs, strict=True)]
        kinds += data._bin_labels
        labels += data._labels
        classes = classes or data.classes
        official += [name] * len(data._images)
    out = pairs.part(folders.decode(partial(pairs.read_pair, size=size), files, title="oxford_pets"))
    kind = np.array(kinds, np.uint8)[:, None, None] + 1  # 1 cat, 2 dog
    # trimap: 1 pet, 2 background, 3 not decided
    masks = np.where(out["masks"] == 1, kind, np.where(out["masks"] == 2, 0, VOID)).astype(np.uint8)
    return out | {
        "masks": masks,
        "labels": np.array(labels, np.int64),
        "image_ids": np.array([image.name for image, _ in files]),
        "official_split": np.array(official),
        "class_names": tuple(classes),
        "mask_class_names": ("background", "cat", "dog"),
    }


def _open(make: Callable[[], Any], root: Path, name: str, archive: str) -> Any:
    """Open a torchvision data set; whatever goes wrong becomes one line that says how to place the data."""
    try:
        return make()
    except Exception as error:  # network, disk, checksum, broken archive: torchvision raises many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FileNotFoundError(
            f"{name}: could not download it ({reason}): place {archive} or {name}.npz in {root}, see data/README.md"
        ) from error
