"""Computed once, found again; killed or doubled makers leave nothing half-written."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from mia_utils.runner import artifacts

SPEC = {"kind": "thing", "readable": "a", "seed": 0, "recipe": 1}


def _write(text):
    def make(folder):
        (folder / "value.txt").write_text(text)
        return {"note": text}

    return make


def test_an_artifact_is_made_once_and_found_again(home):
    first = artifacts.load_or_make(SPEC, _write("one"))
    again = artifacts.load_or_make(SPEC, _write("two"))
    assert first == again and (again / "value.txt").read_text() == "one"
    meta = artifacts.read_meta(again)
    assert meta["spec"] == SPEC and meta["note"] == "one" and "commit" in meta["provenance"]


def test_identity_is_the_parameters_and_not_the_readable_name(home):
    path = artifacts.load_or_make(SPEC, _write("one"))
    assert artifacts.name_of(SPEC | {"readable": "b"})[-8:] == path.name[-8:]
    assert artifacts.find(SPEC | {"seed": 1}) is None and artifacts.find(SPEC | {"recipe": 2}) is None


def test_a_failed_maker_leaves_no_artifact(home):
    def fail(folder):
        (folder / "value.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        artifacts.load_or_make(SPEC, fail)
    assert artifacts.find(SPEC) is None
    assert (artifacts.load_or_make(SPEC, _write("one")) / "value.txt").read_text() == "one"


def test_a_killed_maker_leaves_no_artifact(home):
    code = f"""
import os, signal
from mia_utils.runner import artifacts
def make(folder):
    (folder / "value.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
artifacts.load_or_make({SPEC!r}, make)
"""
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == -9
    assert artifacts.find(SPEC) is None
    path = artifacts.load_or_make(SPEC, _write("one"))
    assert sorted(p.name for p in path.iterdir()) == ["meta.json", "value.txt"]


def test_two_makers_at_once_make_it_once(home):
    made, barrier = [], threading.Barrier(2)

    def make(folder):
        made.append(1)
        return {}

    def run():
        barrier.wait()
        artifacts.load_or_make(SPEC, make)

    threads = [threading.Thread(target=run) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(made) == 1


def test_read_only_folders_are_searched_after_our_own(home, tmp_path, monkeypatch):
    shared = tmp_path / "shared" / artifacts.name_of(SPEC)
    shared.mkdir(parents=True)
    (shared / "meta.json").write_text(json.dumps({"spec": SPEC}))
    monkeypatch.setenv("MIA_ARTIFACTS", str(shared.parent))
    assert artifacts.find(SPEC) == shared


def test_a_folder_that_can_not_be_written_is_one_line(home):
    (home / "data").write_text("a file in the way")
    with pytest.raises(ValueError, match="can't write to .*artifacts") as info:
        artifacts.load_or_make(SPEC, _write("one"))
    assert "\n" not in str(info.value)


def test_the_fingerprint_of_a_cache_follows_its_content(home, monkeypatch):
    raw = home / "data" / "raw"
    raw.mkdir(parents=True)
    assert artifacts.fingerprint_data("toy", {})["content"] is None
    np.savez(raw / "toy.npz", images=np.zeros(4))
    first = artifacts.fingerprint_data("toy", {})
    np.savez(raw / "toy.npz", images=np.ones(4))
    assert artifacts.fingerprint_data("toy", {}) != first
    np.savez(raw / "toy.npz", images=np.zeros(4))
    assert artifacts.fingerprint_data("toy", {}) == first


def test_looking_for_artifacts_does_not_import_torch():
    code = "import sys; from mia_utils.runner import train, artifacts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
