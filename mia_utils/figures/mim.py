"""Figures of notebook 04: the MIM attack, its settings, its targets, and what its threshold needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mia_utils import plots
from mia_utils.figures.base import (
    Entry,
    combine,
    draw_choices,
    draw_n_train,
    figure,
    format_auc,
    get_epoch,
    join_words,
    load_entries,
    make_grid,
    make_roc_rows,
    make_rows,
    overlap,
    pick_limits,
    say_interval,
)
from mia_utils.protocol import metrics
from mia_utils.runner import profiles

_CONTROLS = ("no-model", "untrained", "permuted")
_ATTACKS = ("mim", "partcrop", "encodermi-v", "encodermi-s", "encodermi-t")
_RATIOS = {"mae": 0.75, "simmim": 0.6}  # share of hidden patches in training, where a row does not say
_FAMILIES = {"vit": "ViT", "swin": "Swin", "resnet": "ResNet", "convnext": "ConvNeXt"}
_AUGMENTATIONS = {"none": "no crops", "crop": "strong crops", "crop-weak": "weak crops", "flip": "flips"}
_DISTANCES = {"mse": "MSE", "l1": "L1", "ssim": "1 - SSIM"}
_REGIONS = {"masked": "hidden pixels", "all": "all pixels"}


# ---------------------------------------------------------------------------------------------------------- names


def _get_row(lab: Any, entry: Entry) -> profiles.Row:
    return lab.profile.row(entry.results[0].meta["model_id"])


def _get_ratio(row: profiles.Row) -> float:
    """Share of patches hidden while a masked-image model was trained."""
    return float(row.options.get("mask_ratio", _RATIOS.get(row.method, 0.75)))


def _short(share: float) -> str:
    """Print a share as briefly as it goes: 0.5 -> ``.5``."""
    return f"{share:g}".replace("0.", ".", 1) if 0 < share < 1 else f"{share:g}"


def name_arch(arch: str) -> str:
    """Name an architecture with its size: ``vit_nano_patch8_32`` -> ``ViT-nano/8``."""
    family, *rest = arch.split("_")
    patch = next((part.removeprefix("patch") for part in rest if part.startswith("patch")), "")
    return _FAMILIES.get(family, family) + (f"-{rest[0]}" if rest else "") + (f"/{patch}" if patch else "")


def name_difference(row: profiles.Row, plain: profiles.Row) -> str:
    """Say in what a row differs from the plain one: ``"strong crops, N 512"``; empty where in nothing that matters."""
    parts = []
    if row.dataset != plain.dataset:
        parts.append(row.dataset)
    if row.method != plain.method:
        parts.append(plots.label_of(row.method))
    if row.arch != plain.arch:
        parts.append(name_arch(row.arch))
    if _get_ratio(row) != _get_ratio(plain) and row.method == plain.method:
        parts.append(f"mask ratio {_short(_get_ratio(row))}")
    if row.augmentation != plain.augmentation:
        parts.append(_AUGMENTATIONS.get(row.augmentation, f"{row.augmentation} views"))
    if row.n_train != plain.n_train:
        parts.append(f"N {row.n_train:,}")
    return ", ".join(parts)


def name_models(lab: Any, entries: Sequence[Entry]) -> dict[str, str]:
    """Name models by their method and what tells them from the plain target of that method; model -> name."""
    rows = {e.meta["model"]: _get_row(lab, e) for e in entries}
    names = {}
    for model, row in rows.items():
        twins = [m for m, r in rows.items() if r.method == row.method]
        plain = f"{row.method}-target" if f"{row.method}-target" in twins else twins[0]
        difference = name_difference(row, rows[plain])
        names[model] = ", ".join(filter(None, [plots.label_of(row.method), difference]))
        if model != plain and not difference:
            names[model] = model  # it differs in something that has no name here
    return names


def _load(lab: Any, *names: str, controls: Sequence[str] = ("no-model", "untrained")) -> list[Entry]:
    return [e for e in load_entries(lab, *names, controls=controls) if e.metrics is not None]


def _keep_largest(entries: Sequence[Entry]) -> list[Entry]:
    """Keep, of results that differ in the number of strangers only, the one with the most (another run had fewer)."""
    best: dict[tuple, Entry] = {}
    for e in entries:
        key = (e.meta["model"], e.meta["knowledge"], e.meta.get("shadow"))
        if key not in best or e.metrics.n_nonmembers > best[key].metrics.n_nonmembers:
            best[key] = e
    return [e for e in entries if any(e is kept for kept in best.values())]


def measure_accuracy(found: metrics.Result) -> tuple[float, float, float]:
    """Balanced accuracy at the threshold of a result, with its interval.

    From the intervals of hits and false alarms, which come from different images: Zou and Donner's interval of a
    difference (Statistics in Medicine 27, 2008), halved and moved.
    """
    hits, alarms = found.at_threshold["tpr"], found.at_threshold["fpr"]
    down = np.hypot(hits.value - hits.low, alarms.high - alarms.value)
    up = np.hypot(hits.high - hits.value, alarms.value - alarms.low)
    value = found.balanced_accuracy
    return value, max(0.0, value - down / 2), min(1.0, value + up / 2)


def make_accuracy_rows(entry: Entry, *, controls: Sequence[str] = (), **columns: Any) -> list[dict[str, Any]]:
    """Rows of balanced accuracy at the threshold, as ``make_rows`` makes them of AUC; with hits and alarms."""
    rows = []
    for part in [entry, *(entry.controls[c] for c in controls if c in entry.controls)]:
        if part.metrics is None or part.metrics.at_threshold is None:
            continue
        head = {**columns, "attack": entry.meta["attack"], "control": part.control, "method": entry.meta["method"]}
        value, low, high = measure_accuracy(part.metrics)
        at = part.metrics.at_threshold
        rows.append(
            {
                **head, "seed": np.nan, "value": value, "low": low, "high": high, "accuracy": part.metrics.accuracy,
                "tpr": at["tpr"].value, "fpr": at["fpr"].value, "n_seeds": part.metrics.n_seeds,
            }
        )  # fmt: skip
        if part.metrics.n_seeds > 1:
            each = [combine([r], n_bootstrap=2) for r in part.results if len(r.score)]  # the value only
            rows += [{**head, "seed": s, "value": m.balanced_accuracy} for s, m in zip(part.seeds, each, strict=True)]
    return rows


def _make_rate_rows(entry: Entry, *, controls: Sequence[str] = (), **columns: Any) -> list[dict[str, Any]]:
    """Rows of TPR at 1 % FPR; none where too few strangers were asked about."""
    rows = []
    for part in [entry, *(entry.controls[c] for c in controls if c in entry.controls)]:
        at = part.metrics.tpr_at.get(0.01) if part.metrics is not None else None
        if at is not None:
            head = {**columns, "attack": entry.meta["attack"], "control": part.control, "method": entry.meta["method"]}
            rows.append({**head, "seed": np.nan, "value": at.value, "low": at.low, "high": at.high})
    return rows


# ----------------------------------------------------------------------------------------------- the main results


@figure(
    "fig04_histograms",
    notebook="04_mim_attack",
    title="Reconstruction distances of members and strangers",
    paper_item="MIM: distance histograms of members and non-members",
    needs="masked-image targets",
)
def _draw_histograms(lab):
    entries = _keep_largest(_load(lab, "fig04_histograms"))
    names = name_models(lab, entries)
    fig, axes = make_grid(len(entries), height=1.75)
    tables, said = [], []
    for k, (ax, e) in enumerate(zip(axes, entries, strict=True)):
        target = names[e.meta["model"]]
        logs = [np.log10(np.maximum(-r.score, 1e-9)) for r in e.results]
        # one scale for all seeds of a target; shares are counted seed by seed and averaged
        edges = np.linspace(*np.percentile(np.concatenate(logs), [0.5, 99.5]), 25)
        bins = []
        for d, r in zip(logs, e.results, strict=True):
            inside, one = np.clip(d, edges[0], edges[-1]), {"bin_low": 10 ** edges[:-1], "bin_high": 10 ** edges[1:]}
            for side, kept in (("member", r.is_member), ("stranger", ~r.is_member)):
                one[side] = np.histogram(inside[kept], edges)[0] / kept.sum()
            bins.append(pd.DataFrame(one).assign(seed=r.meta["seed"]))
        mean = bins[0].assign(**{side: np.mean([b[side] for b in bins], axis=0) for side in ("member", "stranger")})
        plots.draw_histograms(ax, mean, xlabel="distance d(x)", legend=k == 0)
        if len(bins) > 1:
            for b in bins:
                for side, color in (("member", plots.MEMBER_COLOR), ("stranger", plots.STRANGER_COLOR)):
                    ax.stairs(b[side], 10**edges, color=color, linewidth=0.5, alpha=0.6)
        plots.tame_log_axis(ax)
        if ax.get_subplotspec().colspan.start:
            ax.set_ylabel("")
        blind = e.controls.get("no-model")
        text = f"AUC {say_interval(e)}"
        ax.set_title(f"{target}\n{text}" + (f", no model {format_auc(blind)}" if blind and blind.metrics else ""))
        medians = [[np.median(-r.score[r.is_member == side]) for r in e.results] for side in (False, True)]
        ratio = float(np.mean(np.array(medians[0]) / np.array(medians[1])))
        said.append(f"{ratio:.1f} on {target}" if ratio < 10 else f"{ratio:.0f} on {target}")
        tables += [b.assign(target=target) for b in ([mean.assign(seed=np.nan)] + (bins if len(bins) > 1 else []))]
        tables.append(pd.DataFrame(make_rows(e, controls=("no-model", "untrained"), target=target)))
    plots.set_title(fig, f"Median distance of strangers over that of members: {'; '.join(said)}")
    table = pd.concat(tables, ignore_index=True)
    first = ["target", "bin_low", "bin_high", "member", "stranger"]
    return fig, table[[*first, *[c for c in table.columns if c not in first]]]


@figure(
    "fig04_roc",
    notebook="04_mim_attack",
    title="MIM, PartCrop and EncoderMI on the same encoder",
    paper_item="MIM: comparison with baselines",
    needs="a masked-image target",
)
def _draw_roc(lab):
    entries = _load(lab, "fig04_roc", controls=_CONTROLS)
    names = name_models(lab, entries)
    panels: dict[str, list[Entry]] = {}
    for e in entries:
        panels.setdefault(names[e.meta["model"]], []).append(e)
    roc_tables, rows = [], []
    for target, part in panels.items():
        part.sort(key=lambda e: _ATTACKS.index(e.meta["attack"]) if e.meta["attack"] in _ATTACKS else len(_ATTACKS))
        for e in part:
            roc_tables += make_roc_rows(e, _CONTROLS if e is part[0] else (), target=target)
            own = {"target": target, "label": plots.label_of(e.meta["attack"])}
            rows += make_rows(e, controls=("untrained", "permuted"), **own)
        # asked of no model: one row serves all attacks
        blind = make_rows(part[0], controls=("no-model",), target=target, label="no model")
        rows += [r for r in blind if r["control"]]
    roc, table = pd.concat(roc_tables, ignore_index=True), pd.DataFrame(rows)
    fig, axes = plots.make_figure(len(panels), 2, height=2.55 * len(panels) + 0.45)
    for k, (target, part) in enumerate(panels.items()):
        left, right = axes[k]
        plots.draw_roc(
            left, roc[roc["target"] == target], n_nonmembers=part[0].metrics.n_nonmembers,
            label_x=k == len(panels) - 1,
        )  # fmt: skip
        left.set_title(target)
        plots.draw_intervals(right, table[table["target"] == target], annotate="attack")
        right.set_xlim(*pick_limits(table))
        right.set_xlabel("AUC" if k == len(panels) - 1 else "")
    first, part = next(iter(panels.items()))
    said = join_words([f"{plots.label_of(e.meta['attack'])} {format_auc(e)}" for e in part])
    text = f"AUC on the same {first} encoder: {said}"
    plots.set_title(fig, text)
    plots.make_legend(fig, roc, seeds=True)
    both = pd.concat([roc.assign(panel="roc"), table.assign(panel="auc")], ignore_index=True)
    return fig, both[["panel", *[c for c in both.columns if c != "panel"]]]


@figure(
    "fig04_table",
    notebook="04_mim_attack",
    title="Attack table with controls: AUC, TPR at 1 % FPR, accuracy at the shadow's threshold",
    paper_item="MIM, attack tables",
    needs="masked-image targets",
)
def _draw_table(lab):
    entries = _keep_largest(_load(lab, "fig04_table", controls=_CONTROLS))
    names = name_models(lab, entries)
    tables: dict[str, list] = {"AUC": [], "TPR at 1 % FPR": [], "accuracy": []}
    for model, target in names.items():
        part = [e for e in entries if e.meta["model"] == model]
        partial = next((e for e in part if e.meta["knowledge"] == "partial"), part[0])
        for control in ("", *_CONTROLS):
            label = f"{target}: {plots.label_of(control)}" if control else target
            for name, make in (("AUC", make_rows), ("TPR at 1 % FPR", _make_rate_rows)):
                found = make(partial, controls=(control,) if control else (), label=label, target=target)
                tables[name] += [r for r in found if r["control"] == control]
            for e in part:
                if str(e.meta["knowledge"]).startswith("shadow"):
                    letters = str(e.meta["knowledge"]).removeprefix("shadow:")
                    columns = dict(label=label, target=target, shadow=letters)
                    found = make_accuracy_rows(e, controls=(control,) if control else (), **columns)
                    tables["accuracy"] += [r for r in found if r["control"] == control]
    table = pd.concat([pd.DataFrame(rows).assign(measure=name) for name, rows in tables.items()], ignore_index=True)
    kept = [name for name, rows in tables.items() if rows]
    lines = list(dict.fromkeys(table["label"]))
    fig, axes = plots.make_figure(1, len(kept), height=0.165 * len(lines) + 0.95, sharey=True)
    for ax, name in zip(axes[0], kept, strict=True):
        chance = 0.01 if name.startswith("TPR") else 0.5
        xlabel = "balanced accuracy,\nthreshold from a shadow" if name == "accuracy" else name
        part = table[table["measure"] == name]
        missing = pd.DataFrame({"label": [line for line in lines if line not in set(part["label"])]})
        part = pd.concat([part, missing], ignore_index=True)
        part = part.sort_values("label", key=lambda column: column.map(lines.index), kind="stable")
        plots.draw_intervals(ax, part, xlabel=xlabel, chance=chance)
        ax.set_xlim(*(pick_limits(part) if chance == 0.5 else (-0.03, 1.03)))
        _thin_auc_ticks(ax)
    # a control stands under its target, so its line needs no longer name
    axes[0, 0].set_yticks(range(len(lines)), [line.partition(": ")[2] or line for line in lines])
    for line, text in zip(lines, axes[0, 0].get_yticklabels(), strict=True):
        text.set(color="#777777" if ": " in line else "black", fontweight="normal" if ": " in line else "bold")
    leads = [next(e for e in entries if e.meta["model"] == model) for model in names]
    leads.sort(key=lambda e: e.metrics.auc)
    said = {True: [], False: []}
    for e in leads:
        said[e.metrics.auc_low > 0.5].append(f"{names[e.meta['model']]} ({format_auc(e)})")
    text = f"MIM attack: above chance on {len(said[True])} of {len(leads)} targets"
    if said[True]:
        text += f", {' to '.join(dict.fromkeys((said[True][0], said[True][-1])))}"
    text += f"; not shown on {'; '.join(said[False])}" if said[False] else ""
    plots.set_title(fig, text)
    return fig, table[["measure", *[c for c in table.columns if c != "measure"]]]


# ------------------------------------------------------------------------------------------ settings of the attack


def _find_stages(entries: Sequence[Entry]) -> dict[int, list[Entry]]:
    """Entries by the epoch of the attacked checkpoint, early first."""
    stages: dict[int, list[Entry]] = {}
    for e in sorted(entries, key=get_epoch):
        stages.setdefault(get_epoch(e), []).append(e)
    return stages


def _draw_stages(
    lab: Any, name: str, *, of: str, xlabel: str, say: str, log: bool = False
) -> tuple[Any, pd.DataFrame, list]:
    """Panels of AUC over a swept setting, one per attacked checkpoint of the same model."""
    entries = [e for e in _load(lab, name, f"{name}_early") if e.get(of) is not None]
    stages = _find_stages(entries)
    rows, said = [], []
    for epoch, part in stages.items():
        part.sort(key=lambda e: e.get(of))
        target = f"after {epoch:,} epochs"
        for e in part:
            rows += make_rows(e, controls=("no-model", "untrained"), target=target, epoch=epoch, x=float(e.get(of)))
        ends = [part[0], part[-1]] if len(part) > 1 else part
        text = ", ".join(f"{format_auc(e)} {say.format(_short(float(e.get(of))))}" for e in ends)
        if of == "n_masks":
            text = ", ".join(f"{format_auc(e)} {say.format(e.get(of))}{'s' * (e.get(of) > 1)}" for e in ends)
        same = len(ends) > 1 and overlap(*ends)
        said.append(f"{target} {text}" + (" (intervals overlap)" if same else ""))
    table = pd.DataFrame(rows)
    fig, axes = make_grid(len(stages), sharey=True, most=2)
    for k, (ax, epoch) in enumerate(zip(axes, stages, strict=True)):
        part = table[table["epoch"] == epoch]
        plots.draw_sweep(ax, part, xlabel=xlabel, log=log, ylabel="" if k else "AUC")
        ax.set_title(f"{_name_lead(lab, entries)} after {epoch:,} epochs")
    axes[0].set_ylim(*pick_limits(table))
    plots.set_title(fig, f"AUC {'; '.join(said)}")
    plots.make_legend(fig, table, seeds=True)
    return fig, table, list(axes)


def _name_lead(lab: Any, entries: Sequence[Entry]) -> str:
    return next(iter(name_models(lab, entries[:1]).values()))


@figure(
    "fig04_masks",
    notebook="04_mim_attack",
    title="AUC over the number of masks",
    paper_item="MIM: number of masks",
    needs="a masked-image target",
)
def _draw_masks(lab):
    return _draw_stages(lab, "fig04_masks", of="n_masks", xlabel="masks per image (M)", log=True, say="with {} mask")[
        :2
    ]


@figure(
    "fig04_mask_ratio",
    notebook="04_mim_attack",
    title="AUC over the mask ratio of the queries",
    paper_item="MIM: query mask ratio",
    needs="a masked-image target",
)
def _draw_mask_ratio(lab):
    fig, table, axes = _draw_stages(
        lab, "fig04_mask_ratio", of="mask_ratio", xlabel="share of patches the attacker hides", say="with {} hidden"
    )
    entry = _load(lab, "fig04_mask_ratio", "fig04_mask_ratio_early")[0]
    for ax in axes:
        ax.axvline(_get_ratio(_get_row(lab, entry)), color="#BBBBBB", linewidth=0.7, zorder=0.4)
    bottom = axes[0].get_ylim()[0]
    axes[0].annotate(
        "as in training", (_get_ratio(_get_row(lab, entry)), bottom), xytext=(-3, 3), textcoords="offset points",
        ha="right", fontsize=6.5, color="#777777",
    )  # fmt: skip
    return fig, table


def _name_distance(entry: Entry) -> str:
    distance, region = entry.get("distance", "mse"), entry.get("region", "masked")
    if entry.get("space") == "normalized":
        return f"{_DISTANCES.get(distance, distance)}, hidden, normalized"
    return f"{_DISTANCES.get(distance, distance)}, {_REGIONS.get(region, region)}"


@figure(
    "fig04_distance",
    notebook="04_mim_attack",
    title="AUC by distance and by the pixels it counts",
    paper_item="MIM: distance measure",
    needs="a masked-image target",
)
def _draw_distance(lab):
    entries = _load(lab, "fig04_distance", "fig04_distance_early")
    names = [f"{d}, {r}" for d in _DISTANCES.values() for r in _REGIONS.values()]
    order = [*names[:1], "MSE, hidden, normalized", *names[1:]]
    entries.sort(key=lambda e: order.index(_name_distance(e)) if _name_distance(e) in order else len(order))
    rows, said, lead = [], [], _name_lead(lab, entries)
    for epoch, part in _find_stages(entries).items():
        for e in part:
            target = f"{lead} after {epoch:,} epochs"
            rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=_name_distance(e))
        best, worst = (pick(part, key=lambda e: e.metrics.auc) for pick in (max, min))
        text = f"after {epoch:,} epochs AUC {format_auc(worst)} ({_name_distance(worst)}) to"
        text = f"{text} {format_auc(best)} ({_name_distance(best)})" if worst is not best else text[:-3]
        said.append(text + (", intervals overlap" if worst is not best and overlap(best, worst) else ""))
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    plots.set_title(fig, f"{lead}: {'; '.join(said)}")
    plots.make_legend(fig, table, lines=False)
    return fig, table


# ------------------------------------------------------------------------------------------------ what was trained


@figure(
    "fig04_target_mask_ratio",
    notebook="04_mim_attack",
    title="AUC over the mask ratio of the training",
    paper_item="MIM: target mask ratio",
    needs="targets trained with other mask ratios; see profile photos",
)
def _draw_target_mask_ratio(lab):
    entries = _load(lab, "fig04_target_mask_ratio")
    ratio = {id(e): _get_ratio(_get_row(lab, e)) for e in entries}
    common = min({e.get("mask_ratio") for e in entries}, key=lambda q: abs(q - 0.75))
    rows = []
    for e in sorted(entries, key=lambda e: ratio[id(e)]):
        asked = []
        if e.get("mask_ratio") == common:
            asked.append(f"asked with {_short(common)} hidden")
        if abs(e.get("mask_ratio") - ratio[id(e)]) < 1e-9:
            asked.append("asked as in its training")
        for target in asked:
            facts = dict(target=target, x=ratio[id(e)], epoch=get_epoch(e), query_mask_ratio=e.get("mask_ratio"))
            rows += make_rows(e, controls=("no-model", "untrained"), **facts)
    table = pd.DataFrame(rows)
    targets = sorted(set(table["target"]))
    fig, axes = make_grid(len(targets), sharey=True, most=2)
    for k, (ax, target) in enumerate(zip(axes, targets, strict=True)):
        part = table[table["target"] == target]
        plots.draw_sweep(ax, part, xlabel="share of patches hidden in training", ylabel="" if k else "AUC")
        ax.set_title(target)
    axes[0].set_ylim(*pick_limits(table))
    lead = table[(table["target"] == targets[0]) & (table["control"] == "") & table["seed"].isna()]
    said = [f"{plots.format_value(r.value)} trained with {_short(r.x)} hidden" for r in lead.itertuples()]
    epochs = sorted({get_epoch(e) for e in entries})
    text = f"AUC {join_words(said)}, {targets[0]}, after {' to '.join(f'{e:,}' for e in dict.fromkeys(epochs))} epochs"
    plots.set_title(fig, text)
    plots.make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig04_epochs",
    notebook="04_mim_attack",
    title="AUC along training: from the regularized to the overfit regime",
    paper_item="MIM: pre-training epochs",
    needs="masked-image targets with checkpoints along training",
)
def _draw_epochs(lab):
    entries = _load(lab, "fig04_epochs")
    names = name_models(lab, entries)
    rows, ends = [], {}
    for e in sorted(entries, key=get_epoch):
        line = names[e.meta["model"]]
        rows += make_rows(e, controls=("no-model", "untrained"), line=line, x=get_epoch(e))
        ends[line] = e
    table = pd.DataFrame(rows)
    order = [name for name in names.values() if name in ends]
    table = table.sort_values("line", key=lambda column: column.map(order.index), kind="stable", ignore_index=True)
    fig, axes = plots.make_figure(1, 1, width=5.6, height=2.9)
    plots.draw_lines(axes[0, 0], table, ylim=pick_limits(table), xlabel="training epoch", log=True)
    said = [f"{line} {format_auc(ends[line])} after {get_epoch(ends[line]):,} epochs" for line in order]
    plots.set_title(fig, f"AUC: {'; '.join(said)}")
    plots.make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig04_size",
    notebook="04_mim_attack",
    title="AUC by size and structure of the target",
    paper_item="MIM: model size",
    needs="masked-image targets of several sizes or structures",
)
def _draw_size(lab):
    entries = _load(lab, "fig04_size")

    def count(entry):
        return profiles.ARCH_COST.get(str(entry.meta["arch"]), (0, np.nan))[1]

    entries.sort(key=lambda e: (str(e.meta["method"]), count(e)))
    rows, said = [], {}
    for e in entries:
        target = plots.label_of(e.meta["method"])
        label = f"{name_arch(str(e.meta['arch']))}, {count(e):.2g} M, {get_epoch(e):,} epochs"
        rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=label, millions=count(e))
        said.setdefault(target, []).append(f"{name_arch(str(e.meta['arch']))} {format_auc(e)}")
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    plots.set_title(fig, "AUC: " + "; ".join(f"{target} {', '.join(found)}" for target, found in said.items()))
    plots.make_legend(fig, table, lines=False)
    return fig, table


@figure(
    "fig04_n_train",
    notebook="04_mim_attack",
    title="AUC over the number of training pictures, at equal work",
    paper_item="MIM: number of training images",
    needs="targets trained on several numbers of pictures; see profile photos",
)
def _draw_n_train(lab):
    entries = sorted(_load(lab, "fig04_n_train"), key=lambda e: e.meta["n_train"])
    fig, table = draw_n_train("fig04_n_train", entries)
    said = [f"{format_auc(e)} with {e.meta['n_train']:,}" for e in (entries[0], entries[-1])]
    shown = sorted(table["pictures_shown"].unique())
    work = f"{shown[0]:,.0f}" + (f" to {shown[-1]:,.0f}" if shown[-1] != shown[0] else "")
    plots.set_title(fig, f"AUC {' and '.join(said)} pictures after {work} pictures shown")
    plots.make_legend(fig, table, seeds=True)
    return fig, table


# ---------------------------------------------------------------------------------------------- what the attacker has


@figure(
    "fig04_decoder",
    notebook="04_mim_attack",
    title="The target's own decoder against one that the attacker trains",
    paper_item="MIM: encoders released without a decoder",
    needs="a masked-image target, and encoders that never had a decoder",
)
def _draw_decoder(lab):
    entries = _load(lab, "fig04_decoder")
    entries.sort(
        key=lambda e: (e.meta["model"] not in {o.meta["model"] for o in entries if _is_own(o)}, not _is_own(e))
    )
    names = name_models(lab, entries)
    rows = []
    for e in entries:
        label = f"{names[e.meta['model']]}, {'its own decoder' if _is_own(e) else 'decoder of the attacker'}"
        rows += make_rows(e, controls=("untrained", "no-model"), label=label, decoder=e.meta.get("decoder"))
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, width=5.6, height=0.36 * table["label"].nunique() + 0.95)
    plots.draw_intervals(axes[0, 0], table, annotate="attack")
    axes[0, 0].set_xlim(*pick_limits(table))
    parts = []
    for model, name in names.items():
        found = {_is_own(e): e for e in entries if e.meta["model"] == model}
        if len(found) == 2:
            parts.append(f"{name} {format_auc(found[False])} (its own decoder {format_auc(found[True])})")
        elif False in found:
            parts.append(f"{name} {format_auc(found[False])}")
    plots.set_title(fig, f"AUC with a decoder that the attacker trained: {'; '.join(parts)}")
    plots.make_legend(fig, table, lines=False)
    return fig, table


def _is_own(entry: Entry) -> bool:
    return entry.meta.get("decoder") != "attacker"


@figure(
    "fig04_relaxations",
    notebook="04_mim_attack",
    title="Score quality apart from threshold transfer, for shadows of other data, mask ratio and structure",
    paper_item="MIM: shadow data of another distribution, another mask ratio, another structure",
    needs="a masked-image target with a shadow",
)
def _draw_relaxations(lab):
    entries = _load(lab, "fig04_relaxations", "fig04_relaxations_early")
    stages = dict(reversed(_find_stages(entries).items()))  # the end of training first
    counts = [len(part) for part in stages.values()]
    fig, axes = plots.make_figure(
        len(stages), 3, height=0.34 * sum(counts) + 0.75 * len(stages) + 0.6, sharey="row",
        width_ratios=[1, 1, 0.7], height_ratios=counts,
    )  # fmt: skip
    tables, said = [], []
    for (left, middle, right), (epoch, part) in zip(axes, stages.items(), strict=True):
        part.sort(key=lambda e: (e.meta["knowledge"] != "partial", e.meta["knowledge"] != "shadow:PET"))
        auc, accuracy, reached = [], [], {}
        for e in part:
            facts = dict(label=_name_shadow(lab, e), knowledge=e.meta["knowledge"], epoch=epoch)
            auc += make_rows(e, controls=("untrained", "no-model"), **facts)
            accuracy += make_accuracy_rows(e, controls=("untrained", "no-model"), **facts)
            reached[facts["label"]] = e.metrics.balanced_accuracy
        auc, accuracy = pd.DataFrame(auc), pd.DataFrame(accuracy)
        plots.draw_intervals(left, auc, annotate="attack")
        left.set_xlim(*pick_limits(auc))
        left.set_title(f"after {epoch:,} epochs: score quality")
        plots.draw_intervals(middle, accuracy, annotate="attack", xlabel="balanced accuracy")
        middle.set_xlim(*pick_limits(accuracy))
        middle.set_title("with the threshold of ...")
        plots.draw_rates(right, accuracy[(accuracy["control"] == "") & accuracy["seed"].isna()])
        for ax in (left, middle):
            _thin_auc_ticks(ax)
        best, worst = max(reached, key=reached.get), min(reached, key=reached.get)
        ends = [plots.format_value(reached[name]) for name in (best, worst)]
        text = f"{ends[0]} with every threshold"
        if ends[0] != ends[1]:
            text = f"{ends[0]} ({best}) to {ends[1]} ({worst})"
        said.append(f"after {epoch:,} epochs AUC {format_auc(part[0])}, balanced accuracy {text}")
        tables += [auc.assign(measure="AUC"), accuracy.assign(measure="balanced accuracy")]
    plots.set_title(fig, "; ".join(said).replace("after", "After", 1))
    table = pd.concat(tables, ignore_index=True)
    plots.make_legend(fig, table, lines=False)
    first = ["epoch", "measure", "label"]
    return fig, table[[*first, *[c for c in table.columns if c not in first]]]


def _thin_auc_ticks(ax) -> None:
    """Few ticks, because three panels share the width."""
    low, high = ax.get_xlim()
    step = 0.25 if high - low > 0.35 else 0.1
    ticks = [k * step for k in range(round(1 / step) + 1) if low <= k * step <= high]
    ax.set_xticks(ticks, [plots.format_value(tick, 2 if step == 0.25 else 1) for tick in ticks])


def _name_shadow(lab: Any, entry: Entry) -> str:
    """Name a shadow by what it does not share with its target."""
    if entry.meta["knowledge"] == "partial":
        return "known members"
    difference = name_difference(lab.profile.row(entry.results[0].meta["shadow"]), _get_row(lab, entry))
    return difference or "the same kind"


@figure(
    "fig04_calibration",
    notebook="04_mim_attack",
    title="Difficulty calibration by a reference model",
    paper_item="MIM: difficulty calibration (after Shafran et al.)",
    needs="a masked-image target, its shadow and a reference row",
)
def _draw_calibration(lab):
    entries = _load(lab, "fig04_calibration", "fig04_calibration_early")
    rows, said = {"AUC": [], "TPR at 1 % FPR": [], "balanced accuracy": []}, []
    for epoch, part in _find_stages(entries).items():
        part.sort(key=_get_alpha)
        for e in part:
            label = f"epoch {epoch:,}: {_name_alpha(e)}"
            facts = dict(label=label, epoch=epoch, alpha=_get_alpha(e), reference=e.meta.get("reference"))
            rows["AUC"] += make_rows(e, controls=("untrained", "no-model"), **facts)
            rows["TPR at 1 % FPR"] += _make_rate_rows(e, **facts)
            if str(e.meta["knowledge"]).startswith("shadow"):
                rows["balanced accuracy"] += make_accuracy_rows(e, **facts)
        ends = ", ".join(f"{format_auc(e)} ({_name_alpha(e)})" for e in part)
        same = len(part) > 1 and all(overlap(part[0], e) for e in part[1:])
        said.append(f"after {epoch:,} epochs AUC {ends}" + (", intervals overlap" if same else ""))
    kept = [name for name, found in rows.items() if found]
    table = pd.concat([pd.DataFrame(found).assign(measure=m) for m, found in rows.items()], ignore_index=True)
    lines = list(dict.fromkeys(table["label"]))
    fig, axes = plots.make_figure(1, len(kept), height=0.3 * len(lines) + 1.0, sharey=True)
    for ax, name in zip(axes[0], kept, strict=True):
        part = table[table["measure"] == name]
        missing = pd.DataFrame({"label": [line for line in lines if line not in set(part["label"])]})
        part = pd.concat([part, missing], ignore_index=True)
        part = part.sort_values("label", key=lambda column: column.map(lines.index), kind="stable")
        chance = 0.01 if name.startswith("TPR") else 0.5
        xlabel = "balanced accuracy,\nthreshold from a shadow" if name == "balanced accuracy" else name
        plots.draw_intervals(ax, part, xlabel=xlabel, chance=chance, annotate="attack")
        ax.set_xlim(*(pick_limits(part) if chance == 0.5 else (-0.03, 1.03)))
        _thin_auc_ticks(ax)
    plots.set_title(fig, "; ".join(said).replace("after", "Calibration: after", 1))
    plots.make_legend(fig, table, lines=False)
    return fig, table[["measure", *[c for c in table.columns if c != "measure"]]]


def _get_alpha(entry: Entry) -> float:
    """Weight of the reference's distance; 0 without a reference."""
    return float(entry.get("alpha", 1.0)) if entry.meta.get("reference") else 0.0


def _name_alpha(entry: Entry) -> str:
    alpha = _get_alpha(entry)
    return f"α {_short(alpha)}" if alpha else "no reference"
