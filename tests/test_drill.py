"""The drill: every kind of file is damaged, runs are killed, and numbers are equal or one line says so.

The table of all cases is CASES.md.
"""

from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from test_lab import PROFILE, lab_home  # noqa: F401 - a fixture
from test_profiles import write_notebook

from mia_utils import datasets, paths, pretrain, replay
from mia_utils import lab as labs
from mia_utils.datasets import sources
from mia_utils.pretrain.run import ResumeFile
from mia_utils.runner import artifacts, jobs, run

FEW = dict(n_crops=4, epochs=2, n_nonmembers=60, controls=False)
TARGET = "mae-target-s0"


@pytest.fixture(scope="module")
def done(lab_home, tmp_path_factory):  # noqa: F811
    """A working folder in which everything was measured once."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(lab_home, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "data" / "scores", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(folder))
        patch.delenv("MIA_DATA_DIR", raising=False)
        read()
        labs.open("tiny").store.pack()
    return folder


@pytest.fixture(scope="module")
def expected(done):
    """What is read where nothing was damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(done))
        patch.delenv("MIA_DATA_DIR", raising=False)
        return read()


@pytest.fixture
def home(done, monkeypatch):
    monkeypatch.setenv("MIA_HOME", str(done))
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    return done


def forget() -> None:
    """Be another process: what was read is read again."""
    artifacts.verify.cache_clear()
    sources._load_scenes.cache_clear()


def read(*, only_archive: bool = False) -> dict[str, float]:
    """Every number that a notebook may print: of the table, the scores, several seeds together, weights, history."""
    forget()
    lab = labs.open("tiny")
    if not only_archive:
        lab.run("lpla", TARGET, study="main")
        lab.run("partcrop", TARGET, study="parts", **FEW)
    numbers = {}
    for row in lab.results.to_dict("records"):
        place = f"{row['study']} {row['attack']} {row['control']}"
        numbers |= {f"{place} {name}": row[name] for name in ("auc", "auc_low", "auc_high", "p", "verdict", "utility")}
        numbers[f"{place} score"] = float(sum(r.score @ np.arange(len(r.score)) for r in lab.scores(row)))
    keys = sorted({row["key"] for row in lab.store.read_all()})
    numbers |= {f"merged {name}": value for name, value in lab.store.merge(keys, "").items() if name.startswith("auc")}
    if not only_archive:
        model = lab.model(TARGET)
        numbers |= {f"epoch {e}": float(sum(w.double().sum() for w in model.states[e].values())) for e in model.states}
        numbers |= {f"loss {i}": loss for i, loss in enumerate(model.history["loss_members"])}
        numbers["split"] = lab.split(TARGET).hash
    return {name: str(value) for name, value in numbers.items()}


def damage(path: Path, other: bytes) -> dict[str, bytes]:
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    first = bytes([content[0] ^ 1]) + content[1:]
    return {"first": first, "middle": flipped, "cut": content[:middle], "swapped": other}


# kind -> (file, another file of its kind), first matches below data/
FILES = {
    "meta.json": ("artifacts/encoder-mae-target*/meta.json", "artifacts/encoder-mae-shadow*/meta.json"),
    "history": ("artifacts/encoder-mae-target*/history.csv", "artifacts/encoder-mae-shadow*/history.csv"),
    "last weights": ("artifacts/encoder-mae-target*/epoch-000004*", "artifacts/encoder-mae-target*/epoch-000002*"),
    "kept weights": ("artifacts/encoder-mae-target*/epoch-000001*", "artifacts/encoder-mae-shadow*/epoch-000001*"),
    "split": ("artifacts/encoder-mae-target*/split.npz", "artifacts/encoder-simclr*/split.npz"),
    "features": ("artifacts/features-*/features.npy", "artifacts/encoder-mae-target*/split.npz"),
    "features' meta.json": ("artifacts/features-*/meta.json", "artifacts/encoder-mae-target*/meta.json"),
    "scores": ("scores/tiny/lpla-*.npz", "scores/tiny/partcrop-*.npz"),
    "study": ("scores/tiny/study-main-lpla.json", "scores/tiny/study-parts-partcrop.json"),
    "seeds together": ("scores/tiny/merged-*.json", "scores/tiny/study-main-lpla.json"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_gives_the_same_numbers_or_one_line(home, expected, kind, capsys):
    path, other = (sorted((home / "data").glob(pattern))[0] for pattern in FILES[kind])
    whole = path.read_bytes()
    for how, content in damage(path, other.read_bytes()).items():
        path.write_bytes(content)
        capsys.readouterr()
        try:
            assert read() == expected, how
        except ValueError as error:
            assert "\n" not in str(error) and path.name.split(".")[0] in str(error), how
        finally:
            path.write_bytes(whole)
        assert all(len(line) < 400 for line in capsys.readouterr().out.splitlines())
    assert read() == expected


def test_a_damaged_archive_gives_the_same_numbers_or_one_line(home, tmp_path, monkeypatch):
    for part in ("profiles", "data/results"):
        shutil.copytree(home / part, tmp_path / part)
    monkeypatch.setenv("MIA_HOME", str(tmp_path))
    path = tmp_path / "data/results/tiny.npz"
    expected, whole, rng = read(only_archive=True), path.read_bytes(), np.random.default_rng(0)
    flips = [
        (int(at), int(bit)) for at, bit in zip(rng.integers(len(whole), size=8), rng.integers(8, size=8), strict=True)
    ]
    other = np.load(path)
    index = json.dumps(json.loads(str(other["index"])) | {"profile": "quick"})
    np.savez(tmp_path / "other.npz", **{name: other[name] for name in other.files if name != "index"}, index=index)
    damaged = [*damage(path, (tmp_path / "other.npz").read_bytes()).values()]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at, bit in flips]
    n_lines = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read(only_archive=True) == expected
        except ValueError as error:
            n_lines += 1
            assert "\n" not in str(error)
            assert "tiny.npz is damaged" in str(error) or "no readable scores" in str(error)
    assert n_lines >= 8


def test_a_lost_array_of_a_score_file_is_seen(home):
    """As where a flipped bit in a zip directory hides a member: scores without their groups have other intervals."""
    store = labs.open("tiny").store
    path = next(store.folder.glob("partcrop-*.npz"))
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "threshold"}
    np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match="no readable scores .*it was changed.*run its notebook again"):
        store.load(path.stem)
    path.write_bytes(whole)


def test_a_study_without_one_of_its_scores_is_named(home, capsys):
    path = next((home / "data/scores/tiny").glob("study-main-*"))
    whole = path.read_text()
    path.write_text(whole.replace("lpla-mae", "lpla-mea"))
    assert labs.open("tiny").results.query("study == 'main'").empty
    assert "study main: no scores lpla-mea-target-s0-" in capsys.readouterr().out
    path.write_text(whole)


@pytest.mark.parametrize("how", ["middle", "cut", "swapped"])
def test_a_damaged_pool_is_drawn_again(home, tmp_path, how):
    forget()
    want = datasets.load("scenes", tmp_path, n=5, size=16)
    datasets.load("scenes-night", tmp_path, n=5, size=16), datasets.load("scenes", tmp_path, n=5, size=16, seed=1)
    path, *others = sorted(tmp_path.glob("scenes*.npz"), key=lambda p: "scenes-16px-5-seed0" not in p.name)
    for other in others:
        path.write_bytes(damage(path, other.read_bytes())[how])
        forget()
        assert datasets.load("scenes", tmp_path, n=5, size=16).hash == want.hash


def test_a_resume_state_of_other_images_is_not_continued(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 32, 3), np.uint8)
    settings = dict(arch="vit_nano_patch8_32", epochs=2, batch_size=8, progress=False)
    whole = pretrain.fit("mae", images[0], **settings)
    pretrain.fit("mae", images[1], resume_path=tmp_path / "resume.pt", stop_after=3, **settings)
    run = pretrain.fit("mae", images[0], resume_path=tmp_path / "resume.pt", **settings)
    assert all((value == run.states[2][key]).all() for key, value in whole.states[2].items())
    assert "resume.pt can't be continued (it is of other settings): the training starts over" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["middle", "cut", "swapped"])
def test_a_damaged_plan_starts_nothing(tmp_path, how):
    path = tmp_path / "plan.json"
    work = {"kind": "train", "module": ["json.tool", "--help"], "needs": []}
    jobs.write_plan(path, {"run": "1", "threads": 1, "jobs": {"a": work}})
    path.write_bytes(damage(path, b'{"run": "1", "threads": 1, "jobs": {}, "digest": "00"}')[how])
    with pytest.raises(SystemExit, match="plan.json was changed since the run began: start the run again"):
        jobs.main(str(path), "a")
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------- kill, restart


def kill_in_child(function) -> None:
    """Call a function in a fork of this process that is expected to be killed in the middle."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def die_in(monkeypatch, owner, name: str, call: int, *, before: bool) -> None:
    """Let this process be killed in the n-th call of a function, before or after what it does."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("owner", "name"), [(ResumeFile, "write"), (os, "replace")])
def test_a_training_that_was_killed_ends_with_the_same_weights_and_history(tmp_path, monkeypatch, owner, name):
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    settings = dict(arch="vit_nano_patch8_32", epochs=4, batch_size=8, progress=False)
    resume = dict(resume_path=tmp_path / "resume.pt", save_every=0)
    whole = pretrain.fit("mae", images, **settings)

    def train():
        die_in(monkeypatch, owner, name, 5, before=name == "replace")  # of eight steps
        pretrain.fit("mae", images, **settings, **resume)

    kill_in_child(train)
    assert (tmp_path / "resume.pt").is_file()
    again = pretrain.fit("mae", images, **settings, **resume)
    for epoch, state in whole.states.items():
        assert all((value == again.states[epoch][key]).all() for key, value in state.items()), epoch
    assert whole.history.drop(columns="seconds").equals(again.history.drop(columns="seconds"))


CELLS = [
    "from mia_utils import plots, say\nfrom mia_utils.lab import Lab\n\nlab = Lab('tiny')\nplots.use('tiny')",
    "norms = lab.run('lpla', 'mae-target-s0', p=[1.0, 2.0], checkpoint=[1, None], controls=False, study='norms')",
    "plots.sweep(norms, x='norm', panel='checkpoint', name='fig01_norms', title='Norms')",
    "parts = lab.run('partcrop', 'mae-target-s0', n_crops=[2, 4], epochs=2, controls=False, study='crops')",
    "plots.sweep(parts, x='n_crops', name='fig01_crops', title='Crops')",
]


def test_a_notebook_that_was_killed_ends_with_the_same_figures(done, tmp_path, monkeypatch):
    figures, call = {}, 3
    for name in ("whole", "killed"):
        home = tmp_path / name
        (home / "profiles").mkdir(parents=True)
        (home / "profiles/tiny.yaml").write_text(PROFILE)
        monkeypatch.setenv("MIA_HOME", str(home))
        monkeypatch.setenv("MIA_ARTIFACTS", str(done / "data/artifacts"))
        monkeypatch.setenv("MIA_DATA_DIR", str(done / "data/raw"))
        notebook = home / "01_figures.ipynb"
        write_notebook(notebook, "profile = 'tiny'", *CELLS)

        def execute(notebook=notebook):
            with pytest.MonkeyPatch.context() as patch:
                if multiprocessing.parent_process():
                    die_in(patch, labs.results.Store, "save", call, before=True)
                replay.execute(notebook, {}, skip=set())

        if name == "killed":
            kill_in_child(execute)
            assert len(list(paths.get_scores_dir("tiny").glob("*.npz"))) == call - 1
        execute()
        figures[name] = {path.name: path.read_bytes() for path in sorted(paths.get_figures_dir("tiny").iterdir())}
        assert not list(home.rglob("*.lock")) and not list(home.rglob("*.tmp"))
    assert len(figures["whole"]) >= 4 and figures["whole"] == figures["killed"]


def test_a_replay_whose_process_is_killed_is_one_line(tmp_path, monkeypatch):
    dies = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    write_notebook(tmp_path / "01_dies.ipynb", "profile = 'photos'", dies)
    monkeypatch.setattr(replay.parameters, "find_notebooks", lambda: {"01_dies": tmp_path / "01_dies.ipynb"})
    monkeypatch.setattr(replay.profiles, "find_source", lambda name: tmp_path)
    monkeypatch.setattr(replay.profiles, "load", lambda name: None)
    monkeypatch.setattr(replay.parameters, "merge_parameters", lambda profile, name, given: given)
    monkeypatch.setattr(replay.lab, "open", lambda profile: labs.results)  # anything with .results
    monkeypatch.setattr(labs.results, "results", None, raising=False)
    with pytest.raises(RuntimeError, match="^01_dies: its process was killed: the same command starts over$"):
        replay.replay("photos")


# ------------------------------------------------------------------------------------------- what must not be written


def test_nothing_written_holds_a_path_a_user_or_a_host(home):
    words = [str(home), str(paths.PACKAGE_ROOT)]
    words += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 5]  # four letters may be any
    kinds = (".json", ".csv", ".npz", ".npy", ".safetensors")
    for path in [path for path in home.rglob("*") if path.is_file() and path.suffix in kinds]:
        texts = [path.read_bytes()]
        if path.suffix == ".npz":
            with np.load(path) as file:
                texts = [file[name].tobytes() for name in file.files]
                texts += [str(file[name]).encode() for name in file.files if file[name].ndim == 0]
        found = [word for word in words if any(word.encode() in text for text in texts)]
        assert not found, (path.relative_to(home), found)


def test_the_lab_is_for_this_machine_and_asks_for_a_token(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda program, command: called.extend(command))
    run.run_lab(["--no-browser"])
    assert called[1:3] == ["-m", "jupyterlab"] and not [a for a in called if "ip" in a.split("=")[0] or "token" in a]
    from jupyter_server.auth.identity import PasswordIdentityProvider
    from jupyter_server.serverapp import ServerApp

    assert ServerApp().ip in ("localhost", "127.0.0.1") and len(PasswordIdentityProvider().token) >= 32
