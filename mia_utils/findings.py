"""The README's findings, one function each: what an attack finds, its controls, and what has to be said beside it.

Every function takes rows over all seeds of ``lab.results`` and returns a sentence, empty where the rows are not there.
"""

import functools
from collections.abc import Callable
from typing import Any

import pandas as pd

from mia_utils import course, say
from mia_utils.plots.style import WORDS, format_interval, format_value, label_of

USEFUL = 0.1  # gain in utility over the untrained encoder from which an encoder is called worth using


def say_all(results: pd.DataFrame, gap: Callable[[Any, Any], Any] | None = None) -> str:
    """Return the findings as a list in Markdown; all numbers from the table, ``gap`` as for :func:`say.versus`."""
    rows = results[results["seed"].isna()]
    found = [finding(rows) for finding in (most, useful, functools.partial(parts, gap=gap), reference, defenses, blind)]
    return "\n".join(f"- {text}" for text in found if text)


def most(rows: pd.DataFrame) -> str:
    """Say which main row has the highest AUC."""
    main = _undefended(rows, "main")
    return _describe("What leaks most?", main.loc[main["auc"].idxmax()], rows) if len(main) else ""


def useful(rows: pd.DataFrame) -> str:
    """Say what leaks most among the encoders that learned something; beside it the same recipe on more images."""
    held = _undefended(rows, "main", "own")
    held = held[held["utility"] - held["utility_untrained"] >= USEFUL]
    main = held[held["study"] == "main"]
    if main.empty:
        return ""
    a = main.loc[main["auc"].idxmax()]
    same = held[(held["attack"] == a["attack"]) & (held["augmentation"] == a["augmentation"])]
    more = same[(same["n_train"] > a["n_train"]) & (same["checkpoint"] == same["epochs"])]
    beside = [
        f"{label_of(r['method'])} on {r['n_train']:,.0f}, {r['epochs']:,.0f} epochs: {_say_auc(r)}, "
        f"utility {format_value(r['utility'])}"
        for _, r in more.iterrows()
    ]
    return _describe("Does an encoder leak that is worth using?", a, rows, beside)


def parts(rows: pd.DataFrame, gap: Callable[[Any, Any], Any] | None = None) -> str:
    """Say whether an image's own parts are better probes of PartCrop than random vectors."""
    rows = rows[rows["study"].isin(["probes", "tokens"]) & (rows["control"] == "")]
    if not (rows["method"] == "mae").any():
        return ""
    probe = rows["probes"].fillna("parts").where(rows["attack"] == "partcrop", "spread")
    rows = rows.assign(probe=probe)[rows["attack"] != "token-spread-lr"]
    probed = rows[rows["study"] == "probes"].sort_values("checkpoint", kind="stable")
    room = probed[probed["method"] == "mae"].drop_duplicates("probe")  # the earliest, where the AUC has room
    ends = {r["probe"]: _interval(r) for _, r in room.iterrows()}
    few = {r["probe"]: _interval(r) for _, r in rows[rows["arch"].str.contains("patch4")].iterrows()}
    pair = ("probe == 'random'", "probe == 'parts'", ("Random vectors", "own parts"))
    other = say.versus(probed[probed["method"] == "simclr"], *pair, gap=gap)
    text = say.versus(room, *pair, gap=gap)
    text = f"**Does PartCrop read parts?** {text} (MAE, {room['checkpoint'].iloc[0]:,.0f} epochs, trainings: "
    late = probed[(probed["method"] == "mae") & (probed["probe"] == "other-image")].iloc[-1]
    text += f"{room['n_seeds'].min()}). *Control*: another image's tokens {ends['other-image']}, "
    text += f"{format_value(late['auc'])} after {late['checkpoint']:,.0f}. "
    text += f"*Beside it*: token spread, *one* query, {ends['spread']}."
    text += f" 64 tokens: random {few['random']}, own parts {few['parts']}." if few else ""
    return text + (f" SimCLR: {other[0].lower()}{other[1:]}." if "AUC" in other else "")


def reference(rows: pd.DataFrame) -> str:
    """Say what a reference model adds at the end of each schedule, on the encoders that saw most images."""
    rare = rows.query("study == 'rates' and control == '' and augmentation == 'none'")
    rare = rare[rare["epochs"] == rare["epochs"].max()].sort_values("reference", na_position="last")
    ends = rows[(rows["checkpoint"] == rows["epochs"]) & rows["attack"].isin(["mim", "encodermi-t"])]
    grid, alike = ends[ends["study"] == "grid"], ends[(ends["study"] == "images") & (ends["control"] == "")]
    said, grid = [], grid[grid["n_train"] == grid.groupby("epochs")["n_train"].transform("max")]
    for (epochs, n), trained in grid.groupby(["epochs", "n_train"]):
        parts = trained[trained["control"] == ""].groupby("augmentation", sort=False)
        pairs = [f"{WORDS[how]} {both}" for how, part in parts if (both := _say_both(part))]
        said += [f"{n:,.0f} images, {epochs:,.0f} epochs: {'; '.join(pairs)}."] if pairs else []
    if not said:
        return ""
    if len(rare) == 2:
        said.append(f"TPR at .1 % FPR there: whole images {', '.join(map(format_value, rare['tpr_at_01']))}.")
    for (n, epochs), part in [*alike.groupby(["n_train", "epochs"])][::-1]:
        if both := _say_both(part):
            who = f"{label_of(part['attack'].iloc[0])} on {label_of(part['method'].iloc[0])}"
            said.append(f"{who}, {n:,.0f} images, {epochs:,.0f} epochs: {both}.")
            break
    text = "**What does a reference model find?** MIM attack on MAE, AUC with one, without, and utility. "
    return f"{text}{' '.join(said)} *Control*: no model {_say_blind(grid)}."


def defenses(rows: pd.DataFrame) -> str:
    """Say what defenses leave of leak and utility where there was utility to lose."""
    rows, said = rows[rows["study"] == "valuable"], []
    own = rows[(rows["control"] == "") & (rows["reference"].notna() | (rows["attack"] != "mim"))]
    if own.empty:
        return ""
    for (attack, method), part in own.groupby(["attack", "method"], sort=False):
        name = f"{label_of(method)}, {label_of(attack)}{' with a reference' if attack == 'mim' else ''}"
        prices = [_say_price(r) for _, r in part.sort_values("auc", ascending=False).iterrows()]
        age = f"{part['epochs'].max():,.0f} epochs, untrained {format_value(part['utility_untrained'].mean())}"
        said.append(f"{name} ({age}): {'; '.join(prices)}.")
    text = f"**What protects a useful encoder?** AUC and utility, {own['n_train'].max():,.0f} images, one training "
    return f"{text}unless said. {' '.join(said)} *Control*: no model {_say_blind(rows)}."


def blind(rows: pd.DataFrame) -> str:
    """Say how far an attacker comes who never asks the model, under released views and under one view for all."""
    auc = rows[(rows["study"] == "baselines") & (rows["dataset"] == "cifar10")].set_index("protocol")["auc"]
    if not {"released-view", "controlled"} <= set(auc.index):
        return ""
    flawed, clean = (format_value(auc[protocol]) for protocol in ("released-view", "controlled"))
    return (
        f"**How far without any model?** To AUC {flawed} with members cropped and non-members whole, as in released "
        f"code; *control*: {clean} with one view for all. *Not said*: that published attacks find nothing."
    )


def _undefended(rows: pd.DataFrame, *studies: str) -> pd.DataFrame:
    """Rows of attackers who know some members, on targets without a defense."""
    own = rows[rows["study"].isin(studies) & (rows["control"] == "") & (rows["defense"] == "none")]
    return own[own["knowledge"] == "partial"]


def _describe(question: str, a: pd.Series, rows: pd.DataFrame, beside: list[str] = ()) -> str:
    """Say a row, the controls of the same attacker on the same target, and what stands beside it."""
    facts = ["study", "attack", "target", "checkpoint", "knowledge", "decoder", "defense"]
    same = rows[(rows[facts].fillna("") == a[facts].fillna("")).all(axis=1) & (rows["control"] != "")]
    same = same[(same["control"] != "permuted") | ~same["attack"].isin(course.UNTRAINED)].drop_duplicates("control")
    controls = ", ".join(f"{label_of(c['control'])} {format_value(c['auc'])}" for _, c in same.iterrows())
    n = int(a["n_seeds"])
    how = f"{a['n_train']:,.0f} images, {a['epochs']:,.0f} epochs, {n} training{'s' * (n > 1)}"
    worth = f"utility {format_value(a['utility'])}, untrained {format_value(a['utility_untrained'])}"
    return (
        f"**{question}** {label_of(a['attack'])} on {label_of(a['method'])} ({how}): {_say_auc(a)}; TPR at 1 % FPR "
        f"{format_value(a['tpr_at_1'])}. *Controls*: {controls}. *Beside it*: {'; '.join([worth, *beside])}."
    )


def _interval(row: Any) -> str:
    return format_interval(row["auc"], row["auc_low"], row["auc_high"])


def _say_both(rows: pd.DataFrame) -> str:
    """Say the AUC with a reference, without, and the utility; empty where one of both is not there."""
    own = rows.drop_duplicates("reference").sort_values("reference", na_position="last")
    if len(own) != 2:
        return ""
    return ", ".join([*map(_interval, own.to_dict("records")), format_value(own["utility"].mean())])


def _say_auc(row: Any) -> str:
    return f"AUC {_interval(row)}, {row['verdict']}"


def _say_blind(rows: pd.DataFrame) -> str:
    return format_value(rows.loc[rows["control"] == "no-model", "auc"].max())


def _say_price(row: Any) -> str:
    how = f"{label_of(row['defense'])} {row['strength']}".removesuffix(".0")
    how = WORDS[row["augmentation"]].removesuffix(" and color") if row["defense"] == "none" else how
    facts = [row["verdict"]] * (row["verdict"] != "shown") + [f"{row['n_seeds']} trainings"] * (row["n_seeds"] > 1)
    beside = f" ({', '.join(facts)})" if facts else ""
    return f"{how} {_interval(row)}{beside}, {format_value(row['utility'])}"
