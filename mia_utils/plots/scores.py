"""Kinds of plot that need the scores behind a row of the results table: ROC curves and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mia_utils.plots.kinds import draw_legend, make_panels, make_title, prepare
from mia_utils.plots.style import CONTROLS, MEMBER_COLOR, NONMEMBER_COLOR, STYLE, Drawn, color_of, finish


def roc(
    table: pd.DataFrame,
    *,
    lab: Any,
    title: Any,
    panel: Any = None,
    controls: Sequence[str] = ("no-model", "untrained"),
    **named: Any,
) -> Drawn:
    """Draw log-log ROC curves: mean over seeds with its band, every seed a thin line, controls in gray.

    Args:
        table: rows of ``lab.results`` of attacks (their controls are found beside them).
        lab: whose saved scores hold the curves.
        title, panel: as in :func:`sweep`.
        controls: drawn beside each attack.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(table, "auc", panel=panel or (lambda t: ""), key="key")
    data = data[(data["control"] == "") & data["seed"].isna()]
    fig, panels = make_panels(data, height=2.5, sharey=True)
    curves, floor = [], 1.0 / max(int(data["n_nonmembers"].max()), 10)
    with mpl.rc_context(STYLE):
        for ax, part in panels:
            ax.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.15), xlabel="false positive rate")
            ax.set_ylabel("true positive rate" if ax.get_subplotspec().is_first_col() else "")
            ax.plot([floor, 1], [floor, 1], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)
            ax.grid(True, which="major")
            ax.minorticks_off()
            for row in part.to_dict("records"):
                seeds = lab.scores(row)
                for control in (
                    "",
                    *[c for c in controls if all(c in r.controls and len(r.controls[c].score) for r in seeds)],
                ):
                    curves += _draw_roc(ax, [r.controls[control] if control else r for r in seeds], row, control, floor)
    draw_legend(fig, pd.DataFrame(curves), marks="curve")
    columns = ["panel", "attack", "control", "method", "seed", "fpr", "tpr"]
    return finish(fig, pd.DataFrame(curves)[columns].explode(["fpr", "tpr"]), title=make_title(title, table), **named)


def _draw_roc(ax: Axes, results: list, row: dict, control: str, floor: float) -> list[dict]:
    color, grid = color_of(row["attack"], control), np.geomspace(floor, 1, 60)
    lines = []
    for result in results:
        found = result.metrics.roc
        lines.append(np.interp(grid, found.fpr, found.tpr))
    head = {name: row.get(name) for name in ("panel", "attack", "method")} | {"control": control}
    curves = [head | {"seed": None, "fpr": grid, "tpr": np.mean(lines, axis=0)}]
    alone = lines if len(lines) > 1 and not control else []
    curves += [head | {"seed": i, "fpr": grid, "tpr": line} for i, line in enumerate(alone)]
    for curve in curves:  # log axes: a rate of 0 leaves the panel at the bottom instead of breaking the line
        style = dict(linewidth=0.5, alpha=0.6) if curve["seed"] is not None else dict(linewidth=1.0 if control else 1.5)
        ax.plot(
            grid,
            np.clip(curve["tpr"], floor / 3, None),
            color=color,
            linestyle=CONTROLS[control][3] if control else "-",
            **style,
        )
    if not control and len(results) == 1:
        found = results[0].metrics.roc
        ax.fill_between(
            found.fpr,
            np.clip(found.low, floor / 3, None),
            np.clip(found.high, floor / 3, None),
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    return curves


def histogram(
    table: pd.DataFrame, *, lab: Any, title: Any, panel: Any, xlabel: str = "score", bins: int = 30, **named: Any
) -> Drawn:
    """Draw the scores of members and non-members as a pair of histograms a panel (first seed).

    Args:
        table: rows of ``lab.results``.
        lab: whose saved scores are drawn.
        title, panel: as in :func:`sweep`.
        xlabel: name of the score, higher = more likely a member.
        bins: number of equal bins between the .5 and 99.5 percentile.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(table, "auc", panel=panel, key="key")
    data = data[(data["control"] == "") & data["seed"].isna()]
    fig, panels = make_panels(data, height=1.9)
    counts = []
    with mpl.rc_context(STYLE):
        for ax, part in panels:
            result = lab.scores(part.iloc[0])[0]
            low, high = np.percentile(result.score, [0.5, 99.5])
            edges = np.linspace(low, high if high > low else low + 1, bins + 1)
            for group, color, side in (("members", MEMBER_COLOR, True), ("non-members", NONMEMBER_COLOR, False)):
                score = np.clip(result.score[result.is_member == side], edges[0], edges[-1])
                share = np.histogram(score, edges)[0] / max(len(score), 1)
                ax.stairs(share, edges, fill=True, color=color, alpha=0.25)
                ax.stairs(
                    share, edges, color=color, linewidth=1.2, linestyle="-" if side else (0, (4, 1.5)), label=group
                )
                head = {"panel": part["panel"].iloc[0], "group": group}
                counts += [
                    head | {"bin_low": a, "bin_high": b, "share": s}
                    for a, b, s in zip(edges, edges[1:], share, strict=False)
                ]
            ax.set(xlabel=xlabel, ylabel="share of images" if ax.get_subplotspec().is_first_col() else "")
        panels[0][0].legend(loc="upper left", handlelength=1.2)
    return finish(fig, pd.DataFrame(counts), title=make_title(title, table), **named)
