"""What all tests share: one thread, and a working folder of their own for tests that write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# before numpy and torch are imported: results then do not depend on the number of cores
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder (``MIA_HOME``) with a space in its name; the user's own stays untouched."""
    folder = tmp_path / "a home"
    folder.mkdir()
    monkeypatch.setenv("MIA_HOME", str(folder))
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    monkeypatch.delenv("MIA_ARTIFACTS", raising=False)
    return folder


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """No test reaches for the network: what is downloaded on first use is looked for on a port where nobody answers."""
    from mia_utils.datasets import camvid

    monkeypatch.setattr(camvid, "URL", "http://127.0.0.1:9/camvid.zip")
