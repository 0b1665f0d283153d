"""One call for every model: open it, read two sets of images, pass the gates, try the attacks, report."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mia_utils import attacks, datasets
from mia_utils.audit import battery, gates
from mia_utils.audit.record import SHOWN, Report, describe_run
from mia_utils.datasets import folders, pairs
from mia_utils.models import encoders, segmenters
from mia_utils.models.checkpoints import READ, read_safetensors
from mia_utils.models.speed import use_fast_products
from mia_utils.protocol import metrics
from mia_utils.protocol.result import Result
from mia_utils.runner import train

FEWEST = 10  # independent images a side
Source = datasets.Pool | np.ndarray | str | Path


@dataclass
class Subject:
    """The model under audit: with its decoder, an untrained decoder, facts, and the augmentation of its training."""

    model: Any
    decoder: Any = None
    fresh_decoder: Any = None
    facts: dict[str, tuple[str, str]] = field(default_factory=dict)
    augmentation: str | None = None

    @property
    def task(self) -> str:
        """``"segmenter"`` where it gives posteriors, else ``"encoder"``."""
        return "segmenter" if "posteriors" in getattr(self.model, "offers", ()) else "encoder"

    def make_untrained(self, attempt: battery.Attempt) -> Any:
        """Make what the attempt queries, with fresh weights; None where that is not known how."""
        if attempt.model is not self.model:
            return self.fresh_decoder
        if self.task == "encoder":
            return encoders.make_untrained(self.model) if isinstance(self.model, encoders.Encoder) else None
        m = self.model
        if getattr(m, "method", None) not in segmenters.ARCHS:
            return None
        return segmenters.make(m.method, m.n_classes, encoder=m.arch, **m.options).to(m.device)


def open_subject(model: Any, *, task: str = "auto", device: str | None = None, **options: Any) -> Subject:
    """Open a model by what names it: a file or folder as ``encoders.open`` takes it, ``timm:NAME``, a segmenter's file,
    ``FILE.py:function`` (its code is run, and it returns what ``wrap`` makes), or a model itself."""
    if not isinstance(model, (str, Path)):
        return Subject(model, facts=dict(getattr(model, "facts", {})))
    use_fast_products()  # before the model is built
    options, path = {k: v for k, v in options.items() if v is not None}, Path(str(model))
    if match := re.fullmatch(r"(.+\.py):(\w+)", str(model)):
        subject = Subject(_call(Path(match[1]), match[2]))
        subject.facts = dict(getattr(subject.model, "facts", {}))
    elif task == "segmenter" or (task == "auto" and _holds_segmenter(path)):
        if options:
            raise ValueError(f"a saved segmenter tells all of itself: leave out {', '.join(sorted(options))}")
        found = segmenters.load(path)
        what = {"architecture": f"{found.method} on {found.arch}", "classes": str(found.n_classes)}
        subject = Subject(found, facts={key: (value, READ) for key, value in what.items()})
    else:
        encoder = encoders.open(model, **options)
        subject = Subject(encoder, facts=dict(encoder.facts))
        if (path / "meta.json").is_file() and not options:  # an artifact of ours: its decoder and its augmentation too
            run = train.load_run(path)
            subject.decoder, subject.augmentation = run.decoder, run.settings.get("augmentation")
            subject.fresh_decoder = run.autoencoder_at(0) if 0 in run.checkpoints else None
            subject.facts["augmentation"] = (str(subject.augmentation), READ)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for part in (subject.model, subject.decoder, subject.fresh_decoder):
        if part is not None and device != "cpu":
            part.to(device)
    return subject


def _holds_segmenter(path: Path) -> bool:
    path = path / "segmenter.safetensors" if path.is_dir() else path
    return path.suffix == ".safetensors" and path.is_file() and "n_classes" in read_safetensors(path)[1]


def _call(path: Path, name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no Python file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, name, None)
    model = made() if callable(made) else None
    if not {"embed", "posteriors"} & set(getattr(model, "offers", ())):
        raise ValueError(f"{path.name}:{name} gave {type(model).__name__}: return what wrap() makes")
    return model


# ------------------------------------------------------------------------------------------------------ images


def _read(source: Source, size: tuple[int, int] | None, name: str, groups: str | None, task: str):
    """One set as a Pool, and its files where it is a folder."""
    files = None
    if isinstance(source, (str, Path)):
        folder = Path(str(source).removeprefix("folder:")).expanduser()
        pool = datasets.load(f"folder:{folder}", size=size)
        pool = replace(pool, name=pool.name.removeprefix("folder:"))
        at = folder / "images" if pairs.is_pairs(folder) else folder
        files = [at / image_id for image_id in pool.image_ids.tolist()]
    elif isinstance(source, datasets.Pool):
        pool = source
    else:
        images = np.asarray(source)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            got = f"{images.shape} {images.dtype}"
            raise ValueError(f"{name}: expected a folder, a Pool or (N, H, W, 3) uint8, got {got}")
        ids = np.array([f"{i:06d}" for i in range(len(images))], dtype=np.str_)
        pool = datasets.Pool(f"{name} images", images, np.zeros(len(images), int), ids, None, ("all",))
    if task == "segmenter" and pool.masks is None:
        raise ValueError(f"{name}: {pool.name!r} has no label maps: expected a folder with images and masks in it")
    if task == "encoder":
        images, labels = pool.images, np.zeros(len(pool), int)
        if size is not None and images.shape[1:3] != size:
            images = np.stack([np.asarray(folders.cover(Image.fromarray(image), size)) for image in images])
        pool = datasets.Pool(pool.name, images, labels, pool.image_ids, None, ("all",), groups=pool.groups)
    if groups:
        pool = replace(pool, groups=_read_groups(pool.image_ids, groups))
    return pool, files


def _read_groups(image_ids: np.ndarray, rule: str) -> np.ndarray:
    """Groups (N,) str by ``"subfolder"`` or ``"prefix:REGEX"``: what the names have in common."""
    kind, _, pattern = rule.partition(":")
    if kind == "subfolder" and not pattern:
        return np.array([name.rpartition("/")[0] or name for name in image_ids.tolist()])
    try:
        found = [re.match(pattern, name.rpartition("/")[2]) for name in image_ids.tolist()]
    except re.error as error:
        raise ValueError(f"groups: {pattern!r} is no regular expression ({error})") from None
    if kind != "prefix" or not pattern or None in found:
        raise ValueError(f"expected groups subfolder or prefix:REGEX that every name begins with, got {rule!r}")
    return np.array([match[0] for match in found])


@dataclass
class Plan:
    """What an audit will do: model, images, attempts and the seconds they take (NaN: not measured)."""

    subject: Subject
    pool: datasets.Pool
    is_member: np.ndarray
    names: tuple[str, str]
    files: list
    attempts: list[battery.Attempt]
    seconds: list[float]
    not_tried: list[str]
    notes: list[str]
    across: list
    n_dropped: int

    @property
    def units(self) -> np.ndarray:
        """What is independent: the group, else the image."""
        return self.pool.image_ids if self.pool.groups is None else self.pool.groups

    def __str__(self) -> str:
        m, facts = int(self.is_member.sum()), self.subject.facts
        lines = [f"{fact}: {value} ({source})" for fact, (value, source) in facts.items()]
        lines.append(f"images: {m} suspected ({self.names[0]}), {len(self.is_member) - m} reference ({self.names[1]})")
        pairs_ = zip(self.attempts, self.seconds, strict=True)
        lines += [f"would try {attempt.label}: about {seconds / 60:.1f} min" for attempt, seconds in pairs_]
        total = f"in all about {sum(self.seconds) / 60:.1f} min"
        return "\n".join([*lines, *(f"not tried: {line}" for line in self.not_tried), *self.notes, total])


def plan(
    model: Any, suspected: Source, reference: Source, *, attack: Sequence[str] | str = (),
    augmentation: Sequence[str] = (), settings: Mapping[str, Any] | None = None, groups: str | None = None,
    size: int | tuple[int, int] | None = None, budget: float | None = None, measure: bool = False, task: str = "auto",
    device: str | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """Open everything and choose what is tried; arguments as in :func:`run`, ``measure``: time it on 8 images."""
    names = [attack] if isinstance(attack, str) else list(attack)
    for name in names:
        attacks.registry.get_attack(name)
    subject = open_subject(model, task=task, device=device, **options)
    shape = (size, size) if isinstance(size, int) else size
    shape = shape or (subject.model.shape if subject.task == "encoder" and hasattr(subject.model, "shape") else None)
    sets = ("suspected", suspected), ("reference", reference)
    (mine, files), (other, other_files) = (_read(s, shape, name, groups, subject.task) for name, s in sets)
    pool, is_member = datasets.join_pools(mine, other)
    renamed = {"image_ids": pool.image_ids, "groups": pool.groups}
    for key, value in renamed.items():
        if value is not None:
            side = np.where(is_member, "suspected/", "reference/")  # the streams of an audit have these names
            renamed[key] = np.strings.add(side, np.array([x.partition("/")[2] for x in value.tolist()]))
    pool = replace(pool, **renamed)
    across, within = gates.find_copies(pool.images, is_member)
    notes, drop = [], set() if pool.groups is not None else {j for _, j in within}
    if len(drop) > gates.RARE_SHARE * len(pool):
        line = f"{len(drop)} images are near-duplicates within their folder and count once"
        notes.append(f"{line}: of video or bursts give groups (--groups subfolder or prefix:REGEX)")
    keep = np.array([i for i in range(len(pool)) if i not in drop])
    where = np.cumsum(np.isin(np.arange(len(pool)), keep)) - 1
    across = [(int(where[i]), int(where[j])) for i, j in across if i not in drop and j not in drop]
    pool, is_member = pool.take(keep), is_member[keep]
    units = pool.image_ids if pool.groups is None else pool.groups
    counts = [len(np.unique(units[is_member == side])) for side in (True, False)]
    what = "images" if pool.groups is None else "groups"
    for (name, _), n in zip(sets, counts, strict=True):
        if n < FEWEST:
            raise ValueError(f"expected at least {FEWEST} different {name} {what}, got {n}: add some")
    ways = battery.order_augmentations(subject.augmentation, augmentation)
    chosen = dict(names=names, augmentations=ways, settings=settings, n_units=min(counts))
    if names and not augmentation:
        chosen["augmentations"] = ()  # a named attack as it is, with its own default
    attempts, skipped = battery.choose(subject.model, subject.decoder, pool, **chosen)
    seconds = [float("nan")] * len(attempts)
    if measure or budget:
        seconds = [battery.measure_seconds(attempt, pool) for attempt in attempts]
    while budget and sum(seconds) > budget and len(attempts) > 1:
        worst = int(np.argmax(seconds))
        skipped.append(f"{attempts.pop(worst).label}: about {seconds.pop(worst) / 60:.1f} min do not fit the budget")
    both = [files, other_files] if files and other_files else []
    told = (mine.name, other.name), both, attempts, seconds, skipped, notes, across, len(drop)
    return Plan(subject, pool, is_member, *told)


def run(
    model: Any, suspected: Source, reference: Source, *, untrained: Any = "auto", level: float = 0.01, seed: int = 0,
    command: str = "", **options: Any,
) -> Report:  # fmt: skip
    """Audit any model: do suspected images score higher than reference images, and would they without it?

    Args:
        model: an Encoder, a Segmenter (``wrap`` makes one of any callable), or what :func:`open_subject` opens.
        suspected: images whose use is in question: a folder, a Pool, or (N, H, W, 3) uint8; for segmenters a folder
            with ``images`` and ``masks`` in it, or a Pool with masks.
        reference: images that were surely not used and are otherwise alike.
        untrained: the architecture with fresh weights; ``"auto"``: made where it is known how. It is queried only
            where an attack finds something, since it can only take a finding back.
        level, seed: p-values up to this count; seed of queries, folds and permutations.
        command: what to print as the way to repeat it.
        options: of the battery: ``attack`` (names; empty: all that fit), ``augmentation`` (names, for EncoderMI),
            ``settings`` (parameters of attacks), ``groups`` (``"subfolder"`` or ``"prefix:REGEX"``), ``size`` (side or
            (height, width); None: the model's), ``budget`` (seconds), ``device``; of ``encoders.open``: ``arch,
            arch_args, weights, mean, std, pooling, method``.

    Returns:
        Report. Bad input is one line (ValueError, FileNotFoundError): no such folder, fewer than 10 images, an attack
        that the model can't serve.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    p = plan(model, suspected, reference, **options)
    return conclude(p, untrained=untrained, level=level, seed=seed, command=command)


def conclude(p: Plan, *, untrained: Any = "auto", level: float = 0.01, seed: int = 0, command: str = "") -> Report:
    """Pass the gates and try the attacks of a plan."""
    start, pool, is_member = time.perf_counter(), p.pool, p.is_member
    found = [gates.compare_files(*p.files, level=level)] if p.files else []
    found.append(gates.compare_copies(p.across, pool.image_ids))
    sides = (pool.images, pool.image_ids, is_member, p.units)
    pixels, no_model, control = gates.compare_pixels(*sides, level=level, seed=seed)
    name = str(getattr(p.subject.model, "name", type(p.subject.model).__name__))
    report = Report(name, *p.names, p.subject.task, is_member, pool.image_ids, [*found, pixels], level, control=control)
    report.no_model, report.facts, report.not_tried, report.notes = no_model, p.subject.facts, p.not_tried, p.notes
    report.n_dropped = p.n_dropped
    if not report.void:
        _attack(report, p, untrained, seed)
    hashes = {"weights": attacks.fingerprint(p.subject.model) or "none", "images": pool.hash}
    report.meta = describe_run(command or "audit.run(...)", seed, hashes, time.perf_counter() - start)
    return report


def _attack(report: Report, p: Plan, untrained: Any, seed: int) -> None:
    """Try everything, and the best once more on an untrained model."""
    is_member, fold = p.is_member, battery.assign_folds(p.is_member, p.units, seed)

    def measure(attempt: battery.Attempt) -> np.ndarray:
        x = attempt.query(p.pool, seed)
        return battery.make_smoother(x, fold) if attempt.fitted else x

    entries = {attempt.label: measure(attempt) for attempt in p.attempts}
    report.found = battery.search(entries, is_member, p.units, fold, seed=seed, level=report.level)
    for attempt, x in zip(p.attempts, entries.values(), strict=True):
        score, own = (battery.score_fitted(x, is_member), fold) if x.ndim == 2 else (x, np.zeros(len(fold), int))
        meta = {"params": dict(attempt.params), "seed": seed, "fitted": attempt.fitted}
        kept = dict(image_ids=p.pool.image_ids, fold=own, groups=p.pool.groups, meta=meta)
        report.results[attempt.label] = Result(attempt.attack, "", score, is_member, **kept)
    order = np.argsort(report.result.score)
    report.thumbnails = {int(i): np.asarray(p.pool.images[i]) for i in [*order[-SHOWN:], *order[:SHOWN]]}
    if report.p_value > report.level:
        return
    if report.control.low > 0.5 or report.control.high < 0.5:
        if len(np.unique(report.result.fold)) == len(np.unique(report.no_model.fold)):
            clear = metrics.clear_of(report.result, report.no_model).low > 0
            report.control = report.control._replace(clear=clear)
    best = next(attempt for attempt in p.attempts if attempt.label == report.best)
    twin = p.subject.make_untrained(best) if isinstance(untrained, str) else untrained
    if twin is None:
        report.notes.append("the control with an untrained model was not run: no untrained model was given")
        return
    entry = {best.label: measure(replace(best, model=twin))}
    control = battery.search(entry, is_member, p.units, fold, seed=seed, level=report.level)
    report.untrained = (best.label, float(control.auc[0]), control.p)


def compare(
    encoder: Any, suspected: Source, reference: Source, *, attack: str = "encodermi-t", untrained: Any = "auto",
    size: int | tuple[int, int] | None = None, level: float = 0.01, seed: int = 0, **params: Any,
) -> Report:  # fmt: skip
    """Audit an encoder with one attack; arguments as in :func:`run`, ``params`` are the attack's."""
    options = dict(untrained=untrained, size=size, level=level, seed=seed, settings=params)
    return run(encoder, suspected, reference, attack=attack, **options)


def compare_segmenter(
    segmenter: Any, suspected: Source, reference: Source, *, attack: str = "seg-global-loss", **options: Any
) -> Report:
    """Audit a segmenter with one attack; arguments as in :func:`compare`."""
    return compare(segmenter, suspected, reference, attack=attack, **options)
