"""Sentences that a run can refute, computed from the rows that are drawn: titles, and answers to what was expected.

Titles have at most 90 characters and two numbers. All of them, and every *Here:* line, use the verdict of the one rule
(:mod:`mia_utils.protocol.intervals`), which each row of ``lab.results`` carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mia_utils.plots.style import format_value, label_of


def attacks(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of attacks over all seeds: no controls, no single seeds."""
    return table[(table["control"].fillna("") == "") & table["seed"].isna()]


def join(words: Iterable[str]) -> str:
    """``a, b and c``."""
    words = list(dict.fromkeys(map(str, words)))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _auc(row: Any) -> str:
    return format_value(row["auc"])


def _apart(one: Any, other: Any) -> bool:
    return one["auc_low"] > other["auc_high"] or other["auc_low"] > one["auc_high"]


# ------------------------------------------------------------------------------------------------------------ titles


def shown(table: pd.DataFrame, by: str = "method", subject: str = "") -> str:
    """On which of several targets an attack is shown: ``PartCrop finds members of MAE and SimCLR, not of DINO``."""
    own = attacks(table)
    subject = subject or join(label_of(a) for a in own["attack"])
    names = own.groupby(by, sort=False)["verdict"].agg(lambda v: (v == "shown").any())
    yes, no = ([label_of(n) for n in names.index[names == want]] for want in (True, False))
    if not yes:
        return (
            f"{subject}: no leak shown on {join(no)}"
            if len(join(no)) < 45
            else f"{subject}: no leak shown on any of {len(no)}"
        )
    if len(join(yes + no)) > 48:
        return f"{subject}: leaks shown on {len(yes)} of {len(names)} targets"
    verb = "find" if " and " in subject else "finds"
    return f"{subject} {verb} members of {join(yes)}" + (f", not of {join(no)}" if no else "")


def best(table: pd.DataFrame, by: str = "attack") -> str:
    """Which line is ahead, if any: ``MIM attack is ahead: AUC .98; next PartCrop .88``."""
    own = attacks(table).sort_values("auc", ascending=False)
    first = own.iloc[0]
    rest = own[own[by] != first[by]]
    if first["verdict"] != "shown":
        return f"No leak shown: {label_of(first[by])} comes to AUC {_auc(first)}"
    if rest.empty:
        return f"{label_of(first[by])} finds members: AUC {_auc(first)}"
    second = rest.iloc[0]
    if _apart(first, second):
        return f"{label_of(first[by])} is ahead: AUC {_auc(first)}; next {label_of(second[by])} {_auc(second)}"
    return f"{label_of(first[by])} and {label_of(second[by])} lead together: AUC {_auc(first)} and {_auc(second)}"


def found(table: pd.DataFrame, by: str = "method") -> str:
    """How many members are found at the lowest false positive rate that can be measured, best and worst of ``by``."""
    own = attacks(table)
    rate = next((n for n in (1, 10) if f"tpr_at_{n}" in own and own[f"tpr_at_{n}"].notna().any()), 0)
    if not rate:
        return "Too few non-members to say how many members are found at a low false positive rate"
    name = f"tpr_at_{rate}"
    top, low = own.loc[own[name].idxmax()], own.loc[own[name].idxmin()]
    first = f"At {rate} % FPR {format_value(top[name])} of {label_of(top[by])}'s members are found"
    return first if top[by] == low[by] else f"{first}, {format_value(low[name])} of {label_of(low[by])}'s"


def plateau(table: pd.DataFrame, x: str, unit: str = "", more: str = "") -> str:
    """From which value of a sweep on nothing is gained: ``One mask is enough: AUC .97, 64 give .98``."""
    own = attacks(table).sort_values(x)
    top = own.loc[own["auc"].idxmax()]
    enough = own[[not _apart(row, top) for row in own.to_dict("records")]].iloc[0]
    last = own.iloc[-1]
    unit, count = unit or x.removeprefix("n_"), lambda row: f"{row[x]:,g}"
    if top["verdict"] != "shown":
        return f"No leak shown at any number of {unit}: AUC {_auc(own.iloc[0])} to {_auc(last)}"
    if enough[x] == own[x].iloc[0]:
        single = unit.removesuffix("es" if unit.endswith("ches") else "s")
        few = f"One {single} does" if enough[x] == 1 else f"{count(enough)} {unit} do"
        return f"{few} as well as {count(last)}: AUC {_auc(enough)} and {_auc(last)}"
    if enough[x] == last[x]:
        return f"More {unit} still help at {count(last)}: AUC {_auc(own.iloc[0])} to {_auc(last)}"
    return f"{count(enough)} {unit} are enough: AUC {_auc(enough)}; {count(last)} give {_auc(last)}"


def span(table: pd.DataFrame, by: str, what: str = "") -> str:
    """The two ends of a choice: ``Own parts .96, another image's tokens .55``; says where intervals overlap."""
    own = attacks(table)
    top, low = own.loc[own["auc"].idxmax()], own.loc[own["auc"].idxmin()]
    lead = f"{what}: " if what else ""
    if not _apart(top, low):
        none = "no choice is clearly better" if lead else "No choice is clearly better"
        return f"{lead}{none}: AUC {_auc(low)} to {_auc(top)}"
    return f"{lead}AUC {_auc(top)} with {label_of(top[by])}, {_auc(low)} with {label_of(low[by])}"


def versus(table: pd.DataFrame, one: str, other: str, names: tuple[str, str]) -> str:
    """Compare the mean rows of two queries: ``Own parts beat random vectors: AUC .96 against .55``, or neither."""
    ends = ["auc", "auc_low", "auc_high"]
    first, second = (attacks(table).query(query)[ends].mean() for query in (one, other))
    if pd.isna(first["auc"]) or pd.isna(second["auc"]):
        return f"{names[0]} against {names[1]}: not both in this profile"
    if not _apart(first, second):
        return f"{names[0]} and {names[1]} do equally well: AUC {_auc(first)} and {_auc(second)}"
    if first["auc"] < second["auc"]:
        first, second, names = second, first, names[::-1]
    said = f"{names[0]} beat {names[1]}: AUC {_auc(first)} against {_auc(second)}"
    return said[0].upper() + said[1:]


def grows(table: pd.DataFrame, x: str = "checkpoint", unit: str = "epochs", subject: str = "") -> str:
    """From which value on a leak is shown: ``MAE leaks from 150 epochs on; AUC .98 after 2,500``."""
    own = attacks(table).sort_values(x)
    found = own[own["verdict"] == "shown"]
    last = own.iloc[-1]
    if found.empty:
        said = f"No leak shown up to {last[x]:,g} {unit}: AUC {_auc(last)}"
    else:
        said = f"Leaks shown from {found[x].iloc[0]:,g} {unit} on; AUC {_auc(last)} at {last[x]:,g}"
    return f"{subject}: {said[0].lower()}{said[1:]}" if subject else said


def transfer(table: pd.DataFrame, row: str = "shadow_method", column: str = "method") -> str:
    """Mean AUC where shadow and target agree, and where they do not."""
    own = attacks(table)
    same = own[row] == own[column]
    if not same.any() or same.all():
        return best(table, by=row)
    on, off = own.loc[same, "auc"].mean(), own.loc[~same, "auc"].mean()
    verdict = "The attack transfers" if off > 0.5 + (on - 0.5) / 2 else "The attack does not transfer"
    return f"{verdict}: mean AUC {format_value(on)} from its own kind of shadow, {format_value(off)} from others"


# ------------------------------------------------------------------------------------------------------ expectations


@dataclass(frozen=True)
class Expectation:
    """What the theory predicts, and how the run answers; made by the functions below.

    Attributes:
        text: the prediction in words.
        judge: table -> ("met" | "not met" | "intervals overlap" | "can't be said", what was seen).
    """

    text: str
    judge: Callable[[pd.DataFrame], tuple[str, str]]

    def answer(self, table: pd.DataFrame) -> str:
        """Return the *Here:* line: ``"more masks, less noise": met, .74 with 1 and .98 with 64``."""
        table = table.rename(columns={"value": "auc", "low": "auc_low", "high": "auc_high"})
        try:
            word, seen = self.judge(table)
        except (KeyError, IndexError, ValueError):
            word, seen = "can't be said", "this profile has no such rows"
        return f"“{self.text}”: {word}" + (f"; {seen}" if seen else "")


def rises(text: str, *, by: str = "x", falls: bool = False, query: str = "") -> Expectation:
    """Expect the AUC at the largest value of ``by`` above that at the smallest (``falls``: below) in a query."""

    def judge(table: pd.DataFrame) -> tuple[str, str]:
        own = attacks(table.query(query) if query else table).sort_values(by, kind="stable")
        first, last = own.iloc[0], own.iloc[-1]
        seen = f"AUC {_auc(first)} at {first[by]:,g} and {_auc(last)} at {last[by]:,g}"
        seen += ", all at the ceiling" if own["auc"].min() > 0.95 else ""  # where no setting can show its worth
        if not _apart(first, last):
            return "intervals overlap", seen
        return ("met" if (last["auc"] > first["auc"]) != falls else "not met"), seen

    return Expectation(text, judge)


def above(text: str, high: str, low: str) -> Expectation:
    """Expect the rows of query ``high`` above those of query ``low`` (their means, by their intervals)."""

    def judge(table: pd.DataFrame) -> tuple[str, str]:
        table = table[table["seed"].isna()]
        one, other = (table.query(q)[["auc", "auc_low", "auc_high"]].mean() for q in (high, low))
        if pd.isna(one["auc"]) or pd.isna(other["auc"]):
            return "can't be said", "this profile has no such rows"
        seen = f"AUC {_auc(one)} against {_auc(other)}"
        if not _apart(one, other):
            return "intervals overlap", seen
        return ("met" if one["auc"] > other["auc"] else "not met"), seen

    return Expectation(text, judge)


def all_shown(text: str, query: str = "") -> Expectation:
    """Expect a leak shown in every row (of a query)."""
    return _count(text, query, "shown", every=True)


def none_shown(text: str, query: str = "") -> Expectation:
    """Expect no leak shown in any row (of a query; controls are rows too where the query names them)."""
    return _count(text, query, "shown", every=False)


def _count(text: str, query: str, verdict: str, *, every: bool) -> Expectation:
    def judge(table: pd.DataFrame) -> tuple[str, str]:
        own = table[table["seed"].isna()].query(query) if query else attacks(table)
        if own.empty:
            return "can't be said", "this profile has no such rows"
        n = int((own["verdict"] == verdict).sum())
        met = n == len(own) if every else n == 0
        return ("met" if met else "not met"), f"{verdict} in {n} of {len(own)}"

    return Expectation(text, judge)


def holds(
    text: str, test: Callable[[pd.DataFrame], bool], seen: Callable[[pd.DataFrame], str] = lambda table: ""
) -> Expectation:
    """Expect what a function of the drawn table finds true; ``seen`` says the numbers."""
    return Expectation(text, lambda table: ("met" if test(table) else "not met", seen(table)))
