"""Images with label maps: folders of pairs of your own, and the reading that all segmentation sets share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from mia_utils import seeds
from mia_utils.datasets import folders
from mia_utils.datasets.cache import MappedImages
from mia_utils.datasets.pool import VOID, find_ids

LOSSY = {"AVIF", "JPEG", "JPEG2000", "MPO", "WEBP"}
DEEP = {"I;16": "16-bit", "I;16B": "16-bit", "I;16L": "16-bit", "I": "32-bit", "F": "32-bit floating"}
RULE = "masks/a/b.png belongs to images/a/b.jpg: the same path with any suffix"


def is_pairs(path: Path) -> bool:
    """Whether a folder holds ``images`` and ``masks``: then it is read as pairs."""
    return (path / "images").is_dir() and (path / "masks").is_dir()


def read_pair(
    image: Path, mask: Path, *, size: tuple[int, int] | None, colors: dict[int, int] | None = None
) -> np.ndarray:
    """Decode an image and its label map, turned, scaled (the mask nearest) and cropped alike.

    Args:
        image, mask: files; a mask of 8 bits in one channel holds class ids (of a palette its indices).
        size: (height, width); a mask of another size but the same proportions is then scaled with its image.
        colors: 0xRRGGBB -> id, for masks that hold colors.

    Returns:
        (H, W, 4) uint8: red, green, blue and the id.
    """
    picture = folders.open_rgb(image)
    try:
        with Image.open(mask) as opened:
            kind, lossy = opened.format, opened.format in LOSSY or "jpeg" in str(opened.info.get("compression"))
            label_map = folders.turn_upright(opened)
    except FileNotFoundError:
        raise ValueError(f"{mask}: no such file: every image needs a mask ({RULE})") from None
    except Exception as error:  # Pillow raises a different type for each format and kind of damage
        raise ValueError(f"{mask}: can not be read as a mask ({' '.join(str(error).split())[:100]})") from None
    mode = label_map.mode
    if lossy:
        raise ValueError(f"{mask}: {kind} is lossy and can't hold class ids: save the mask as PNG, from its original")
    if mode in DEEP:
        raise ValueError(f"{mask}: a {DEEP[mode]} mask (mode {mode}), expected ids in one 8-bit channel: convert it")
    if colors is None and mode not in ("L", "P", "1"):
        raise ValueError(
            f"{mask}: holds colors (mode {mode}), expected ids in one 8-bit channel: convert it, or list the colors "
            "in colors.txt beside images and masks, 'R G B name' a line in the order of the ids"
        )
    (w, h), (width, height) = label_map.size, picture.size
    # within a pixel of the mask: 375 x 500 halved is 188 x 250
    if (w, h) != (width, height) and (size is None or abs(w * height - h * width) >= max(width, height)):
        raise ValueError(
            f"{mask}: mask of {h} x {w} for an image of {height} x {width} ({image.name}): expected the same size, or "
            "the same proportions and size="
        )
    label_map = label_map if colors is None else label_map.convert("RGB")
    if size is not None:
        picture = folders.cover(picture, size)
        label_map = folders.cover(label_map, size, Image.Resampling.NEAREST)
    ids = np.asarray(label_map)
    if colors is not None:
        codes, places = np.unique(ids.astype(np.int64) @ (1 << 16, 1 << 8, 1), return_inverse=True)
        for code in codes.tolist():
            if code not in colors:
                red, green, blue = code.to_bytes(3)
                raise ValueError(f"{mask}: holds the color {red} {green} {blue}, not listed in colors.txt: add it")
        ids = np.array([colors[code] for code in codes.tolist()])[places].reshape(ids.shape[:2])
    return np.dstack([np.asarray(picture), ids.astype(np.uint8)])


def part(both: np.ndarray) -> dict[str, np.ndarray]:
    """Part (N, H, W, 4) into the arrays ``images`` and ``masks`` of a ``Pool``; views where it is a memory map."""
    copy = (lambda x: x) if isinstance(both, np.memmap) else np.ascontiguousarray
    return {"images": copy(both[..., :3]), "masks": copy(both[..., 3])}


def check_ids(masks: np.ndarray, files: Sequence[Path], n_classes: int) -> None:
    """Refuse ids from ``n_classes`` to 254, naming the file."""
    for mask, file in zip(masks, files, strict=True):
        wrong = mask[(mask >= n_classes) & (mask != VOID)]
        if len(wrong):
            raise ValueError(
                f"{file}: mask holds the id {wrong[0]}, expected 0 to {n_classes - 1} for {n_classes} classes, or "
                f"{VOID} for void"
            )


def read_pairs(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    n: int | None = None,
    seed: int = 0,
    void: int | str | None = "auto",
    stream: Path | None = None,
) -> dict[str, Any]:
    """Read a folder ``PATH/images`` of images and ``PATH/masks`` of label maps with the same names.

    ``masks/a/b.png`` belongs to ``images/a/b.jpg``. First subfolders called train, val or test are the official split;
    any other subfolder is a group (a patient, a drive) that is never split between two roles. ``PATH/classes.txt``
    names the classes, one a line; ``PATH/colors.txt`` lists them as ``R G B name`` where masks hold colors or gray
    levels. A class called ``void`` is ignored. Without both, classes are numbered up to the largest id found.

    Args:
        path: the folder.
        size: (height, width): scale to cover it, then center crop; None: all images must have one size.
        n: draw this many pairs before anything is decoded; None: all.
        seed: which n pairs.
        void: id of the pixels without a class, None: there is none; ``"auto"``: 255, but masks of 0 and 255 alone have
            two classes.
        stream: decode into memory maps in this folder, once, instead of into memory.

    Returns:
        dict with the arrays of a ``Pool``; image ids are the paths below ``images``.
    """
    path, left_out, found = Path(path), {}, {"images": {}, "masks": {}}  # stem -> name
    if not is_pairs(path):
        raise FileNotFoundError(f"expected a folder with images and masks in it, got {path} without one of them")
    for side, names in found.items():
        for name in folders.list_images(path / side, left_out):
            first = names.setdefault(str(PurePosixPath(name).with_suffix("")), name)
            if first != name:
                raise ValueError(f"{path / side / name}: a second {side[:-1]} beside {first}: remove one ({RULE})")
    images, masks = found["images"], found["masks"]
    folders.say_left_out(path, len(images), left_out)
    for side, other, here, there in (("images", "mask", images, masks), ("masks", "image", masks, images)):
        if alone := sorted(set(here) - set(there)):
            raise ValueError(
                f"{path / side / here[alone[0]]}: no {other} of this name ({len(images)} images, {len(masks)} masks, "
                f"{len(alone)} without): add it or remove the {side[:-1]} ({RULE})"
            )
    names = folders.draw_names(sorted(images.values()), n, seeds.rng(seed, "folders.read_pairs"), path)
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    files = [(path / "images" / name, path / "masks" / masks[stem]) for name, stem in zip(names, stems, strict=True)]
    class_names, colors = _read_classes(path)

    read, key = partial(read_pair, size=size, colors=colors), (path.resolve(), size, n, seed, colors)
    out = part(folders.decode(read, files, title=path.name, stream=stream, key=key))
    if stream is not None:
        out["images"] = MappedImages([out["images"]])
    if colors is None:
        out["masks"] = _settle_void(out["masks"], class_names, void, path)
    if class_names is None:
        found = find_ids(out["masks"])
        class_names = [f"class {i}" for i in range(int(found[found < VOID].max(initial=0)) + 1)]
    check_ids(out["masks"], [mask for _, mask in files], len(class_names))
    out |= {"image_ids": np.array(names), "class_names": tuple(class_names)}
    parts = [name.split("/")[:-1] for name in names]
    is_official = all(p and p[0] in folders.OFFICIAL for p in parts)
    if is_official:
        out["official_split"] = np.array([p[0] for p in parts])
    groups = ["/".join(p[is_official:]) for p in parts]
    if any(groups):  # an image outside all subfolders is a group of its own
        out["groups"] = np.array([group or name for group, name in zip(groups, names, strict=True)])
    return out


def _read_classes(path: Path) -> tuple[list[str] | None, dict[int, int] | None]:
    """Class names and 0xRRGGBB -> id from ``colors.txt`` or ``classes.txt``; None for what is not there."""
    for name in ("colors.txt", "classes.txt"):
        if (path / name).is_file():
            lines = [x.strip() for x in (path / name).read_text(encoding="utf-8-sig").splitlines() if x.strip()]
            if not lines:
                raise ValueError(f"{path / name}: expected a class a line, got an empty file: fill or remove it")
            if name == "classes.txt":
                return lines, None
            fields = [line.split(maxsplit=3) for line in lines]
            for line, field in zip(lines, fields, strict=True):
                if len(field) < 3 or not all(x.isdecimal() and int(x) < 256 for x in field[:3]):
                    raise ValueError(f"{path / name}: expected 'R G B name' with 0 to 255 each, got {line[:60]!r}")
            names = [field[3] if len(field) > 3 else f"class {i}" for i, field in enumerate(fields)]
            codes = [int(r) << 16 | int(g) << 8 | int(b) for r, g, b, *_ in fields]
            if len(set(codes)) < len(codes):
                raise ValueError(f"{path / name}: a color is listed twice: remove one line")
            classes = list(dict.fromkeys(names))  # two colors may have one name: they are one class
            return classes, {code: classes.index(name) for code, name in zip(codes, names, strict=True)}
    return None, None


def _settle_void(masks: np.ndarray, names: list[str] | None, void: int | str | None, path: Path) -> np.ndarray:
    """Bring the pixels without a class to 255; a foreground that is written as 255 must not become one of them."""
    ids = find_ids(masks)
    below = ids[ids < VOID]
    n_names = 2 if names is None else len(names)
    binary = VOID in ids and below.max(initial=0) == 0
    if binary and n_names == 2 and void in ("auto", None):
        print(f"{path.name}: masks hold 0 and 255 only: 255 is read as the second class, not as void", file=sys.stderr)
        return (np.asarray(masks) == VOID).astype(np.uint8)
    unclear = (binary and n_names > 2) or (names is None and len(below) <= 8 and below.max(initial=0) >= 64)
    if VOID in ids and (unclear if void == "auto" else void != VOID):
        raise ValueError(
            f"{path / 'masks'}: masks hold the values {', '.join(map(str, ids[:8]))}{' ...' * (len(ids) > 8)}: is 255 "
            "void (void=255, classes in classes.txt), or are these gray levels ('0 0 0 name' ... in colors.txt)?"
        )
    return masks if void in ("auto", VOID, None) else np.where(masks == void, VOID, masks).astype(np.uint8)
