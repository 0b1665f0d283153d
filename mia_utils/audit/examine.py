"""One call for every model: open it, read two sets of images, pass the gates, try the attacks, report."""

import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mia_utils import datasets
from mia_utils.attacks import fingerprint
from mia_utils.attacks.registry import get_attack
from mia_utils.audit import battery, gates
from mia_utils.audit.record import SHOWN, Report
from mia_utils.datasets import VOID, folders, pairs
from mia_utils.models import encoders, segmenters
from mia_utils.models.backbones import use_fast_products
from mia_utils.models.checkpoints import READ, Facts, read_safetensors
from mia_utils.protocol import metrics
from mia_utils.protocol.intervals import leaves_half
from mia_utils.protocol.result import Result
from mia_utils.runner import artifacts

FEWEST = 10  # independent images a side
LEAST_GAIN = 0.1  # mIoU of a segmenter above that of one class everywhere; with less it hardly works on these images
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

    def make_untrained(self, queried: Any) -> Any:
        """Make what an attack queries, with fresh weights; None where that is not known how."""
        m = self.model
        if queried is not m:
            return self.fresh_decoder
        if isinstance(m, encoders.Encoder):
            return encoders.make_untrained(m)
        known = getattr(m, "method", None) in segmenters.ARCHS
        return segmenters.make(m.method, m.n_classes, encoder=m.arch, **m.options).to(m.device) if known else None


def open_subject(model: Any, *, task: str = "auto", device: str | None = None, **options: Any) -> Subject:
    """Open what ``encoders.open`` takes, a segmenter's file, or ``FILE.py:function``, which is run and returns what
    ``wrap`` makes; a model itself is taken as it is."""
    if not isinstance(model, (str, Path)):
        return Subject(model, facts=dict(getattr(model, "facts", {})))
    use_fast_products()  # before the model is built
    options, path = {k: v for k, v in options.items() if v is not None}, Path(str(model))
    if match := re.fullmatch(r"(.+\.py):(\w+)", str(model)):
        made = _call(Path(match[1]), match[2])
        subject = Subject(made, facts=dict(getattr(made, "facts", {})))
    elif task == "segmenter" or (task == "auto" and _holds_segmenter(path)):
        if options:
            raise ValueError(f"a saved segmenter tells all of itself: leave out {', '.join(sorted(options))}")
        found = segmenters.load(path)
        facts = {"architecture": (f"{found.method} on {found.arch}", READ), "classes": (str(found.n_classes), READ)}
        subject = Subject(found, facts=facts)
    else:
        encoder = encoders.open(model, **options)
        subject = Subject(encoder, facts=dict(encoder.facts))
        if (path / "meta.json").is_file() and not options:  # an artifact of ours: its decoder and its augmentation too
            from mia_utils.runner import train  # only the book makes artifacts; its packages take seconds

            run = train.load_run(path)
            subject.decoder, subject.augmentation = run.decoder, run.settings.get("augmentation")
            subject.fresh_decoder = run.autoencoder_at(0) if 0 in run.checkpoints else None
            subject.facts["augmentation"] = (str(subject.augmentation), READ)
        elif getattr(encoder, "decoder", None) is not None:
            _open_decoder(subject)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} can't be used here ({str(error).splitlines()[0]})") from None
    for part in (subject.model, subject.decoder, subject.fresh_decoder):
        if part is not None and device != "cpu":
            part.to(device)
    if (module := getattr(subject.model, "module", None)) is not None:
        module.to(memory_format=torch.channels_last)  # convolutions take two thirds of the time
    return subject


def _open_decoder(subject: Subject) -> None:
    """Open the decoder that an MAE checkpoint kept, and one with fresh weights."""
    try:
        from mia_utils.pretrain import mae  # its modules are the book's: an audit runs without them
    except ModuleNotFoundError as error:
        subject.facts["decoder"] = (f"not opened: the MIM attack needs {error.name}, of the extra book", READ)
        return
    subject.decoder = mae.open_decoder(subject.model)
    subject.fresh_decoder = mae.open_decoder(subject.model, untrained_seed=0)


def _holds_segmenter(path: Path) -> bool:
    path = path / "segmenter.safetensors" if path.is_dir() else path
    return path.suffix == ".safetensors" and path.is_file() and "n_classes" in read_safetensors(path)[1]


def _name(model: Any) -> str:
    return str(getattr(model, "name", type(model).__name__))


def _call(path: Path, name: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no Python file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, name, None)
        model = made() if callable(made) else None
    except (Exception, SystemExit) as error:  # theirs
        raise ValueError(f"{path.name}:{name} failed: {type(error).__name__}: {error}") from error
    if not {"embed", "posteriors"} & set(getattr(model, "offers", ())):
        raise ValueError(f"{path.name}:{name} gave {type(model).__name__}: return what wrap() makes")
    return model


def _read(source: Source, name: str, size: tuple[int, int] | None, groups: str | None, task: str, void: int | None):
    """One set as a Pool, and its files where it is a folder."""
    files = []
    if isinstance(source, (str, Path)):
        folder = Path(str(source).removeprefix("folder:")).expanduser()
        pool = datasets.load(f"folder:{folder}", size=size, **({} if void is None else {"void": void}))
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
    return (replace(pool, groups=_read_groups(pool.image_ids, groups)) if groups else pool), files


def _read_groups(image_ids: np.ndarray, rule: str) -> np.ndarray:
    """Groups (N,) str by ``"subfolder"`` or ``"prefix:REGEX"``: what the names have in common."""
    kind, _, pattern = rule.partition(":")
    if rule == "subfolder":
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
    """What an audit will do: model, images, attempts and the seconds they take (empty: not measured)."""

    subject: Subject
    pool: datasets.Pool
    is_member: np.ndarray
    names: tuple[str, str]
    files: list
    copies: list[str]
    n_dropped: int
    attempts: list[battery.Attempt] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubt: str = ""

    @property
    def units(self) -> np.ndarray:
        """What is independent: the group, else the image."""
        return self.pool.image_ids if self.pool.groups is None else self.pool.groups

    @property
    def estimate(self) -> str:
        """How long the attempts take, as one line."""
        parts = [f"{a.label} {format_time(s)}" for a, s in zip(self.attempts, self.seconds, strict=True)]
        return f"in all about {format_time(sum(self.seconds))}: {'; '.join(parts)}"

    def __str__(self) -> str:
        m, facts = int(self.is_member.sum()), self.subject.facts
        lines = [f"{fact}: {value} ({source})" for fact, (value, source) in facts.items()]
        lines.append(f"images: {m} suspected ({self.names[0]}), {len(self.is_member) - m} reference ({self.names[1]})")
        lines += [f"not tried: {line}" for line in self.not_tried] + self.notes
        return "\n".join([*lines, f"would take {self.estimate}"] if self.seconds else lines)


def format_time(seconds: float) -> str:
    """``"40 s"`` or ``"4.1 min"``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def plan(
    model: Any, suspected: Source, reference: Source, *, attack: Sequence[str] | str = (),
    augmentation: Sequence[str] = (), settings: Mapping[str, Any] | None = None, groups: str | None = None,
    size: int | tuple[int, int] | None = None, void: int | None = None, budget: float | None = None,
    measure: bool = False, task: str = "auto", device: str | None = None, reference_models: Sequence[Any] = (),
    **options: Any,
) -> Plan:  # fmt: skip
    """Open everything and choose what is tried; arguments as in :func:`run`, ``measure``: time it on a few images."""
    names = [attack] if isinstance(attack, str) else list(attack)
    for name in names:
        get_attack(name)
    subject = open_subject(model, task=task, device=device, **options)
    references = [open_subject(one, task=subject.task, device=device, **options) for one in reference_models]
    for i, one in enumerate(references, 1):
        weights = fingerprint(one.model)
        if one.task != subject.task or (weights and weights == fingerprint(subject.model)):
            what = "the model itself" if one.task == subject.task else f"a {one.task}"
            raise ValueError(f"reference model {i}: expected another {subject.task} of the same recipe, got {what}")
        subject.facts[f"reference model {i}"] = (f"{_name(one.model)}, weights {weights or 'unknown'}", "given")
    shape = (size, size) if isinstance(size, int) else size
    shape = shape or (getattr(subject.model, "shape", None) if subject.task == "encoder" else None)
    sets = {"suspected": suspected, "reference": reference}
    (mine, files), (other, other_files) = (_read(s, n, shape, groups, subject.task, void) for n, s in sets.items())
    pool, is_member = datasets.join_pools(mine, other)
    across, within = gates.find_copies(pool.images, is_member)
    drop = set() if pool.groups is not None else {j for _, j in within}
    keep = np.array([i for i in range(len(pool)) if i not in drop])
    copies = [f"{pool.image_ids[i]} = {pool.image_ids[j]}" for i, j in across if not {i, j} & drop]
    p = Plan(subject, pool.take(keep), is_member[keep], (mine.name, other.name), [], copies, len(drop))
    p.files = [files, other_files] if files and other_files else []
    if p.files and pool.groups is not None:  # what the files of a group share counts once; nothing was dropped
        firsts = [np.unique(p.units[p.is_member == side], return_index=True)[1] for side in (True, False)]
        p.files = [[part[i] for i in first] for part, first in zip(p.files, firsts, strict=True)]
    if len(drop) > gates.RARE_SHARE * len(pool):
        line = f"{len(drop)} images are near-duplicates within their folder and count once"
        p.notes.append(f"{line}: of video or bursts give groups (--groups subfolder or prefix:REGEX)")
    counts = [len(np.unique(p.units[p.is_member == side])) for side in (True, False)]
    for name, n in zip(sets, counts, strict=True):
        if n < FEWEST:
            what = "images" if pool.groups is None else "groups"
            raise ValueError(f"expected at least {FEWEST} different {name} {what}, got {n}: add some")
    if subject.task == "segmenter":
        _check_segmenter(p)
    # a named attack is tried as it is, with its own default
    ways = battery.order_augmentations(subject.augmentation, augmentation) if augmentation or not names else []
    chosen = dict(names=names, augmentations=ways, settings=dict(settings or {}), n_units=min(counts))
    chosen["references"] = [(one.model, one.decoder) for one in references]
    p.attempts, p.not_tried = battery.choose(subject.model, subject.decoder, p.pool, **chosen)
    if measure or budget:
        p.seconds = [battery.measure_seconds(attempt, p.pool) for attempt in p.attempts]
    while budget and sum(p.seconds) > budget and len(p.attempts) > 1:
        worst = int(np.argmax(p.seconds))
        line = f"{p.attempts.pop(worst).label}: about {format_time(p.seconds.pop(worst))} do not fit the budget"
        p.not_tried.append(line)
    return p


def _check_segmenter(p: Plan, n: int = 64) -> None:
    """Compare mIoU on the given masks with that of one class everywhere: a model that is misread looks private."""
    m, n_classes = p.subject.model, p.subject.model.n_classes
    counts = np.zeros((n_classes, n_classes))
    for i in np.unique(np.linspace(0, len(p.pool) - 1, n).astype(int)):
        with battery.asking(_name(m)), torch.inference_mode():
            seen = m.posteriors(datasets.to_float(p.pool.images[i : i + 1])).argmax(1).cpu().numpy()
        truth = p.pool.masks[i : i + 1]
        known = (truth != VOID) & (truth < n_classes)
        pairs_seen = truth[known].astype(int) * n_classes + seen[known]  # uint8 would wrap
        counts += np.bincount(pairs_seen, minlength=n_classes**2).reshape(counts.shape)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    miou = float((counts.diagonal()[union > 0] / union[union > 0]).mean())
    constant = counts.sum(1).max() / max(counts.sum(), 1) / max((counts.sum(1) > 0).sum(), 1)
    p.subject.facts["mIoU on the given masks"] = (f"{miou:.2f}, one class everywhere {constant:.2f}", READ)
    if miou < constant + LEAST_GAIN:
        p.doubt = f"the segmenter hardly works on these images (mIoU {miou:.2f}): check normalization, size and classes"
        p.notes.append(f"LOW mIoU: {p.doubt}")


def run(
    model: Any, suspected: Source, reference: Source, *, untrained: Any = "auto", level: float = 0.01, seed: int = 0,
    command: str = "", **options: Any,
) -> Report:  # fmt: skip
    """Audit any model: do suspected images score higher than reference images, and would they without it?

    Args:
        model: an Encoder, a Segmenter (``wrap`` makes one of any callable), or what :func:`open_subject` opens.
        suspected, reference: images in question, and images that were surely not used and are otherwise alike: a
            folder, a Pool, or (N, H, W, 3) uint8; for segmenters with masks.
        untrained: the architecture with fresh weights, queried only where an attack finds something, since it can only
            take a finding back; ``"auto"``: made where it is known how.
        level, seed, options: as on the command line: ``attack, augmentation, settings, groups, size, void, budget,
            device, reference_models`` (a list), and those of ``encoders.open``. Bad input is one line (ValueError,
            FileNotFoundError).
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    p = plan(model, suspected, reference, **options)
    return conclude(p, untrained=untrained, level=level, seed=seed, command=command)


def conclude(
    p: Plan, *, untrained: Any = "auto", level: float = 0.01, seed: int = 0, command: str = "",
    say: Callable[[str], None] | None = None,
) -> Report:  # fmt: skip
    """Pass the gates and try the attacks of a plan; ``say`` is told how long it takes and what is being done."""
    start, pool, is_member = time.perf_counter(), p.pool, p.is_member
    found = [gates.compare_files(*p.files, level=level)] if p.files else []
    found.append(gates.compare_copies(p.copies))
    pixels, no_model, control = gates.compare_pixels(
        pool.images, pool.image_ids, is_member, p.units, level=level, seed=seed
    )
    report = Report(
        _name(p.subject.model), *p.names, p.subject.task, is_member,
        pool.image_ids, [*found, pixels], control, no_model, level, facts=Facts(p.subject.facts), not_tried=p.not_tried,
        notes=p.notes, doubt=p.doubt, n_dropped=p.n_dropped,
    )  # fmt: skip
    if not report.void:
        _attack(report, p, untrained, seed, say)
    hashes = {name: pool.take(is_member == side).hash for name, side in (("suspected", True), ("reference", False))}
    hashes = {"weights": fingerprint(p.subject.model) or "none"} | hashes
    report.meta = dict(command=command or "audit.run(...)", seed=seed, hashes=hashes)
    report.meta |= {"seconds": round(time.perf_counter() - start, 1)} | artifacts.get_provenance()
    return report


def _attack(report: Report, p: Plan, untrained: Any, seed: int, say: Callable[[str], None] | None) -> None:
    """Try everything, and the strongest once more on an untrained model."""
    is_member, fold = p.is_member, battery.assign_folds(p.is_member, p.units, seed)
    if say and not p.seconds:
        say("gates passed; measures the time on 4 images")
        p.seconds = [battery.measure_seconds(attempt, p.pool) for attempt in p.attempts]
    if say:
        say(p.estimate)

    def measure(attempt: battery.Attempt, name: str) -> np.ndarray:
        if say:
            say(name)
        x = attempt.query(p.pool, seed)
        return battery.make_smoother(x, fold) if get_attack(attempt.attack).fitted else x

    entries = {a.label: measure(a, f"attack {i} of {len(p.attempts)}: {a.label}") for i, a in enumerate(p.attempts, 1)}
    report.found = battery.search(entries, is_member, p.units, fold, seed=seed, level=report.level)
    for attempt, x in zip(p.attempts, entries.values(), strict=True):
        score, own = (battery.score_fitted(x, is_member), fold) if x.ndim == 2 else (x, np.zeros_like(fold))
        kept = dict(image_ids=p.pool.image_ids, fold=own, groups=p.pool.groups, meta={"params": dict(attempt.params)})
        report.results[attempt.label] = Result(attempt.attack, "", score, is_member, **kept)
    order = np.argsort(report.result.score)
    report.thumbnails = {int(i): np.asarray(p.pool.images[i]) for i in [*order[-SHOWN:], *order[:SHOWN]]}
    if report.p_value > report.level:
        return
    folds = [len(np.unique(result.fold)) for result in (report.result, report.no_model)]
    if leaves_half(*report.control[1:3]) and folds[0] == folds[1]:
        clear = metrics.clear_of(report.result, report.no_model).low > 0
        report.control = report.control._replace(clear=clear)
    best = p.attempts[report.found.strongest]
    twin = p.subject.make_untrained(best.model) if isinstance(untrained, str) else untrained
    if twin is None:
        report.notes.append("the control with an untrained model was not run: no untrained model was given")
        return
    entry = {best.label: measure(replace(best, model=twin), f"control: {best.label} on an untrained model")}
    control = battery.search(entry, is_member, p.units, fold, seed=seed, level=report.level)
    report.untrained = (best.label, float(control.auc[0]), control.p)


def compare(
    encoder: Any, suspected: Source, reference: Source, *, attack: str = "encodermi-t", untrained: Any = "auto",
    size: int | tuple[int, int] | None = None, level: float = 0.01, seed: int = 0, **params: Any,
) -> Report:  # fmt: skip
    """Audit an encoder with one attack; arguments as in :func:`run`, ``params`` are the attack's."""
    options = dict(untrained=untrained, size=size, level=level, seed=seed, settings=params)
    return run(encoder, suspected, reference, attack=attack, **options)


compare_segmenter = partial(compare, attack="seg-global-loss")
