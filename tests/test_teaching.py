"""What a lecturer gets: a deck in one file, notebooks that nbgrader grades, trained models in one file."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tarfile

import nbformat
import pytest

from mia_utils import paths
from mia_utils.runner import pack

ROOT = paths.PACKAGE_ROOT
ANSWERS = {"03-1": (0.0, 2.77), "03-2": ("c", "a"), "08-1": None}  # right, wrong


@pytest.fixture(scope="module")
def teach():
    spec = importlib.util.spec_from_file_location("teach", ROOT / "notebooks" / "teach.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graded(teach, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graded")
    assert teach.main(["graded", str(folder)]) == 0
    return folder


def test_the_deck_is_one_file_of_twelve_slides(teach, home):
    shutil.copytree(ROOT / "figures" / "photos", home / "figures" / "photos")
    text = teach.write_deck("photos").read_text(encoding="utf-8")
    assert text.count("<section>") == 12 == text.count('src="data:image/png;base64,')
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # nothing is fetched
    assert all(re.findall(r'alt="([^"]+)"', text)) and "@media print" in text


def test_a_deck_without_figures_says_what_to_run(teach, home, capsys):
    assert teach.main(["deck", "quick"]) == 2
    assert "./run_all.sh quick" in capsys.readouterr().err


def read_graded(folder, kind):
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(folder.glob(f"{kind}/*/*.ipynb"))}


def test_students_get_every_exercise_with_points_and_no_answer(graded):
    release = read_graded(graded, "release")
    assert len(release) == 9 and not list(graded.glob("release/**/*.py")) + list(graded.glob("release/**/*.json"))
    for name, notebook in release.items():
        nbformat.validate(notebook)
        found = [cell.metadata["nbgrader"] for cell in notebook.cells if "nbgrader" in cell.metadata]
        assert sum(m["grade"] for m in found) == sum(m["solution"] for m in found) >= 2, name
        assert len({m["grade_id"] for m in found}) == len(found)
        assert all(m["schema_version"] == 3 and m["points"] > 0 and m["locked"] for m in found if m["grade"])
        assert "HIDDEN" not in nbformat.writes(notebook) and "load_answers" not in nbformat.writes(notebook)


@pytest.mark.parametrize("exercise, answers", [(e, a) for e, a in ANSWERS.items() if a])
def test_the_hidden_test_tells_right_from_wrong(graded, exercise, answers):
    source = read_graded(graded, "source")
    (cell,) = [c for nb in source.values() for c in nb.cells if c.get("id") == f"test-{exercise}"]
    hidden = cell.source.split("### BEGIN HIDDEN TESTS")[1].split("### END")[0]
    right, wrong = answers
    exec(hidden, {"answer": right})
    with pytest.raises(AssertionError):
        exec(hidden, {"answer": wrong})


def test_whoever_gives_feedback_finds_what_wrong_answers_come_from(graded):
    wrong = json.loads((graded / "source" / "wrong_answers.json").read_text(encoding="utf-8"))
    assert len(wrong) == 9 and all(wrong.values())


def test_a_room_trains_nothing_that_was_packed(smoke_run, tmp_path, monkeypatch):
    home, process, _ = smoke_run
    assert process.wait() == 0
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    monkeypatch.setenv("MIA_HOME", str(home))
    file = tmp_path / "smoke.tar"
    assert pack.pack("smoke", file) == file.stat().st_size
    with tarfile.open(file) as tar:
        assert all(not entry.uname and not entry.uid and not entry.name.startswith(("/", "..")) for entry in tar)
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setenv("MIA_HOME", str(room))
    came, there = pack.unpack(file)
    assert came > 20 and there == 0
    assert not pack.make_plan("smoke", []).missing
    assert pack.unpack(file) == (0, came)


def test_what_pack_did_not_write_is_one_line(home, tmp_path):
    with pytest.raises(ValueError, match="not trained"):
        pack.pack("smoke", tmp_path / "x.tar")
    (tmp_path / "no.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="written by ./run_all.sh pack"):
        pack.unpack(tmp_path / "no.tar")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "no.tar", "../outside")
    with pytest.raises(ValueError, match="written by ./run_all.sh pack"):
        pack.unpack(tmp_path / "evil.tar")
    assert not (home.parent / "outside").exists()
