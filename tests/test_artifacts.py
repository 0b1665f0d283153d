"""Computed once, found again; killed or doubled makers leave nothing half-written."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from mia_utils.runner import artifacts, train

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


def _damage(path, how):
    """Change a file: flip a byte in its middle, cut it, empty it, or delete it."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    changed = {"flip": bytes(content), "cut": content[:middle], "empty": b"", "text": b"[]", "latin": b'{"a": "\xff"}'}
    path.write_bytes(changed[how]) if how in changed else path.unlink()
    artifacts.verify.cache_clear()  # another process would read it


FEATURES, ENCODER = SPEC | {"kind": "features"}, SPEC | {"kind": "encoder"}


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "delete"])
@pytest.mark.parametrize("file", ["value.txt", "deep/other.bin"])
def test_damaged_features_are_made_again_and_a_damaged_model_is_named(home, capsys, file, how):
    def make(folder):
        (folder / "value.txt").write_text("right")
        (folder / "deep").mkdir()
        (folder / "deep/other.bin").write_bytes(bytes(1000))

    for spec in (FEATURES, ENCODER):
        path = artifacts.load_or_make(spec, make)
        before = (path / file).read_bytes()
        _damage(path / file, how)
        if spec is FEATURES:
            assert artifacts.load_or_make(spec, make) == path and (path / file).read_bytes() == before
        else:
            with pytest.raises(ValueError, match=f"^encoder-a-.*: {file} .* delete the folder$"):
                artifacts.load_or_make(spec, make)
    assert all(line.endswith("it is made again") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "text", "latin"])
def test_a_damaged_meta_json_is_one_line_for_plan_and_reader(home, how):
    path = artifacts.load_or_make(ENCODER, _write("one"))
    _damage(path / "meta.json", how)
    for read in (lambda: artifacts.find(ENCODER), lambda: artifacts.read_meta(path)):
        with pytest.raises(ValueError, match="^encoder-a-.*/meta.json can't be read .* delete the folder$"):
            read()


def test_exchanged_folders_are_seen_and_artifacts_without_digests_are_read(home):
    paths = [artifacts.load_or_make(ENCODER | {"seed": seed}, _write(str(seed))) for seed in (0, 1)]
    spare = paths[0].with_name("spare")
    for a, b in ((paths[0], spare), (paths[1], paths[0]), (spare, paths[1])):
        a.rename(b)
    with pytest.raises(ValueError, match="is that of encoder-a-.*: folders were exchanged"):
        artifacts.find(ENCODER | {"seed": 0})
    old = artifacts.load_or_make(ENCODER | {"seed": 2}, _write("old"))
    meta = json.loads((old / "meta.json").read_text())
    assert set(meta.pop("files")) == {"value.txt"} and len(meta.pop("digest")) == 32
    (old / "meta.json").write_text(json.dumps(meta))
    artifacts.verify.cache_clear()
    assert artifacts.find(ENCODER | {"seed": 2}) == old and artifacts.verify(old) is None


def test_a_missing_last_checkpoint_is_named_and_not_replaced_by_the_one_before(home):
    def make(folder):
        (folder / "epoch-000000.safetensors").write_bytes(b"x")
        return {"settings": {"epochs": 2}, "train_seconds": 1.0}

    path = artifacts.load_or_make(ENCODER, make)
    with pytest.raises(ValueError, match="^encoder-a-.* can't be read .epoch-000002.safetensors is missing.: put it"):
        train.load_run(path)


def test_a_full_disk_is_one_line_and_leaves_nothing(home):
    def fill(folder):
        (folder / "value.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="can't write to .*artifacts .No space left on device."):
        artifacts.load_or_make(SPEC, fill)
    assert not [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    with pytest.raises(FileNotFoundError):  # no question of space
        artifacts.load_or_make(SPEC, lambda folder: (folder / "nowhere").read_text())
    artifacts.load_or_make(SPEC, _write("one"))
    assert not list(home.rglob("*.lock"))  # cleaned up


def test_the_commit_is_unknown_without_git_and_in_the_repository_of_others(home, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.paths, "PACKAGE_ROOT", tmp_path)
    assert artifacts.get_commit() == "unknown"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", *identity, "-C", str(tmp_path), "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(command, check=True)
    assert artifacts.get_commit() != "unknown"
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(artifacts.paths, "PACKAGE_ROOT", tmp_path / "inner")
    assert artifacts.get_commit() == "unknown"
    monkeypatch.setattr(artifacts.paths, "PACKAGE_ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert artifacts.get_commit() == "unknown"


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
