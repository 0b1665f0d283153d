"""What one run has to do: rows to train, notebooks to execute, in which order, and what it will cost.

Nothing here imports torch, except the estimate for a GPU: mistakes and ``--plan`` come at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mia_utils import paths
from mia_utils.runner import artifacts, choices, estimates, jobs, parameters, profiles, train
from mia_utils.runner.profiles import Profile, Row

GENERATED = ("scenes", "scenes-night", "scenes-sketch")
DOWNLOADED = ("cifar10", "cifar100", "stl10", "camvid", "oxford_pets")
PLACED = ("bdd100k", "cityscapes", "mapillary", "tiny_imagenet")  # by the user
SUFFIXES = ("cityscapes", "camvid", "scenes", "frames", "official")  # of NAME@SUFFIX
FOLDERS = {"tiny_imagenet": "tiny-imagenet-200"}  # what the unpacked archive is called, where not as the data set
NOTEBOOK_SECONDS = 60.0


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
        recorded = artifacts.read_meta(self.done[row.id]).get("provenance", {}) if row.id in self.done else {}
        return recorded.get("seconds") or estimates.estimate_seconds(row, self.profile)

    def get_notebook_seconds(self, name: str) -> float:
        """Seconds of a notebook: as measured in the last run here, else as the profile says."""
        last = jobs.read_json(self.build / "status" / f"{name}.json") or {}
        if last.get("ok"):
            return float(last["seconds"])
        return self.profile.notebook_seconds.get(name, NOTEBOOK_SECONDS)

    @property
    def minutes(self) -> float:
        """Wall-clock minutes of what is left to do, all workers busy."""
        work = sum(estimates.estimate_seconds(row, self.profile) for row in self.missing)
        work += sum(map(self.get_notebook_seconds, self.notebooks))
        starts = estimates.START_SECONDS * (len(self.train_jobs()) + len(self.notebooks))
        return (work + starts) / self.profile.workers / 60

    @property
    def n_bytes(self) -> float:
        """Disk that the models to train will take."""
        return sum(map(estimates.estimate_bytes, self.missing))

    def train_jobs(self) -> dict[str, list[Row]]:
        """Pack the missing rows into processes: one each, or ``profile.train_jobs`` of about equal length."""
        limit = self.profile.train_jobs
        if limit is None or len(self.missing) <= limit:
            return {f"train-{row.id}": [row] for row in self.missing}
        packs: list[list[Row]] = [[] for _ in range(limit)]
        for row in self.missing:
            min(packs, key=lambda pack: sum(estimates.estimate_seconds(row, self.profile) for row in pack)).append(row)
        return {f"train-batch-{i}": pack for i, pack in enumerate(packs, 1) if pack}

    def to_json(self, run: str) -> dict[str, Any]:
        """The graph as the Snakefile reads it: jobs, what each waits for, and who goes first."""
        data = {f"data-{i}": {"name": n, "arguments": self.profile.datasets[n]} for i, n in enumerate(self.fetch)}
        data_job = {work["name"]: job for job, work in data.items()}
        train_entries, notebook_entries, job_of = {}, {}, {}
        for index, (job, pack) in enumerate(self.train_jobs().items()):
            job_of |= {row.id: job for row in pack}
            needs = sorted({data_job[row.dataset] for row in pack if row.dataset in data_job})
            first = any(row.id == self.profile.first for row in pack)
            priority = 900 if first else 500 - index
            train_entries[job] = {"ids": [row.id for row in pack], "needs": needs, "priority": priority}
        for index, (name, (source, given)) in enumerate(self.notebooks.items()):
            needs = {job_of[row.id] for row in self.profile.rows_needed(name) if row.id in job_of}
            if name.startswith("08"):  # gathers what all the others saved
                needs |= {other for other in self.notebooks if other != name}
            priority = 800 if index == 0 else 600 - index if len(needs) <= 1 else 200 - index
            entry = {"source": str(source), "parameters": given, "needs": sorted(needs), "priority": priority}
            notebook_entries[name] = entry
        graph = {"data": data, "train": train_entries, "notebooks": notebook_entries}
        head = {"profile": self.profile.name, "run": run, "python": sys.executable, "threads": self.profile.threads}
        return head | graph


def select_notebooks(profile: Profile, wanted: list[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the notebooks to execute with their parameters, all overrides of the profile checked.

    ``wanted``: numbers or names (``"03"``, ``"03_partcrop"``); empty means all.
    """
    found = parameters.find_notebooks()
    for section in ("notebooks", "needs", "notebook_seconds"):
        for name in getattr(profile, section):
            if found and name not in found:
                where = f"profiles/{profile.name}.yaml: {section}"
                raise ValueError(f"{where}: unknown notebook {name!r}: expected one of {', '.join(found)}")
    chosen = set()
    for text in wanted:
        number = f"{int(text):02d}_" if text.isascii() and text.isdigit() and len(text) < 3 else None
        matches = [name for name in found if name == text or (number and name.startswith(number))]
        if not matches:
            known = ", ".join(name[:2] for name in found) or "(none exist)"
            raise ValueError(f"unknown notebook {text!r}: expected one of {known}")
        chosen.add(matches[0])
    merged = {
        name: (path, parameters.merge_parameters(profile, name, parameters.read_parameters(path)))
        for name, path in found.items()
    }
    return {name: merged[name] for name in merged if not wanted or name in chosen}


def find_missing_datasets(profile: Profile) -> dict[str, str]:
    """Return the data sets of a profile that are neither here nor can be downloaded: name -> what was looked for.

    A name that no one knows is a ValueError: a misspelt one must not skip its rows in silence.
    """
    raw, missing = paths.get_raw_dir(), {}
    for name in profile.datasets:
        source, at, suffix = name.partition("@")
        if name.startswith("folder:"):
            text = name.removeprefix("folder:")
            if not text.strip():
                raise ValueError(f"profiles/{profile.name}.yaml: datasets: expected folder:PATH, got {name!r}")
            if not Path(text).expanduser().is_dir():
                missing[name] = f"no folder {text}"
            continue
        folder = raw / FOLDERS.get(source, source)
        here = folder.is_dir() or (raw / f"{source}.npz").is_file() or any(raw.glob(f"{source}-*.npz"))
        known = (*GENERATED, *DOWNLOADED, *PLACED)
        if (source not in known and not here) or (at and suffix not in SUFFIXES):
            wrong, names = (name, known) if source not in known and not here else (suffix, SUFFIXES)
            raise ValueError(
                f"profiles/{profile.name}.yaml: datasets: unknown {wrong!r}{choices.suggest(wrong, names)}; others are "
                f"folder:PATH, or a file NAME.npz in {raw}"
            )
        if not here and source not in GENERATED + DOWNLOADED:
            missing[name] = f"no folder {folder} and no cache {source}.npz beside it"
    return missing


def check_archs(rows: list[Row]) -> None:
    """Refuse an architecture that no library knows; the usual ones are recognized without importing torch."""
    for row in rows:
        if row.arch not in choices.ARCHS:
            import segmentation_models_pytorch as smp  # seconds: only for a name of one's own
            import timm

            known = [*timm.list_models(), *(smp.encoders.encoders if row.method in profiles.SEGMENTERS else ())]
            if row.arch.removeprefix("tu-").partition(".")[0] not in known:
                close = choices.difflib.get_close_matches(row.arch, [*choices.ARCHS, *known], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"model {row.id}: arch: {row.method} knows no {row.arch!r}{hint}")


def make_plan(name: str, wanted: list[str] | None = None, *, strict: bool = False) -> Plan:
    """Check a profile with everything it names, and find out what is left to do; nothing is started or written.

    Args:
        wanted: notebook numbers; empty or ``None`` means all notebooks and all rows.
        strict: a missing data set is an error.
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
        if folder := artifacts.find(train.spec_of(profile, row)):
            plan.done[row.id] = folder
        else:
            plan.missing.append(row)
    plan.missing.sort(key=lambda row: row.id != profile.first)
    check_archs(plan.missing)
    for dataset in {row.dataset: None for row in plan.missing}:
        source, raw = dataset.partition("@")[0], paths.get_raw_dir()
        if source in DOWNLOADED and not (raw / f"{source}.npz").is_file() and not any(raw.glob(f"{source}-*.npz")):
            plan.fetch.append(dataset)
    return plan


def drop_skipped(plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Leave the models of a missing data set out of a notebook's lists of models, where others are left in them."""
    skipped = {row.id for row in plan.profile.models if row.dataset in plan.skipped}
    lists = {key: value for key, value in given.items() if key.endswith("model_ids") and isinstance(value, list)}
    left = {key: [model_id for model_id in value if model_id not in skipped] for key, value in lists.items()}
    return given | {key: value for key, value in left.items() if value}


def print_plan(plan: Plan) -> None:
    """Print models and notebooks with their seconds, gigabytes and minutes; of a profile for GPUs the hours of one."""
    profile, missing = plan.profile, {row.id for row in plan.missing}
    shown = [row for row in profile.models if row.id in missing or row.id in plan.done or row.dataset in plan.skipped]
    state = {row.id: "skipped" if row.dataset in plan.skipped else "done" for row in shown}
    state |= dict.fromkeys(missing, "to train")
    gpu = profile.gpu_tflops is not None
    if gpu:
        print("counts the operations of one step of each kind of model, on the CPU: about a minute", flush=True)
        cost = {row.id: estimates.estimate_gpu_seconds(row, profile) for row in shown}
    else:
        cost = {row.id: plan.get_row_seconds(row) for row in shown}
    number = (lambda seconds: f"{seconds / 3600:.1f}") if gpu else "{:,.0f}".format
    lines = [("model", "state", "GPU hours" if gpu else "seconds")]
    lines += [(row.id, state[row.id], number(cost[row.id])) for row in shown] + [("notebook", "", "")]
    lines += [(name, "to run", number(plan.get_notebook_seconds(name))) for name in plan.notebooks]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, word, text in lines:
        print(f"{name:<{widths[0]}}  {word:<{widths[1]}}  {text:>{widths[2]}}".rstrip())
    to_train, disk = count(len(missing), "model") + " to train", f"{plan.n_bytes / 1e9:.2f} GB"
    if gpu:
        rate, hours = profile.gpu_tflops, sum(cost[i] for i in missing) / 3600
        print(
            f"{to_train}, {disk}, {hours:.1f} GPU hours; an estimate: {rate:g} TFLOP/s in bfloat16 and "
            f"{rate * estimates.FLOAT32_SHARE:g} in float32 (profiles/{profile.name}.yaml: gpu_tflops), and "
            f"{1000 * estimates.STEP_SECONDS:g} ms a step"
        )
    else:
        print(
            f"{to_train}, {disk}, about {format_minutes(plan.minutes)} with {profile.workers} jobs side by side "
            "(seconds are those of one CPU thread)"
        )


def format_minutes(minutes: float) -> str:
    """Round minutes as one would say them."""
    return f"{minutes / 60:,.0f} hours" if minutes >= 90 else count(max(1, round(minutes)), "minute")


def count(n: int, noun: str) -> str:
    """Return "1 model", "2 models"."""
    return f"{n} {noun}{'s' if n != 1 else ''}"
