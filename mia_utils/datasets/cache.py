"""Arrays on disk: npz caches, and memory maps of folders that memory does not hold."""

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mia_utils import paths


class MappedImages(np.lib.mixins.NDArrayOperatorsMixin):
    """Images that stay on disk: an array uint8 (N, H, W, 3) that takes no memory.

    An int gives one image (H, W, 3); a slice, positions or a bool mask give other ``MappedImages``, and nothing is
    read. ``np.asarray(images[rows])`` reads them, as do arithmetic and numpy functions. ``rows`` (N,) are positions in
    the ``maps`` (n, H, W, 3) uint8, one after the other.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, maps: Sequence[np.ndarray], rows: np.ndarray | None = None) -> None:
        self.maps = list(maps)
        self.rows = np.arange(sum(map(len, self.maps))) if rows is None else rows

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), *self.maps[0].shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> "np.ndarray | MappedImages":
        if isinstance(index, tuple) and index and isinstance(index[0], (int, np.integer)):  # pixels of one image
            return self[index[0]][index[1:]]
        if isinstance(index, tuple) or np.ndim(rows := self.rows[index]) > 1:
            raise TypeError("streamed images: expected rows alone or one row and its pixels: np.asarray(images[rows])")
        part = MappedImages(self.maps, np.atleast_1d(rows))
        return part if np.ndim(rows) else np.asarray(part)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("streamed images are read, which makes a new array: copy=False is not possible")
        check_memory(self.shape)
        out, start = np.empty(self.shape, np.uint8), 0
        for part in self.maps:
            here = (self.rows >= start) & (self.rows < start + len(part))
            out[here] = part[self.rows[here] - start]
            start += len(part)
        return out if dtype is None else out.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        inputs = [np.asarray(x) if isinstance(x, MappedImages) else x for x in inputs]
        return getattr(ufunc, method)(*inputs, **kwargs)


def join_images(parts: Sequence[np.ndarray | MappedImages]) -> np.ndarray | MappedImages:
    """Concatenate images of one size; streamed where all parts are, else read."""
    if not all(isinstance(part, MappedImages) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])
    starts = np.cumsum([0, *(sum(map(len, part.maps)) for part in parts)])
    rows = [part.rows + start for part, start in zip(parts, starts, strict=False)]
    return MappedImages([each for part in parts for each in part.maps], np.concatenate(rows))


def check_memory(shape: tuple[int, ...]) -> None:
    """Refuse an array of bytes that this machine's memory does not hold, before anything is read."""
    n_bytes = np.prod(shape, dtype=np.int64)
    if n_bytes > 0.6 * count_memory():
        raise ValueError(
            f"{shape[0]} images of {shape[1]} x {shape[2]} need {n_bytes / 1e9:.1f} GB of memory: pass a smaller size= "
            "or n=, or stream=True and read a part at a time"
        )


def count_memory() -> float:
    """Return the bytes of memory of this machine, or infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def fetch(make: Callable[[], Any], root: Path, name: str, place: str) -> Any:
    """Download or open a data set; whatever goes wrong becomes one line that says what to place in ``root``."""
    try:
        return make()
    except Exception as error:  # network, disk, checksum, broken archive: urllib and torchvision raise many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        text = f"{name}: could not download it ({reason}): place {place} in {root}, see data/README.md"
        raise FileNotFoundError(text) from error


def find_root(root: str | Path | None, *, needed: bool) -> Path | None:
    """Return the data folder; a folder the user named must exist, the default one is made when it is written to."""
    folder = paths.get_raw_dir() if root is None else Path(root).expanduser()
    if folder.is_dir() or (root is None and not os.environ.get("MIA_DATA_DIR")):
        return folder
    if not needed:
        return None
    named = "MIA_DATA_DIR" if root is None else "the data folder"
    raise FileNotFoundError(f"expected {named} to be a folder, got {folder}: create it or name another")


def name_cache(folder: Path, name: str, size: tuple[int, int] | None) -> Path:
    """Return the cache file that is written: with its size where a data set has no size of its own."""
    return folder / (f"{name}-{size[0]}x{size[1]}.npz" if size else f"{name}.npz")


def find_cache(folder: Path, name: str, size: tuple[int, int] | None) -> Path | None:
    """Return the cache file of a data set: that of this size, else ``NAME.npz``, else the largest."""
    matches = [re.fullmatch(rf"{re.escape(name)}-(\d+)x(\d+)\.npz", file.name) for file in sorted(folder.glob("*.npz"))]
    sized = {(int(m[1]), int(m[2])): folder / m[0] for m in matches if m}
    if size in sized:
        return sized[size]
    if (folder / f"{name}.npz").is_file():
        return folder / f"{name}.npz"
    if size is None and len(sized) > 1:
        found = ", ".join(path.name for path in sized.values())
        raise ValueError(f"{folder} holds {found}: pass size=(height, width) to choose one")
    return max(sized.items())[1] if sized else None  # scaled down by the caller


def read_cache(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file; a damaged file is one line, pickled objects are refused and never executed."""
    out, key = {}, ""
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                out[key] = file[key]
        return out
    except PermissionError as error:
        raise ValueError(f"{path}: no right to read it: change its permissions") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, TypeError, SyntaxError) as error:
        which = f" (array {key!r})" if key else ""
        if "pickle" in str(error).lower():
            reason = f"a pickle of Python objects{which}, refused because it could run code: save plain arrays"
        else:
            reason = f"damaged or no npz file with several named arrays{which}: delete it and fetch or unpack it again"
        raise ValueError(f"{path}: {reason}") from error


def write_cache(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays of a pool into an npz file; no right or no space to write is one line."""
    arrays = {k: np.array(v, dtype=np.str_) if isinstance(v, tuple) else np.asarray(v) for k, v in arrays.items()}
    paths.write_atomic(path, lambda file: np.savez(file, **arrays))


def map_rows(path: Path, n: int, rows: Iterator[np.ndarray]) -> np.memmap:
    """Map n rows of one shape, uint8, into memory; written once, and again where the file is not as it was written.

    Of the files ``SOURCE.DATA.npy`` those of the same SOURCE and other DATA are removed.
    """
    source = path.name.partition(".")[0]
    if not _is_whole(path):
        with paths.hold(path.with_name(f".{source}.lock")):
            if not _is_whole(path):  # another job may have written it while this one waited
                for old in path.parent.glob(f"{source}.*.npy"):
                    old.unlink()
                # written, not mapped: a full disk is an error here and a crash there
                paths.write_atomic(path, lambda file: _write_rows(file, n, rows))
    return np.load(path, mmap_mode="r")


def _write_rows(file: BinaryIO, n: int, rows: Iterator[np.ndarray]) -> None:
    """Write an npy file and its digest behind it, where numpy does not look."""
    digest, header, first = hashlib.blake2b(digest_size=16), io.BytesIO(), next(rows)
    kind = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape)}
    np.lib.format.write_array_header_1_0(header, kind)
    for part in chain([header.getvalue(), first], rows):
        file.write(part)
        digest.update(part)
    file.write(digest.digest())


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    digest, left = hashlib.blake2b(digest_size=16), path.stat().st_size - 16
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        return file.read() == digest.digest()
