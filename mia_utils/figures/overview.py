"""Figures of notebook 08: all attacks and targets together."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mia_utils import plots
from mia_utils.figures.base import (
    Entry,
    NotAvailable,
    figure,
    group,
    is_left,
    leaks,
    make_grid,
    make_rows,
    name_knowledge,
    name_target,
    pick_limits,
    sort_entries,
)

# ------------------------------------------------------------------------------------------------------ notebook 08


def summarize(lab: Any, *, controls: Sequence[str] = ("no-model", "untrained", "permuted")) -> list[Entry]:
    """Entries of the summary table: everything saved that asked to be in it."""
    results = [r for r in lab.results() if r.meta.get("summary", True)]
    if not results:
        raise NotAvailable(f"no saved scores in profile {lab.profile_name}; run the notebooks first")
    return sort_entries(group(results, controls=controls))


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
        return text + (f", {name_knowledge(entry)}" if several else "")

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
    yes = sum(leaks(e) for e in cells.values())
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
