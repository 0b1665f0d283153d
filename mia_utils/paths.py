"""Where things are kept. Every path follows from the project folder and three environment variables.

``MIA_HOME`` moves the whole working folder (tests use it), ``MIA_DATA_DIR`` moves ``data/raw``,
``MIA_ARTIFACTS`` adds read-only artifact folders (separated like ``PATH``).
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def get_home() -> Path:
    """Return the project folder: ``MIA_HOME``, else the checkout that holds this package."""
    return Path(os.environ.get("MIA_HOME", PACKAGE_ROOT)).expanduser().resolve()


def get_raw_dir() -> Path:
    """Return the folder of downloads and data caches: ``MIA_DATA_DIR``, else ``data/raw``."""
    value = os.environ.get("MIA_DATA_DIR")
    return Path(value).expanduser().resolve() if value else get_home() / "data" / "raw"


def get_artifact_dirs() -> list[Path]:
    """Return the artifact search path: the writable ``data/artifacts`` first, then ``MIA_ARTIFACTS``."""
    extra = [Path(p).expanduser() for p in os.environ.get("MIA_ARTIFACTS", "").split(os.pathsep) if p]
    return [get_home() / "data" / "artifacts", *extra]


def get_scores_dir(profile: str) -> Path:
    """Return the folder of saved scores of a profile."""
    return get_home() / "data" / "scores" / profile


def get_figures_dir(profile: str) -> Path:
    """Return the folder of figures of a profile."""
    return get_home() / "figures" / profile


def get_build_dir(profile: str) -> Path:
    """Return the folder of executed notebooks, markers and logs of a profile."""
    return get_home() / "build" / profile
