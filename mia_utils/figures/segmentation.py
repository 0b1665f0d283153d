"""Figures of notebook 06: segmentation membership inference, its attackers, its settings, its victims, its splits."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from mia_utils import plots
from mia_utils.figures.base import (
    Entry,
    NotAvailable,
    draw_n_train,
    draw_sweep,
    figure,
    format_auc,
    get_epoch,
    join_words,
    load_entries,
    make_grid,
    make_roc_rows,
    make_rows,
    name_target,
    overlap,
    pick_limits,
    say_interval,
)
from mia_utils.figures.mim import make_accuracy_rows
from mia_utils.protocol import metrics

_CONTROLS = ("no-model", "untrained", "permuted")
_ORDER = ("seg-loss-map", "seg-concat", "seg-full-image", "seg-global-loss", "seg-label-only", "seg-type1")
_LESS = ("seg-label-only", "seg-type1")  # attackers who get less than posteriors and labels
_PROTOCOLS = {
    "": "blocks of frames, drawn by lot",
    "frames": "frames drawn one by one",
    "official": "official training and test frames",
}
# classes that fewer members or strangers show than this get no interval
FEWEST = 10


# ---------------------------------------------------------------------------------------------------------- words


def _load(lab: Any, *names: str, controls: Sequence[str] = ("no-model", "untrained")) -> list[Entry]:
    """Entries of some figures in the order of the attackers."""
    entries = [e for e in load_entries(lab, *names, controls=controls) if e.metrics is not None]
    return sorted(entries, key=lambda e: (list(_ORDER) + [e.meta["attack"]]).index(e.meta["attack"]))


def _name(entry: Entry) -> str:
    return plots.label_of(entry.meta["attack"])


def _say_epochs(entries: Sequence[Entry]) -> str:
    """Say after how many epochs the victims were attacked: "10 epochs", "8 to 10 epochs"."""
    epochs = sorted(set(map(get_epoch, entries)))
    if len(epochs) > 1:
        return f"{epochs[0]:,} to {epochs[-1]:,} epochs"
    return f"{epochs[0]:,} epoch{'s' * (epochs[0] != 1)}"


def _is_dependent(entry: Entry) -> bool:
    """Whether the shadow was trained on pictures of the victim's data set."""
    return "P" in str(entry.meta.get("knowledge", "")).partition(":")[2]


def _make_legend(fig: Canvas, table: pd.DataFrame, **options: Any) -> None:
    """The common legend, with the word for what was not trained here."""
    plots.make_legend(fig, table, **options)
    _rename(fig)


def _rename(fig: Canvas) -> None:
    for legend in fig.legends:
        for text in legend.get_texts():
            text.set_text(text.get_text().replace("untrained encoder", "untrained segmenter"))


# ------------------------------------------------------------------------------------------------------ the attackers


@figure(
    "fig06_roc",
    notebook="06_segmentation_mia",
    title="Log-log ROC of all attackers, with posteriors and labels, and with less",
    paper_item="Segmentations-Leak: loss map, concatenation, full image, global loss, dependent setting",
    needs="a segmenter and its shadow",
)
def _draw_roc(lab):
    entries = _load(lab, "fig06_roc", controls=_CONTROLS)
    panels = {"posteriors and true classes": [e for e in entries if e.meta["attack"] not in _LESS]}
    panels["less than that"] = [e for e in entries if e.meta["attack"] in _LESS]
    panels = {name: part for name, part in panels.items() if part}
    tables = []
    for name, part in panels.items():
        for e in part:
            tables += make_roc_rows(e, _CONTROLS if e is part[0] else (), panel=name)
    table = pd.concat(tables, ignore_index=True)
    fig, axes = make_grid(len(panels), most=2, height=2.75)
    for k, (ax, (name, part)) in enumerate(zip(axes, panels.items(), strict=True)):
        few = min(e.metrics.n_nonmembers for e in part)
        plots.draw_roc(ax, table[table["panel"] == name], n_nonmembers=few, label_y=k == 0)
        ax.set_title(name)
    victim = name_target(entries[0], entries)
    plots.set_title(fig, f"AUC on {victim}: {join_words([f'{_name(e)} {format_auc(e)}' for e in entries])}")
    _make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig06_table",
    notebook="06_segmentation_mia",
    title="Attack table with controls: AUC, TPR at 1 % FPR, accuracy at the shadow's threshold",
    paper_item="Segmentations-Leak, attack tables",
    needs="a segmenter and its shadow",
)
def _draw_table(lab):
    entries = _load(lab, "fig06_table", "fig06_roc", controls=_CONTROLS)
    victims: dict[str, list[Entry]] = {}
    for e in entries:
        victims.setdefault(name_target(e, entries), []).append(e)
    rows: dict[str, list] = {"AUC": [], "TPR at 1 % FPR": [], "balanced accuracy": []}

    def add(entry: Entry, control: str, label: str, victim: str) -> None:
        columns = dict(label=label, target=victim, knowledge=entry.meta.get("knowledge"))
        asked = (control,) if control else ()
        for name, make in (("AUC", make_rows), ("balanced accuracy", make_accuracy_rows)):
            rows[name] += [r for r in make(entry, controls=asked, **columns) if r["control"] == control]
        part = entry.controls.get(control) if control else entry
        at = part.metrics.tpr_at.get(0.01) if part is not None and part.metrics is not None else None
        if at is not None:
            head = {"attack": entry.meta["attack"], "control": control, "method": entry.meta["method"]}
            found = {"seed": np.nan, "value": at.value, "low": at.low, "high": at.high}
            rows["TPR at 1 % FPR"].append(columns | head | found)

    for victim, part in victims.items():
        head = f"{victim}: " if len(victims) > 1 else ""
        for e in part:
            add(e, "", f"{head}{_name(e)}", victim)
            for control in ("untrained", "permuted"):
                if control in e.controls:
                    add(e, control, f"{head}{_name(e)}, {control}", victim)
        add(part[0], "no-model", f"{head}no model", victim)  # asked of no model: one row serves all attackers
    kept = [name for name, found in rows.items() if found]
    table = pd.concat([pd.DataFrame(rows[name]).assign(measure=name) for name in kept], ignore_index=True)
    lines = list(dict.fromkeys(table.loc[table["measure"] == "AUC", "label"]))
    fig, axes = plots.make_figure(1, len(kept), height=0.175 * len(lines) + 0.95, sharey=True)
    for ax, name in zip(axes[0], kept, strict=True):
        part = _complete(table[table["measure"] == name], lines)
        chance = 0.01 if name.startswith("TPR") else 0.5
        xlabel = "balanced accuracy,\nthreshold from the shadow" if name == "balanced accuracy" else name
        plots.draw_intervals(ax, part, xlabel=xlabel, chance=chance)
        if chance == 0.5:
            ax.set_xlim(*pick_limits(part))
        else:
            ax.set_xlim(left=-0.01)
    best = max(entries, key=lambda e: e.metrics.auc)
    yes = [e for e in entries if e.metrics.auc_low > 0.5]
    text = f"{len(yes)} of {len(entries)} attack results lie above chance"
    if yes:
        text += f"; best: {_name(best)} on {name_target(best, entries)}, AUC {say_interval(best)}"
    plots.set_title(fig, text)
    return fig, table[["measure", *[c for c in table.columns if c != "measure"]]]


def _complete(part: pd.DataFrame, lines: Sequence[str]) -> pd.DataFrame:
    """Give every line a row, in their order, so that panels share an axis."""
    missing = pd.DataFrame({"label": [line for line in lines if line not in set(part["label"])]})
    both = pd.concat([part, missing], ignore_index=True)
    return both.sort_values("label", key=lambda column: column.map(list(lines).index), kind="stable")


@figure(
    "fig06_settings",
    notebook="06_segmentation_mia",
    title="Dependent and independent setting: ranking, and the threshold that came with it",
    paper_item="Segmentations-Leak: loss map, concatenation, global loss x dependent, independent",
    needs="a segmenter with a shadow of the same and one of another data set",
)
def _draw_settings(lab):
    entries = _load(lab, "fig06_settings")
    rank = list(_ORDER).index
    entries.sort(key=lambda e: (rank(e.meta["attack"]), not _is_dependent(e)))
    auc, accuracy = [], []
    for e in entries:
        label = f"{_name(e)},\n{_name_setting(e)}"
        facts = dict(label=label, setting=_name_setting(e), knowledge=e.meta["knowledge"])
        auc += make_rows(e, controls=("untrained", "no-model"), **facts)
        accuracy += make_accuracy_rows(e, **facts)
    auc, accuracy = pd.DataFrame(auc), pd.DataFrame(accuracy)
    fig, axes = plots.make_figure(1, 3, height=0.34 * len(entries) + 1.1, sharey=True, width_ratios=[1, 1, 0.8])
    plots.draw_intervals(axes[0, 0], auc, annotate="attack")
    axes[0, 0].set_xlim(*pick_limits(auc))
    axes[0, 0].set_title("how well the scores rank")
    plots.draw_intervals(axes[0, 1], accuracy, annotate="attack", xlabel="balanced accuracy")
    axes[0, 1].set_xlim(*pick_limits(accuracy))
    axes[0, 1].set_title("with the shadow's threshold")
    plots.draw_rates(axes[0, 2], accuracy[accuracy["seed"].isna()])
    axes[0, 2].set_xlabel("called members")
    axes[0, 2].legend(
        loc="lower right", bbox_to_anchor=(1.08, 1.0), ncols=2, handletextpad=0.1, columnspacing=0.6, borderpad=0
    )
    lead = [e for e in entries if e.meta["attack"] == entries[0].meta["attack"]]
    told = [f"{format_auc(e)} {_name_setting(e)}" for e in lead]
    accuracies = [plots.format_value(e.metrics.balanced_accuracy) for e in lead]
    text = f"{_name(lead[0])}: AUC {', '.join(told)}; accuracy at the shadow's threshold {' and '.join(accuracies)}"
    plots.set_title(fig, text)
    _make_legend(fig, auc, lines=False)
    both = pd.concat([auc.assign(measure="AUC"), accuracy.assign(measure="balanced accuracy")], ignore_index=True)
    both["label"] = both["label"].str.replace("\n", " ")
    return fig, both[["measure", *[c for c in both.columns if c != "measure"]]]


def _name_setting(entry: Entry) -> str:
    if _is_dependent(entry):
        return "dependent"
    other = entry.meta.get("shadow_dataset")
    return f"independent ({other})" if other else "independent"


@figure(
    "fig06_patches",
    notebook="06_segmentation_mia",
    title="AUC over the number of patches",
    paper_item="Segmentations-Leak: number of patches",
    needs="a segmenter and its shadow",
)
def _draw_patches(lab):
    xlabel = f"patches per image (P), victim after {_say_epochs(_load(lab, 'fig06_patches'))}"
    fig, table = draw_sweep(lab, "fig06_patches", of="n_patches", xlabel=xlabel, log=True, say="at P = {}")
    _rename(fig)
    return fig, table


@figure(
    "fig06_patch_size",
    notebook="06_segmentation_mia",
    title="AUC over the size of the patches",
    paper_item="Segmentations-Leak: patch size",
    needs="a segmenter and its shadow",
)
def _draw_patch_size(lab):
    xlabel = f"side of a patch / height of the map, victim after {_say_epochs(_load(lab, 'fig06_patch_size'))}"
    fig, table = draw_sweep(lab, "fig06_patch_size", of="patch_share", xlabel=xlabel, say="at a share of {}")
    _rename(fig)
    return fig, table


# --------------------------------------------------------------------------------------------------------- the victims


@figure(
    "fig06_epochs",
    notebook="06_segmentation_mia",
    title="Attack and quality of the victim along its training",
    paper_item="Segmentations-Leak: how long the victim trained",
    needs="a segmenter with checkpoints along training, and its shadow",
)
def _draw_epochs(lab):
    entries = sorted(_load(lab, "fig06_epochs"), key=get_epoch)
    rows = [r for e in entries for r in make_rows(e, controls=("no-model", "untrained"), x=get_epoch(e))]
    quality = []
    for epoch in dict.fromkeys(map(get_epoch, entries)):
        first = next(e for e in entries if get_epoch(e) == epoch)
        for group, key in (("member", "miou_members"), ("stranger", "miou")):
            found = [float(r.meta[key]) for r in first.results if r.meta.get(key) is not None]
            if found:
                facts = dict(x=epoch, group=group, seed=np.nan, low=min(found), high=max(found))
                quality.append(facts | {"value": float(np.mean(found)), "n_seeds": len(found)})
    table, quality = pd.DataFrame(rows), pd.DataFrame(quality)
    fig, axes = plots.make_figure(1, 2 if len(quality) else 1, width=plots.FULL, height=2.8)
    plots.draw_sweep(axes[0, 0], table, xlabel="epochs of the victim", log=True)
    axes[0, 0].set_ylim(*pick_limits(table))
    axes[0, 0].set_title("what the attacker finds")
    if len(quality):
        plots.draw_part_curves(axes[0, 1], quality, xlabel="epochs of the victim", ylabel="mIoU")
        axes[0, 1].set_xscale("log")
        axes[0, 1].set_xticks(*[sorted(set(quality["x"]))] * 2)
        axes[0, 1].set_xticks([], minor=True)
        axes[0, 1].set_title("what the victim is good for")
    lead = max(entries, key=lambda e: (get_epoch(e), e.metrics.auc)).meta["attack"]
    line = [e for e in entries if e.meta["attack"] == lead]
    ends = [line[0], line[-1]] if len(line) > 1 else line
    said = ", ".join(f"{format_auc(e)} after {get_epoch(e):,}" for e in ends)
    text = f"{plots.label_of(lead)}: AUC {said} epochs"
    for group in ("stranger", "member") if len(quality) else ():
        part = quality[quality["group"] == group]
        values = [plots.format_value(part.loc[part["x"] == get_epoch(e), "value"].iloc[0]) for e in ends]
        text += f"; mIoU on {group}s {' and '.join(values)}"
    plots.set_title(fig, text)
    _make_legend(fig, table, seeds=True)
    both = pd.concat([table.assign(panel="attack"), quality.assign(panel="mIoU")], ignore_index=True)
    return fig, both[["panel", *[c for c in both.columns if c != "panel"]]]


@figure(
    "fig06_n_train",
    notebook="06_segmentation_mia",
    title="AUC over the number of training pictures, at equal work",
    paper_item="Segmentations-Leak: number of training images",
    needs="segmenters trained on several numbers of pictures; see profile photos",
)
def _draw_n_train(lab):
    entries = sorted(_load(lab, "fig06_n_train"), key=lambda e: e.meta["n_train"])
    fig, table = draw_n_train("fig06_n_train", entries)
    said = [f"{format_auc(e)} with {e.meta['n_train']:,}" for e in (entries[0], entries[-1])]
    text = f"{_name(entries[0])}: AUC {' and '.join(said)} training pictures, about the same work"
    plots.set_title(fig, text + ("; the intervals overlap" if overlap(entries[0], entries[-1]) else ""))
    _make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig06_transfer",
    notebook="06_segmentation_mia",
    title="Architecture transfer: attacker fit on a shadow of one network, used on a victim of another",
    paper_item="Segmentations-Leak: architecture transfer between victim and shadow",
    needs="a segmenter and shadows of several networks",
)
def _draw_transfer(lab):
    entries = _load(lab, "fig06_transfer", controls=("no-model",))
    order = list(plots.METHOD_MARKERS)

    def place(method: str) -> int:
        return order.index(method) if method in order else len(order)

    entries.sort(key=lambda e: (place(e.meta["shadow_method"]), place(e.meta["method"])))
    rows = []
    for e in entries:
        shadow, victim = (plots.label_of(e.meta[key]) for key in ("shadow_method", "method"))
        rows += make_rows(e, row=shadow, column=victim)
    n_shadows = len({r["row"] for r in rows})
    blind = {}
    for e in entries:
        twin = e.controls.get("no-model")
        if twin is not None and twin.metrics is not None:
            blind.setdefault(e.meta.get("split"), e)
    for method in sorted({e.meta["method"] for e in entries}, key=place):
        owner = blind.get(next(e.meta.get("split") for e in entries if e.meta["method"] == method))
        if owner is not None:  # no model is asked: one row serves all victims of a split
            found = make_rows(owner, controls=("no-model",), row="no model", column=plots.label_of(method))
            rows += [r for r in found if r["control"]]
    table = pd.DataFrame(rows)
    height = 0.52 * table["row"].nunique() + 1.2
    fig, axes = plots.make_figure(1, 1, width=plots.HALF * 1.2, height=height)
    plots.draw_matrix(
        axes[0, 0],
        table,
        xlabel=f"victim, after {_say_epochs(entries)}",
        ylabel="attacker fit on the shadow",
        n_head=n_shadows if blind else None,
    )
    means = []
    for what, same in (("of the victim's network", True), ("of another network", False)):
        found = [e.metrics.auc for e in entries if (e.meta["method"] == e.meta["shadow_method"]) == same]
        means += [f"{plots.format_value(float(np.mean(found)))} with a shadow {what}"] if found else []
    plots.set_title(fig, f"{_name(entries[0])}: mean AUC {', '.join(means)}")
    return fig, table


# ------------------------------------------------------------------------------------------------------ the classes


def tabulate_classes(
    parts: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]],
    names: Sequence[str],
    *,
    method: str = "",
    fewest: int = FEWEST,
) -> pd.DataFrame:
    """Measure how well the mean loss of each class alone tells members from strangers.

    Args:
        parts: one (seed, losses (N, C), is_member (N,), groups (N,) or None) per victim; losses as of
            ``attacks.segmentation.compute_class_losses``, NaN where an image does not show the class.
        names: C names.
        method: network of the victims, for the marker.
        fewest: a class that fewer members or strangers of some victim show is left out.

    Returns:
        DataFrame ``class, attack, control, method, seed, value, low, high, n_members, n_strangers, member, stranger``:
        AUC of minus the loss with its interval, and the mean losses; largest AUC first; rows with a seed are victims.
    """
    found = []
    for c, name in enumerate(names):
        inputs, means, counts = [], [], []
        for _, losses, is_member, groups in parts:
            shown = np.isfinite(losses[:, c])
            loss, mine = losses[shown, c], np.asarray(is_member, bool)[shown]
            counts.append((int(mine.sum()), int((~mine).sum())))
            if min(counts[-1]) < fewest:
                break
            means.append((loss[mine].mean(), loss[~mine].mean()))
            inputs.append(dict(score=-loss, is_member=mine, groups=None if groups is None else groups[shown]))
        if len(inputs) < len(parts):
            continue
        m, head = metrics.combine(inputs), {"class": name, "attack": "seg-loss-map", "control": "", "method": method}
        sizes, mean = np.mean(counts, axis=0), np.mean(means, axis=0)
        facts = dict(n_members=sizes[0], n_strangers=sizes[1], member=mean[0], stranger=mean[1])
        rows = [head | {"seed": np.nan, "value": m.auc, "low": m.auc_low, "high": m.auc_high} | facts]
        if len(parts) > 1:
            rows += [head | {"seed": part[0], "value": auc} for part, auc in zip(parts, m.per_seed, strict=True)]
        found.append((m.auc, rows))
    found.sort(key=lambda item: -item[0])
    columns = "class attack control method seed value low high n_members n_strangers member stranger".split()
    return pd.DataFrame([row for _, rows in found for row in rows], columns=columns)


@figure(
    "fig06_classes",
    notebook="06_segmentation_mia",
    title="Which classes betray membership",
    paper_item="Segmentations-Leak: per-class leakage (ours)",
    needs="a segmenter",
    from_table=True,
)
def _draw_classes(table):
    """Table: as ``tabulate_classes`` makes it."""
    if not len(table):
        raise NotAvailable("fig06_classes: no class is shown by enough members and strangers in this profile")
    table = table.assign(control="", label=table["class"])
    main = table[table["seed"].isna()]
    fig, axes = plots.make_figure(1, 2, height=0.21 * len(main) + 1.15, sharey=True, width_ratios=[1.25, 1])
    plots.draw_intervals(axes[0, 0], table, xlabel="AUC of the class's mean loss")
    axes[0, 0].set_xlim(*pick_limits(main))
    plots.draw_pairs(axes[0, 1], main, xlabel="mean loss of a pixel")
    single = main[main["class"] != "whole picture"]
    best, worst = single.iloc[0], single.iloc[-1]
    said = [f"{r['class']} {plots.format_interval(r['value'], r['low'], r['high'])}" for r in (best, worst)]
    text = f"Classes that betray most and least: AUC of {said[0]} and of {said[1]}"
    if best["low"] <= worst["high"]:
        text += "; the intervals overlap"
    plots.set_title(fig, text)
    return fig, table.drop(columns="label")


# ------------------------------------------------------------------------------------------------------ the split


@figure(
    "fig06_splits",
    notebook="06_segmentation_mia",
    title="What the split of a film does: without a model, and to the real attack",
    paper_item="Segmentations-Leak: released splits (ours: three ways to split a film)",
    needs="victims trained on a film split by blocks, frame by frame, and officially; see profile photos",
)
def _draw_splits(lab):
    entries = _load(lab, "fig06_splits")
    found = {str(e.meta.get("dataset", "")).partition("@")[2]: e for e in entries}
    found = {protocol: found[protocol] for protocol in _PROTOCOLS if protocol in found}
    if len(found) < 2:
        raise NotAvailable("fig06_splits: victims of one split only; see profile photos")
    rows = []
    for protocol, e in found.items():
        label = "\n".join(textwrap.wrap(_PROTOCOLS[protocol], 22))
        rows += make_rows(e, controls=("untrained", "no-model"), label=label, protocol=protocol or "blocks")
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, width=5.2, height=0.56 * len(found) + 1.1)
    plots.draw_intervals(axes[0, 0], table)
    axes[0, 0].set_xlim(*pick_limits(table))
    said = []
    for protocol, e in found.items():
        blind = e.controls.get("no-model")
        without = f", no model {format_auc(blind)}" if blind is not None and blind.metrics is not None else ""
        said.append(f"{protocol or 'blocks'} {format_auc(e)}{without}")
    plots.set_title(fig, f"AUC of {_name(next(iter(found.values())))}: {'; '.join(said)}")
    _make_legend(fig, table, lines=False)
    table["label"] = table["label"].str.replace("\n", " ")
    return fig, table
