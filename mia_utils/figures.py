"""The registry of figures that are redrawn from saved scores alone: no model, no pixel, no training.

A figure is a function ``draw(lab) -> (figure, table)`` under a name; ``draw(name, lab)`` writes
``figures/<profile>/<name>.png`` and ``.csv``, ``draw_all(lab)`` redraws everything (``./run_all.sh replay``). Titles
are computed from the numbers, so that a changed result changes its sentence.

Where results come from: ``lab.results(figure=name)``, the attack results that a notebook evaluated for that figure
(``meta["figures"]`` names it). Results that differ only in seed are one entry: mean over seeds, bootstrap over seeds
and then images (``metrics.combine``); each seed stays visible as a dot or a thin line.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from mia_utils import metrics, paths, plots

# What makes two results the same experiment up to the seed. `model` is the model id without its seed, so rows that
# differ in something not listed here are still told apart.
_IDENTITY = (
    "attack", "control", "model", "method", "arch", "dataset", "protocol", "knowledge", "shadow_method", "epoch",
    "n_train", "epochs", "augmentation", "attacker", "defense", "strength", "known_share", "n_nonmembers",
    "rung", "params",
)  # fmt: skip
_ARCH_LABELS = (("vit", "ViT"), ("resnet", "ResNet"), ("swin", "Swin"), ("convnext", "ConvNeXt"))
RUNGS = {
    "released-view": "released view: members cropped, strangers whole",
    "released-split": "official split: members train, strangers test",
    "frame-thirds": "frame-level attacker: near twins on both sides",
    "released-selection": "released selection: best epoch on the report set",
    "iid-frames": "frames drawn one by one",
    "controlled": "clean protocol: one pool, one query view",
}
_CONTROLS = ("no-model", "untrained", "permuted")
_CLEAN = ("controlled", "clean", "iid-frames")
_SCALE_ORDER = ("(.01, .03)", "(.08, .1)", "(.08, .2)", "(.08, .3)", "(.5, 1)")  # the paper's five, by size
_MLP_ORDER = ("narrow", "shallow", "base", "deep", "wide")
_WIDTHS = {
    (512, 256, 128): "base", (1024, 512, 256): "wide", (256, 128, 64): "narrow", (512, 256, 256, 128): "deep",
    (512, 128): "shallow",
}  # fmt: skip


class NotAvailable(ValueError):
    """A figure has no results in this profile; the message says which rows it needs."""


@dataclass(frozen=True)
class Figure:
    """One registered figure.

    Attributes:
        name: file stem, ``figNN_...``.
        notebook: notebook that evaluates its results.
        title: what it shows (the finding itself is computed when drawn).
        paper_item: what it regenerates, as in ``figures/catalog.yaml``.
        needs: what a profile must hold for it, said when nothing is there.
        draw: ``draw(lab) -> (figure, table)``, or ``draw(table) -> (figure, table)`` where ``from_table``.
        from_table: measured inside models by its notebook; replay redraws it from its committed CSV.
    """

    name: str
    notebook: str
    title: str
    paper_item: str
    needs: str
    draw: Callable[..., tuple[Canvas, pd.DataFrame]]
    from_table: bool = False


FIGURES: dict[str, Figure] = {}


def figure(name: str, *, notebook: str, title: str, paper_item: str = "", needs: str = "", from_table: bool = False):
    """Register a drawing function under a figure name."""

    def add(function):
        if name in FIGURES:
            raise ValueError(f"figure {name!r} is registered twice; one writer per file")
        FIGURES[name] = Figure(name, notebook, title, paper_item, needs, function, from_table)
        return function

    return add


def draw(name: str, lab: Any, *, data: pd.DataFrame | None = None) -> Path:
    """Draw one figure and write it with its CSV.

    Args:
        name: registered name.
        lab: what ``experiments.open`` returns; used: ``profile_name`` and ``results(figure=)``.
        data: the table of a figure measured inside models (``from_table``); without it the figure is redrawn from
            the CSV written before.

    Returns:
        path of the PNG in ``figures/<profile>/``.

    Raises:
        NotAvailable: this profile has no results for it.
        ValueError: unknown name.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; known: {', '.join(sorted(FIGURES))}")
    spec = FIGURES[name]
    path = paths.get_figures_dir(lab.profile_name) / f"{name}.png"
    with mpl.rc_context(plots.STYLE):
        return _draw(spec, lab, path, data)


def _draw(spec: Figure, lab: Any, path: Path, data: pd.DataFrame | None) -> Path:
    if spec.from_table:
        csv = path.with_suffix(".csv")
        if data is None and not csv.is_file():
            raise NotAvailable(
                f"{spec.name}: no table {csv.name} in profile {lab.profile_name}; run notebook {spec.notebook}"
            )
        # always through the CSV's rounding, so that drawing and redrawing give the same bytes
        data = pd.read_csv(io.StringIO(plots.format_table(data)) if data is not None else csv)
        fig, table = spec.draw(data)
    else:
        fig, table = spec.draw(lab)
    return plots.save(fig, path, table, command=plots.command_for(path, lab.profile_name))


def draw_all(lab: Any, names: Iterable[str] | None = None) -> pd.DataFrame:
    """Draw every registered figure that this profile has results for.

    Returns:
        columns ``figure, path, note``; a figure without results has an empty path and says what it needs.
    """
    rows = []
    for name in names or FIGURES:
        try:
            rows.append({"figure": name, "path": str(draw(name, lab)), "note": ""})
        except NotAvailable as reason:
            rows.append({"figure": name, "path": "", "note": str(reason)})
    return pd.DataFrame(rows, columns=["figure", "path", "note"])


# ------------------------------------------------------------------------------------ results -> entries -> tables


@dataclass(frozen=True)
class Entry:
    """One experiment over its seeds.

    Attributes:
        meta: what the seeds share (``model`` is the model id without the seed).
        control: empty, or the control's name.
        results: one result per seed.
        metrics: mean over seeds with the interval over seeds and images; None where the control could not be run.
        reason: why it could not be run.
        controls: the control entries of an attack.
    """

    meta: dict[str, Any]
    control: str
    results: tuple[Any, ...]
    metrics: metrics.Result | None
    reason: str = ""
    controls: dict[str, Entry] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds averaged, in order."""
        return [int(r.meta.get("seed", 0)) for r in self.results if len(r.score)]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a fact of the experiment: a parameter of the attack, else an entry of the meta."""
        params = self.meta.get("params") or {}
        value = params.get(name, self.meta.get(name))
        return default if value is None else value


def split_seed(model_id: str, seed: int | None) -> str:
    """Return a model id without its seed: ``mae-target-s0`` -> ``mae-target``."""
    return re.sub(rf"-s?{int(seed)}$", "", model_id) if seed is not None else model_id


def _facts(result: Any) -> dict[str, Any]:
    meta = dict(result.meta)
    params = {k: v for k, v in (meta.get("params") or {}).items() if k != "seed"}
    return {
        **meta,
        "attack": meta.get("attack") or result.attack,
        "control": result.control or "",
        "model": split_seed(str(meta.get("model_id") or meta.get("model") or ""), meta.get("seed")),
        "params": params,
    }


def digest(result: Any) -> bytes:
    """Hash of what the numbers of a result follow from: the same control saved twice is one control."""
    hashed = hashlib.blake2b(digest_size=16)
    for name in ("score", "is_member", "fold", "groups", "threshold"):
        value = getattr(result, name, None)
        if value is not None:
            value = np.asarray(value)
            hashed.update(np.ascontiguousarray(value if value.dtype.kind in "bifu" else value.astype("U")).tobytes())
        hashed.update(b"\x1f")
    return hashed.digest()


def _inputs(result: Any) -> dict[str, Any]:
    """A result as the arguments of ``metrics.evaluate``."""
    folds = result.fold if len(np.unique(result.fold)) > 1 else None
    names = ("score", "is_member", "threshold", "groups")
    return {name: getattr(result, name) for name in names} | {"folds": folds}


_METRICS: dict[tuple, metrics.Result] = {}


def combine(results: Sequence[Any], *, n_bootstrap: int = 1000) -> metrics.Result:
    """Evaluate results of several seeds as one (``metrics.combine``), remembered by content within the process.

    The same control stands beside many results and the same result in many figures; each is bootstrapped once.
    """
    key = (n_bootstrap, *(digest(r) for r in results))
    if key not in _METRICS:
        _METRICS[key] = metrics.combine([_inputs(r) for r in results], n_bootstrap=n_bootstrap)
    return _METRICS[key]


def group(results: Iterable[Any], *, controls: Sequence[str] = ("no-model", "untrained", "permuted")) -> list[Entry]:
    """Group results that differ only in seed, and combine each group.

    Args:
        results: ``attacks.Result`` objects with the meta of ``experiments``.
        controls: which controls to combine beside each entry (each costs a bootstrap).

    Returns:
        entries in the order of first appearance.

    Raises:
        ValueError: two different results claim the same experiment and seed.
    """
    buckets: dict[str, dict[int, Any]] = {}
    for result in results:
        facts = _facts(result)
        key = json.dumps([facts.get(name) for name in _IDENTITY], sort_keys=True, default=str)
        bucket = buckets.setdefault(key, {})
        seed = int(facts.get("seed") or 0)
        if seed in bucket and digest(bucket[seed]) != digest(result):
            raise ValueError(
                f"two results for {facts['attack']} on {facts['model']}, seed {seed}, differ: remove one of them"
            )
        bucket.setdefault(seed, result)
    return [_make_entry(tuple(b[s] for s in sorted(b)), controls) for b in buckets.values()]


def _make_entry(results: tuple[Any, ...], controls: Sequence[str]) -> Entry:
    facts = _facts(results[0])
    own = [r for r in results if len(r.score)]
    beside = {}
    for name in controls:
        twins = tuple(r.controls[name] for r in results if name in r.controls)
        if twins:
            beside[name] = _make_entry(twins, ())
    return Entry(
        meta=facts,
        control=facts["control"],
        results=results,
        metrics=combine(own) if own else None,
        reason="" if own else str(results[0].meta.get("reason", "")),
        controls=beside,
    )


def make_rows(entry: Entry, *, controls: Sequence[str] = (), **columns: Any) -> list[dict[str, Any]]:
    """Return the table rows of an entry: one over all seeds, one per seed when there are several, then its controls."""
    rows = []
    parts = [entry, *(entry.controls[c] for c in controls if c in entry.controls)]
    for part in parts:
        if part.metrics is None:
            continue
        head = {
            **columns, "attack": entry.meta["attack"], "control": part.control, "method": entry.meta.get("method", ""),
            "arch": entry.meta.get("arch", ""), "dataset": entry.meta.get("dataset", ""),
        }  # fmt: skip
        m = part.metrics
        rows.append(
            {**head, "seed": np.nan, "value": m.auc, "low": m.auc_low, "high": m.auc_high, "n_seeds": m.n_seeds}
        )
        if m.n_seeds > 1:
            rows += [{**head, "seed": s, "value": auc} for s, auc in zip(part.seeds, m.per_seed, strict=True)]
    return rows


def _load(lab: Any, *names: str, controls: Sequence[str] = ("no-model", "untrained")) -> list[Entry]:
    """Entries tagged with any of the names; NotAvailable where there are none."""
    seen, results = set(), []
    for name in names:
        for result in lab.results(figure=name):
            if id(result) not in seen:
                seen.add(id(result))
                results.append(result)
    if not results:
        spec = FIGURES[names[0]]
        needs = f" It needs {spec.needs}." if spec.needs else ""
        raise NotAvailable(
            f"{names[0]}: no saved scores in profile {lab.profile_name}.{needs} "
            f"Run notebook {spec.notebook}, or see profile photos."
        )
    return _sort(group(results, controls=controls))


def _sort(entries: Sequence[Entry]) -> list[Entry]:
    """Put entries in the order of the book: by method, then structure, plain rows before their variants."""
    methods, arches = list(plots.METHOD_MARKERS), [prefix for prefix, _ in _ARCH_LABELS]

    def place(entry: Entry) -> tuple[int, int, int]:
        method, arch = str(entry.meta.get("method")), str(entry.meta.get("arch"))
        return (
            methods.index(method) if method in methods else len(methods),
            next((i for i, prefix in enumerate(arches) if arch.startswith(prefix)), len(arches)),
            len(str(entry.meta.get("model"))),
        )

    return sorted(entries, key=place)


# -------------------------------------------------------------------------------------------------- small language


_AUGMENTATIONS = {"none": "plain", "flip": "flips", "crop": "strong crops", "crop-weak": "weak crops"}
_TELLING = ("arch", "dataset", "augmentation", "defense", "n_train", "epochs")


def _name_target(entry: Entry, entries: Sequence[Entry]) -> str:
    """Name a target by its method, and by whatever else tells it from the other targets of that method."""
    twins = [e for e in entries if e.meta.get("method") == entry.meta.get("method")]
    parts = [plots.label_of(entry.meta.get("method", ""))]
    for name in _TELLING:
        wide = entries if name == "dataset" else twins
        if len({str(e.meta.get(name)) for e in wide}) > 1:
            value = entry.meta.get(name)
            text = {"arch": _name_arch(entry), "n_train": f"N {value}", "epochs": f"{value} epochs"}.get(
                name, str(value)
            )
            parts.append(_AUGMENTATIONS.get(text, f"{text} views") if name == "augmentation" else text)
            twins = [e for e in twins if str(e.meta.get(name)) == str(value)]
    # what the meta does not tell apart is told apart by the model's own name
    return str(entry.meta.get("model")) if len({e.meta.get("model") for e in twins}) > 1 else ", ".join(parts)


def _name_arch(entry: Entry) -> str:
    arch = str(entry.meta.get("arch", ""))
    return next((label for prefix, label in _ARCH_LABELS if arch.startswith(prefix)), arch)


def _join(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _auc(entry: Entry) -> str:
    return plots.format_value(entry.metrics.auc)


def _say_interval(entry: Entry) -> str:
    return plots.format_interval(entry.metrics.auc, entry.metrics.auc_low, entry.metrics.auc_high)


def _leaks(entry: Entry) -> bool:
    return entry.metrics is not None and entry.metrics.auc_low > 0.5


def _overlap(one: Entry, other: Entry) -> bool:
    return one.metrics.auc_low <= other.metrics.auc_high and other.metrics.auc_low <= one.metrics.auc_high


def _say_leaks(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Sentence: on which targets the attack sees members, and where it is not shown to."""
    yes = [f"{n} ({_auc(e)})" for e, n in zip(entries, names, strict=True) if _leaks(e)]
    no = [f"{n} ({_auc(e)})" for e, n in zip(entries, names, strict=True) if not _leaks(e)]
    attack = _join([plots.label_of(e.meta["attack"]) for e in entries])
    if not yes:
        return f"{attack} is not shown to tell members from strangers on {_join(no)}"
    text = f"{attack} tells members from strangers on {_join(yes)}"
    return text + (f"; not shown on {_join(no)}" if no else "")


def _panels(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Entries by target, in the order of appearance."""
    panels: dict[str, list[Entry]] = {}
    for entry in entries:
        panels.setdefault(_name_target(entry, entries), []).append(entry)
    return list(panels.items())


def _grid(n: int, *, most: int = 3, height: float = 2.3, **options: Any):
    """Make a figure with n panels, at most ``most`` a row (four make a square); unused axes are removed."""
    cols = 2 if n == 4 else min(n, most)
    rows = -(-n // cols)
    width = plots.FULL if cols > 1 else plots.HALF * 1.3
    fig, axes = plots.make_figure(rows, cols, width=width, height=height * rows + 0.55, **options)
    flat = list(axes.flat)
    for ax in flat[n:]:
        ax.remove()
    return fig, flat[:n]


def _is_left(ax) -> bool:
    return ax.get_subplotspec().is_first_col()


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    values = table[["value", "low", "high"]].to_numpy(float)
    return max(0.0, min(0.42, np.nanmin(values) - 0.02)), min(1.02, max(0.62, np.nanmax(values) + 0.03))


def _sweep(lab: Any, name: str, *, of: str, xlabel: str, say: str, log: bool = False) -> tuple[Canvas, pd.DataFrame]:
    """Panels of AUC over a swept number, one per target; ``say`` words the number, as in ``"with {} crops"``."""

    def value(entry: Entry) -> float | None:
        # a model at the end of training has no epoch of its own: it stands at its last one
        found = entry.get(of, entry.meta.get("epochs") if of == "epoch" else None)
        return None if found is None else float(found)

    entries = [e for e in _load(lab, name) if value(e) is not None and e.metrics is not None]
    if not entries:
        raise NotAvailable(f"{name}: the saved scores carry no parameter {of}")
    panels = _panels(entries)
    rows = []
    for target, part in panels:
        for e in part:
            rows += make_rows(e, controls=("no-model", "untrained"), target=target, x=value(e))
    table = pd.DataFrame(rows)
    fig, axes = _grid(len(panels), sharey=True)
    for ax, (target, _) in zip(axes, panels, strict=True):
        plots.draw_sweep(
            ax, table[table["target"] == target], xlabel=xlabel, log=log, ylabel="AUC" if _is_left(ax) else ""
        )
        ax.set_title(target)
    axes[0].set_ylim(*_limits(table))
    lead = max(entries, key=lambda e: e.metrics.auc)
    line = sorted((e for e in entries if _same_line(e, lead)), key=value)
    ends = [line[0], line[-1]] if len(line) > 1 else [lead]
    text = ", ".join(f"{_auc(e)} {say.format(f'{value(e):,g}')}" for e in ends)
    if len(ends) > 1 and _overlap(*ends):
        text += "; the intervals overlap"
    plots.set_title(fig, f"{_name_target(lead, entries)}: AUC {text}")
    plots.make_legend(fig, table, seeds=True)
    return fig, table


def _same_line(one: Entry, other: Entry) -> bool:
    return all(
        one.meta.get(k) == other.meta.get(k) for k in ("attack", "model", "knowledge", "protocol", "shadow_method")
    )


def _choice(
    lab: Any,
    name: str,
    label: Callable[[Entry], str | None],
    *,
    say: Callable[[Entry], str] | str,
    order: Sequence[str] = (),
) -> tuple[Canvas, pd.DataFrame]:
    """Panels of dots and intervals over named choices, one per target; controls in grey on the line of their attack."""
    entries = [e for e in _load(lab, name) if label(e) is not None and e.metrics is not None]
    if not entries:
        raise NotAvailable(f"{name}: the saved scores do not say which choice they used")
    panels = _panels(entries)
    rows = []
    for target, part in panels:
        if order:
            part.sort(key=lambda e: order.index(label(e)) if label(e) in order else len(order))
        for e in part:
            rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=label(e))
    table = pd.DataFrame(rows)
    fig = _draw_choices(table)
    lead = max(entries, key=lambda e: e.metrics.auc)
    worst = min((e for e in entries if e.meta.get("model") == lead.meta.get("model")), key=lambda e: e.metrics.auc)
    word = say if callable(say) else lambda e: f"{say} {label(e)}"
    text = f"{_name_target(lead, entries)}: AUC {_auc(lead)} with {word(lead)}"
    if worst is not lead:
        text += f", {_auc(worst)} with {word(worst)}" + ("; the intervals overlap" if _overlap(lead, worst) else "")
    plots.set_title(fig, text)
    plots.make_legend(fig, table, lines=False)
    return fig, table


def _draw_choices(table: pd.DataFrame) -> Canvas:
    """Draw one panel of dots and intervals per ``target``; lines are ``label``, controls stand on the same line."""
    targets = list(dict.fromkeys(table["target"]))
    lines = [list(dict.fromkeys(table.loc[table["target"] == t, "label"])) for t in targets]
    same = all(names == lines[0] for names in lines)
    short = same and max(len(str(v)) for v in table["label"]) <= 14
    keys = (
        table.groupby(["target", "label"])[["attack", "control"]].apply(lambda part: len(part.drop_duplicates())).max()
    )
    height = max(map(len, lines)) * max(0.2, 0.1 * keys) + 0.6
    fig, axes = _grid(len(targets), most=3 if short else 2, height=height, sharey=same and len(targets) > 1)
    for ax, target in zip(axes, targets, strict=True):
        plots.draw_intervals(ax, table[table["target"] == target], annotate="attack")
        ax.set_xlim(*_limits(table))
        ax.set_title(target)
    return fig


# ------------------------------------------------------------------------------------------------------ notebook 00


def _roc_rows(entry: Entry, controls: Sequence[str], **columns: Any) -> list[pd.DataFrame]:
    tables = []
    for part in [entry, *(entry.controls[c] for c in controls if c in entry.controls)]:
        if part.metrics is None:
            continue
        head = {
            **columns,
            "attack": entry.meta["attack"],
            "control": part.control,
            "method": entry.meta.get("method", ""),
        }
        roc = part.metrics.roc
        tables.append(
            pd.DataFrame(
                {**head, "seed": np.nan, "fpr": roc.fpr, "tpr": roc.tpr, "tpr_low": roc.low, "tpr_high": roc.high}
            )
        )
        if not part.control and part.metrics.n_seeds > 1:
            for seed, result in zip(part.seeds, [r for r in part.results if len(r.score)], strict=True):
                one = combine([result], n_bootstrap=2).roc  # the line only: no interval is drawn for one seed
                tables.append(pd.DataFrame({**head, "seed": seed, "fpr": one.fpr, "tpr": one.tpr}))
    return tables


@figure(
    "fig00_roc", notebook="00_start_here", title="Scores and log-log ROC of the first attack", needs="the MAE target"
)
def _draw_first_roc(lab):
    entries = _load(lab, "fig00_roc", controls=("no-model", "untrained", "permuted"))
    entry = max(entries, key=lambda e: e.metrics.auc)
    first = entry.results[0]
    # folds have attackers of their own: their scores meet on one axis only relative to their thresholds
    bins = plots.count_scores(first.score - (0 if first.threshold is None else first.threshold), first.is_member)
    roc = pd.concat(_roc_rows(entry, ("no-model", "untrained", "permuted")), ignore_index=True)
    fig, axes = plots.make_figure(1, 2, height=2.9)
    plots.draw_histograms(axes[0, 0], bins, xlabel="score above the attacker's threshold")
    axes[0, 0].set_title("scores of the attack")
    plots.draw_roc(axes[0, 1], roc, n_nonmembers=entry.metrics.n_nonmembers)
    at = entry.metrics.tpr_at.get(0.01)
    axes[0, 1].set_title(
        f"at 1 % false alarms it finds {100 * at.value:.0f} % of the members" if at else f"AUC {_say_interval(entry)}"
    )
    blind = entry.controls.get("no-model")
    where = plots.label_of(entry.meta.get("method", ""))
    text = f"{plots.label_of(entry.meta['attack'])} on {where}: AUC {_say_interval(entry)}"
    plots.set_title(fig, text + (f", without the model {_auc(blind)}" if blind and blind.metrics else ""))
    plots.make_legend(fig, roc, seeds=True)
    table = pd.concat([bins.assign(panel="scores"), roc.assign(panel="roc")], ignore_index=True)
    return fig, table[["panel", *[c for c in table.columns if c != "panel"]]]


# ------------------------------------------------------------------------------------------------------ notebook 02


@figure(
    "fig02_blind_ladder",
    notebook="02_shadow_setup",
    title="The blind ladder: what an attacker knows who never sees the model",
    needs="a pool with its protocols",
)
def _draw_blind_ladder(lab):
    entries = [e for e in _load(lab, "fig02_blind_ladder", controls=()) if e.metrics is not None]
    several = len({e.meta.get("dataset") for e in entries}) > 1
    entries.sort(key=lambda e: (_get_rung(e) in _CLEAN, -e.metrics.auc))
    rows = []
    for e in entries:
        rung = _get_rung(e)
        label = RUNGS.get(rung, rung) + (f" ({e.meta.get('dataset')})" if several else "")
        rows += make_rows(e, label="\n".join(textwrap.wrap(label, 30)), rung=rung, flawed=rung not in _CLEAN)
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, height=0.42 * len(entries) + 0.95)
    plots.draw_ladder(axes[0, 0], table)
    flawed = [e for e in entries if _get_rung(e) not in _CLEAN]
    clean = [e for e in entries if _get_rung(e) == "controlled"]
    text = "No model is queried"
    if flawed:
        text += f", and yet: AUC {_auc(flawed[0])} under the {_get_rung(flawed[0]).replace('-', ' ')} protocol"
    plots.set_title(fig, text + (f"; the clean protocol gives {_say_interval(clean[-1])}" if clean else ""))
    table["label"] = table["label"].str.replace("\n", " ")
    return fig, table


def _get_rung(entry: Entry) -> str:
    return str(entry.get("rung") or entry.meta.get("protocol"))


# ------------------------------------------------------------------------------------------------------ notebook 03


@figure(
    "fig03_roc",
    notebook="03_partcrop",
    title="Log-log ROC per method with the three controls",
    paper_item="PartCrop, attack on several methods",
    needs="a target per method",
)
def _draw_roc(lab):
    entries = [e for e in _load(lab, "fig03_roc", controls=_CONTROLS) if e.metrics is not None]
    panels = _panels(entries)
    tables = []
    for target, part in panels:
        for e in part:
            tables += _roc_rows(e, _CONTROLS if e is part[0] else (), target=target)
    table = pd.concat(tables, ignore_index=True)
    fig, axes = _grid(len(panels), height=2.35)
    for k, (ax, (target, part)) in enumerate(zip(axes, panels, strict=True)):
        below = any(other.get_subplotspec().colspan == ax.get_subplotspec().colspan for other in axes[k + 1 :])
        plots.draw_roc(
            ax,
            table[table["target"] == target],
            n_nonmembers=part[0].metrics.n_nonmembers,
            label_y=_is_left(ax),
            label_x=not below,
        )
        gap = ": " if len(target) < 16 else ":\n"
        ax.set_title(f"{target}{gap}AUC {_say_interval(part[0])}")
    plots.set_title(fig, _say_leaks([part[0] for _, part in panels], [target for target, _ in panels]))
    plots.make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig03_table",
    notebook="03_partcrop",
    title="Attack table with controls: AUC and TPR at 1 % FPR",
    paper_item="PartCrop, attack tables",
    needs="a target per method",
)
def _draw_table(lab):
    entries = [e for e in _load(lab, "fig03_table", "fig03_roc", controls=_CONTROLS) if e.metrics is not None]
    panels = _panels(entries)
    rows = []
    for target, part in panels:
        known = len({str(e.meta.get("knowledge")) for e in part}) > 1
        shown = [(e, e) for e in part]
        shown += [(part[0], part[0].controls[c]) for c in _CONTROLS if c in part[0].controls]
        for owner, one in shown:
            if one.metrics is None:
                continue
            label = plots.label_of(one.control or owner.meta["attack"])
            if known and not one.control:
                label += f", {_name_knowledge(owner)}"
            m, at = one.metrics, one.metrics.tpr_at.get(0.01)
            for row in make_rows(one, target=target, label=f"{target}: {label}", knowledge=owner.meta.get("knowledge")):
                if np.isnan(row["seed"]):
                    row |= {"n_members": m.n_members, "n_nonmembers": m.n_nonmembers, "p_value": m.p_value}
                    row |= {"balanced_accuracy": m.balanced_accuracy}
                    row |= dict(zip(("tpr_at_1", "tpr_at_1_low", "tpr_at_1_high"), at or (np.nan,) * 3, strict=True))
                rows.append(row)
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 2, height=0.19 * table["label"].nunique() + 0.95, sharey=True)
    plots.draw_intervals(axes[0, 0], table)
    axes[0, 0].set_xlim(*_limits(table))
    if table["tpr_at_1"].notna().any():
        rates = table[table["seed"].isna()].drop(columns=["value", "low", "high"])
        rates = rates.rename(columns={"tpr_at_1": "value", "tpr_at_1_low": "low", "tpr_at_1_high": "high"})
        plots.draw_intervals(axes[0, 1], rates, xlabel="TPR at 1 % FPR", chance=0.01)
        axes[0, 1].set_xlim(left=-0.01)
    else:
        text = "TPR at 1 % FPR is not shown:\nfewer than 1,000 strangers"
        axes[0, 1].text(0.5, 0.5, text, transform=axes[0, 1].transAxes, ha="center", va="center")
        axes[0, 1].set_axis_off()
    plots.set_title(fig, _say_leaks([part[0] for _, part in panels], [target for target, _ in panels]))
    return fig, table


@figure(
    "fig03_crop_number",
    notebook="03_partcrop",
    title="AUC over the number of part crops",
    paper_item="PartCrop, ablation: crop number",
)
def _draw_crop_number(lab):
    return _sweep(lab, "fig03_crop_number", of="n_crops", xlabel="part crops per image", log=True, say="with {} crops")


def _name_scale(entry: Entry) -> str | None:
    scale = entry.get("crop_scale")
    return None if scale is None else "({}, {})".format(*(f"{float(v):g}".replace("0.", ".", 1) for v in scale))


@figure(
    "fig03_crop_scale",
    notebook="03_partcrop",
    title="AUC by range of part sizes",
    paper_item="PartCrop, ablation: crop scale",
)
def _draw_crop_scale(lab):
    return _choice(lab, "fig03_crop_scale", _name_scale, say="crop scale", order=_SCALE_ORDER)


@figure(
    "fig03_feature_kind",
    notebook="03_partcrop",
    title="Uniform, Gaussian or both energies",
    paper_item="PartCrop, ablation: feature kind",
)
def _draw_feature_kind(lab):
    return _choice(
        lab, "fig03_feature_kind", lambda e: e.get("kind"), say="feature kind", order=("uniform", "gaussian", "both")
    )


@figure(
    "fig03_pooling",
    notebook="03_partcrop",
    title="Class token or mean of the tokens as part vector",
    paper_item="PartCrop: released code against the paper's text",
)
def _draw_pooling(lab):
    return _choice(lab, "fig03_pooling", lambda e: e.get("pooling"), say="pooling", order=("cls", "mean", "auto"))


def _name_mlp(entry: Entry) -> str | None:
    widths = entry.get("widths")
    widths = [512, 256, 128] if widths is None else widths  # the attacker's default
    version = entry.get("version") or ("v2" if entry.meta["attack"].endswith("-v2") else "v1")
    name = (
        _WIDTHS.get(tuple(int(w) for w in widths), "-".join(map(str, widths)))
        if not isinstance(widths, str)
        else widths
    )
    return f"{name} {version}"


@figure(
    "fig03_mlp",
    notebook="03_partcrop",
    title="Attacker network: five widths, v1 against v2",
    paper_item="PartCrop, ablation: attacker MLP; PartCrop-v2",
)
def _draw_mlp(lab):
    return _choice(
        lab, "fig03_mlp", _name_mlp, say="attacker", order=[f"{w} {v}" for w in _MLP_ORDER for v in ("v1", "v2")]
    )


@figure("fig03_known_share", notebook="03_partcrop", title="AUC over the share of members the attacker knows")
def _draw_known_share(lab):
    return _sweep(
        lab, "fig03_known_share", of="known_share", xlabel="share of images known", say="with a share of {} known"
    )


def _name_knowledge(entry: Entry) -> str:
    knowledge = str(entry.meta.get("knowledge", ""))
    if not knowledge.startswith("shadow"):
        return knowledge
    shadow, method = entry.meta.get("shadow_method"), entry.meta.get("method")
    return "shadow, same method" if shadow in (None, "", method) else f"cross: {plots.label_of(shadow)} shadow"


def _say_knowledge(entry: Entry) -> str:
    name = _name_knowledge(entry)
    if name == "shadow, same method":
        return "a shadow of the same method"
    return (
        name.replace("cross: ", "a shadow of ").removesuffix(" shadow")
        if name.startswith("cross")
        else f"{name} knowledge"
    )


@figure(
    "fig03_knowledge",
    notebook="03_partcrop",
    title="Partial, shadow and cross knowledge side by side",
    paper_item="PartCrop: partial and shadow setting",
    needs="a target and a shadow per method",
)
def _draw_knowledge(lab):
    return _choice(
        lab, "fig03_knowledge", _name_knowledge, say=_say_knowledge, order=("partial", "shadow, same method")
    )


@figure(
    "fig03_transfer",
    notebook="03_partcrop",
    title="Transfer matrix: attacker fit on method A's shadow, tested on B",
    paper_item="PartCrop: one attack when the recipe is unknown",
    needs="a target and a shadow for at least two methods",
)
def _draw_transfer(lab):
    entries = [
        e
        for e in _load(lab, "fig03_transfer", controls=("no-model",))
        if e.metrics is not None and e.meta.get("shadow_method")
    ]
    if not entries:
        raise NotAvailable(
            "fig03_transfer: no result with shadow knowledge; it needs a target and a shadow for at least two methods"
        )
    used = {e.meta["method"] for e in entries} | {e.meta["shadow_method"] for e in entries}
    order = sorted(used, key=lambda m: (list(plots.METHOD_MARKERS) + [m]).index(m))
    entries.sort(key=lambda e: (order.index(e.meta["shadow_method"]), order.index(e.meta["method"])))
    rows = [
        r
        for e in entries
        for r in make_rows(e, row=plots.label_of(e.meta["shadow_method"]), column=plots.label_of(e.meta["method"]))
    ]
    # no model is asked, so one such row serves all targets on the same split
    by_split = {e.meta.get("split"): e for e in entries if "no-model" in e.controls and e.controls["no-model"].metrics}
    blind = {e.meta["method"]: by_split[e.meta.get("split")] for e in entries if e.meta.get("split") in by_split}
    for method in order:
        if method in blind:
            rows += [
                r
                for r in make_rows(blind[method], controls=("no-model",), row="no model", column=plots.label_of(method))
                if r["control"]
            ]
    table = pd.DataFrame(rows)
    n_rows, n_cols = table["row"].nunique(), table["column"].nunique()
    fig, axes = plots.make_figure(
        1, 1, width=plots.HALF if n_cols <= 3 else min(plots.FULL, 1.3 + 0.95 * n_cols), height=0.52 * n_rows + 1.2
    )
    plots.draw_matrix(
        axes[0, 0],
        table,
        xlabel="target trained with",
        ylabel="attacker fit on the shadow of",
        n_head=n_rows - 1 if blind else None,
    )
    same = [e.metrics.auc for e in entries if e.meta["method"] == e.meta["shadow_method"]]
    cross = [e.metrics.auc for e in entries if e.meta["method"] != e.meta["shadow_method"]]
    parts = [
        f"{what} {plots.format_value(float(np.mean(v)))}"
        for what, v in (("the same method", same), ("another method", cross))
        if v
    ]
    text = "Mean AUC with a shadow of " + ", of ".join(parts)
    lowest = min(entries, key=lambda e: e.metrics.auc)
    if lowest.metrics.auc_high < 0.5:  # it sees the members and takes them for strangers
        shadow, target = (plots.label_of(lowest.meta[key]) for key in ("shadow_method", "method"))
        text += f"; from {shadow} to {target} the ranking turns around ({plots.format_value(lowest.metrics.auc)})"
    plots.set_title(fig, text)
    return fig, table


@figure(
    "fig03_arch",
    notebook="03_partcrop",
    title="ViT, ResNet and Swin",
    paper_item="PartCrop: several structures",
    needs="targets of several structures",
)
def _draw_arch(lab):
    entries = [e for e in _load(lab, "fig03_arch") if e.metrics is not None]
    several = len({e.meta.get("method") for e in entries}) > 1
    target = "several methods" if several else plots.label_of(entries[0].meta.get("method", ""))
    rows = []
    for e in entries:
        label = _name_arch(e) + (f", {plots.label_of(e.meta.get('method', ''))}" if several else "")
        rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=label)
    table = pd.DataFrame(rows)
    fig = _draw_choices(table)
    plots.set_title(fig, _say_leaks(entries, list(dict.fromkeys(table["label"]))))
    plots.make_legend(fig, table, lines=False)
    return fig, table


@figure(
    "fig03_released",
    notebook="03_partcrop",
    title="The same attack under the released preprocessing",
    paper_item="PartCrop, released mia_util.py",
    needs="a target evaluated under both protocols",
)
def _draw_released(lab):
    entries = [e for e in _load(lab, "fig03_released") if e.metrics is not None]
    protocols = [p for p in ("controlled", "released-view") if any(e.meta.get("protocol") == p for e in entries)]
    if len(protocols) < 2:
        raise NotAvailable("fig03_released: needs results of both protocols, controlled and released-view")
    names = {"controlled": "one view for all", "released-view": "released view"}
    panels = _panels(entries)
    rows = []
    for target, part in panels:
        for control in ("", "untrained", "no-model"):
            for protocol in protocols:
                for e in part:
                    if e.meta.get("protocol") != protocol:
                        continue
                    head = "attack on the model" if not control else plots.label_of(control)
                    label = f"{head}: {names[protocol]}"
                    kept = [
                        r
                        for r in make_rows(
                            e, controls=(control,) if control else (), target=target, label=label, protocol=protocol
                        )
                        if r["control"] == control
                    ]
                    rows += kept
    table = pd.DataFrame(rows)
    n_lines = table.groupby("target")["label"].nunique().max()
    fig, axes = _grid(len(panels), most=2, height=0.22 * n_lines + 0.6, sharey=len(panels) > 1)
    for ax, (target, _) in zip(axes, panels, strict=True):
        plots.draw_intervals(ax, table[table["target"] == target].drop(columns="target"))
        ax.set_title(target)
        low, high = _limits(table)
        ax.set_xlim(low, high)
    blind = {}
    for e in entries:
        twin = e.controls.get("no-model")
        if twin is not None and twin.metrics is not None:
            blind.setdefault(e.meta.get("protocol"), _auc(twin))
    text = "The same attack under the released preprocessing"
    if set(protocols) <= set(blind):
        text = f"With the released preprocessing an attacker without any model reaches AUC {blind['released-view']}"
        text += f"; with one view for all images {blind['controlled']}"
    plots.set_title(fig, text)
    return fig, table


@figure(
    "fig03_epochs",
    notebook="03_partcrop",
    title="AUC along training",
    paper_item="PartCrop, defense: early stop",
    needs="targets with checkpoints along training",
)
def _draw_epochs(lab):
    return _sweep(lab, "fig03_epochs", of="epoch", xlabel="training epoch", log=True, say="after epoch {}")


@figure(
    "fig03_response_curves",
    notebook="03_partcrop",
    title="Part-response curves of members and strangers",
    paper_item="PartCrop Figure 2",
    from_table=True,
)
def _draw_response_curves(table):
    """Table: ``method, group, x, value, low, high`` (group: member or stranger), optionally ``feature``."""
    column = "feature" if "feature" in table and table["feature"].nunique() > 1 else None
    keys = list(dict.fromkeys(zip(table["method"], table[column] if column else [""] * len(table), strict=True)))
    fig, axes = _grid(len(keys), most=3 if len(keys) != 4 else 2, height=2.1)
    gaps = []
    for k, (ax, (method, feature)) in enumerate(zip(axes, keys, strict=True)):
        part = table[(table["method"] == method) & ((table[column] == feature) if column else True)]
        plots.draw_part_curves(
            ax, part, legend=k == 0, ylabel="response" if k % 3 == 0 else "", xlabel="token, sorted by response"
        )
        ax.set_title(plots.label_of(method) + (f", {feature}" if feature else ""))
        wide = part.pivot_table(index="x", columns="group", values=["value", "low", "high"])
        apart = (wide["low"]["member"] > wide["high"]["stranger"]) | (wide["high"]["member"] < wide["low"]["stranger"])
        gaps.append((float(apart.mean()), plots.label_of(method)))
    yes, no = [n for g, n in gaps if g >= 0.5], [n for g, n in gaps if g < 0.5]
    text = (
        f"Parts of members and strangers answer differently on {_join(yes)}"
        if yes
        else "Part responses of members and strangers are not shown to differ"
    )
    plots.set_title(
        fig,
        text
        + (
            f"; not shown on {_join([n for n in no if n not in yes])}"
            if yes and [n for n in no if n not in yes]
            else ""
        ),
    )
    return fig, table


@figure("fig01_losses", notebook="01_pretrain", title="Training loss on members and strangers", from_table=True)
def _draw_losses(table):
    """Table: ``method, epoch, loss_members, loss_heldout``."""
    methods = list(dict.fromkeys(table["method"]))
    fig, axes = _grid(len(methods), height=2.0)
    gaps = {}
    for k, (ax, method) in enumerate(zip(axes, methods, strict=True)):
        part = table[table["method"] == method].sort_values("epoch", kind="stable")
        plots.draw_losses(ax, part, legend=k == 0, ylabel="loss" if k % 3 == 0 else "")
        ax.set_title(plots.label_of(method))
        last = part.dropna(subset=["loss_members", "loss_heldout"]).iloc[-1]
        gaps[method] = 100 * (last["loss_heldout"] / last["loss_members"] - 1)
    widest = max(gaps, key=gaps.get)
    ratio = 1 + gaps[widest] / 100
    times = f"{gaps[widest]:.0f} % above" if ratio < 2 else f"{ratio:.0f} times" if ratio < 100 else "over 100 times"
    text = f"At the end of training the loss of strangers is {times} that of members"
    plots.set_title(fig, text + (f" for {plots.label_of(widest)}, the widest gap" if len(gaps) > 1 else ""))
    return fig, table


# ------------------------------------------------------------------------------------------------------ notebook 08


def summarize(lab: Any, *, controls: Sequence[str] = ("no-model", "untrained", "permuted")) -> list[Entry]:
    """Entries of the summary table: everything saved that asked to be in it."""
    results = [r for r in lab.results() if r.meta.get("summary", True)]
    if not results:
        raise NotAvailable(f"no saved scores in profile {lab.profile_name}; run the notebooks first")
    return _sort(group(results, controls=controls))


@figure(
    "fig08_hero", notebook="08_figures", title="Attack x target grid with its controls below", needs="any attack result"
)
def _draw_overview(lab):
    entries = [
        e for e in summarize(lab) if e.metrics is not None and e.meta.get("protocol") == "controlled" and not e.control
    ]
    if not entries:
        raise NotAvailable(f"fig08_hero: no result under the controlled protocol in profile {lab.profile_name}")
    several = len({str(e.meta.get("knowledge")) for e in entries}) > 1

    def name(entry):
        text = plots.label_of(entry.meta["attack"])
        return text + (f", {_name_knowledge(entry)}" if several else "")

    # one cell per attack, knowledge and target: the result at the end of training with the most seeds
    cells: dict[tuple[str, str], Entry] = {}
    for e in entries:
        key = (name(e), _name_target(e, entries))
        if key not in cells or (e.metrics.n_seeds, e.get("epoch", 0)) > (
            cells[key].metrics.n_seeds,
            cells[key].get("epoch", 0),
        ):
            cells[key] = e
    attacks = list(dict.fromkeys(r for r, _ in cells))
    rows = [r for (row, column), e in cells.items() for r in make_rows(e, row=row, column=column)]
    seen = set()
    for control in ("no-model", "untrained", "permuted"):
        for (_, column), e in cells.items():
            twin = e.controls.get(control)
            if twin is None or twin.metrics is None:
                continue
            label = (
                "no model"
                if control == "no-model"
                else f"{plots.label_of(control)}, {plots.label_of(e.meta['attack'])}"
            )
            if (label, column) in seen:
                continue
            seen.add((label, column))
            rows += [r for r in make_rows(e, controls=(control,), row=label, column=column) if r["control"] == control]
    table = pd.DataFrame(rows)
    columns = list(dict.fromkeys(table["column"]))
    table["column"] = table["column"].map(lambda c: "\n".join(textwrap.wrap(c, 12)))
    fig, axes = plots.make_figure(1, 1, width=plots.FULL, height=0.4 * table["row"].nunique() + 1.0)
    plots.draw_matrix(axes[0, 0], table, n_head=len(attacks))
    yes = sum(_leaks(e) for e in cells.values())
    text = f"{yes} of {len(cells)} attack results on {len(columns)} targets lie above chance"
    plots.set_title(fig, text + " (lower end of the interval above .5); controls below the line")
    table["column"] = table["column"].str.replace("\n", " ")
    return fig, table


@figure(
    "fig08_leakage",
    notebook="08_figures",
    title="Leakage against epochs per training image",
    needs="targets of several lengths, or checkpoints",
)
def _draw_leakage(lab):
    results = list(lab.results())
    results = [
        r
        for r in results
        if r.meta.get("summary", True) or {"fig03_epochs", "fig08_leakage"} & set(r.meta.get("figures") or ())
    ]
    entries = []
    if results:
        for e in group(results, controls=("no-model",)):
            epochs = e.get("epoch") if e.get("epoch") is not None else e.meta.get("epochs")
            if (
                e.metrics is not None
                and not e.control
                and e.meta.get("protocol") == "controlled"
                and epochs
                and e.meta.get("n_train")
            ):
                entries.append((e, float(epochs) / float(e.meta["n_train"])))
    if not entries:
        raise NotAvailable(f"fig08_leakage: no result in profile {lab.profile_name} says its epochs and n_train")
    rows = [
        r
        for e, x in entries
        for r in make_rows(
            e, controls=("no-model",), x=x, n_train=e.meta["n_train"], knowledge=e.meta.get("knowledge", "")
        )
    ]
    table = pd.DataFrame(rows)
    methods = list(dict.fromkeys(table["method"]))
    fig, axes = _grid(len(methods), sharey=True, sharex=True)
    for ax, method in zip(axes, methods, strict=True):
        part = table[table["method"] == method]
        plots.draw_points(ax, part, xlabel="epochs per training image", ylabel="AUC" if _is_left(ax) else "")
        ax.set_title(plots.label_of(method))
        ax.tick_params(labelbottom=True)
    axes[0].set_ylim(*_limits(table))
    attack_only = table[(table["control"] == "") & table["seed"].isna()]
    ranks = attack_only[["x", "value"]].rank()
    rho = ranks["x"].corr(ranks["value"]) if len(ranks) > 2 and ranks["x"].nunique() > 1 else np.nan
    text = f"Leakage against epochs per training image, {len(attack_only)} results"
    plots.set_title(fig, text + (f": rank correlation {plots.format_value(rho)}" if np.isfinite(rho) else ""))
    plots.make_legend(fig, table, lines=False)
    return fig, table
