"""The commands of ``./run_all.sh``: train what is missing, execute every notebook, draw every figure.

``run_all.sh`` makes the environment and hands over to ``python -m mia_utils.runner.run``. Nothing here imports torch before
a command needs it: mistakes and ``--plan`` come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mia_utils import paths
from mia_utils.runner import jobs, profiles, rows
from mia_utils.runner.profiles import Profile, Row

USAGE = """usage: ./run_all.sh [PROFILE] [00 .. 08] [--plan] [--strict] [-- ENGINE_ARGS]
  (no arguments)    profile quick: train what is missing, execute every notebook, draw every figure
  PROFILE           {profiles}; with numbers: only these notebooks and what they need
    --plan          print models, seconds and gigabytes (GPU hours and memory of paper), and stop
    --strict        a data set that is missing is an error, not skipped rows
    -- ENGINE_ARGS  go to Snakemake, for example: -- --cores 4
  test [ARGS]       the test suite (arguments go to pytest)
  replay            redraw the figures of photos from the committed scores: no data, no training
  setup             the environment only
  data PROFILE      download the data sets of a profile, nothing else
  lab               JupyterLab on notebooks/"""

GENERATED = ("scenes", "scenes-night", "scenes-sketch")
DOWNLOADED = ("cifar10", "cifar100", "stl10", "camvid", "oxford_pets")
FOLDERS = {"tiny_imagenet": "tiny-imagenet-200"}  # what the unpacked archive is called, where not as the data set
NOTEBOOK_SECONDS = 60.0
BASE_RAM_GB = 6.0  # a process of a GPU job: imports, CUDA, checkpoints, features
SPARE_BYTES = 300e6  # scores, figures, executed notebooks and one half-written artifact


@dataclass
class Plan:
    """What one run has to do.

    Attributes:
        profile: the checked profile.
        notebooks: notebook name -> (file, parameters), in order.
        done: rows whose artifact exists, id -> folder.
        missing: rows to train, the first one first.
        skipped: data set name -> why its rows are skipped.
        fetch: data set names to download before their rows.
    """

    profile: Profile
    notebooks: dict[str, tuple[Path, dict[str, Any]]]
    done: dict[str, Path] = field(default_factory=dict)
    missing: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fetch: list[str] = field(default_factory=list)

    @property
    def build(self) -> Path:
        return paths.get_build_dir(self.profile.name)

    def get_row_seconds(self, row: Row) -> float:
        """Seconds of a row: as recorded in its artifact, else estimated."""
        meta = jobs.read_json(self.done[row.id] / "meta.json") if row.id in self.done else None
        for part in (meta or {}, (meta or {}).get("provenance") or {}):
            if isinstance(part.get("seconds"), (int, float)):
                return float(part["seconds"])
        return profiles.estimate_seconds(row, self.profile)

    def get_notebook_seconds(self, name: str) -> float:
        """Seconds of a notebook: as measured in the last run here, else as the profile says."""
        last = jobs.read_json(self.build / "status" / f"{name}.json") or {}
        if last.get("ok"):
            return float(last["seconds"])
        return self.profile.notebook_seconds.get(name, NOTEBOOK_SECONDS)

    @property
    def minutes(self) -> float:
        """Wall-clock minutes of what is left to do, all workers busy (models without an estimate left out)."""
        rows = [profiles.estimate_seconds(row, self.profile) for row in self.missing]
        work = sum(keep_known(rows)) + sum(map(self.get_notebook_seconds, self.notebooks))
        starts = profiles.START_SECONDS * (len(self.train_jobs()) + len(self.notebooks))
        return (work + starts) / self.profile.workers / 60

    @property
    def n_bytes(self) -> float:
        """Disk that the models to train will take."""
        return sum(map(profiles.estimate_bytes, self.missing))

    def train_jobs(self) -> dict[str, list[Row]]:
        """Pack the missing rows into processes: one each, or ``profile.train_jobs`` of about equal length."""
        limit = self.profile.train_jobs
        if limit is None or len(self.missing) <= limit:
            return {f"train-{row.id}": [row] for row in self.missing}
        packs: list[list[Row]] = [[] for _ in range(limit)]
        for row in self.missing:
            min(packs, key=lambda pack: sum(profiles.estimate_seconds(row, self.profile) for row in pack)).append(row)
        return {f"train-batch-{i}": pack for i, pack in enumerate(packs, 1) if pack}

    def to_json(self, run: str) -> dict[str, Any]:
        """The graph as the Snakefile reads it: jobs, what each waits for, and who goes first."""
        train = self.train_jobs()
        data = {
            f"data-{i}": {"name": name, "arguments": self.profile.datasets[name]} for i, name in enumerate(self.fetch)
        }
        data_job = {work["name"]: job for job, work in data.items()}
        job_of = {row.id: job for job, pack in train.items() for row in pack}
        train_entries = {}
        for index, (job, pack) in enumerate(train.items()):
            needs = sorted({data_job[row.dataset] for row in pack if row.dataset in data_job})
            first = any(row.id == self.profile.first for row in pack)
            train_entries[job] = {
                "ids": [row.id for row in pack],
                "needs": needs,
                "priority": 900 if first else 500 - index,
            }
        notebook_entries = {}
        for index, (name, (source, parameters)) in enumerate(self.notebooks.items()):
            needs = {job_of[row.id] for row in self.profile.rows_needed(name) if row.id in job_of}
            if name.startswith("08"):  # gathers what all the others saved
                needs |= {other for other in self.notebooks if other != name}
            notebook_entries[name] = {
                "source": str(source),
                "parameters": parameters,
                "needs": sorted(needs),
                "priority": 800 if index == 0 else 600 - index if len(needs) <= 1 else 200 - index,
            }
        return {
            "profile": self.profile.name,
            "run": run,
            "python": sys.executable,
            "threads": self.profile.threads,
            "data": data,
            "train": train_entries,
            "notebooks": notebook_entries,
        }


# --- checks before anything runs ------------------------------------------------------------------------------------


def select_notebooks(profile: Profile, wanted: list[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the notebooks to execute with their parameters, all overrides of the profile checked.

    Args:
        profile: checked profile.
        wanted: numbers or names (``"03"``, ``"03_partcrop"``); empty means all.

    Raises:
        ValueError: unknown notebook, here or in the profile; unknown parameter, wrong type.
    """
    found = profiles.find_notebooks()
    for section, named in (("notebooks", profile.notebooks), ("needs", profile.needs)):
        for name in named:
            if found and name not in found:
                raise ValueError(
                    f"profiles/{profile.name}.yaml: {section}: unknown notebook {name!r}: "
                    f"expected one of {', '.join(found)}"
                )
    chosen = set()
    for text in wanted:
        matches = [name for name in found if name == text or (text.isdigit() and name.startswith(f"{int(text):02d}_"))]
        if not matches:
            raise ValueError(
                f"unknown notebook {text!r}: expected one of {', '.join(n[:2] for n in found) or '(none exist)'}"
            )
        chosen.add(matches[0])
    merged = {
        name: profiles.merge_parameters(profile, name, profiles.read_parameters(path)) for name, path in found.items()
    }
    return {name: (path, merged[name]) for name, path in found.items() if not wanted or name in chosen}


def find_missing_datasets(profile: Profile) -> dict[str, str]:
    """Return the data sets of a profile that are neither here nor can be downloaded: name -> what was looked for."""
    raw = paths.get_raw_dir()
    missing = {}
    for name in profile.datasets:
        if name.partition("@")[0] in GENERATED + DOWNLOADED:
            continue
        if name.startswith("folder:"):
            if not Path(name.removeprefix("folder:")).expanduser().is_dir():
                missing[name] = f"no folder {name.removeprefix('folder:')}"
        else:
            folder = raw / FOLDERS.get(name, name)
            if not (folder.is_dir() or (raw / f"{name}.npz").is_file() or any(raw.glob(f"{name}-*.npz"))):
                missing[name] = f"no folder {folder} and no cache {name}.npz beside it"
    return missing


def check_data_folder(n_bytes: float) -> None:
    """Refuse to start when the models could not be saved.

    Args:
        n_bytes: what the run is expected to write.

    Raises:
        ValueError: data/ cannot be written, too little space, or ``MIA_DATA_DIR`` names no folder.
    """
    if os.environ.get("MIA_DATA_DIR") and not paths.get_raw_dir().is_dir():
        raise ValueError(
            f"MIA_DATA_DIR: expected a folder, got {os.environ['MIA_DATA_DIR']}; make it or unset the variable"
        )
    home = paths.get_home()
    folders = [paths.get_artifact_dirs()[0], home / "data" / "scores", home / "figures", home / "build"]
    if not os.environ.get("MIA_DATA_DIR"):  # without this folder every process would draw the scenes anew
        folders.append(paths.get_raw_dir())
    for folder in folders:
        probe = folder / f".write-{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x" * 4096)
        except OSError as error:
            reason = "no space left" if error.errno == errno.ENOSPC else error.strerror
            raise ValueError(
                f"{folder}: expected a folder that can be written, got {reason!r}; "
                "make room, change its rights or set MIA_HOME"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    free = shutil.disk_usage(paths.get_artifact_dirs()[0]).free
    if free < n_bytes + SPARE_BYTES:
        raise ValueError(
            f"{paths.get_artifact_dirs()[0]}: expected {(n_bytes + SPARE_BYTES) / 1e9:.1f} GB free, "
            f"got {free / 1e9:.1f} GB; make room or set MIA_HOME to another disk"
        )


def make_plan(name: str, wanted: list[str] | None = None, *, strict: bool = False) -> Plan:
    """Check a profile with everything it names, and find out what is left to do.

    Args:
        name: profile name.
        wanted: notebook numbers; empty or ``None`` means all notebooks and all rows.
        strict: a missing data set is an error.

    Raises:
        ValueError: one line; nothing was started or written.
    """
    profile = profiles.load(name)
    plan = Plan(profile, select_notebooks(profile, wanted or []))
    plan.skipped = find_missing_datasets(profile)
    if plan.skipped and strict:
        dataset, reason = next(iter(plan.skipped.items()))
        raise ValueError(f"data set {dataset}: {reason}")
    needed = [row.id for notebook in plan.notebooks for row in profile.rows_needed(notebook)]
    plan.notebooks = {name: (path, drop_skipped(plan, given)) for name, (path, given) in plan.notebooks.items()}
    for row in profile.models:
        if row.dataset in plan.skipped or (wanted and row.id not in needed):
            continue
        folder = rows.artifact_path(profile, row)
        if folder is None:
            plan.missing.append(row)
        else:
            plan.done[row.id] = folder
    plan.missing.sort(key=lambda row: row.id != profile.first)
    for dataset in {row.dataset: None for row in plan.missing}:
        source, raw = dataset.partition("@")[0], paths.get_raw_dir()
        if source in DOWNLOADED and not (raw / f"{source}.npz").is_file() and not any(raw.glob(f"{source}-*.npz")):
            plan.fetch.append(dataset)
    return plan


def drop_skipped(plan: Plan, parameters: dict[str, Any]) -> dict[str, Any]:
    """Leave the models of a missing data set out of a notebook's lists of models, where others are left in them."""
    skipped = {row.id for row in plan.profile.models if row.dataset in plan.skipped}
    lists = {key: value for key, value in parameters.items() if key.endswith("model_ids") and isinstance(value, list)}
    left = {key: [model_id for model_id in value if model_id not in skipped] for key, value in lists.items()}
    return parameters | {key: value for key, value in left.items() if value}


# --- commands -------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """Print models, notebooks, seconds, gigabytes and minutes; of a profile for GPUs their hours and memory."""
    if plan.profile.gpu_tflops is not None:
        return print_gpu_plan(plan)
    width = max([len(row.id) for row in plan.profile.models] + [len(n) for n in plan.notebooks] + [8])
    missing = {row.id for row in plan.missing}
    print(f"{'model':<{width}}  {'state':<8}  {'seconds':>9}")
    for row in plan.profile.models:
        state = "to train" if row.id in missing else "done" if row.id in plan.done else ""
        if row.dataset in plan.skipped:
            state = "skipped"
        if state:
            print(f"{row.id:<{width}}  {state:<8}  {plan.get_row_seconds(row):>9,.0f}")
    print(f"{'notebook':<{width}}")
    for name in plan.notebooks:
        print(f"{name:<{width}}  {'to run':<8}  {plan.get_notebook_seconds(name):>9,.0f}")
    to_train = count(len(plan.missing), "model")
    print(
        f"{to_train} to train, {plan.n_bytes / 1e9:.2f} GB, about {format_minutes(plan.minutes)} "
        f"with {plan.profile.workers} jobs side by side (seconds are those of one CPU thread)"
    )


def print_gpu_plan(plan: Plan) -> None:
    """Print GPU hours, GPU memory and disk of each model, then what each notebook needs, then the assumptions."""
    profile, missing = plan.profile, {row.id for row in plan.missing}
    shown = [row for row in profile.models if row.id in missing or row.id in plan.done or row.dataset in plan.skipped]
    hours = {row.id: plan.get_row_seconds(row) / 3600 for row in shown}
    memory = {row.id: profiles.estimate_gpu_bytes(row, profile) / 1e9 for row in shown}
    disk = {row.id: profiles.estimate_bytes(row) / 1e9 for row in shown}
    width = max([len(row.id) for row in shown] + [len(name) for name in plan.notebooks] + [8])
    print(f"{'model':<{width}}  {'state':<8}  {'GPU hours':>9}  {'GPU GB':>6}  {'disk GB':>7}")
    for row in shown:
        state = "to train" if row.id in missing else "done" if row.id in plan.done else "skipped"
        numbers = f"{hours[row.id]:>9.1f}  {memory[row.id]:>6.1f}  {disk[row.id]:>7.2f}".replace("nan", "  ?")
        print(f"{row.id:<{width}}  {state:<8}  {numbers}")
    print()
    print(
        f"{'notebook':<{width}}  {'models':>6}  {'to train':>8}  {'their GPU hours':>15}  {'its own':>7}  "
        f"{'GPU GB':>6}  {'RAM GB':>6}  {'disk GB':>7}"
    )
    for name in plan.notebooks:
        needed = [row for row in profile.rows_needed(name) if row.dataset not in plan.skipped]
        ids = [row.id for row in needed if row.id in missing]
        pools = sum(profiles.estimate_data_bytes(profile, dataset) for dataset in {row.dataset for row in needed}) / 1e9
        most = max(keep_known(memory[row.id] for row in needed if row.id in memory), default=0.0)
        print(
            f"{name:<{width}}  {len(needed):>6}  {len(ids):>8}  {sum(keep_known(hours[i] for i in ids)):>15.1f}  "
            f"{plan.get_notebook_seconds(name) / 3600:>7.1f}  {most:>6.1f}  {pools + BASE_RAM_GB:>6.1f}  "
            f"{sum(disk[i] for i in ids):>7.2f}"
        )
    data = {name: profiles.estimate_data_bytes(profile, name) / 1e9 for name in {row.dataset for row in plan.missing}}
    sets = ", ".join(f"{name} {size:.1f}" for name, size in sorted(data.items()) if size) or "none"
    training = sum(keep_known(hours[i] for i in missing))
    own = sum(map(plan.get_notebook_seconds, plan.notebooks)) / 3600
    most = max(keep_known(memory[i] for i in missing), default=0.0)
    print(
        f"\n{count(len(missing), 'model')} to train: {training:.1f} GPU hours, and {own:.1f} of the notebooks; "
        f"at most {most:.1f} GB of GPU memory; {plan.n_bytes / 1e9:.1f} GB of disk, "
        f"and {sum(data.values()):.1f} GB of data sets ({sets})"
    )
    rate, share, step = profile.gpu_tflops, profiles.FLOAT32_SHARE, 1000 * profiles.STEP_SECONDS
    for line in (
        f"estimate, not measured. Hours: {rate:g} TFLOP/s in bfloat16 and {rate * share:g} in float32 "
        f"(profiles/{profile.name}.yaml: gpu_tflops) for the arithmetic, and {step:g} ms a step",
        "GPU memory: weights, gradients and AdamW (16 bytes a parameter), what the backward pass keeps of a batch, the "
        f"members, and {profiles.CONTEXT_GB:g} GB of CUDA. RAM: the data sets and {BASE_RAM_GB:g} GB",
        f"Disk: {profiles.CHECKPOINTS} files of 4 bytes a parameter; features that the notebooks keep come on top",
        "A model serves several notebooks; a notebook's own hours are the profile's guess until it has run here",
    ):
        print(line)


def keep_known(values: Iterable[float]) -> list[float]:
    """Return the values that are not NaN: estimates of models that have one."""
    return [value for value in values if not math.isnan(value)]


def format_minutes(minutes: float) -> str:
    """Round minutes as one would say them."""
    if minutes >= 90:
        return f"{minutes / 60:,.0f} hours"
    return count(max(1, round(minutes)), "minute")


def count(n: int, noun: str) -> str:
    """Return "1 model", "2 models"."""
    return f"{n} {noun}{'s' if n != 1 else ''}"


def run_profile(arguments: list[str]) -> int:
    """``PROFILE [NUMBERS] [--plan] [--strict] [-- ENGINE_ARGS]``; returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    engine_arguments = arguments[cut + 1 :]
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("profile")
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--strict", action="store_true")
    try:
        options, unknown = parser.parse_known_args(arguments[:cut])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]!r}: expected --plan, --strict, or -- before arguments of the engine"
        )
    plan = make_plan(options.profile, options.notebooks, strict=options.strict)
    for dataset, reason in plan.skipped.items():
        n = sum(row.dataset == dataset for row in plan.profile.models)
        print(f"skipped: {dataset}, {reason} ({count(n, 'model')})")
    if options.plan:
        print_plan(plan)
        return 0
    command = get_engine_command(plan, engine_arguments)
    check_data_folder(plan.n_bytes)
    with hold_lock(plan):
        return execute(plan, command)


@contextlib.contextmanager
def hold_lock(plan: Plan) -> Iterator[None]:
    """Hold ``build/<profile>/run.lock``. The engine inherits it, so a run whose head was killed still counts as one.

    Raises:
        ValueError: another run of this profile is going on.
    """
    plan.build.mkdir(parents=True, exist_ok=True)
    with open(plan.build / "run.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise ValueError(
                f"profile {plan.profile.name} is being run by another process (process group {who}): "
                "wait for it, or stop it and start again"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpgrp()}\n")
        file.flush()
        os.set_inheritable(file.fileno(), True)
        yield


def execute(plan: Plan, command: list[str]) -> int:
    """Run the graph with the engine's command, echo what happens, and report; returns 0 when all is done, else 1."""
    n_models = len(plan.missing) + len(plan.done)
    to_train = count(len(plan.missing), "model")
    print(
        f"profile {plan.profile.name}: {to_train} to train ({len(plan.done)} of {n_models} done), "
        f"{count(len(plan.notebooks), 'notebook')}, about {format_minutes(plan.minutes)}"
    )
    print("safe to stop at any time, it resumes: the same command goes on where it was", flush=True)
    run_id = f"{time.time():.3f}-{os.getpid()}"
    logs = plan.build / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for marker in plan.build.glob("*.done"):  # artifacts alone say what is computed; notebooks always run again
        marker.unlink()
    jobs.write_json(plan.build / "plan.json", plan.to_json(run_id))
    environment = jobs.set_threads(dict(os.environ), plan.profile.threads)
    if {"-n", "--dry-run", "--dryrun"} & set(command):
        return subprocess.run(command, env=environment).returncode
    echo = Echo(plan, run_id)
    with open(logs / "engine.log", "w") as log:
        log.write(shlex.join(command) + "\n")
        log.flush()
        engine = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, close_fds=False)
        previous = signal.signal(signal.SIGTERM, _raise_interrupt)
        try:
            while engine.poll() is None:
                echo.update()
                time.sleep(0.5)
        except KeyboardInterrupt:
            echo.clear()
            stop(engine)
            print("stopped; the same command goes on where it was", flush=True)
            return 130
        finally:
            signal.signal(signal.SIGTERM, previous)
    return echo.finish(engine.returncode)


def get_engine_command(plan: Plan, engine_arguments: list[str]) -> list[str]:
    """Return the Snakemake command; the user's own arguments come last and win.

    Raises:
        ValueError: arguments that the engine would refuse. One line.
    """
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(profiles.find_source("Snakefile")),
        "--directory",
        str(plan.build),
        "--config",
        f"plan={plan.build / 'plan.json'}",
        # after kill -9 the engine would refuse its own lock; ours (hold_lock) ends with the process
        "--nolock",
        "--rerun-incomplete",
        "--keep-going",
        "--rerun-triggers",
        "mtime",
        "--scheduler",
        "greedy",
    ]
    cores = ["--cores", str(plan.profile.workers)]
    if not engine_arguments:
        return [*command, "--quiet", "all", *cores]
    asked = read_engine_arguments([*command[3:], *engine_arguments])
    if not asked.dryrun:
        command += ["--quiet", "all"]
    if asked.executor not in (None, "local"):
        # on a cluster --cores would bound what all jobs use together: it is left out, and they are counted
        if asked.jobs is None:
            raise ValueError(f"engine: executor {asked.executor!r} needs the number of jobs at once: add --jobs N")
    elif asked.cores is None and asked.jobs is None:
        command += cores
    return command + engine_arguments


def read_engine_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the engine's command line, and the profiles that it names, with the engine's own parser.

    Raises:
        ValueError: what the engine would refuse, and an executor that is not installed. One line.
    """
    from snakemake.cli import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(arguments)[1]
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1].rpartition("rror: ")[2]
    if match := re.search(r"--executor/-e: invalid choice: '([\w-]+)'", reason):
        plugin = f"snakemake-executor-plugin-{match[1]}"
        raise ValueError(f"engine: executor {match[1]!r} is not installed: pip install {plugin}")
    raise ValueError(f"engine: {reason}")


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def stop(engine: subprocess.Popen) -> None:
    """End the engine and everything it started, kernels included, by their process ids."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(engine.pid)
        family = [*head.children(recursive=True), head]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    engine.wait()


class Echo:
    """Says on the console what the jobs report: one line per trained row, per finding and per failure."""

    def __init__(self, plan: Plan, run_id: str) -> None:
        self.plan, self.run_id = plan, run_id
        self.train = plan.train_jobs()
        self.waiting = {row.id: row for row in plan.missing}
        self.all_jobs = {*self.train, *plan.notebooks, *(f"data-{i}" for i in range(len(plan.fetch)))}
        self.pending = set(self.all_jobs)
        self.n_models = len(plan.missing) + len(plan.done)
        self.n_updates = 0
        self.started = time.time()
        self.line = sys.stdout.isatty()

    def say(self, text: str) -> None:
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        """Remove the progress line (terminals only)."""
        if self.line:
            print("\r\033[K", end="", flush=True)

    def update(self) -> None:
        """Report what has happened since the last call."""
        # read once: a job that ends between two reads would be taken off the list without a look for its rows
        ended = {job: status for job in sorted(self.pending) if (status := self.read_status(job))}
        for job, pack in self.train.items():
            # a process that trains several rows is looked at while it runs, now and then (folders are hashed)
            if job in ended or (job in self.pending and len(pack) > 1 and self.n_updates % 6 == 0):
                for row in pack:
                    self.look_for(row)
        self.n_updates += 1
        for job, status in ended.items():
            self.pending.discard(job)
            self.report(job, status)
        if self.line:
            passed = int(time.time() - self.started)
            n_left = sum(job in self.plan.notebooks for job in self.pending)
            print(
                f"\r\033[K{self.n_models - len(self.waiting)}/{self.n_models} models, "
                f"{len(self.plan.notebooks) - n_left}/{len(self.plan.notebooks)} notebooks, "
                f"{passed // 60}:{passed % 60:02d}",
                end="",
                flush=True,
            )

    def read_status(self, job: str) -> dict[str, Any] | None:
        """Return what a job of this very run reported when it ended, else ``None``."""
        status = jobs.read_json(self.plan.build / "status" / f"{job}.json")
        return status if status and status.get("run") == self.run_id else None

    def look_for(self, row: Row) -> None:
        """Report a row as soon as its artifact exists."""
        folder = rows.artifact_path(self.plan.profile, row) if row.id in self.waiting else None
        if folder is not None:
            del self.waiting[row.id]
            self.plan.done[row.id] = folder
            seconds = self.plan.get_row_seconds(row)
            self.say(f"trained {row.id} ({seconds:.0f} s) {self.n_models - len(self.waiting)}/{self.n_models}")

    def report(self, job: str, status: dict[str, Any]) -> None:
        log = os.path.relpath(self.plan.build / "logs" / f"{job}.log")
        if not status["ok"]:
            if status.get("blocked"):
                self.say(f"not run: {job} ({status['message']})")
            elif job in self.plan.notebooks:
                self.say(f"failed: {job}, section {status['section']!r}: {status['message']}; log {log}")
            else:
                self.say(f"failed: {job}: {status['message']}; log {log}")
        elif job in self.plan.notebooks:
            self.say(status["finding"] or f"{job[:2]} executed in {status['seconds']:.0f} s")

    def finish(self, engine_code: int) -> int:
        """Say what did not run and where the figures are; returns the exit code, by what lies on the disk."""
        self.update()
        for row in [*self.waiting.values()]:
            self.look_for(row)
        self.clear()
        lost = sorted(self.pending)
        failed = [job for job in self.all_jobs if not (self.read_status(job) or {"ok": False})["ok"]]
        log = os.path.relpath(self.plan.build / "logs" / "engine.log")
        if engine_code:
            last = jobs.get_last_line(self.plan.build / "logs" / "engine.log")
            print(f"failed: the engine stopped ({last}), not run: {', '.join(lost) or 'nothing'}; log {log}")
        print_page(self.plan.profile.name)
        return 1 if engine_code or failed or self.waiting else 0


def print_page(profile: str) -> None:
    """Print the path of the page with all figures: the last line of a run."""
    page = paths.get_figures_dir(profile) / "index.html"
    print(os.path.relpath(page) + ("" if page.exists() else " (not there yet: notebook 08 writes it)"), flush=True)


def run_test(arguments: list[str]) -> int:
    """``test [ARGS]``: the test suite of the checkout; returns pytest's exit code."""
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=paths.PACKAGE_ROOT).returncode
    print(f"pytest exit code {code}", flush=True)
    return code


def run_setup(arguments: list[str]) -> int:
    """``setup``: says which environment is used; ``run_all.sh`` has made it by now."""
    _expect_nothing("setup", arguments)
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU with {os.cpu_count()} cores"
    print(f"environment ready: Python {sys.version.split()[0]}, torch {torch.__version__}, {device}")
    return 0


def run_data(arguments: list[str]) -> int:
    """``data PROFILE``: downloads what a profile needs, and nothing else (for a login node)."""
    if len(arguments) != 1:
        raise ValueError(
            f"data: expected one profile ({', '.join(profiles.list_names())}), got {len(arguments)} arguments"
        )
    profile = profiles.load(arguments[0])
    missing = find_missing_datasets(profile)
    check_data_folder(0)
    from mia_utils import datasets

    for name, load_arguments in profile.datasets.items():
        if name in missing:
            print(f"skipped: {name}, {missing[name]}")
            continue
        pool = datasets.load(name, **load_arguments)
        print(f"{name}: {len(pool):,} images of {pool.images.shape[1]} x {pool.images.shape[2]}")
    return 0


def run_replay(arguments: list[str]) -> int:
    """``replay``: redraws every score-based figure of ``photos`` from the committed scores."""
    _expect_nothing("replay", arguments)
    from mia_utils import figures, lab, report

    lab = lab.open("photos", replay=True)
    report.write_summary(lab)
    drawn = figures.draw_all(lab)
    report.write_index("photos")
    for row in drawn.itertuples():
        print(f"{row.figure}: {os.path.relpath(row.path) if row.path else row.note}")
    print(f"{(drawn.path != '').sum()} figures redrawn from data/scores/photos")
    print_page("photos")
    return 0


def run_lab(arguments: list[str]) -> int:
    """``lab [ARGS]``: JupyterLab on ``notebooks/``."""
    command = [sys.executable, "-m", "jupyterlab", str(profiles.find_source("notebooks")), *arguments]
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.execv(sys.executable, command)


def _expect_nothing(command: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"{command}: expected no arguments, got {arguments[0]!r}")


COMMANDS = {"test": run_test, "setup": run_setup, "data": run_data, "replay": run_replay, "lab": run_lab}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: bad input, nothing was started)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in ("-h", "--help", "help"):
            print(USAGE.format(profiles=", ".join(profiles.list_names())))
            return 0
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        starts_with_profile = arguments and not arguments[0].startswith("-")
        return run_profile(arguments if starts_with_profile else ["quick", *arguments])
    except (ValueError, OSError) as error:
        if os.environ.get("MIA_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
