"""Images from disk: any image folder (``folder:PATH``), in memory or streamed, and Tiny ImageNet as it is unpacked."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mia_utils import seeds

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
OFFICIAL = {"train", "val", "test"}
AT_ONCE = 256  # images that a loop over streamed images holds decoded
QUEUED = 512  # files handed to the threads at a time


class ImageFiles(np.lib.mixins.NDArrayOperatorsMixin):
    """Images that stay in their files until they are asked for: an array uint8 (N, H, W, 3) that takes no memory.

    An int gives one decoded image (H, W, 3); a slice, positions or a bool mask give another ``ImageFiles``, and nothing
    is decoded. ``np.asarray(images[rows])`` decodes them in threads, as many as memory should hold at a time;
    arithmetic and numpy functions decode everything they are given.

    Attributes:
        files: (N,) object, paths as text.
        shape: (N, H, W, 3); ``dtype`` uint8, ``ndim`` 4.
        nbytes: what the images would take decoded, in bytes.

    Args:
        files: paths, in the order of the images.
        size: (height, width) to scale and crop to; None: all images must have one size, and their headers are read.

    Raises:
        ValueError: mixed sizes without ``size``. While decoding: a file that can not be read as an image, or that has
            another size than before. One line that names the file.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, files: Iterable[str | Path], *, size: tuple[int, int] | None = None) -> None:
        self.files = np.array([str(file) for file in files], dtype=object)
        if size is None and not len(self.files):
            raise ValueError("expected at least one image file, or size= for none")
        self._size = size
        self._height_width = size if size is not None else _read_common_size(self.files)
        self._digests: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.files), *self._height_width, 3)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        n, height, width, _ = self.shape
        return f"ImageFiles({n} files, decoded to {height} x {width}: {self.nbytes / 1e9:.2f} GB)"

    def __getitem__(self, index: Any) -> np.ndarray | ImageFiles:
        if isinstance(index, tuple):  # images[i, ..., 0]: an index into pixels, of one image
            if not index or not isinstance(index[0], (int, np.integer)):
                raise TypeError(
                    "streamed images: expected rows alone or one row and its pixels: np.asarray(images[rows])"
                )
            return self[index[0]][index[1:]]
        if isinstance(index, (int, np.integer)):
            return self._decode(self.files[operator.index(index)])
        rows = index if isinstance(index, slice) else np.asarray(index)
        if not isinstance(rows, slice) and rows.size == 0:
            rows = rows.astype(np.int64)  # an empty list has the type float
        part = object.__new__(type(self))
        part.files, part._size, part._height_width = self.files[rows], self._size, self._height_width
        part._digests = None if self._digests is None else self._digests[rows]
        if part.files.ndim != 1:
            raise TypeError(f"streamed images: expected positions (n,), got {part.files.shape}")
        return part

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), AT_ONCE):
            yield from np.asarray(self[start : start + AT_ONCE])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("streamed images are decoded, which makes a new array: copy=False is not possible")
        decoded = self.decode()
        return decoded if dtype is None else decoded.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        inputs = [np.asarray(x) if isinstance(x, ImageFiles) else x for x in inputs]
        return getattr(ufunc, method)(*inputs, **kwargs)

    def decode(self, *, title: str = "images", progress: bool = True) -> np.ndarray:
        """Decode all images in threads (``np.asarray`` does the same). -> (N, H, W, 3) uint8

        Args:
            title: text before the progress bar.
            progress: show a bar (images/s) when there are many files.

        Raises:
            ValueError: they do not fit in memory, or a file can not be read (named). One line.
        """
        if self.nbytes > 0.6 * _count_memory():
            n, height, width, _ = self.shape
            raise ValueError(
                f"{n} images of {height} x {width} need {self.nbytes / 1e9:.1f} GB of memory: pass a smaller size= or "
                "n=, or stream=True and decode a part at a time"
            )
        out = np.empty(self.shape, dtype=np.uint8)
        for i, row in enumerate(_map_files(self._decode, self.files, title=f"reading {title}", progress=progress)):
            out[i] = row
        return out

    def _decode(self, file: str) -> np.ndarray:
        row = _read_image(file, self._size)
        if row.shape[:2] != self._height_width:
            expected, got = (f"{h} x {w}" for h, w in (self._height_width, row.shape[:2]))
            raise ValueError(
                f"{file}: expected {expected} pixels as when the folder was listed, got {got}: load it again"
            )
        return row

    @property
    def digests(self) -> np.ndarray:
        """(N, 16) uint8 blake2b of each file, all read in threads once: who the images are, without decoding them."""
        if self._digests is None:
            rows = _map_files(_digest_file, self.files, title="comparing files")
            self._digests = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16)
        return self._digests


def join_images(parts: Sequence[np.ndarray | ImageFiles]) -> np.ndarray | ImageFiles:
    """Concatenate images of one size; streamed where all parts are, else decoded."""
    if not all(isinstance(part, ImageFiles) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])
    joint = parts[0][:0]
    joint.files = np.concatenate([part.files for part in parts])
    if any(part._size is not None for part in parts):
        joint._size = joint._height_width  # changes nothing where images have this size already
    joint._digests = None
    return joint


def read_folder(
    path: str | Path, *, size: tuple[int, int] | None = None, n: int | None = None, seed: int = 0, stream: bool = False
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
        stream: leave the images in their files (``ImageFiles``); each is decoded when it is used.

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
    images = ImageFiles((path / name for name in names), size=size)
    out = {
        "images": images if stream else images.decode(title=path.name),
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
    return ImageFiles(files, size=size).decode(title=title, progress=progress)


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
    # on a cluster a job may use fewer cores than the machine has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


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


def _map_files(
    function: Callable[[str], Any], files: Sequence[str], *, title: str, progress: bool = True
) -> Iterator[Any]:
    """Call a function of each file in threads; results in order, with a bar when there are many."""
    show = progress and len(files) >= 1000
    n_threads = count_threads()
    together = max(1, min(8, len(files) // (4 * n_threads)))  # one by one, handing over costs a tenth of a decoding

    def run(part: Sequence[str]) -> list[Any]:
        return [function(file) for file in part]

    with (
        ThreadPoolExecutor(n_threads) as executor,
        tqdm(total=len(files), desc=title, unit="image", disable=None if show else True) as bar,
    ):
        for start in range(0, len(files), QUEUED):  # a queue entry takes a kilobyte: millions of files, few entries
            queued = files[start : start + QUEUED]
            for rows in executor.map(run, (queued[i : i + together] for i in range(0, len(queued), together))):
                yield from rows
                bar.update(len(rows))


def _read_common_size(files: Sequence[str]) -> tuple[int, int]:
    """Height and width that all images share, from their headers: mixed sizes are found before anything is decoded."""
    first = height_width = None
    for file, found in zip(files, _map_files(_read_size, files, title="reading headers"), strict=True):
        if first is None:
            first, height_width = file, found
        elif found != height_width:
            raise ValueError(
                f"images of mixed sizes: {first} is {height_width[0]} x {height_width[1]}, {file} is "
                f"{found[0]} x {found[1]} (height x width): pass size= to scale and center-crop them"
            )
    return height_width


def _read_size(file: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:
        raise _make_error(file, error) from error


def _read_image(file: str, size: tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                # Pillow would clip 16-bit values to white without a word
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel, convert it to 8-bit RGB")
            image = image.convert("RGB")
        return np.asarray(image if size is None else cover(image, size))
    except Exception as error:  # Pillow raises a different type for each format and kind of damage
        raise _make_error(file, error) from error


def _digest_file(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise _make_error(file, error) from error


def _make_error(file: str, error: Exception) -> ValueError:
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
