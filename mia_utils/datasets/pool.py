"""The pool: images, labels and ids as every source returns them and every experiment takes them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mia_utils.datasets.cache import MappedImages, join_images

VOID = 255  # label of pixels without a class, in every pool
VIDEO_BLOCK = 8  # consecutive frames that are never split: neighbors are near twins
# Name of each array, its type and its shape; the order is part of ``Pool.hash``.
ARRAYS = {
    "images": ("uint8", "N H W 3"),
    "labels": ("integer", "N"),
    "image_ids": ("str", "N"),
    "official_split": ("str", "N"),
    "class_names": ("str", "C"),
    "masks": ("uint8", "N H W"),
    "mask_class_names": ("str", "M"),
    "groups": ("str", "N"),
    "part_boxes": ("float", "N P 4"),
    "part_names": ("str", "P"),
}
KINDS = {"uint8": "u", "integer": "iu", "str": "U", "float": "f"}


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """Images that one experiment draws from; nothing in it depends on who is a member.

    Attributes:
        name: name of the data set.
        images: (N, H, W, 3) uint8; of a streamed pool ``MappedImages``, read by ``np.asarray(pool.images[rows])``.
        labels: (N,) int64 positions in ``class_names``; zeros where images have no single class (segmentation).
        image_ids: (N,) str, unique, given by the source; random streams are keyed by them.
        official_split: (N,) str such as ``train`` and ``test``.
        class_names: names of the labels (of the mask classes where there are masks and no labels).
        masks: (N, H, W) uint8 class of each pixel, void 255.
        groups: (N,) str, the smallest unit that is never split. ``DRIVE/BLOCK`` is stratified by ``DRIVE``.
        part_boxes, part_names: (N, P, 4) float32 y0, x0, y1, x1 in pixels, NaN where a part is absent; P names.
        mask_class_names: names of the mask classes where they differ from ``class_names``.
    """

    name: str
    images: np.ndarray | MappedImages
    labels: np.ndarray
    image_ids: np.ndarray
    official_split: np.ndarray | None
    class_names: tuple[str, ...]
    masks: np.ndarray | None = None
    groups: np.ndarray | None = None
    part_boxes: np.ndarray | None = None
    part_names: tuple[str, ...] | None = None
    mask_class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for key, value in check_arrays(self.arrays, where=f"pool {self.name!r}").items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        n, h, w, _ = self.images.shape
        also = ", ".join(key for key in ("official_split", "masks", "groups", "part_boxes") if key in self.arrays)
        text = f", with {also}" * bool(also) + ", streamed" * isinstance(self.images, MappedImages)
        return f"Pool({self.name!r}: {n} images of {h} x {w}, {len(self.class_names)} classes{text})"

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by name."""
        return {key: getattr(self, key) for key in ARRAYS if getattr(self, key) is not None}

    @cached_property
    def hash(self) -> str:
        """blake2b of every array, 16 hex digits: equal for equal data, wherever it came from."""
        digest = hashlib.blake2b(digest_size=8)
        for key, value in self.arrays.items():
            if isinstance(value, tuple) or value.dtype.kind == "U":
                # the width of a numpy string type depends on its longest entry in the file: hash the text
                value = np.frombuffer("\x1f".join(map(str, value)).encode(), dtype=np.uint8)
            digest.update(f"{key} {value.dtype} {value.shape};".encode())
            for start in range(0, len(value), 256):  # streamed images are read a part at a time
                digest.update(np.ascontiguousarray(value[start : start + 256]))
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> "Pool":
        """Return the pool of the images at ``index`` (int positions or a bool mask), in that order."""
        return replace(self, **{key: value[index] for key, value in self.arrays.items() if ARRAYS[key][1][0] == "N"})


def check_arrays(arrays: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check the arrays of a pool and bring them to their types (zeros for missing labels where there are masks).

    A wrong one is one line that names it and ``where`` it lies.
    """
    if unknown := sorted(set(arrays) - set(ARRAYS)):
        raise ValueError(f"{where}: unknown array {unknown[0]!r}, expected some of {', '.join(ARRAYS)}: remove it")
    for key in ("images", "image_ids", "class_names", *(() if "masks" in arrays else ("labels",))):
        if key not in arrays:
            raise ValueError(f"{where}: array {key!r} is missing, found {', '.join(sorted(arrays)) or 'nothing'}")
    out = {key: value if isinstance(value, MappedImages) else np.asarray(value) for key, value in arrays.items()}
    lengths = {"3": 3, "4": 4}
    for key, (kind, shape) in ARRAYS.items():
        if key not in out:
            continue
        value, names, known = out[key], shape.split(), lengths.copy()
        fits = value.dtype.kind in KINDS[kind] and (kind != "uint8" or value.dtype == np.uint8)
        fits = fits and value.ndim == len(names) and 0 not in value.shape
        if not fits or any(lengths.setdefault(d, n) != n for d, n in zip(names, value.shape, strict=True)):
            sizes = ", ".join(f"{d} = {known[d]}" for d in names if d in known and d.isalpha())
            shape = f"({', '.join(names)}{',' * (len(names) == 1)})"
            rule = f"where {sizes}" if sizes else "with at least 1 of each"
            raise ValueError(f"{where}: {key} is {_describe(value)}, expected {kind} {shape} {rule}")
        if kind == "str" and shape != "N":
            out[key] = tuple(map(str, value))
    if ("part_boxes" in out) != ("part_names" in out):
        raise ValueError(f"{where}: part_boxes and part_names belong together, only one is there: add the other")
    ids, counts = np.unique(out["image_ids"], return_counts=True)
    if len(again := ids[counts > 1]):
        raise ValueError(f"{where}: image_ids repeats {len(again)} ids, such as {str(again[0])!r}: make them unique")
    out["labels"] = np.asarray(out.get("labels", np.zeros(lengths["N"])), dtype=np.int64)
    low, high, n = out["labels"].min(), out["labels"].max(), len(out["class_names"])
    if low < 0 or high >= n:
        raise ValueError(f"{where}: labels run from {low} to {high}, expected 0 to {n - 1} for the {n} class_names")
    if "masks" in out:
        n = len(out.get("mask_class_names", out["class_names"]))
        if wrong := [i for i in find_ids(out["masks"]) if i >= n and i != VOID]:
            known = f"0 to {n - 1} for the {n} class names, or {VOID} for void"
            raise ValueError(f"{where}: masks holds the value {wrong[0]}, expected {known}")
    return out


def find_ids(masks: np.ndarray) -> np.ndarray:
    """Return the values that occur in masks uint8 (N, H, W), ascending."""
    return np.flatnonzero(np.sum([np.bincount(mask.ravel(), minlength=256) for mask in masks], axis=0))


def _describe(value: np.ndarray) -> str:
    """Describe an array of a wrong type or shape so that the reader knows what to change."""
    if value.dtype.kind == "f" and value.size:
        if n_nan := int(np.isnan(value).sum()):
            return f"{value.dtype} {value.shape} with {n_nan} NaN"
        if value.min() >= 0 and value.max() <= 1:
            return f"{value.dtype} in [0, 1] (multiply by 255, round and convert)"
    return f"{value.dtype} {value.shape}"


def to_float(images: np.ndarray) -> torch.Tensor:
    """Turn images (N, H, W, 3) uint8, in memory or streamed, into (N, 3, H, W) float32 in [0, 1], contiguous."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def make_blocks(image_ids: np.ndarray, drives: np.ndarray, *, length: int = VIDEO_BLOCK) -> np.ndarray:
    """Cut each drive (N,) str into blocks of consecutive frames; ids (N,) str are in the order of time within a drive.

    Returns:
        (N,) str ``DRIVE/BLOCK``, for example ``0001TP/003``; the last block of a drive may be shorter.
    """
    groups = np.empty(len(drives), dtype=object)
    for drive in np.unique(drives):
        here = np.flatnonzero(drives == drive)
        for i, position in enumerate(here[np.argsort(image_ids[here], kind="stable")]):
            groups[position] = f"{drive}/{i // length:03d}"
    return groups.astype(np.str_)


def join_pools(a: Pool, b: Pool, *, name: str = "audit") -> tuple[Pool, np.ndarray]:
    """Join images known to be in (a) and out (b) of a training set: the pool of an audit.

    Returns:
        (Pool, is_member (N,) bool); image ids and groups get a prefix.
    """
    if a.images.shape[1:] != b.images.shape[1:]:
        raise ValueError(f"expected images of one size, got {a.images.shape[1:3]} and {b.images.shape[1:3]}")
    if (a.masks is None) != (b.masks is None):
        raise ValueError("expected label maps for both sets, got them on one side only")
    for key in ("class_names", "mask_class_names"):
        if getattr(a, key) != getattr(b, key):
            raise ValueError(f"expected the same {key} on both sides: give both folders the same classes.txt")

    def prefix(key: str) -> np.ndarray:
        # a side without groups: every image is one of its own
        sides = [pool.image_ids if getattr(pool, key) is None else getattr(pool, key) for pool in (a, b)]
        return np.concatenate([np.strings.add("suspected/", sides[0]), np.strings.add("reference/", sides[1])])

    joint = replace(
        a, name=name, images=join_images([a.images, b.images]), labels=np.concatenate([a.labels, b.labels]),
        image_ids=prefix("image_ids"), masks=None if a.masks is None else np.concatenate([a.masks, b.masks]),
        groups=None if a.groups is None and b.groups is None else prefix("groups"),
        **dict.fromkeys(("official_split", "part_boxes", "part_names")),
    )  # fmt: skip
    return joint, np.repeat([True, False], [len(a), len(b)])
