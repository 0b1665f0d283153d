"""Pools of images: one array format, one cache format, one function for every source.

``load(name)`` looks for the cache ``<root>/<name>.npz`` (the array names of ``Pool``), else asks the source and
writes the cache. Your own data set is one of three things: a folder (``folder:PATH``), an npz file with these array
names in ``data/raw``, or one function given to ``register_source``. A folder that memory does not hold is streamed:
``load("folder:PATH", size=224, stream=True)``.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from mia_utils import paths, seeds
from mia_utils.datasets import folders, segmentation_sets, torchvision_sets
from mia_utils.datasets.folders import ImageFiles
from mia_utils.datasets.segmentation_sets import join_pools, map_labels  # noqa: F401 - public names

VOID = 255  # label of pixels without a class, in every pool
SCENE_STYLES = ("scenes", "scenes-night", "scenes-sketch")
CARELESS = ("frames", "official")  # NAME@frames, NAME@official: a film as it should not be split
CAMVID_BLOCK = 8  # consecutive frames that are never split: neighbors are near twins
ARRAYS = (
    "images",
    "labels",
    "image_ids",
    "official_split",
    "class_names",
    "masks",
    "mask_class_names",
    "groups",
    "part_boxes",
    "part_names",
)


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """Images that one experiment draws from; nothing in it depends on who is a member.

    Attributes:
        name: name of the data set.
        images: (N, H, W, 3) uint8; of a streamed pool ``ImageFiles``, decoded by ``np.asarray(pool.images[rows])``.
        labels: (N,) int64 in [0, len(class_names)); zeros where images have no single class (segmentation).
        image_ids: (N,) str, unique, given by the source; random streams are keyed by them.
        official_split: (N,) str such as ``train`` and ``test``, or None.
        class_names: names of the labels (of the mask classes where there are masks and no labels).
        masks: (N, H, W) uint8 class of each pixel, void 255, or None.
        groups: (N,) str, the smallest unit that is never split, or None. ``DRIVE/BLOCK`` is stratified by ``DRIVE``.
        part_boxes: (N, P, 4) float32 y0, x0, y1, x1 in pixels, NaN where a part is absent, or None.
        part_names: names of the P parts, or None.
        mask_class_names: names of the mask classes where they differ from ``class_names``, or None.

    Raises:
        ValueError: an array of wrong type or shape, lengths that differ, repeated ids, labels out of range.
    """

    name: str
    images: np.ndarray | ImageFiles
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
        given = {key: getattr(self, key) for key in ARRAYS if getattr(self, key) is not None}
        for key, value in check_arrays(given, where=f"pool {self.name!r}").items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        n, h, w, _ = self.images.shape
        extra = [key for key in ("official_split", "masks", "groups", "part_boxes") if getattr(self, key) is not None]
        also = f", with {', '.join(extra)}" if extra else ""
        also += ", streamed" if isinstance(self.images, ImageFiles) else ""
        return f"Pool({self.name!r}: {n} images of {h} x {w}, {len(self.class_names)} classes{also})"

    @cached_property
    def hash(self) -> str:
        """blake2b of every array, 16 hex digits: equal for equal data, wherever it came from.

        Of streamed images the files' bytes are hashed, all read once, not the pixels: another hash than in memory.
        """
        digest = hashlib.blake2b(digest_size=8)
        for key in ARRAYS:
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, tuple) or value.dtype.kind == "U":
                # the width of a numpy string type depends on its longest entry in the file: hash the text
                value = np.frombuffer("\x1f".join(map(str, value)).encode(), dtype=np.uint8)
            digest.update(f"{key} {value.dtype} {value.shape};".encode())  # the shape says what files are scaled to
            digest.update(np.ascontiguousarray(value.digests if isinstance(value, ImageFiles) else value))
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> Pool:
        """Return the pool of the images at ``index`` (int positions or a bool mask), in that order."""
        per_image = ("images", "labels", "image_ids", "official_split", "masks", "groups", "part_boxes")
        return replace(self, **{k: getattr(self, k)[index] for k in per_image if getattr(self, k) is not None})


Loader = Callable[[Path], "Pool | Mapping[str, Any]"]
SOURCES: dict[str, Loader] = {}


def register_source(name: str, loader: Loader, *, overwrite: bool = False) -> None:
    """Make a data set available to ``load`` under a name.

    Args:
        name: name of the data set; also the name of its cache file.
        loader: function of the data folder (``Path``) that returns a ``Pool``, or a dict with the array names of
            ``Pool``. It is called once; afterwards the cache is read.
        overwrite: replace a source of the same name.

    Raises:
        ValueError: the name is taken or could not be a file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"expected a source name of letters, digits, '-', '_' and '.', got {name!r}: rename it")
    if (name in SOURCES or name in SCENE_STYLES) and not overwrite:
        raise ValueError(f"a source called {name!r} exists: choose another name or pass overwrite=True")
    if name in SCENE_STYLES:
        raise ValueError(f"{name!r} is generated and can not be overwritten: choose another name")
    SOURCES[name] = loader


def list_names() -> list[str]:
    """Return the names that ``load`` knows (``folder:PATH`` stands for any image folder)."""
    return [*SCENE_STYLES, *sorted(SOURCES), "folder:PATH"]


def load(
    name: str,
    root: str | Path | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    n: int | None = None,
    seed: int = 0,
    stream: bool = False,
) -> Pool:
    """Load a pool by name.

    Images that come from files are in the order of their ids, so the same data from another source is the same pool.

    Args:
        name: a name of ``list_names()``, ``folder:PATH`` (with ``images`` and ``masks`` in it: pairs), or the name of
            an npz file in ``root``. ``NAME@SPACE`` maps the masks to ``cityscapes``, ``camvid`` or ``scenes`` classes;
            ``NAME@frames`` forgets the groups, ``NAME@official`` cuts them at the border of the official split.
        root: folder of downloads and caches; None is ``MIA_DATA_DIR``, else ``data/raw``. ``scenes`` need none.
        size: height = width in pixels, or (height, width); scenes are drawn at this size (None: 32), others are
            scaled to cover it and center-cropped (Pillow bicubic; masks nearest). None keeps what is stored.
        n: number of images: scenes are generated (None: 3,000), of other sets n are drawn without replacement.
        seed: which scenes, or which n images.
        stream: leave the images of a folder in their files, for sets that memory does not hold (``ImageFiles``).

    Returns:
        Pool

    Raises:
        ValueError: unknown name, or data that is damaged, of wrong type, or too few. One line.
        FileNotFoundError: missing folder or file. One line.
    """
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a data set, got {name!r}: one of {', '.join(list_names())}")
    if stream and not name.startswith("folder:"):
        raise ValueError(
            f"stream=True reads image folders (folder:PATH), got {name!r}, which is one cache file: leave it out"
        )
    if "@" in name and not name.startswith("folder:"):  # the same pictures, their masks in another label space
        source, _, space = name.partition("@")
        if space in CARELESS:
            return _split_carelessly(load(source, root, size=size, n=n, seed=seed), space)
        return map_labels(load(source, root, size=size, n=n, seed=seed), space)
    height_width = _check_size(size)
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        raise ValueError(f"expected n to be a positive number of images, got {n!r}")
    if name in SCENE_STYLES:
        if height_width and height_width[0] != height_width[1]:
            raise ValueError(f"expected one size for {name}, which are square, got {size}")
        side = height_width[0] if height_width else 32
        return _load_scenes(name, side, 3000 if n is None else int(n), int(seed), _find_root(root, needed=False))
    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser()
        read = segmentation_sets.read_pairs if segmentation_sets.is_pairs(folder) else folders.read_folder
        arrays = read(folder, size=height_width, n=n, seed=seed, stream=stream)
        return _make_pool(f"folder:{folder.resolve().name}", arrays, where=str(folder))
    known = name in SOURCES
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(list_names())}")
    folder = _find_root(root, needed=known)
    ours = known and SOURCES[name] is segmentation_sets.LOADERS.get(name)  # not a source the user put in its place
    at_size = ours and name in segmentation_sets.DEFAULT_SIZES  # large photographs: one cache file for each size
    if at_size:
        height_width = height_width or segmentation_sets.DEFAULT_SIZES[name]
    cache = folder and _find_cache(folder, name, height_width)
    if (
        at_size
        and cache
        and cache != _name_cache(folder, name, height_width)
        and segmentation_sets.is_here(name, folder)
    ):
        cache = None  # of another size, and the photographs are here: read them again rather than scale twice
    if cache is None and not known:
        raise ValueError(
            f"unknown data set {name!r}: expected one of {', '.join(list_names())}, or a file {name}.npz in "
            f"{folder or root or paths.get_raw_dir()}"
        )
    if cache is None:
        if ours:
            segmentation_sets.check_source(name, folder)  # nothing to make: say so without touching the folder
        cache = _make_cache(name, folder, SOURCES[name], height_width if at_size else None)
    pool = _make_pool(name, read_cache(cache), where=str(cache))
    if n is not None:
        if n > len(pool):
            raise ValueError(f"expected at most {len(pool)} images from {name}, got n={n}")
        if n < len(pool):
            keep = seeds.rng(seed, "datasets.load", name).choice(len(pool), size=n, replace=False)
            pool = pool.take(np.sort(keep))
    return _resize(pool, height_width)


def _split_carelessly(pool: Pool, how: str) -> Pool:
    """The same pictures, to be split as they should not be: notebook 06 shows what comes of it."""
    if pool.groups is None:
        raise ValueError(f"{pool.name}@{how}: data set {pool.name!r} has no groups, its images are split one by one")
    if how == "frames":  # drawn one by one, as if neighbors in a film were independent
        return replace(pool, name=f"{pool.name}@frames", groups=None)
    if pool.official_split is None:
        raise ValueError(f"{pool.name}@official: data set {pool.name!r} has no official split")
    # the official border may cut a block: its two sides are different groups here
    groups = np.strings.add(pool.groups, np.strings.add("-", pool.official_split))
    return replace(pool, name=f"{pool.name}@official", groups=groups)


def to_float(images: np.ndarray) -> torch.Tensor:
    """Turn stored images into what encoders take.

    Args:
        images: (N, H, W, 3) uint8, in memory or streamed.

    Returns:
        (N, 3, H, W) float32 in [0, 1], contiguous.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images (N, H, W, 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def make_blocks(image_ids: np.ndarray, drives: np.ndarray, *, length: int = CAMVID_BLOCK) -> np.ndarray:
    """Cut each drive into blocks of consecutive frames.

    Args:
        image_ids: (N,) str whose order within a drive is the order in time.
        drives: (N,) str.
        length: frames a block; the last one of a drive may be shorter.

    Returns:
        (N,) str ``DRIVE/BLOCK``, for example ``0001TP/003``.
    """
    groups = np.empty(len(drives), dtype=object)
    for drive in np.unique(drives):
        here = np.flatnonzero(drives == drive)
        for i, position in enumerate(here[np.argsort(image_ids[here], kind="stable")]):
            groups[position] = f"{drive}/{i // length:03d}"
    return groups.astype(np.str_)


# ---------------------------------------------------------------------------------------------- checks


def check_arrays(arrays: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check the arrays of a pool and bring them to their types.

    Args:
        arrays: array name to array; the names are those of ``Pool``.
        where: file or pool that errors name.

    Returns:
        dict with the same names; labels int64, names as tuples; labels are zeros where only masks are given.

    Raises:
        ValueError: one line that names ``where`` and the array.
    """
    unknown = sorted(set(arrays) - set(ARRAYS))
    if unknown:
        raise ValueError(f"{where}: unknown array {unknown[0]!r}, expected some of {', '.join(ARRAYS)}: remove it")
    for key in ("images", "image_ids", "class_names"):
        if key not in arrays:
            raise ValueError(f"{where}: array {key!r} is missing, found {', '.join(sorted(arrays)) or 'nothing'}")
    if "labels" not in arrays and "masks" not in arrays:
        raise ValueError(f"{where}: array 'labels' is missing (only pools with 'masks' may leave it out)")
    # streamed images stay in their files: what is checked below are their type and shape
    out = {key: value if isinstance(value, ImageFiles) else np.asarray(value) for key, value in arrays.items()}

    images = out["images"]
    if images.dtype != np.uint8:
        raise ValueError(f"{where}: images is {_say_floats(images)}, expected uint8 in 0..255")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"{where}: images has shape {images.shape}, expected (N, H, W, 3) with N, H, W at least 1")
    n = len(images)
    out.setdefault("labels", np.zeros(n, dtype=np.int64))

    for key in ("image_ids", "official_split", "groups"):
        if key in out and (out[key].dtype.kind != "U" or out[key].ndim != 1):
            got = f"{out[key].dtype} {out[key].shape}"
            raise ValueError(f"{where}: {key} is {got}, expected a (N,) array of str (numpy 'U')")
    for key in ("labels", "image_ids", "official_split", "masks", "groups", "part_boxes"):
        if key in out and (out[key].ndim == 0 or len(out[key]) != n):
            raise ValueError(f"{where}: {key} has shape {out[key].shape} but there are {n} images: lengths differ")
    for key in ("class_names", "mask_class_names", "part_names"):
        if key in out:
            if out[key].dtype.kind != "U" or out[key].ndim != 1 or len(out[key]) == 0:
                got = f"{out[key].dtype} {out[key].shape}"
                raise ValueError(f"{where}: {key} is {got}, expected at least one name (numpy 'U')")
            out[key] = tuple(str(value) for value in out[key])

    ids, counts = np.unique(out["image_ids"], return_counts=True)
    if len(ids) != n:
        again = ids[counts > 1]
        raise ValueError(
            f"{where}: image_ids repeats {len(again)} ids, for example {str(again[0])!r}: make them unique"
        )

    labels = out["labels"]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{where}: labels is {labels.dtype} {labels.shape}, expected a (N,) array of integers")
    n_classes = len(out["class_names"])
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"{where}: labels run from {labels.min()} to {labels.max()}, expected 0 to {n_classes - 1} "
            f"for the {n_classes} class_names"
        )
    out["labels"] = labels.astype(np.int64)

    if "masks" in out:
        masks = out["masks"]
        if masks.dtype != np.uint8 or masks.shape != images.shape[:3]:
            raise ValueError(
                f"{where}: masks is {masks.dtype} {masks.shape}, expected uint8 {images.shape[:3]} like the images"
            )
        n_masks = len(out.get("mask_class_names", out["class_names"]))
        seen = np.flatnonzero(np.sum([np.bincount(mask.ravel(), minlength=256) for mask in masks], axis=0))
        wrong = seen[(seen >= n_masks) & (seen != VOID)]
        if len(wrong):
            raise ValueError(
                f"{where}: masks holds the value {wrong[0]}, expected 0 to {n_masks - 1} for the {n_masks} class "
                f"names, or {VOID} for void"
            )
    if ("part_boxes" in out) != ("part_names" in out):
        raise ValueError(f"{where}: part_boxes and part_names belong together, only one is there: add the other")
    if "part_boxes" in out:
        boxes = out["part_boxes"]
        expected = (n, len(out["part_names"]), 4)
        if boxes.dtype.kind != "f" or boxes.shape != expected:
            raise ValueError(f"{where}: part_boxes is {boxes.dtype} {boxes.shape}, expected float {expected}")
    return out


def _say_floats(images: np.ndarray) -> str:
    """Describe images of a wrong type so that the reader knows what to change."""
    if images.dtype.kind != "f":
        return f"{images.dtype} {images.shape}"
    n_nan = int(np.isnan(images).sum())
    if n_nan:
        return f"{images.dtype} with {n_nan} NaN pixels"
    if images.size and images.min() >= 0 and images.max() <= 1:
        return f"{images.dtype} in [0, 1] (multiply by 255, round and convert)"
    return f"{images.dtype} {images.shape}"


def _check_size(size: int | tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else size
    ok = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not ok or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < 1 for v in pair):
        raise ValueError(f"expected size to be pixels or (height, width), got {size!r}")
    return int(pair[0]), int(pair[1])


def _make_pool(name: str, arrays: Mapping[str, Any], *, where: str) -> Pool:
    """Build a pool from the arrays of a file: checked, void mapped to 255, in the order of the ids."""
    arrays = dict(arrays)
    if {"masks", "labels", "class_names"} <= set(arrays):
        arrays.setdefault("mask_class_names", arrays["class_names"])  # class_names number the labels: left alone
    key = "mask_class_names" if "mask_class_names" in arrays else "class_names"
    if "masks" in arrays and key in arrays:
        names = np.atleast_1d(arrays[key]).tolist()
        arrays["masks"], arrays[key] = _map_void(np.asarray(arrays["masks"]), names)
    arrays = check_arrays(arrays, where=where)
    if name == "camvid" and "groups" in arrays and not any("/" in group for group in arrays["groups"]):
        arrays["groups"] = make_blocks(arrays["image_ids"], arrays["groups"])
    pool = Pool(name=name, **{"official_split": None, **arrays})
    order = np.argsort(pool.image_ids, kind="stable")
    return pool if np.array_equal(order, np.arange(len(pool))) else pool.take(order)


def _map_void(masks: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Map a class called ``void`` to 255 and close the gap in the class numbers."""
    names = [str(name) for name in names]
    if "void" not in names or masks.dtype != np.uint8:
        return masks, np.array(names, dtype=np.str_)
    void = names.index("void")
    table = np.arange(256, dtype=np.uint8)
    table[void + 1 : len(names)] -= 1
    table[void] = VOID
    return table[masks], np.array([name for name in names if name != "void"], dtype=np.str_)


def _resize(pool: Pool, size: tuple[int, int] | None) -> Pool:
    if size is None or pool.images.shape[1:3] == size:
        return pool
    if pool.part_boxes is not None:
        raise ValueError(f"{pool.name} has part_boxes, which belong to {pool.images.shape[1:3]} pixels: leave size out")

    def fit(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        with ThreadPoolExecutor(folders.count_threads()) as executor:
            rows = executor.map(lambda row: np.asarray(folders.cover(Image.fromarray(row), size, how)), array)
            return np.stack(list(rows))

    masks = None if pool.masks is None else fit(pool.masks, Image.Resampling.NEAREST)
    return replace(pool, images=fit(pool.images, Image.Resampling.BICUBIC), masks=masks)


# ---------------------------------------------------------------------------------------------- cache files


def _find_root(root: str | Path | None, *, needed: bool) -> Path | None:
    """Return the data folder; a folder the user named must exist, the default one is made when it is written to."""
    folder = paths.get_raw_dir() if root is None else Path(root).expanduser()
    named = root is not None or bool(os.environ.get("MIA_DATA_DIR"))
    if folder.is_dir() or not named:
        return folder
    if not needed:
        return None
    if root is not None:
        raise FileNotFoundError(f"expected a data folder, got {folder}, which is no folder: create it or name another")
    raise FileNotFoundError(
        f"MIA_DATA_DIR names {folder}, which is no folder: create it, or unset MIA_DATA_DIR to use data/raw"
    )


def _find_cache(folder: Path, name: str, size: tuple[int, int] | None) -> Path | None:
    """Return the cache file of a data set: ``NAME-HEIGHTxWIDTH.npz`` of that size, else ``NAME.npz``."""
    pattern = re.compile(rf"{re.escape(name)}-(\d+)x(\d+)\.npz")
    sized = {
        (int(m[1]), int(m[2])): path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if (m := pattern.fullmatch(path.name))
    }
    if size in sized:
        return sized[size]
    if (folder / f"{name}.npz").is_file():
        return folder / f"{name}.npz"
    if size is None and len(sized) > 1:
        found = ", ".join(path.name for path in sized.values())
        raise ValueError(f"{folder} holds {found}: pass size=(height, width) to choose one")
    # a larger stored size is scaled down to the wanted one by the caller
    return max(sized.items())[1] if sized else None


def read_cache(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a cache file; pickled objects are refused, never executed.

    Raises:
        ValueError: not an npz file, damaged, or holding objects. One line that names the file.
    """
    path = Path(path)
    key = ""
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: expected an npz file with several named arrays, got a single array")
        with opened as file:
            out = {}
            for key in file.files:
                out[key] = file[key]
            return out
    except PermissionError as error:
        raise ValueError(f"{path}: no right to read it: change its permissions") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, TypeError, SyntaxError) as error:
        text = str(error)
        if text.startswith(f"{path}:"):
            raise
        if "allow_pickle" in text or "pickle" in text.lower():
            which = f"array {key!r} is" if key else "the file is"
            raise ValueError(
                f"{path}: {which} a pickle of Python objects, refused because it could run code: save plain arrays"
            ) from error
        which = f" (array {key!r})" if key else ""
        raise ValueError(f"{path}: not a complete npz file{which}: delete it and fetch or unpack it again") from error


def write_cache(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write a cache file under a temporary name and rename it: a killed run leaves no half-written cache.

    Raises:
        ValueError: no right or no space to write. One line.
    """
    path = Path(path)
    arrays = {k: np.array(v, dtype=np.str_) if isinstance(v, tuple) else np.asarray(v) for k, v in arrays.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.chmod(temporary, 0o644)  # mkstemp makes files private; a data folder is often shared
        os.replace(temporary, path)
    except OSError as error:
        megabytes = sum(value.nbytes for value in arrays.values()) / 1e6
        raise ValueError(
            f"can not write {path} ({megabytes:.0f} MB): {error.strerror or error}: free some space, get the right to "
            "write there, or set MIA_DATA_DIR"
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _lock(folder: Path, name: str) -> AbstractContextManager:
    """Take the lock under which a cache is made, so that of two jobs one downloads and the other waits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f".{name}.lock").acquire()  # leaving the context releases it
    except OSError as error:
        raise ValueError(
            f"can not write in {folder}: {error.strerror or error}: get the right to write there, or set MIA_DATA_DIR"
        ) from error


def _name_cache(folder: Path, name: str, size: tuple[int, int] | None) -> Path:
    """Return the cache file that is written: with its size where a data set has no size of its own."""
    return folder / (f"{name}-{size[0]}x{size[1]}.npz" if size else f"{name}.npz")


def _make_cache(name: str, folder: Path, loader: Loader, size: tuple[int, int] | None = None) -> Path:
    """Ask a source (for pictures of this size) and write its cache, once even when several jobs start together."""
    if loader is segmentation_sets.load_camvid:
        path = _name_cache(folder, name, segmentation_sets.CAMVID_SIZE)
    else:
        path = _name_cache(folder, name, size)
    with _lock(folder, name):
        if not path.is_file():  # another job may have written it while this one waited
            made = loader(folder, size=size) if size else loader(folder)
            if isinstance(made, Pool):
                made = {key: getattr(made, key) for key in ARRAYS if getattr(made, key) is not None}
            checked = check_arrays(made, where=f"source {name!r}")
            # labels that only stand in for missing ones stay out of the file: class_names number the masks then
            write_cache(path, {key: value for key, value in checked.items() if key in made})
    return path


# ---------------------------------------------------------------------------------------------- sources


@lru_cache(maxsize=4)
def _load_scenes(style: str, size: int, n: int, seed: int, folder: Path | None) -> Pool:
    """Generate scenes, or read them back: the cache is a convenience, so nothing about it can fail a run."""
    from mia_utils.datasets import scenes  # drawing code is only imported where it is used

    # the hash of the drawing code is part of the name: after an edit nobody reads yesterday's pictures
    recipe = hashlib.blake2b(Path(scenes.__file__).read_bytes(), digest_size=4).hexdigest()
    path = folder / f"{style}-{size}px-{n}-seed{seed}-{recipe}.npz" if folder else None

    def make() -> Pool:
        arrays = scenes.make_scenes(n, size=size, style=style, seed=seed)
        return Pool(name=style, **{"official_split": None, **arrays})

    def read() -> Pool | None:
        try:
            return Pool(name=style, **{"official_split": None, **read_cache(path)}) if path.is_file() else None
        except ValueError:
            return None

    if path is None:
        return make()
    pool = read()
    if pool is not None:
        return pool
    try:
        lock = _lock(folder, path.stem)
    except ValueError:  # a read-only data folder
        return make()
    with lock:
        pool = read()
        if pool is None:
            pool = make()
            try:
                write_cache(path, {key: getattr(pool, key) for key in ARRAYS if getattr(pool, key) is not None})
            except ValueError:  # disk full: the pictures are there all the same
                pass
    return pool


for _name, _loader in {
    "cifar10": torchvision_sets.load_cifar10,
    "cifar100": torchvision_sets.load_cifar100,
    "stl10": torchvision_sets.load_stl10,
    "tiny_imagenet": folders.read_tiny_imagenet,
    **segmentation_sets.LOADERS,
}.items():
    register_source(_name, _loader)
