"""What was computed once is found again: folders named after what they are, with a ``meta.json``.

Identity is what a result depends on (kind, parameters, seed, data, RECIPE of the stage) and nothing else. Commit,
versions, device and seconds are provenance: recorded, never compared. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
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

from filelock import FileLock, Timeout

from mia_utils import paths

# Raised when the result of a stage changes, so that old artifacts are not taken for new ones.
RECIPES = {"scenes": 1, "encoder": 1, "decoder": 1, "features": 1, "scores": 2}


def hash_spec(spec: dict[str, Any]) -> str:
    """Return the 8-hex-digit identity of a spec (JSON with sorted keys, blake2b)."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def name_of(spec: dict[str, Any]) -> str:
    """Return the folder name ``<kind>-<readable>-<hash8>``; ``readable`` is not part of the identity."""
    identity = {key: value for key, value in spec.items() if key != "readable"}
    return "-".join(filter(None, [spec["kind"], str(spec.get("readable", "")), hash_spec(identity)]))


def find(spec: dict[str, Any]) -> Path | None:
    """Return the folder of a finished artifact from the search path, None when it has to be made."""
    for folder in paths.get_artifact_dirs():
        path = folder / name_of(spec)
        if (path / "meta.json").is_file():
            return path
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """Return ``meta.json`` of an artifact: ``spec``, ``provenance`` and what its maker added."""
    try:
        return json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"artifact {path.name} has no readable meta.json ({error}): delete the folder") from None


def get_provenance() -> dict[str, Any]:
    """Return commit, versions and machine: recorded beside a result, never part of its identity."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    commit = subprocess.run(
        ["git", "-C", str(paths.PACKAGE_ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    libraries = ("torch", "torchvision", "timm", "lightly", "scikit-learn", "numpy")
    return {
        "commit": commit or "unknown",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "machine": platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }


def get_work_dir(spec: dict[str, Any]) -> Path:
    """Return the folder of unfinished work on an artifact (resume state); it goes when the artifact is done."""
    return paths.get_artifact_dirs()[0] / ".unfinished" / name_of(spec)


def load_or_make(spec: dict[str, Any], make: Callable[[Path], dict[str, Any] | None], *, wait: float = -1) -> Path:
    """Return the artifact of a spec; make it when there is none.

    Args:
        spec: ``kind``, an optional ``readable`` part of the name, and everything the result depends on.
        make: called with an empty folder to fill; what it returns is added to ``meta.json``.
        wait: seconds to wait for another process that makes the same artifact; -1: as long as it takes.

    Returns:
        Path of the finished folder. A killed or doubled run leaves nothing half-written: the folder is filled under
        another name, under a lock, and renamed.

    Raises:
        ValueError: the folder of artifacts can't be written, or the wait ended.
    """
    found = find(spec)
    if found:
        return found
    root = paths.get_artifact_dirs()[0]
    work = get_work_dir(spec)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".unfinished" / f"{name_of(spec)}.lock")
        lock.acquire(timeout=wait)
    except Timeout:
        raise ValueError(f"another process is making {name_of(spec)}: wait for it or stop it") from None
    except OSError as error:
        raise ValueError(f"can't write to {root} ({error.strerror}): free space or give the right to write") from None
    try:
        found = find(spec)
        if found:
            return found
        part = work / "result"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        began = time.perf_counter()
        extra = make(part) or {}
        provenance = get_provenance() | {"seconds": round(time.perf_counter() - began, 2)}
        meta = {"spec": spec, "provenance": provenance, **extra}
        (part / "meta.json").write_text(json.dumps(meta, indent=1, default=str), encoding="utf-8")
        final = root / name_of(spec)
        shutil.rmtree(final, ignore_errors=True)  # a folder without meta.json is not an artifact
        os.replace(part, final)
        shutil.rmtree(work, ignore_errors=True)
        return final
    except OSError as error:
        raise ValueError(f"can't write to {root} ({error.strerror}): free space or give the right to write") from None
    finally:
        lock.release()


@contextlib.contextmanager
def hold(name: str) -> Iterator[None]:
    """Hold the lock of this name among all processes of a working folder, waiting for it as long as it takes."""
    root = paths.get_artifact_dirs()[0] / ".unfinished"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{name}.lock").acquire()
    except OSError as error:
        raise ValueError(f"can't write to {root} ({error.strerror}): free space or give the right to write") from None
    with lock:
        yield


def fingerprint_data(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Identify a data set without reading its pixels.

    Generated scenes: their RECIPE and arguments. A cache ``<name>.npz``: the check sums in its zip directory. A
    folder: names and sizes of its files. Nothing yet: None, so that a plan can be made before the download.
    """
    known = {"name": name if not name.startswith("folder:") else "folder", "arguments": arguments}
    if name.startswith("scenes"):
        return known | {"content": RECIPES["scenes"]}
    if name.startswith("folder:"):
        folder = Path(name[7:]).expanduser()
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return known | {"content": hash_spec({str(path.relative_to(folder)): path.stat().st_size for path in files})}
    source, size = name.partition("@")[0], arguments.get("size")  # NAME@SPACE: the same file, other labels
    pair = [size, size] if isinstance(size, int) else size
    wanted = [f"{source}-{pair[0]}x{pair[1]}.npz"] if pair else []
    wanted = [paths.get_raw_dir() / file for file in (*wanted, f"{source}.npz")]
    for path in [*wanted, *sorted(paths.get_raw_dir().glob(f"{source}-*.npz"))]:
        try:
            with zipfile.ZipFile(path) as archive:
                sums = {info.filename: info.CRC for info in archive.infolist()}
        except (OSError, zipfile.BadZipFile):
            continue  # not there, or damaged
        return known | {"content": hash_spec(sums)}
    return known | {"content": None}
