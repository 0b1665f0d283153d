"""CIFAR-10, CIFAR-100 and STL-10 through torchvision: downloaded on first use, with its progress bar.

An archive that lies in the data folder already is used and not downloaded again.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def load_cifar10(root: Path) -> dict[str, Any]:
    """Return the 60,000 images of CIFAR-10 (32 x 32, 10 classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import CIFAR10

    return _read_cifar(CIFAR10, root, "cifar10", "cifar-10-python.tar.gz", "170 MB")


def load_cifar100(root: Path) -> dict[str, Any]:
    """Return the 60,000 images of CIFAR-100 (32 x 32, 100 fine classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import CIFAR100

    return _read_cifar(CIFAR100, root, "cifar100", "cifar-100-python.tar.gz", "170 MB")


def load_stl10(root: Path) -> dict[str, Any]:
    """Return the 13,000 labeled images of STL-10 (96 x 96, 10 classes) as the arrays of a ``Pool``."""
    from torchvision.datasets import STL10

    archive = "stl10_binary.tar.gz"
    parts = {
        split: _open(lambda split=split: STL10(str(root), split=split, download=True), root, "stl10", archive, "2.6 GB")
        for split in ("train", "test")
    }
    split = np.concatenate([np.full(len(part.data), name) for name, part in parts.items()])
    ids = np.concatenate([[f"{name}/{i:05d}" for i in range(len(part.data))] for name, part in parts.items()])
    return {
        "images": np.ascontiguousarray(np.concatenate([p.data for p in parts.values()]).transpose(0, 2, 3, 1)),
        "labels": np.concatenate([p.labels for p in parts.values()]).astype(np.int64),
        "image_ids": ids,
        "official_split": split,
        "class_names": tuple(parts["train"].classes),
    }


def _read_cifar(make: Callable[..., Any], root: Path, name: str, archive: str, size: str) -> dict[str, Any]:
    images, labels, ids, split = [], [], [], []
    for part, train in (("train", True), ("test", False)):
        data = _open(lambda train=train: make(str(root), train=train, download=True), root, name, archive, size)
        images.append(data.data)
        labels.append(np.asarray(data.targets, dtype=np.int64))
        names = _read_file_names(Path(root) / data.base_folder, data.train_list if train else data.test_list)
        if len(set(names)) != len(data.data):
            names = [f"{i:05d}" for i in range(len(data.data))]
        ids += [f"{part}/{file_name}" for file_name in names]
        split += [part] * len(data.data)
    return {
        "images": np.concatenate(images),
        "labels": np.concatenate(labels),
        "image_ids": np.array(ids),
        "official_split": np.array(split),
        "class_names": tuple(data.classes),
    }


def _read_file_names(folder: Path, files: list[list[str]]) -> list[str]:
    """Read the original file names, which torchvision drops: as ids they do not depend on the order of a copy.

    The files are pickles; torchvision has compared their checksums with the official ones just before.
    """
    names: list[str] = []
    for file_name, _ in files:
        with open(folder / file_name, "rb") as file:
            names += pickle.load(file, encoding="latin1")["filenames"]
    return names


def _open(make: Callable[[], Any], root: Path, name: str, archive: str, size: str) -> Any:
    """Open a torchvision data set; whatever goes wrong becomes one line that says how to place the data."""
    try:
        return make()
    except Exception as error:  # network, disk, checksum, broken archive: torchvision raises many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise FileNotFoundError(
            f"{name}: could not download it ({reason}): place {archive} ({size}) or {name}.npz in {root}, "
            "see data/README.md"
        ) from error
