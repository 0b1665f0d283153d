"""Figures of notebook 07: what each defense does to each attack, and what it costs.

All are drawn from the results tagged ``fig07_encoders`` and ``fig07_segmenters`` (every defense and strength) and
``fig07_output``, ``fig07_early_stopping`` (sweeps). A *case* is one model behind one defense of one strength: the
attack results on it, and what it is good for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator

from mia_utils import plots
from mia_utils.figures.base import (
    Entry,
    NotAvailable,
    figure,
    format_auc,
    load_entries,
    make_rows,
    pick_limits,
    say_interval,
)
from mia_utils.runner.profiles import CONTRASTIVE, SEGMENTERS

KEEP = 0.9  # a defense is affordable when it keeps this share of the utility gained by training
_NOTEBOOK = "07_defenses"
_NEEDS = "targets, the same targets defended, and output defenses"
_ALL = ("fig07_encoders", "fig07_segmenters")
_OUTPUTS = ("noise", "rounding", "top-k", "temperature", "gauss", "argmax")
_TRAINED = (
    "dp-sgd",
    "weight-decay",
    "dropout",
    "drop-path",
    "label-smoothing",
    "crop-mixup",
    "distillation",
    "min-max",
)
_ORDER = ("none", "early-stopping", "scsr", *_TRAINED, *_OUTPUTS)
_NEUTRAL = {"noise": 0.0, "rounding": 0.0, "gauss": 0.0, "temperature": 1.0}  # strengths that change nothing
_TRAINLESS = ("mim", "encodermi-t", "lpla", "seg-global-loss")  # they learn a threshold only: static = adaptive in AUC
_ATTACKS = ("partcrop", "encodermi-v", "encodermi-t", "mim", "seg-loss-map", "seg-global-loss", "seg-label-only")
_LESS = ("early-stopping", "dp-sgd", "top-k")  # a smaller number is the stronger defense
_WORDS = {
    "dp-sgd": "ε {}", "early-stopping": "{} epochs", "noise": "σ {}", "gauss": "σ {}", "rounding": "step {}",
    "top-k": "k {}", "temperature": "T {}", "distillation": "T {}", "min-max": "λ {}",
}  # fmt: skip


def _set_title(fig: Canvas, text: str) -> None:
    """The title, with no line broken between a strength and its unit."""
    plots.set_title(fig, re.sub(r"(ε|σ|k|T|step|\.\d+ to) (?=[\d.])", "\\1\u00a0", text))


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One model behind one defense of one strength.

    Attributes:
        method: training method or network.
        defense, strength: as in the meta of results; undefended models trained on crops count as a crop range.
        entries: (attack, knowledge, attacker) -> Entry; an undefended model has "adaptive" ones only.
        facts: utility, knn, untrained, members (mIoU on them), seconds, epochs; NaN where not known.
    """

    method: str
    defense: str
    strength: float | str | None
    entries: dict[tuple[str, str, str], Entry] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Defense and strength in words: ``DP-SGD, ε 8``."""
        strength = self.say_strength()
        return plots.DEFENSE_LABELS.get(self.defense, self.defense) + (f", {strength}" if strength else "")

    @property
    def color(self) -> str:
        """Color of the defense."""
        return plots.DEFENSE_COLORS.get(self.defense, "#444444")

    @property
    def is_segmenter(self) -> bool:
        """Whether its utility is an mIoU."""
        return self.method in SEGMENTERS

    def say_strength(self) -> str:
        """The strength with its unit, empty where a defense has none."""
        if self.strength in (None, ""):
            return ""
        if isinstance(self.strength, str):
            ends = self.strength.split("-")
            return " to ".join(_say_number(float(end)) for end in ends) if len(ends) == 2 else self.strength
        text = _WORDS.get(self.defense, "{}").format(_say_number(self.strength))
        return text.removesuffix("s") if text == "1 epochs" else text

    def get_best(self, attacker: str = "adaptive", *, attacks: Sequence[str] = ()) -> Entry | None:
        """The attack with the largest AUC, among all or among those named.

        A static attacker who trains nothing ranks as the adaptive one does, so there the two are one.
        """
        found = [
            entry
            for (attack, _, who), entry in self.entries.items()
            if (not attacks or attack in attacks)
            and (who == attacker or (who == "adaptive" and attack in _TRAINLESS and attacker == "static"))
        ]
        return max(found, key=lambda e: e.metrics.auc) if found else None

    def get_pair(self) -> tuple[Entry | None, Entry | None]:
        """The best adaptive attacker, and the best static one among the attacks that have both."""
        adaptive, static = self.get_best(), None
        if any(who == "static" for _, _, who in self.entries):
            static = self.get_best("static")
        return adaptive, static


def _say_number(value: float) -> str:
    return plots.format_value(value, 3).rstrip("0").rstrip(".") if abs(value) < 1 and value else f"{value:,g}"


def _get_rank(case: Case) -> tuple[float, ...]:
    """Sort key of the strengths of a defense, weak first; crop ranges by where they begin, then wide first."""
    if case.strength in (None, ""):
        return (0.0,)
    if isinstance(case.strength, str):
        low, _, high = case.strength.partition("-")
        return (float(low), -float(high)) if high else (0.0,)
    return (-case.strength if case.defense in _LESS else case.strength,)


def _get_place(case: Case) -> tuple:
    order = _ORDER.index(case.defense) if case.defense in _ORDER else len(_ORDER)
    return order, _get_rank(case)


def _tell_defense(entry: Entry) -> tuple[str, Any]:
    """Defense and strength; training on crops is one, also in a row without the name, unless views are crops anyway."""
    defense, strength = entry.meta.get("defense") or "none", entry.meta.get("strength")
    augmentation, method = str(entry.meta.get("augmentation")), entry.meta.get("method")
    if defense == "none" and augmentation.startswith("crop") and method not in SEGMENTERS + CONTRASTIVE:
        return "scsr", augmentation.partition(":")[2] or "0.2-1"
    return defense, None if defense in ("none", "argmax") else strength


def _is_neutral(case: Case) -> bool:
    return case.strength is not None and _NEUTRAL.get(case.defense) == case.strength


def _average(entry: Entry, key: str) -> float:
    found = [float(r.meta[key]) for r in entry.results if r.meta.get(key) is not None]
    return float(np.mean(found)) if found else math.nan


def make_cases(entries: Iterable[Entry]) -> list[Case]:
    """Sort attack results into cases, in the order of the book; weak strengths first."""
    cases: dict[tuple, Case] = {}
    for entry in entries:
        if entry.metrics is None:
            continue
        defense, strength = _tell_defense(entry)
        method = str(entry.meta.get("method"))
        case = cases.setdefault((method, defense, str(strength)), Case(method, defense, strength))
        plain = entry.meta.get("defense") in (None, "none")
        knowledge = str(entry.meta.get("knowledge", "partial")).partition(":")[0]
        attacker = "adaptive" if plain else str(entry.meta.get("attacker") or "adaptive")
        key = (entry.meta["attack"], knowledge, attacker)
        if key not in case.entries or entry.metrics.n_nonmembers > case.entries[key].metrics.n_nonmembers:
            case.entries[key] = entry
        names = {"utility": "utility", "knn": "knn", "untrained": "utility_untrained", "members": "miou_members"}
        for name, source in (names | {"seconds": "train_seconds", "epochs": "epochs"}).items():
            value = _average(entry, source)
            if not math.isfinite(case.facts.get(name, math.nan)):
                case.facts[name] = value
    found = sorted(cases.values(), key=_get_place)
    for case in found:  # strength 0 is the undefended model, and its results say more of it
        plain = next((c for c in found if c.method == case.method and c.defense == "none"), None)
        if _is_neutral(case) and plain is not None and not math.isfinite(plain.facts.get("knn", math.nan)):
            plain.facts["knn"] = case.facts.get("knn", math.nan)
    return found


def load_cases(lab: Any, name: str, *tags: str, controls: Sequence[str] = ("no-model", "untrained")) -> list[Case]:
    """Cases of a figure without strengths that change nothing.

    A model that answers with disturbed vectors offers no reconstructions, and takes no masks: there the MIM attack has
    nothing to ask, so its results enter the sweep of disturbed pixels only.
    """
    entries = load_entries(lab, name, *tags, controls=controls)
    if name != "fig07_output":
        entries = [
            e
            for e in entries
            if e.meta["attack"] != "mim"
            or e.meta.get("defense") not in _OUTPUTS
            or _NEUTRAL.get(e.meta["defense"]) == e.meta["strength"]
        ]
    return [case for case in make_cases(entries) if not _is_neutral(case)]


def _find_plain(cases: Sequence[Case], method: str) -> Case | None:
    return next((c for c in cases if c.method == method and c.defense == "none"), None)


def _require_defended(cases: Sequence[Case], name: str, lab: Any) -> None:
    methods = {c.method for c in cases if c.defense == "none"}
    if not any(c.defense != "none" and c.method in methods for c in cases):
        raise NotAvailable(f"{name}: no defended results beside an undefended model in profile {lab.profile_name}")


def get_kept(case: Case, plain: Case) -> float:
    """Share of the utility gained by training that a defense keeps; 1 = all of it, 0 = as good as untrained.

    Where training gains nothing (or the untrained value is not known: segmenters), the share of the utility itself.
    """
    start = plain.facts.get("untrained", math.nan)
    start = start if math.isfinite(start) and plain.facts["utility"] > start + 0.02 else 0.0
    return (case.facts["utility"] - start) / max(plain.facts["utility"] - start, 1e-9)


def _name_utility(method: str) -> str:
    return "mIoU" if method in SEGMENTERS else "linear-probe accuracy"


def _say_utility(case: Case) -> str:
    word = "mIoU" if case.is_segmenter else "probe"
    return f"{word} {plots.format_value(case.facts['utility'])}"


def _rank_methods(cases: Sequence[Case]) -> list[str]:
    known = list(plots.METHOD_MARKERS)
    methods = dict.fromkeys(c.method for c in cases)
    return sorted(methods, key=lambda m: (m in SEGMENTERS, known.index(m) if m in known else len(known)))


# ------------------------------------------------------------------------------------------------------ marks, labels


def _place_labels(fig: Canvas, labels: Sequence[dict[str, Any]], marks: Sequence[tuple[Any, float, float]]) -> None:
    """Write words beside their points where they cover no other word and no mark.

    Args:
        fig: drawn so far; limits are final.
        labels: ``ax, x, y, text, color, size``; the first ones choose first.
        marks: (ax, x, y) of what must not be covered.
    """
    fig.draw_without_rendering()  # the layout decides where points come to lie
    dpi = fig.dpi / 72
    taken = [(*ax.transData.transform((x, y)), 3.2 * dpi, 3.2 * dpi) for ax, x, y in marks]  # center, half sides
    angles = np.deg2rad([20, -20, 160, 200, 60, -60, 120, 240, 90, 270, 0, 180])
    for label in labels:
        ax, size = label["ax"], label["size"]
        frame = ax.get_window_extent()
        x, y = ax.transData.transform((label["x"], label["y"]))
        half = 0.29 * size * len(label["text"]) * dpi, 0.62 * size * dpi
        best = None
        for radius in (6, 10, 16, 24, 34, 46, 60):
            for angle in angles:
                ux, uy = math.cos(angle), math.sin(angle)
                cx, cy = x + ux * (radius * dpi + half[0]), y + uy * (radius * dpi + half[1])
                cost = 0.02 * radius
                for tx, ty, tw, th in taken:
                    across, up = half[0] + tw - abs(cx - tx), half[1] + th - abs(cy - ty)
                    if across > 0 and up > 0:
                        cost += 1 + across * up / (4 * half[0] * half[1])
                outside = max(frame.x0 - (cx - half[0]), cx + half[0] - frame.x1, 0.0)
                outside += max(frame.y0 - (cy - half[1]), cy + half[1] - frame.y1, 0.0)
                cost += 0.5 * outside / dpi
                if best is None or cost < best[0]:
                    best = (cost, cx, cy, radius)
        _, cx, cy, radius = best
        taken.append((cx, cy, *half))
        line = dict(arrowstyle="-", color=label["color"], linewidth=0.4, alpha=0.7, shrinkA=0, shrinkB=2)
        ax.annotate(
            label["text"], (label["x"], label["y"]), xytext=((cx - x) / dpi, (cy - y) / dpi),
            textcoords="offset points", ha="center", va="center", fontsize=size, color=label["color"],
            arrowprops=line if radius > 10 else None, annotation_clip=False, zorder=6,
        )  # fmt: skip
        ax.texts[-1].set_in_layout(False)


def _get_size(case: Case, cases: Sequence[Case]) -> float:
    """Marker size by rank of the strength among those of its defense."""
    same = [c for c in cases if c.method == case.method and c.defense == case.defense]
    return 4.0 + 3.0 * (same.index(case) + 1) / len(same) if len(same) > 1 else 5.5


def _pad(values: Sequence[float], share: float = 0.12, least: float = 0.02) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(share * (high - low), least)
    return low - room, high + room


def _make_point_row(case: Case, plain: Case, entry: Entry | None, attacker: str, **more: Any) -> dict[str, Any]:
    m = entry.metrics if entry is not None else None
    return {
        "method": case.method, "label": case.label, "defense": case.defense, "strength": case.strength,
        "attacker": attacker, "attack": "" if m is None else entry.meta["attack"], "control": "",
        "knowledge": "" if m is None else entry.meta.get("knowledge"), "utility": case.facts["utility"],
        "kept": get_kept(case, plain), "seed": np.nan,
        "value": np.nan if m is None else m.auc, "low": np.nan if m is None else m.auc_low,
        "high": np.nan if m is None else m.auc_high, **more,
    }  # fmt: skip


def _make_control_rows(case: Case, entry: Entry, **columns: Any) -> list[dict[str, Any]]:
    rows = make_rows(entry, controls=("no-model", "untrained"), **columns)
    facts = dict(method=case.method, label=case.label, defense=case.defense, attacker="", utility=case.facts["utility"])
    return [facts | r for r in rows if r["control"]]


# -------------------------------------------------------------------------------------------------------------- hero


@figure(
    "fig07_hero",
    notebook=_NOTEBOOK,
    title="Privacy against utility: the best attack on every defense, before and after it adapts",
    paper_item="all four papers: defenses",
    needs=_NEEDS,
)
def _draw_hero(lab):
    cases = [c for c in load_cases(lab, "fig07_hero", *_ALL) if math.isfinite(c.facts.get("utility", math.nan))]
    _require_defended(cases, "fig07_hero", lab)
    encoders = [m for m in _rank_methods(cases) if m not in SEGMENTERS and _find_plain(cases, m)][:1]
    segmenters = [m for m in _rank_methods(cases) if m in SEGMENTERS and _find_plain(cases, m)][:1]
    methods = encoders + segmenters
    fig, axes = plots.make_figure(
        1, len(methods), height=3.7, width=plots.FULL if len(methods) > 1 else plots.HALF * 1.4
    )
    rows, labels, marks = [], [], []
    for ax, method in zip(axes[0], methods, strict=True):
        part = [c for c in cases if c.method == method and c.entries]
        rows += _draw_plane(ax, part, labels, marks)
    table = pd.DataFrame(rows)
    low, _ = pick_limits(table)
    for ax in axes[0]:
        ax.set_ylim(low, 1.04)
    axes[0, 0].set_ylabel("AUC of the best attack")
    _set_title(fig, " ".join(_say_hero([c for c in cases if c.method == m]) for m in methods))
    style = dict(color="#444444", linestyle="none")
    handles = [
        Line2D([], [], marker="o", markersize=5.5, label="adaptive attacker (larger: stronger defense)", **style),
        Line2D([], [], marker="o", markersize=4, markerfacecolor="white", label="static attacker", **style),
        Line2D([], [], marker="*", markersize=8, label="undefended", **style),
        Line2D([], [], marker="x", markersize=4, label="no model", **style),
    ]
    if any(c.defense in _OUTPUTS for c in cases if c.method in encoders):
        star = dict(marker="*", markersize=8, markerfacecolor="white")
        handles.insert(3, Line2D([], [], label="undefended, vectors only", **star, **style))
    fig.legend(handles=handles, loc="outside lower left", ncols=3, handletextpad=0.1, columnspacing=1.2)
    _place_labels(fig, labels, marks)
    return fig, table


def _draw_plane(ax: Any, part: Sequence[Case], labels: list, marks: list) -> list[dict[str, Any]]:
    """Draw the cases of one model; returns the rows of the table, adds labels and marks to be placed."""
    method, rows = part[0].method, []
    plain = _find_plain(part, method)
    plots.draw_chance(ax)
    start = plain.facts.get("untrained", math.nan)
    xs = [c.facts["utility"] for c in part] + ([start] if math.isfinite(start) else [])
    ax.set_xlim(*_pad(xs))
    if math.isfinite(start):
        ax.axvline(start, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)))
        style = dict(xytext=(2, 2), textcoords="offset points", va="bottom", fontsize=6, color="#777777")
        ax.annotate("untrained", (start, 0.0), xycoords=("data", "axes fraction"), rotation=90, **style)
    for defense in dict.fromkeys(c.defense for c in part if c.defense != "none"):
        line = [c for c in part if c.defense == defense and c.get_best()]
        ax.plot(
            [c.facts["utility"] for c in line], [c.get_best().metrics.auc for c in line],
            color=line[0].color if line else "k", linewidth=0.9, alpha=0.55, zorder=2,
        )  # fmt: skip
    for case in part:
        (best, static), x, color = case.get_pair(), case.facts["utility"], case.color
        if best is None:
            continue
        rows.append(_make_point_row(case, plain, best, "adaptive"))
        m = best.metrics
        ax.plot([x, x], [m.auc_low, m.auc_high], color=color, linewidth=0.7, alpha=0.45, zorder=1.5)
        star = dict(marker="*", markersize=10) if case is plain else dict(marker="o", markersize=_get_size(case, part))
        ax.plot(x, m.auc, color=color, linestyle="none", zorder=4, markeredgecolor="white", markeredgewidth=0.5, **star)
        marks.append((ax, x, m.auc))
        if static is not None:
            rows.append(_make_point_row(case, plain, static, "static"))
            if m.auc - static.metrics.auc > 0.015:
                arrow = dict(arrowstyle="-|>", color=color, linewidth=0.9, shrinkA=2, shrinkB=3, mutation_scale=7)
                ax.annotate("", (x, m.auc), (x, static.metrics.auc), arrowprops=arrow, zorder=3)
                hollow = dict(marker="o", markersize=3.6, markerfacecolor="white", color=color, linestyle="none")
                ax.plot(x, static.metrics.auc, zorder=4, **hollow)
                marks.append((ax, x, static.metrics.auc))
        last = case is [c for c in part if c.defense == case.defense and c.get_best()][-1]
        if not last and _is_close(case, plain, max(xs) - min(xs)):
            continue  # so little is changed that the strength needs no word
        text = case.label if last else case.say_strength()
        size, first = (6.4, 0) if last else (5.4, 1)
        labels.append(dict(ax=ax, x=x, y=m.auc, text=text, color=color, size=size, first=first))
    vectors = plain.get_best(attacks=("partcrop", "encodermi-v", "encodermi-t"))
    if method not in SEGMENTERS and any(c.defense in _OUTPUTS for c in part) and vectors is not None:
        x, y = plain.facts["utility"], vectors.metrics.auc
        ax.plot(x, y, marker="*", markersize=9, markerfacecolor="white", color=plain.color, linestyle="none", zorder=4)
        marks.append((ax, x, y))
        rows.append(_make_point_row(plain, plain, vectors, "adaptive", label="undefended, vectors only"))
    blind = next((e.controls["no-model"] for e in plain.entries.values() if "no-model" in e.controls), None)
    if blind is not None and blind.metrics is not None:
        style = dict(marker=plots.CONTROL_STYLES["no-model"]["marker"], color=plots.color_of("", "no-model"))
        ax.plot(plain.facts["utility"], blind.metrics.auc, markersize=4.5, linestyle="none", **style)
        marks.append((ax, plain.facts["utility"], blind.metrics.auc))
        rows += _make_control_rows(plain, next(e for e in plain.entries.values() if "no-model" in e.controls))
    labels.sort(key=lambda item: item["first"])
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set(xlabel=f"{_name_utility(method)} of the {'segmenter' if method in SEGMENTERS else 'encoder'}")
    ax.set_title(plots.label_of(method))
    ax.grid(True)
    return rows


def _is_close(case: Case, plain: Case, width: float) -> bool:
    """Whether a point lies on the undefended one, as far as the eye can tell; ``width``: of the utilities drawn."""
    aside = abs(case.facts["utility"] - plain.facts["utility"]) / max(width, 1e-9)
    return aside < 0.06 and abs(case.get_best().metrics.auc - plain.get_best().metrics.auc) < 0.05


def _say_hero(part: Sequence[Case]) -> str:
    """One sentence: the best attack undefended, what lowers it most of what can be afforded, and what that costs."""
    plain = _find_plain(part, part[0].method)
    defended = [c for c in part if c.defense != "none" and c.get_best()]
    text = f"{plots.label_of(plain.method)}: best attack {format_auc(plain.get_best())} undefended"
    if not defended:
        return text + "."
    affordable = [c for c in defended if get_kept(c, plain) >= KEEP]
    safest = min(affordable or defended, key=lambda c: c.get_best().metrics.auc)
    text += f", {say_interval(safest.get_best())} with {safest.label}"
    text += f" ({_say_utility(plain)} to {plots.format_value(safest.facts['utility'])})"
    pairs = [(c, *c.get_pair()) for c in defended]
    pairs = [(c, a, s) for c, a, s in pairs if s is not None and a.metrics.auc_low > s.metrics.auc_high]
    if pairs:
        c, a, s = max(pairs, key=lambda p: p[1].metrics.auc - p[2].metrics.auc)
        text += f"; {c.label} fools a static attacker ({format_auc(s)}), not an adaptive one ({format_auc(a)})"
    return text + "."


# ----------------------------------------------------------------------------------------- every defense, every attack


def _draw_ladder(lab: Any, name: str, method_of: Callable[[str], bool], attacks: Sequence[str]) -> tuple:
    """Panels side by side: one per attack, TPR at 1 % FPR, utility; one line per defense and strength."""
    cases = load_cases(lab, name)
    methods = [m for m in _rank_methods(cases) if method_of(m)]
    if not methods:
        raise NotAvailable(f"{name}: no results on such models in profile {lab.profile_name}")
    part = [c for c in cases if c.method == methods[0]]
    _require_defended(part, name, lab)
    plain, lines = _find_plain(part, methods[0]), [c.label for c in part]
    shown = [a for a in attacks if any(key[0] == a for c in part for key in c.entries)]
    rows = []
    for y, case in enumerate(part):
        for (_, knowledge, attacker), entry in case.entries.items():
            facts = dict(y=y)
            rows.append(_make_point_row(case, plain, entry, attacker, measure="AUC", **facts))
            at = entry.metrics.tpr_at.get(0.01)
            if at is not None:
                found = dict(value=at.value, low=at.low, high=at.high)
                point = _make_point_row(case, plain, entry, attacker, measure="TPR at 1 % FPR", **facts)
                rows.append(point | found)
            if attacker == "adaptive" and "no-model" in entry.controls:
                rows += _make_control_rows(case, entry, measure="AUC", knowledge=knowledge, y=y)
        for kind in ("utility", "knn", "members"):
            value = case.facts.get(kind, math.nan)
            if math.isfinite(value):
                facts = dict(measure=kind, value=value, low=np.nan, high=np.nan, y=y)
                rows.append(_make_point_row(case, plain, None, "") | facts)
    table = pd.DataFrame(rows)
    panels = [*shown, *(["TPR at 1 % FPR"] if (table["measure"] == "TPR at 1 % FPR").any() else []), "utility"]
    height = 0.185 * len(lines) + 1.25
    fig, axes = plots.make_figure(1, len(panels), height=height, sharey=True)
    for ax, panel in zip(axes[0], panels, strict=True):
        _draw_column(ax, table, panel, part)
    axes[0, 0].set(ylim=(len(lines) - 0.4, -0.6))
    axes[0, 0].set_yticks(range(len(lines)), lines)
    for ax in axes[0]:
        ax.tick_params(axis="y", length=0)
    _set_title(fig, _say_ladder(part, shown))
    _add_ladder_legend(fig, table, method=methods[0])
    return fig, table.drop(columns="y")


def _draw_column(ax: Any, table: pd.DataFrame, panel: str, part: Sequence[Case]) -> None:
    for y, (one, other) in enumerate(zip(part, part[1:], strict=False)):
        if one.defense != other.defense:
            ax.axhline(y + 0.5, color="#D8D8D8", linewidth=0.5, zorder=0)
    if panel == "utility":
        found = table[table["measure"].isin(["utility", "knn", "members"])]
        for kind, marker, fill in (("utility", "D", "#333333"), ("knn", "^", "white"), ("members", "D", "white")):
            rows = found[found["measure"] == kind]
            style = dict(linestyle="none", color="#333333", markerfacecolor=fill, markersize=3.6)
            ax.plot(rows["value"], rows["y"], marker=marker, **style)
        plain = found[(found["measure"] == "utility") & (found["defense"] == "none")]["value"]
        if len(plain):
            ax.axvline(plain.iloc[0], color="#333333", linewidth=0.6, alpha=0.5)
        ax.set_xlabel("mIoU" if part[0].is_segmenter else "accuracy")
        ax.set_xlim(*_pad(list(found["value"]), 0.08))
        title = "utility"
    else:
        is_rate = panel.startswith("TPR")
        rows = table[
            (table["measure"] == panel) if is_rate else (table["measure"] == "AUC") & (table["attack"] == panel)
        ]
        plots.draw_chance(ax, axis="x", value=0.01 if is_rate else 0.5)
        _draw_marks(ax, rows, spread=is_rate)
        auc = table[table["measure"] == "AUC"]
        ax.set_xlim(*((-0.04, 1.04) if is_rate else pick_limits(auc)))
        ax.xaxis.set_major_locator(MultipleLocator(0.5 if is_rate else 0.2))
        ax.set_xlabel("rate" if is_rate else "AUC")
        title = panel if is_rate else plots.label_of(panel)
    ax.set_title(title, fontsize=7.5)
    ax.grid(True, axis="x")
    ax.spines["left"].set_visible(False)


def _draw_marks(ax: Any, rows: pd.DataFrame, *, spread: bool = False) -> None:
    """Dots with intervals: adaptive filled, static hollow, from a shadow square; controls in grey."""
    order = list(dict.fromkeys(rows["attack"]))
    for row in rows[rows["seed"].isna()].to_dict("records"):
        control = row.get("control") or ""
        color = plots.color_of(row["attack"], control)
        if control:
            marker = plots.CONTROL_STYLES[control]["marker"]
            ax.plot(row["value"], row["y"], marker=marker, color=color, markersize=3.4, alpha=0.8, zorder=2)
            continue
        static, shadow = row["attacker"] == "static", str(row["knowledge"]).startswith("shadow")
        shift = 0.17 * shadow + (0.34 * static if not shadow else 0.17 * static) - 0.12
        if spread and len(order) > 1:
            shift += 0.4 * (order.index(row["attack"]) / (len(order) - 1) - 0.5)
        y = row["y"] + (0.0 if spread is False and not static and not shadow else shift)
        ax.plot(
            [row["low"], row["high"]], [y, y], color=color, linewidth=0.6 if static else 1.0, alpha=0.75, zorder=2.5
        )
        fill = "white" if static else color
        style = dict(markerfacecolor=fill, markeredgewidth=0.8, markersize=3.0 if static else 3.8)
        ax.plot(row["value"], y, marker="s" if shadow else "o", color=color, zorder=4 if static else 3, **style)


def _add_ladder_legend(fig: Canvas, table: pd.DataFrame, *, method: str) -> None:
    style = dict(color="#444444", linestyle="none", markersize=4)
    handles = [Line2D([], [], marker="o", label="adaptive", **style)]
    if (table["attacker"] == "static").any():
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="static", **style))
    if table["knowledge"].astype(str).str.startswith("shadow").any():
        handles.append(Line2D([], [], marker="s", label="from a shadow", **style))
    for control in dict.fromkeys(table.loc[table["control"] != "", "control"]):
        marker, color = plots.CONTROL_STYLES[control]["marker"], plots.color_of("", control)
        text = plots.label_of(control).replace("encoder", "segmenter" if method in SEGMENTERS else "encoder")
        handles.append(Line2D([], [], marker=marker, label=text, **(style | {"color": color})))
    words = {"utility": ("D", "#444444", "mIoU on strangers" if method in SEGMENTERS else "linear probe")}
    words |= {"knn": ("^", "white", "k-NN"), "members": ("D", "white", "mIoU on members")}
    for kind, (marker, fill, text) in words.items():
        if (table["measure"] == kind).any():
            handles.append(Line2D([], [], marker=marker, markerfacecolor=fill, label=text, **style))
    fig.legend(handles=handles, loc="outside lower left", ncols=7, handletextpad=0.1, columnspacing=1.0)


def _say_ladder(part: Sequence[Case], attacks: Sequence[str]) -> str:
    """Per attack: its AUC undefended, and the defense that lowers it most."""
    plain, said = _find_plain(part, part[0].method), []
    for attack in attacks:
        before = plain.get_best(attacks=(attack,))
        after = [(c, c.get_best(attacks=(attack,))) for c in part if c is not plain]
        after = [(c, e) for c, e in after if e is not None]
        if before is None or not after:
            continue
        case, entry = min(after, key=lambda item: item[1].metrics.auc)
        said.append(f"{plots.label_of(attack)} {format_auc(before)}, lowest {format_auc(entry)} ({case.label})")
    return f"Adaptive attacks on {plots.label_of(plain.method)}, undefended and at best: {'; '.join(said)}"


@figure(
    "fig07_encoders",
    notebook=_NOTEBOOK,
    title="Every defense and strength on an encoder: attacks with intervals, adaptive and static, beside its use",
    paper_item="PartCrop: defenses; EncoderMI: early stopping",
    needs=_NEEDS,
)
def _draw_encoders(lab):
    return _draw_ladder(lab, "fig07_encoders", lambda m: m not in SEGMENTERS, _ATTACKS[:4])


@figure(
    "fig07_segmenters",
    notebook=_NOTEBOOK,
    title="Every defense and strength on a segmenter: attacks with intervals, adaptive and static, beside its mIoU",
    paper_item="Segmentations-Leak: Argmax, Gauss, DP-SGD, dropout, crop and mix-up, distillation",
    needs=_NEEDS,
)
def _draw_segmenters(lab):
    return _draw_ladder(lab, "fig07_segmenters", lambda m: m in SEGMENTERS, _ATTACKS[4:])


# -------------------------------------------------------------------------------------------------- crop size ranges


@figure(
    "fig07_scsr",
    notebook=_NOTEBOOK,
    title="Which range of crop sizes leaks most",
    paper_item="PartCrop: SCSR, shrinking the range of crop scales",
    needs="encoders trained on crops of several ranges",
)
def _draw_scsr(lab):
    cases = [c for c in load_cases(lab, "fig07_scsr", "fig07_encoders") if c.defense in ("none", "scsr")]
    method = next((c.method for c in cases if c.defense == "scsr"), None)
    part = [c for c in cases if c.method == method]
    if sum(c.defense == "scsr" for c in part) < 1 or _find_plain(part, method) is None:
        raise NotAvailable(f"fig07_scsr: no encoder trained on crops in profile {lab.profile_name}")
    plain, rows = _find_plain(part, method), []
    names = ["whole picture" if c is plain else f"{c.say_strength()} of the area" for c in part]
    for y, (case, name) in enumerate(zip(part, names, strict=True)):
        low, high = map(float, str(case.strength).split("-")) if case is not plain else (1.0, 1.0)
        for (_, knowledge, attacker), entry in case.entries.items():
            if attacker == "adaptive" and knowledge == "partial":
                facts = dict(label=name, range_low=low, range_high=high, utility=case.facts["utility"], y=y)
                facts |= dict(attacker=attacker, knowledge=knowledge)
                asked = () if any(r["y"] == y and r["control"] for r in rows) else ("no-model",)
                rows += make_rows(entry, controls=asked, **facts)
    if not rows:
        raise NotAvailable("fig07_scsr: no attack of partial knowledge on encoders trained on crops")
    table = pd.DataFrame(rows)
    height = max(0.3, 0.13 * (table["attack"].nunique() + 1)) * len(part) + 1.15
    fig, axes = plots.make_figure(1, 3, height=height, sharey=True, width_ratios=[0.8, 1.5, 0.9])
    for y, case in enumerate(part):
        row = table[table["y"] == y].iloc[0]
        ends = (row["range_low"], row["range_high"])
        axes[0, 0].plot(ends, [y, y], color=case.color, linewidth=6, solid_capstyle="butt")
        if ends[0] == ends[1]:
            axes[0, 0].plot(1, y, "*", color=case.color, markersize=8)
    axes[0, 0].set(xlim=(0, 1.06), xlabel="area of a crop")
    axes[0, 0].set_title("what it is trained on")
    plots.draw_intervals(axes[0, 1], table, annotate="attack")
    axes[0, 1].set_xlim(*pick_limits(table))
    axes[0, 1].set_title("what the attackers find")
    seen = table.drop_duplicates("y")
    axes[0, 2].plot(seen["utility"], seen["y"], "D", color="#333333", markersize=4)
    start = plain.facts.get("untrained", math.nan)
    if math.isfinite(start):
        axes[0, 2].axvline(start, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)))
        axes[0, 2].annotate(
            "untrained",
            (start, 0.0),
            xycoords=("data", "axes fraction"),
            fontsize=6,
            color="#777777",
            rotation=90,
            xytext=(-7, 3),
            textcoords="offset points",
        )
    axes[0, 2].set_xlim(*_pad([*seen["utility"], *([start] if math.isfinite(start) else [])]))
    axes[0, 2].set(xlabel="linear-probe accuracy")
    axes[0, 2].set_title("what it is good for")
    for ax in (axes[0, 0], axes[0, 2]):
        ax.grid(True, axis="x")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    axes[0, 0].set_ylim(len(part) - 0.4, -0.6)
    ranges = [c for c in part if c.defense == "scsr" and c.get_best()]
    best = {c.strength: c.get_best() for c in ranges}
    most, least = (pick(ranges, key=lambda c: best[c.strength].metrics.auc) for pick in (max, min))
    text = f"{plots.label_of(method)}: best attack {format_auc(plain.get_best())} without crops"
    text += f", {say_interval(best[most.strength])} with crops of {most.say_strength()} of the area"
    if least is not most:
        text += f" (leaks most), {say_interval(best[least.strength])} with {least.say_strength()} (least)"
    _set_title(fig, text)
    plots.make_legend(fig, table, lines=False)
    return fig, table.drop(columns="y")


# ------------------------------------------------------------------------------------------------------------- privacy


def bound_auc(epsilon: float, delta: float = 0.0) -> float:
    """The largest AUC that (epsilon, delta) differential privacy leaves to any attacker on one picture.

    Source: Kairouz, Oh, Viswanath 2015 (arXiv 1311.0776), Theorem 2.1: an attacker who misses a share b of the members
    at a false-positive rate a has e^eps a + b >= 1 - delta and a + e^eps b >= 1 - delta; this is the area over that
    border. For delta = 0 it is e^eps / (1 + e^eps).
    """
    if epsilon > 700:
        return 1.0
    grown = math.exp(epsilon)
    corner = (1 - delta) / (1 + grown)  # where both borders meet: a = b
    missed = (1 - delta + corner) / 2 * corner + (1 - delta - corner) * corner / 2
    return 1 - missed


@figure(
    "fig07_privacy",
    notebook=_NOTEBOOK,
    title="DP-SGD: attacks and utility over epsilon",
    paper_item="PartCrop: differential privacy; Segmentations-Leak: DP-SGD",
    needs="models trained with DP-SGD",
)
def _draw_privacy(lab):
    cases = [c for c in load_cases(lab, "fig07_privacy", *_ALL) if c.defense in ("none", "dp-sgd")]
    private = [c for c in cases if c.defense == "dp-sgd" and _find_plain(cases, c.method)]
    if not private:
        raise NotAvailable(f"fig07_privacy: no model trained with DP-SGD in profile {lab.profile_name}")
    methods = _rank_methods(private)
    cases = [c for c in cases if c.method in methods]
    largest = max(float(c.strength) for c in private)
    free = 5 * largest  # where "no privacy" stands on the axis
    rows = []
    for case in cases:
        x = free if case.defense == "none" else float(case.strength)
        head = dict(x=x, epsilon=case.strength, target=case.method, method=case.method, seed=np.nan)
        for (attack, knowledge, attacker), entry in case.entries.items():
            if attacker != "adaptive" or knowledge != "partial":
                continue
            asked = (
                () if any(r["target"] == case.method and r["x"] == x and r["control"] for r in rows) else ("no-model",)
            )
            found = make_rows(entry, controls=asked, x=x, epsilon=case.strength, target=case.method, measure="AUC")
            rows += [r if not r["control"] else r | {"attack": ""} for r in found]
            at = entry.metrics.tpr_at.get(0.01)
            if at is not None:
                point = dict(attack=attack, control="", value=at.value, low=at.low, high=at.high)
                rows.append(head | point | {"measure": "TPR at 1 % FPR"})
        if math.isfinite(case.facts.get("utility", math.nan)):
            rows.append(head | dict(attack="", control="", measure="utility", value=case.facts["utility"]))
    table = pd.DataFrame(rows)
    if "low" not in table:
        raise NotAvailable("fig07_privacy: no attack of partial knowledge on models trained with DP-SGD")
    rates = (table["measure"] == "TPR at 1 % FPR").any()
    panels = [("AUC", m) for m in methods] + ([("TPR at 1 % FPR", "")] if rates else []) + [("utility", "")]
    fig, axes = plots.make_figure(1, len(panels), height=2.7)
    ticks = sorted({float(c.strength) for c in private})
    lowest = min(ticks) / 2
    for ax, (measure, method) in zip(axes[0], panels, strict=True):
        part = table[(table["measure"] == measure) & ((table["target"] == method) | (method == ""))]
        if measure == "utility":
            _draw_private_use(ax, part, methods, cases)
        else:
            plots.draw_sweep(ax, part, xlabel="", ylabel=measure, chance=0.5 if measure == "AUC" else 0.01, ticks=[])
            ax.set_ylim(*((pick_limits(table[table["measure"] == "AUC"])[0], 1.06) if method else (-0.03, 1.03)))
            ax.set_title(f"{plots.label_of(method)}: AUC" if method else measure)
        if method:
            grid = np.geomspace(lowest, largest, 60)
            ax.plot(grid, [bound_auc(e) for e in grid], color="#888888", linewidth=0.8, linestyle=(0, (5, 2)))
            style = dict(xytext=(1, 3), textcoords="offset points", fontsize=6, color="#666666")
            ax.annotate("allowed by epsilon", (grid[0], bound_auc(grid[0])), **style)
        ax.set_xscale("log")
        ax.set_xlim(lowest, free * 1.6)
        ax.set_xticks([*ticks, free], [*(f"{t:g}" for t in ticks), "none"])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("epsilon")
        ax.grid(True)
    low = min((c for c in private if c.method == methods[0]), key=lambda c: c.strength)
    plain = _find_plain(cases, methods[0])
    text = f"{plots.label_of(methods[0])} with epsilon {low.strength:g}: best attack {say_interval(low.get_best())}"
    text += f", {format_auc(plain.get_best())} without; {_say_utility(plain)} to"
    text += f" {plots.format_value(low.facts['utility'])}; the guarantee itself only promises an AUC of at most"
    _set_title(fig, f"{text} {plots.format_value(bound_auc(float(low.strength)), 4)}")
    plots.make_legend(fig, table[table["measure"] != "utility"])
    return fig, table


def _draw_private_use(ax: Any, part: pd.DataFrame, methods: Sequence[str], cases: Sequence[Case]) -> None:
    heights = list(part["value"])
    for method in methods:
        line = part[part["method"] == method].sort_values("x")
        style = dict(color="#333333", marker=plots.marker_of(method), linewidth=1.0)
        word = "mIoU" if method in SEGMENTERS else "probe"
        ax.plot(line["x"], line["value"], label=f"{word}, {plots.label_of(method)}", **style)
        start = _find_plain(cases, method).facts.get("untrained", math.nan)
        if math.isfinite(start):
            heights.append(start)
            ax.axhline(start, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)))
            at = dict(xycoords=("axes fraction", "data"), xytext=(2, 2), textcoords="offset points")
            ax.annotate("untrained", (0, start), fontsize=6, color="#777777", **at)
    ax.legend(loc="lower right", fontsize=6, handlelength=1.4)
    ax.set_ylim(*_pad(heights, 0.2))
    ax.set_title("utility")


# ------------------------------------------------------------------------------------------------------ output defenses


@figure(
    "fig07_output",
    notebook=_NOTEBOOK,
    title="Output defenses over their strength: adaptive and static attackers, and utility",
    paper_item="Segmentations-Leak: Argmax, Gauss sigma sweep; ours: noise, rounding, top-k, temperature",
    needs="models behind output defenses",
)
def _draw_output(lab):
    cases = load_cases(lab, "fig07_output", *_ALL)
    sweeps: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        plain = _find_plain(cases, case.method)
        if case.defense not in _OUTPUTS or plain is None:
            continue
        for pixels in (False, True):
            if any((attack == "mim") == pixels for attack, _, _ in case.entries):
                sweeps.setdefault((case.method, "pixels" if pixels else "", case.defense), []).append(case)
    if not sweeps:
        raise NotAvailable(f"fig07_output: no model behind an output defense in profile {lab.profile_name}")
    # a defense of one strength needs no panel of its own: it joins the others of that model
    rows: list[dict] = []
    order = sorted(sweeps, key=lambda key: (_rank_methods(cases).index(key[0]), key[1] != "", _ORDER.index(key[2])))
    for method, kind, defense in order:
        plain = _find_plain(cases, method)
        mine = [plain, *sweeps[method, kind, defense]]
        asked = {key[:2] for case in mine[1:] for key in case.entries if (key[0] == "mim") == bool(kind)}
        panel = f"{plots.label_of(method)}: {plots.DEFENSE_LABELS[defense].lower()}{' on pixels' if kind else ''}"
        for x, case in enumerate(mine):
            facts = dict(panel=panel, method=method, defense=defense, strength=case.strength, x=x)
            facts["tick"] = "none" if case is plain else _say_tick(case)
            for (attack, knowledge, attacker), entry in case.entries.items():
                if (attack, knowledge) not in asked:
                    continue
                for who in ("adaptive", "static") if case is plain and attack not in _TRAINLESS else (attacker,):
                    columns = facts | dict(attacker=who, knowledge=entry.meta.get("knowledge"), measure="AUC")
                    asked_controls = ("no-model",) if who == "adaptive" else ()
                    rows += [columns | r for r in make_rows(entry, controls=asked_controls)]
            if not kind and math.isfinite(case.facts.get("utility", math.nan)):
                empty = dict(attacker="", attack="", control="", seed=np.nan, measure="utility")
                rows.append(facts | empty | {"value": case.facts["utility"]})
    table = pd.DataFrame(rows)
    names = list(dict.fromkeys(table["panel"]))
    cols = min(len(names), 4 if len(names) <= 12 else 5)
    lines = -(-len(names) // cols)
    fig, axes = plots.make_figure(lines, cols, height=1.55 * lines + 0.85, sharey=True)
    flat = list(axes.flat)
    for ax in flat[len(names) :]:
        ax.remove()
    for ax, name in zip(flat, names, strict=False):
        _draw_output_panel(ax, table[table["panel"] == name])
        ax.set_title(name, fontsize=7.5)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("AUC, utility")
    flat[0].set_ylim(0, 1.04)
    _set_title(fig, _say_output(cases, sweeps))
    style = dict(linewidth=1.2)
    shown = [a for a in _ATTACKS if (table["attack"] == a).any()]
    handles = [
        Line2D([], [], color=plots.color_of(a), marker="o", markersize=4, label=plots.label_of(a), **style)
        for a in shown
    ]
    handles.append(Line2D([], [], color="#444444", linestyle="-", label="adaptive", **style))
    if (table["attacker"] == "static").any():
        handles.append(_make_static_handle(**style))
    words = "linear probe, mIoU" if any(c.is_segmenter for c in cases) else "linear probe"
    handles.append(Line2D([], [], color="#8A8A8A", marker="s", markersize=3.2, linewidth=0.9, label=words))
    if (table["control"] == "no-model").any():
        handles.append(
            Line2D(
                [],
                [],
                color=plots.color_of("", "no-model"),
                marker="x",
                markersize=3.5,
                linestyle="none",
                label="no model",
            )
        )
    fig.legend(handles=handles, loc="outside lower left", ncols=6)
    return fig, table.drop(columns=["x", "tick"])


def _say_tick(case: Case) -> str:
    return "on" if case.strength is None else _say_number(float(case.strength))


def _draw_output_panel(ax: Any, part: pd.DataFrame) -> None:
    plots.draw_chance(ax)
    utility = part[part["measure"] == "utility"]
    ax.plot(utility["x"], utility["value"], "s-", color="#8A8A8A", markersize=3.2, linewidth=0.9, zorder=1.5)
    found = part[(part["measure"] == "AUC") & part["seed"].isna() & (part["control"] == "")]
    for (attack, _, attacker), line in found.groupby(["attack", "knowledge", "attacker"], sort=False):
        line, color = line.sort_values("x", kind="stable"), plots.color_of(attack)
        static = attacker == "static"
        if not static:
            ax.fill_between(line["x"], line["low"], line["high"], color=color, alpha=0.14, linewidth=0)
        style = dict(linestyle=(0, (2, 1.5)), markerfacecolor="white", markersize=3.5) if static else dict(markersize=4)
        ax.plot(line["x"], line["value"], color=color, marker="o", linewidth=1.2, zorder=3, **style)
    blind = part[(part["control"] == "no-model") & part["seed"].isna()].drop_duplicates("x")
    ax.plot(blind["x"], blind["value"], "x", color=plots.color_of("", "no-model"), markersize=3.5, zorder=2)
    ticks = part.drop_duplicates("x").sort_values("x")
    ax.set_xticks(ticks["x"], ticks["tick"], fontsize=6.5)
    ax.set_xlim(-0.3, max(ticks["x"]) + 0.3)
    unit = {"noise": "σ", "gauss": "σ", "rounding": "step", "top-k": "k", "temperature": "temperature"}
    ax.set_xlabel(unit.get(part["defense"].iloc[0], ""), labelpad=1)
    ax.grid(True)


def _say_output(cases: Sequence[Case], sweeps: dict) -> str:
    """Per kind of model: the output defense at which a static attacker is misled most."""
    gaps = []
    for (method, kind, _), line in sweeps.items():
        for case in line if not kind else ():
            for (attack, knowledge, who), static in case.entries.items():
                adaptive = case.entries.get((attack, knowledge, "adaptive"))
                if who == "static" and adaptive is not None:
                    gaps.append((adaptive.metrics.auc - static.metrics.auc, method, case, attack, static, adaptive))
    said = []
    for method in dict.fromkeys(g[1] for g in gaps):
        gap, _, case, attack, static, adaptive = max((g for g in gaps if g[1] == method), key=lambda g: g[0])
        text = f"{plots.label_of(method)} behind {case.label}: {plots.label_of(attack)} {say_interval(static)} static"
        text += f", {say_interval(adaptive)} adaptive"
        said.append(text)
    if said:
        return "; ".join(said)
    case = min((c for line in sweeps.values() for c in line), key=lambda c: c.get_best().metrics.auc)
    return f"{plots.label_of(case.method)} behind {case.label}: best attack {say_interval(case.get_best())}"


# ------------------------------------------------------------------------------------------------------- early stopping


@figure(
    "fig07_early_stopping",
    notebook=_NOTEBOOK,
    title="Early stopping: attacks and linear probe over the epochs",
    paper_item="PartCrop and EncoderMI: early stopping",
    needs="a target with checkpoints along training",
)
def _draw_early_stopping(lab):
    cases = [c for c in load_cases(lab, "fig07_early_stopping") if c.defense in ("none", "early-stopping")]
    methods = [m for m in _rank_methods(cases) if _find_plain(cases, m)]
    methods = [m for m in methods if any(c.method == m and c.defense == "early-stopping" for c in cases)]
    if not methods:
        raise NotAvailable(f"fig07_early_stopping: no attacked checkpoint in profile {lab.profile_name}")
    rows = []
    stopped = {(c.method, *key[:2]) for c in cases if c.defense == "early-stopping" for key in c.entries}
    for case in (c for c in cases if c.method in methods):
        plain = case.defense == "none"
        x = float(case.facts["epochs"] if plain else case.strength)
        for (attack, knowledge, attacker), entry in case.entries.items():
            if (case.method, attack, knowledge) not in stopped:
                continue
            facts = dict(target=case.method, x=x, knowledge=entry.meta.get("knowledge"), measure="AUC")
            for who in ("adaptive", "static") if plain and attack not in _TRAINLESS else (attacker,):
                asked = ("no-model", "untrained") if who == "adaptive" else ()
                rows += [facts | {"attacker": who} | r for r in make_rows(entry, controls=asked)]
        entry = max(case.entries.values(), key=lambda e: e.metrics.n_seeds)
        for kind in ("utility", "knn"):
            values = [(int(r.meta.get("seed", 0)), r.meta.get(kind)) for r in entry.results]
            values = [(seed, float(v)) for seed, v in values if v is not None]
            if not values and math.isfinite(case.facts.get(kind, math.nan)):
                values = [(0, case.facts[kind])]
            head = dict(target=case.method, x=x, measure=kind, attack="", control="", attacker="", method=case.method)
            if values:
                mean = float(np.mean([v for _, v in values]))
                rows.append(head | {"seed": np.nan, "value": mean, "n_seeds": len(values)})
                rows += [head | {"seed": seed, "value": v} for seed, v in values if len(values) > 1]
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(len(methods), 2, height=2.45 * len(methods) + 0.5)
    for line, method in zip(axes, methods, strict=True):
        part = table[table["target"] == method]
        ticks = _thin(sorted(set(part["x"])))
        moving = part[(part["measure"] == "AUC") & (part["attacker"] == "adaptive")]
        plots.draw_sweep(line[0], moving, xlabel="epochs", log=True, ticks=ticks)
        still = part[(part["measure"] == "AUC") & (part["attacker"] == "static") & part["seed"].isna()]
        for (attack, _), one in still.groupby(["attack", "knowledge"], sort=False):
            one = one.sort_values("x")
            style = dict(linestyle=(0, (2, 1.5)), marker="o", markerfacecolor="white", markersize=3.5, linewidth=1.2)
            line[0].plot(one["x"], one["value"], color=plots.color_of(attack), **style)
        line[0].set_ylim(*pick_limits(part[part["measure"] == "AUC"]))
        line[0].set_title(f"{plots.label_of(method)}: what the attackers find")
        _draw_use(line[1], part, ticks, start=_find_plain(cases, method).facts.get("untrained", math.nan))
        line[1].set_title(f"{plots.label_of(method)}: what it is good for")
    _set_title(fig, _say_early_stopping([c for c in cases if c.method == methods[0]]))
    plots.make_legend(fig, table[(table["measure"] == "AUC")], seeds=True)
    legend = fig.legends[0]
    legend.remove()
    handles = [h for h in legend.legend_handles if h.get_label() != "chance"]
    if (table["attacker"] == "static").any():
        handles.append(_make_static_handle())
    fig.legend(handles=handles, loc="outside lower left", ncols=6, handlelength=2.4)
    return fig, table[["measure", *[c for c in table.columns if c != "measure"]]]


def _thin(values: Sequence[float]) -> list[float]:
    """Keep those numbers of a logarithmic axis that leave each other room, the last one first."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if math.log(kept[-1] / value) > 0.09 * math.log(values[-1] / values[0]):
            kept.append(value)
    return kept[::-1]


def _make_static_handle(**style: Any) -> Line2D:
    """Legend entry of the static attacker's line."""
    look = dict(color="#444444", linestyle=(0, (2, 1.5)), marker="o", markerfacecolor="white", markersize=3.5)
    return Line2D([], [], **look, label="static", **style)


def _draw_use(ax: Any, part: pd.DataFrame, ticks: Sequence[float], *, start: float) -> None:
    for kind, marker, fill, word in (("utility", "s", "#333333", "linear probe"), ("knn", "^", "white", "k-NN")):
        found = part[part["measure"] == kind]
        for _, one in found[found["seed"].notna()].groupby("seed"):
            one = one.sort_values("x")
            ax.plot(one["x"], one["value"], color="#333333", linewidth=0.5, alpha=0.5)
        mean = found[found["seed"].isna()].sort_values("x")
        if len(mean):
            ax.plot(mean["x"], mean["value"], color="#333333", marker=marker, markerfacecolor=fill, label=word)
    if math.isfinite(start):
        ax.axhline(start, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), label="linear probe, untrained")
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="epochs", ylabel="accuracy")
    ax.grid(True)
    ax.legend(loc="best", fontsize=6.5)


def _say_early_stopping(part: Sequence[Case]) -> str:
    plain = _find_plain(part, part[0].method)
    stopped = [c for c in part if c is not plain]
    text = f"{plots.label_of(plain.method)}: best attack {format_auc(plain.get_best())}"
    text += f" and {_say_utility(plain)} after {plain.facts['epochs']:,g} epochs"
    quiet = [c for c in stopped if c.get_best().metrics.auc_low <= 0.5]
    if quiet:  # the latest checkpoint at which no attack is shown to work
        late = max(quiet, key=lambda c: c.strength)
        return (
            f"{text}; after {late.strength:,g} no attack is shown ({format_auc(late.get_best())}), {_say_utility(late)}"
        )
    early = min(stopped, key=lambda c: c.strength)
    return f"{text}; already {say_interval(early.get_best())} after {early.strength:,g}, {_say_utility(early)}"


# -------------------------------------------------------------------------------------------------- front, cost, choice


@figure(
    "fig07_pareto",
    notebook=_NOTEBOOK,
    title="The front: defenses that no other beats in both privacy and utility",
    paper_item="ours: Pareto front of all defenses",
    needs=_NEEDS,
)
def _draw_pareto(lab):
    cases = load_cases(lab, "fig07_pareto", *_ALL, "fig07_output")
    cases = [c for c in cases if c.get_best() and math.isfinite(c.facts.get("utility", math.nan))]
    _require_defended(cases, "fig07_pareto", lab)
    methods = [m for m in _rank_methods(cases) if _find_plain(cases, m)]
    methods = [m for m in methods if sum(c.method == m for c in cases) > 1]
    rows = []
    for case in (c for c in cases if c.method in methods):
        plain = _find_plain(cases, case.method)
        rows.append(_make_point_row(case, plain, case.get_best(), "adaptive"))
    for method in methods:
        plain = _find_plain(cases, method)
        rows += _make_control_rows(plain, plain.get_best(), kept=1.0)
    table = pd.DataFrame(rows)
    table["on_front"] = _find_front(table)
    fig, axes = plots.make_figure(
        1, len(methods), height=3.1, sharey=True, width=plots.FULL if len(methods) > 1 else plots.HALF * 1.4
    )
    labels, marks = [], []
    for ax, method in zip(axes[0], methods, strict=True):
        part = table[(table["method"] == method) & (table["control"] == "")]
        front = part[part["on_front"]].sort_values("kept")
        plots.draw_chance(ax)
        ax.axvline(KEEP, color="#9A9A9A", linewidth=0.7, linestyle=(0, (4, 2)))
        ax.step(front["kept"], front["value"], where="pre", color="#BBBBBB", linewidth=1.2, zorder=1)
        for row in part.to_dict("records"):
            color = plots.DEFENSE_COLORS.get(row["defense"], "#444444")
            ax.plot([row["kept"]] * 2, [row["low"], row["high"]], color=color, linewidth=0.6, alpha=0.4, zorder=1.5)
            plain = row["defense"] == "none"
            style = dict(markersize=10 if plain else 5, alpha=1 if row["on_front"] or plain else 0.45)
            edge = dict(markeredgecolor="white", markeredgewidth=0.5)
            ax.plot(row["kept"], row["value"], "*" if plain else "o", color=color, zorder=3, **style, **edge)
            marks.append((ax, row["kept"], row["value"]))
            if row["on_front"] or plain:
                at = dict(ax=ax, x=row["kept"], y=row["value"])
                labels.append(at | dict(text=row["label"], color=color, size=6.2))
        blind = table[(table["method"] == method) & (table["control"] == "no-model") & table["seed"].isna()]
        style = dict(color=plots.color_of("", "no-model"), markersize=4, linestyle="none")
        ax.plot(blind["kept"], blind["value"], marker="x", **style)
        ax.set_xlim(*_pad([*part["kept"], 1.0]))
        ax.set(xlabel="share of the utility kept")
        ax.set_title(f"{plots.label_of(method)} ({'mIoU' if method in SEGMENTERS else 'probe'})")
        ax.grid(True)
    axes[0, 0].set_ylim(pick_limits(table)[0], 1.05)
    axes[0, 0].set_ylabel("AUC of the best adaptive attack")
    said = []
    for method in methods:
        part = table[(table["method"] == method) & (table["control"] == "")]
        affordable = part[part["kept"] >= KEEP].sort_values("value")
        if len(affordable) and affordable.iloc[0]["defense"] != "none":
            row = affordable.iloc[0]
            told = plots.format_interval(row["value"], row["low"], row["high"])
            said.append(f"{plots.label_of(method)}: {told} with {row['label']}")
        else:
            said.append(f"{plots.label_of(method)}: none helps")
    _set_title(fig, f"Lowest AUC of the best attack while {KEEP:.0%} of the utility is kept: {'; '.join(said)}")
    _place_labels(fig, labels, marks)
    return fig, table


def _find_front(table: pd.DataFrame) -> np.ndarray:
    """Rows that no other of their model beats in both: at least as much utility and a lower AUC."""
    on = []
    for row in table.to_dict("records"):
        same = table[(table["method"] == row["method"]) & (table["control"] == "")]
        better = (same["kept"] >= row["kept"]) & (same["value"] <= row["value"])
        strictly = (same["kept"] > row["kept"]) | (same["value"] < row["value"])
        on.append(not row["control"] and not (better & strictly).any())
    return np.array(on, bool)


@figure(
    "fig07_cost",
    notebook=_NOTEBOOK,
    title="Training time of a defense, relative to the undefended model",
    paper_item="ours: cost of defenses",
    needs="defended models and their undefended twin",
)
def _draw_cost(lab):
    cases = load_cases(lab, "fig07_cost", *_ALL, controls=())
    rows = []
    for case in cases:
        plain = _find_plain(cases, case.method)
        if plain is None or case.defense in _OUTPUTS or not plain.facts.get("seconds", 0) > 0:
            continue
        stopped = case.defense == "early-stopping"
        epochs = float(case.strength) if stopped else case.facts["epochs"]
        # a checkpoint is a share of the one training there was
        seconds = plain.facts["seconds"] * epochs / plain.facts["epochs"] if stopped else case.facts["seconds"]
        total = seconds / plain.facts["seconds"]
        facts = dict(method=case.method, label=case.label, defense=case.defense, seconds=seconds, epochs=epochs)
        rows.append(facts | dict(relative=total, per_epoch=total * plain.facts["epochs"] / epochs))
    table = pd.DataFrame(rows)
    if not len(table) or (table["defense"] == "none").all():
        raise NotAvailable(f"fig07_cost: no defense that is trained in profile {lab.profile_name}")
    methods = _rank_methods([c for c in cases if c.method in set(table["method"])])
    heights = [int((table["method"] == m).sum()) for m in methods]
    fig, axes = plots.make_figure(
        len(methods), 1, height=0.2 * sum(heights) + 0.55 * len(methods) + 0.6, sharex=True, height_ratios=heights
    )
    for ax, method in zip(axes[:, 0], methods, strict=True):
        part = table[table["method"] == method].reset_index(drop=True)
        colors = [plots.DEFENSE_COLORS.get(d, "#444444") for d in part["defense"]]
        ax.barh(part.index, part["relative"], height=0.6, color=colors, alpha=0.75)
        ax.plot(part["per_epoch"], part.index, "|", color="#111111", markersize=8, markeredgewidth=1.4)
        for y, row in part.iterrows():
            text = f"{row['relative']:.2g} x, {row['seconds']:,.0f} s"
            ax.annotate(
                text,
                (max(row["relative"], row["per_epoch"]), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
        ax.axvline(1, color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)), zorder=0.5)
        ax.set_yticks(part.index, part["label"])
        ax.set_ylim(len(part) - 0.4, -0.6)
        ax.set_title(plots.label_of(method))
        ax.grid(True, axis="x")
        ax.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlabel("training time relative to the undefended model; stroke: of one epoch")
    axes[-1, 0].set_xlim(0, 1.2 * float(table[["relative", "per_epoch"]].max().max()))
    defended = table[(table["defense"] != "none") & (table["defense"] != "early-stopping")]
    dear = (defended if len(defended) else table[table["defense"] != "none"]).sort_values("per_epoch").iloc[-1]
    text = f"An epoch with {dear['label']} took {dear['per_epoch']:.2g} times as long as undefended"
    text += f" ({plots.label_of(dear['method'])}, wall clock); output defenses train nothing"
    _set_title(fig, text)
    return fig, table


@figure(
    "fig07_choice",
    notebook=_NOTEBOOK,
    title="Which defense for which attack: the lowest AUC that is affordable",
    paper_item="ours: which defense for which attack",
    needs=_NEEDS,
)
def _draw_choice(lab):
    cases = load_cases(lab, "fig07_choice", *_ALL, controls=("no-model",))
    cases = [c for c in cases if math.isfinite(c.facts.get("utility", math.nan))]
    _require_defended(cases, "fig07_choice", lab)
    methods = [m for m in _rank_methods(cases) if _find_plain(cases, m)]
    defenses = sorted(dict.fromkeys(c.defense for c in cases), key=_ORDER.index)
    columns = {}
    for method in methods:
        for attack in _ATTACKS:
            if _find_plain(cases, method).get_best(attacks=(attack,)):
                columns[f"{plots.label_of(method)}|{plots.label_of(attack)}"] = (method, attack)
    cells, rows = [], []
    for defense in defenses:
        name = plots.DEFENSE_LABELS.get(defense, defense)
        cells.append(dict(row=name, column="defense", text=name))
        for column, (method, attack) in columns.items():
            found = choose(cases, method, attack, defense)
            if found is None:
                continue
            case, entry, kept = found
            head = dict(row=name, column=column, method=method, attack=attack, defense=defense)
            if case is None:
                cells.append(head | dict(text="–", note=f"keeps {max(kept, 0):.0%}"))
                rows.append(head | dict(strength="", kept=kept, control="", seed=np.nan))
                continue
            m = entry.metrics
            note = f"[{plots.format_value(m.auc_low)}, {plots.format_value(m.auc_high)}]"
            note += f" {case.say_strength()}" if case.say_strength() else ""
            cells.append(
                head
                | dict(text=plots.format_value(m.auc), note=note, shade=max(0.0, 2 * m.auc - 1), bold=m.auc_low <= 0.5)
            )
            facts = dict(strength=case.strength, kept=kept, knowledge=entry.meta.get("knowledge"))
            rows += [
                head | facts | r for r in make_rows(entry, controls=("no-model",)) if r["control"] in ("", "no-model")
            ]
    widths = {"defense": 1.35} | dict.fromkeys(columns, 1.15)
    fig, axes = plots.make_figure(1, 1, height=0.3 * len(defenses) + 1.3)
    plots.draw_cells(axes[0, 0], pd.DataFrame(cells), widths=widths, n_head=1)
    quiet = {}
    for cell in cells:
        if cell.get("bold") and cell["defense"] != "none":
            quiet.setdefault(cell["column"], []).append(cell["row"])
    loud = [
        c["column"] for c in cells if c["row"] == "undefended" and c.get("column") in columns and c.get("bold") is False
    ]
    found = sum(column in quiet for column in loud)
    text = f"{found} of {len(loud)} attacks that succeed undefended can be brought to an interval that holds .5 (bold)"
    _set_title(fig, f"{text} while {KEEP:.0%} of the utility is kept")
    return fig, pd.DataFrame(rows)


def choose(cases: Sequence[Case], method: str, attack: str, defense: str):
    """Pick the strength of a defense that leaves an attack the lowest AUC among those that keep enough utility.

    Returns:
        (case, entry, share kept); (None, None, largest share kept) where no strength keeps ``KEEP``; None where the
        attack was not run on it.
    """
    plain = _find_plain(cases, method)
    mine = [c for c in cases if c.method == method and c.defense == defense and c.get_best(attacks=(attack,))]
    if not mine:
        return None
    kept = {id(c): get_kept(c, plain) for c in mine}
    affordable = [c for c in mine if kept[id(c)] >= KEEP]
    if not affordable:
        return None, None, max(kept.values())
    case = min(affordable, key=lambda c: c.get_best(attacks=(attack,)).metrics.auc)
    return case, case.get_best(attacks=(attack,)), kept[id(case)]


def tabulate_points(lab: Any) -> pd.DataFrame:
    """The points of ``fig07_pareto``: one row per defense and strength, with its best adaptive attack.

    Returns:
        DataFrame ``method, label, attack, utility, kept, value, low, high, on_front``.
    """
    table = _draw_pareto(lab)[1]
    columns = ["method", "label", "attack", "utility", "kept", "value", "low", "high", "on_front"]
    return table.loc[table["control"] == "", columns].reset_index(drop=True)
