"""Images from disk: any image folder (``folder:PATH``) and Tiny ImageNet as it is unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mia_utils import seeds

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
OFFICIAL = {"train", "val", "test"}


def read_folder(
    path: str | Path, *, size: tuple[int, int] | None = None, n: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Read any image folder.

    Files are sorted and their relative paths are the image ids. The first subfolder is the class; where all first
    subfolders are called train, val or test they are the official split and the second one is the class. A flat
    folder is one class.

    Args:
        path: folder with images, in class subfolders or flat.
        size: (height, width): scale each image to cover it, then center crop; None: all images must have one size.
        n: draw this many files before anything is decoded; None: all.
        seed: which n files.

    Returns:
        dict with the arrays of a ``Pool``.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a file that is no readable image (named), or images of mixed sizes without ``size``.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"expected a folder of images, got {path}, which is no folder: check the path")
    names = sorted(_list_images(path))
    if not names:
        raise FileNotFoundError(
            f"{path}: no image in this folder (looked for {', '.join(sorted(SUFFIXES))}): name another folder"
        )
    bad = [name for name in names if not _is_utf8(name)]
    if bad:
        raise ValueError(f"{path}: the file name {bad[0]!r} is not valid UTF-8: rename it")
    if n is not None:
        if n > len(names):
            raise ValueError(f"expected at most {len(names)} images from {path}, got n={n}")
        keep = seeds.rng(seed, "folders.read_folder").choice(len(names), size=n, replace=False)
        names = [names[i] for i in np.sort(keep)]

    parts = [name.split("/")[:-1] for name in names]
    is_official = all(p and p[0] in OFFICIAL for p in parts)
    classes = [next(iter(p[is_official:]), "") or "all" for p in parts]
    class_names = tuple(sorted(set(classes)))
    numbers = {name: i for i, name in enumerate(class_names)}
    out = {
        "images": read_images([path / name for name in names], size=size, title=path.name),
        "labels": np.array([numbers[name] for name in classes], dtype=np.int64),
        "image_ids": np.array(names),
        "class_names": class_names,
    }
    if is_official:
        out["official_split"] = np.array([p[0] for p in parts])
    return out


def read_tiny_imagenet(root: Path) -> dict[str, Any]:
    """Read Tiny ImageNet (64 x 64, 200 classes; 100,000 train and 10,000 val images) from its unpacked archive.

    Args:
        root: folder that holds ``tiny-imagenet-200``.

    Raises:
        FileNotFoundError: the folder is missing or is not laid out like the official archive.
    """
    folder = Path(root) / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    wnids = sorted(p.name for p in folder.glob("train/*") if (p / "images").is_dir())
    if not wnids or not annotations.is_file():
        raise FileNotFoundError(
            f"tiny_imagenet: expected {folder} with train/WNID/images/*.JPEG, val/images/*.JPEG and "
            "val/val_annotations.txt: unpack tiny-imagenet-200.zip (240 MB) of the Stanford course CS231n there"
        )
    numbers = {wnid: i for i, wnid in enumerate(wnids)}
    files = [(p, wnid, "train") for wnid in wnids for p in sorted((folder / "train" / wnid / "images").iterdir())]
    files = [entry for entry in files if entry[0].suffix.lower() in SUFFIXES]
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        fields = line.split("\t")  # file name, wnid, then a box
        if len(fields) < 2 or fields[1] not in numbers:
            raise ValueError(f"{annotations}, line {number}: expected 'FILE<tab>WNID', got {line[:60]!r}: unpack again")
        files.append((folder / "val" / "images" / fields[0], fields[1], "val"))
    words = {}
    if (folder / "words.txt").is_file():
        for line in (folder / "words.txt").read_text().splitlines():
            wnid, _, text = line.partition("\t")
            words[wnid] = text.split(",")[0].strip()
    return {
        "images": read_images([entry[0] for entry in files], title="tiny_imagenet"),
        "labels": np.array([numbers[entry[1]] for entry in files], dtype=np.int64),
        "image_ids": np.array([f"{entry[2]}/{entry[0].name}" for entry in files]),
        "official_split": np.array([entry[2] for entry in files]),
        "class_names": tuple(words.get(wnid) or wnid for wnid in wnids),
    }


def read_images(
    files: Sequence[Path], *, size: tuple[int, int] | None = None, title: str = "images", progress: bool = True
) -> np.ndarray:
    """Decode image files with Pillow in a thread pool.

    Args:
        files: paths, in the order of the result.
        size: (height, width) to scale and crop to; None: all images must have one size.
        title: text before the progress bar.
        progress: show a bar (images/s) when there are many files.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        ValueError: a file that can not be read as an image, or mixed sizes. One line that names the files.
    """
    with ThreadPoolExecutor(count_threads()) as executor:
        if size is None:
            # headers first: mixed sizes are found before anything is decoded
            sizes = executor.map(_read_size, files)
            first = height_width = None
            for file, found in zip(files, sizes, strict=True):
                if first is None:
                    first, height_width = file, found
                elif found != height_width:
                    raise ValueError(
                        f"images of mixed sizes: {first} is {height_width[0]} x {height_width[1]}, {file} is "
                        f"{found[0]} x {found[1]} (height x width): pass size= to scale and center-crop them"
                    )
        else:
            height_width = size
        n_bytes = len(files) * height_width[0] * height_width[1] * 3
        if n_bytes > 0.6 * _count_memory():
            raise ValueError(
                f"{len(files)} images of {height_width[0]} x {height_width[1]} need {n_bytes / 1e9:.1f} GB of memory: "
                "pass a smaller size= or n="
            )
        out = np.empty((len(files), *height_width, 3), dtype=np.uint8)
        rows = executor.map(lambda file: _read_image(file, size), files)
        bar = tqdm(rows, total=len(files), desc=f"reading {title}", unit="image", disable=not progress or None)
        for i, row in enumerate(bar if len(files) >= 1000 else rows):
            out[i] = row
    return out


def cover(image: Image.Image, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Scale an image so that it just covers (height, width), keeping its shape, and crop the center.

    For a square this is torchvision's ``Resize(size)`` and ``CenterCrop(size)``, to the pixel.
    """
    (height, width), (w, h) = size, image.size
    w, h = (w * height // h, height) if height * w >= width * h else (width, h * width // w)
    if (w, h) != image.size:
        image = image.resize((w, h), how)
    left, top = round((w - width) / 2), round((h - height) / 2)
    return image.crop((left, top, left + width, top + height))


def count_threads() -> int:
    """Return the number of decoding threads: Pillow releases the interpreter lock while it decodes."""
    return min(8, os.cpu_count() or 1)


def _list_images(path: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        here = Path(folder).relative_to(path)
        for name in files:
            # hidden files are leftovers of the system ("._photo.jpg"), never pictures
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                names.append((here / name).as_posix())
    return names


def _read_size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:
        raise _make_error(file, error) from error


def _read_image(file: Path, size: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                # Pillow would clip 16-bit values to white without a word
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel, convert it to 8-bit RGB")
            image = image.convert("RGB")
        return np.asarray(image if size is None else cover(image, size))
    except Exception as error:  # Pillow raises a different type for each format and kind of damage
        raise _make_error(file, error) from error


def _make_error(file: Path, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{file}: no such file: the folder is incomplete")
    reason = " ".join(str(error).replace(str(file), "file").split()) or type(error).__name__
    return ValueError(f"{file}: can not be read as an image ({reason[:120]}): repair or remove it")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_memory() -> float:
    """Return the bytes of memory of this machine, or infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
