"""Figures of notebook 05: EncoderMI, what its attacker has to know, LpLA, audits, and the other encoder attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mia_utils import plots, seeds
from mia_utils.figures.base import (
    Entry,
    NotAvailable,
    draw_choice,
    draw_choices,
    draw_sweep,
    draw_table,
    figure,
    format_auc,
    is_left,
    join_words,
    leaks,
    load_entries,
    make_grid,
    make_panels,
    make_rows,
    overlap,
    pick_limits,
    say_interval,
)
from mia_utils.figures.overview import name_attack
from mia_utils.protocol import metrics

ATTACKS = ("encodermi-v", "encodermi-s", "encodermi-t", "lpla")
SETTINGS = ("PET", "PE-", "P-T", "-ET", "P--", "-E-", "--T", "---")  # the paper's eight, from all known to none
# Numbers of the paper (arXiv 2108.11023) that are available here, and no others: another scale (10,000 members,
# 1,600 epochs of MoCo on ResNet-18, another protocol), so they stand beside ours and are never compared with them.
PAPER = (
    {"letters": "PET", "data": "CIFAR-10", "accuracy": 0.914, "precision": 0.901, "recall": 0.935},
    {"letters": "PET", "data": "Tiny-ImageNet", "accuracy": 0.965, "precision": 0.966, "recall": 0.970},
    {"letters": "---", "data": "Tiny-ImageNet", "accuracy": 0.887},
)
PAPER_SCALE = "EncoderMI-V in the paper: 10,000 members, 1,600 epochs, another protocol"
_CONTROLS = ("no-model", "untrained", "permuted")
_AUGMENTATIONS = {
    "none": "whole pictures", "flip": "flips", "crop-weak": "weak crops", "crop": "strong crops",
    "simclr-weak": "weak crops and color", "simclr": "strong crops and color", "dino": "DINO's views",
}  # fmt: skip
_QUERY_ORDER = ("none", "flip", "crop-weak", "crop", "simclr-weak", "simclr", "dino")


def find_blind(panels: Sequence[tuple[str, Sequence[Entry]]]) -> dict[str, Entry]:
    """Return target -> its highest no-model control, where the joint rule rejects it: then nothing may be claimed."""
    found = {}
    for target, part in panels:
        controls = [c for e in part if (c := e.controls.get("no-model")) is not None and c.metrics is not None]
        if controls:
            found[target] = max(controls, key=lambda c: c.metrics.auc)
    judged = metrics.judge_controls({target: c.metrics for target, c in found.items()})
    void = set(judged["control"][judged["rejected"]])
    return {target: c for target, c in found.items() if target in void and leaks(c)}


def beats_pictures(entry: Entry, part: Sequence[Entry]) -> bool:
    """Whether an attack lies above chance, and clear of the target's no-model controls where these do by themselves."""
    controls = [c for e in part if (c := e.controls.get("no-model")) is not None and c.metrics is not None and leaks(c)]
    return leaks(entry) and all(entry.metrics.auc_low > c.metrics.auc_high for c in controls)


def say_blind(panels: Sequence[tuple[str, Sequence[Entry]]]) -> str:
    """Name the targets whose pictures alone tell members from strangers; empty where there is none."""
    by_row: dict[str, list[str]] = {}  # targets on one split share the row
    for target, blind in find_blind(panels).items():
        by_row.setdefault(say_interval(blind), []).append(target)
    said = [f"{join_words(targets)} the no-model row is {row}" for row, targets in by_row.items()]
    return f"; on {', on '.join(said)}" if said else ""


def get_letters(entry: Entry) -> str:
    """Return what the attacker shares with the target, as ``"PE-"``; empty for partial knowledge."""
    knowledge = str(entry.meta.get("knowledge", ""))
    return knowledge.partition(":")[2]


def name_setting(letters: str) -> str:
    """Print a setting with a dash for what is unknown: ``"PE-"`` -> ``"P E –"``."""
    return " ".join(letters.replace("-", "–"))


def load_settings(lab: Any, name: str = "fig05_knowledge") -> list[tuple[str, dict[tuple[str, str], Entry]]]:
    """Results of the knowledge study: per target, (letters, attack) -> entry, in the order of the settings.

    Raises:
        NotAvailable: none is saved.
    """
    entries = [e for e in load_entries(lab, name, controls=_CONTROLS) if e.metrics is not None and get_letters(e)]
    if not entries:
        raise NotAvailable(f"{name}: no shadow-trained result is saved; it needs shadows of several kinds")
    found = []
    for target, part in make_panels(entries):
        part.sort(key=lambda e: (SETTINGS.index(get_letters(e)), ATTACKS.index(e.meta["attack"])))
        cells: dict[tuple[str, str], Entry] = {}
        for e in part:
            cells.setdefault((get_letters(e), e.meta["attack"]), e)
        found.append((target, cells))
    return found


def make_setting_rows(lab: Any, *, model: str = "", attack: str = "encodermi-v") -> pd.DataFrame:
    """Rows for ``plots.draw_intervals``: the knowledge settings from the top, targets side by side, then controls.

    Args:
        lab: what ``experiments.open`` returns.
        model: one target, its id without the seed; empty: every target.
        attack: the attacker that is shown.
    """
    targets, rows = load_settings(lab), []
    if model:
        targets = [(t, cells) for t, cells in targets if next(iter(cells.values())).meta.get("model") == model]
    for letters in SETTINGS:
        for target, cells in targets:
            if (letters, attack) in cells:
                head = {"label": name_setting(letters), "letters": letters, "target": target}
                rows += make_rows(cells[letters, attack], **head)
    for control in ("untrained", "no-model"):
        for target, cells in targets:
            owner = next((e for (_, a), e in cells.items() if a == attack and control in e.controls), None)
            if owner is not None:
                head = {"label": plots.label_of(control).removesuffix(" encoder"), "letters": "", "target": target}
                rows += [r for r in make_rows(owner, controls=(control,), **head) if r["control"]]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------- who is a member


@figure(
    "fig05_similarities",
    notebook="05_encodermi",
    title="Mean similarity of an image's views, members and strangers, trained and untrained",
    paper_item="EncoderMI, similarity distributions",
    needs="contrastive targets",
)
def _draw_similarities(lab):
    entries = load_entries(lab, "fig05_similarities", controls=("no-model", "untrained"))
    entries = [e for e in entries if e.metrics is not None and e.meta["attack"] == "encodermi-t"]
    panels = [(target, part[0]) for target, part in make_panels(entries)][:5]
    fig, axes = plots.make_figure(2, len(panels), height=3.6)
    tables, gaps = [], []
    for column, (target, entry) in enumerate(panels):
        for row, one in enumerate((entry, entry.controls.get("untrained"))):
            ax = axes[row, column]
            if one is None or one.metrics is None:
                ax.set_axis_off()
                continue
            first = one.results[0]  # one model's similarities: another seed has another scale
            bins = plots.count_scores(first.score, first.is_member, bins=20)
            plots.draw_histograms(ax, bins, xlabel="mean similarity" if row else "", legend=False)
            ax.set_ylabel("share of images" if column == 0 else "")
            head = target if row == 0 else "untrained"
            ax.set_title(f"{head}\nAUC {say_interval(one)}", fontsize=7)
            ax.locator_params(axis="x", nbins=4)
            tables.append(bins.assign(kind="histogram", target=target, control=one.control))
        first = entry.results[0]
        gaps.append((entry, target, first.score[first.is_member].mean(), first.score[~first.is_member].mean()))
        tables.append(pd.DataFrame(make_rows(entry, controls=("no-model", "untrained"), kind="auc", target=target)))
    _, target, member, stranger = max(gaps, key=lambda gap: gap[0].metrics.auc)
    more = "more" if member > stranger else "no more"
    text = f"Views of a member agree {more} than those of a stranger: mean {member:.3f} against {stranger:.3f}"
    plots.set_title(fig, f"{text} on {target}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=1.8)
    table = pd.concat(tables, ignore_index=True)
    return fig, table[["kind", "target", "control", *[c for c in table if c not in ("kind", "target", "control")]]]


def _name_line(entry: Entry) -> str:
    knowledge = "partial" if entry.meta.get("knowledge") == "partial" else "shadow"
    return f"{plots.label_of(entry.meta['attack'])}, {knowledge}"


@figure(
    "fig05_variants",
    notebook="05_encodermi",
    title="Vector, set, threshold and LpLA on the contrastive targets, partial and shadow knowledge",
    paper_item="EncoderMI, vector, set and threshold attacker",
    needs="contrastive targets and their shadows",
)
def _draw_variants(lab):
    entries = [e for e in load_entries(lab, "fig05_variants") if e.metrics is not None]
    panels = make_panels(entries)
    rows = []
    for target, part in panels:
        part.sort(key=lambda e: (e.meta.get("knowledge") != "partial", ATTACKS.index(e.meta["attack"])))
        for e in part:
            rows += make_rows(e, controls=("untrained",), target=target, label=_name_line(e))
        owner = next((e for e in part if "no-model" in e.controls), None)
        if owner is not None:
            found = make_rows(owner, controls=("no-model",), target=target, label="no model")
            rows += [r for r in found if r["control"]]
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    shadow = [(t, [e for e in part if e.meta.get("knowledge") != "partial"]) for t, part in panels]
    best = [(t, max(part, key=lambda e: e.metrics.auc_low)) for t, part in shadow if part]
    blind = find_blind(panels)
    works = [t not in blind and beats_pictures(e, dict(panels)[t]) for t, e in best]
    said = [
        f"{t} {plots.label_of(e.meta['attack'])} ({format_auc(e)})"
        for (t, e), ok in zip(best, works, strict=True)
        if ok
    ]
    none = [t for (t, _), ok in zip(best, works, strict=True) if not ok]
    text = f"above chance: {'; '.join(said)}" if said else "no attack is shown to work"
    text += f"; not shown on {join_words(none)}" if said and none else ""
    plots.set_title(fig, f"Trained on a shadow, {text}{say_blind(panels)}")
    plots.make_legend(fig, table, lines=False)
    return fig, table


@figure(
    "fig05_table",
    notebook="05_encodermi",
    title="Attack table with controls: AUC and TPR at 1 % FPR",
    paper_item="EncoderMI, attack tables",
    needs="contrastive targets and their shadows",
)
def _draw_table(lab):
    entries = load_entries(lab, "fig05_table", "fig05_variants", controls=_CONTROLS)
    panels = make_panels([e for e in entries if e.metrics is not None])
    for _, part in panels:
        part.sort(key=lambda e: (ATTACKS.index(e.meta["attack"]), e.meta.get("knowledge") != "partial"))
    fig, table = draw_table(panels, controls=_CONTROLS, name=lambda e, part: _name_line(e), row_height=0.165)
    above = [e for _, part in panels for e in part if leaks(e)]
    total = sum(len(part) for _, part in panels)
    plots.set_title(fig, f"{len(above)} of {total} results have an interval above chance{say_blind(panels)}")
    return fig, table


# -------------------------------------------------------------------------------------------- what has to be known


@figure(
    "fig05_knowledge",
    notebook="05_encodermi",
    title="Eight settings of background knowledge x vector, set and threshold attacker",
    paper_item="EncoderMI, tables of the eight settings",
    needs="shadows that share data, encoder and training with the target, or do not",
)
def _draw_knowledge(lab):
    targets = load_settings(lab)
    short = {"encodermi-v": "vector V", "encodermi-s": "set S", "encodermi-t": "threshold T"}
    attacks = [a for a in short if any(a == attack for _, cells in targets for _, attack in cells)]
    hidden = all(e.metrics.tpr_at.get(0.01) is None for _, cells in targets for e in cells.values())
    names = ["acc.", "prec.", "recall", "AUC", *([] if hidden else ["TPR"])]
    widths = dict.fromkeys("PET", 0.19) | {" ": 0.05}
    for k, attack in enumerate(attacks):
        widths |= {f"{short[attack]}|{name}": 0.48 if name == "AUC" else 0.32 for name in names}
        widths[" " * (k + 2)] = 0.05  # a gap
    widths |= {"paper (V): acc./prec./recall": 1.25}
    tables, heights = [], []
    for _, cells in targets:
        heights.append(len({letters for letters, _ in cells}) + 2 + 2.3)
    fig, axes = plots.make_figure(
        len(targets), 1, height=0.235 * sum(heights) + 0.9, gridspec_kw={"height_ratios": heights}
    )
    for ax, (target, cells) in zip(axes[:, 0], targets, strict=True):
        settings = [s for s in SETTINGS if any(letters == s for letters, _ in cells)]
        drawn = []
        for letters in settings:
            drawn += [{"row": letters, "column": c, "text": "●" if c in letters else "–"} for c in "PET"]
            for attack in attacks:
                if (letters, attack) in cells:
                    drawn += _make_cells(cells[letters, attack], letters, short[attack])
            if _is_papers(next(iter(cells.values()))):
                drawn.append({"row": letters, "column": list(widths)[-1], "text": _say_paper(letters)})
        for control in ("untrained", "no-model"):
            for attack in attacks:
                entry = cells.get(("PET", attack))
                twin = entry.controls.get(control) if entry else None
                if twin is not None and twin.metrics is not None:
                    cell = {"row": control, "column": f"{short[attack]}|AUC", "text": format_auc(twin)}
                    drawn.append(cell | {"note": _say_ends(twin)})
        plots.draw_cells(ax, pd.DataFrame(drawn), widths=widths, n_head=len(settings))
        for control in ("untrained", "no-model"):
            rows = list(dict.fromkeys(cell["row"] for cell in drawn))
            if control in rows:
                label = plots.label_of(control).removesuffix(" encoder")
                ax.text(0, rows.index(control), label, va="center", fontsize=7, color=plots.color_of("", control))
        missing = "" if len(settings) == len(SETTINGS) else f", {len(settings)} of 8 settings in this profile"
        ax.text(0, -1.95, f"{target}{missing}", va="center", fontsize=8, fontweight="bold")
        tables.append(_make_table(target, cells))
    table = pd.concat(tables, ignore_index=True)
    plots.set_title(fig, _say_knowledge(targets))
    fig.supxlabel(
        "P data, E encoder, T training: ● shared with the shadow, – unknown. Accuracy, precision and recall at the "
        "shadow's threshold,\nmembers and strangers weighing alike; "
        f"TPR at 1 % FPR{' needs 1,000 strangers' if hidden else ''}.\n"
        f"{PAPER_SCALE}; Tiny: Tiny-ImageNet.",
        x=0.01,
        ha="left",
        fontsize=6.5,
    )
    return fig, table


def _is_papers(entry: Entry) -> bool:
    """Whether a target is of the paper's kind, MoCo with a queue: its numbers stand beside that one only."""
    return str(entry.meta.get("method")).startswith("moco-v")


def _measure_at_threshold(m: Any) -> dict[str, float]:
    """Accuracy, precision and recall at the threshold brought along, as if there were as many strangers as members."""
    if m.at_threshold is None:
        return {}
    tpr, fpr = m.at_threshold["tpr"][0], m.at_threshold["fpr"][0]
    precision = tpr / (tpr + fpr) if tpr + fpr > 0 else np.nan
    return {"accuracy": (tpr + 1 - fpr) / 2, "precision": precision, "recall": tpr}


def _say_ends(entry: Entry) -> str:
    return f"[{plots.format_value(entry.metrics.auc_low)}, {plots.format_value(entry.metrics.auc_high)}]"


def _make_cells(entry: Entry, letters: str, group: str) -> list[dict[str, Any]]:
    m = entry.metrics
    measured, at = _measure_at_threshold(m), m.tpr_at.get(0.01)
    texts = {"acc.": measured.get("accuracy"), "prec.": measured.get("precision"), "recall": measured.get("recall")}
    texts = {name: plots.format_value(value) for name, value in texts.items()}
    if at is not None:
        texts["TPR"] = plots.format_value(at.value)
    cells = [{"row": letters, "column": f"{group}|{name}", "text": text} for name, text in texts.items()]
    shade = float(np.clip((m.auc - 0.5) / 0.5, 0, 1))
    return cells + [
        {
            "row": letters, "column": f"{group}|AUC", "text": format_auc(entry), "note": _say_ends(entry),
            "shade": shade, "bold": True,
        }
    ]  # fmt: skip


def _say_paper(letters: str) -> str:
    lines = []
    for row in PAPER:
        if row["letters"] == letters:
            numbers = "/".join(plots.format_value(row[n], 3) for n in ("accuracy", "precision", "recall") if n in row)
            lines.append(f"{numbers} {row['data'].replace('Tiny-ImageNet', 'Tiny')}")
    return "\n".join(lines)


def _make_table(target: str, cells: dict[tuple[str, str], Entry]) -> pd.DataFrame:
    rows = []
    for (letters, attack), e in cells.items():
        known = {
            f"knows_{name}": letter in letters
            for name, letter in zip(("data", "encoder", "training"), "PET", strict=True)
        }
        for row in make_rows(
            e, controls=_CONTROLS, target=target, setting=letters, **known, shadow=e.meta.get("shadow")
        ):
            if np.isnan(row["seed"]):
                m = e.metrics if not row["control"] else e.controls[row["control"]].metrics
                at = m.tpr_at.get(0.01) or (np.nan,) * 3
                row |= _measure_at_threshold(m)
                row |= dict(zip(("tpr_at_1", "tpr_at_1_low", "tpr_at_1_high"), at, strict=True))
                row |= {"n_members": m.n_members, "n_nonmembers": m.n_nonmembers}
            rows.append(row)
        if attack == "encodermi-v" and _is_papers(e):
            for number in (p for p in PAPER if p["letters"] == letters):
                paper = {f"paper_{k}": v for k, v in number.items() if k != "letters"} | {"paper_scale": PAPER_SCALE}
                rows.append({"target": target, "setting": letters, **known, "attack": attack, "control": ""} | paper)
    return pd.DataFrame(rows)


def _say_knowledge(targets: Sequence[tuple[str, dict[tuple[str, str], Entry]]]) -> str:
    parts = []
    for target, cells in targets:
        attack = "encodermi-v" if any(a == "encodermi-v" for _, a in cells) else next(iter(cells))[1]
        mine = {letters: e for (letters, a), e in cells.items() if a == attack}
        words = []
        if "PET" in mine:
            words.append(f"{format_auc(mine['PET'])} knowing all three")
        if "---" in mine:
            words.append(f"{format_auc(mine['---'])} knowing none")
        if {"PET", "---"} <= set(mine) and overlap(mine["PET"], mine["---"]):
            words[-1] += " (the intervals overlap)"
        lowest = min(mine, key=lambda letters: mine[letters].metrics.auc)
        if mine[lowest].metrics.auc_high < 0.5:  # the attacker learned to take members for strangers
            words.append(f"turned around to {format_auc(mine[lowest])} with {name_setting(lowest)}")
        parts.append(f"{target}: {', '.join(words)}" if words else f"{target}: {len(mine)} settings")
    return "AUC of the vector attacker on " + "; on ".join(parts)


# ------------------------------------------------------------------------------------------------------- ablations


@figure(
    "fig05_views",
    notebook="05_encodermi",
    title="AUC over the number of views",
    paper_item="EncoderMI, ablation: number of views",
)
def _draw_views(lab):
    return draw_sweep(lab, "fig05_views", of="n_views", xlabel="views per image (K)", log=True, say="with {} views")


@figure(
    "fig05_measure",
    notebook="05_encodermi",
    title="Cosine, Euclidean or Pearson",
    paper_item="EncoderMI, ablation: similarity measure",
)
def _draw_measure(lab):
    order = ("cosine", "euclidean", "pearson")
    words = {"cosine": "the cosine", "euclidean": "minus the distance", "pearson": "Pearson's correlation"}

    def say(entry: Entry) -> str:
        return f"{words.get(entry.get('measure'), entry.get('measure'))} ({plots.label_of(entry.meta['attack'])})"

    return draw_choice(lab, "fig05_measure", lambda e: e.get("measure"), say=say, order=order)


@figure(
    "fig05_augmentation",
    notebook="05_encodermi",
    title="Query augmentation against training augmentation",
    paper_item="EncoderMI, ablation: overlap of the augmentations",
    needs="targets trained with different augmentations",
)
def _draw_augmentation(lab):
    entries = load_entries(lab, "fig05_augmentation", controls=("no-model",))
    entries = [e for e in entries if e.metrics is not None and e.get("augmentation") is not None]
    panels = make_panels(entries)
    # the target's own augmentation is in its meta, the query's among the attack's parameters
    column = {t: f"{t},\ntrained with\n{_name_views(part[0].meta.get('augmentation'))}" for t, part in panels}
    rows, cells = [], {}
    for query in _QUERY_ORDER:
        for target, part in panels:
            for e in part:
                if e.get("augmentation") == query and (query, target) not in cells:
                    cells[query, target] = e
                    rows += make_rows(e, row=_name_views(query), column=column[target])
    for target, part in panels:
        owner = next((e for e in part if "no-model" in e.controls), None)
        if owner is not None:
            found = make_rows(owner, controls=("no-model",), row="no model", column=column[target])
            rows += [r for r in found if r["control"]]
    table = pd.DataFrame(rows)
    width = min(plots.FULL, 1.7 + 1.05 * len(panels))
    fig, axes = plots.make_figure(1, 1, width=max(width, 4.2), height=0.42 * table["row"].nunique() + 1.5)
    n_head = table.loc[table["control"] == "", "row"].nunique()
    plots.draw_matrix(axes[0, 0], table, ylabel="asked with", n_head=n_head)
    lead = max(cells, key=lambda key: cells[key].metrics.auc)
    line = {query: e for (query, target), e in cells.items() if target == lead[1]}
    worst = min(line, key=lambda query: line[query].metrics.auc)
    attack = plots.label_of(cells[lead].meta["attack"])
    text = f"{attack} on {lead[1]}: AUC {format_auc(line[lead[0]])} asked with {_name_views(lead[0])}"
    if worst != lead[0]:
        text += f", {format_auc(line[worst])} with {_name_views(worst)}"
        text += "; the intervals overlap" if overlap(line[lead[0]], line[worst]) else ""
    plots.set_title(fig, text)
    table["column"] = table["column"].str.replace("\n", " ")
    return fig, table


def _name_views(name: Any) -> str:
    return _AUGMENTATIONS.get(str(name), str(name))


@figure(
    "fig05_n_train",
    notebook="05_encodermi",
    title="AUC over the size of the attacker's set, and of the training set",
    paper_item="EncoderMI, ablation: set size",
)
def _draw_n_train(lab):
    entries = [e for e in load_entries(lab, "fig05_n_train") if e.metrics is not None]
    sizes: dict[str, set[int]] = {}
    for e in entries:
        sizes.setdefault(e.meta["method"], set()).add(e.meta["n_train"])
    rows = []
    for e in entries:
        several = len(sizes[e.meta["method"]]) > 1
        share, n = float(e.get("known_share", 1.0)), float(e.meta["n_train"])
        label = plots.label_of(e.meta["method"])
        if several and share == 1.0 and e.meta.get("knowledge") == "partial":
            panel, x = f"{label}, by training set", n
        elif several:
            continue
        else:
            partial = e.meta.get("knowledge") == "partial"
            # cross-fitting leaves four fifths of the target's members to learn from, a shadow has its own
            panel = f"{label}, {'some members known' if partial else 'from a shadow'}"
            x = n * share * (0.8 if partial else 1)
        rows += [dict(r, panel=panel) for r in make_rows(e, controls=("no-model", "untrained"), x=x)]
    if not rows:
        raise NotAvailable("fig05_n_train: no result of different sizes in this profile")
    table = pd.DataFrame(rows).drop_duplicates(["panel", "x", "attack", "control", "seed"])
    panels = list(dict.fromkeys(table["panel"]))
    fig, axes = make_grid(len(panels), sharey=True, height=2.2)
    for ax, panel in zip(axes, panels, strict=True):
        part = table[table["panel"] == panel]
        ticks = sorted(set(part["x"]))
        plots.draw_sweep(ax, part, xlabel="members", log=True, ylabel="AUC" if is_left(ax) else "", ticks=ticks)
        ax.set_xticklabels([f"{t:.0f}" for t in ticks])
        ax.set_title(panel)
    axes[0].set_ylim(*pick_limits(table))
    said = []
    for panel in panels:
        part = table[(table["panel"] == panel) & (table["control"] == "") & table["seed"].isna()].sort_values("x")
        part = part[part["attack"] == part["attack"].iloc[0]]
        words = dict.fromkeys(f"{plots.format_value(r.value)} at {r.x:.0f}" for r in part.iloc[[0, -1]].itertuples())
        said.append(f"{panel}, {plots.label_of(part['attack'].iloc[0])} {' and '.join(words)}")
    plots.set_title(fig, "AUC by number of members. " + "; ".join(said))
    plots.make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig05_epochs",
    notebook="05_encodermi",
    title="Early stopping: attack and downstream accuracy along training",
    paper_item="EncoderMI, defense: early stopping",
    from_table=True,
)
def _draw_epochs(table):
    """Table: ``target, method, x (epoch), attack, control, value, low, high, seed``; or ``probe``, ``knn``."""
    targets = list(dict.fromkeys(table["target"]))
    table = table.assign(control=table["control"].fillna(""))
    utility = table["attack"].isin(("probe", "knn"))
    fig, axes = plots.make_figure(2, len(targets), width=plots.FULL if len(targets) > 1 else 4.6, height=4.2)
    said = []
    for column, target in enumerate(targets):
        part = table[(table["target"] == target) & ~utility]
        known = part["control"] == "no-model"  # asked of no model: the same at every epoch
        spread = [part[known].drop_duplicates("control").assign(x=x) for x in (part["x"].min(), part["x"].max())]
        part = pd.concat([part[~known], *spread], ignore_index=True)
        top, bottom = axes[:, column]
        plots.draw_sweep(top, part, xlabel="", ylabel="AUC of the attack" if column == 0 else "", log=True)
        top.set_title(target)
        top.set_ylim(*pick_limits(table[~utility]))
        below = table[(table["target"] == target) & utility]
        for name, line, marker in (("probe", "-", "o"), ("knn", (0, (4, 1.5)), "s")):
            one = below[below["attack"] == name].sort_values("x")
            bottom.plot(one["x"], one["value"], linestyle=line, marker=marker, color="#444444", markersize=4)
            if len(one):
                text = "linear probe" if name == "probe" else "nearest neighbors"
                bottom.annotate(
                    text,
                    (one["x"].iloc[-1], one["value"].iloc[-1]),
                    xytext=(-4, 5),
                    textcoords="offset points",
                    ha="right",
                    fontsize=6.5,
                )
        bottom.set_xscale("symlog", linthresh=part.loc[part["x"] > 0, "x"].min(), linscale=0.5)
        ticks = sorted(set(below["x"]))
        bottom.set_xticks(ticks, [f"{t:g}" for t in ticks])
        bottom.minorticks_off()
        bottom.set(xlabel="training epoch", ylabel="downstream accuracy" if column == 0 else "")
        bottom.grid(True)
        bottom.margins(y=0.25)
        attack = part.loc[part["control"] == "", "attack"].iloc[0]
        line = part[(part["attack"] == attack) & (part["control"] == "") & part["seed"].isna()].sort_values("x")
        line = line[line["x"] > 0]
        probe = below[below["attack"] == "probe"].set_index("x")["value"]
        ends = []
        for x, value in line[["x", "value"]].iloc[[0, -1]].drop_duplicates().itertuples(index=False):
            ends.append(
                f"epoch {x:g} AUC {plots.format_value(value)}, probe {plots.format_value(probe.get(x, np.nan))}"
            )
        said.append(f"{target}: {'; '.join(ends)}")
    plots.set_title(fig, ". ".join(said))
    plots.make_legend(fig, table[~utility])
    return fig, table


# ------------------------------------------------------------------------------------------ beside other attacks


@figure(
    "fig05_baselines",
    notebook="05_encodermi",
    title="EncoderMI, PartCrop and the MIM attack on the same encoders",
    paper_item="PartCrop: comparison with EncoderMI",
    needs="a masked-image and a contrastive target",
)
def _draw_baselines(lab):
    entries = [e for e in load_entries(lab, "fig05_baselines") if e.metrics is not None]
    order, rows = list(plots.ATTACK_COLORS), []
    for target, part in make_panels(entries):
        part.sort(key=lambda e: (order + [e.meta["attack"]]).index(e.meta["attack"]))
        for e in part:
            rows += make_rows(e, controls=("untrained",), target=target, label=name_attack(e))
        owner = next((e for e in part if "no-model" in e.controls), None)
        if owner is not None:
            found = make_rows(owner, controls=("no-model",), target=target, label="no model")
            rows += [r for r in found if r["control"]]
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    plots.make_legend(fig, table, lines=False)
    attacks = table[(table["control"] == "") & table["seed"].isna()]
    said = []
    for target, part in attacks.groupby("target", sort=False):
        yes = [f"{r.label} ({plots.format_value(r.value)})" for r in part.itertuples() if r.low > 0.5]
        no = [f"{r.label} ({plots.format_value(r.value)})" for r in part.itertuples() if r.low <= 0.5]
        words = [f"seen by {join_words(yes)}"] if yes else []
        words += [f"not shown to be seen by {join_words(no)}"] if no else []
        said.append(f"{target}: {'; '.join(words)}")
    plots.set_title(fig, ". ".join(said))
    return fig, table


# --------------------------------------------------------------------------------------- audits and the data owner


@figure("fig05_audit", notebook="05_encodermi", title="A sound audit and a void one", from_table=True)
def _draw_audit(table):
    """Table: ``audit, verdict, label, attack, control, value, low, high, seed``."""
    audits = list(dict.fromkeys(table["audit"]))
    table = table.assign(control=table["control"].fillna(""))
    lines = table.groupby("audit")["label"].nunique().max()
    fig, axes = plots.make_figure(1, len(audits), height=0.24 * lines + 1.0, sharey=len(audits) > 1)
    verdicts = []
    for ax, audit in zip(axes[0], audits, strict=True):
        part = table[table["audit"] == audit]
        plots.draw_intervals(ax, part)
        ax.set_xlim(*pick_limits(table))
        verdicts.append((audit, str(part["verdict"].iloc[0])))
        ax.set_title(f"{audit}: {verdicts[-1][1]}")
    said = "; ".join(f"{audit} is {verdict}" for audit, verdict in verdicts)
    plots.set_title(fig, f"The no-model control speaks first: {said}")
    return fig, table


@figure(
    "fig05_test_set",
    notebook="05_encodermi",
    title="Were my fifty pictures used? A permutation test on the whole set",
    from_table=True,
)
def _draw_test_set(table):
    """Table: ``kind, group, x, x_high, value``.

    ``dealt``: share of permutations whose AUC lies in [x, x_high); ``observed``: AUC x and p-value; ``draws``: sorted
    p-values of many sets (value) by rank (x); ``control``: p-value of the same pictures without a model.
    """
    colors = {
        "members": (plots.MEMBER_COLOR, plots.MEMBER_LINE),
        "strangers": (plots.STRANGER_COLOR, plots.STRANGER_LINE),
    }
    fig, axes = plots.make_figure(1, 2, height=2.6)
    left, right = axes[0]
    observed = table[table["kind"] == "observed"].set_index("group")
    null = table[table["kind"] == "dealt"]
    edges = [*null["x"], null["x_high"].iloc[-1]]
    left.stairs(null["value"], edges, fill=True, color="#909090", alpha=0.30)
    for group, (color, line) in colors.items():
        if group in observed.index:
            left.axvline(observed.loc[group, "x"], color=color, linestyle=line, linewidth=1.8)
        draws = table[(table["kind"] == "draws") & (table["group"] == group)].sort_values("x")
        right.plot(draws["x"], draws["value"], color=color, linestyle=line, label=f"sets of {group}")
    left.set(xlabel="AUC of the set against the reference", ylabel="share of permutations")
    left.set_ylim(top=1.1 * null["value"].max())
    left.set_title("grey: the same pictures dealt anew")
    right.plot([0, 1], [0, 1], color="#9A9A9A", linewidth=0.7, linestyle=(0, (1, 1)))
    right.set(xlabel="rank of the set, as a share", ylabel="p-value", xlim=(0, 1), ylim=(0, 1.02))
    right.set_title("many sets: strangers follow the diagonal")
    right.grid(True)
    handles, labels = right.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=2.4)
    text = "; ".join(
        f"{group} p = {format_p(observed.loc[group, 'value'])}" for group in colors if group in observed.index
    )
    blind = table[table["kind"] == "control"]
    text = f"Were these pictures used? {text[:1].upper() + text[1:]}"
    plots.set_title(fig, text + (f"; without the model p = {format_p(blind['value'].iloc[0])}" if len(blind) else ""))
    return fig, table


def make_set_table(result: Any, n_mine: int, *, n_draws: int = 100, n_permutations: int = 199, seed: int = 0):
    """Test many sets of an owner's size, so that one p-value is seen among those it could have been.

    Args:
        result: of an attack that trains nothing, with its no-model control.
        n_mine: pictures of a set; the strangers of no set are the reference.
        n_draws: sets of members and of strangers, each against a reference of its own.
        n_permutations: dealings per drawn set; the set that is shown gets ten thousand.
        seed: seed of the private stream.

    Returns:
        the table of ``fig05_test_set``.

    Raises:
        ValueError: fewer members than a set holds, or too few strangers.
    """
    members, strangers = result.score[result.is_member], result.score[~result.is_member]
    if not 0 < n_mine <= min(len(members), len(strangers) // 2):
        got = f"{len(members)} members and {len(strangers)} strangers"
        raise ValueError(f"expected members and twice as many strangers for a set of {n_mine} pictures, got {got}")
    rng = seeds.rng(seed, "figures.sets")

    def deal(mine: str) -> tuple[np.ndarray, np.ndarray]:
        others = rng.permutation(strangers)
        return (rng.permutation(members) if mine == "members" else others)[:n_mine], others[n_mine:]

    rows = []
    for group in ("members", "strangers"):
        shown = deal(group)
        test = metrics.test_set(*shown, seed=seed)
        rows.append({"kind": "observed", "group": group, "x": test.auc, "value": test.p_value})
        tests = [metrics.test_set(*deal(group), n_permutations=n_permutations, seed=k) for k in range(n_draws)]
        for k, p in enumerate(sorted(t.p_value for t in tests)):
            rows.append({"kind": "draws", "group": group, "x": (k + 0.5) / n_draws, "value": p})
    # ranks alone decide, so all sets of a size share one null distribution (but for ties)
    ranks = stats.rankdata(np.concatenate(shown))
    sums = np.array([rng.permutation(ranks)[:n_mine].sum() for _ in range(2000)])
    aucs = (sums - n_mine * (n_mine + 1) / 2) / (n_mine * (len(ranks) - n_mine))
    share, edges = np.histogram(aucs, bins=30)
    for value, low, high in zip(share / len(aucs), edges[:-1], edges[1:], strict=True):
        rows.append({"kind": "dealt", "group": "", "x": low, "x_high": high, "value": value})
    blind = result.controls.get("no-model")
    if blind is not None and blind.metrics is not None:
        rows.append({"kind": "control", "group": "no-model", "x": blind.auc, "value": blind.p_value})
    return pd.DataFrame(rows, columns=["kind", "group", "x", "x_high", "value"])


def format_p(p: float) -> str:
    """Print a p-value: two digits after the leading zeros, ``.0001`` rather than ``0``."""
    return plots.format_value(p, 2 if p >= 0.095 else 3 if p >= 0.0095 else 4)
