"""What was computed once is found again: folders named after what they are, with a ``meta.json``.

Identity is what a result depends on (kind, parameters, seed, data, RECIPE of the stage). Commit, versions, device and
seconds are provenance: recorded, never compared. Nothing here imports torch.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mia_utils import paths

# Raised when the result of a stage changes, so that old artifacts are not taken for new ones.
RECIPES = {"scenes": 1, "encoder": 1, "decoder": 1, "features": 1, "scores": 2}
TRAINED = ("encoder",)  # kinds that take hours: a damaged one is named, all others are made again
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


class Damaged(ValueError):
    """An artifact that is not what it says; the message is one line that names the file."""

    def __init__(self, path: str, reason: str, advice: str = "put it back or delete the folder"):
        super().__init__(f"{path} {' '.join(reason.split())[:160]}: {advice}")


def hash_spec(spec: dict[str, Any]) -> str:
    """Return the 8-hex-digit identity of a spec (JSON with sorted keys, blake2b)."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def name_of(spec: dict[str, Any]) -> str:
    """Return the folder name ``<kind>-<readable>-<hash8>``; ``readable`` is not part of the identity."""
    identity = {key: value for key, value in spec.items() if key != "readable"}
    return "-".join(filter(None, [spec["kind"], str(spec.get("readable", "")), hash_spec(identity)]))


def find(spec: dict[str, Any], *, whole: bool = False) -> Path | None:
    """Return the folder of a finished artifact, None when it has to be made; a damaged one of hours is an error.

    The bytes of files are compared only where the artifact has to be ``whole``, and where they are read (``verify``).
    """
    for path in [folder / name_of(spec) for folder in paths.get_artifact_dirs()]:
        if not (path / "meta.json").is_file():
            continue
        try:
            for name in read_meta(path).get("files", {}):
                if not (path / name).is_file() or not (path / name).stat().st_size:
                    raise Damaged(f"{path.name}:", f"{name} is missing or empty")
            if whole:
                verify(path)
            return path
        except Damaged as error:
            if spec["kind"] in TRAINED:
                raise
            if whole:
                print(f"{error}; it is made again", flush=True)
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """Return ``meta.json`` of an artifact: ``spec``, ``provenance``, ``files`` and what its maker added."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        told, digest = name_of(meta["spec"]), meta.pop("digest", None)
        if not isinstance(meta.get("files", {}), dict) or not isinstance(meta.setdefault("provenance", {}), dict):
            raise ValueError("files or provenance is no mapping")
        if digest not in (None, hash_text(meta)):
            raise ValueError("it was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path.name}/meta.json", f"can't be read ({error})") from None
    if told != path.name:
        advice = "put them back or delete them"
        raise Damaged(f"{path.name}/meta.json", f"is that of {told}: folders were exchanged", advice)
    return meta


@functools.cache  # once per process
def verify(path: Path) -> None:
    """Compare every file of an artifact with its digest, else raise ``Damaged``; without digests (old) it passes."""
    for name, digest in read_meta(path).get("files", {}).items():
        try:
            if hash_file(path / name) != digest:
                raise Damaged(f"{path.name}:", f"{name} was changed since it was written")
        except OSError as error:
            raise Damaged(f"{path.name}:", f"{name} can't be read ({error.strerror})") from None


def hash_file(path: Path) -> str:
    """Return the digest of a file (blake2b, 16 bytes, as hex)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_text(value: Any) -> str:
    """Return the digest of what can be written as JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def get_commit() -> str:
    """Return the commit of this checkout; "unknown" without git, or where the repository is another project's."""
    command = ["git", "-C", str(paths.PACKAGE_ROOT), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return "unknown"
    return said[1] if len(said) == 2 and Path(said[0]).resolve() == paths.PACKAGE_ROOT else "unknown"


def get_provenance() -> dict[str, Any]:
    """Return commit, versions and machine: recorded beside a result, never part of its identity."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "lightly", "scikit-learn", "numpy", "scipy", "mia-utils"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    made = {"machine": platform.machine(), "threads": threads, "made": time.strftime("%Y-%m-%d %H:%M")}
    return {"commit": get_commit(), "versions": versions, **made}


def get_work_dir(spec: dict[str, Any]) -> Path:
    """Return the folder of unfinished work on an artifact (resume state); it goes when the artifact is done."""
    return paths.get_artifact_dirs()[0] / ".unfinished" / name_of(spec)


def load_or_make(spec: dict[str, Any], make: Callable[[Path], dict[str, Any] | None]) -> Path:
    """Return the artifact of a spec, verified; make it when there is none, or when it is damaged and quickly made.

    A killed or doubled run leaves nothing half-written: the folder is filled under another name and lock, and renamed.

    Args:
        spec: ``kind``, an optional ``readable`` part of the name, and everything the result depends on.
        make: called with an empty folder to fill; what it returns is added to ``meta.json``.
    """
    if found := find(spec, whole=True):
        return found
    work, final = get_work_dir(spec), paths.get_artifact_dirs()[0] / name_of(spec)
    part = work / "result"
    with hold(name_of(spec)):
        if found := find(spec, whole=True):
            return found
        shutil.rmtree(part, ignore_errors=True)
        with _explain_writing(final.parent):
            try:
                part.mkdir(parents=True)
                began = time.perf_counter()
                extra = make(part) or {}
                provenance = get_provenance() | {"seconds": round(time.perf_counter() - began, 2)}
                made = sorted(path for path in part.rglob("*") if path.is_file())
                files = {str(path.relative_to(part)): hash_file(path) for path in made}
                meta = {"spec": spec, "provenance": provenance, "files": files, **extra}
                meta = json.loads(json.dumps(meta, default=str))
                meta["digest"] = hash_text(meta)
                (part / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
                shutil.rmtree(final, ignore_errors=True)  # damaged, or without meta.json: no artifact
                part.replace(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        verify.cache_clear()
        return final


@contextlib.contextmanager
def _explain_writing(folder: Path) -> Iterator[None]:
    """Say in one line that a folder can't be written; safetensors has an exception of its own for a full disk."""
    try:
        yield
    except Exception as error:
        if not (getattr(error, "errno", None) in _WRITE_ERRORS or "No space left" in str(error)):
            raise
        reason = getattr(error, "strerror", None) or "No space left on device"
        raise ValueError(f"can't write to {folder} ({reason}): free space or give the right to write") from None


def hold(name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of this name among all processes of a working folder."""
    return paths.hold(paths.get_artifact_dirs()[0] / ".unfinished" / f"{name}.lock")


def fingerprint_data(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Identify a data set without its pixels: by recipe, check sums in a zip directory, or names and sizes of files.

    Where there is nothing yet, the content is None, so that a plan can be made before the download.
    """
    source, size, content = name.partition("@")[0], arguments.get("size"), None  # NAME@SPACE: the same file
    if name.startswith("scenes"):
        content = RECIPES["scenes"]
    elif name.startswith("folder:"):
        folder = Path(name[7:]).expanduser()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        name, content = "folder", hash_spec({str(path.relative_to(folder)): path.stat().st_size for path in files})
    else:
        pair = [size, size] if isinstance(size, int) else size
        wanted = [paths.get_raw_dir() / f"{source}-{pair[0]}x{pair[1]}.npz"] if pair else []
        others = sorted(paths.get_raw_dir().glob(f"{source}-*.npz"))
        for path in [*wanted, paths.get_raw_dir() / f"{source}.npz", *others]:
            with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
                content = hash_spec({info.filename: info.CRC for info in archive.infolist()})
                break
    return {"name": name, "arguments": arguments, "content": content}
