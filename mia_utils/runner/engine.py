"""Runs a plan: Snakemake orders the jobs and keeps the workers busy, this says what happens and what came of it."""

import argparse
import contextlib
import fcntl
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from mia_utils import paths
from mia_utils.runner import artifacts, estimates, jobs, profiles, train, warm
from mia_utils.runner.plan import Plan, count, format_minutes


@contextlib.contextmanager
def hold_lock(plan: Plan) -> Iterator[None]:
    """Hold ``build/<profile>/run.lock``; a second run of the profile is a ValueError.

    The engine inherits the lock, so a run whose head was killed still counts as one. The file goes when the run ends.
    """
    path, held = plan.build / "run.lock", False
    path.parent.mkdir(parents=True, exist_ok=True)
    while not held:
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait = "wait for it, or stop it and start again"
            raise ValueError(f"profile {plan.profile.name} is being run by another process: {wait}") from None
        with contextlib.suppress(FileNotFoundError):  # else a run that ended meanwhile has removed it: a new file
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
    with file:
        os.set_inheritable(file.fileno(), True)
        yield
        path.unlink(missing_ok=True)  # while it is held; not after an error, when an engine may still hold it


def execute(plan: Plan, command: list[str]) -> int:
    """Run the graph with the engine's command, echo what happens, and report; returns 0 when all is done, else 1."""
    echo, profile = Echo(plan, f"{time.time():.3f}-{os.getpid()}"), plan.profile
    print(
        f"profile {profile.name}: {count(len(plan.missing), 'model')} to train ({len(plan.done)} of {echo.n_models} "
        f"done), {count(len(plan.notebooks), 'notebook')}, about {format_minutes(echo.minutes)}"
    )
    print("safe to stop at any time, it resumes: the same command goes on where it was", flush=True)
    for marker in plan.build.glob("*.done"):  # artifacts alone say what is computed; notebooks always run again
        marker.unlink()
    head = {"profile": profile.name, "run": echo.run, "python": sys.executable, "threads": profile.threads}
    jobs.write_plan(plan.build / "plan.json", head | {"jobs": plan.jobs})
    environment = jobs.set_threads(profile.threads)
    if {"-n", "--dry-run", "--dryrun"} & set(command):
        return subprocess.run(command, env=environment).returncode
    log = plan.build / "logs" / "engine.log"
    log.parent.mkdir(exist_ok=True)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    serving = warm.start(environment) if len(plan.jobs) > 1 else contextlib.nullcontext(environment)
    try:
        with log.open("w") as file, serving as environment:
            print(shlex.join(command), file=file, flush=True)
            engine = subprocess.Popen(command, stdout=file, stderr=file, env=environment, close_fds=False)
            try:
                while engine.poll() is None:
                    echo.update()
                    time.sleep(0.5)
                code = echo.finish(engine.returncode)
                # a process of its own: it stands above the lab, which this does not know
                gather = [*jobs.WARM, "mia_utils.replay", profile.name, "--gather"]
                code = subprocess.run(gather, env=environment).returncode or code
            except KeyboardInterrupt:
                echo.clear()
                stop()
                print("stopped; the same command goes on where it was", flush=True)
                return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print_page(profile.name)
    return code


def stop() -> None:
    """End the engine, the warm server and everything they started, kernels included, by their process ids."""
    import psutil

    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(family, timeout=5)[1]:
        process.kill()


def get_command(plan: Plan, engine_arguments: list[str]) -> list[str]:
    """Return the Snakemake command; the user's own arguments come last and win, refused ones are a ValueError."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(profiles.find_source("Snakefile"))]
    command += ["--directory", str(plan.build), "--config", "plan=plan.json"]
    # after kill -9 the engine would refuse its own lock; ours (hold_lock) ends with the process
    command += ["--nolock", "--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime", "--scheduler", "greedy"]
    read = argparse.Namespace(dryrun=False, executor=None, cores=None, jobs=None)
    if engine_arguments:
        read = read_arguments([*command[3:], *engine_arguments])
    if not read.dryrun:
        command += ["--quiet", "all"]
    if read.executor in (None, "local") and read.cores is None and read.jobs is None:
        command += ["--cores", str(plan.profile.workers)]
    # on a cluster --cores would bound what all jobs use together: it is left out, and they are counted
    elif read.executor not in (None, "local") and read.jobs is None:
        raise ValueError(f"engine: executor {read.executor!r} needs the number of jobs at once: add --jobs N")
    return command + engine_arguments


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the engine's command line, and the profiles that it names, with the engine's own parser.

    What the engine would refuse or wait for in vain, and an executor that is not installed, is a ValueError.
    """
    from snakemake.cli import parse_args  # a second: only where arguments are given

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read = parse_args(arguments)[1]
    except (Exception, SystemExit) as error:  # its parser raises a dozen types
        last = (said.getvalue().strip().splitlines() or ["only its help was asked for"])[-1].rpartition("rror: ")[2]
        reason = last if isinstance(error, SystemExit) else error
        if match := re.search(r"--executor/-e: invalid choice: '([\w-]+)'", last):
            reason = f"executor {match[1]!r} is not installed: pip install snakemake-executor-plugin-{match[1]}"
        raise ValueError(f"engine: {reason}") from None
    names = ("cores", "jobs", "local-cores", "max-threads")
    numbers = {f"--{name}": getattr(read, name.replace("-", "_")) for name in names}
    for name, number in (numbers | {f"--resources {key}": n for key, n in (read.resources or {}).items()}).items():
        number = getattr(number, "value", number)
        if isinstance(number, int) and number < 1:
            raise ValueError(f"engine: {name}: expected a number of at least 1, got {number}")
    return read


class Echo:
    """Says on the console what the jobs report: one line per trained row, per finding and per failure."""

    def __init__(self, plan: Plan, run: str) -> None:
        self.plan, self.run, self.pending, self.good = plan, run, set(plan.jobs), set()
        self.n_models, self.minutes = len(plan.missing) + len(plan.done), plan.minutes
        self.planned = self.spent = 0.0  # seconds of the jobs that have ended
        self.started, self.is_terminal = time.time(), sys.stdout.isatty()

    def clear(self) -> None:
        """Remove the progress line (terminals only)."""
        if self.is_terminal:
            print("\r\033[K", end="", flush=True)

    def update(self) -> None:
        """Report what has happened since the last call, and how long the rest will take."""
        for job in sorted(self.pending):
            status = jobs.read_json(self.plan.build / "status" / f"{job}.json") or {}
            if status.get("run") == self.run:
                self.pending.discard(job)
                self.report(job, status)
        if self.is_terminal:
            kinds = [self.plan.jobs[job]["kind"] for job in self.pending]
            n_models, n_notebooks = self.n_models - kinds.count("train"), len(self.plan.notebooks)
            # what has ended tells how much longer than planned things take
            left = self.minutes * (self.spent / self.planned if self.planned else 1) - (time.time() - self.started) / 60
            text = f"{n_models}/{self.n_models} models, {n_notebooks - kinds.count('notebook')}/{n_notebooks} notebooks"
            print(f"\r\033[K{text}, about {format_minutes(left)} left", end="", flush=True)

    def report(self, job: str, status: dict[str, Any]) -> None:
        """Say how a job ended."""
        self.clear()
        work, seconds, profile = self.plan.jobs[job], status["seconds"], self.plan.profile
        self.planned, self.spent = self.planned + work["seconds"] * estimates.measure_pace(), self.spent + seconds
        trained = work["kind"] == "train" and status["ok"]
        if trained and not artifacts.find(train.spec_of(profile, profile.row(job[6:]))):
            status |= {"ok": False, "message": "its artifact is not found"}
        if status["ok"]:
            self.good.add(job)
        if not status["ok"]:
            where = f", section {status['section']!r}" if status.get("section") else ""
            log = os.path.relpath(self.plan.build / "logs" / f"{job}.log")
            failed = f"failed: {job}{where}: {status['message']}; log {log}"
            print(f"not run: {job} ({status['message']})" if status.get("blocked") else failed, flush=True)
        elif trained:
            n_left = sum(self.plan.jobs[other]["kind"] == "train" for other in self.pending)
            print(f"trained {job[6:]} ({seconds:.0f} s) {self.n_models - n_left}/{self.n_models}", flush=True)
        elif work["kind"] == "notebook":
            print(status["finding"] or f"{job[:2]} executed in {seconds:.0f} s", flush=True)

    def finish(self, engine_code: int) -> int:
        """Say what did not run; returns the exit code: 0 when every job ended well."""
        self.update()
        self.clear()
        if engine_code:
            log = self.plan.build / "logs" / "engine.log"
            lost = ", ".join(sorted(self.pending)) or "nothing"
            last = jobs.get_last_line(log)
            print(f"failed: the engine stopped ({last}), not run: {lost}; log {os.path.relpath(log)}")
        return int(engine_code != 0 or self.good != set(self.plan.jobs))


def print_page(profile: str) -> None:
    """Print the path of the page with all figures: the last line of a run."""
    page = paths.get_figures_dir(profile) / "index.html"
    print(os.path.relpath(page) + ("" if page.exists() else " (not written)"), flush=True)
