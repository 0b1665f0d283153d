"""Images from disk: any image folder (``folder:PATH``), in memory or streamed, and the decoding that all sources share.

Every file is turned as its EXIF orientation says, and what is transparent is put on white.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.datasets import cache

FORMATS = set("AVIF BMP DIB GIF JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split())
LEFTOVERS = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # of the system, beside everything that begins with a dot
OFFICIAL = {"train", "val", "test"}
QUEUED = 512  # files handed to the threads at a time


@lru_cache(maxsize=1)
def list_suffixes() -> frozenset[str]:
    """Return the suffixes of photographs that this Pillow can read."""
    Image.init()  # loads all plugins: only where a folder is listed
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in FORMATS and name in Image.OPEN)


def list_images(path: Path, left_out: dict[str, list[str]]) -> list[str]:
    """List the image files below a folder, links followed, as sorted relative paths; the rest goes to ``left_out``."""
    if not path.is_dir():
        raise FileNotFoundError(f"expected a folder of images, got {path}, which is no folder: check the path")
    names: list[str] = []

    def walk(folder: str, prefix: str, above: frozenset[str]) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name, reason = prefix + entry.name, None
            if entry.name.startswith(".") or entry.name in LEFTOVERS:
                reason = "hidden or of the system"
            elif entry.is_dir():
                if (real := os.path.realpath(entry.path)) in above:
                    reason = "a link to a folder above it"
                else:
                    walk(entry.path, f"{name}/", above | {real})
            elif Path(entry.name).suffix.lower() not in list_suffixes():
                reason = "no image format that Pillow reads"
            elif not entry.is_file():  # a named pipe would block the one who opens it
                reason = "no regular file"
            else:
                names.append(name)
            if reason:
                left_out.setdefault(reason, []).append(name)

    try:
        walk(str(path), "", frozenset([os.path.realpath(path)]))
    except OSError as error:
        raise ValueError(f"{error.filename}: can not be listed ({error.strerror}): change its permissions") from error
    if wrong := [name for name in names if name.encode(errors="replace").decode() != name]:
        raise ValueError(f"{path}: the file name {wrong[0]!r} is not valid UTF-8: rename it")
    if not names:
        known = ", ".join(sorted(list_suffixes()))
        raise FileNotFoundError(f"{path}: no image in this folder (looked for {known}): name another folder")
    return sorted(names)


def say_left_out(path: Path, n: int, left_out: dict[str, list[str]]) -> None:
    """Print one line that counts and names the files of a folder that are not read."""
    if left_out:
        kinds = [f"{', '.join(x[:3])}{' ...' * (len(x) > 3)} ({len(x)}: {why})" for why, x in left_out.items()]
        print(f"{path.name}: {n} images; left out: {'; '.join(kinds)}", file=sys.stderr)


def draw_names(names: list[str], n: int | None, rng: np.random.Generator, path: Path) -> list[str]:
    """Draw n of the sorted names without replacement; None: all."""
    if n is None:
        return names
    if n > len(names):
        raise ValueError(f"expected at most {len(names)} images from {path}, got n={n}")
    return [names[i] for i in np.sort(rng.choice(len(names), size=n, replace=False))]


def part_names(names: list[str]) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Part relative paths into the official split, where all first folders are one, and the folders below it."""
    parts = [name.split("/")[:-1] for name in names]
    if all(p and p[0] in OFFICIAL for p in parts):
        return {"official_split": np.array([p[0] for p in parts])}, [p[1:] for p in parts]
    return {}, parts


def read_folder(
    path: str | Path, *, size: tuple[int, int] | None = None, n: int | None = None, seed: int = 0,
    stream: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read any image folder; relative paths are the image ids, ``n`` files are drawn before anything is decoded.

    The first subfolder is the class; where all first subfolders are called train, val or test they are the official
    split and the second one is the class. A flat folder is one class.

    Args:
        size: (height, width): scale each image to cover it, then center crop; None: all images must have one size.
        stream: decode into memory maps in this folder, once, instead of into memory.
    """
    path, left_out = Path(path), {}
    names = draw_names(list_images(path, left_out), n, seeds.rng(seed, "folders.read_folder"), path)
    say_left_out(path, len(names), left_out)
    out, parts = part_names(names)
    class_names, labels = np.unique([p[0] if p else "all" for p in parts], return_inverse=True)
    if size is not None and stream is None:
        cache.check_memory((len(names), *size, 3))
    read, key = partial(read_image, size=size), (path.resolve(), size, n, seed)
    images = decode(read, [(path / name,) for name in names], title=path.name, stream=stream, key=key)
    return out | {
        "images": images if stream is None else cache.MappedImages([images]), "labels": labels.astype(np.int64),
        "image_ids": np.array(names), "class_names": tuple(class_names.tolist()),
    }  # fmt: skip


def decode(
    read: Callable[..., np.ndarray], items: Sequence[tuple[Path, ...]], *, title: str, stream: Path | None = None,
    key: tuple = (),
) -> np.ndarray:  # fmt: skip
    """Decode files in threads, into memory or once into a memory map in ``stream``; an unreadable one is named.

    Args:
        read: called with the files of an item, the image first; returns (H, W, channels) uint8.
        items: N tuples of files.
        key: what the pixels depend on beside the files themselves.

    Returns:
        (N, H, W, channels) uint8.
    """

    def read_rows() -> Iterator[np.ndarray]:
        first = None
        for item, row in zip(items, map_files(read, items, title=f"reading {title}"), strict=True):
            first = row if first is None else first
            if row.shape != first.shape:
                sizes = [f"{file} is {x.shape[0]} x {x.shape[1]}" for file, x in ((items[0][0], first), (item[0], row))]
                how = "pass size= to scale and center-crop them"
                raise ValueError(f"images of mixed sizes: {', '.join(sizes)} (height x width): {how}")
            yield np.ascontiguousarray(row)

    if stream is not None:
        states = [(file, file.stat()) for item in items for file in item]  # ctime changes whenever a file does
        states = [(str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns) for file, found in states]
        source, data = (hashlib.blake2b(repr(x).encode(), digest_size=8).hexdigest() for x in (key, states))
        return cache.map_rows(stream / f"streamed-{source}.{data}.npy", len(items), read_rows())
    out = None
    for i, row in enumerate(read_rows()):
        if out is None:
            cache.check_memory((len(items), *row.shape))
            out = np.empty((len(items), *row.shape), np.uint8)
        out[i] = row
    return out


def read_image(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a file, scaled and cropped to (height, width) unless None. -> (H, W, 3) uint8"""
    image = open_rgb(file)
    return np.asarray(image if size is None else cover(image, size))


def open_rgb(file: Path) -> Image.Image:
    """Decode a file to RGB: upright, on white; one line that names it when it is damaged or has more than 8 bits."""
    try:
        with Image.open(file) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                # Pillow would clip 16-bit values to white without a word
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel, convert it to 8-bit RGB")
            image = turn_upright(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: the folder is incomplete") from None
    except Exception as error:  # Pillow raises a different type for each format and kind of damage
        reason = " ".join(str(error).replace(str(file), "file").split())[:120] or type(error).__name__
        raise ValueError(f"{file}: can not be read as an image ({reason}): repair or remove it") from error


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says, like every viewer and the tools that masks are drawn with."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data say nothing about the pixels, which were decoded
        return image


def cover(image: Image.Image, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Scale an image so that it just covers (height, width), keeping its shape, and crop the center.

    For a square this is torchvision's ``Resize(size)`` and ``CenterCrop(size)``, to the pixel.
    """
    (height, width), (w, h) = size, image.size
    w, h = (w * height // h, height) if height * w >= width * h else (width, h * width // w)
    image = image if (w, h) == image.size else image.resize((w, h), how)
    left, top = round((w - width) / 2), round((h - height) / 2)
    return image.crop((left, top, left + width, top + height))


def count_threads() -> int:
    """Return the number of decoding threads: Pillow releases the interpreter lock while it decodes."""
    # on a cluster a job may use fewer cores than the machine has
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def map_files(function: Callable[..., Any], items: Sequence[tuple], *, title: str) -> Iterator[Any]:
    """Call a function of each item in threads; results in order, with a bar when there are many."""
    few = None if len(items) >= 1000 else True  # None: only where a terminal shows it
    with (
        ThreadPoolExecutor(count_threads()) as executor,
        tqdm(total=len(items), desc=title, unit="image", leave=False, disable=few) as bar,
    ):
        for start in range(0, len(items), QUEUED):  # decoded rows wait in memory: threads run ahead by a bounded number
            for result in executor.map(lambda item: function(*item), items[start : start + QUEUED]):
                yield result
                bar.update()
