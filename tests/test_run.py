"""The commands: what is planned, echoed, refused, and found again after a kill. Engine and kernels are real."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_profiles import write_notebook

from mia_utils import paths
from mia_utils.runner import artifacts, choices, engine, estimates, jobs, profiles, run, train
from mia_utils.runner.plan import Plan, find_end, make_plan

ROOT = paths.PACKAGE_ROOT
PARAMETERS = 'profile = "quick"\nn = 3  # paper: 128'
ROW = "{{id: {id}, role: target, method: mae, arch: vit_nano_patch8_32, dataset: {dataset}, n_train: 32, epochs: 2}}"


def write_profile(home: Path, text: str = "", *, rows: list[str] = (), name: str = "tiny") -> Path:
    """Write a profile; without rows it only executes notebooks."""
    path = home / "profiles" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    models = "models:\n" + "".join(f"  - {row}\n" for row in rows) if rows else ""
    path.write_text(f"name: {name}\n{text}\n{models}")
    return path


def call(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run ``./run_all.sh ARGUMENTS`` with this very Python."""
    command = [str(ROOT / "run_all.sh"), *arguments]
    environment = {**os.environ, "MIA_PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def refuse(capsys, monkeypatch):
    """Run a command that must be refused with one line before anything is done; returns the line."""

    def refuse(*arguments: str, **environment: str) -> str:
        before = sorted(paths.get_home().rglob("*"))
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = run.main([*arguments])
        said = capsys.readouterr()
        assert code == 2, said.out + said.err
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        assert sorted(p for p in paths.get_home().rglob("*") if p.suffix != ".tmp") == before
        return said.err

    return refuse


DATA = "datasets: {scenes: {size: 32, n: 200}}\nsplit: {n_nonmembers: 60, n_shadow_nonmembers: 20}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of one row and three notebooks, one of which fails: (finished process, working folder, planned rows).

    In a path with braces, with a broken startup file, another kernel of the user's and a narrow umask.
    """
    folder = tmp_path_factory.mktemp("a home")
    home = folder / "a {b} {0}"
    cells = {"00_start": ["print('words')\nprint('FINDING 00 n is', profile, n)"]}
    cells |= {"01_bad": ["x = 1", "raise ValueError('expected 3, got 2')"]}
    cells |= {"08_end": ["import sys\nprint('FINDING 08', sys.executable)"]}
    for name, sources in cells.items():
        write_notebook(home / f"notebooks/{name}.ipynb", PARAMETERS, *sources)
    write_profile(
        home, f"first: a\nnotebooks: {{00_start: {{n: 5}}}}\n{DATA}", rows=[ROW.format(id="a", dataset="scenes")]
    )
    startup, other = folder / "user/profile_default/startup/00.py", folder / "jupyter/kernels/python3/kernel.json"
    for path, text in ((startup, "raise SystemExit(3)"), (other, '{"argv": ["/bin/false"], "display_name": "x"}')):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("IPYTHONDIR", "user"), ("JUPYTER_PATH", "jupyter"), ("MIA_HOME", home.name)):
            patch.setenv(name, str(folder / value))
        patch.delenv("MIA_DATA_DIR", raising=False)
        patch.delenv("MIA_ARTIFACTS", raising=False)
        planned, previous = make_plan("tiny"), os.umask(0o077)
        try:
            return call("tiny", cwd=home), home, planned
        finally:
            os.umask(previous)


def test_a_run_echoes_findings_names_a_failure_and_goes_on(ran):
    done, home, _ = ran
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.fullmatch(
        r"profile tiny: 1 model to train \(0 of 1 done\), 3 notebooks, about \d+ (minute|hour)s?", lines[0]
    )
    assert lines[1].startswith("safe to stop at any time, it resumes")
    assert "00 n is tiny 5" in lines
    failed = "failed: 01_bad, section 'Part 2': ValueError: expected 3, got 2; log build/tiny/logs/01_bad.log"
    assert failed in lines
    assert lines[-1].startswith("figures/tiny/index.html")
    executed = json.loads((home / "build/tiny/01_bad.ipynb").read_text())  # survives its failure, for reading
    assert any(cell.get("outputs") for cell in executed["cells"])
    assert "expected 3, got 2" in (home / "build/tiny/logs/01_bad.log").read_text()


def test_a_path_with_braces_a_broken_startup_file_another_kernel_and_a_narrow_umask_change_nothing(ran):
    lines = ran[0].stdout.splitlines()
    assert lines[-2] == f"08 {sys.executable}"  # last of all, although 01 failed, in a kernel of this environment


def test_a_row_is_trained_once_and_found_by_the_next_run(ran, monkeypatch, capsys):
    done, home, planned = ran
    assert [row.id for row in planned.missing] == ["a"]
    assert any(line.startswith("trained a (") and line.endswith(" 1/1") for line in done.stdout.splitlines())
    monkeypatch.setenv("MIA_HOME", str(home))
    monkeypatch.delenv("MIA_DATA_DIR", raising=False)
    again = make_plan("tiny")
    assert not again.missing and again.done["a"].parent == home / "data/artifacts"
    assert run.main(["tiny", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "0 models to train, 0.00 GB" in shown
    assert "a         done" in shown


def test_after_kill_9_of_the_group_the_same_command_goes_on(home, capsys):
    slow = "import time, pathlib\npathlib.Path('started').touch()\n"
    slow += "time.sleep(0 if pathlib.Path('go').exists() else 600)"
    write_notebook(home / "notebooks/00_slow.ipynb", PARAMETERS, slow, "print('FINDING 00 through')")
    write_profile(home)
    command, environment = [str(ROOT / "run_all.sh"), "tiny"], {**os.environ, "MIA_PYTHON": sys.executable}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for((home / "notebooks/started").exists)
        assert run.main(["tiny"]) == 2  # while it runs, another one is refused
        said = capsys.readouterr().err
        assert said.startswith("error: profile tiny is being run by another process") and said.count("\n") == 1
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    (home / "notebooks/go").touch()
    done = call("tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "00 through" in done.stdout.splitlines()
    assert not list(home.rglob("*.lock"))


def test_a_lock_that_goes_with_its_run_is_never_held_twice(home):
    """Four processes take and drop it 50 times each; whoever holds it is alone in the folder."""
    plan, alone = SimpleNamespace(build=home, profile=SimpleNamespace(name="tiny")), home / "alone"

    def compete() -> None:
        n = 0
        while n < 50:
            with contextlib.suppress(ValueError), engine.hold_lock(plan):
                alone.mkdir()
                alone.rmdir()
                n += 1

    done = [multiprocessing.get_context("fork").Process(target=compete) for _ in range(4)]
    [process.start() for process in done], [process.join(60) for process in done]
    assert [process.exitcode for process in done] == [0] * 4
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("ok", "made", "engine_code", "code"),
    [(True, True, 0, 0), (False, True, 0, 1), (True, False, 0, 1), (True, True, 1, 1)],
)
def test_the_exit_code_follows_from_artifacts_and_statuses_on_the_disk(home, capsys, ok, made, engine_code, code):
    write_profile(home, "datasets: {scenes: {n: 3500}}", rows=[ROW.format(id="a", dataset="scenes")])
    (home / "notebooks").mkdir()
    plan = make_plan("tiny")
    if made:
        artifacts.load_or_make(train.spec_of(plan.profile, plan.missing[0]), lambda folder: None)
    status = {"job": "train-a", "run": "now", "ok": ok, "seconds": 1.0, "message": "no"}
    jobs.write_json(plan.build / "status/train-a.json", status)
    assert engine.Echo(plan, "now").finish(engine_code) == code
    said = capsys.readouterr().out
    assert ("trained a (1 s) 1/1" in said) == (ok and made) and ("failed: train-a: " in said) != (ok and made)
    assert engine.Echo(plan, "another").finish(engine_code) == 1  # the status of another run says nothing


def wait_for(condition, seconds: float = 240.0) -> None:
    """Wait until a condition holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.1)


def test_bad_input_is_one_line_before_any_work(home, refuse):
    write_notebook(home / "notebooks/00_a.ipynb", PARAMETERS, "1")
    write_profile(home)
    write_profile(home, "notebooks: {00_a: {m: 4}}", name="unknown-key")
    write_profile(home, "notebooks: {00_a: {n: few}}", name="wrong-type")
    write_profile(home, "notebooks: {07_b: {n: 1}}", name="no-notebook")
    lost = [ROW.format(id="a", dataset="cityscapes")]
    write_profile(home, "datasets: {cityscapes: {}}", rows=lost, name="no-data")
    done = call("qick")  # the command itself; all others are its Python
    assert done.returncode == 2 and done.stderr == refuse("qick")
    assert "unknown profile 'qick': expected one of" in done.stderr
    assert "unknown notebook '05': expected one of 00" in refuse("tiny", "05")
    assert "unknown notebook '³': expected one of 00" in refuse("tiny", "³")
    assert "MIA_HOME: expected a folder, got an empty text" in refuse("tiny", MIA_HOME="")
    assert "OMP_NUM_THREADS: expected a number of at least 1, got 'abc'" in refuse("tiny", OMP_NUM_THREADS="abc")
    assert "unknown option '--pln'" in refuse("tiny", "--pln")
    assert "profiles/unknown-key.yaml: notebooks: 00_a: unknown key 'm' (known: profile, n)" in refuse("unknown-key")
    assert "profiles/wrong-type.yaml: notebooks: 00_a: n: expected a value like 3, got 'few'" in refuse("wrong-type")
    assert "profiles/no-notebook.yaml: notebooks: unknown notebook '07_b'" in refuse("no-notebook")
    assert "data set cityscapes: no folder " in refuse("no-data", "--strict")
    assert "setup: expected no arguments, got 'now'" in refuse("setup", "now")
    assert "data: expected a profile" in refuse("data")
    assert "MIA_DATA_DIR: expected a folder, got" in refuse("tiny", MIA_DATA_DIR=str(home / "nowhere"))
    (home / "data").write_text("a file where the folder should be")
    assert "expected a folder that can be written, got 'Not a directory'" in refuse("tiny")


def test_too_little_space_is_refused_with_both_numbers(home):
    with pytest.raises(ValueError, match=r"expected 1000000\.3 GB free, got .* GB; make room or set MIA_HOME"):
        run.check_data_folder(1e15)


def test_a_missing_data_set_skips_its_rows_only(home, capsys):
    rows = [ROW.format(id="here", dataset="scenes"), ROW.format(id="lost", dataset="tiny_imagenet")]
    write_profile(home, "datasets: {scenes: {n: 3500}, tiny_imagenet: {}}", rows=rows)
    (home / "notebooks").mkdir()  # none: the project's own ask for their own rows
    assert run.main(["tiny", "--plan"]) == 0
    shown = capsys.readouterr().out
    expected = f"skipped: tiny_imagenet, no folder {home / 'data/raw/tiny-imagenet-200'} and no cache"
    assert shown.splitlines()[0].startswith(expected)
    assert "lost      skipped" in shown and "here      to train" in shown
    (home / "data/raw/tiny-imagenet-200").mkdir(parents=True)
    assert make_plan("tiny").skipped == {}


@pytest.mark.parametrize(
    ("datasets", "dataset", "said"),
    [
        ("cifar1O: {}", "cifar1O", "datasets: unknown 'cifar1O' (did you mean 'cifar10'?); others are folder:PATH"),
        ("camvid@frame: {}", "camvid@frame", "unknown 'frame' (did you mean 'frames'?)"),
        ('"folder:": {}', '"folder:"', "expected folder:PATH, got 'folder:'"),
    ],
)
def test_a_misspelt_data_set_is_an_error_and_no_skipped_row(home, datasets, dataset, said):
    write_profile(home, f"datasets: {{{datasets}}}", rows=[ROW.format(id="a", dataset=dataset)])
    (home / "notebooks").mkdir()
    with pytest.raises(ValueError, match=re.escape(said)):
        make_plan("tiny")
    raw = home / "data/raw"
    raw.mkdir(parents=True)
    (raw / "cifar1O.npz").touch()  # a file of one's own
    if dataset == "cifar1O":
        assert [row.id for row in make_plan("tiny").missing] == ["a"]


@pytest.mark.parametrize(
    ("method", "arch", "said"),
    [("mae", "vit_tiny_patch16_224", None), ("mae", "vit_nano_patch8_23", "did you mean 'vit_nano_patch8_32'?")]
    + [("unet", "efficientnet-b0", None), ("unet", "hf-hub:evil/model", "unet knows no 'hf-hub:evil/model'")],
)
def test_an_architecture_is_known_before_any_work(home, method, arch, said):
    row = ROW.format(id="a", dataset="scenes").replace("vit_nano_patch8_32", arch).replace("mae", method)
    write_profile(home, "datasets: {scenes: {n: 3500}}", rows=[row])
    (home / "notebooks").mkdir()
    if said is None:
        assert [row.arch for row in make_plan("tiny").missing] == [arch]
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            make_plan("tiny")


@pytest.mark.parametrize(
    ("method", "arch", "rest", "said"),
    [
        ("mae", "vit_nano_patch8_32", "options: {mask_ratio: 0.99}", "mask_ratio 0.99 hides 16 of 16 patches"),
        ("mae", "vit_nano_patch8_32", "options: {input_size: 36}", "Input height (36) should be divisible by patch"),
        ("simmim", "swin_thin_32", "options: {dropout: 0.1}", "option dropout does not fit swin_thin_32"),
        ("mae", "vit_nano_patch8_32", "options: {decoder_dim: 65536, decoder_depth: 64}", "do not fit into the memory"),
        ("moco-v2", "vit_nano_patch8_32", "options: {bn_splits: 4, queue_size: 8}", "and a backbone with batch norm"),
        ("mae", "vit_nano_patch8_32", "defense: dp-sgd, options: {privacy: {epsilon: 0.0001}}", "no noise reaches eps"),
        ("simmim", "swin_thin_32", "defense: dp-sgd, options: {privacy: {epsilon: 8.0}}", "no per-example gradients"),
        ("unet", "mobilenet_v2", "options: {batch_size: 1}", "Expected more than 1 value per channel"),
        (
            "unet",
            "resnet18",
            "options: {encoder_depth: 3}",
            "Model depth is 3, but you provide `decoder",
        ),
        ("upernet", "resnet18", "options: {upsampling: 3}", "size mismatch"),
        ("unet", "mobilenet_v2", "dataset: cifar10", "unet needs label maps, cifar10 has none"),
        ("mae", "vit_nano_patch8_32", "dataset: scenes@official", "data set scenes@official has no official split"),
        ("mae", "vit_nano_patch8_32", "dataset: cifar10@camvid", "camvid needs label maps, cifar10@camvid has none"),
        ("mae", "vit_nano_patch8_32", "dataset: mine", "data set mine has no official split: use iid"),
    ],
)
def test_a_row_that_its_network_or_data_refuse_is_one_line_before_any_work(home, method, arch, rest, said):
    (home / "notebooks").mkdir(), (home / "data/raw").mkdir(parents=True)
    np.savez(home / "data/raw/mine.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    dataset = rest.removeprefix("dataset: ") if rest.startswith("dataset") else "scenes"
    fields = f"{{id: a, role: target, method: {method}, arch: {arch}, dataset: '{dataset}', n_train: 32, epochs: 2"
    rule = ", rule: official" if dataset == "mine" else ""
    text = f"name: tiny\ndatasets: {{'{dataset}': {{size: 32}}}}\nsplit: {{n_nonmembers: 40{rule}}}\nmodels:\n  - "
    fields += "}" if dataset in rest else f", {rest}}}"
    (home / "profiles").mkdir(exist_ok=True)
    (home / "profiles/tiny.yaml").write_text(f"{text}{fields}\n")
    with pytest.raises(ValueError, match=f"^model a: .*{re.escape(said)}") as error:
        make_plan("tiny")
    assert "\n" not in str(error.value)


SMALL = ("vit_nano_patch8_32", "swin_thin_32", "resnet_thin_32", "mobilenet_v2")


@pytest.mark.parametrize(
    ("method", "arch"),
    [(m, a) for m in choices.METHODS for a in SMALL if re.match(choices._FAMILIES.get(m, "(vit|swin|res)"), a)],
)
def test_plain_options_fit_every_network(method, arch):
    """Rows of these options are not tried by a plan, which so needs no torch."""
    known, treated = choices.FIT_OPTIONS | choices.METHOD_OPTIONS[method], arch.startswith(("vit_", "mobilenet"))
    low = {key: ends[0] for key, ends in choices.PLAIN.items() if key in known}
    low |= {"lr": 1e-3, "n_local": 0, "queue_size": 1}
    high = low | {key: 0.9 for key in ("mask_ratio", "momentum", "label_smoothing", "dropout", "drop_path", "warmup")}
    high |= {"batch_size": 32, "n_local": 8, "queue_size": 32}
    both = [low, high] + [high | {key: 2.0} for key in ("mixup", "distill", "minmax") if method == "unet"]
    for options in both:
        options = {k: x for k, x in options.items() if k in known and (treated or k not in ("dropout", "drop_path"))}
        row = dict(id="a", role="target", method=method, arch=arch, dataset="scenes", n_train=64, epochs=2)
        row = profiles.Row(**row, options=options)
        assert choices.is_plain(row)
        train.rehearse(profiles.Profile(name="tiny", datasets={"scenes": {"size": 32}}, models=[row]), row)


def test_a_plan_writes_nothing_and_needs_no_torch(home):
    code = (
        "import sys; from mia_utils.runner import run; run.main(['smoke', '--plan']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(profiles.load('smoke').models)} models to train" in done.stdout and "GB, about" in done.stdout
    assert not list(home.rglob("*"))


def test_the_first_row_and_its_notebook_go_before_all_others(home):
    for name in ("00_start", "03_attack", "08_end"):
        write_notebook(home / f"notebooks/{name}.ipynb", PARAMETERS, "1")
    rows = [ROW.format(id=name, dataset="scenes") for name in ("b", "a", "c")]
    write_profile(home, "first: a\ndatasets: {scenes: {n: 3500}}", rows=rows)
    graph = make_plan("tiny").jobs
    order = ["train-a", "00_start", "train-b", "train-c", "03_attack", "08_end"]
    found = []
    while len(found) < len(graph):  # as one worker takes them
        ready = [job for job in graph if job not in found and set(graph[job]["needs"]) <= {*found}]
        found.append(max(ready, key=lambda job: graph[job]["priority"]))
    assert found == order
    assert graph["00_start"]["needs"] == ["train-a"]
    assert graph["03_attack"]["needs"] == ["train-a", "train-b", "train-c"]
    assert {"00_start", "03_attack"} < set(graph["08_end"]["needs"])


def test_named_notebooks_bring_only_what_they_need(home):
    for name in ("00_start", "03_attack"):
        write_notebook(home / f"notebooks/{name}.ipynb", PARAMETERS, "1")
    rows = [ROW.format(id=name, dataset="scenes") for name in ("a", "b")]
    write_profile(home, "first: a\ndatasets: {scenes: {n: 3500}}", rows=rows)
    only = make_plan("tiny", ["00"])
    assert list(only.notebooks) == ["00_start"] and [row.id for row in only.missing] == ["a"]
    assert [row.id for row in make_plan("tiny", ["3"]).missing] == ["a", "b"]


def test_jobs_of_one_length_end_when_the_workers_have_done_them_in_order():
    graph = {name: {"needs": [], "priority": 1, "seconds": 3.0} for name in "abcde"}
    assert find_end(graph, 1) == 15 and find_end(graph, 2) == 9 and find_end(graph, 9) == 3
    graph["e"] |= {"needs": ["a", "b"], "priority": 9}
    assert find_end(graph, 2) == 9 and find_end(graph | {"e": graph["e"] | {"needs": ["d"]}}, 4) == 6


def test_the_plan_s_minutes_follow_the_pace_of_the_machine(home):
    pace = estimates.measure_pace()
    assert 0.02 < pace < 50
    write_profile(home, "datasets: {scenes: {n: 3500}}", rows=[ROW.format(id="a", dataset="scenes")])
    (home / "notebooks").mkdir()
    plan = make_plan("tiny")
    row = estimates.ROW_SECONDS + 32 * 2 / estimates.IMAGES_PER_SECOND["mae vit_nano_patch8_32"]
    assert plan.minutes == pytest.approx(pace * (estimates.START_SECONDS + row) / 60)


def test_the_engines_own_arguments_win():
    plan = Plan(profiles.load("smoke"), {})
    assert engine.get_command(plan, [])[-2:] == ["--cores", "2"]
    assert engine.get_command(plan, ["--cores", "4"]).count("--cores") == 1
    assert "--cores" not in engine.get_command(plan, ["-j4"])
    assert {"--nolock", "--rerun-incomplete", "--keep-going"} < set(engine.get_command(plan, []))


def test_what_the_engine_would_refuse_is_one_line_before_any_work(home, refuse):
    write_notebook(home / "notebooks/00_a.ipynb", PARAMETERS, "1")
    write_profile(home)
    for name, value in (("cores", 0), ("jobs", -1)):
        said = f"error: engine: --{name}: expected a number of at least 1, got {value}\n"
        assert refuse("tiny", "--", f"--{name}", str(value)) == said
    assert "must be integer or 'all'" in refuse("tiny", "--", "--cores", "x")
    assert refuse("tiny", "--", "--nonsense") == "error: engine: unrecognized arguments: --nonsense\n"
    assert refuse("tiny", "--", "--executor", "moon") == (
        "error: engine: executor 'moon' is not installed: pip install snakemake-executor-plugin-moon\n"
    )


def test_an_executor_elsewhere_gets_a_number_of_jobs_and_no_cores(monkeypatch):
    plan, asked = Plan(profiles.load("paper"), {}), {"executor": "slurm", "cores": None, "dryrun": False}
    monkeypatch.setattr(engine, "read_arguments", lambda _: argparse.Namespace(**asked, jobs=20))
    assert "--cores" not in engine.get_command(plan, ["--workflow-profile", "cluster"])
    monkeypatch.setattr(engine, "read_arguments", lambda _: argparse.Namespace(**asked, jobs=None))
    with pytest.raises(ValueError, match="engine: executor 'slurm' needs the number of jobs at once: add --jobs N"):
        engine.get_command(plan, ["--executor", "slurm"])


def write_cluster_profile(folder: Path, *more: str) -> Path:
    """The project's example for a cluster, with the executor that every installation has."""
    text = (ROOT / "profiles/cluster/config.yaml").read_text()
    assert "\nexecutor: slurm\n" in text
    folder.mkdir()
    (folder / "config.yaml").write_text("\n".join([text.replace("executor: slurm", "executor: local"), *more]))
    return folder


def test_the_cluster_example_holds_the_engines_own_options_and_is_no_profile_of_models(tmp_path):
    asked = engine.read_arguments(["--workflow-profile", str(write_cluster_profile(tmp_path / "good"))])
    assert (asked.executor, asked.jobs, asked.retries, asked.latency_wait) == ("local", 20, 2, 60)
    given = dict(text.split("=") for text in asked.default_resources.args)
    assert given["gpu"] == "1" and int(given["cpus_per_task"]) == profiles.load("paper").threads
    assert {"slurm_partition", "runtime", "mem_mb"} < set(given)
    wrong = write_cluster_profile(tmp_path / "wrong", "jobz: 3")
    with pytest.raises(ValueError, match="^engine: unrecognized arguments: --jobz"):
        engine.read_arguments(["--workflow-profile", str(wrong)])
    assert "cluster" not in profiles.list_names() and "config" not in profiles.list_names()


def test_a_dry_run_with_the_cluster_example_lists_every_job_and_starts_none(home):
    write_notebook(home / "notebooks/00_a.ipynb", PARAMETERS, "1")
    data = "datasets: {scenes: {n: 3500}}"
    write_profile(home, data, rows=[ROW.format(id=name, dataset="scenes") for name in ("a", "b")])
    folder = write_cluster_profile(home / "cluster")
    done = call("tiny", "--", "--workflow-profile", str(folder), "-n", cwd=home)
    assert done.returncode == 0, done.stderr
    listed = done.stdout + done.stderr
    for rule in ("train_0", "train_1", "notebook_2"):
        assert f"rule {rule}:" in listed
    assert listed.count("slurm_partition=gpu, runtime=1440, cpus_per_task=4, gpu=1") >= 3
    assert not list((home / "build/tiny").glob("*.done")) and not (home / "build/tiny/status").exists()


def test_the_last_finding_counts_and_the_section_is_the_heading_above_the_failure():
    def cell(kind, source, count=1, outputs=()):
        return {"cell_type": kind, "source": source, "metadata": {}, "execution_count": count, "outputs": list(outputs)}

    printed = {"output_type": "stream", "text": ["FINDING 03 old\nother\n", "FINDING 03 new\n"]}
    cells = [cell("markdown", "# Title"), cell("code", "a", outputs=[printed]), cell("markdown", "## Run\nwords")]
    assert jobs.find_finding(cells) == "03 new"
    error = {"output_type": "error"}
    assert jobs.find_section([*cells, cell("code", "b", outputs=[error]), cell("markdown", "## Later")]) == "Run"
    assert jobs.find_section([*cells, cell("code", "b", count=None)]) == "Run"  # the kernel was lost


def test_the_test_command_passes_arguments_and_prints_pytests_closing_line_and_code(tmp_path):
    (tmp_path / "test_two.py").write_text("def test_a():\n    pass\n\ndef test_b():\n    assert False\n")
    done = call("test", str(tmp_path / "test_two.py"), "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2].startswith("1 failed, 1 passed in ")
    assert done.stdout.splitlines()[-1] == "pytest exit code 1"


def test_a_python_that_lacks_the_packages_is_one_line(tmp_path):
    done = call("quick", "--plan", MIA_PYTHON="/bin/false")
    assert done.returncode == 2
    assert done.stderr == (
        "error: MIA_PYTHON: expected a Python 3.11 or newer with the packages of requirements.lock, got /bin/false\n"
    )


def test_an_environment_whose_python_is_gone_is_made_again(tmp_path):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/nowhere/python3")
    (tmp_path / ".venv/pyvenv.cfg").write_text("home = /nowhere\n")
    shutil.copy(tmp_path / "requirements.lock", tmp_path / ".venv/mia-installed.lock")
    path = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k not in ("MIA_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= {"PATH": path, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    command = [str(tmp_path / "run_all.sh"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "the Python of .venv is gone: makes it again" in done.stdout
    assert "error: pip could not install uv" in done.stderr  # as far as one comes without a network
    assert subprocess.run([tmp_path / ".venv/bin/python", "-c", ""]).returncode == 0
    assert not (tmp_path / ".mia-setup.lock").exists()


def test_help_lists_every_command_and_profile():
    shown = call("--help").stdout
    assert all(word in shown for word in [*run.COMMANDS, *profiles.list_names(), "--plan", "--strict"])


def test_the_lock_names_no_index_and_no_path_and_has_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock and "--index" not in lock and "/tmp" not in lock
    entries = [block for block in lock.split("\n") if block and not block.startswith((" ", "#"))]
    assert all("==" in entry for entry in entries)
    assert lock.count("--hash=sha256:") >= len(entries)
