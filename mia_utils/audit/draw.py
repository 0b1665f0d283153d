"""The three drawings of a report, by matplotlib alone: an audit runs without what draws the book."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mia_utils.protocol.intervals import Control
from mia_utils.protocol.result import Result

SUSPECTED, REFERENCE, GRAY = "#D81B60", "#1E9A8E", "#9A9A9A"  # as in the book
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


@dataclass
class Picture:
    """A drawing as a notebook and the page show it."""

    title: str
    png: bytes = b""

    def __html__(self) -> str:
        source = f"data:image/png;base64,{base64.b64encode(self.png).decode()}"
        width = int.from_bytes(self.png[16:20], "big") // 2  # of the PNG header; drawn at twice the size
        return f'<img alt="{html.escape(self.title)}" width="{width}" src="{source}">'

    _repr_html_ = __html__


@contextmanager
def _draw(picture: Picture, width: float, height: float) -> Iterator[Any]:
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        ax = fig.subplots()
        yield ax
        ax.set_title(picture.title, loc="left", fontsize=9, fontweight="bold")
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=200)
    picture.png = buffer.getvalue()


def draw_forest(rows: Sequence[dict[str, Any]], control: Control) -> Picture:
    """Draw the AUC of every attack, and of the control without a model, with 95 % intervals."""
    names = ("auc", "auc_low", "auc_high")
    shown = [*rows, {"attack": "no model (control)", **dict(zip(names, control[:3], strict=True))}]
    auc, low, high = (np.array([row[name] for row in shown]) for name in names)
    picture = Picture("All attacks tried, and the control without a model")
    with _draw(picture, 6.4, 0.7 + 0.24 * len(shown)) as ax:
        for i, row in enumerate(shown):
            color = "#222222" if i == len(shown) - 1 else SUSPECTED if row["auc_low"] > 0.5 else "#6B6B6B"
            ax.errorbar(auc[i], i, xerr=[[auc[i] - low[i]], [high[i] - auc[i]]], fmt="o", color=color, markersize=4)
        ax.axvline(0.5, color=GRAY, linewidth=0.7, linestyle=":")
        ax.set(yticks=range(len(shown)), yticklabels=[row["attack"] for row in shown], xlabel="AUC, 95 % interval")
        ax.set_xlim(min(0.4, low.min() - 0.02), max(0.7, high.max() + 0.02))
        ax.invert_yaxis()
    return picture


def draw_roc(label: str, result: Result) -> Picture:
    """Draw the ROC on log axes, where the images lie that an attacker is sure of."""
    roc, picture = result.metrics.roc, Picture("ROC of the strongest attack")
    floor = 1 / max(int((~result.is_member).sum()), 10)
    with _draw(picture, 3.6, 2.7) as ax:
        ax.fill_between(roc.fpr, np.clip(roc.low, floor / 3, 1), roc.high, alpha=0.15, color=SUSPECTED)
        ax.plot(roc.fpr, np.clip(roc.tpr, floor / 3, 1), color=SUSPECTED, label=label)
        ax.plot([floor, 1], [floor, 1], color=GRAY, linewidth=0.7, linestyle=":", label="chance")
        ax.set(xscale="log", yscale="log", xlabel="reference images flagged", ylabel="suspected images flagged")
        ax.legend()
    return picture


def draw_histogram(label: str, result: Result) -> Picture:
    """Draw how the scores of both sides are distributed."""
    edges, picture = np.histogram_bin_edges(result.score, 24), Picture("Scores of the strongest attack")
    with _draw(picture, 3.6, 2.7) as ax:
        for side, color, name in ((True, SUSPECTED, "suspected"), (False, REFERENCE, "reference")):
            score = result.score[result.is_member == side]
            ax.stairs(np.histogram(score, edges)[0] / len(score), edges, color=color, fill=True, alpha=0.35, label=name)
        ax.set(xlabel=f"{label}: higher = more likely a member", ylabel="share of images")
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper left", ncols=2)
    return picture
