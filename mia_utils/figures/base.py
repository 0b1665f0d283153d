"""What the figures share: the registry, grouping of results over seeds, words for titles, panels."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from mia_utils import paths, plots
from mia_utils.protocol import metrics

# What makes two results the same experiment up to the seed. `model` is the model id without its seed, so rows that
# differ in something not listed here are still told apart.
_IDENTITY = (
    "attack", "control", "model", "method", "arch", "dataset", "protocol", "knowledge", "shadow_method", "epoch",
    "n_train", "epochs", "augmentation", "attacker", "defense", "strength", "known_share", "n_nonmembers",
    "rung", "params", "shadow", "reference", "decoder",
)  # fmt: skip
_ARCH_LABELS = (("vit", "ViT"), ("resnet", "ResNet"), ("swin", "Swin"), ("convnext", "ConvNeXt"))


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


def read_facts(result: Any) -> dict[str, Any]:
    meta = dict(result.meta)
    params = {k: v for k, v in (meta.get("params") or {}).items() if k != "seed"}
    return {
        **meta,
        "attack": meta.get("attack") or result.attack,
        "control": result.control or "",
        "model": split_seed(str(meta.get("model_id") or meta.get("model") or ""), meta.get("seed")),
        "params": params,
        # results saved before these were noted had none
        "shadow": split_seed(meta["shadow"], meta.get("seed")) if meta.get("shadow") else None,
        "reference": split_seed(meta["reference"], meta.get("seed")) if meta.get("reference") else None,
        "decoder": meta.get("decoder") or "own",
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


def inputs(result: Any) -> dict[str, Any]:
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
        _METRICS[key] = metrics.combine([inputs(r) for r in results], n_bootstrap=n_bootstrap)
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
        facts = read_facts(result)
        key = json.dumps([facts.get(name) for name in _IDENTITY], sort_keys=True, default=str)
        bucket = buckets.setdefault(key, {})
        seed = int(facts.get("seed") or 0)
        if seed in bucket and digest(bucket[seed]) != digest(result):
            raise ValueError(
                f"two results for {facts['attack']} on {facts['model']}, seed {seed}, differ: remove one of them"
            )
        bucket.setdefault(seed, result)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # most of a bootstrap lies outside the interpreter
        return list(pool.map(lambda b: make_entry(tuple(b[s] for s in sorted(b)), controls), buckets.values()))


def make_entry(results: tuple[Any, ...], controls: Sequence[str]) -> Entry:
    facts = read_facts(results[0])
    own = [r for r in results if len(r.score)]
    beside = {}
    for name in controls:
        twins = tuple(r.controls[name] for r in results if name in r.controls)
        if twins:
            beside[name] = make_entry(twins, ())
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


def load_entries(lab: Any, *names: str, controls: Sequence[str] = ("no-model", "untrained")) -> list[Entry]:
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
    return sort_entries(group(results, controls=controls))


def sort_entries(entries: Sequence[Entry]) -> list[Entry]:
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


def name_target(entry: Entry, entries: Sequence[Entry]) -> str:
    """Name a target by its method, and by whatever else tells it from the other targets of that method."""
    twins = [e for e in entries if e.meta.get("method") == entry.meta.get("method")]
    parts = [plots.label_of(entry.meta.get("method", ""))]
    for name in _TELLING:
        wide = entries if name == "dataset" else twins
        if len({str(e.meta.get(name)) for e in wide}) > 1:
            value = entry.meta.get(name)
            text = {"arch": name_arch(entry), "n_train": f"N {value}", "epochs": f"{value} epochs"}.get(
                name, str(value)
            )
            parts.append(_AUGMENTATIONS.get(text, f"{text} views") if name == "augmentation" else text)
            twins = [e for e in twins if str(e.meta.get(name)) == str(value)]
    # what the meta does not tell apart is told apart by the model's own name
    return str(entry.meta.get("model")) if len({e.meta.get("model") for e in twins}) > 1 else ", ".join(parts)


def name_arch(entry: Entry) -> str:
    arch = str(entry.meta.get("arch", ""))
    return next((label for prefix, label in _ARCH_LABELS if arch.startswith(prefix)), arch)


def join_words(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def format_auc(entry: Entry) -> str:
    return plots.format_value(entry.metrics.auc)


def say_interval(entry: Entry) -> str:
    return plots.format_interval(entry.metrics.auc, entry.metrics.auc_low, entry.metrics.auc_high)


def get_epoch(entry: Entry) -> int:
    """Epoch that was attacked: a checkpoint's, else the last."""
    epoch = entry.meta.get("epoch")
    return int(entry.meta.get("epochs") if epoch is None else epoch)


def leaks(entry: Entry) -> bool:
    return entry.metrics is not None and entry.metrics.auc_low > 0.5


def overlap(one: Entry, other: Entry) -> bool:
    return one.metrics.auc_low <= other.metrics.auc_high and other.metrics.auc_low <= one.metrics.auc_high


def say_leaks(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Sentence: on which targets the attack sees members, and where it is not shown to."""
    yes = [f"{n} ({format_auc(e)})" for e, n in zip(entries, names, strict=True) if leaks(e)]
    no = [f"{n} ({format_auc(e)})" for e, n in zip(entries, names, strict=True) if not leaks(e)]
    attack = join_words([plots.label_of(e.meta["attack"]) for e in entries])
    if not yes:
        return f"{attack} is not shown to tell members from strangers on {join_words(no)}"
    text = f"{attack} tells members from strangers on {join_words(yes)}"
    return text + (f"; not shown on {join_words(no)}" if no else "")


def make_panels(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Entries by target, in the order of appearance."""
    panels: dict[str, list[Entry]] = {}
    for entry in entries:
        panels.setdefault(name_target(entry, entries), []).append(entry)
    return list(panels.items())


def make_grid(n: int, *, most: int = 3, height: float = 2.3, **options: Any):
    """Make a figure with n panels, at most ``most`` a row (four make a square); unused axes are removed."""
    cols = 2 if n == 4 else min(n, most)
    rows = -(-n // cols)
    width = plots.FULL if cols > 1 else plots.HALF * 1.3
    fig, axes = plots.make_figure(rows, cols, width=width, height=height * rows + 0.55, **options)
    flat = list(axes.flat)
    for ax in flat[n:]:
        ax.remove()
    return fig, flat[:n]


def is_left(ax) -> bool:
    return ax.get_subplotspec().is_first_col()


def pick_limits(table: pd.DataFrame) -> tuple[float, float]:
    values = table[["value", "low", "high"]].to_numpy(float)
    return max(0.0, min(0.42, np.nanmin(values) - 0.02)), min(1.02, max(0.62, np.nanmax(values) + 0.03))


def draw_sweep(
    lab: Any, name: str, *, of: str, xlabel: str, say: str, log: bool = False
) -> tuple[Canvas, pd.DataFrame]:
    """Panels of AUC over a swept number, one per target; ``say`` words the number, as in ``"with {} crops"``."""

    def value(entry: Entry) -> float | None:
        # a model at the end of training has no epoch of its own: it stands at its last one
        found = entry.get(of, entry.meta.get("epochs") if of == "epoch" else None)
        return None if found is None else float(found)

    entries = [e for e in load_entries(lab, name) if value(e) is not None and e.metrics is not None]
    if not entries:
        raise NotAvailable(f"{name}: the saved scores carry no parameter {of}")
    panels = make_panels(entries)
    rows = []
    for target, part in panels:
        for e in part:
            rows += make_rows(e, controls=("no-model", "untrained"), target=target, x=value(e))
    table = pd.DataFrame(rows)
    fig, axes = make_grid(len(panels), sharey=True)
    for ax, (target, _) in zip(axes, panels, strict=True):
        plots.draw_sweep(
            ax, table[table["target"] == target], xlabel=xlabel, log=log, ylabel="AUC" if is_left(ax) else ""
        )
        ax.set_title(target)
    axes[0].set_ylim(*pick_limits(table))
    lead = max(entries, key=lambda e: e.metrics.auc)
    line = sorted((e for e in entries if same_line(e, lead)), key=value)
    ends = [line[0], line[-1]] if len(line) > 1 else [lead]
    text = ", ".join(f"{format_auc(e)} {say.format(f'{value(e):,g}')}" for e in ends)
    if len(ends) > 1 and overlap(*ends):
        text += "; the intervals overlap"
    plots.set_title(fig, f"{name_target(lead, entries)}: AUC {text}")
    plots.make_legend(fig, table, seeds=True)
    return fig, table


def same_line(one: Entry, other: Entry) -> bool:
    return all(
        one.meta.get(k) == other.meta.get(k) for k in ("attack", "model", "knowledge", "protocol", "shadow_method")
    )


def draw_choice(
    lab: Any,
    name: str,
    label: Callable[[Entry], str | None],
    *,
    say: Callable[[Entry], str] | str,
    order: Sequence[str] = (),
) -> tuple[Canvas, pd.DataFrame]:
    """Panels of dots and intervals over named choices, one per target; controls in grey on the line of their attack."""
    entries = [e for e in load_entries(lab, name) if label(e) is not None and e.metrics is not None]
    if not entries:
        raise NotAvailable(f"{name}: the saved scores do not say which choice they used")
    panels = make_panels(entries)
    rows = []
    for target, part in panels:
        if order:
            part.sort(key=lambda e: order.index(label(e)) if label(e) in order else len(order))
        for e in part:
            rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=label(e))
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    lead = max(entries, key=lambda e: e.metrics.auc)
    worst = min((e for e in entries if e.meta.get("model") == lead.meta.get("model")), key=lambda e: e.metrics.auc)
    word = say if callable(say) else lambda e: f"{say} {label(e)}"
    text = f"{name_target(lead, entries)}: AUC {format_auc(lead)} with {word(lead)}"
    if worst is not lead:
        text += f", {format_auc(worst)} with {word(worst)}" + (
            "; the intervals overlap" if overlap(lead, worst) else ""
        )
    plots.set_title(fig, text)
    plots.make_legend(fig, table, lines=False)
    return fig, table


def draw_choices(table: pd.DataFrame) -> Canvas:
    """Draw one panel of dots and intervals per ``target``; lines are ``label``, controls stand on the same line."""
    targets = list(dict.fromkeys(table["target"]))
    lines = [list(dict.fromkeys(table.loc[table["target"] == t, "label"])) for t in targets]
    same = all(names == lines[0] for names in lines)
    short = same and max(len(str(v)) for v in table["label"]) <= 14
    keys = (
        table.groupby(["target", "label"])[["attack", "control"]].apply(lambda part: len(part.drop_duplicates())).max()
    )
    height = max(map(len, lines)) * max(0.2, 0.1 * keys) + 0.6
    fig, axes = make_grid(len(targets), most=3 if short else 2, height=height, sharey=same and len(targets) > 1)
    for ax, target in zip(axes, targets, strict=True):
        plots.draw_intervals(ax, table[table["target"] == target], annotate="attack")
        ax.set_xlim(*pick_limits(table))
        ax.set_title(target)
    return fig


def make_roc_rows(entry: Entry, controls: Sequence[str], **columns: Any) -> list[pd.DataFrame]:
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


def name_knowledge(entry: Entry) -> str:
    knowledge = str(entry.meta.get("knowledge", ""))
    if not knowledge.startswith("shadow"):
        return knowledge
    shadow, method = entry.meta.get("shadow_method"), entry.meta.get("method")
    return "shadow, same method" if shadow in (None, "", method) else f"cross: {plots.label_of(shadow)} shadow"


def say_knowledge(entry: Entry) -> str:
    name = name_knowledge(entry)
    if name == "shadow, same method":
        return "a shadow of the same method"
    return (
        name.replace("cross: ", "a shadow of ").removesuffix(" shadow")
        if name.startswith("cross")
        else f"{name} knowledge"
    )


# ------------------------------------------------------------------------------- figures that several notebooks draw


def draw_table(
    panels: Sequence[tuple[str, Sequence[Entry]]],
    *,
    controls: Sequence[str],
    name: Callable[[Entry, Sequence[Entry]], str],
    row_height: float,
) -> tuple[Any, pd.DataFrame]:
    """Draw the attack table: AUC and TPR at 1 % FPR of every attack, the controls of the first below each target.

    Args:
        panels: targets and their entries (:func:`make_panels`), in the order they are drawn.
        controls: names of the controls.
        name: names the line of an entry among those of its target.
        row_height: inches of a line.

    Returns:
        figure without title, table.
    """
    rows = []
    for target, part in panels:
        shown = [(e, e) for e in part]
        shown += [(part[0], part[0].controls[c]) for c in controls if c in part[0].controls]
        for owner, one in shown:
            if one.metrics is None:
                continue
            m, at = one.metrics, one.metrics.tpr_at.get(0.01)
            label = plots.label_of(one.control) if one.control else name(owner, part)
            for row in make_rows(one, target=target, label=f"{target}: {label}", knowledge=owner.meta.get("knowledge")):
                if np.isnan(row["seed"]):
                    row |= {"n_members": m.n_members, "n_nonmembers": m.n_nonmembers, "p_value": m.p_value}
                    row |= {"balanced_accuracy": m.balanced_accuracy}
                    row |= dict(zip(("tpr_at_1", "tpr_at_1_low", "tpr_at_1_high"), at or (np.nan,) * 3, strict=True))
                rows.append(row)
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 2, height=row_height * table["label"].nunique() + 0.95, sharey=True)
    plots.draw_intervals(axes[0, 0], table)
    axes[0, 0].set_xlim(*pick_limits(table))
    if table["tpr_at_1"].notna().any():
        rates = table[table["seed"].isna()].drop(columns=["value", "low", "high"])
        rates = rates.rename(columns={"tpr_at_1": "value", "tpr_at_1_low": "low", "tpr_at_1_high": "high"})
        plots.draw_intervals(axes[0, 1], rates, xlabel="TPR at 1 % FPR", chance=0.01)
        axes[0, 1].set_xlim(left=-0.01)
    else:
        text = "TPR at 1 % FPR is not shown:\nfewer than 1,000 strangers"
        axes[0, 1].text(0.5, 0.5, text, transform=axes[0, 1].transAxes, ha="center", va="center")
        axes[0, 1].set_axis_off()
    return fig, table


def draw_n_train(name: str, entries: Sequence[Entry]) -> tuple[Any, pd.DataFrame]:
    """Draw AUC over the number of training pictures.

    Args:
        name: of the figure, for the message where there is one number only.
        entries: in the order of ``n_train``.

    Returns:
        figure without title and legend, table with ``x``, ``epoch`` and ``pictures_shown``.
    """
    if len({e.meta["n_train"] for e in entries}) < 2:
        raise NotAvailable(f"{name}: one number of training pictures only; see profile photos")
    rows = []
    for e in entries:
        facts = dict(x=float(e.meta["n_train"]), epoch=get_epoch(e), pictures_shown=e.meta["n_train"] * get_epoch(e))
        rows += make_rows(e, controls=("no-model", "untrained"), **facts)
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, width=plots.HALF * 1.3, height=2.6)
    plots.draw_sweep(axes[0, 0], table, xlabel="training pictures (N)", log=True)
    axes[0, 0].set_ylim(*pick_limits(table))
    return fig, table
