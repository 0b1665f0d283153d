"""Four kinds of plot over the results table; a figure of the book is a query and one of these calls.

All take rows of ``lab.results`` (lines, panels, cells stand in the order of first appearance), columns by name or as
functions of the table (``panel=lambda t: ...``), and share:

Args:
    panel: column that gives each value its own axes.
    value: column that is drawn, with ``<value>_low`` and ``<value>_high``.
    xlabel, ylabel: names of the axes (of a matrix: what columns and rows are).
    log: logarithmic x axis (0 stands at its left end).
    chance: where chance lies, or None.
    named: ``title, name, paper, expect, caption`` of :func:`mia_utils.plots.finish`.
"""

import textwrap
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from mia_utils.plots.style import CONTROLS, FULL, INK, STYLE, Drawn, color_of, draw_chance, finish, format_interval

from mia_utils.plots.style import label_of, make_figure, marker_of  # isort: skip

_DIVERGING = sns.diverging_palette(25, 245, s=70, l=60, as_cmap=True)  # below .5, .5, above; light enough for ink
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))
_KEEP = "attack control target method knowledge shadow seed n_seeds verdict n_members n_nonmembers".split()


def prepare(table: pd.DataFrame, value: str, **columns: Any) -> pd.DataFrame:
    """Rows with the columns a kind draws: ``value, low, high`` and each given column, missing values left out."""
    if table.empty:
        raise ValueError("expected rows of lab.results to draw, got none: does the query name a study of this profile?")
    made = {name: c(table) if callable(c) else (table[c] if c else "") for name, c in columns.items()}
    table = table.assign(**{"control": table["control"].fillna(""), **made})
    table = table.assign(value=table[value].astype(float))
    for end in ("low", "high"):
        table[end] = table[f"{value}_{end}"].astype(float) if f"{value}_{end}" in table else np.nan
    for name in {"label", "panel", "line", "row", "column"} & set(columns):  # an empty fact is a name like any other
        table[name] = table[name].astype(object).where(table[name].notna(), "")
    kept = [*columns, *(c for c in _KEEP if c in table and c not in columns), "value", "low", "high"]
    return table.loc[table["value"].notna(), kept]


@mpl.rc_context(STYLE)
def make_panels(table: pd.DataFrame, *, height: float, cols: int = 3, width: float | None = None, **options: Any):
    """Return a figure with axes for each value of ``panel``, and (axes, rows) of each."""
    names = list(dict.fromkeys(table["panel"]))
    cols = 2 if len(names) == 4 else min(len(names), cols)
    rows = -(-len(names) // cols)
    size = dict(width=width or (FULL if cols > 1 else 4.6), height=height * rows + 0.6)
    fig, axes = make_figure(rows, cols, **size, **options)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    panels = [(ax, table[table["panel"] == name]) for ax, name in zip(axes.flat, names, strict=False)]
    for (ax, _), name in zip(panels, names, strict=True):
        ax.set_title(label_of(name))
    return fig, panels


def name_axes(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Name the axes of a panel; the value axis in the first column only."""
    ax.set(xlabel=xlabel, ylabel=ylabel if ax.get_subplotspec().is_first_col() else "")


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    values = table[["value", "low", "high"]].to_numpy(float)
    return max(0.0, min(0.42, np.nanmin(values) - 0.02)), min(1.02, max(0.62, np.nanmax(values) + 0.03))


@mpl.rc_context(STYLE)
def draw_legend(fig: Figure, table: pd.DataFrame, *, marks: str, chance: str | None = "chance") -> None:
    """One legend under the panels with the marks that are drawn: ``"dot"``, ``"line"``, ``"curve"`` (no markers)."""
    handles = []
    methods = table.loc[table["control"] == "", "method"].dropna().unique()
    mark = marker_of(methods[0] if len(methods) == 1 else "", "")  # a shape is a method; several: a dot for all
    for attack in dict.fromkeys(table.loc[table["control"] == "", "attack"]):
        style = dict(linestyle="-", marker=mark if marks == "dot" else "")
        handles.append(Line2D([], [], color=color_of(attack), label=label_of(attack), **style))
    for control in dict.fromkeys(table.loc[table["control"] != "", "control"]):
        label, color, marker, dash = CONTROLS[control]
        style = dict(linestyle="-" if marks == "dot" else dash, marker="" if marks == "curve" else marker)
        handles.append(Line2D([], [], color=color, label=label, linewidth=1.0, markersize=3.5, **style))
    if table["seed"].nunique() > 1:
        seed = dict(linestyle="none", marker=".", markersize=3) if marks == "dot" else dict(linewidth=0.5)
        handles.append(Line2D([], [], color="#777777", label="one seed each", **seed))
    if chance:
        handles.append(Line2D([], [], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), label=chance))
    per_row = max(2, int(fig.get_size_inches()[0] / 1.25))
    fig.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), per_row), handlelength=2.4)


@mpl.rc_context(STYLE)
def sweep(
    table: pd.DataFrame, *, x: Any, panel: Any = None, line: Any = None, value: str = "auc", xlabel: str = "",
    ylabel: str = "AUC", log: bool = False, chance: float | None = 0.5, ylim: Any = None, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw values over the number in column ``x``: line, 95 % band, dots; every seed a thin line; controls in gray.

    ``line`` is a column that tells lines of one attack apart, named at their ends; ``ylim`` replaces the axis' limits.
    """
    data = prepare(table, value, x=x, panel=panel, line=line)
    data["x"] = data["x"].astype(float)
    lines = list(dict.fromkeys(data.loc[data["control"] == "", "line"]))
    fig, panels = make_panels(data, height=2.3, sharey=chance is not None)
    for ax, part in panels:
        if ylim or chance == 0.5:  # first: names at the ends of lines keep clear of each other on this scale
            ax.set_ylim(ylim or _limits(data))
        _draw_sweep(ax, part, lines, log=log, chance=chance)
        name_axes(ax, xlabel or str(x), ylabel)
    draw_legend(fig, data, marks="line", chance=None if chance is None else "chance")
    return finish(fig, data, rows=table, **named)


def _draw_sweep(ax: Axes, part: pd.DataFrame, lines: list[str], *, log: bool, chance: float | None) -> None:
    if log and (part["x"] <= 0).any():
        ax.set_xscale("symlog", linthresh=part.loc[part["x"] > 0, "x"].min(), linscale=0.5)
    elif log:
        ax.set_xscale("log")
    if chance is not None:
        draw_chance(ax, value=chance)
    by, named = ["attack", "control", "method", "line"], []
    for (attack, control, method, line), rows in part.groupby(by, sort=False, dropna=False):
        color, rows = color_of(attack, control), rows.sort_values("x", kind="stable")
        dash = CONTROLS[control][3] if control in CONTROLS else _DASHES[lines.index(line) % len(_DASHES)]
        color = color if control else _shade(color, lines.index(line), len(lines))
        for _, one in rows.groupby("seed"):
            ax.plot(one["x"], one["value"], color=color, linewidth=0.5, alpha=0.5)
        mean = rows[rows["seed"].isna()]
        ax.fill_between(mean["x"], mean["low"], mean["high"], color=color, alpha=0.07 if control else 0.16, linewidth=0)
        ax.plot(mean["x"], mean["value"], color=color, linestyle=dash, linewidth=0.9 if control else 1.4)
        style = dict(marker=marker_of(method, control), markersize=3.5 if control else 4.5)
        ax.plot(mean["x"], mean["value"], linestyle="none", color=color, **style)
        if len(lines) > 1 and not control and len(mean):
            named.append((*mean[["x", "value"]].iloc[-1], label_of(line)))
    named.sort()
    ends = _to_points(ax, [end[0] for end in named], [end[1] for end in named])[:, 1]
    at_x = np.array([end[0] for end in named])
    for here in dict.fromkeys(at_x):  # names at one place keep clear of each other, as near to their lines as that goes
        (own,) = np.nonzero(at_x == here)
        apart = 8.0 * np.arange(len(own))
        for i, place in zip(own, isotonic_regression(ends[own] - apart).x + apart, strict=True):
            x, y, name = named[i]
            at = dict(xytext=(5, place - ends[i]), textcoords="offset points", va="center")
            ax.annotate(name, (x, y), annotation_clip=False, fontsize=6.5, color=INK, **at)
    ticks = sorted(set(part["x"].dropna()))
    if len(ticks) <= 9:
        ax.set_xticks(ticks, _drop_touching(ax, ticks))
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.grid(True)


def _shade(color: str, i: int, n: int) -> tuple[float, ...]:
    """The i-th of n shades of a color, from light to dark; a single one is the color itself."""
    white = 0.5 * (1 - i / (n - 1)) if n > 1 else 0.0
    return tuple(part + white * (1 - part) for part in mpl.colors.to_rgb(color))


def _to_points(ax: Axes, x: Any, y: Any) -> np.ndarray:
    """Positions (n, 2) of data in points of paper, before the layout: a little closer to each other than in the end."""
    ax.get_xlim(), ax.get_ylim()  # autoscales
    return ax.transData.transform(np.column_stack([x, y])) * 72 / ax.figure.dpi


def _drop_touching(ax: Axes, ticks: list[float]) -> list[str]:
    """Labels of the ticks, empty where one would touch its right neighbor."""
    texts, at, kept = [f"{t:,g}" for t in ticks], _to_points(ax, ticks, np.full(len(ticks), 0.5))[:, 0], None
    for i in reversed(range(len(ticks))):
        if kept is not None and 1.15 * (at[kept] - at[i]) < 2.2 * (len(texts[i]) + len(texts[kept])) + 2:
            texts[i] = ""
        else:
            kept = i
    return texts


@mpl.rc_context(STYLE)
def dots(
    table: pd.DataFrame, *, label: Any, panel: Any = None, value: str = "auc", xlabel: str = "AUC",
    chance: float | None = 0.5, **named: Any,
) -> Drawn:  # fmt: skip
    """Draw a dot with its interval per line, named by ``label``: attacks in color, controls in gray beside them."""
    data = prepare(table, value, label=label, panel=panel)
    labels = data.groupby("panel", sort=False)["label"].agg(lambda part: tuple(dict.fromkeys(part)))
    keys = data[data["seed"].isna()].groupby(["panel", "label"], sort=False).size().max()
    same = labels.nunique() == 1
    cols = 3 if same and data["label"].astype(str).str.len().max() <= 14 else 2
    height = labels.str.len().max() * max(0.22, 0.155 * keys) + 0.5
    fig, panels = make_panels(data, height=height, cols=cols, sharey=same, width=FULL)
    if not same:  # between the numbers of a panel and the names of the next
        fig.get_layout_engine().set(w_pad=0.12)
    for ax, part in panels:
        _draw_dots(ax, part, chance=chance)
        ax.set(xlabel=xlabel, xlim=_limits(data) if chance == 0.5 else None)
    draw_legend(fig, data, marks="dot", chance={None: None, 0: "no difference"}.get(chance, "chance"))
    return finish(fig, data, rows=table, **named)


def _draw_dots(ax: Axes, part: pd.DataFrame, *, chance: float | None) -> None:
    if chance is not None:
        draw_chance(ax, axis="x", value=chance)
    at = dict(xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va="center")
    by = ["attack", "control", "method"]
    lines = dict(list(part.fillna({"method": ""}).groupby("label", sort=False)))
    for line, rows in enumerate(lines.values()):
        groups = rows.groupby(by, sort=False)
        heights = line + (np.arange(groups.ngroups) - (groups.ngroups - 1) / 2) * min(0.42, 0.72 / groups.ngroups)
        for y, ((attack, control, method), own) in zip(heights, groups, strict=True):
            color, seeds = color_of(attack, control), own[own["seed"].notna()]
            ax.plot(seeds["value"], np.full(len(seeds), y), ".", color=color, markersize=2.5, alpha=0.55)
            for row in own[own["seed"].isna()].itertuples():
                ax.plot([row.low, row.high], [y, y], color=color, linewidth=1.1, solid_capstyle="butt")
                ax.plot(row.value, y, marker_of(method, control), color=color, markersize=4.5)
                if not control:
                    text = format_interval(row.value, row.low, row.high)
                    ax.annotate(text, (1.0, y), fontsize=6.5, color=INK, **at)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.set_yticks(range(len(lines)), map(label_of, lines))
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)


@mpl.rc_context(STYLE | {"hatch.linewidth": 0.4})
def matrix(
    table: pd.DataFrame, *, row: Any, column: Any, value: str = "auc", xlabel: str = "", ylabel: str = "", **named: Any
) -> Drawn:
    """Draw values with their intervals in cells, colors diverging at .5; missing cells hatched, reversed ones named."""
    data = prepare(table, value, row=row, column=column)
    data = data[data["seed"].isna()].sort_values("control", kind="stable", key=lambda c: c != "")
    rows, columns = (list(dict.fromkeys(data[name])) for name in ("row", "column"))
    cells = data.drop_duplicates(["row", "column"])
    texts = [format_interval(*ends).replace(" ", "\n", 1) for ends in cells[["value", "low", "high"]].to_numpy()]
    is_reversed = cells.get("verdict", pd.Series("", cells.index)) == "reversed"  # said of an AUC
    said = np.where(is_reversed & (value == "auc"), "\nreversed", "")
    cells = cells.assign(text=np.char.add(texts, said)).set_index(["row", "column"])
    values, texts = (cells[n].unstack("column").reindex(index=rows, columns=columns) for n in ("value", "text"))
    width = max(3.4, min(FULL, 1.9 + 0.95 * len(columns)))
    fig, ((ax,),) = make_figure(width=width, height=0.45 * len(rows) + 1.3)
    ax.patch.set(hatch="////", edgecolor="#D0D0D0", facecolor="#F6F6F6")
    style = dict(vmin=0, vmax=1, cmap=_DIVERGING, linewidths=1, linecolor="white", cbar=False)
    size = 7 if len(columns) < 9 else 5.5
    sns.heatmap(values.astype(float), annot=texts, fmt="", ax=ax, annot_kws={"fontsize": size, "color": INK}, **style)
    chars = int((width - 0.9) / len(columns) / 0.06)
    names = [
        "\n".join(textwrap.fill(line, chars, break_long_words=False) for line in label_of(c).split("\n"))
        for c in columns
    ]
    fits = max(map(len, "\n".join(names).split("\n"))) <= chars
    ax.set_xticklabels(names if fits else map(label_of, columns), rotation=0 if fits else 45)
    ax.set_yticklabels(map(label_of, rows), rotation=0)
    n_head = data.loc[data["control"] == "", "row"].nunique()
    if 0 < n_head < len(rows):
        ax.axhline(n_head, color=INK, linewidth=1.0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(length=0)
    return finish(fig, data, rows=table, **named)


@mpl.rc_context(STYLE)
def plane(
    table: pd.DataFrame, *, x: Any, color: Callable[[str], str], hue: str, label: Any, panel: Any = None,
    value: str = "auc", xlabel: str = "", ylabel: str = "AUC", mark: Any = None, log: bool = False, guide: Any = None,
    **named: Any,
) -> Drawn:  # fmt: skip
    """Draw results as dots with intervals in a plane, for example leakage against utility (column ``x``).

    Args:
        table: rows of ``lab.results``.
        color: function of the ``hue`` column's values.
        label: column with the names written beside marked dots.
        mark: column of bool; marked rows are strong and named; None: all.
        guide: column with a value of x, the same in a panel, where an upright line stands: the untrained model's.
    """
    columns = dict(x=x, panel=panel, hue=hue, label=label, mark=mark or (lambda t: True))
    data = prepare(table, value, **columns, guide=guide or (lambda t: np.nan))
    data["x"] = data["x"].astype(float)
    fig, panels = make_panels(data, height=2.7, sharey=True, cols=2 if data["panel"].nunique() <= 4 else 3)
    for ax, part in panels:
        draw_chance(ax)
        for at in part["guide"].dropna().unique():
            ax.axvline(at, color="#777777", linewidth=0.9, linestyle=(0, (1, 1)), zorder=0)
        rows = part[part["seed"].isna()].sort_values("value", ascending=False, kind="stable")
        for row in rows.itertuples():
            ink, strong = color(row.hue), bool(row.mark)
            ax.plot([row.x, row.x], [row.low, row.high], color=ink, linewidth=0.7, alpha=0.6 if strong else 0.25)
            ax.plot(row.x, row.value, "o", color=ink, alpha=1 if strong else 0.35, markersize=5 if strong else 3.5)
        name_axes(ax, xlabel or str(x), ylabel)
        ax.set_xscale("log" if log else "linear")
        ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        ax.grid(True)
    for ax, part in panels:  # now that all have their limits
        _name_points(ax, part[part["seed"].isna()], color)
    return finish(fig, data, rows=table, **named)


def _name_points(ax: Axes, rows: pd.DataFrame, color: Callable[[str], str]) -> None:
    """Name the marked dots, in a dark shade of their color, each at the first free of eight places."""
    rows = rows.sort_values("value", ascending=False, kind="stable")
    dots = _to_points(ax, rows["x"], rows["value"])
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in dots]
    (left, _), (right, _) = ax.transAxes.transform([(0, 0), (1, 1)]) * 72 / ax.figure.dpi
    for (x, y), own, row in zip(dots, taken[:], rows.itertuples(), strict=True):
        if not row.mark or not row.label:
            continue
        width, places = 3.6 * len(str(row.label)), []
        for dx, dy in ((5, 3), (5, -8), (-5, 3), (-5, -8), (5, 11), (5, -16), (-5, 11), (-5, -16)):
            x0, x1 = (x + dx, x + dx + width) if dx > 0 else (x + dx - width, x + dx)
            y0, y1 = y + dy, y + dy + 6.5
            hits = sum(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in taken if b != own)
            places.append((hits + (x0 < left) + (x1 > right + 8), len(places), dx, dy, (x0, y0, x1, y1)))
        _, _, dx, dy, box = min(places)
        taken.append(box)
        ink = tuple(0.6 * part for part in mpl.colors.to_rgb(color(row.hue)))
        at = dict(xytext=(dx, dy), textcoords="offset points", fontsize=6, color=ink, ha="right" if dx < 0 else "left")
        ax.annotate(str(row.label), (row.x, row.value), **at)
