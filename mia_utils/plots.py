"""Style and drawing: one color per attack, one marker per method, every picture with its numbers beside it.

Three layers. *Style*: ``use_style``, ``color_of``, ``marker_of``. *Marks*: functions that draw one tidy table into one
axes; the table is what ``save`` writes as CSV, so the plotted numbers and the saved numbers are the same. *Pictures*:
functions that return ``(figure, table)`` for the panels made of images.

In every table a row with an empty ``seed`` is the value over all seeds and a row with a number is one seed;
``control`` is empty for the attack itself.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

HALF, FULL = 3.4, 7.0  # inches: one and two columns of a paper
TITLE_CHARS = 12.6  # bold 9 pt letters to the inch, with room for wide ones
WATERMARK = "code check, not a result"

# One color per attack. Families share a hue, members of a family differ in lightness, so that the palette also
# works in grey and for the common color vision deficiencies (a test measures the distances).
ATTACK_COLORS = {
    "partcrop": "#0072B2",
    "partcrop-v2": "#56B4E9",
    "encodermi-v": "#D55E00",
    "encodermi-s": "#E69F00",
    "encodermi-t": "#6B2E00",
    "lpla": "#E6D800",
    "mim": "#009E73",
    "seg-loss-map": "#7B2D8B",
    "seg-concat": "#CC79A7",
    "seg-full-image": "#2D0A47",
    "seg-global-loss": "#B9A7E0",
    "seg-label-only": "#9A6A00",
    "seg-type1": "#D8B365",
}
_SPARE_COLORS = ("#882255", "#44AA99", "#DDCC77", "#332288", "#117733", "#AA4499", "#88CCEE", "#CC6677")
CONTROL_STYLES = {
    "no-model": {"color": "#222222", "linestyle": (0, (4, 2)), "marker": "x"},
    "untrained": {"color": "#666666", "linestyle": (0, (4, 1.5, 1, 1.5)), "marker": "+"},
    "permuted": {"color": "#909090", "linestyle": (0, (1, 1.5)), "marker": "1"},
}
METHOD_MARKERS = {
    "mae": "o", "simmim": "s", "dino": "^", "moco": "D", "moco-v1": "8", "moco-v2": "d", "simclr": "v",
    "supervised": "P", "ibot": "<", "cae": ">", "byol": "p", "clip": "*", "unet": "h", "upernet": "H", "pspnet": "4",
    "deeplabv3plus": "X",
}  # fmt: skip
_METHOD_LINES = {"mae": "-", "dino": (0, (6, 1)), "moco": (0, (3, 1, 1, 1)), "simclr": (0, (2, 1))}  # fmt: skip
METHOD_LABELS = {
    "mae": "MAE", "simmim": "SimMIM", "dino": "DINO", "moco": "MoCo v3", "moco-v1": "MoCo v1",
    "moco-v2": "MoCo v2", "simclr": "SimCLR", "supervised": "Supervised", "ibot": "iBOT", "cae": "CAE",
    "byol": "BYOL", "clip": "CLIP", "unet": "U-Net",
    "upernet": "UPerNet", "pspnet": "PSPNet", "deeplabv3plus": "DeepLabV3+",
}  # fmt: skip
ATTACK_LABELS = {
    "partcrop": "PartCrop", "partcrop-v2": "PartCrop-v2", "encodermi-v": "EncoderMI-V", "encodermi-s": "EncoderMI-S",
    "encodermi-t": "EncoderMI-T", "lpla": "LpLA", "mim": "MIM attack", "seg-loss-map": "Loss map",
    "seg-concat": "Concatenation", "seg-full-image": "Full image", "seg-global-loss": "Global loss",
    "seg-label-only": "Label only", "seg-type1": "Prediction only",
}  # fmt: skip
DEFENSE_LABELS = {
    "none": "undefended", "early-stopping": "Early stopping", "scsr": "Crop range", "dp-sgd": "DP-SGD",
    "weight-decay": "Weight decay", "dropout": "Dropout", "drop-path": "Drop path",
    "label-smoothing": "Label smoothing", "crop-mixup": "Crops, mix-up", "distillation": "Distillation",
    "min-max": "Min-max",
    "noise": "Noise", "rounding": "Rounding",
    "top-k": "Top k", "temperature": "Temperature", "gauss": "Gauss", "argmax": "Argmax",
}  # fmt: skip
DEFENSE_COLORS = {
    "none": "#111111", "early-stopping": "#009E73", "scsr": "#0072B2", "dp-sgd": "#D55E00", "weight-decay": "#6B2E00",
    "dropout": "#882255", "drop-path": "#B06CA8", "label-smoothing": "#3F7FBF", "crop-mixup": "#117733",
    "distillation": "#8C6D1F", "noise": "#7B2D8B", "rounding": "#56A0C8", "top-k": "#A07800", "temperature": "#5B5BD6",
    "gauss": "#C4408A", "argmax": "#332288", "min-max": "#2F8F8F",
}  # fmt: skip
CONTROL_LABELS = {"no-model": "no model", "untrained": "untrained encoder", "permuted": "permuted labels"}
MEMBER_COLOR, STRANGER_COLOR = "#D81B60", "#1E9A8E"  # apart in lightness and hue for every color vision deficiency
MEMBER_LINE, STRANGER_LINE = "-", (0, (4, 1.5))

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the letters are the same on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "figure.titlesize": 9,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "figure.dpi": 120,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "image.interpolation": "nearest",
    "image.cmap": "magma",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
}


# ---------------------------------------------------------------------------------------------------- style


def use_style() -> None:
    """Set the style of the book for this process (the registry and ``save`` apply it by themselves)."""
    mpl.rcParams.update(STYLE)


def color_of(attack: str, control: str = "") -> str:
    """Return the color of an attack, or the grey of a control; a newly registered attack keeps one spare color."""
    if control:
        return CONTROL_STYLES.get(control, {"color": "#444444"})["color"]
    if attack in CONTROL_STYLES:
        return CONTROL_STYLES[attack]["color"]
    # crc32, not hash(): the same name must give the same color in every process.
    return ATTACK_COLORS.get(attack) or _SPARE_COLORS[zlib.crc32(attack.encode()) % len(_SPARE_COLORS)]


def marker_of(method: str) -> str:
    """Return the marker of a training method."""
    return METHOD_MARKERS.get(str(method), "o")


def label_of(name: str) -> str:
    """Return the printed name of an attack, method, control or defense."""
    for names in (METHOD_LABELS, ATTACK_LABELS, CONTROL_LABELS, DEFENSE_LABELS):
        if name in names:
            return names[name]
    return str(name)


def format_value(value: float | None, digits: int = 2) -> str:
    """Print a share without its leading zero: 0.807 -> ``.81``; an empty value gives an empty text."""
    if value is None or not np.isfinite(value):
        return ""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def format_interval(value: float, low: float, high: float) -> str:
    """Print ``.81 [.76, .86]``."""
    return f"{format_value(value)} [{format_value(low)}, {format_value(high)}]"


def make_figure(
    rows: int = 1,
    cols: int = 1,
    *,
    width: float = FULL,
    height: float | None = None,
    title: str = "",
    sharex: bool | str = False,
    sharey: bool | str = False,
    **grid: Any,
) -> tuple[Figure, np.ndarray]:
    """Make a figure in the book's style.

    Args:
        rows, cols: panels.
        width: 3.4 (``HALF``) or 7.0 (``FULL``) inches.
        height: inches; default 2.4 a row.
        title: the finding, set bold over the panels and wrapped.
        sharex, sharey, grid: as in ``matplotlib.figure.Figure.subplots``.

    Returns:
        figure, array (rows, cols) of axes.
    """
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(width, height or 2.4 * rows), layout="constrained")
        axes = fig.subplots(rows, cols, sharex=sharex, sharey=sharey, squeeze=False, **grid)
        if title:
            set_title(fig, title)
    return fig, axes


def set_title(fig: Figure, title: str) -> None:
    """Set the finding as the figure's title: left, bold, wrapped to the width."""
    chars = int(fig.get_size_inches()[0] * TITLE_CHARS)
    fig.suptitle("\n".join(textwrap.wrap(title, chars)), x=0.01, ha="left", fontsize=9, fontweight="bold")


def _styled(function):
    """Run a drawing function inside the book's style, whatever the process has set."""

    def wrapper(*args, **kwargs):
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    wrapper.__name__, wrapper.__doc__, wrapper.__wrapped__ = function.__name__, function.__doc__, function
    return wrapper


# ------------------------------------------------------------------------------------------------- writing


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Write bytes under a temporary name and rename: a killed run leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def format_table(data: pd.DataFrame) -> str:
    """Return the CSV text of a table: six significant digits, ``\\n`` line ends, empty cells empty."""
    return data.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def command_for(path: str | Path, profile: str | None = None) -> str:
    """Return the command that regenerates a figure: ``fig03_x.png`` in ``quick`` -> ``./run_all.sh quick 03``."""
    path = Path(path)
    match = re.match(r"fig(\d\d)_", path.name)
    return f"./run_all.sh {profile or path.parent.name}" + (f" {match.group(1)}" if match else "")


def save(
    fig: Figure,
    path: str | Path,
    data: pd.DataFrame,
    *,
    title: str | None = None,
    command: str | None = None,
    seeds: Sequence[int] | None = None,
    caption: str = "",
) -> Path:
    """Write a figure and, beside it, the CSV of its plotted numbers.

    Both are written atomically and hold no date, version or host: an unchanged result gives unchanged bytes. Title,
    command, seeds and caption travel inside the PNG (text chunks), where ``report.write_index`` reads them.
    In the folder of profile ``smoke`` the figure carries the watermark "code check, not a result".

    Args:
        fig: the figure.
        path: ``figures/<profile>/figNN_name.png`` (the ending may be left out).
        data: the plotted numbers.
        title: the finding; default: the title drawn in the figure.
        command: how to regenerate; default from the name and folder.
        seeds: seeds drawn; default: the ``seed`` column of ``data``.
        caption: one sentence on how to read it (for example "sweeps: one seed").

    Returns:
        path of the PNG.
    """
    path = Path(path)
    path = path if path.suffix == ".png" else path.with_name(path.name + ".png")
    if not isinstance(data, pd.DataFrame):
        raise ValueError(f"expected a DataFrame of the plotted numbers, got {type(data).__name__}; pass data=")
    if title is None:
        drawn = (
            fig._suptitle.get_text()
            if fig._suptitle
            else next((a.get_title("left") for a in fig.axes if a.get_title("left")), "")
        )
        title = " ".join(drawn.split())
    if seeds is None:
        column = pd.to_numeric(data["seed"], errors="coerce").dropna() if "seed" in data else []
        seeds = sorted({int(s) for s in column})
    metadata = {"Software": None, "Title": title, "Command": command or command_for(path)}
    if len(seeds):
        metadata["Seeds"] = ", ".join(map(str, seeds))
    if caption:
        metadata["Caption"] = caption
    mark = None
    if path.parent.name == "smoke":
        mark = fig.text(
            0.5, 0.5, WATERMARK, ha="center", va="center", rotation=18,
            fontsize=min(26, 3.6 * fig.get_size_inches()[0]),
            color="#B00020", alpha=0.28, fontweight="bold", zorder=1000,
        )  # fmt: skip
        mark.set_in_layout(False)
    buffer = io.BytesIO()
    try:
        with mpl.rc_context(STYLE):
            fig.savefig(buffer, format="png", metadata=metadata)
    finally:
        if mark is not None:
            mark.remove()
    write_atomic(path.with_suffix(".csv"), format_table(data).encode())
    return write_atomic(path, buffer.getvalue())


def show(path: str | Path):
    """Return a saved figure for display in a notebook: the reader sees the very file that was written."""
    from IPython.display import Image

    with open(path, "rb") as stream:
        content = stream.read()
    width = int.from_bytes(content[16:20], "big")  # PNG header: width in pixels
    return Image(content, width=min(900, width * 110 // STYLE["savefig.dpi"]))


# --------------------------------------------------------------------------------------------------- marks


def _require(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    missing = [c for c in columns if c not in frame]
    if missing:
        raise ValueError(
            f"expected columns {', '.join(columns)}; {', '.join(missing)} missing in {list(frame.columns)}"
        )
    frame = frame.copy()
    for name in ("attack", "control", "method"):
        frame[name] = frame[name].fillna("").astype(str) if name in frame else ""
    if "seed" not in frame:
        frame["seed"] = np.nan
    frame["seed"] = pd.to_numeric(frame["seed"], errors="coerce")
    return frame


def _line_style(attack: str, control: str, method: str = "") -> dict[str, Any]:
    if control:
        style = CONTROL_STYLES.get(control, CONTROL_STYLES["no-model"])
        return {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.0}
    return {"color": color_of(attack), "linestyle": _METHOD_LINES.get(method, "-"), "linewidth": 1.5}


def draw_chance(ax: Axes, *, axis: str = "y", value: float = 0.5) -> None:
    """Draw the chance line of an AUC axis."""
    line = ax.axhline if axis == "y" else ax.axvline
    line(value, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)


@_styled
def draw_roc(ax: Axes, frame: pd.DataFrame, *, n_nonmembers: int, label_x: bool = True, label_y: bool = True) -> None:
    """Draw log-log ROC curves with the chance line, 95 % band, every seed a thin line.

    Args:
        ax: axes.
        frame: columns ``fpr, tpr, tpr_low, tpr_high, attack, control, seed``; rows with a seed are thin lines.
        n_nonmembers: evaluated non-members; the x axis starts at ``1 / n_nonmembers``, below which nothing is measured.
        label_x, label_y: name the axes.
    """
    frame = _require(frame, "fpr", "tpr")
    floor = 1.0 / max(int(n_nonmembers), 10)
    ax.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.15))
    ax.plot([floor, 1], [floor, 1], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)
    for (attack, control, _), part in frame.groupby(["attack", "control", "method"], sort=False):
        style = _line_style(attack, control)
        for _, one in part[part["seed"].notna()].groupby("seed"):
            ax.plot(one["fpr"], one["tpr"].clip(lower=floor / 3), color=style["color"], linewidth=0.5, alpha=0.6)
        mean = part[part["seed"].isna()].sort_values("fpr", kind="stable")
        if mean.empty:
            continue
        x = mean["fpr"].to_numpy(float)
        if {"tpr_low", "tpr_high"} <= set(mean) and mean["tpr_low"].notna().any():
            low, high = (mean[c].to_numpy(float).clip(min=floor / 3) for c in ("tpr_low", "tpr_high"))
            ax.fill_between(x, low, high, color=style["color"], alpha=0.10 if control else 0.18, linewidth=0)
        # log axes: a rate of 0 leaves the panel at the bottom instead of breaking the line
        ax.plot(x, mean["tpr"].to_numpy(float).clip(min=floor / 3), zorder=2 if control else 3, **style)
    ax.grid(True, which="major")
    ax.minorticks_off()
    if label_x:
        ax.set_xlabel("false positive rate")
    if label_y:
        ax.set_ylabel("true positive rate")


@_styled
def draw_intervals(
    ax: Axes,
    frame: pd.DataFrame,
    *,
    xlabel: str = "AUC",
    chance: float | None = 0.5,
    annotate: bool | str = True,
    xlim: tuple[float, float] | None = None,
) -> None:
    """Draw a dot-and-interval plot, one line per ``label``, attacks in color and controls in grey.

    Args:
        ax: axes.
        frame: columns ``label, value, low, high, attack, control, method, seed``; lines from top to bottom in the
            order of first appearance; several rows with one label are set side by side; seed rows are small dots.
        xlabel: name of the value axis.
        chance: position of the chance line, or None.
        annotate: print ``.81 [.76, .86]`` at the right end; ``"attack"`` prints no controls.
        xlim: value range; default from the data.
    """
    frame = _require(frame, "label", "value", "low", "high")
    labels = list(dict.fromkeys(frame["label"]))
    if chance is not None:
        draw_chance(ax, axis="x", value=chance)
    for y, label in enumerate(labels):
        part = frame[frame["label"] == label]
        keys = list(dict.fromkeys(zip(part["attack"], part["control"], part["method"], strict=True)))
        offsets = (np.arange(len(keys)) - (len(keys) - 1) / 2) * min(0.42, 0.72 / len(keys))
        for (attack, control, method), offset in zip(keys, offsets, strict=True):
            rows = part[(part["attack"] == attack) & (part["control"] == control) & (part["method"] == method)]
            color = color_of(attack, control)
            seeds = rows[rows["seed"].notna()]
            ax.plot(seeds["value"], np.full(len(seeds), y + offset), ".", color=color, markersize=2.5, alpha=0.55)
            for _, row in rows[rows["seed"].isna()].iterrows():
                ax.plot([row["low"], row["high"]], [y + offset] * 2, color=color, linewidth=1.1, solid_capstyle="butt")
                marker = CONTROL_STYLES.get(control, {}).get("marker") if control else marker_of(method)
                ax.plot(row["value"], y + offset, marker=marker or "o", color=color, markersize=4.5, linestyle="none")
                if annotate and not (annotate == "attack" and control) and np.isfinite(row["value"]):
                    ax.annotate(
                        format_interval(row["value"], row["low"], row["high"]), (1.0, y + offset),
                        xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                        va="center", fontsize=6.5, color=color,
                    )  # fmt: skip
    values = frame[["value", "low", "high"]].to_numpy(float)
    if xlim is None and np.isfinite(values).any():
        low, high = np.nanmin(values), np.nanmax(values)
        low, high = (min(low, chance), max(high, chance)) if chance is not None else (low, high)
        pad = 0.04 * max(high - low, 0.05)
        xlim = (low - pad, high + pad)
    ax.set(ylim=(len(labels) - 0.4, -0.6), xlabel=xlabel, **({"xlim": xlim} if xlim else {}))
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    if chance == 0.5:
        ax.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.1))
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)


@_styled
def draw_sweep(
    ax: Axes,
    frame: pd.DataFrame,
    *,
    xlabel: str,
    ylabel: str = "AUC",
    log: bool = False,
    chance: float | None = 0.5,
    ticks: Sequence[float] | None = None,
) -> None:
    """Draw values over a swept number: line, 95 % band, dots; seeds as thin lines; controls in grey.

    Args:
        ax: axes.
        frame: columns ``x, value, low, high, attack, control, method, seed``.
        xlabel, ylabel: names of the axes.
        log: logarithmic x axis.
        chance: chance line, or None.
        ticks: x ticks; default the swept values when there are at most nine.
    """
    frame = _require(frame, "x", "value", "low", "high")
    shared = frame.loc[frame["control"] == "", "method"].nunique() > 1
    if log and (frame["x"].astype(float) > 0).all():
        ax.set_xscale("log")
    elif log:  # epoch 0 belongs on the axis
        ax.set_xscale("symlog", linthresh=frame.loc[frame["x"] > 0, "x"].min(), linscale=0.5)
    if chance is not None:
        draw_chance(ax, value=chance)
    for (attack, control, method), part in frame.groupby(["attack", "control", "method"], sort=False):
        # one panel per method needs no line styles; where methods share a panel, marker and line style tell them apart
        style = _line_style(attack, control, method if shared else "")
        seeded = part[part["seed"].notna()]
        if seeded["seed"].nunique() > 1:
            for _, one in seeded.groupby("seed"):
                one = one.sort_values("x", kind="stable")
                ax.plot(one["x"], one["value"], color=style["color"], linewidth=0.5, alpha=0.5)
        mean = part[part["seed"].isna()].sort_values("x", kind="stable")
        if mean.empty:
            continue
        x = mean["x"].to_numpy(float)
        ax.fill_between(
            x,
            mean["low"].astype(float),
            mean["high"].astype(float),
            color=style["color"],
            alpha=0.08 if control else 0.16,
            linewidth=0,
        )
        ax.plot(x, mean["value"], **style)
        marker = CONTROL_STYLES[control]["marker"] if control in CONTROL_STYLES else marker_of(method)
        ax.plot(
            x, mean["value"], marker=marker, linestyle="none", color=style["color"], markersize=3.5 if control else 4.5
        )
    drawn = sorted(set(frame["x"].dropna().astype(float)))
    ticks = ticks if ticks is not None else (drawn if len(drawn) <= 9 else None)
    if ticks is not None:
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)


@_styled
def draw_points(
    ax: Axes, frame: pd.DataFrame, *, xlabel: str, ylabel: str = "AUC", log: bool = True, chance: float | None = 0.5
) -> None:
    """Draw single results with their intervals over a number: color per attack, marker per method, controls in grey.

    Args:
        ax: axes.
        frame: columns ``x, value, low, high, attack, control, method, seed``.
        xlabel, ylabel: names of the axes.
        log: logarithmic x axis.
        chance: chance line, or None.
    """
    frame = _require(frame, "x", "value", "low", "high")
    if log:
        ax.set_xscale("log")
    if chance is not None:
        draw_chance(ax, value=chance)
    for (attack, control, method), part in frame[frame["seed"].isna()].groupby(
        ["attack", "control", "method"], sort=False
    ):
        color = color_of(attack, control)
        marker = CONTROL_STYLES[control]["marker"] if control in CONTROL_STYLES else marker_of(method)
        ax.vlines(part["x"], part["low"], part["high"], color=color, linewidth=0.7, alpha=0.45, zorder=2)
        ax.plot(
            part["x"],
            part["value"],
            marker=marker,
            linestyle="none",
            color=color,
            markersize=3.5 if control else 5,
            zorder=2 if control else 3,
        )
    seeds = frame[frame["seed"].notna() & (frame["control"] == "")]
    for attack, part in seeds.groupby("attack"):
        ax.plot(part["x"], part["value"], ".", color=color_of(attack), markersize=2, alpha=0.6)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    ax.grid(True)


@_styled
def draw_matrix(
    ax: Axes,
    frame: pd.DataFrame,
    *,
    xlabel: str = "",
    ylabel: str = "",
    vmin: float = 0.5,
    vmax: float = 1.0,
    n_head: int | None = None,
    n_left: int | None = None,
    n_columns: int | None = None,
) -> None:
    """Draw a matrix of values with their intervals in the cells; missing cells are hatched.

    Args:
        ax: axes.
        frame: columns ``row, column, value, low, high``, in the order of first appearance.
        xlabel, ylabel: what columns and rows are.
        vmin, vmax: color range; white is chance.
        n_head: rows above this index are set off from those below (attacks above, controls below).
        n_left: columns up to this one are set off from those to the right.
        n_columns: leave room for this many, so that cells are as wide as those of a wider matrix above.
    """
    frame = _require(frame, "row", "column", "value", "low", "high")
    rows, columns = list(dict.fromkeys(frame["row"])), list(dict.fromkeys(frame["column"]))
    room = max(n_columns or 0, len(columns))
    small = 6 if room < 10 else 5
    for (row, column), part in frame[frame["seed"].isna()].groupby(["row", "column"], sort=False):
        y, x = rows.index(row), columns.index(column)
        value, low, high = (float(part[c].iloc[0]) for c in ("value", "low", "high"))
        if not np.isfinite(value):
            continue
        shade = np.clip((value - vmin) / (vmax - vmin), 0, 1)
        ax.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=mpl.colormaps["Blues"](0.9 * shade),
                edgecolor="white",
                linewidth=1.2,
            )
        )
        ink = "white" if shade > 0.62 else "black"
        ax.text(x, y - 0.12, format_value(value), ha="center", va="center", color=ink, fontsize=8, fontweight="bold")
        interval = f"[{format_value(low)}, {format_value(high)}]"
        ax.text(x, y + 0.25, interval, ha="center", va="center", color=ink, fontsize=small)
    filled = {
        (r, c) for r, c, v in zip(frame["row"], frame["column"], frame["value"], strict=True) if np.isfinite(float(v))
    }
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) not in filled:
                ax.add_patch(
                    Rectangle(
                        (x - 0.5, y - 0.5), 1, 1, facecolor="#F6F6F6", edgecolor="#D0D0D0", hatch="////", linewidth=0
                    )
                )
    if n_head is not None and 0 < n_head < len(rows):
        ax.plot([-0.5, len(columns) - 0.5], [n_head - 0.5] * 2, color="#222222", linewidth=1.0)
    if n_left is not None and 0 < n_left < len(columns):
        ax.plot([n_left - 0.5] * 2, [-0.5, len(rows) - 0.5], color="#222222", linewidth=1.0)
    ax.set(xlim=(-0.5, room - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def count_scores(score: np.ndarray, is_member: np.ndarray, *, bins: int = 30) -> pd.DataFrame:
    """Bin scores of members and strangers on one scale.

    Args:
        score: (N,) float, higher = more likely a member.
        is_member: (N,) bool.
        bins: number of equal bins between the 0.5 and 99.5 percentile (scores outside fall into the end bins).

    Returns:
        columns ``bin_low, bin_high, member, stranger``: shares of each class per bin, each summing to 1.
    """
    score, is_member = np.asarray(score, float), np.asarray(is_member, bool)
    if score.shape != is_member.shape or score.ndim != 1:
        raise ValueError(f"expected score and is_member of one shape (N,), got {score.shape} and {is_member.shape}")
    low, high = np.percentile(score, [0.5, 99.5])
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    inside = np.clip(score, edges[0], edges[-1])
    share = [np.histogram(inside[m], edges)[0] / max(int(m.sum()), 1) for m in (is_member, ~is_member)]
    return pd.DataFrame({"bin_low": edges[:-1], "bin_high": edges[1:], "member": share[0], "stranger": share[1]})


@_styled
def draw_histograms(ax: Axes, frame: pd.DataFrame, *, xlabel: str = "attack score", legend: bool = True) -> None:
    """Draw the pair of score histograms made by ``count_scores``."""
    frame = _require(frame, "bin_low", "bin_high", "member", "stranger")
    edges = [*frame["bin_low"], frame["bin_high"].iloc[-1]]
    for name, color, line in (("member", MEMBER_COLOR, MEMBER_LINE), ("stranger", STRANGER_COLOR, STRANGER_LINE)):
        ax.stairs(frame[name], edges, fill=True, color=color, alpha=0.22)
        ax.stairs(frame[name], edges, color=color, linewidth=1.2, linestyle=line, label=name + "s")
    ax.set(xlabel=xlabel, ylabel="share of images")
    if legend:
        ax.legend(loc="best", handlelength=1.6)


def tame_log_axis(ax: Axes, *, axis: str = "x") -> None:
    """Make one axis logarithmic with few plain numbers as ticks, also where it spans less than a decade."""
    line = getattr(ax, f"{axis}axis")
    getattr(ax, f"set_{axis}scale")("log")
    low, high = sorted(getattr(ax, f"get_{axis}lim")())
    decades = np.log10(max(high, 1e-12) / max(low, 1e-12))
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    line.set_major_locator(mpl.ticker.LogLocator(subs=steps))
    name = lambda v, _: format_value(v, 4).rstrip("0") if v < 1 else f"{v:g}"  # noqa: E731 - a tick is a word
    line.set_major_formatter(mpl.ticker.FuncFormatter(name))
    line.set_minor_locator(mpl.ticker.NullLocator())


_LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))


@_styled
def draw_lines(
    ax: Axes, frame: pd.DataFrame, *, ylim: tuple[float, float], xlabel: str, ylabel: str = "AUC", log: bool = False
) -> None:
    """Draw several named lines of one attack over a number, each named at its end; controls as grey lines.

    Args:
        ax: axes.
        frame: columns ``line, x, value, low, high, attack, control, method, seed``; a control is one value per line,
            drawn across the panel.
        ylim: limits of the value axis.
        xlabel, ylabel: names of the axes.
        log: logarithmic x axis.
    """
    frame = _require(frame, "line", "x", "value", "low", "high")
    names = list(dict.fromkeys(frame["line"]))
    draw_chance(ax)
    if log:
        ax.set_xscale("log")
    ends = []
    for name, style in zip(names, _LINE_STYLES * len(names), strict=False):
        part = frame[(frame["line"] == name) & (frame["control"] == "")]
        attack, method = part["attack"].iloc[0], part["method"].iloc[0]
        color = color_of(attack)
        seeded = part[part["seed"].notna()]
        for _, one in seeded.groupby("seed"):
            one = one.sort_values("x", kind="stable")
            ax.plot(one["x"], one["value"], color=color, linewidth=0.5, alpha=0.5, linestyle=style)
        mean = part[part["seed"].isna()].sort_values("x", kind="stable")
        low, high = mean["low"].astype(float), mean["high"].astype(float)
        ax.fill_between(mean["x"].astype(float), low, high, color=color, alpha=0.13, linewidth=0)
        ax.plot(mean["x"], mean["value"], color=color, linestyle=style, marker=marker_of(method), markersize=4.5)
        ends.append((float(mean["value"].iloc[-1]), name, color))
    controls = frame[(frame["control"] != "") & frame["seed"].isna()]
    for control, part in controls.groupby("control", sort=False):
        style = {key: value for key, value in _line_style("", control).items() if key != "linewidth"}
        for value in part["value"]:
            ax.axhline(value, linewidth=0.8, zorder=0.8, **style)
    drawn = sorted(set(frame.loc[frame["control"] == "", "x"].astype(float)))
    if log:
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:,g}"))
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    if len(drawn) <= 9:
        ax.set_xticks(_thin_ticks(drawn, log=log))
    # names stand at the height of their line's end, moved apart where they would touch
    low, high = ylim
    heights = _spread([(value - low) / (high - low) for value, _, _ in ends], gap=0.08)
    for (_, name, color), height in zip(ends, heights, strict=True):
        text = "\n".join(textwrap.wrap(name, 18))
        ax.annotate(
            text, (1.0, height), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=7, color=color,
        )  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=ylim)
    ax.grid(True)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move positions in [0, 1] apart to at least ``gap``, keeping their order and as much of their place as can be."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, float)[order]
    for _ in range(50):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    found = np.empty(len(placed))
    found[order] = placed
    return found.tolist()


def _thin_ticks(values: Sequence[float], *, log: bool) -> list[float]:
    """Keep those swept values that leave room for their numbers, the last one first."""
    places = np.log10(values) if log else np.asarray(values, float)
    room = 0.07 * max(places[-1] - places[0], 1e-9)
    kept = [len(values) - 1]
    for i in range(len(values) - 2, -1, -1):
        if places[kept[-1]] - places[i] >= room:
            kept.append(i)
    return [values[i] for i in reversed(kept)]


@_styled
def draw_rates(ax: Axes, frame: pd.DataFrame) -> None:
    """Draw, per line, which share of the members and which share of the strangers are called members.

    Args:
        ax: axes; lines as in ``draw_intervals``.
        frame: columns ``label, tpr, fpr``, one row per label.
    """
    frame = _require(frame, "label", "tpr", "fpr")
    for y, (tpr, fpr) in enumerate(zip(frame["tpr"], frame["fpr"], strict=True)):
        ax.plot([fpr, tpr], [y, y], color="#BBBBBB", linewidth=1.0, zorder=1)
        first = y == 0
        ax.plot(tpr, y, "o", color=MEMBER_COLOR, markersize=4.5, label="members" if first else "")
        ax.plot(fpr, y, "s", color=STRANGER_COLOR, markersize=4, label="strangers" if first else "")
    ax.set(xlim=(-0.04, 1.04), xlabel="share called members")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 0.97), ncols=2, handletextpad=0.1, columnspacing=0.6)
    ax.grid(True, axis="x")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


@_styled
def draw_part_curves(
    ax: Axes, frame: pd.DataFrame, *, xlabel: str = "part rank", ylabel: str = "response", legend: bool = True
) -> None:
    """Draw part-response curves of members and strangers with their bands (PartCrop's Figure 2).

    Args:
        ax: axes.
        frame: columns ``x, value, low, high, group`` with group ``member`` or ``stranger``.
        xlabel, ylabel: names of the axes.
        legend: name the two curves.
    """
    frame = _require(frame, "x", "value", "low", "high", "group")
    for name, color, line in (("member", MEMBER_COLOR, MEMBER_LINE), ("stranger", STRANGER_COLOR, STRANGER_LINE)):
        part = frame[(frame["group"] == name) & frame["seed"].isna()].sort_values("x", kind="stable")
        ax.fill_between(
            part["x"].astype(float),
            part["low"].astype(float),
            part["high"].astype(float),
            color=color,
            alpha=0.18,
            linewidth=0,
        )
        ax.plot(part["x"], part["value"], color=color, linestyle=line, label=name + "s")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)
    if legend:
        ax.legend(loc="best", handlelength=1.8)


@_styled
def draw_losses(
    ax: Axes, history: pd.DataFrame, *, log: bool = True, legend: bool = True, ylabel: str = "loss"
) -> None:
    """Draw the training loss on members and on held-out images; the gap is what an attacker can hope for.

    Args:
        ax: axes.
        history: columns ``epoch, loss_members, loss_heldout``.
        log: logarithmic epoch axis (epoch 0 is drawn at 1).
        legend: name the two curves.
        ylabel: name of the loss.
    """
    history = _require(history, "epoch", "loss_members", "loss_heldout")
    x = history["epoch"].astype(float)
    if log:
        ax.set_xscale("log")
        x = x.clip(lower=1)
    for column, name, color, line in (
        ("loss_members", "members", MEMBER_COLOR, MEMBER_LINE),
        ("loss_heldout", "strangers", STRANGER_COLOR, STRANGER_LINE),
    ):
        keep = history[column].notna()
        ax.plot(x[keep], history[column][keep], color=color, linestyle=line, label=name)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.grid(True)
    if log:
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    if legend:
        ax.legend(loc="best", handlelength=1.8)


@_styled
def draw_ladder(ax: Axes, frame: pd.DataFrame, *, xlabel: str = "AUC of an attacker who never sees the model") -> None:
    """Draw the blind ladder: one bar from chance per protocol rung, its interval and its value.

    Args:
        ax: axes.
        frame: columns ``label, value, low, high, flawed`` (bool: the rung has a known flaw; its bar is red) and
            optionally ``seed``; rungs from top to bottom in the order of first appearance.
        xlabel: name of the value axis.
    """
    frame = _require(frame, "label", "value", "low", "high", "flawed")
    labels = list(dict.fromkeys(frame["label"]))
    for y, label in enumerate(labels):
        part = frame[frame["label"] == label]
        for _, row in part[part["seed"].isna()].iterrows():
            color = "#B3392F" if bool(row["flawed"]) else "#4D4D4D"
            ax.barh(y, row["value"] - 0.5, left=0.5, height=0.62, color=color, alpha=0.30, linewidth=0)
            ax.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.4)
            ax.plot(row["value"], y, "x", color=color, markersize=5, markeredgewidth=1.4)
            ax.annotate(
                format_interval(row["value"], row["low"], row["high"]), (1.0, y), xycoords=("axes fraction", "data"),
                xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, color=color,
            )  # fmt: skip
        seeds = part[part["seed"].notna()]
        ax.plot(seeds["value"], np.full(len(seeds), y), ".", color="#222222", markersize=2.5)
    draw_chance(ax, axis="x")
    values = frame[["value", "low"]].to_numpy(float)
    low = min(0.45, float(np.nanmin(values)) - 0.02) if np.isfinite(values).any() else 0.45
    ax.set(xlim=(low, 1.0), ylim=(len(labels) - 0.4, -0.6), xlabel=xlabel)
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(True, axis="x")


def make_legend(fig: Figure, frame: pd.DataFrame, *, lines: bool = True, seeds: bool = False) -> None:
    """Put one legend under the panels for the attacks and controls a table holds.

    Args:
        fig: the figure.
        frame: columns ``attack, control`` (and ``seed``).
        lines: curves with a chance line; else dots with intervals.
        seeds: name the thin lines, where the table holds several seeds.
    """
    frame = _require(frame)
    handles = []
    for attack in dict.fromkeys(frame.loc[(frame["control"] == "") & (frame["attack"] != ""), "attack"]):
        marker = "" if lines else "o"
        handles.append(Line2D([], [], color=color_of(attack), marker=marker, linewidth=1.4, label=label_of(attack)))
    for control in dict.fromkeys(frame.loc[frame["control"] != "", "control"]):
        style = _line_style("", control)
        if not lines:
            style |= {"linestyle": "-", "marker": CONTROL_STYLES.get(control, {}).get("marker", "")}
        handles.append(Line2D([], [], label=label_of(control), **style))
    if seeds and frame["seed"].nunique() > 1:
        handles.append(Line2D([], [], color="#777777", linewidth=0.5, label="one seed each"))
    if lines:
        handles.append(Line2D([], [], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), label="chance"))
    per_row = max(2, int(fig.get_size_inches()[0] / 1.16))
    if handles:
        with mpl.rc_context(STYLE):
            fig.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), per_row), handlelength=2.4)


# ------------------------------------------------------------------------------------------------- pictures


def _as_image(image: Any) -> np.ndarray:
    """Return an image as (H, W, 3) or (H, W); accepts uint8 or float in [0, 1], numpy or torch, channels anywhere."""
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    return image if image.dtype == np.uint8 else np.clip(image.astype(float), 0, 1)


def _bare(ax: Axes, color: str | None = None, linewidth: float = 2.0, linestyle: Any = "-") -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(color is not None)
        if color is not None:
            spine.set(edgecolor=color, linewidth=linewidth, linestyle=linestyle)


def _draw_box(ax: Axes, box: Sequence[float], *, scale: tuple[float, float] = (1.0, 1.0), color: str = "white") -> None:
    y0, x0, y1, x1 = (float(v) for v in box)
    for ink, width in (("black", 2.2), (color, 1.1)):  # a dark rim keeps the box visible on bright pictures
        ax.add_patch(
            Rectangle(
                (x0 * scale[1] - 0.5, y0 * scale[0] - 0.5),
                (x1 - x0) * scale[1],
                (y1 - y0) * scale[0],
                fill=False,
                edgecolor=ink,
                linewidth=width,
            )
        )


@_styled
def draw_guess_grid(
    images: np.ndarray,
    *,
    is_member: np.ndarray | None = None,
    score: np.ndarray | None = None,
    guess: np.ndarray | None = None,
    image_ids: Sequence[str] | None = None,
    title: str = "Ten of these pictures trained the model. Which ones?",
    cols: int = 10,
) -> tuple[Figure, pd.DataFrame]:
    """Draw "spot the member": numbered pictures; with the answers given, framed by membership and scored.

    Args:
        images: (N, H, W, 3) uint8, 20 of them as a rule.
        is_member: (N,) bool; None keeps the answers hidden.
        score: (N,) attack scores, higher = more likely a member; printed under each picture with its rank.
        guess: (N,) bool, for example the attack's guesses; a check or a cross is printed beside the number.
        image_ids: (N,) names for the table.
        title: the question, or the finding.
        cols: pictures a row.

    Returns:
        figure, table with ``number, image_id, is_member, score, guess`` (hidden answers stay empty).
    """
    n = len(images)
    rows = -(-n // cols)
    answers = is_member is not None
    fig, axes = make_figure(
        rows,
        cols,
        height=(0.92 if score is not None else 0.84) * rows * 10 / cols + (0.62 if answers else 0.42),
        title=title,
    )
    for i, ax in enumerate(axes.flat):
        if i >= n:
            ax.set_axis_off()
            continue
        ax.imshow(_as_image(images[i]))
        if answers:
            color, line = (MEMBER_COLOR, MEMBER_LINE) if is_member[i] else (STRANGER_COLOR, STRANGER_LINE)
            _bare(ax, color, 2.4, line)
        else:
            _bare(ax, "#BBBBBB", 0.6)
        text = str(i + 1)
        if guess is not None and answers:
            text += "  ✓" if bool(guess[i]) == bool(is_member[i]) else "  ✗"
        ax.set_title(text, fontsize=7, loc="center", pad=2)
        if score is not None:
            ax.set_xlabel(format_value(float(score[i])), fontsize=6.5, labelpad=1.5)
    if answers:
        fig.legend(
            handles=[
                Patch(facecolor="none", edgecolor=MEMBER_COLOR, linewidth=2, label="member (trained the model)"),
                Patch(
                    facecolor="none", edgecolor=STRANGER_COLOR, linewidth=2, linestyle=STRANGER_LINE,
                    label="stranger (never seen)",
                ),
            ],
            loc="outside lower left", ncols=2,
        )  # fmt: skip
    empty = [np.nan] * n
    table = pd.DataFrame(
        {
            "number": np.arange(1, n + 1),
            "image_id": list(image_ids) if image_ids is not None else [""] * n,
            "is_member": np.asarray(is_member, int) if answers else empty,
            "score": np.asarray(score, float) if score is not None else empty,
            "guess": np.asarray(guess, int) if guess is not None else empty,
        }
    )
    return fig, table


@_styled
def draw_part_responses(
    images: np.ndarray,
    boxes: np.ndarray,
    maps: np.ndarray,
    labels: Sequence[str],
    *,
    names: Sequence[str],
    title: str,
    is_member: Sequence[bool] | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """Draw how an encoder answers to one part: the picture with the part's box, beside it one response map per encoder.

    Maps of one encoder share one color scale over all rows, so member and stranger can be compared by eye.

    Args:
        images: (R, H, W, 3) uint8, one row each.
        boxes: (R, 4) part boxes y0, x0, y1, x1 in pixels.
        maps: (R, E, h, w) responses, for example the softmax over tokens of METHODS' v_i, as numpy or torch.
        labels: R row names, for example ``"member: chair, seat"``.
        names: E encoder names (``"mae"`` prints as MAE).
        title: the finding.
        is_member: R values; frames the picture in the member or stranger color.

    Returns:
        figure, table ``row, label, is_member, encoder, y, x, response``.
    """
    maps = np.asarray(maps.detach().cpu() if hasattr(maps, "detach") else maps, float)
    rows, n_encoders = maps.shape[:2]
    if len(images) != rows or len(boxes) != rows or len(labels) != rows or len(names) != n_encoders:
        raise ValueError(
            f"expected {rows} images, boxes and labels and {n_encoders} names, "
            f"got {len(images)}, {len(boxes)}, {len(labels)}, {len(names)}"
        )
    cell = min(1.25, (FULL - 0.9) / (n_encoders + 1))
    fig, axes = make_figure(rows, n_encoders + 1, height=(cell + 0.22) * rows + 0.75, title=title)
    peaks = maps.max(axis=(0, 2, 3))
    for r in range(rows):
        image = _as_image(images[r])
        ax = axes[r, 0]
        ax.imshow(image)
        member = None if is_member is None else bool(is_member[r])
        _bare(
            ax,
            "#BBBBBB" if member is None else (MEMBER_COLOR if member else STRANGER_COLOR),
            2.4,
            "-" if member in (None, True) else STRANGER_LINE,
        )
        _draw_box(ax, boxes[r], color="#FFE14D")
        ax.set_ylabel(
            "\n".join(textwrap.wrap(labels[r], 16)), rotation=0, ha="right", va="center", fontsize=7.5, labelpad=6
        )
        for e in range(n_encoders):
            ax = axes[r, e + 1]
            picture = ax.imshow(maps[r, e], vmin=0, vmax=peaks[e] if peaks[e] > 0 else 1)
            scale = (maps.shape[2] / image.shape[0], maps.shape[3] / image.shape[1])
            _draw_box(ax, boxes[r], scale=scale, color="#FFE14D")
            _bare(ax)
            ax.set_xlabel(f"peak {format_value(maps[r, e].max())}", fontsize=7, labelpad=2)
            if r == 0:
                ax.set_title(label_of(names[e]), loc="center", fontsize=8)
            if r == rows - 1:
                bar = fig.colorbar(
                    picture, ax=list(axes[:, e + 1]), location="bottom", fraction=0.05, shrink=0.8, aspect=18, pad=0.02
                )
                bar.ax.tick_params(labelsize=6, length=2)
                bar.outline.set_visible(False)
                bar.locator = mpl.ticker.MaxNLocator(3)
                bar.update_ticks()
    axes[0, 0].set_title("picture and part", loc="center", fontsize=8)
    index = np.indices(maps.shape).reshape(4, -1)
    table = pd.DataFrame(
        {
            "row": index[0], "label": np.asarray(labels, object)[index[0]],
            "is_member": np.nan if is_member is None else np.asarray(is_member, int)[index[0]],
            "encoder": np.asarray(names, object)[index[1]], "y": index[2], "x": index[3], "response": maps.ravel(),
        }
    )  # fmt: skip
    return fig, table


@_styled
def draw_reconstructions(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    history: pd.DataFrame,
    *,
    epochs: Sequence[int],
    title: str,
    masked: np.ndarray | None = None,
    errors: np.ndarray | None = None,
    row_names: Sequence[str] = ("member", "stranger"),
    loss_name: str = "reconstruction loss",
) -> tuple[Figure, pd.DataFrame]:
    """Draw a member and a stranger reconstructed along training, above the parting loss curves.

    Args:
        originals: (2, H, W, 3) uint8 or float in [0, 1]: member, stranger.
        reconstructions: (2, E, H, W, 3), one per shown epoch.
        history: columns ``epoch, loss_members, loss_heldout``.
        epochs: E shown epochs, for example 0, 50, 500, 1000; marked in the loss panel.
        title: the finding.
        masked: (2, H, W, 3) what the model saw (optional column).
        errors: (2, E) reconstruction errors printed under the pictures; default: mean squared difference.
        row_names: names of the two rows.
        loss_name: name of the loss axis.

    Returns:
        figure, table: the history with ``kind=loss`` and the pictures' errors with ``kind=picture``.
    """
    originals = np.stack([_as_image(o) for o in originals])
    pictures = [[_as_image(p) for p in row] for row in reconstructions]
    if len(originals) != len(pictures) or any(len(row) != len(epochs) for row in pictures):
        raise ValueError(
            f"expected {len(originals)} rows of {len(epochs)} reconstructions, got {[len(r) for r in pictures]}"
        )
    unit = originals / (255.0 if originals.dtype == np.uint8 else 1.0)
    if errors is None:
        floats = [[p / (255.0 if p.dtype == np.uint8 else 1.0) for p in row] for row in pictures]
        errors = np.array([[float(((p - o) ** 2).mean()) for p in row] for row, o in zip(floats, unit, strict=True)])
    columns = [("original", list(originals), None)]
    if masked is not None:
        columns.append(("what it sees", [_as_image(m) for m in masked], None))
    for e, epoch in enumerate(epochs):
        columns.append((f"epoch {epoch:,}", [row[e] for row in pictures], np.asarray(errors)[:, e]))
    n_rows, n_cols = len(originals), len(columns)
    cell = min(1.3, (FULL - 0.8) / n_cols)
    fig = Figure(figsize=(FULL, (cell + 0.2) * n_rows + 0.45 + 1.75), layout="constrained")
    set_title(fig, title)
    grid = fig.add_gridspec(n_rows + 1, n_cols, height_ratios=[cell + 0.2] * n_rows + [1.6])
    for c, (name, images, error) in enumerate(columns):
        for r in range(n_rows):
            ax = fig.add_subplot(grid[r, c])
            ax.imshow(images[r])
            _bare(
                ax,
                (MEMBER_COLOR if r == 0 else STRANGER_COLOR) if c == 0 else None,
                2.4,
                "-" if r == 0 else STRANGER_LINE,
            )
            if r == 0:
                ax.set_title(name, loc="center", fontsize=7.5, pad=3)
            if c == 0:
                ax.set_ylabel(
                    row_names[r], fontsize=8, color=MEMBER_COLOR if r == 0 else STRANGER_COLOR, fontweight="bold"
                )
            if error is not None:
                ax.set_xlabel(f"error {format_value(float(error[r]), 3)}", fontsize=7, labelpad=2)
    ax = fig.add_subplot(grid[n_rows, :])
    draw_losses(ax, history, ylabel=loss_name)
    for epoch in epochs:
        ax.axvline(max(epoch, 1), color="#BBBBBB", linewidth=0.7, zorder=0.4)
    ax.set_xlim(left=1)
    losses = history[["epoch", "loss_members", "loss_heldout"]].assign(kind="loss")
    shown = pd.DataFrame({"kind": "picture", "epoch": list(epochs)})
    for r, name in enumerate(row_names):
        shown[f"error_{name}"] = np.asarray(errors)[r]
    return fig, pd.concat([losses, shown], ignore_index=True)[
        ["kind", "epoch", "loss_members", "loss_heldout", *[f"error_{n}" for n in row_names]]
    ]


@_styled
def draw_sorted_reconstructions(
    originals: np.ndarray,
    masked: np.ndarray,
    filled: np.ndarray,
    *,
    is_member: np.ndarray,
    distance: np.ndarray,
    rank: np.ndarray,
    everyone: np.ndarray,
    title: str,
    image_ids: Sequence[str] | None = None,
) -> tuple[Figure, pd.DataFrame]:
    """Draw pictures sorted by an attack's score: original, what the model sees, what it fills in, distance.

    Under them the whole ranking as a bar code: one line per picture, members up, strangers down.

    Args:
        originals: (n, H, W, 3) uint8 or float in [0, 1], best score first.
        masked, filled: (n, H, W, 3), in the same order.
        is_member: (n,) bool; frames the original.
        distance: (n,) printed under the pictures, small = looks like a member.
        rank: (n,) position of each picture in the whole ranking, 0 = best score.
        everyone: (N,) bool, membership of the whole ranking, best score first.
        title: the finding.
        image_ids: (n,) names for the table.

    Returns:
        figure, table ``rank, of, image_id, is_member, distance``.
    """
    is_member, everyone, rank = np.asarray(is_member, bool), np.asarray(everyone, bool), np.asarray(rank)
    n = len(originals)
    if not len(masked) == len(filled) == len(is_member) == len(distance) == len(rank) == n:
        got = [len(a) for a in (masked, filled, is_member, distance, rank)]
        raise ValueError(f"expected {n} masked and filled pictures, memberships, distances and ranks, got {got}")
    cell = (FULL - 0.8) / n
    heights = [cell, cell, cell, 0.55]
    fig = Figure(figsize=(FULL, sum(heights) + 1.15), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0.02, hspace=0.0)
    set_title(fig, title)
    grid = fig.add_gridspec(4, n, height_ratios=heights)
    for i in range(n):
        color, line = (MEMBER_COLOR, MEMBER_LINE) if is_member[i] else (STRANGER_COLOR, STRANGER_LINE)
        for r, images in enumerate((originals, masked, filled)):
            ax = fig.add_subplot(grid[r, i])
            ax.imshow(_as_image(images[i]))
            _bare(ax, *((color, 2.4, line) if r == 0 else ()))
            if i == 0:
                ax.set_ylabel(("picture", "what it sees", "what it fills in")[r], fontsize=7)
            if r == 0:
                name = "member" if is_member[i] else "stranger"
                ax.set_title(name, loc="center", fontsize=7, pad=4, color=color, fontweight="bold")
        ax.set_xlabel(f"d = {format_value(float(distance[i]), 4)}", fontsize=7, labelpad=2)
    ax = fig.add_subplot(grid[3, :])
    x = np.arange(len(everyone))
    ax.vlines(x[everyone], 0, 1, color=MEMBER_COLOR, linewidth=min(2.5, 450 / len(x)))
    ax.vlines(x[~everyone], -1, 0, color=STRANGER_COLOR, linewidth=min(2.5, 450 / len(x)))
    ax.plot(rank, np.full(n, 1.25), "v", color="#222222", markersize=4, clip_on=False)
    ax.set(xlim=(-1, len(x)), ylim=(-1, 1.3), yticks=[0.5, -0.5])
    ax.set_yticklabels(["members", "strangers"], fontsize=7)
    for label, color in zip(ax.get_yticklabels(), (MEMBER_COLOR, STRANGER_COLOR), strict=True):
        label.set_color(color)
    ax.set_xticks([0, len(x) - 1], ["1", f"{len(x):,}"])
    ax.set_xlabel("rank by score, smallest distance first (triangles: the pictures above)", fontsize=7, labelpad=0)
    ax.tick_params(axis="y", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    table = pd.DataFrame(
        {
            "rank": rank + 1, "of": len(everyone), "image_id": list(image_ids) if image_ids is not None else [""] * n,
            "is_member": is_member.astype(int), "distance": np.asarray(distance, float),
        }
    )  # fmt: skip
    return fig, table


@_styled
def draw_similarity_maps(
    image: np.ndarray,
    box: Sequence[float],
    maps: np.ndarray,
    *,
    names: Sequence[str],
    title: str,
    value_name: str = "similarity",
) -> tuple[Figure, pd.DataFrame]:
    """Draw the similarity of one part with every place of its picture, one map per encoder, each on its own scale.

    Args:
        image: (H, W, 3) uint8.
        box: y0, x0, y1, x1 of the part in pixels.
        maps: (E, h, w) or a list of E maps of different sizes (token grids differ between encoders).
        names: E encoder names.
        title: the finding.
        value_name: what the maps hold.

    Returns:
        figure, table ``encoder, y, x, <value_name>``.
    """
    maps = [np.asarray(m.detach().cpu() if hasattr(m, "detach") else m, float) for m in maps]
    if len(maps) != len(names):
        raise ValueError(f"expected one name per map, got {len(names)} names and {len(maps)} maps")
    cols = min(len(maps) + 1, 7)
    rows = -(-(len(maps) + 1) // cols)
    fig, axes = make_figure(rows, cols, height=(FULL / cols + 0.3) * rows + 0.35, title=title)
    flat = list(axes.flat)
    image = _as_image(image)
    flat[0].imshow(image)
    _bare(flat[0])
    _draw_box(flat[0], box, color="#FFE14D")
    flat[0].set_title("picture and part", loc="center", fontsize=7.5)
    tables = []
    for ax, grid, name in zip(flat[1:], maps, names, strict=False):
        ax.imshow(grid)
        _bare(ax)
        _draw_box(ax, box, scale=(grid.shape[0] / image.shape[0], grid.shape[1] / image.shape[1]), color="#FFE14D")
        ax.set_title("\n".join(textwrap.wrap(label_of(name), 14)), loc="center", fontsize=7.5)
        ax.set_xlabel(f"{format_value(grid.min())} to {format_value(grid.max())}", fontsize=6.5, labelpad=2)
        y, x = np.indices(grid.shape)
        tables.append(pd.DataFrame({"encoder": name, "y": y.ravel(), "x": x.ravel(), value_name: grid.ravel()}))
    for ax in flat[len(maps) + 1 :]:
        ax.set_axis_off()
    return fig, pd.concat(tables, ignore_index=True)


@_styled
def draw_views(
    pictures: np.ndarray,
    views: np.ndarray,
    tiles: np.ndarray,
    frame: pd.DataFrame,
    *,
    title: str,
    row_names: Sequence[str] = ("member", "stranger"),
    panel_title: str = "",
) -> tuple[Figure, pd.DataFrame]:
    """Draw views of a member and a stranger with the similarities of all their pairs, beside a panel of intervals.

    Args:
        pictures: (2, H, W, 3) member, stranger.
        views: (2, n, h, w, 3) the first n of their K views.
        tiles: (2, K, K) similarity of every pair of views; both are drawn on one scale, the diagonal left out of it.
        frame: rows of the panel on the right, as in ``draw_intervals``.
        title: the finding.
        row_names: names of the two pictures.
        panel_title: over the right panel.

    Returns:
        figure, table: ``part`` is ``similarity`` (``group, view, other, value``) or ``setting`` (rows of ``frame``).
    """
    tiles = np.asarray(tiles.detach().cpu() if hasattr(tiles, "detach") else tiles, float)
    if len(pictures) != len(row_names) or len(views) != len(row_names) or len(tiles) != len(row_names):
        raise ValueError(
            f"expected {len(row_names)} pictures, rows of views and tiles, "
            f"got {len(pictures)}, {len(views)}, {len(tiles)}"
        )
    size = tiles.shape[1]
    inside = tiles[:, ~np.eye(size, dtype=bool)]
    n_rows = max(1, round(np.sqrt((len(views[0]) + 1) / 1.6)))  # the sheet is wider than high
    n_cols = -(-(len(views[0]) + 1) // n_rows)
    fig = Figure(figsize=(FULL, 3.3), layout="constrained")
    set_title(fig, title)
    left_half, right_half = fig.add_gridspec(1, 2, width_ratios=[1.5, 1])
    grid = left_half.subgridspec(2, 2, width_ratios=[1.9, 1])
    heat = []
    for r, name in enumerate(row_names):
        color, line = (MEMBER_COLOR, MEMBER_LINE) if r == 0 else (STRANGER_COLOR, STRANGER_LINE)
        cells = grid[r, 0].subgridspec(n_rows, n_cols, wspace=0.04, hspace=0.04)
        for c, image in enumerate([pictures[r], *views[r]]):
            ax = fig.add_subplot(cells[c // n_cols, c % n_cols])
            ax.imshow(_as_image(image))
            _bare(ax, *((color, 2.4, line) if c == 0 else ()))
            if c == 0:
                ax.set_title(name, loc="left", fontsize=8, color=color, fontweight="bold", pad=3)
        ax = fig.add_subplot(grid[r, 1])
        picture = ax.imshow(tiles[r], vmin=inside.min(), vmax=inside.max())
        _bare(ax)
        off = tiles[r][~np.eye(size, dtype=bool)]
        ax.set_title(f"mean {format_value(off.mean(), 3)}", loc="center", fontsize=7, pad=3)
        heat.append(ax)
    bar = fig.colorbar(picture, ax=heat, location="right", fraction=0.08, shrink=0.7, aspect=22, pad=0.03)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    bar.locator = mpl.ticker.MaxNLocator(4)
    bar.update_ticks()
    panel = fig.add_subplot(right_half)
    draw_intervals(panel, frame, annotate="attack")
    panel.set_title(panel_title)
    methods = [m for m in dict.fromkeys(frame.get("method", ())) if m]
    if len(methods) > 1:
        style = dict(linestyle="none", color="#444444", markersize=4.5)
        handles = [Line2D([], [], marker=marker_of(m), label=label_of(m), **style) for m in methods]
        fig.legend(handles=handles, loc="outside lower right", ncols=len(methods), handletextpad=0.2)
    index = np.indices(tiles.shape).reshape(3, -1)
    pairs = pd.DataFrame(
        {
            "part": "similarity", "group": np.asarray(row_names, object)[index[0]], "view": index[1] + 1,
            "other": index[2] + 1, "value": tiles.ravel(),
        }
    )  # fmt: skip
    return fig, pd.concat([pairs, frame.assign(part="setting")], ignore_index=True)


@_styled
def draw_cells(ax: Axes, frame: pd.DataFrame, *, widths: Mapping[str, float], n_head: int | None = None) -> None:
    """Draw a table of texts, some cells shaded.

    Args:
        ax: axes; they are filled.
        frame: columns ``row, column, text``, and optionally ``note`` (small, under the text), ``shade`` (0 to 1, empty:
            none) and ``bold``; rows in the order of first appearance.
        widths: column -> width, from left to right; columns called ``"V|AUC"`` and ``"V|recall"`` stand under one
            heading ``V``.
        n_head: rows above this index are set off from those below.
    """
    frame = _require(frame, "row", "column", "text")
    rows = list(dict.fromkeys(frame["row"]))
    edges = dict(zip(widths, np.cumsum([0.0, *widths.values()]), strict=False))
    ax.set(xlim=(0, sum(widths.values())), ylim=(len(rows) - 0.5, -2.3))
    for cell in frame.to_dict("records"):
        y, x, width = rows.index(cell["row"]), edges[cell["column"]], widths[cell["column"]]
        shade = cell.get("shade")
        shade = None if shade is None or not np.isfinite(shade) else float(np.clip(shade, 0, 1))
        if shade is not None:
            ax.add_patch(
                Rectangle(
                    (x, y - 0.5), width, 1, facecolor=mpl.colormaps["Blues"](0.9 * shade), edgecolor="white",
                    linewidth=0.8,
                )
            )  # fmt: skip
        ink = "white" if shade is not None and shade > 0.62 else "black"
        note = cell.get("note") or ""
        note = note if isinstance(note, str) else ""
        weight = "bold" if cell.get("bold") is True else "normal"
        ax.text(
            x + width / 2, y - (0.14 if note else 0), cell["text"], ha="center", va="center", color=ink, fontsize=7,
            fontweight=weight,
        )  # fmt: skip
        if note:
            ax.text(x + width / 2, y + 0.25, note, ha="center", va="center", color=ink, fontsize=5.3)
    groups: dict[str, list[str]] = {}
    for column in widths:
        groups.setdefault(column.rpartition("|")[0] or column, []).append(column)
    for group, columns in groups.items():
        low, high = edges[columns[0]], edges[columns[-1]] + widths[columns[-1]]
        grouped = "|" in columns[0]
        if grouped:
            ax.text((low + high) / 2, -1.95, group, ha="center", va="center", fontsize=8, fontweight="bold")
            ax.plot([low + 0.04, high - 0.04], [-1.55] * 2, color="#222222", linewidth=0.7)
        for column in columns:
            name = column.rpartition("|")[2]
            ax.text(edges[column] + widths[column] / 2, -0.95, name, ha="center", va="center", fontsize=6.5)
    ax.axhline(-0.5, color="#222222", linewidth=0.8)
    if n_head is not None and 0 < n_head < len(rows):
        ax.axhline(n_head - 0.5, color="#222222", linewidth=0.8)
    ax.set_axis_off()


# Fills of label maps (after the Tableau 20): classes that follow each other differ in hue and in lightness.
_FILLS = (
    "#4E79A7", "#F1CE63", "#59A14F", "#E15759", "#A0CBE8", "#9D7660", "#FFBE7D", "#B07AA1", "#8CD17D", "#79706E",
    "#F28E2B", "#86BCB6", "#D37295", "#B6992D", "#FABFD2", "#499894", "#FF9D9A", "#BAB0AC", "#D4A6C8", "#D7B5A6",
)  # fmt: skip


def paint_labels(labels: Any, *, void: int = 255) -> np.ndarray:
    """Color a label map.

    Args:
        labels: (..., H, W) integer class ids.
        void: id of pixels without a class, left white.

    Returns:
        (..., H, W, 3) uint8.
    """
    labels = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels).astype(int)
    fills = np.array([[int(fill[i : i + 2], 16) for i in (1, 3, 5)] for fill in _FILLS], np.uint8)
    painted = fills[labels % len(fills)]
    painted[labels == void] = 255
    return painted


def paint_heat(values: Any, *, end: float) -> np.ndarray:
    """Color numbers from 0 to ``end`` on the book's scale, the same for all maps of a sheet. (...) -> (..., 3) uint8"""
    values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, float)
    return (255 * mpl.colormaps[STYLE["image.cmap"]](values / max(end, 1e-12))[..., :3]).round().astype(np.uint8)


@_styled
def draw_loss_maps(
    images: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    loss_maps: np.ndarray,
    *,
    is_member: np.ndarray,
    class_names: Sequence[str],
    title: str,
    image_ids: Sequence[str] | None = None,
    void: int = 255,
) -> tuple[Figure, pd.DataFrame]:
    """Draw pictures with their labels, predictions and loss maps, members left and strangers right, on one scale.

    Args:
        images: (n, H, W, 3) uint8.
        labels, predicted: (n, H, W) class ids.
        loss_maps: (n, h, w) loss of every pixel, 0 where the label is void.
        is_member: (n,) bool.
        class_names: C names.
        title: the finding.
        image_ids: (n,) names for the table.
        void: id of pixels without a class.

    Returns:
        figure, table ``image_id, is_member, mean_loss, share_wrong, scale_end``.
    """
    is_member, labels, predicted = np.asarray(is_member, bool), np.asarray(labels), np.asarray(predicted)
    maps = np.asarray(loss_maps, float)
    n = len(images)
    if not len(labels) == len(predicted) == len(maps) == len(is_member) == n:
        got = [len(a) for a in (labels, predicted, maps, is_member)]
        raise ValueError(f"expected {n} label maps, predictions, loss maps and memberships, got {got}")
    order = np.argsort(~is_member, kind="stable")
    valid = labels != void
    wrong = [float((predicted[i] != labels[i])[valid[i]].mean()) if valid[i].any() else np.nan for i in range(n)]
    # the mean over valid pixels, also where large maps were averaged over cells
    mean = [float(maps[i].mean() / max(valid[i].mean(), 1e-9)) for i in range(n)]
    end = max(float(np.percentile(maps, 99)), 1e-3)
    left, bar, gap = 0.2, 0.52, 0.12  # inches: names of the rows, scale, space between the two sides
    cell = (FULL - left - bar - gap) / n
    aspect = images.shape[1] / images.shape[2]
    side = cell * aspect
    n_member = int(is_member.sum())
    widths = [cell] * n_member + [gap] + [cell] * (n - n_member) + [0.1]
    shown = sorted(set(np.unique(labels[valid])) | set(np.unique(predicted)))
    fills = [Patch(facecolor=_FILLS[c % len(_FILLS)], label=str(class_names[c])) for c in shown]
    if not valid.all():
        fills.append(Patch(facecolor="white", edgecolor="#777777", linewidth=0.5, label="void"))
    lines = -(-len(fills) // 8)
    fig = Figure(figsize=(FULL, 4 * side + 0.72 + 0.16 * lines), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.025, h_pad=0.02, wspace=0.01, hspace=0.01)
    set_title(fig, title)
    grid = fig.add_gridspec(4, n + 2, width_ratios=widths)
    names = ("picture", "true classes", "predicted", "loss map")
    for place, i in enumerate(order):
        color, line = (MEMBER_COLOR, MEMBER_LINE) if is_member[i] else (STRANGER_COLOR, STRANGER_LINE)
        column = place + int(not is_member[i])
        rows = (_as_image(images[i]), paint_labels(labels[i], void=void), paint_labels(predicted[i], void=void))
        for r, content in enumerate((*rows, maps[i])):
            ax = fig.add_subplot(grid[r, column])
            drawn = ax.imshow(content, vmin=0, vmax=end) if r == 3 else ax.imshow(content)
            _bare(ax, *((color, 1.8, line) if r == 0 else ()))
            if place == 0:
                ax.set_ylabel(names[r], fontsize=7)
            if r == 0:
                name = "member" if is_member[i] else "stranger"
                ax.set_title(name, loc="center", fontsize=7, pad=4, color=color, fontweight="bold")
        ax.set_xlabel(format_value(mean[i]), fontsize=7, labelpad=2)
    scale = fig.colorbar(drawn, cax=fig.add_subplot(grid[3, -1]), extend="max")
    scale.ax.tick_params(labelsize=6, length=2)
    scale.set_label("loss", fontsize=6.5, labelpad=2)
    fig.legend(
        handles=fills, loc="outside lower left", ncols=-(-len(fills) // lines), fontsize=6.5, handlelength=1.0,
        handleheight=0.9, columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip
    table = pd.DataFrame(
        {
            "image_id": list(image_ids) if image_ids is not None else [""] * n, "is_member": is_member.astype(int),
            "mean_loss": mean, "share_wrong": wrong, "scale_end": end,
        }
    )  # fmt: skip
    return fig, table.iloc[order].reset_index(drop=True)


@_styled
def draw_pairs(ax: Axes, frame: pd.DataFrame, *, xlabel: str, legend: bool = True) -> None:
    """Draw one value of members and one of strangers per line, joined, beside the lines of ``draw_intervals``.

    Args:
        ax: axes.
        frame: columns ``label, member, stranger``, one row per label.
        xlabel: name of the value.
        legend: name the two marks.
    """
    frame = _require(frame, "label", "member", "stranger")
    for y, (member, stranger) in enumerate(zip(frame["member"], frame["stranger"], strict=True)):
        ax.plot([member, stranger], [y, y], color="#BBBBBB", linewidth=1.0, zorder=1)
        ax.plot(member, y, "o", color=MEMBER_COLOR, markersize=4.5, label="members" if y == 0 else "")
        ax.plot(stranger, y, "s", color=STRANGER_COLOR, markersize=4, label="strangers" if y == 0 else "")
    ax.set(xlabel=xlabel, ylim=(len(frame) - 0.4, -0.6))
    ax.set_xlim(0, 1.06 * max(float(frame[["member", "stranger"]].max().max()), 1e-9))
    if legend:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.1, columnspacing=0.8)
    ax.grid(True, axis="x")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


@dataclass(frozen=True)
class Step:
    """One box of ``draw_pipeline``.

    Attributes:
        title: what it is, two or three words.
        content: (H, W, 3) image, (H, W) heat map, (n,) vector drawn as bars, a list of images (drawn as a 3 x 3 sheet),
            text (a score in large letters), or None for an empty frame.
        caption: under the box, for example the shape or a number.
        arrow: over the arrow that leaves the box, for example "encoder".
    """

    title: str
    content: Any = None
    caption: str = ""
    arrow: str = ""


@_styled
def draw_pipeline(
    steps: Sequence[Step | tuple | Mapping], *, title: str, per_line: int = 5
) -> tuple[Figure, pd.DataFrame]:
    """Draw "the attack in one picture": boxes with real tensors as thumbnails, joined by arrows.

    Args:
        steps: ``Step`` objects, ``(title, content, caption, arrow)`` tuples or mappings.
        title: the idea in one sentence.
        per_line: boxes a line; more steps wrap to the next line.

    Returns:
        figure, table ``step, title, caption, shape, minimum, maximum``.
    """
    boxes = [s if isinstance(s, Step) else (Step(**s) if isinstance(s, Mapping) else Step(*s)) for s in steps]
    cols = min(per_line, len(boxes))
    lines = -(-len(boxes) // cols)
    chars = int(FULL / cols * 12.5)
    titles = ["\n".join(textwrap.wrap(b.title, chars)) for b in boxes]
    captions = ["\n".join(textwrap.wrap(b.caption, int(chars * 1.15))) for b in boxes]
    # inches; text takes 0.14 a line
    side = FULL / cols * 0.70
    top = 0.16 * max(t.count("\n") + 1 for t in titles) + 0.10
    bottom = 0.14 * max(c.count("\n") + 1 for c in captions) + 0.12
    heading = "\n".join(textwrap.wrap(title, int(FULL * TITLE_CHARS)))
    head = 0.17 * (heading.count("\n") + 1) + 0.10
    height = head + lines * (top + side + bottom)
    fig = Figure(figsize=(FULL, height))
    fig.suptitle(heading, x=0.01, y=1 - 0.05 / height, ha="left", va="top", fontsize=9, fontweight="bold")
    pitch = FULL / cols
    records = []
    for i, box in enumerate(boxes):
        line, col = divmod(i, cols)
        left = col * pitch + (pitch - side) / 2
        low = height - head - line * (top + side + bottom) - top - side
        ax = fig.add_axes((left / FULL, low / height, side / FULL, side / height))
        content = box.content.detach().cpu().numpy() if hasattr(box.content, "detach") else box.content
        _draw_content(fig, ax, content)
        fig.text(
            (left + side / 2) / FULL,
            (low + side + 0.06) / height,
            titles[i],
            ha="center",
            va="bottom",
            fontsize=8,
            fontweight="bold",
        )
        fig.text(
            (left + side / 2) / FULL,
            (low - 0.07) / height,
            captions[i],
            ha="center",
            va="top",
            fontsize=7,
            color="#444444",
        )
        if i + 1 < len(boxes):
            middle = low + side / 2
            if col + 1 < cols:
                start, end = (left + side + 0.05, middle), (left + pitch - 0.05, middle)
                text_at = ((start[0] + end[0]) / 2, middle + 0.05)
            else:  # the line is full: a short arrow out of the right side says that it goes on below
                start, end = (left + side + 0.05, middle), (FULL - 0.04, middle)
                text_at = ((start[0] + end[0]) / 2, middle + 0.05)
            fig.add_artist(
                FancyArrowPatch(
                    (start[0] / FULL, start[1] / height), (end[0] / FULL, end[1] / height), transform=fig.transFigure,
                    arrowstyle="-|>", mutation_scale=9, linewidth=1.0, color="#333333",
                )
            )  # fmt: skip
            if box.arrow:
                fig.text(
                    text_at[0] / FULL,
                    text_at[1] / height,
                    "\n".join(textwrap.wrap(box.arrow, 9)),
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    color="#333333",
                )
        array = (
            np.stack([np.asarray(_as_image(c)) for c in content])
            if isinstance(content, (list, tuple))
            else (None if content is None or isinstance(content, str) else np.asarray(content))
        )
        records.append(
            {
                "step": i + 1, "title": box.title, "caption": box.caption,
                "shape": "" if array is None else "x".join(map(str, array.shape)),
                "minimum": np.nan if array is None else float(array.min()),
                "maximum": np.nan if array is None else float(array.max()),
            }
        )  # fmt: skip
    return fig, pd.DataFrame(records)


def _draw_content(fig: Figure, ax: Axes, content: Any) -> None:
    """Draw one pipeline box: text frame, sheet of images, bars, heat map or image."""
    if content is None or isinstance(content, str):
        _bare(ax, "#333333", 0.8)
        text = "\n".join(textwrap.wrap(content or "", 9))
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=11, fontweight="bold")
        return
    if isinstance(content, (list, tuple)):
        ax.set_axis_off()
        images = [_as_image(c) for c in content]
        n = int(np.ceil(np.sqrt(min(len(images), 9))))
        place = ax.get_position()
        for k, image in enumerate(images[: n * n]):
            row, col = divmod(k, n)
            width, height = place.width / n, place.height / n
            small = fig.add_axes(
                (
                    place.x0 + col * width + 0.03 * width,
                    place.y1 - (row + 1) * height + 0.03 * height,
                    0.94 * width,
                    0.94 * height,
                )
            )
            small.imshow(image, aspect="auto")
            _bare(small)
        return
    array = np.asarray(content)
    if array.ndim == 1:
        ax.bar(np.arange(len(array)), array.astype(float), width=1.0, color="#4D4D4D")
        ax.set_xlim(-0.5, len(array) - 0.5)
        _bare(ax, "#333333", 0.8)
    elif array.ndim == 2:
        ax.imshow(array.astype(float), aspect="auto")
        _bare(ax, "#333333", 0.8)
    else:
        ax.imshow(_as_image(array), aspect="auto")
        _bare(ax, "#333333", 0.8)


__all__ = [
    "ATTACK_COLORS", "ATTACK_LABELS", "CONTROL_LABELS", "CONTROL_STYLES", "DEFENSE_COLORS", "DEFENSE_LABELS", "FULL",
    "HALF", "MEMBER_COLOR", "METHOD_LABELS", "METHOD_MARKERS", "STRANGER_COLOR", "STYLE", "Step", "color_of",
    "command_for", "count_scores", "draw_cells", "draw_chance", "draw_guess_grid", "draw_histograms",
    "draw_intervals", "draw_ladder", "draw_lines", "draw_loss_maps", "draw_losses", "draw_matrix", "draw_pairs",
    "draw_part_curves", "draw_part_responses", "draw_pipeline", "draw_points", "draw_rates", "draw_reconstructions",
    "draw_roc", "draw_similarity_maps", "draw_sorted_reconstructions", "draw_sweep", "draw_views", "format_interval",
    "format_table", "format_value", "label_of", "make_figure", "make_legend", "marker_of", "paint_heat",
    "paint_labels", "save", "set_title", "show", "tame_log_axis", "use_style", "write_atomic",
]  # fmt: skip
