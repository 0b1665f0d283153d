"""What an audit found, as one sentence, text, a page, JSON and a table of scores; and the exit code for CI."""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from PIL import Image

from mia_utils import __version__, paths, plots
from mia_utils.audit.battery import Found
from mia_utils.audit.gates import Gate
from mia_utils.plots.style import STYLE, label_of
from mia_utils.protocol import intervals
from mia_utils.protocol.intervals import Control, Verdict, format_auc, format_interval
from mia_utils.protocol.result import Result

SCHEMA_VERSION = 1
NOTHING, BAD_INPUT, LEAK, INVALID, INCONCLUSIVE = 0, 2, 3, 4, 5
ENOUGH = 0.7  # "nothing found" needs the power to see this AUC; with less the audit is inconclusive
PRIORS = (0.01, 0.1, 0.5)
SHOWN = 8  # images at each end of the ranking
NO_PROOF = (
    "A p-value on found images is no proof: it assumes that the two folders are exchangeable but for the training "
    "(Zhang et al., arXiv 2409.19798). Canaries drawn before the training prove: mia-audit canaries make."
)
WAYS_OUT = {
    LEAK: (
        "train for fewer epochs, or stop early: leakage grows with how often an image is seen",
        "use stronger crops and color augmentation in training, and do not tell their settings",
        "serve rounded or noisy outputs instead of full embeddings, and limit queries per image",
        "train with DP-SGD where images are sensitive: the only defense with a guarantee",
        "audit again after each change, with the same folders",
    ),
    INVALID: (
        "take reference images from the same source, period and camera, prepared by the same program",
        "re-encode both folders from their originals in one go, and shuffle names",
        "remove images that are in both folders",
    ),
    INCONCLUSIVE: ("use more images: the smallest AUC that is seen falls with the square root of their number",),
    NOTHING: ("nothing found is no guarantee: attacks with reference models or white-box access see more",),
}


@dataclass(eq=False)
class Report:
    """What an audit found; ``print(report)`` says it in words, a notebook shows the page.

    Attributes:
        encoder, suspected, reference: names of the model and the two sets.
        task: ``"encoder"`` or ``"segmenter"``.
        results: label of each attack -> its scores, suspected images as members.
        found: AUC, z and p of the attacks in that order, and the one p-value (:class:`battery.Found`); None where a
            gate stopped the audit before any query.
        gates: files, copies, pixels.
        control: the no-model control as the verdict takes it; ``no_model``: its scores.
        untrained: (label, AUC, p) of the best attack on an untrained model; None: not run (``reasons`` says why).
        facts: what is known of the model, fact -> (value, "read", "assumed" or "given").
        not_tried: attacks that were left out and why.
        notes: what else the reader must know.
        level: p-values up to this count.
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
    level: float = 0.01
    results: dict[str, Result] = field(default_factory=dict, repr=False)
    found: Found | None = None
    control: Control | None = None
    no_model: Result | None = field(default=None, repr=False)
    untrained: tuple[str, float, float] | None = None
    facts: dict[str, tuple[str, str]] = field(default_factory=dict)
    not_tried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_dropped: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    thumbnails: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------------------------------------- verdict

    @property
    def best(self) -> str:
        """Label of the attack that stands out most; empty where none ran."""
        return list(self.results)[int(np.argmax(self.found.z))] if self.found else ""

    @property
    def result(self) -> Result | None:
        """Scores of the attack that stands out most."""
        return self.results.get(self.best)

    @property
    def scores(self) -> pd.DataFrame:
        """One row per image: id, side, a column per attack (higher = more likely a member), its percentile."""
        table = pd.DataFrame({"image": self.image_ids, "suspected": self.is_member})
        for label, result in self.results.items():
            table[label] = result.score
        if self.result is not None:
            table["percentile"] = (100 * table[self.best].rank(pct=True)).round(1)
        return table

    @property
    def p_value(self) -> float:
        """One p-value for all attacks tried: the suspected images score higher."""
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
            numbers = f"{label}: AUC {format_auc(auc)}, p = {p:.2g}"
            failed = [f"an untrained model tells the two sets apart as well ({numbers})"]
        return "; ".join(failed)

    @property
    def void(self) -> bool:
        """Whether the audit is invalid."""
        return bool(self.void_because)

    @property
    def decided(self) -> Verdict:
        """The one rule (``intervals.decide``) on the attack that stands out most."""
        best = self.result
        return intervals.decide(best.auc, best.auc_low, best.auc_high, control=self.control)

    @property
    def exit_code(self) -> int:
        """0 nothing found, 3 leak shown, 4 invalid, 5 inconclusive."""
        if self.void:
            return INVALID
        if self.p_value <= self.level:
            return LEAK if self.decided.verdict == "shown" else INCONCLUSIVE
        reversed_ = self.found.p_reversed <= self.level
        return NOTHING if self.minimum_detectable <= ENOUGH and not reversed_ else INCONCLUSIVE

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.void and self.found is None:
            return f"INVALID: {self.void_because}. No model was queried."
        if self.void:
            return f"INVALID: {self.void_because}, so a high score says nothing about training."
        n, best = len(self.results), self.result
        auc = f"{self.best}: AUC {format_interval(best.auc, best.auc_low, best.auc_high)}"
        tried = f"p = {self.p_value:.2g} over {n} attack{'s' * (n > 1)} tried"
        seen = f"an AUC of {format_auc(self.minimum_detectable)} would have been seen"
        if self.exit_code == LEAK:
            how = f"{auc}; {tried}"
            return f"LEAK SHOWN: the suspected images score higher ({how}), if the folders differ in nothing else."
        if self.p_value <= self.level:
            why = intervals.say(self.decided)
            return f"INCONCLUSIVE: the suspected images score higher ({auc}; {tried}), but {why}: use more images."
        if self.found.p_reversed <= self.level:
            low = list(self.results)[int(np.argmin(self.found.z))]
            return f"INCONCLUSIVE: the suspected images score lower than chance allows ({low}): the folders differ."
        if self.exit_code == NOTHING:
            return f"NOTHING FOUND at level {self.level:g} ({tried}; best {auc}; {seen} in each with 80 % power)."
        shown = f"not shown at level {self.level:g} ({tried}; best {auc})"
        return f"INCONCLUSIVE: {shown}, and only {seen}: use more images."

    @property
    def assumed(self) -> list[str]:
        """Facts of the model that were neither read nor given: a wrong one hides a leak."""
        return [f"{fact}: {value}" for fact, (value, source) in self.facts.items() if source == "assumed"]

    def __str__(self) -> str:
        m = int(self.is_member.sum())
        dropped = f"; {self.n_dropped} repeated images left out" if self.n_dropped else ""
        sets = f"{m} suspected images ({self.suspected}) against {len(self.is_member) - m} reference images"
        lines = [f"Audit of {self.encoder}: {sets} ({self.reference}){dropped}"]
        lines += [f"ASSUMED, give it if you know better: {fact}" for fact in self.assumed]
        lines += [f"gate {g.name:<7} {'passes' if g.passed else 'FAILS'}: {g.found}" for g in self.gates]
        for row in self.rows:
            lines.append(f"attack  {row['attack']}: AUC {row['interval']}, p = {row['p']:.2g}")
        if self.untrained:
            lines.append(f"control untrained model, {self.untrained[0]}: AUC {format_auc(self.untrained[1])}")
        lines += [f"not tried: {line}" for line in self.not_tried] + self.notes
        return "\n".join([*lines, self.verdict])

    # -------------------------------------------------------------------------------------------------- record

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
        m, untrained = int(self.is_member.sum()), self.untrained
        out = {"schema_version": SCHEMA_VERSION, "verdict": self.verdict, "exit_code": self.exit_code}
        out |= {"model": self.encoder, "task": self.task, "level": self.level}
        out |= {"suspected": {"name": self.suspected, "n": m}}
        out |= {"reference": {"name": self.reference, "n": len(self.is_member) - m}}
        out |= {"facts": [{"fact": k, "value": v, "source": s} for k, (v, s) in self.facts.items()]}
        out |= {"gates": [vars(g) | {"details": list(g.details)[:100]} for g in self.gates]}
        out |= {"attacks": [{k: v for k, v in row.items() if k != "interval"} for row in self.rows]}
        out |= {"p_value": self.p_value if self.found else None, "not_tried": self.not_tried, "notes": self.notes}
        out |= {"minimum_detectable": self.minimum_detectable if self.found else None}
        out |= {"untrained": dict(zip(("attack", "auc", "p"), untrained, strict=True)) if untrained else None}
        return out | {"odds": self.odds if self.found else [], "n_dropped": self.n_dropped, "meta": self.meta}

    def plot(self, kind: str = "forest") -> plots.Drawn:
        """Draw ``"forest"`` (all attacks with intervals), ``"roc"`` (log-log) or ``"histogram"`` of the best attack."""
        if kind == "forest":
            rows = []
            for row in self.rows:
                attack, comma, rest = row["attack"].partition(",")
                rows.append(row | {"label": f"{label_of(attack)}{comma}{rest}", "attack": attack, "control": ""})
            rows.append({"label": "no model", "attack": "no-model", "control": "no-model"})
            rows[-1] |= dict(zip(("auc", "auc_low", "auc_high"), self.control[:3], strict=True))
            table = pd.DataFrame(rows).assign(seed=None, method="")
            return plots.dots(table, label="label", title="All attacks tried, and the control without a model")
        fig, axes = plots.make_figure(1, 1, width=3.6, height=2.6)
        ax, best = axes.flat[0], self.result
        with mpl.rc_context(STYLE):
            if kind == "roc":
                found, floor = best.metrics.roc, 1 / max(int((~self.is_member).sum()), 10)
                ax.fill_between(found.fpr, np.clip(found.low, floor / 3, 1), found.high, alpha=0.15)
                ax.plot(found.fpr, np.clip(found.tpr, floor / 3, 1), color=plots.color_of(best.attack))
                ax.plot([floor, 1], [floor, 1], color="#9A9A9A", linewidth=0.7, linestyle=":")
                ax.set(xscale="log", yscale="log", xlabel="reference images flagged", ylabel="suspected images flagged")
                return plots.finish(fig, pd.DataFrame(found._asdict()), title=f"ROC of {self.best}")
            edges = np.histogram_bin_edges(best.score, 24)
            sides = (True, plots.MEMBER_COLOR, "suspected"), (False, plots.NONMEMBER_COLOR, "reference")
            for side, color, name in sides:
                share = np.histogram(best.score[self.is_member == side], edges)[0] / (self.is_member == side).sum()
                ax.stairs(share, edges, color=color, fill=True, alpha=0.3, label=name)
            ax.set(xlabel="score, higher = more likely a member", ylabel="share of images")
            ax.legend()
        return plots.finish(fig, pd.DataFrame({"edge": edges[:-1]}), title=f"Scores of {self.best}")

    def to_html(self) -> str:
        """One page without any request: verdict, model, gates, attacks, images, power, ways out."""
        text = resources.files("mia_utils.audit").joinpath("audit.html").read_text(encoding="utf-8")
        kinds = ("forest", "roc", "histogram") if self.found else ()
        drawn = [self.plot(kind)._repr_mimebundle_()["text/html"] for kind in kinds]
        images = []
        if self.found:
            table = self.scores
            for i in sorted(self.thumbnails, key=lambda i: -table[self.best][i]):
                what = {"id": str(self.image_ids[i]), "percentile": table["percentile"][i]}
                images.append(what | {"source": _encode(self.thumbnails[i])})
        page = jinja2.Environment(autoescape=True).from_string(text)
        found = self.to_dict()
        more = dict(figures=drawn, images=images, power=_tell_power(self), no_proof=NO_PROOF)
        more |= dict(rows=self.rows, odds=found["odds"], ways=WAYS_OUT[self.exit_code])
        return page.render(report=self, audit=found, **more)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.to_html())}" style="width:100%;height:640px;border:0"></iframe>'

    def save(self, folder: str | Path) -> Path:
        """Write ``report.html``, ``audit.json`` and ``scores.csv`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"audit.json": json.dumps(self.to_dict(), indent=1), "report.html": self.to_html()}
        texts["scores.csv"] = self.scores.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        for name, text in texts.items():
            paths.write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))
        return folder


def _tell_power(report: Report) -> list[tuple[int, str]]:
    """Images a side -> smallest AUC seen: the detectable distance falls with the square root of their number."""
    if report.found is None:
        return []
    n, away = min(report.is_member.sum(), (~report.is_member).sum()), report.minimum_detectable - 0.5
    return [(int(n * k), format_auc(min(1.0, 0.5 + away / np.sqrt(k)))) for k in (1, 2, 4, 16)]


def _encode(image: np.ndarray) -> str:
    shown, buffer = Image.fromarray(image), io.BytesIO()
    shown.thumbnail((96, 96))
    shown.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def describe_run(command: str, seed: int, hashes: dict[str, str], seconds: float) -> dict[str, Any]:
    """What a reader needs to repeat the audit."""
    versions = {name: metadata.version(name) for name in ("torch", "timm", "numpy", "scipy")}
    versions |= {"python": sys.version.split()[0], "mia_utils": __version__}
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    out = {"command": command, "seed": seed, "hashes": hashes, "versions": versions, "made": made}
    return out | {"seconds": round(seconds, 1)}
