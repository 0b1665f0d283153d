"""What all tests share: one thread, a folder of their own for tests that write, and one run of profile smoke."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# before numpy and torch are imported: results then do not depend on the number of cores
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "agg")

_SMOKE = pytest.StashKey[tuple]()


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


# ------------------------------------------------------------------- the longest test begins first, beside all others


def start_smoke() -> tuple[Path, subprocess.Popen, Path]:
    """Start ``run_all.sh smoke`` in a home of its own: rows trained once, all notebooks executed."""
    folder = tempfile.TemporaryDirectory(prefix="mia smoke ", ignore_cleanup_errors=True)
    home, log = Path(folder.name), Path(folder.name) / "smoke.log"
    environment = {k: v for k, v in os.environ.items() if k not in ("MIA_DATA_DIR", "MIA_ARTIFACTS")}
    environment |= {"MIA_HOME": str(home), "JUPYTER_PREFER_ENV_PATH": "1"}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        command = [sys.executable, "-m", "mia_utils.runner.run", "smoke"]
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
    process.environment, process.folder = environment, folder
    return home, process, log


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the run as soon as it is known that a test waits for it."""
    waiting = any("smoke_run" in getattr(item, "fixturenames", ()) for item in session.items)
    if waiting and not session.config.option.collectonly:
        session.config.stash[_SMOKE] = start_smoke()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for the run comes last."""
    items.sort(key=lambda item: "smoke_run" in getattr(item, "fixturenames", ()))


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the run where the session ended before it, and remove its home."""
    if (found := config.stash.get(_SMOKE, None)) is not None:
        _, process, _ = found
        if process.poll() is None:
            import signal

            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
        process.folder.cleanup()


@pytest.fixture(scope="session")
def smoke_run(pytestconfig: pytest.Config) -> tuple[Path, subprocess.Popen, Path]:
    """Home, process (with its ``environment``) and log of the run of profile smoke that began with the session."""
    return pytestconfig.stash[_SMOKE]


@pytest.fixture(autouse=True)
def same_products():
    """What an audit chose for its own products (``models.backbones``) does not reach the tests after it."""
    yield
    if "torch" in sys.modules and sys.modules["torch"].get_float32_matmul_precision() != "highest":
        import timm.layers

        sys.modules["torch"].set_float32_matmul_precision("highest")
        timm.layers.set_fused_attn(True)
