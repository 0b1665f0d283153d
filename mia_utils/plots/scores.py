"""Kinds of plot that need the scores behind a row of the results table: ROC curves and histograms."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from mia_utils.plots.kinds import draw_legend, make_panels, name_axes, prepare
from mia_utils.plots.style import CONTROLS, MEMBER_COLOR, NONMEMBER_COLOR, STYLE, Drawn, color_of, finish
from mia_utils.protocol import resampling
from mia_utils.protocol.metrics import RATES


def _prepare(table: pd.DataFrame, panel: Any, **columns: str) -> pd.DataFrame:
    data = prepare(table, "auc", panel=panel, key="key", **columns)
    return data[(data["control"] == "") & data["seed"].isna()]


@mpl.rc_context(STYLE)
def roc(
    table: pd.DataFrame, *, lab: Any, panel: Any = None, controls: Sequence[str] = ("no-model", "untrained"),
    **named: Any,
) -> Drawn:  # fmt: skip
    """Draw log-log ROC curves: mean over seeds, every seed a thin line, intervals at 10, 1, .1 % FPR, controls in gray.

    ``lab`` holds the scores of the attacks in the table and of their ``controls``; the rest as in :mod:`kinds`.
    """
    ends = [f"{name}{end}" for name in RATES.values() for end in ("", "_low", "_high")]
    data = _prepare(table, panel, **{name: name for name in ends if name in table})
    fig, panels = make_panels(data, height=2.5, sharey=True)
    curves, floor = [], 1.0 / max(int(data["n_nonmembers"].max()), 10)
    grid = np.geomspace(floor, 1, 60)
    for ax, part in panels:
        ax.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.15))
        name_axes(ax, "false positive rate", "true positive rate")
        ax.plot([floor, 1], [floor, 1], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)
        ax.grid(True, which="major")
        ax.minorticks_off()
        for row in part.to_dict("records"):
            results = lab.scores(row)
            known = [c for c in controls if all(c in r.controls and len(r.controls[c].score) for r in results)]
            for control in ("", *known):
                inputs = [x for r in results for x in (r.controls[control] if control else r).inputs]
                lines = resampling.measure_all(inputs, grid)[1]
                curves += _draw_curves(ax, row | {"control": control}, lines, grid)
    draw_legend(fig, pd.DataFrame(curves), marks="curve")
    columns = ["panel", "attack", "control", "method", "seed", "fpr", "tpr"]
    drawn = pd.DataFrame(curves)[columns].explode(["fpr", "tpr"]).astype({"fpr": float, "tpr": float})
    return finish(fig, drawn, rows=table, judged=table, **named)


def _draw_curves(ax: Any, row: dict, lines: list[np.ndarray], grid: np.ndarray) -> list[dict]:
    """Draw the mean and each of several seeds of an attack or control; returns what was drawn."""
    control, color = row["control"], color_of(row["attack"], row["control"])
    curves = [(None, np.mean(lines, axis=0)), *(enumerate(lines) if len(lines) > 1 and not control else ())]
    for seed, tpr in curves:
        style = dict(linewidth=1.0 if control else 1.5) if seed is None else dict(linewidth=0.5, alpha=0.6)
        dash = CONTROLS[control][3] if control else "-"
        # log axes: a rate of 0 leaves the panel at the bottom instead of breaking the line
        ax.plot(grid, np.clip(tpr, grid[0] / 3, None), color=color, linestyle=dash, **style)
    for rate, name in {} if control else RATES.items():
        if row.get(f"{name}_high", np.nan) > 0:
            ends = np.clip([row[f"{name}_low"], row[f"{name}_high"]], grid[0] / 3, None)
            ax.plot([rate, rate], ends, color=color, linewidth=3.0, alpha=0.35, solid_capstyle="butt")
    head = {name: row[name] for name in ("panel", "attack", "method", "control")}
    return [head | {"seed": seed, "fpr": grid, "tpr": tpr} for seed, tpr in curves]


@mpl.rc_context(STYLE)
def histogram(
    table: pd.DataFrame, *, lab: Any, panel: Any, xlabel: str = "score", bins: int = 30, **named: Any
) -> Drawn:
    """Draw the scores of members and non-members (first seed) as two histograms a panel, from .5 to 99.5 percentile."""
    fig, panels = make_panels(_prepare(table, panel), height=1.9)
    counts = []
    for ax, part in panels:
        result = lab.scores(part.iloc[0])[0]
        low, high = np.percentile(result.score, [0.5, 99.5])
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        for group, color, side in (("members", MEMBER_COLOR, True), ("non-members", NONMEMBER_COLOR, False)):
            score = np.clip(result.score[result.is_member == side], edges[0], edges[-1])
            share, dash = np.histogram(score, edges)[0] / max(len(score), 1), "-" if side else (0, (4, 1.5))
            ax.stairs(share, edges, fill=True, color=color, alpha=0.25)
            ax.stairs(share, edges, color=color, linewidth=1.2, linestyle=dash, label=group)
            found = {"bin_low": edges[:-1], "bin_high": edges[1:], "share": share}
            counts.append(pd.DataFrame({"panel": part["panel"].iloc[0], "group": group} | found))
        name_axes(ax, xlabel, "share of images")
    panels[0][0].legend(loc="upper left", handlelength=1.2)
    return finish(fig, pd.concat(counts), rows=table, **named)
