"""Where things are kept, and how a file is written; all paths follow from the project folder and three variables.

``MIA_HOME`` moves the working folder, ``MIA_DATA_DIR`` moves ``data/raw``, ``MIA_ARTIFACTS`` adds read-only artifact
folders (separated like ``PATH``).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def is_checkout() -> bool:
    """Whether the notebooks stand beside the package; an installed wheel has none."""
    return (PACKAGE_ROOT / "notebooks").is_dir()


def to_folder(name: str, value: str) -> Path:
    """Return the folder that a variable names; an empty text and an unknown user are refused."""
    if value.strip():
        with contextlib.suppress(RuntimeError):  # ~user
            return Path(value).expanduser().resolve()
    raise ValueError(f"{name}: expected a folder, got {value or 'an empty text'}; name one or unset the variable")


def get_home() -> Path:
    """Return the project folder: ``MIA_HOME``, else the checkout that holds this package, else a user cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mia_utils"
    return to_folder("MIA_HOME", os.environ.get("MIA_HOME", str(PACKAGE_ROOT if is_checkout() else cache)))


def get_raw_dir() -> Path:
    """Return the folder of downloads and data caches: ``MIA_DATA_DIR``, else ``data/raw``."""
    value = os.environ.get("MIA_DATA_DIR")
    return to_folder("MIA_DATA_DIR", value) if value else get_home() / "data" / "raw"


def get_artifact_dirs() -> list[Path]:
    """Return the artifact search path: the writable ``data/artifacts`` first, then ``MIA_ARTIFACTS``."""
    extra = [to_folder("MIA_ARTIFACTS", p) for p in os.environ.get("MIA_ARTIFACTS", "").split(os.pathsep) if p]
    return [get_home() / "data" / "artifacts", *extra]


def get_scores_dir(profile: str) -> Path:
    """Return the folder of a profile's evaluations, a file each."""
    return get_home() / "data" / "scores" / profile


def get_results_dir() -> Path:
    """Return the folder of packed results, ``<profile>.csv`` to read and ``<profile>.npz`` with the scores."""
    return get_home() / "data" / "results"


def get_figures_dir(profile: str) -> Path:
    """Return the folder of figures of a profile."""
    return get_home() / "figures" / profile


def get_build_dir(profile: str) -> Path:
    """Return the folder of executed notebooks, markers and logs of a profile."""
    return get_home() / "build" / profile


def get_threads() -> int | None:
    """Return ``OMP_NUM_THREADS``, ``None`` when it is not set; anything but a positive number is a ValueError."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value and not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError(f"OMP_NUM_THREADS: expected a number of at least 1, got {value!r}; set it or unset it")
    return int(value) if value else None


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold a lock file among all processes: of two that make the same thing one waits, and then looks again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path).acquire()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"can't write to {path.parent} ({reason}): free space or give the right to write") from None
    with held:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # whoever waits for it opens another


def write_atomic(path: str | Path, content: str | bytes | Callable[[BinaryIO], Any]) -> Path:
    """Write a text, bytes, or what a function writes into the open file, under another name, and rename it.

    Readers see all of it or nothing, a failure leaves nothing; folders are made. No right or no space: ValueError of
    one line that names the file.
    """
    path, content = Path(path), content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            content(file) if callable(content) else file.write(content)
        part.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"can not write {path}: {reason}: make room or get the right to write there") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path
