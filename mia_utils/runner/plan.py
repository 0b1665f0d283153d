"""What one run has to do: rows to train, notebooks to execute, in which order, and what it will cost.

Nothing here imports torch, except the estimate for a GPU: mistakes and ``--plan`` come at once.
"""

import contextlib
import functools
import heapq
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mia_utils import paths
from mia_utils.runner import artifacts, choices, estimates, jobs, parameters, profiles, train
from mia_utils.runner.profiles import Profile, Row

GENERATED = ("scenes", "scenes-night", "scenes-sketch")
DOWNLOADED = ("cifar10", "cifar100", "stl10", "camvid", "oxford_pets")
PLACED = ("bdd100k", "cityscapes", "mapillary", "tiny_imagenet")  # by the user
UNMASKED = ("cifar10", "cifar100", "stl10", "tiny_imagenet")
SUFFIXES = ("cityscapes", "camvid", "scenes", "frames", "official", "part")  # of NAME@SUFFIX
FOLDERS = {"tiny_imagenet": "tiny-imagenet-200"}  # what the unpacked archive is called, where not as the data set


@dataclass
class Plan:
    """What one run has to do."""

    profile: Profile
    notebooks: dict[str, tuple[Path, dict[str, Any]]]  # name -> (file, parameters), in order
    done: dict[str, Path] = field(default_factory=dict)  # rows whose artifact exists, id -> folder
    missing: list[Row] = field(default_factory=list)  # rows to train, the first one first
    skipped: dict[str, str] = field(default_factory=dict)  # data set -> why its rows are skipped
    fetch: list[str] = field(default_factory=list)  # data sets to download before their rows

    @property
    def build(self) -> Path:
        return paths.get_build_dir(self.profile.name)

    @functools.cached_property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """Job -> kind, what it waits for and does, its priority, and the seconds it is expected to take."""
        profile, found = self.profile, {}
        for i, name in enumerate(self.fetch):
            module = ["mia_utils.runner.run", "data", profile.name, name]
            found[f"data-{i}"] = {"kind": "data", "module": module, "needs": [], "priority": 1000, "seconds": 60.0}
        data_jobs = dict(zip(self.fetch, found, strict=True))
        for i, row in enumerate(self.missing):
            entry = {"kind": "train", "module": ["mia_utils.runner.train", profile.name, row.id]}
            entry["needs"] = [data_jobs[row.dataset]] if row.dataset in data_jobs else []
            entry["priority"] = 900 if row.id == profile.first else max(500 - i, 401)
            found[f"train-{row.id}"] = entry | {"seconds": estimates.estimate_seconds(row, profile)}
        for i, (name, (source, given)) in enumerate(self.notebooks.items()):
            needs = {f"train-{row.id}" for row in profile.rows_needed(name)} & found.keys()
            if name.startswith("08"):  # gathers what all the others saved
                needs |= self.notebooks.keys() - {name}
            seconds = self.get_notebook_seconds(name)
            # the longest first: the last ones fill the workers evenly
            entry = {"kind": "notebook", "source": str(source), "parameters": given, "needs": sorted(needs)}
            found[name] = entry | {"priority": 800 if i == 0 else min(int(seconds), 400), "seconds": seconds}
        return found

    def get_notebook_seconds(self, name: str) -> float:
        """Seconds of a notebook: as the profile says, few where its last run has kept every score."""
        last = jobs.read_json(self.build / "status" / f"{name}.json") or {}
        missing = {row.id for row in self.missing} & {row.id for row in self.profile.rows_needed(name)}
        if last.get("ok") and not missing:
            return estimates.CACHED_SECONDS
        return self.profile.notebook_seconds.get(name, estimates.NOTEBOOK_SECONDS)

    @property
    def minutes(self) -> float:
        """Wall-clock minutes of what is left to do on this machine, all workers busy (half a second is measured)."""
        workers = min(self.profile.workers, os.cpu_count() or 1)
        return estimates.measure_pace() * (estimates.START_SECONDS + find_end(self.jobs, workers)) / 60

    @property
    def n_bytes(self) -> float:
        """Disk that the models to train will take."""
        weights = sum(estimates.ARCH_COST.get(row.arch, (20.0, 20.0))[1] for row in self.missing)
        return weights * 1e6 * 4 * estimates.CHECKPOINTS  # in float32


def find_end(graph: dict[str, dict[str, Any]], workers: int) -> float:
    """Return when the last job ends if ``workers`` take, whenever one is free, the ready job of highest priority."""
    waiting, running, ended, now = sorted(graph, key=lambda job: -graph[job]["priority"]), [], set(), 0.0
    while waiting or running:
        for job in [job for job in waiting if ended.issuperset(graph[job]["needs"])][: workers - len(running)]:
            heapq.heappush(running, (now + graph[job]["seconds"], job))
            waiting.remove(job)
        now, job = heapq.heappop(running)
        ended.add(job)
    return now


def select_notebooks(profile: Profile, wanted: list[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the notebooks to execute (all, or those of the numbers or names in ``wanted``) with their parameters.

    The overrides of the profile are checked for every notebook.
    """
    found = parameters.find_notebooks()
    for section in ("notebooks", "needs", "notebook_seconds"):
        if found and (unknown := getattr(profile, section).keys() - found):
            where = f"profiles/{profile.name}.yaml: {section}"
            raise ValueError(f"{where}: unknown notebook {min(unknown)!r}: expected one of {', '.join(found)}")
    merged = {
        name: (path, parameters.merge_parameters(profile, name, parameters.read_parameters(path)))
        for name, path in found.items()
    }
    wanted = [text.zfill(2) if text.isascii() and text.isdigit() else text for text in wanted]
    if unknown := [text for text in wanted if text not in {*found, *(name[:2] for name in found)}]:
        known = ", ".join(name[:2] for name in found) or "(none exist)"
        raise ValueError(f"unknown notebook {unknown[0]!r}: expected one of {known}")
    return {name: entry for name, entry in merged.items() if not wanted or {name, name[:2]} & {*wanted}}


def find_missing_datasets(profile: Profile) -> dict[str, str]:
    """Return the data sets that can't be had, name -> what was looked for; an unknown name is a ValueError.

    A misspelt one must not skip its rows in silence.
    """
    missing, known = {}, (*GENERATED, *DOWNLOADED, *PLACED)
    for name in profile.datasets:
        source, _, suffix = name.partition("@")
        folder = paths.get_raw_dir() / FOLDERS.get(source, source)
        if name.startswith("folder:"):
            wrong = None if name[7:].strip() else "expected folder:PATH, got 'folder:'"
            if not Path(name[7:]).expanduser().is_dir():
                missing[name] = f"no folder {name[7:]}"
        elif not source or (source not in known and not (folder.is_dir() or has_cache(source))):
            wrong = f"unknown {name!r}{choices.suggest(name, known)}"
        else:
            fits = suffix in SUFFIXES or "@" not in name
            wrong = None if fits else f"unknown {suffix!r}{choices.suggest(suffix, SUFFIXES)}"
            if source in PLACED and not (folder.is_dir() or has_cache(source)):
                missing[name] = f"no folder {folder} and no cache {source}.npz beside it"
        if wrong:
            others = f"others are folder:PATH, or a file NAME.npz in {folder.parent}"
            raise ValueError(f"profiles/{profile.name}.yaml: datasets: {wrong}; {others}")
    return missing


def has_cache(source: str) -> bool:
    """Whether a data set lies in ``data/raw`` as ``<source>.npz`` or ``<source>-<size>.npz``."""
    raw = paths.get_raw_dir()
    return (raw / f"{source}.npz").is_file() or any(raw.glob(f"{source}-*.npz"))


def find_arrays(dataset: str) -> set[str]:
    """Return which of masks and official_split a data set may have, as far as that is known before it is read."""
    source, both = dataset.partition("@")[0], {"masks", "official_split"}
    if source in (*GENERATED, *DOWNLOADED, *PLACED):
        return both - ({"official_split"} if source in GENERATED else {"masks"} if source in UNMASKED else set())
    if source.startswith("folder:"):
        folder = Path(dataset[7:]).expanduser()
        pairs = (folder / "images").is_dir() and (folder / "masks").is_dir()
        parts = {path.name for path in (folder / "images" if pairs else folder).iterdir()} & {"train", "val", "test"}
        return both - (set() if pairs else {"masks"}) - (set() if parts else {"official_split"})
    for path in (paths.get_raw_dir() / f"{source}.npz", *paths.get_raw_dir().glob(f"{source}-*.npz")):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return both & {name.removesuffix(".npy") for name in archive.namelist()}
    return both


def check_rows(profile: Profile, rows: list[Row]) -> None:
    """Refuse rows that would fail in their training: usual ones are known to work, others are tried with torch."""
    tried = set()
    for row in rows:
        has, suffix = find_arrays(row.dataset), row.dataset.partition("@")[2]
        official = "official" in (suffix, profile.get_split(row.dataset).get("rule"))
        if official and "official_split" not in has:
            raise ValueError(f"model {row.id}: rule 'official': data set {row.dataset} has no official split: use iid")
        divided = suffix in ("", "frames", "official", "part")
        if "masks" not in has and (row.method in choices.SEGMENTERS or not divided):
            raise ValueError(f"model {row.id}: {suffix or row.method} needs label maps, {row.dataset} has none")
        size = profile.datasets[row.dataset].get("size")
        recipe = str((row.method, row.arch, row.augmentation, row.options, size, row.n_train, row.epochs))
        if choices.is_plain(row) or recipe in tried:
            continue
        tried.add(recipe)
        if row.arch not in choices.ARCHS:
            import segmentation_models_pytorch as smp  # seconds: only for a name of one's own
            import timm

            known = [*timm.list_models(), *(smp.encoders.encoders if row.method in choices.SEGMENTERS else ())]
            if row.arch.removeprefix("tu-").partition(".")[0] not in known:
                close = choices.find_close(row.arch, [*choices.ARCHS, *known])
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"model {row.id}: arch: {row.method} knows no {row.arch!r}{hint}")
        train.rehearse(profile, row)


def make_plan(name: str, wanted: list[str] | None = None, *, strict: bool = False) -> Plan:
    """Check a profile with everything it names, and find out what is left to do; nothing is started or written.

    ``wanted`` are notebook numbers (none: all notebooks and rows); with ``strict`` a missing data set is an error.
    """
    profile = profiles.load(name)
    plan = Plan(profile, select_notebooks(profile, wanted or []), skipped=find_missing_datasets(profile))
    for dataset, reason in plan.skipped.items() if strict else ():
        raise ValueError(f"data set {dataset}: {reason}")
    plan.notebooks = {name: (path, drop_skipped(plan, given)) for name, (path, given) in plan.notebooks.items()}
    needed = {row.id for notebook in plan.notebooks for row in profile.rows_needed(notebook)}
    for row in sorted(profile.models, key=lambda row: row.id != profile.first):
        if row.dataset in plan.skipped or (wanted and row.id not in needed):
            continue
        if folder := artifacts.find(train.spec_of(profile, row)):
            plan.done[row.id] = folder
        else:
            plan.missing.append(row)
    check_rows(profile, plan.missing)
    sources = {row.dataset: row.dataset.partition("@")[0] for row in plan.missing}
    plan.fetch = [name for name, source in sources.items() if source in DOWNLOADED and not has_cache(source)]
    return plan


def drop_skipped(plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Leave the models of a missing data set out of a notebook's lists of models, where others are left in them."""
    skipped = {row.id for row in plan.profile.models if row.dataset in plan.skipped}
    lists = {key: value for key, value in given.items() if key.endswith("model_ids") and isinstance(value, list)}
    left = {key: [model_id for model_id in value if model_id not in skipped] for key, value in lists.items()}
    return given | {key: value for key, value in left.items() if value}


def print_plan(plan: Plan) -> None:
    """Print models and notebooks with their seconds, gigabytes and minutes; of a profile for GPUs the hours of one."""
    profile, gpu, missing = plan.profile, plan.profile.gpu_tflops, {row.id for row in plan.missing}
    if gpu:
        print("counts the operations of one step of each kind of model, on the CPU: about a minute", flush=True)
    estimate = estimates.estimate_gpu_seconds if gpu else estimates.estimate_seconds
    pace, unit, form = (1.0, 3600, ".1f") if gpu else (estimates.measure_pace(), 1, ",.0f")
    lines, total = [("model", "state", "GPU hours" if gpu else "seconds")], 0.0
    for row in [row for row in profile.models if row.id in missing | plan.done.keys() or row.dataset in plan.skipped]:
        seconds = pace * estimate(row, profile)
        if row.id in plan.done and not gpu:
            seconds = artifacts.read_meta(plan.done[row.id])["provenance"].get("seconds", seconds)
        state = "to train" if row.id in missing else "done" if row.id in plan.done else "skipped"
        lines.append((row.id, state, f"{seconds / unit:{form}}"))
        total += seconds * (row.id in missing)
    lines.append(("notebook", "", ""))
    lines += [(name, "to run", f"{pace * plan.get_notebook_seconds(name) / unit:{form}}") for name in plan.notebooks]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, word, text in lines:
        print(f"{name:<{widths[0]}}  {word:<{widths[1]}}  {text:>{widths[2]}}".rstrip())
    cost = f"about {format_minutes(plan.minutes)} with {profile.workers} jobs side by side"
    how = f"(seconds are those of one thread here, {pace:.2f} times the reference machine's)"
    if gpu:
        cost = f"{total / 3600:.1f} GPU hours; an estimate: {gpu:g} TFLOP/s in bfloat16 and"
        how = (
            f"{gpu * estimates.FLOAT32_SHARE:g} in float32 (profiles/{profile.name}.yaml: gpu_tflops), and "
            f"{1000 * estimates.STEP_SECONDS:g} ms a step"
        )
    print(f"{count(len(missing), 'model')} to train, {plan.n_bytes / 1e9:.2f} GB, {cost} {how}")


def format_minutes(minutes: float) -> str:
    """Round minutes as one would say them."""
    return f"{minutes / 60:,.0f} hours" if minutes >= 90 else count(max(1, round(minutes)), "minute")


def count(n: int, noun: str) -> str:
    """Return "1 model", "2 models"."""
    return f"{n} {noun}{'s' if n != 1 else ''}"
