"""CIFAR-10, CIFAR-100, STL-10 and Oxford-IIIT Pet through torchvision: downloaded on first use, with its progress bar.

An archive that lies in the data folder is used and not downloaded again. torchvision.datasets is slow to import, so
each function does it. All return the arrays of a ``Pool``.
"""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mia_utils.datasets import cache, folders, pairs
from mia_utils.datasets.pool import VOID


def load_cifar(kind: str, root: Path) -> dict[str, Any]:
    """Return the 60,000 images (32 x 32) of ``CIFAR10`` or ``CIFAR100`` (100 fine classes)."""
    from torchvision import datasets

    name, archive = kind.lower(), f"cifar-{kind[5:]}-python.tar.gz (170 MB)"
    parts, ids, split = [], [], []
    for part, train in (("train", True), ("test", False)):
        make = partial(getattr(datasets, kind), str(root), train=train, download=True)
        data = cache.fetch(make, root, name, f"{archive} or {name}.npz")
        names: list[str] = []
        for file_name, _ in data.train_list if train else data.test_list:
            # the original file names, which torchvision drops: as ids they do not depend on the order of a copy. The
            # files are pickles; torchvision has compared their checksums with the official ones just before
            content = (Path(root) / data.base_folder / file_name).read_bytes()
            names += pickle.loads(content, encoding="latin1")["filenames"]
        if len(set(names)) != len(data.data):
            names = [f"{i:05d}" for i in range(len(data.data))]
        parts.append(data)
        ids += [f"{part}/{file_name}" for file_name in names]
        split += [part] * len(data.data)
    return {
        "images": np.concatenate([data.data for data in parts]),
        "labels": np.concatenate([data.targets for data in parts]).astype(np.int64),
        "image_ids": np.array(ids), "official_split": np.array(split), "class_names": tuple(parts[0].classes),
    }  # fmt: skip


def load_stl10(root: Path) -> dict[str, Any]:
    """Return the 13,000 labeled images of STL-10 (96 x 96, 10 classes)."""
    from torchvision.datasets import STL10

    make, archive = partial(STL10, str(root), download=True), "stl10_binary.tar.gz (2.6 GB) or stl10.npz"
    parts = {split: cache.fetch(partial(make, split=split), root, "stl10", archive) for split in ("train", "test")}
    return {
        "images": np.concatenate([part.data.transpose(0, 2, 3, 1) for part in parts.values()]),
        "labels": np.concatenate([part.labels for part in parts.values()]).astype(np.int64),
        "image_ids": np.array([f"{name}/{i:05d}" for name, part in parts.items() for i in range(len(part.data))]),
        "official_split": np.repeat(list(parts), [len(part.data) for part in parts.values()]),
        "class_names": tuple(parts["train"].classes),
    }


def load_oxford_pets(root: Path, *, size: tuple[int, int]) -> dict[str, Any]:
    """Return the 7,349 images of Oxford-IIIT Pet (37 breeds; masks background, cat, dog); the outlines are void."""
    from torchvision.datasets import OxfordIIITPet

    archive = "the unpacked folder oxford-iiit-pet with images and annotations (810 MB) or oxford_pets.npz"
    files, kinds, labels, official, classes = [], [], [], [], []
    for split in ("trainval", "test"):
        make = partial(OxfordIIITPet, str(root), split=split, download=True)
        data = cache.fetch(make, root, "oxford_pets", archive)
        files += [(Path(image), Path(mask)) for image, mask in zip(data._images, data._segs, strict=True)]
        classes = classes or data.classes
        kinds += data._bin_labels
        labels += data._labels
        official += [split.removesuffix("val")] * len(data._images)
    out = pairs.part(folders.decode(partial(pairs.read_pair, size=size), files, title="oxford_pets"))
    kind = np.array(kinds, np.uint8)[:, None, None] + 1  # 1 cat, 2 dog
    # trimap: 1 pet, 2 background, 3 the outline, which its makers did not decide
    masks = np.where(out["masks"] == 1, kind, np.where(out["masks"] == 2, 0, VOID)).astype(np.uint8)
    return out | {
        "masks": masks, "mask_class_names": ("background", "cat", "dog"),
        "labels": np.array(labels, np.int64), "class_names": tuple(classes),
        "image_ids": np.array([image.name for image, _ in files]), "official_split": np.array(official),
    }  # fmt: skip
