"""Runs a plan: Snakemake orders the jobs and keeps the workers busy, this says what happens and what came of it."""

from __future__ import annotations

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
from mia_utils.runner import artifacts, jobs, profiles, train
from mia_utils.runner.plan import Plan, count, format_minutes
from mia_utils.runner.profiles import Row


@contextlib.contextmanager
def hold_lock(plan: Plan) -> Iterator[None]:
    """Hold ``build/<profile>/run.lock``; a second run of the profile is a ValueError.

    The engine inherits the lock, so a run whose head was killed still counts as one.
    """
    plan.build.mkdir(parents=True, exist_ok=True)
    with open(plan.build / "run.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            group = file.read().strip() or "unknown"
            raise ValueError(
                f"profile {plan.profile.name} is being run by another process (process group {group}): "
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
    print(
        f"profile {plan.profile.name}: {count(len(plan.missing), 'model')} to train ({len(plan.done)} of {n_models} "
        f"done), {count(len(plan.notebooks), 'notebook')}, about {format_minutes(plan.minutes)}"
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
    code = echo.finish(engine.returncode)
    gathered = gather(plan.profile.name)
    print_page(plan.profile.name)
    return code or gathered


def gather(profile: str) -> int:
    """Pack what the notebooks saved and write the page; returns the exit code."""
    # a process of its own: it stands above the lab, which this does not know
    command = [sys.executable, "-m", "mia_utils.replay", profile, "--gather"]
    return subprocess.run(command, env=jobs.set_threads(dict(os.environ), 1)).returncode


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def stop(engine: subprocess.Popen) -> None:
    """End the engine and everything it started, kernels included, by their process ids."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(engine.pid)
        family = [*head.children(recursive=True), head]
        for end, processes in (
            ("terminate", lambda: family),
            ("kill", lambda: psutil.wait_procs(family, timeout=5)[1]),
        ):
            for process in processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(process, end)()
    engine.wait()


def get_command(plan: Plan, engine_arguments: list[str]) -> list[str]:
    """Return the Snakemake command; the user's own arguments come last and win.

    Raises:
        ValueError: arguments that the engine would refuse. One line.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(profiles.find_source("Snakefile"))]
    command += ["--directory", str(plan.build), "--config", "plan=plan.json"]
    # after kill -9 the engine would refuse its own lock; ours (hold_lock) ends with the process
    command += ["--nolock", "--rerun-incomplete", "--keep-going", "--rerun-triggers", "mtime", "--scheduler", "greedy"]
    cores = ["--cores", str(plan.profile.workers)]
    if not engine_arguments:
        return [*command, "--quiet", "all", *cores]
    read = read_arguments([*command[3:], *engine_arguments])
    if not read.dryrun:
        command += ["--quiet", "all"]
    if read.executor not in (None, "local"):
        # on a cluster --cores would bound what all jobs use together: it is left out, and they are counted
        if read.jobs is None:
            raise ValueError(f"engine: executor {read.executor!r} needs the number of jobs at once: add --jobs N")
    elif read.cores is None and read.jobs is None:
        command += cores
    return command + engine_arguments


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the engine's command line, and the profiles that it names, with the engine's own parser.

    Raises:
        ValueError: what the engine would refuse or wait for in vain, and an executor that is not installed. One line.
    """
    from snakemake.cli import parse_args  # a second: only where arguments are given
    from snakemake.exceptions import CliException

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read = parse_args(arguments)[1]
    except CliException as error:
        raise ValueError(f"engine: {error}") from None
    except SystemExit:
        reason = (said.getvalue().strip().splitlines() or ["only its help was asked for"])[-1].rpartition("rror: ")[2]
        if match := re.search(r"--executor/-e: invalid choice: '([\w-]+)'", reason):
            plugin = f"snakemake-executor-plugin-{match[1]}"
            reason = f"executor {match[1]!r} is not installed: pip install {plugin}"
        raise ValueError(f"engine: {reason}") from None
    for name in ("cores", "jobs"):
        if isinstance(number := getattr(read, name), int) and number < 1:
            raise ValueError(f"engine: --{name}: expected a number of at least 1, got {number}")
    return read


class Echo:
    """Says on the console what the jobs report: one line per trained row, per finding and per failure."""

    def __init__(self, plan: Plan, run_id: str) -> None:
        self.plan, self.run_id = plan, run_id
        self.train = plan.train_jobs()
        self.waiting = {row.id: row for row in plan.missing}
        self.jobs = {*self.train, *plan.notebooks, *(f"data-{i}" for i in range(len(plan.fetch)))}
        self.pending = set(self.jobs)
        self.n_models = len(plan.missing) + len(plan.done)
        self.n_updates, self.started, self.line = 0, time.time(), sys.stdout.isatty()

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
            minutes, seconds = divmod(int(time.time() - self.started), 60)
            n_models, n_notebooks = self.n_models - len(self.waiting), len(self.plan.notebooks.keys() - self.pending)
            models, notebooks = (
                f"{n_models}/{self.n_models} models",
                f"{n_notebooks}/{len(self.plan.notebooks)} notebooks",
            )
            print(f"\r\033[K{models}, {notebooks}, {minutes}:{seconds:02d}", end="", flush=True)

    def read_status(self, job: str) -> dict[str, Any] | None:
        """Return what a job of this very run reported when it ended, else ``None``."""
        status = jobs.read_json(self.plan.build / "status" / f"{job}.json")
        return status if status and status.get("run") == self.run_id else None

    def look_for(self, row: Row) -> None:
        """Report a row as soon as its artifact exists."""
        folder = artifacts.find(train.spec_of(self.plan.profile, row)) if row.id in self.waiting else None
        if folder is not None:
            del self.waiting[row.id]
            self.plan.done[row.id] = folder
            seconds = self.plan.get_row_seconds(row)
            self.say(f"trained {row.id} ({seconds:.0f} s) {self.n_models - len(self.waiting)}/{self.n_models}")

    def report(self, job: str, status: dict[str, Any]) -> None:
        """Say how a job ended."""
        if not status["ok"]:
            where = f", section {status['section']!r}" if job in self.plan.notebooks and status.get("section") else ""
            log = os.path.relpath(self.plan.build / "logs" / f"{job}.log")
            failed = f"failed: {job}{where}: {status['message']}; log {log}"
            self.say(f"not run: {job} ({status['message']})" if status.get("blocked") else failed)
        elif job in self.plan.notebooks:
            self.say(status["finding"] or f"{job[:2]} executed in {status['seconds']:.0f} s")

    def finish(self, engine_code: int) -> int:
        """Say what did not run and where the figures are; returns the exit code, by what lies on the disk."""
        self.update()
        for row in [*self.waiting.values()]:
            self.look_for(row)
        self.clear()
        failed = [job for job in self.jobs if not (self.read_status(job) or {"ok": False})["ok"]]
        if engine_code:
            log = self.plan.build / "logs" / "engine.log"
            lost = ", ".join(sorted(self.pending)) or "nothing"
            last = jobs.get_last_line(log)
            print(f"failed: the engine stopped ({last}), not run: {lost}; log {os.path.relpath(log)}")
        return 1 if engine_code or failed or self.waiting else 0


def print_page(profile: str) -> None:
    """Print the path of the page with all figures: the last line of a run."""
    page = paths.get_figures_dir(profile) / "index.html"
    print(os.path.relpath(page) + ("" if page.exists() else " (not written)"), flush=True)
