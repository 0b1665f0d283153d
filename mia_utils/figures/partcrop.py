"""Figures of notebooks 00 to 03: the first attack, the blind ladder, PartCrop and its ablations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mia_utils import plots
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
    load_entries,
    make_grid,
    make_panels,
    make_roc_rows,
    make_rows,
    name_arch,
    name_knowledge,
    pick_limits,
    say_interval,
    say_knowledge,
    say_leaks,
)

RUNGS = {
    "released-view": "released view: members cropped, strangers whole",
    "released-split": "official split: members train, strangers test",
    "frame-thirds": "frame-level attacker: near twins on both sides",
    "released-selection": "released selection: best epoch on the report set",
    "iid-frames": "frames drawn one by one",
    "controlled": "clean protocol: one pool, one query view",
}
_CONTROLS = ("no-model", "untrained", "permuted")
_CLEAN = ("controlled", "clean", "iid-frames")
_SCALE_ORDER = ("(.01, .03)", "(.08, .1)", "(.08, .2)", "(.08, .3)", "(.5, 1)")  # the paper's five, by size
_MLP_ORDER = ("narrow", "shallow", "base", "deep", "wide")
_WIDTHS = {
    (512, 256, 128): "base", (1024, 512, 256): "wide", (256, 128, 64): "narrow", (512, 256, 256, 128): "deep",
    (512, 128): "shallow",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ notebook 00


@figure(
    "fig00_roc", notebook="00_start_here", title="Scores and log-log ROC of the first attack", needs="the MAE target"
)
def _draw_first_roc(lab):
    entries = load_entries(lab, "fig00_roc", controls=("no-model", "untrained", "permuted"))
    entry = max(entries, key=lambda e: e.metrics.auc)
    first = entry.results[0]
    # folds have attackers of their own: their scores meet on one axis only relative to their thresholds
    bins = plots.count_scores(first.score - (0 if first.threshold is None else first.threshold), first.is_member)
    roc = pd.concat(make_roc_rows(entry, ("no-model", "untrained", "permuted")), ignore_index=True)
    fig, axes = plots.make_figure(1, 2, height=2.9)
    plots.draw_histograms(axes[0, 0], bins, xlabel="score above the attacker's threshold")
    axes[0, 0].set_title("scores of the attack")
    plots.draw_roc(axes[0, 1], roc, n_nonmembers=entry.metrics.n_nonmembers)
    at = entry.metrics.tpr_at.get(0.01)
    axes[0, 1].set_title(
        f"at 1 % false alarms it finds {100 * at.value:.0f} % of the members" if at else f"AUC {say_interval(entry)}"
    )
    blind = entry.controls.get("no-model")
    where = plots.label_of(entry.meta.get("method", ""))
    text = f"{plots.label_of(entry.meta['attack'])} on {where}: AUC {say_interval(entry)}"
    plots.set_title(fig, text + (f", without the model {format_auc(blind)}" if blind and blind.metrics else ""))
    plots.make_legend(fig, roc, seeds=True)
    table = pd.concat([bins.assign(panel="scores"), roc.assign(panel="roc")], ignore_index=True)
    return fig, table[["panel", *[c for c in table.columns if c != "panel"]]]


# ------------------------------------------------------------------------------------------------------ notebook 02


@figure(
    "fig02_blind_ladder",
    notebook="02_shadow_setup",
    title="The blind ladder: what an attacker knows who never sees the model",
    needs="a pool with its protocols",
)
def _draw_blind_ladder(lab):
    entries = [e for e in load_entries(lab, "fig02_blind_ladder", controls=()) if e.metrics is not None]
    several = len({e.meta.get("dataset") for e in entries}) > 1
    entries.sort(key=lambda e: (_get_rung(e) in _CLEAN, -e.metrics.auc))
    rows = []
    for e in entries:
        rung = _get_rung(e)
        label = RUNGS.get(rung, rung) + (f" ({e.meta.get('dataset')})" if several else "")
        rows += make_rows(e, label="\n".join(textwrap.wrap(label, 30)), rung=rung, flawed=rung not in _CLEAN)
    table = pd.DataFrame(rows)
    fig, axes = plots.make_figure(1, 1, height=0.42 * len(entries) + 0.95)
    plots.draw_ladder(axes[0, 0], table)
    flawed = [e for e in entries if _get_rung(e) not in _CLEAN]
    clean = [e for e in entries if _get_rung(e) == "controlled"]
    text = "No model is queried"
    if flawed:
        text += f", and yet: AUC {format_auc(flawed[0])} under the {_get_rung(flawed[0]).replace('-', ' ')} protocol"
    plots.set_title(fig, text + (f"; the clean protocol gives {say_interval(clean[-1])}" if clean else ""))
    table["label"] = table["label"].str.replace("\n", " ")
    return fig, table


def _get_rung(entry: Entry) -> str:
    return str(entry.get("rung") or entry.meta.get("protocol"))


# ------------------------------------------------------------------------------------------------------ notebook 03


@figure(
    "fig03_roc",
    notebook="03_partcrop",
    title="Log-log ROC per method with the three controls",
    paper_item="PartCrop, attack on several methods",
    needs="a target per method",
)
def _draw_roc(lab):
    entries = [e for e in load_entries(lab, "fig03_roc", controls=_CONTROLS) if e.metrics is not None]
    panels = make_panels(entries)
    tables = []
    for target, part in panels:
        for e in part:
            tables += make_roc_rows(e, _CONTROLS if e is part[0] else (), target=target)
    table = pd.concat(tables, ignore_index=True)
    fig, axes = make_grid(len(panels), height=2.35)
    for k, (ax, (target, part)) in enumerate(zip(axes, panels, strict=True)):
        below = any(other.get_subplotspec().colspan == ax.get_subplotspec().colspan for other in axes[k + 1 :])
        plots.draw_roc(
            ax,
            table[table["target"] == target],
            n_nonmembers=part[0].metrics.n_nonmembers,
            label_y=is_left(ax),
            label_x=not below,
        )
        gap = ": " if len(target) < 16 else ":\n"
        ax.set_title(f"{target}{gap}AUC {say_interval(part[0])}")
    plots.set_title(fig, say_leaks([part[0] for _, part in panels], [target for target, _ in panels]))
    plots.make_legend(fig, table, seeds=True)
    return fig, table


@figure(
    "fig03_table",
    notebook="03_partcrop",
    title="Attack table with controls: AUC and TPR at 1 % FPR",
    paper_item="PartCrop, attack tables",
    needs="a target per method",
)
def _draw_table(lab):
    entries = [e for e in load_entries(lab, "fig03_table", "fig03_roc", controls=_CONTROLS) if e.metrics is not None]
    panels = make_panels(entries)

    def name(entry: Entry, part: Sequence[Entry]) -> str:
        several = len({str(e.meta.get("knowledge")) for e in part}) > 1
        return plots.label_of(entry.meta["attack"]) + (f", {name_knowledge(entry)}" if several else "")

    fig, table = draw_table(panels, controls=_CONTROLS, name=name, row_height=0.19)
    plots.set_title(fig, say_leaks([part[0] for _, part in panels], [target for target, _ in panels]))
    return fig, table


@figure(
    "fig03_crop_number",
    notebook="03_partcrop",
    title="AUC over the number of part crops",
    paper_item="PartCrop, ablation: crop number",
)
def _draw_crop_number(lab):
    return draw_sweep(
        lab, "fig03_crop_number", of="n_crops", xlabel="part crops per image", log=True, say="with {} crops"
    )


def _name_scale(entry: Entry) -> str | None:
    scale = entry.get("crop_scale")
    return None if scale is None else "({}, {})".format(*(f"{float(v):g}".replace("0.", ".", 1) for v in scale))


@figure(
    "fig03_crop_scale",
    notebook="03_partcrop",
    title="AUC by range of part sizes",
    paper_item="PartCrop, ablation: crop scale",
)
def _draw_crop_scale(lab):
    return draw_choice(lab, "fig03_crop_scale", _name_scale, say="crop scale", order=_SCALE_ORDER)


@figure(
    "fig03_feature_kind",
    notebook="03_partcrop",
    title="Uniform, Gaussian or both energies",
    paper_item="PartCrop, ablation: feature kind",
)
def _draw_feature_kind(lab):
    return draw_choice(
        lab, "fig03_feature_kind", lambda e: e.get("kind"), say="feature kind", order=("uniform", "gaussian", "both")
    )


@figure(
    "fig03_pooling",
    notebook="03_partcrop",
    title="Class token or mean of the tokens as part vector",
    paper_item="PartCrop: released code against the paper's text",
)
def _draw_pooling(lab):
    return draw_choice(lab, "fig03_pooling", lambda e: e.get("pooling"), say="pooling", order=("cls", "mean", "auto"))


def _name_mlp(entry: Entry) -> str | None:
    widths = entry.get("widths")
    widths = [512, 256, 128] if widths is None else widths  # the attacker's default
    version = entry.get("version") or ("v2" if entry.meta["attack"].endswith("-v2") else "v1")
    name = (
        _WIDTHS.get(tuple(int(w) for w in widths), "-".join(map(str, widths)))
        if not isinstance(widths, str)
        else widths
    )
    return f"{name} {version}"


@figure(
    "fig03_mlp",
    notebook="03_partcrop",
    title="Attacker network: five widths, v1 against v2",
    paper_item="PartCrop, ablation: attacker MLP; PartCrop-v2",
)
def _draw_mlp(lab):
    return draw_choice(
        lab, "fig03_mlp", _name_mlp, say="attacker", order=[f"{w} {v}" for w in _MLP_ORDER for v in ("v1", "v2")]
    )


@figure("fig03_known_share", notebook="03_partcrop", title="AUC over the share of members the attacker knows")
def _draw_known_share(lab):
    return draw_sweep(
        lab, "fig03_known_share", of="known_share", xlabel="share of images known", say="with a share of {} known"
    )


@figure(
    "fig03_knowledge",
    notebook="03_partcrop",
    title="Partial, shadow and cross knowledge side by side",
    paper_item="PartCrop: partial and shadow setting",
    needs="a target and a shadow per method",
)
def _draw_knowledge(lab):
    return draw_choice(
        lab, "fig03_knowledge", name_knowledge, say=say_knowledge, order=("partial", "shadow, same method")
    )


@figure(
    "fig03_transfer",
    notebook="03_partcrop",
    title="Transfer matrix: attacker fit on method A's shadow, tested on B",
    paper_item="PartCrop: one attack when the recipe is unknown",
    needs="a target and a shadow for at least two methods",
)
def _draw_transfer(lab):
    entries = [
        e
        for e in load_entries(lab, "fig03_transfer", controls=("no-model",))
        if e.metrics is not None and e.meta.get("shadow_method")
    ]
    if not entries:
        raise NotAvailable(
            "fig03_transfer: no result with shadow knowledge; it needs a target and a shadow for at least two methods"
        )
    used = {e.meta["method"] for e in entries} | {e.meta["shadow_method"] for e in entries}
    order = sorted(used, key=lambda m: (list(plots.METHOD_MARKERS) + [m]).index(m))
    entries.sort(key=lambda e: (order.index(e.meta["shadow_method"]), order.index(e.meta["method"])))
    rows = [
        r
        for e in entries
        for r in make_rows(e, row=plots.label_of(e.meta["shadow_method"]), column=plots.label_of(e.meta["method"]))
    ]
    # no model is asked, so one such row serves all targets on the same split
    by_split = {e.meta.get("split"): e for e in entries if "no-model" in e.controls and e.controls["no-model"].metrics}
    blind = {e.meta["method"]: by_split[e.meta.get("split")] for e in entries if e.meta.get("split") in by_split}
    for method in order:
        if method in blind:
            rows += [
                r
                for r in make_rows(blind[method], controls=("no-model",), row="no model", column=plots.label_of(method))
                if r["control"]
            ]
    table = pd.DataFrame(rows)
    n_rows, n_cols = table["row"].nunique(), table["column"].nunique()
    fig, axes = plots.make_figure(
        1, 1, width=plots.HALF if n_cols <= 3 else min(plots.FULL, 1.3 + 0.95 * n_cols), height=0.52 * n_rows + 1.2
    )
    plots.draw_matrix(
        axes[0, 0],
        table,
        xlabel="target trained with",
        ylabel="attacker fit on the shadow of",
        n_head=n_rows - 1 if blind else None,
    )
    same = [e.metrics.auc for e in entries if e.meta["method"] == e.meta["shadow_method"]]
    cross = [e.metrics.auc for e in entries if e.meta["method"] != e.meta["shadow_method"]]
    parts = [
        f"{what} {plots.format_value(float(np.mean(v)))}"
        for what, v in (("the same method", same), ("another method", cross))
        if v
    ]
    text = "Mean AUC with a shadow of " + ", of ".join(parts)
    lowest = min(entries, key=lambda e: e.metrics.auc)
    if lowest.metrics.auc_high < 0.5:  # it sees the members and takes them for strangers
        shadow, target = (plots.label_of(lowest.meta[key]) for key in ("shadow_method", "method"))
        text += f"; from {shadow} to {target} the ranking turns around ({plots.format_value(lowest.metrics.auc)})"
    plots.set_title(fig, text)
    return fig, table


@figure(
    "fig03_arch",
    notebook="03_partcrop",
    title="ViT, ResNet and Swin",
    paper_item="PartCrop: several structures",
    needs="targets of several structures",
)
def _draw_arch(lab):
    entries = [e for e in load_entries(lab, "fig03_arch") if e.metrics is not None]
    several = len({e.meta.get("method") for e in entries}) > 1
    target = "several methods" if several else plots.label_of(entries[0].meta.get("method", ""))
    rows = []
    for e in entries:
        label = name_arch(e) + (f", {plots.label_of(e.meta.get('method', ''))}" if several else "")
        rows += make_rows(e, controls=("untrained", "no-model"), target=target, label=label)
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    plots.set_title(fig, say_leaks(entries, list(dict.fromkeys(table["label"]))))
    plots.make_legend(fig, table, lines=False)
    return fig, table


@figure(
    "fig03_datasets",
    notebook="03_partcrop",
    title="One recipe on several data sets",
    paper_item="PartCrop: several data sets",
    needs="a target on another data set (rows of study data)",
)
def _draw_datasets(lab):
    entries = [e for e in load_entries(lab, "fig03_datasets") if e.metrics is not None]
    rows = []
    for e in entries:
        label = str(e.meta.get("dataset"))
        rows += make_rows(e, controls=("untrained", "no-model"), target=plots.label_of(e.meta["method"]), label=label)
    table = pd.DataFrame(rows)
    fig = draw_choices(table)
    plots.set_title(fig, say_leaks(entries, list(table["label"].unique())))
    plots.make_legend(fig, table, lines=False)
    return fig, table


@figure(
    "fig03_released",
    notebook="03_partcrop",
    title="The same attack under the released preprocessing",
    paper_item="PartCrop, released mia_util.py",
    needs="a target evaluated under both protocols",
)
def _draw_released(lab):
    entries = [e for e in load_entries(lab, "fig03_released") if e.metrics is not None]
    protocols = [p for p in ("controlled", "released-view") if any(e.meta.get("protocol") == p for e in entries)]
    if len(protocols) < 2:
        raise NotAvailable("fig03_released: needs results of both protocols, controlled and released-view")
    names = {"controlled": "one view for all", "released-view": "released view"}
    panels = make_panels(entries)
    rows = []
    for target, part in panels:
        for control in ("", "untrained", "no-model"):
            for protocol in protocols:
                for e in part:
                    if e.meta.get("protocol") != protocol:
                        continue
                    head = "attack on the model" if not control else plots.label_of(control)
                    label = f"{head}: {names[protocol]}"
                    kept = [
                        r
                        for r in make_rows(
                            e, controls=(control,) if control else (), target=target, label=label, protocol=protocol
                        )
                        if r["control"] == control
                    ]
                    rows += kept
    table = pd.DataFrame(rows)
    n_lines = table.groupby("target")["label"].nunique().max()
    fig, axes = make_grid(len(panels), most=2, height=0.22 * n_lines + 0.6, sharey=len(panels) > 1)
    for ax, (target, _) in zip(axes, panels, strict=True):
        plots.draw_intervals(ax, table[table["target"] == target].drop(columns="target"))
        ax.set_title(target)
        low, high = pick_limits(table)
        ax.set_xlim(low, high)
    blind = {}
    for e in entries:
        twin = e.controls.get("no-model")
        if twin is not None and twin.metrics is not None:
            blind.setdefault(e.meta.get("protocol"), format_auc(twin))
    text = "The same attack under the released preprocessing"
    if set(protocols) <= set(blind):
        text = f"With the released preprocessing an attacker without any model reaches AUC {blind['released-view']}"
        text += f"; with one view for all images {blind['controlled']}"
    plots.set_title(fig, text)
    return fig, table


@figure(
    "fig03_epochs",
    notebook="03_partcrop",
    title="AUC along training",
    paper_item="PartCrop, defense: early stop",
    needs="targets with checkpoints along training",
)
def _draw_epochs(lab):
    return draw_sweep(lab, "fig03_epochs", of="epoch", xlabel="training epoch", log=True, say="after epoch {}")


@figure(
    "fig03_response_curves",
    notebook="03_partcrop",
    title="Part-response curves of members and strangers",
    paper_item="PartCrop Figure 2",
    from_table=True,
)
def _draw_response_curves(table):
    """Table: ``method, group, x, value, low, high`` (group: member or stranger), optionally ``feature``."""
    column = "feature" if "feature" in table and table["feature"].nunique() > 1 else None
    keys = list(dict.fromkeys(zip(table["method"], table[column] if column else [""] * len(table), strict=True)))
    fig, axes = make_grid(len(keys), most=3 if len(keys) != 4 else 2, height=2.1)
    gaps = []
    for k, (ax, (method, feature)) in enumerate(zip(axes, keys, strict=True)):
        part = table[(table["method"] == method) & ((table[column] == feature) if column else True)]
        plots.draw_part_curves(
            ax, part, legend=k == 0, ylabel="response" if k % 3 == 0 else "", xlabel="token, sorted by response"
        )
        ax.set_title(plots.label_of(method) + (f", {feature}" if feature else ""))
        wide = part.pivot_table(index="x", columns="group", values=["value", "low", "high"])
        apart = (wide["low"]["member"] > wide["high"]["stranger"]) | (wide["high"]["member"] < wide["low"]["stranger"])
        gaps.append((float(apart.mean()), plots.label_of(method)))
    yes, no = [n for g, n in gaps if g >= 0.5], [n for g, n in gaps if g < 0.5]
    text = (
        f"Parts of members and strangers answer differently on {join_words(yes)}"
        if yes
        else "Part responses of members and strangers are not shown to differ"
    )
    plots.set_title(
        fig,
        text
        + (
            f"; not shown on {join_words([n for n in no if n not in yes])}"
            if yes and [n for n in no if n not in yes]
            else ""
        ),
    )
    return fig, table


@figure("fig01_losses", notebook="01_pretrain", title="Training loss on members and strangers", from_table=True)
def _draw_losses(table):
    """Table: ``method, epoch, loss_members, loss_heldout``."""
    methods = list(dict.fromkeys(table["method"]))
    fig, axes = make_grid(len(methods), height=2.0)
    gaps = {}
    for k, (ax, method) in enumerate(zip(axes, methods, strict=True)):
        part = table[table["method"] == method].sort_values("epoch", kind="stable")
        plots.draw_losses(ax, part, legend=k == 0, ylabel="loss" if k % 3 == 0 else "")
        ax.set_title(plots.label_of(method))
        last = part.dropna(subset=["loss_members", "loss_heldout"]).iloc[-1]
        gaps[method] = 100 * (last["loss_heldout"] / last["loss_members"] - 1)
    widest = max(gaps, key=gaps.get)
    ratio = 1 + gaps[widest] / 100
    times = f"{gaps[widest]:.0f} % above" if ratio < 2 else f"{ratio:.0f} times" if ratio < 100 else "over 100 times"
    text = f"At the end of training the loss of strangers is {times} that of members"
    plots.set_title(fig, text + (f" for {plots.label_of(widest)}, the widest gap" if len(gaps) > 1 else ""))
    return fig, table
