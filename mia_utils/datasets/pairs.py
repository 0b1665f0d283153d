"""Images with label maps: folders of pairs of your own, and the reading that all segmentation sets share."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
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
        mask: file of class ids in one channel of 8 bits (of a palette its indices), or of colors.
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
    mode, (w, h), (width, height) = label_map.mode, label_map.size, picture.size
    if lossy:
        raise ValueError(f"{mask}: {kind} is lossy and can't hold class ids: save the mask as PNG, from its original")
    if mode in DEEP:
        raise ValueError(f"{mask}: a {DEEP[mode]} mask (mode {mode}), expected ids in one 8-bit channel: convert it")
    if colors is None and mode not in ("L", "P", "1"):
        raise ValueError(
            f"{mask}: holds colors (mode {mode}), expected ids in one 8-bit channel: convert it, or list the colors "
            "in colors.txt beside images and masks, 'R G B name' a line in the order of the ids"
        )
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
        if unknown := [code for code in codes.tolist() if code not in colors]:
            color = " ".join(map(str, unknown[0].to_bytes(3)))
            raise ValueError(f"{mask}: holds the color {color}, not listed in colors.txt: add it")
        ids = np.array([colors[code] for code in codes.tolist()])[places].reshape(ids.shape[:2])
    return np.dstack([np.asarray(picture), ids.astype(np.uint8)])


def part(both: np.ndarray) -> dict[str, np.ndarray]:
    """Part (N, H, W, 4) into the arrays ``images`` and ``masks`` of a ``Pool``; views where it is a memory map."""
    copy = (lambda x: x) if isinstance(both, np.memmap) else np.ascontiguousarray
    return {"images": copy(both[..., :3]), "masks": copy(both[..., 3])}


def check_ids(masks: np.ndarray, files: Sequence[Path], n: int) -> None:
    """Refuse ids from ``n`` to 254, naming the file."""
    for mask, file in zip(masks, files, strict=True):
        wrong = mask[(mask >= n) & (mask != VOID)]
        if len(wrong):
            known = f"0 to {n - 1} for {n} classes, or {VOID} for void"
            raise ValueError(f"{file}: mask holds the id {wrong[0]}, expected {known}")


def read_pairs(
    path: str | Path, *, size: tuple[int, int] | None = None, n: int | None = None, seed: int = 0,
    void: int | str | None = "auto", stream: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read a folder ``PATH/images`` of images and ``PATH/masks`` of label maps with the same names.

    First subfolders called train, val or test are the official split; any other subfolder is a group (a patient, a
    drive) that is never split between two roles. ``PATH/classes.txt`` names the classes, one a line;
    ``PATH/colors.txt`` lists them as ``R G B name`` where masks hold colors or gray levels. A class called ``void`` is
    ignored. Without both, classes are numbered up to the largest id found.

    Args:
        size, n, seed, stream: as in ``folders.read_folder``.
        void: id of the pixels without a class, None: there is none; ``"auto"``: 255, but masks of 0 and 255 alone have
            two classes.
    """
    path, left_out, found = Path(path), {}, {"image": {}, "mask": {}}  # stem -> name
    if not is_pairs(path):
        raise FileNotFoundError(f"expected a folder with images and masks in it, got {path} without one of them")
    for side, names in found.items():
        for name in folders.list_images(path / f"{side}s", left_out):
            first = names.setdefault(_get_stem(name), name)
            if first != name:
                raise ValueError(f"{path / f'{side}s' / name}: a second {side} beside {first}: remove one ({RULE})")
    images, masks = found.values()
    folders.say_left_out(path, len(images), left_out)
    for side, other in (("image", "mask"), ("mask", "image")):
        if alone := sorted(set(found[side]) - set(found[other])):
            counts = f"{len(images)} images, {len(masks)} masks, {len(alone)} without"
            where = path / f"{side}s" / found[side][alone[0]]
            raise ValueError(f"{where}: no {other} of this name ({counts}): add it or remove the {side} ({RULE})")
    names = folders.draw_names(sorted(images.values()), n, seeds.rng(seed, "folders.read_pairs"), path)
    files = [(path / "images" / name, path / "masks" / masks[_get_stem(name)]) for name in names]
    class_names, colors = _read_classes(path)

    read, key = partial(read_pair, size=size, colors=colors), (path.resolve(), size, n, seed, colors)
    out = part(folders.decode(read, files, title=path.name, stream=stream, key=key))
    if stream is not None:
        out["images"] = MappedImages([out["images"]])
    if colors is None:
        out["masks"] = _settle_void(out["masks"], class_names, void, path)
    if class_names is None:
        ids = find_ids(out["masks"])
        class_names = [f"class {i}" for i in range(int(ids[ids < VOID].max(initial=0)) + 1)]
    check_ids(out["masks"], [mask for _, mask in files], len(class_names))
    official, parts = folders.part_names(names)
    out |= {"image_ids": np.array(names), "class_names": tuple(class_names)} | official
    if any(parts):  # an image outside all subfolders is a group of its own
        out["groups"] = np.array(["/".join(p) or name for p, name in zip(parts, names, strict=True)])
    return out


def _get_stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _read_classes(path: Path) -> tuple[list[str] | None, dict[int, int] | None]:
    """Class names and 0xRRGGBB -> id from ``colors.txt`` or ``classes.txt``; None for what is not there."""
    file = path / "colors.txt" if (path / "colors.txt").is_file() else path / "classes.txt"
    if not file.is_file():
        return None, None
    lines = [x.strip() for x in file.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
    if not lines:
        raise ValueError(f"{file}: expected a class a line, got an empty file: fill or remove it")
    if file.name == "classes.txt":
        return lines, None
    names, codes = [], []
    for i, line in enumerate(lines):
        *color, name = (line + f" class {i}" if len(line.split()) == 3 else line).split(maxsplit=3)
        if len(color) < 3 or not all(x.isdecimal() and int(x) < 256 for x in color):
            raise ValueError(f"{file}: expected 'R G B name' with 0 to 255 each, got {line[:60]!r}")
        names.append(name)
        codes.append(int.from_bytes(map(int, color)))
    if len(set(codes)) < len(codes):
        raise ValueError(f"{file}: a color is listed twice: remove one line")
    classes = list(dict.fromkeys(names))  # two colors may have one name: they are one class
    return classes, {code: classes.index(name) for code, name in zip(codes, names, strict=True)}


def _settle_void(masks: np.ndarray, names: list[str] | None, void: int | str | None, path: Path) -> np.ndarray:
    """Bring the pixels without a class to 255; a foreground that is written as 255 must not become one of them."""
    ids = find_ids(masks)
    below = ids[ids < VOID]
    n_names, binary = 2 if names is None else len(names), VOID in ids and below.max(initial=0) == 0
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
