"""Figures of notebook 08: all attacks and targets together."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mia_utils import plots
from mia_utils.figures.base import (
    Entry,
    NotAvailable,
    figure,
    format_auc,
    group,
    is_left,
    join_words,
    leaks,
    load_entries,
    make_grid,
    make_rows,
    name_knowledge,
    name_target,
    pick_limits,
    sort_entries,
)
from mia_utils.runner.profiles import SEGMENTERS

# ------------------------------------------------------------------------------------------------------ notebook 08


def summarize(lab: Any, *, controls: Sequence[str] = ("no-model", "untrained", "permuted")) -> list[Entry]:
    """Entries of the summary table: everything saved that asked to be in it, and every defense at every strength."""
    results = [r for r in lab.results() if r.meta.get("summary", True) or is_defended(r.meta)]
    if not results:
        raise NotAvailable(f"no saved scores in profile {lab.profile_name}; run the notebooks first")
    return sort_entries(group(results, controls=controls))


def is_defended(meta: Mapping[str, Any]) -> bool:
    """Whether something was done against the attack: notebook 07."""
    return meta.get("defense") not in (None, "", "none")


@figure(
    "fig08_hero", notebook="08_figures", title="Attack x target grid with its controls below", needs="any attack result"
)
def _draw_overview(lab):
    entries = [
        e
        for e in summarize(lab)
        if e.metrics is not None
        and e.meta.get("protocol") == "controlled"
        and not e.control
        # rows of single studies report on fewer strangers and have figures of their own
        and e.meta.get("n_nonmembers") is None
        and not is_defended(e.meta)
    ]
    if not entries:
        raise NotAvailable(f"fig08_hero: no result under the controlled protocol in profile {lab.profile_name}")
    kinds: dict[bool, set[str]] = {}  # of attackers, for encoders and for segmenters
    for e in entries:
        kinds.setdefault(e.meta.get("method") in SEGMENTERS, set()).add(name_knowledge(e))

    def name(entry):
        text = plots.label_of(entry.meta["attack"])
        return text + (f", {name_knowledge(entry)}" if len(kinds[entry.meta.get("method") in SEGMENTERS]) > 1 else "")

    # one cell per attack, knowledge and target: the result at the end of training with the most seeds
    cells: dict[tuple[str, str], Entry] = {}
    for e in entries:
        key = (name(e), name_target(e, entries))
        if key not in cells or (e.metrics.n_seeds, e.get("epoch", 0)) > (
            cells[key].metrics.n_seeds,
            cells[key].get("epoch", 0),
        ):
            cells[key] = e
    attacks = list(dict.fromkeys(r for r, _ in cells))
    rows = [r for (row, column), e in cells.items() for r in make_rows(e, row=row, column=column)]
    for control in ("no-model", "untrained", "permuted"):
        worst: dict[str, Entry] = {}  # of each target, of those with the most seeds, the one that came out highest

        def rank(entry: Entry, control: str = control) -> tuple[int, float]:
            return entry.controls[control].metrics.n_seeds, entry.controls[control].metrics.auc

        for (_, column), e in cells.items():
            twin = e.controls.get(control)
            if twin is None or twin.metrics is None:
                continue
            if column not in worst or rank(e) > rank(worst[column]):
                worst[column] = e
        label = plots.label_of(control) + ("" if control == "no-model" else ", the highest")
        for column, e in worst.items():
            rows += [r for r in make_rows(e, controls=(control,), row=label, column=column) if r["control"] == control]
    table = pd.DataFrame(rows)
    columns = list(dict.fromkeys(table["column"]))
    # attacks on segmenters ask no encoder, and the other way round: two blocks, attacks as rows and as columns
    below = table["method"].isin(SEGMENTERS)
    blocks = {False: table[~below], True: table[below].rename(columns={"row": "column", "column": "row"})}
    blocks = {k: part for k, part in blocks.items() if len(part)}
    heights = [part["row"].nunique() for part in blocks.values()]
    widest = max(part["column"].nunique() for part in blocks.values())
    size = 0.36 * sum(heights) + 0.9 * len(blocks)
    fig, axes = plots.make_figure(len(blocks), 1, height=size, height_ratios=heights)
    for ax, (segmenters, part) in zip(axes[:, 0], blocks.items(), strict=True):
        wrap = {"row": 22, "column": 12 if widest < 10 else 9}
        short = part.assign(
            **{k: ["\n".join(textwrap.wrap(t, n, break_long_words=False)) for t in part[k]] for k, n in wrap.items()}
        )
        n_head = {k: len(set(part[k]) & set(attacks)) or None for k in wrap}
        told = f"attackers of segmenters: {join_words(kinds[True])}" if segmenters and len(kinds[True]) == 1 else ""
        plots.draw_matrix(ax, short, n_head=n_head["row"], n_left=n_head["column"], n_columns=widest, xlabel=told)
    yes = sum(leaks(e) for e in cells.values())
    text = f"{yes} of {len(cells)} attack results on {len(columns)} targets lie above chance"
    plots.set_title(fig, text + " (lower end of the interval above .5); controls below the line")
    return fig, table


_ALONG_TRAINING = {"fig03_epochs", "fig04_epochs", "fig05_epochs", "fig06_epochs", "fig08_leakage"}


@figure(
    "fig08_leakage",
    notebook="08_figures",
    title="Leakage against epochs per training image",
    needs="targets of several lengths, or checkpoints",
)
def _draw_leakage(lab):
    results = list(lab.results())
    results = [r for r in results if r.meta.get("summary", True) or _ALONG_TRAINING & set(r.meta.get("figures") or ())]
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
                and not is_defended(e.meta)
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
    fig, axes = make_grid(len(methods), sharey=True, sharex=True)
    for ax, method in zip(axes, methods, strict=True):
        part = table[table["method"] == method]
        plots.draw_points(ax, part, xlabel="epochs per training image", ylabel="AUC" if is_left(ax) else "")
        ax.set_title(plots.label_of(method))
        ax.tick_params(labelbottom=True)
    axes[0].set_ylim(*pick_limits(table))
    attack_only = table[(table["control"] == "") & table["seed"].isna()]
    ranks = attack_only[["x", "value"]].rank()
    rho = ranks["x"].corr(ranks["value"]) if len(ranks) > 2 and ranks["x"].nunique() > 1 else np.nan
    text = f"Leakage against epochs per training image, {len(attack_only)} results"
    plots.set_title(fig, text + (f": rank correlation {plots.format_value(rho)}" if np.isfinite(rho) else ""))
    plots.make_legend(fig, table, lines=False)
    return fig, table


# methods of the comparison, in the order of its columns; rows of other studies (sizes, mask ratios ...) are not in it
_FAMILIES = ("mae", "simmim", "dino", "moco", "moco-v2", "simclr", "supervised")


@figure(
    "fig08_encoders",
    notebook="08_figures",
    title="Every encoder attack on every training method",
    paper_item="all encoder papers: comparison of attacks",
    needs="targets of several training methods; notebook 05 runs the attacks",
)
def _draw_encoders(lab):
    entries = [
        e for e in load_entries(lab, "fig08_encoders", controls=("no-model", "untrained", "permuted")) if e.metrics
    ]
    attacks = list(dict.fromkeys(a for a in plots.ATTACK_COLORS if any(e.meta["attack"] == a for e in entries)))
    methods = [m for m in _FAMILIES if any(e.meta["method"] == m for e in entries)]
    cells = {(name_attack(e), e.meta["method"]): e for e in entries}
    names = list(dict.fromkeys(sorted((name for name, _ in cells), key=lambda n: _place(n, attacks))))
    rows = []
    for name in names:
        for method in methods:
            if (name, method) in cells:
                rows += make_rows(cells[name, method], row=name, column=plots.label_of(method))
    for method in methods:  # asked of no model, so one row serves all attacks on the same pictures
        blind = next((e.controls["no-model"] for e in entries if e.meta["method"] == method and e.controls), None)
        if blind is not None and blind.metrics:
            owner = next(e for e in entries if e.meta["method"] == method and e.controls)
            found = make_rows(owner, controls=("no-model",), row="no model", column=plots.label_of(method))
            rows += [r for r in found if r["control"]]
    for name in names:
        for method in methods:
            entry = cells.get((name, method))
            twin = entry.controls.get("untrained") if entry else None
            if twin is not None and twin.metrics:
                found = make_rows(
                    entry, controls=("untrained",), row=f"untrained, {name}", column=plots.label_of(method)
                )
                rows += [r for r in found if r["control"]]
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, width=plots.FULL, height=0.36 * table["row"].nunique() + 1.0)
    plots.draw_matrix(axes[0, 0], table, xlabel="target trained with", n_head=len(names))
    best = {}
    for (name, method), e in cells.items():
        if leaks(e) and (method not in best or e.metrics.auc > best[method][1].metrics.auc):
            best[method] = (name, e)
    said = [f"{plots.label_of(m)} {best[m][0]} ({format_auc(best[m][1])})" for m in methods if m in best]
    none = [plots.label_of(m) for m in methods if m not in best]
    text = "Best attack above chance: " + ", ".join(said) if said else "No attack lies above chance"
    plots.set_title(fig, text + (f"; none on {join_words(none)}" if none else ""))
    return fig, table


def name_attack(entry: Entry) -> str:
    """Name an attack, and whose decoder it asks where that is not the model's own."""
    name = plots.label_of(entry.meta["attack"])
    return f"{name}, own decoder" if entry.meta.get("decoder") == "attacker" else name


def _place(name: str, attacks: Sequence[str]) -> int:
    return next((i for i, a in enumerate(attacks) if name.split(",")[0] == plots.label_of(a)), len(attacks))


@figure(
    "fig08_queries",
    notebook="08_figures",
    title="Quality of an attack against the queries it makes per image",
    needs="the sweeps of notebooks 03, 04 and 05",
)
def _draw_queries(lab):
    names = ("fig08_queries", "fig03_crop_number", "fig04_masks", "fig05_views", "fig08_encoders")
    entries = [e for e in load_entries(lab, *names, controls=("no-model",)) if e.metrics and e.get("queries")]
    # one setting per attack: the default of everything but the number of queries
    panels = {}
    for e in entries:
        panels.setdefault(e.meta["method"], []).append(e)
    panels = {m: p for m, p in panels.items() if len({(e.meta["attack"], e.get("queries")) for e in p}) > 2}
    if not panels:
        raise NotAvailable(f"fig08_queries: no target in profile {lab.profile_name} was attacked with several budgets")
    rows = []
    for method, part in panels.items():
        target, spent = plots.label_of(method), [float(e.get("queries")) for e in part]
        for e, x in zip(part, spent, strict=True):
            rows += make_rows(e, target=target, x=x)
        owner = next((e for e in part if "no-model" in e.controls and e.controls["no-model"].metrics), None)
        blind = make_rows(owner, controls=("no-model",), target=target) if owner else []  # it spends no query at all
        rows += [{**r, "x": x} for r in blind if r["control"] and np.isnan(r["seed"]) for x in (min(spent), max(spent))]
    table = pd.DataFrame(rows).drop_duplicates(["target", "attack", "control", "x", "seed"])
    fig, axes = make_grid(len(panels), sharey=True, height=2.5)
    for ax, target in zip(axes, dict.fromkeys(table["target"]), strict=True):
        plots.draw_sweep(
            ax, table[table["target"] == target], xlabel="queries per image", log=True,
            ylabel="AUC" if is_left(ax) else "", ticks=[1, 4, 16, 64, 256],
        )  # fmt: skip
        ax.set_title(target)
    axes[0].set_ylim(*pick_limits(table))
    cheap = max(
        (e for part in panels.values() for e in part if e.get("queries") <= 4),
        key=lambda e: e.metrics.auc,
        default=None,
    )
    best = max((e for part in panels.values() for e in part), key=lambda e: e.metrics.auc)
    where = plots.label_of(best.meta["method"])
    text = f"Best: {name_attack(best)} on {where}, AUC {format_auc(best)} for {best.get('queries')} queries"
    if cheap is not None and cheap is not best:
        text += f"; {name_attack(cheap)} reaches {format_auc(cheap)} for {cheap.get('queries')}"
    plots.set_title(fig, text)
    plots.make_legend(fig, table, seeds=True)
    return fig, table
