"""``load(name)``: the cache ``<root>/<name>.npz`` (array names of ``Pool``), else the source, which is then cached."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mia_utils import paths, seeds
from mia_utils.datasets import cache, camvid, folders, pairs, scenes, street, tiny_imagenet, torchvision_sets
from mia_utils.datasets.labels import map_labels
from mia_utils.datasets.pool import VOID, Pool, check_arrays, make_blocks

CARELESS = ("frames", "official")  # NAME@frames, NAME@official: a video as it should not be split
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
Loader = Callable[..., "Pool | Mapping[str, Any]"]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    loader: Loader  # function of the data folder (and of ``size`` where there is one): a ``Pool`` or its arrays
    # (height, width) of photographs of several megapixels, one cache file for each size that is asked for; one for all
    # street scenes, so that a shadow on one can stand for a target on another
    size: tuple[int, int] | None = None
    stored: tuple[int, int] | None = None  # size in the name of the cache file
    folder: str = ""  # that holds the photographs


SOURCES: dict[str, Source] = {
    "cifar10": Source(partial(torchvision_sets.load_cifar, "CIFAR10")),
    "cifar100": Source(partial(torchvision_sets.load_cifar, "CIFAR100")),
    "stl10": Source(torchvision_sets.load_stl10),
    "tiny_imagenet": Source(tiny_imagenet.load_tiny_imagenet),
    "camvid": Source(camvid.load_camvid, stored=(360, 480)),
    "oxford_pets": Source(torchvision_sets.load_oxford_pets, size=(128, 128), folder="oxford-iiit-pet"),
    **{x: Source(partial(street.load_street, x), size=(128, 256), folder=x) for x in street.LAYOUTS},
}


def register_source(name: str, loader: Loader, *, overwrite: bool = False) -> None:
    """Make a data set available to ``load`` under a name, which is also that of its cache file.

    ``loader`` is a function of the data folder (``Path``) that returns a ``Pool``, or a dict with the array names of
    ``Pool``. It is called once; afterwards the cache is read.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"expected a source name of letters, digits, '-', '_' and '.', got {name!r}: rename it")
    if name in scenes.STYLES:
        raise ValueError(f"{name!r} exists and is generated, it can not be overwritten: choose another name")
    if name in SOURCES and not overwrite:
        raise ValueError(f"a source called {name!r} exists: choose another name or pass overwrite=True")
    SOURCES[name] = Source(loader)


def list_names() -> list[str]:
    """Return the names that ``load`` knows (``folder:PATH`` stands for any image folder)."""
    return [*scenes.STYLES, *sorted(SOURCES), "folder:PATH"]


def load(
    name: str, root: str | Path | None = None, *, size: int | tuple[int, int] | None = None, n: int | None = None,
    seed: int = 0, stream: bool = False, void: int | str | None = "auto",
) -> Pool:  # fmt: skip
    """Load a pool by name.

    Images that come from files are in the order of their ids, so the same data from another source is the same pool.

    Args:
        name: a name of ``list_names()``, ``folder:PATH`` (with ``images`` and ``masks`` in it: pairs), or the name of
            an npz file in ``root``. ``NAME@SPACE`` maps the masks to ``cityscapes``, ``camvid`` or ``scenes`` classes;
            ``NAME@frames`` forgets the groups, ``NAME@official`` cuts them at the border of the official split,
            ``NAME@part`` changes nothing: a profile asks under this name for ``n`` images beside the whole set.
        root: folder of downloads and caches; None is ``MIA_DATA_DIR``, else ``data/raw``. ``scenes`` need none.
        size: height = width in pixels, or (height, width); scenes are drawn at this size (None: 32), others are
            scaled to cover it and center-cropped (Pillow bicubic; masks nearest). None keeps what is stored.
        n: number of images: scenes are generated (None: 3,000), of other sets n are drawn without replacement.
        seed: which scenes, or which n images.
        stream: decode the images of a folder once, into memory maps in ``root`` (``MappedImages``), for sets that
            memory does not hold; pixels and hash are those of the folder in memory.
        void: value of unlabeled pixels in the masks of a folder, None: there is none; see ``pairs.read_pairs``.

    Raises:
        ValueError, FileNotFoundError: unknown name, or data that is missing, damaged, of wrong type, or too few.
    """
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a data set, got {name!r}: one of {', '.join(list_names())}")
    height_width = None
    if size is not None:
        pair = [size] * 2 if isinstance(size, (int, np.integer)) else size
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_count(n) and n < 10_000 for n in pair):
            raise ValueError(f"expected size to be pixels or (height, width), got {size!r}")
        height_width = int(pair[0]), int(pair[1])
    if n is not None and not _is_count(n):
        raise ValueError(f"expected n to be a positive number of images, got {n!r}")
    if name.startswith("folder:"):
        return _load_folder(name, root, size=height_width, n=n, seed=seed, stream=stream, void=void)
    if stream or void != "auto":
        option = "stream=True" if stream else "void="
        raise ValueError(f"{option} is for image folders (folder:PATH), got {name!r}, one cache file: leave it out")
    if "@" in name:  # the same images, their masks in another label space
        source, _, space = name.partition("@")
        pool = load(source, root, size=size, n=n, seed=seed)
        if space == "part":
            return replace(pool, name=name)
        return split_carelessly(pool, space) if space in CARELESS else map_labels(pool, space)
    if name in scenes.STYLES:
        height, width = height_width or (32, 32)
        if height != width:
            raise ValueError(f"expected one size for {name}, which are square, got {size}")
        return _load_scenes(name, height, int(n or 3000), int(seed), cache.find_root(root, needed=False))
    source = SOURCES.get(name)
    folder = cache.find_root(root, needed=source is not None)
    if source and source.size:
        height_width = height_width or source.size
    path = cache.find_cache(folder, name, height_width) if folder and NAME.fullmatch(name) else None
    if path and source and source.size and path != cache.name_cache(folder, name, height_width):
        if (folder / source.folder).is_dir():
            path = None  # of another size, and the photographs are here: read them again rather than scale twice
    if path is None and source is None:
        where = f"a file {name}.npz in {folder or root or paths.get_raw_dir()}"
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(list_names())}, or {where}")
    path = path or _make_cache(name, folder, source, height_width)
    pool = make_pool(name, cache.read_cache(path), where=str(path))
    if n is not None:
        rows = folders.draw_names(range(len(pool)), n, seeds.rng(seed, "datasets.load", name), name)
        pool = pool.take(rows) if n < len(pool) else pool
    return _resize(pool, height_width)


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def _load_folder(name: str, root: str | Path | None, *, stream: bool, void: int | str | None, **options: Any) -> Pool:
    given = name.removeprefix("folder:")
    if not given.strip():
        raise ValueError(f"expected the path of an image folder, got {name!r}: 'folder:.' is the current one")
    folder = Path(given).expanduser()
    options["stream"] = cache.find_root(root, needed=True) if stream else None
    if pairs.is_pairs(folder):
        if void not in ("auto", None) and not (isinstance(void, (int, np.integer)) and 0 <= void <= VOID):
            raise ValueError(f"expected void to be a value of the masks from 0 to {VOID}, None or 'auto', got {void!r}")
        arrays = pairs.read_pairs(folder, void=void, **options)
    elif void != "auto":
        raise ValueError(f"void= is for folders with images and masks in them, {folder} has none: leave it out")
    else:
        arrays = folders.read_folder(folder, **options)
    return make_pool(f"folder:{folder.resolve().name}", arrays, where=str(folder))


def split_carelessly(pool: Pool, how: str) -> Pool:
    """The same images, to be split as they should not be: notebook 06 shows what comes of it."""
    if pool.groups is None:
        raise ValueError(f"{pool.name}@{how}: data set {pool.name!r} has no groups, its images are split one by one")
    if how == "frames":  # drawn one by one, as if neighbors in a video were independent
        return replace(pool, name=f"{pool.name}@frames", groups=None)
    if pool.official_split is None:
        raise ValueError(f"{pool.name}@official: data set {pool.name!r} has no official split")
    # the official border may cut a block: its two sides are different groups here
    groups = np.strings.add(pool.groups, np.strings.add("-", pool.official_split))
    return replace(pool, name=f"{pool.name}@official", groups=groups)


def make_pool(name: str, arrays: Mapping[str, Any], *, where: str) -> Pool:
    """Build a pool from the arrays of a file: checked, void mapped to 255, in the order of the ids."""
    arrays = dict(arrays)
    if {"masks", "labels", "class_names"} <= set(arrays):
        arrays.setdefault("mask_class_names", arrays["class_names"])  # class_names number the labels: left alone
    key = "mask_class_names" if "mask_class_names" in arrays else "class_names"
    names = [str(x) for x in np.atleast_1d(arrays.get(key, ()))]
    if "void" in names and "masks" in arrays and np.asarray(arrays["masks"]).dtype == np.uint8:
        at, table = names.index("void"), np.arange(256, dtype=np.uint8)
        table[at + 1 : len(names)] -= 1  # the gap in the class numbers is closed
        table[at] = VOID
        arrays |= {"masks": table[arrays["masks"]], key: np.array([x for x in names if x != "void"], dtype=np.str_)}
    arrays = check_arrays(arrays, where=where)
    if name == "camvid" and "groups" in arrays and not any("/" in group for group in arrays["groups"]):
        arrays["groups"] = make_blocks(arrays["image_ids"], arrays["groups"])
    pool = Pool(name=name, **{"official_split": None, **arrays})
    order = np.argsort(pool.image_ids, kind="stable")
    return pool if np.array_equal(order, np.arange(len(pool))) else pool.take(order)


def _resize(pool: Pool, size: tuple[int, int] | None) -> Pool:
    if size is None or pool.images.shape[1:3] == size:
        return pool
    if pool.part_boxes is not None:
        raise ValueError(f"{pool.name} has part_boxes, which belong to {pool.images.shape[1:3]} pixels: leave size out")

    def fit(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        def scale(row: np.ndarray) -> np.ndarray:
            return np.asarray(folders.cover(Image.fromarray(row), size, how))

        return np.stack(list(folders.map_files(scale, [(row,) for row in array], title=f"scaling {pool.name}")))

    masks = None if pool.masks is None else fit(pool.masks, Image.Resampling.NEAREST)
    return replace(pool, images=fit(pool.images, Image.Resampling.BICUBIC), masks=masks)


def _make_cache(name: str, folder: Path, source: Source, size: tuple[int, int] | None) -> Path:
    """Ask a source and write its cache, once even when several jobs start together."""
    path = cache.name_cache(folder, name, size if source.size else source.stored)
    with paths.hold(folder / f".{name}.lock"):
        if not path.is_file():  # another job may have written it while this one waited
            made = source.loader(folder, size=size) if source.size else source.loader(folder)
            made = made.arrays if isinstance(made, Pool) else made
            checked = check_arrays(made, where=f"source {name!r}")
            # labels that only stand in for missing ones stay out of the file: class_names number the masks then
            cache.write_cache(path, {key: value for key, value in checked.items() if key in made})
    return path


@lru_cache(maxsize=4)
def _load_scenes(style: str, size: int, n: int, seed: int, folder: Path | None) -> Pool:
    """Generate scenes, or read them back: the cache is a convenience, so nothing about it can fail a run."""

    def make(arrays: Mapping[str, Any]) -> Pool:
        return Pool(name=style, **{"official_split": None, **arrays})

    def draw() -> Pool:
        return make(scenes.make_scenes(n, size=size, style=style, seed=seed))

    def read() -> Pool | None:
        with contextlib.suppress(ValueError):  # not there, or damaged: drawn again
            pool, first = make(cache.read_cache(path)), make(scenes.make_scenes(1, size=size, style=style, seed=seed))
            if len(pool) == n and pool.take(np.arange(1)).hash == first.hash:  # else another's file under this name
                return pool
        return None

    if folder is None:
        return draw()
    # the hash of the drawing code is part of the name: after an edit nobody reads yesterday's images
    code = b"".join(file.read_bytes() for file in sorted(Path(scenes.__file__).parent.glob("*.py")))
    path = folder / f"{style}-{size}px-{n}-seed{seed}-{hashlib.blake2b(code, digest_size=4).hexdigest()}.npz"
    if pool := read():
        return pool
    with contextlib.suppress(ValueError), paths.hold(folder / f".{path.stem}.lock"):  # read-only or full
        pool = read() or draw()  # another job may have drawn them meanwhile
        cache.write_cache(path, pool.arrays)
    return pool or draw()
