"""What an audit found, as one sentence, text, a page, JSON and a table of scores; and the exit code for CI."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mia_utils import paths
from mia_utils.audit.battery import Found
from mia_utils.audit.gates import Gate
from mia_utils.models.checkpoints import Facts
from mia_utils.protocol import intervals
from mia_utils.protocol.intervals import Control, format_interval, format_value
from mia_utils.protocol.result import Result

NOTHING, LEAK, INVALID, INCONCLUSIVE = 0, 3, 4, 5
ENOUGH = 0.75  # "nothing found" needs the power to see this AUC; with less the audit is inconclusive
PRIORS = (0.01, 0.1, 0.5)
SHOWN = 8  # images at each end of the ranking


@dataclass(eq=False)
class Report:
    """What an audit found; ``print(report)`` says it in words, a notebook shows the page.

    Attributes:
        results: label of each attack -> its scores, suspected images as members.
        found: the one p-value and what goes with it; None where a gate stopped the audit before any query.
        control, no_model: the no-model control as the verdict takes it, and its scores.
        untrained: (label, AUC, p) of the strongest attack on an untrained model; None: not run (``notes`` say why).
        facts: what is known of the model, fact -> (value, "read", "assumed" or "given").
        doubt: why "nothing found" would say nothing; empty where the model does its job.
        meta: seed, command, hashes, versions.
        thumbnails: position -> image (h, w, 3) uint8 at both ends of the ranking.
    """

    encoder: str
    suspected: str
    reference: str
    task: str
    is_member: np.ndarray = field(repr=False)
    image_ids: np.ndarray = field(repr=False)
    gates: list[Gate]
    control: Control
    no_model: Result = field(repr=False)
    level: float = 0.01
    results: dict[str, Result] = field(default_factory=dict, repr=False)
    found: Found | None = None
    untrained: tuple[str, float, float] | None = None
    facts: Facts = field(default_factory=Facts)
    not_tried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubt: str = ""
    n_dropped: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    thumbnails: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def best(self) -> str:
        """Label of the attack that stands out most, on either side of .5; empty where none ran."""
        return list(self.results)[self.found.strongest] if self.found else ""

    @property
    def result(self) -> Result | None:
        """Scores of the attack that stands out most."""
        return self.results.get(self.best)

    @property
    def scores(self):
        """DataFrame, one row per image: id, side, a column per attack (higher = more likely a member), percentile."""
        import pandas as pd  # of the book: an audit runs without it

        return pd.DataFrame(self._columns)

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        columns = {"image": self.image_ids, "suspected": self.is_member}
        columns |= {label: result.score for label, result in self.results.items()}
        if self.result is not None:
            below = np.searchsorted(np.sort(self.result.score), self.result.score, side="right")
            columns["percentile"] = (100 * below / len(below)).round(1)
        return columns

    @property
    def p_value(self) -> float:
        """One two-sided p-value for all attacks tried; NaN where none was."""
        return self.found.p if self.found else float("nan")

    @property
    def minimum_detectable(self) -> float:
        """AUC that every attack tried would have shown with 80 % power, the search accounted for."""
        return float(self.found.detectable.max()) if self.found else float("nan")

    @property
    def void_because(self) -> str:
        """Why nothing can be concluded; empty where something can."""
        failed = [gate.found for gate in self.gates if not gate.passed]
        if not failed and self.untrained and self.untrained[2] <= self.level:
            label, auc, p = self.untrained
            said = f"{label}: AUC {format_value(auc)}, p = {p:.2g}"
            saw = ", or a reference model saw one of them" * label.endswith("reference")
            return f"an untrained model tells the two sets apart as well ({said}){saw}"
        return "; ".join(failed)

    @property
    def void(self) -> bool:
        """Whether the audit is invalid."""
        return bool(self.void_because)

    @property
    def verdict(self) -> str:
        """One sentence."""
        return self._decide()[1]

    @property
    def exit_code(self) -> int:
        """0 nothing found, 3 leak shown, 4 invalid, 5 inconclusive."""
        return self._decide()[0]

    def _decide(self) -> tuple[int, str]:
        if self.void:
            end = "No model was queried" if self.found is None else "A high score says nothing about training"
            return INVALID, f"INVALID: {self.void_because}. {end}."
        best, n = self.result, len(self.results)
        auc = f"{self.best}: AUC {format_interval(best.auc, best.auc_low, best.auc_high)}"
        tried = f"p = {self.p_value:.2g} over {n} attack{'s' * (n > 1)} tried"
        if self.p_value <= self.level and self.found.z[self.found.strongest] < 0:
            low = f"INCONCLUSIVE: the suspected images score lower than chance allows ({auc}; {tried})"
            return INCONCLUSIVE, f"{low}: the folders differ in something else."
        if self.p_value <= self.level:
            shown = intervals.decide(best.auc, best.auc_low, best.auc_high, control=self.control)
            higher = f"the suspected images score higher ({auc}; {tried})"
            if shown.verdict == "shown":
                return LEAK, f"LEAK SHOWN: {higher}, if the folders differ in nothing else."
            return INCONCLUSIVE, f"INCONCLUSIVE: {higher}, but {intervals.say(shown)}: use more images."
        seen = f"an AUC of {format_value(self.minimum_detectable)} would have been seen"
        if self.minimum_detectable <= ENOUGH and not self.doubt:
            text = f"NOTHING FOUND at level {self.level:g} ({tried}; strongest {auc}; {seen} in each with 80 % power)."
            return NOTHING, text
        why = self.doubt or f"only {seen}: use more images"
        return INCONCLUSIVE, f"INCONCLUSIVE: not shown at level {self.level:g} ({tried}; strongest {auc}), and {why}."

    def __str__(self) -> str:
        m = int(self.is_member.sum())
        dropped = f"; {self.n_dropped} repeated images left out" if self.n_dropped else ""
        sets = f"{m} suspected images ({self.suspected}) against {len(self.is_member) - m} reference images"
        lines = [f"Audit of {self.encoder}: {sets} ({self.reference}){dropped}"]
        lines += [f"ASSUMED, give it if you know better: {fact}" for fact in self.facts.assumed]
        lines += [f"gate {g.name:<7} {'passes' if g.passed else 'FAILS'}: {g.found}" for g in self.gates]
        lines += [f"attack  {row['attack']}: AUC {row['interval']}, p = {row['p']:.2g}" for row in self.rows]
        if self.untrained:
            lines.append(f"control untrained model, {self.untrained[0]}: AUC {format_value(self.untrained[1])}")
        lines += [f"not tried: {line}" for line in self.not_tried] + self.notes
        return "\n".join([*lines, self.verdict])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per attack: AUC with its interval, p alone, what would have been seen."""
        made = []
        for i, (label, r) in enumerate(self.results.items()):
            row = {"attack": label, "auc": r.auc, "auc_low": r.auc_low, "auc_high": r.auc_high}
            row |= {"interval": format_interval(r.auc, r.auc_low, r.auc_high), "p": float(self.found.p_single[i])}
            made.append(row | {"minimum_detectable": float(self.found.detectable[i])})
        return made

    @property
    def odds(self) -> list[dict[str, float]]:
        """Of 100 images ranked as high as the top tenth of reference images, how many are members, at some priors."""
        score = self.result.score
        threshold = np.quantile(score[~self.is_member], 0.9)
        tpr, fpr = ((score[side] >= threshold).mean() for side in (self.is_member, ~self.is_member))
        return [{"prior": x, "members_of_100": round(float(100 * x * tpr / (x * tpr + (1 - x) * fpr)))} for x in PRIORS]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scores, as ``audit.schema.json`` describes it."""
        m, ran, untrained = int(self.is_member.sum()), self.found is not None, self.untrained
        return {
            "schema_version": 1, "verdict": self.verdict, "exit_code": self.exit_code, "model": self.encoder,
            "task": self.task, "level": self.level, "suspected": {"name": self.suspected, "n": m},
            "reference": {"name": self.reference, "n": len(self.is_member) - m},
            "facts": [{"fact": k, "value": v, "source": s} for k, (v, s) in self.facts.items()],
            "gates": [vars(g) | {"details": list(g.details)[:100]} for g in self.gates],
            "attacks": [{k: v for k, v in row.items() if k != "interval"} for row in self.rows],
            "p_value": self.p_value if ran else None, "not_tried": self.not_tried, "notes": self.notes,
            "minimum_detectable": self.minimum_detectable if ran else None,
            "untrained": dict(zip(("attack", "auc", "p"), untrained, strict=True)) if untrained else None,
            "odds": self.odds if ran else [], "n_dropped": self.n_dropped, "meta": self.meta,
        }  # fmt: skip

    def plot(self, kind: str = "forest") -> Picture:
        """Draw ``"forest"`` (all attacks with intervals), ``"roc"`` (log-log) or ``"histogram"`` of the strongest."""
        if kind == "forest":
            return draw_forest(self.rows, self.control)
        return (draw_roc if kind == "roc" else draw_histogram)(self.best, self.result)

    def to_html(self) -> str:
        """One page without any request: verdict, model, gates, attacks, images, power, ways out."""
        text = resources.files("mia_utils.audit").joinpath("audit.html").read_text(encoding="utf-8")
        figures, images = [], []
        if self.found:
            figures = [self.plot(kind) for kind in ("forest", "roc", "histogram")]
            for i in sorted(self.thumbnails, key=lambda i: -self.result.score[i]):
                what = {"id": str(self.image_ids[i]), "percentile": self._columns["percentile"][i]}
                images.append(what | {"source": _encode(self.thumbnails[i])})
        page = jinja2.Environment(autoescape=True).from_string(text)
        return page.render(report=self, audit=self.to_dict(), figures=figures, images=images)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.to_html())}" style="width:100%;height:640px;border:0"></iframe>'

    def save(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``audit.json`` and ``scores.csv`` into a folder."""
        texts = {"audit.json": json.dumps(self.to_dict(), indent=1), "report.html": self.to_html()}
        table, columns = io.StringIO(), self._columns
        rows = ([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in zip(*columns.values(), strict=True))
        csv.writer(table, lineterminator="\n").writerows([columns, *rows])
        texts["scores.csv"] = table.getvalue()
        for name, text in texts.items():
            paths.write_atomic(Path(folder) / name, text)
        return Path(folder)


def _encode(image: np.ndarray) -> str:
    shown, buffer = Image.fromarray(image), io.BytesIO()
    shown.thumbnail((96, 96))
    shown.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# drawn by matplotlib alone: an audit runs without what draws the book
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
