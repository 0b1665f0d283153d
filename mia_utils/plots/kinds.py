"""Six kinds of plot over the results table; a figure of the book is a query and one of these calls.

All take rows of ``lab.results`` (columns ``auc, auc_low, auc_high, attack, control, method, seed`` ...), the finding as
``title`` (words, or a rule of ``say`` that makes them from the table), and ``name``, under which PNG and CSV are written.
Columns may also be given as functions of the table: ``panel=lambda t: ...``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mia_utils.plots.style import (
    CONTROLS,
    FULL,
    INK,
    STYLE,
    Drawn,
    color_of,
    draw_chance,
    finish,
    format_interval,
    format_value,
    label_of,
    make_figure,
    marker_of,
)

_DIVERGING = sns.diverging_palette(25, 245, s=85, l=50, as_cmap=True)  # below .5, .5, above
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))
_KEEP = (
    "attack",
    "control",
    "target",
    "method",
    "knowledge",
    "shadow",
    "seed",
    "n_seeds",
    "verdict",
    "n_members",
    "n_nonmembers",
)


def prepare(table: pd.DataFrame, value: str, **columns: Any) -> pd.DataFrame:
    """Rows with the columns a kind draws: ``value, low, high`` and each given column, missing values left out."""
    if table.empty:
        raise ValueError("expected rows of lab.results to draw, got none: does the query name a study of this profile?")
    made = {
        name: column(table) if callable(column) else (table[column] if column else "")
        for name, column in columns.items()
    }
    table = table.assign(**{"control": table["control"].fillna(""), **made})
    table = table.assign(value=table[value].astype(float))
    for end in ("low", "high"):
        table[end] = table[f"{value}_{end}"].astype(float) if f"{value}_{end}" in table else np.nan
    for name in ("label", "panel", "line", "row", "column"):  # an empty fact is a name like any other
        if name in columns:
            table[name] = table[name].astype(object).where(table[name].notna(), "")
    kept = [*columns, *(c for c in _KEEP if c in table and c not in columns), "value", "low", "high"]
    return table.loc[table["value"].notna(), kept]


def make_title(title: str | Callable, table: pd.DataFrame) -> str:
    return title(table) if callable(title) else title


def make_panels(table: pd.DataFrame, *, height: float, cols: int = 3, width: float | None = None, **options: Any):
    names = list(dict.fromkeys(table["panel"]))
    cols = 2 if len(names) == 4 else min(len(names), cols)
    rows = -(-len(names) // cols)
    fig, axes = make_figure(
        rows, cols, width=width or (FULL if cols > 1 else 4.6), height=height * rows + 0.6, **options
    )
    for ax in list(axes.flat)[len(names) :]:
        ax.remove()
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(label_of(name), fontsize=STYLE["axes.titlesize"])
    return fig, [(ax, table[table["panel"] == name]) for ax, name in zip(axes.flat, names, strict=False)]


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    values = table[["value", "low", "high"]].to_numpy(float)
    return max(0.0, min(0.42, np.nanmin(values) - 0.02)), min(1.02, max(0.62, np.nanmax(values) + 0.03))


def draw_legend(fig: Figure, table: pd.DataFrame, *, marks: str, chance: bool | str = True) -> None:
    """One legend under the panels with the marks that are drawn: ``"dot"``, ``"line"``, ``"curve"`` (no markers)."""
    handles = []
    for attack in dict.fromkeys(table.loc[table["control"] == "", "attack"]):
        style = dict(linestyle="-", marker="o" if marks == "dot" else "")
        handles.append(Line2D([], [], color=color_of(attack), label=label_of(attack), **style))
    for control in dict.fromkeys(table.loc[table["control"] != "", "control"]):
        label, color, marker, dash = CONTROLS[control]
        style = dict(linestyle="-" if marks == "dot" else dash, marker="" if marks == "curve" else marker)
        handles.append(Line2D([], [], color=color, label=label, linewidth=1.0, markersize=3.5, **style))
    if "seed" in table and table["seed"].nunique() > 1:
        seed = dict(linestyle="none", marker=".", markersize=3) if marks == "dot" else dict(linewidth=0.5)
        handles.append(Line2D([], [], color="#777777", label="one seed each", **seed))
    if chance:
        said = chance if isinstance(chance, str) else "chance"
        handles.append(Line2D([], [], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), label=said))
    with mpl.rc_context(STYLE):
        per_row = max(2, int(fig.get_size_inches()[0] / 1.25))
        fig.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), per_row), handlelength=2.4)


def sweep(
    table: pd.DataFrame, *, x: Any, title: Any, panel: Any = None, line: Any = None, value: str = "auc", xlabel: str = "",
    ylabel: str = "AUC", log: bool = False, chance: float | None = 0.5, ylim: tuple[float, float] | None = None, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw values over a swept number: line, 95 % band, dots; every seed a thin line; controls in gray.

    Args:
        table: rows of ``lab.results``.
        x: column of the swept number.
        title: the finding, or a rule of ``say``.
        panel: column that gives each value its own axes.
        line: column that tells lines of one attack apart; named at their ends.
        value: column that is drawn, with ``<value>_low`` and ``<value>_high``.
        xlabel, ylabel: names of the axes.
        log: logarithmic x axis (0 stands at its left end).
        chance: where chance lies, or None.
        ylim: limits of the value axis; None: from the values.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(table, value, x=x, panel=panel or (lambda t: ""), line=line or (lambda t: ""))
    data["x"] = data["x"].astype(float)
    fig, panels = make_panels(data, height=2.3, sharey=chance is not None)
    with mpl.rc_context(STYLE):
        for ax, part in panels:
            _draw_sweep(ax, part, log=log, chance=chance)
            ax.set(xlabel=xlabel or str(x), ylabel=ylabel if ax.get_subplotspec().is_first_col() else "")
            if ylim or chance == 0.5:
                ax.set_ylim(ylim or _limits(data))
    draw_legend(fig, data, marks="line", chance=chance is not None)
    return finish(fig, data, title=make_title(title, table), **named)


def _draw_sweep(ax: Axes, part: pd.DataFrame, *, log: bool, chance: float | None) -> None:
    if log:
        positive = part.loc[part["x"] > 0, "x"]
        ax.set_xscale("symlog", linthresh=positive.min(), linscale=0.5) if (part["x"] <= 0).any() else ax.set_xscale(
            "log"
        )
    if chance is not None:
        draw_chance(ax, value=chance)
    lines = list(dict.fromkeys(part.loc[part["control"] == "", "line"]))
    for (attack, control, method, line), rows in part.groupby(
        ["attack", "control", "method", "line"], sort=False, dropna=False
    ):
        color = color_of(attack, control)
        dash = CONTROLS[control][3] if control in CONTROLS else _DASHES[lines.index(line) % len(_DASHES)]
        for _, one in rows[rows["seed"].notna()].sort_values("x", kind="stable").groupby("seed"):
            ax.plot(one["x"], one["value"], color=color, linewidth=0.5, alpha=0.5)
        mean = rows[rows["seed"].isna()].sort_values("x", kind="stable")
        ax.fill_between(mean["x"], mean["low"], mean["high"], color=color, alpha=0.07 if control else 0.16, linewidth=0)
        ax.plot(mean["x"], mean["value"], color=color, linestyle=dash, linewidth=0.9 if control else 1.4)
        style = dict(marker=marker_of(method, control), markersize=3.5 if control else 4.5)
        ax.plot(mean["x"], mean["value"], linestyle="none", color=color, **style)
        if len(lines) > 1 and not control and len(mean):
            end = mean.iloc[-1]
            at = dict(
                xytext=(5, 0), textcoords="offset points", va="center", fontsize=6.5, color=INK, annotation_clip=False
            )
            ax.annotate(label_of(line), (end["x"], end["value"]), **at)
    ticks = sorted(set(part["x"].dropna()))
    if len(ticks) <= 9:
        ax.set_xticks(ticks, [f"{t:,g}" for t in ticks], rotation=45 if log and len(ticks) > 5 else 0)
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.grid(True)


def dots(
    table: pd.DataFrame, *, label: Any, title: Any, panel: Any = None, value: str = "auc", xlabel: str = "AUC",
    chance: float | None = 0.5, xlim: tuple[float, float] | None = None, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw a dot with its interval per line: attacks in color, controls in gray on the line they belong to.

    Args:
        table: rows of ``lab.results``; lines stand in the order of first appearance.
        label: column that names the lines.
        title, panel, value, chance: as in :func:`sweep`.
        xlabel: name of the value axis.
        xlim: limits of the value axis; None: from the values.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(table, value, label=label, panel=panel or (lambda t: ""))
    lines = data.groupby("panel", sort=False)["label"].nunique().max()
    keys = data[data["seed"].isna()].groupby(["panel", "label"], sort=False).size().max()
    same = data.groupby("panel", sort=False)["label"].agg(lambda part: tuple(dict.fromkeys(part))).nunique() == 1
    short = same and data["label"].astype(str).str.len().max() <= 14
    fig, panels = make_panels(
        data, height=lines * max(0.22, 0.135 * keys) + 0.5, cols=3 if short else 2, sharey=bool(same), width=FULL
    )
    with mpl.rc_context(STYLE):
        for ax, part in panels:
            _draw_dots(ax, part, chance=chance)
            ax.set(xlabel=xlabel, xlim=xlim or (_limits(data) if chance == 0.5 else None))
    draw_legend(fig, data, marks="dot", chance="no difference" if chance == 0 else chance is not None)
    return finish(fig, data, title=make_title(title, table), **named)


def _draw_dots(ax: Axes, part: pd.DataFrame, *, chance: float | None) -> None:
    labels = list(dict.fromkeys(part["label"]))
    if chance is not None:
        draw_chance(ax, axis="x", value=chance)
    for y, label in enumerate(labels):
        rows = part[part["label"] == label]
        keys = list(dict.fromkeys(zip(rows["attack"], rows["control"], rows["method"].fillna(""), strict=True)))
        offsets = (np.arange(len(keys)) - (len(keys) - 1) / 2) * min(0.42, 0.72 / len(keys))
        for (attack, control, method), offset in zip(keys, offsets, strict=True):
            own = rows[
                (rows["attack"] == attack) & (rows["control"] == control) & (rows["method"].fillna("") == method)
            ]
            color, seeds = color_of(attack, control), own[own["seed"].notna()]
            ax.plot(seeds["value"], np.full(len(seeds), y + offset), ".", color=color, markersize=2.5, alpha=0.55)
            for row in own[own["seed"].isna()].itertuples():
                ax.plot([row.low, row.high], [y + offset] * 2, color=color, linewidth=1.1, solid_capstyle="butt")
                ax.plot(row.value, y + offset, marker_of(method, control), color=color, markersize=4.5)
                if not control:
                    at = dict(
                        xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center"
                    )
                    text = (
                        format_interval(row.value, row.low, row.high)
                        if np.isfinite(row.low)
                        else format_value(row.value)
                    )
                    ax.annotate(text, (1.0, y + offset), fontsize=6.5, color=INK, **at)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_yticks(range(len(labels)), [label_of(label) for label in labels])
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)


def matrix(
    table: pd.DataFrame,
    *,
    row: Any,
    column: Any,
    title: Any,
    value: str = "auc",
    xlabel: str = "",
    ylabel: str = "",
    **named: Any,
) -> Drawn:
    """Draw a matrix of values with their intervals in the cells, colors diverging at .5; missing cells hatched, reversed ones named.

    Args:
        table: rows of ``lab.results``; rows and columns stand in the order of first appearance, controls last.
        row, column: columns that name them.
        title, value: as in :func:`sweep`.
        xlabel, ylabel: what columns and rows are.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(table, value, row=row, column=column)
    data = data[data["seed"].isna()].sort_values("control", kind="stable", key=lambda c: c != "")
    rows, columns = (list(dict.fromkeys(data[name])) for name in ("row", "column"))
    cells = data.drop_duplicates(["row", "column"]).set_index(["row", "column"])
    wide = lambda name: cells[name].unstack("column").reindex(index=rows, columns=columns)  # noqa: E731
    values = wide("value")
    low, high, verdict = wide("low"), wide("high"), wide("verdict") if "verdict" in cells else None
    text = values.copy().astype(object)
    for r in rows:
        for c in columns:
            span = (
                f"\n[{format_value(low.loc[r, c])}, {format_value(high.loc[r, c])}]"
                if np.isfinite(low.loc[r, c])
                else ""
            )
            said = "\nreversed" if verdict is not None and verdict.loc[r, c] == "reversed" else ""
            text.loc[r, c] = format_value(values.loc[r, c]) + span + said
    width = min(FULL, 1.9 + 0.95 * len(columns))
    fig, axes = make_figure(width=max(width, 3.4), height=0.45 * len(rows) + 1.3)
    ax = axes[0, 0]
    with mpl.rc_context(STYLE | {"hatch.linewidth": 0.4}):
        ax.patch.set(hatch="////", edgecolor="#D0D0D0", facecolor="#F6F6F6")
        size = 7 if len(columns) < 9 else 5.5
        style = dict(
            vmin=0, vmax=1, cmap=_DIVERGING, linewidths=1, linecolor="white", cbar=False, annot_kws={"fontsize": size}
        )
        sns.heatmap(values.astype(float), annot=text, fmt="", ax=ax, **style)
        ax.set_xticklabels([label_of(c) for c in columns], rotation=0 if len(columns) < 7 else 45)
        ax.set_yticklabels([label_of(r) for r in rows], rotation=0)
        n_head = data.loc[data["control"] == "", "row"].nunique()
        if 0 < n_head < len(rows):
            ax.axhline(n_head, color=INK, linewidth=1.0)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.tick_params(length=0)
    return finish(fig, data, title=make_title(title, table), **named)


def plane(
    table: pd.DataFrame, *, x: Any, title: Any, color: Callable[[str], str], hue: str, label: Any, panel: Any = None, value: str = "auc",
    xlabel: str = "", ylabel: str = "AUC", mark: Any = None, log: bool = False, guide: Any = None, chance: float | None = 0.5, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw results as dots with intervals in a plane, for example leakage against utility; marked rows are named.

    Args:
        table: rows of ``lab.results``.
        x: column of the horizontal axis.
        color: function of the ``hue`` column's values.
        hue: column that the color says.
        label: column with the names written beside marked dots.
        mark: column of bool; marked rows are strong and named; None: all.
        guide: column with a value of x, the same in a panel, where an upright line stands: the untrained model's.
        title, panel, value, xlabel, ylabel, log, chance: as in :func:`sweep`.
        named: ``name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
    """
    data = prepare(
        table, value, x=x, panel=panel or (lambda t: ""), hue=hue, label=label, mark=mark or (lambda t: True),
        guide=guide or (lambda t: np.nan),
    )
    data["x"] = data["x"].astype(float)
    fig, panels = make_panels(data, height=2.7, sharey=True, cols=2 if data["panel"].nunique() <= 4 else 3)
    with mpl.rc_context(STYLE):
        for ax, part in panels:
            if chance is not None:
                draw_chance(ax, value=chance)
            for at in part["guide"].dropna().unique():
                ax.axvline(at, color="#777777", linewidth=0.9, linestyle=(0, (1, 1)), zorder=0)
            rows = part[part["seed"].isna()].sort_values("value", ascending=False, kind="stable")
            for row, above in zip(rows.itertuples(), rows["mark"].astype(bool).cumsum() % 2, strict=True):
                ink, strong = color(row.hue), bool(row.mark)
                ax.plot([row.x, row.x], [row.low, row.high], color=ink, linewidth=0.7, alpha=0.6 if strong else 0.25)
                ax.plot(row.x, row.value, "o", color=ink, alpha=1 if strong else 0.35, markersize=5 if strong else 3.5)
                if strong:
                    ax.annotate(
                        str(row.label),
                        (row.x, row.value),
                        xytext=(5, 3 if above else -8),  # names of neighbors keep clear of each other
                        textcoords="offset points",
                        fontsize=6,
                        color=INK,
                    )
            ax.set(xlabel=xlabel or str(x), ylabel=ylabel if ax.get_subplotspec().is_first_col() else "")
            ax.set_xscale("log" if log else "linear")
            ax.grid(True)
    return finish(fig, data, title=make_title(title, table), **named)
