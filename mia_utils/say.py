"""Sentences that a run can refute, computed from the rows that are drawn: titles, and answers to what was expected.

Titles have at most 90 characters and two numbers. All of them, and every *Here:* line, use the verdict of the one rule
(:mod:`mia_utils.protocol.intervals`), which each row of ``lab.results`` carries.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mia_utils.plots.style import format_interval, format_value, label_of
from mia_utils.protocol.metrics import RATES


def attacks(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of attacks over all seeds: no controls, no single seeds."""
    return table[(table["control"].fillna("") == "") & table["seed"].isna()]


def join(words: Iterable[str]) -> str:
    """``a, b and c``."""
    words = list(dict.fromkeys(map(str, words)))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _auc(row: Any) -> str:
    return format_value(row["auc"])


def _compare(one: Any, other: Any) -> int:
    """1 if the first AUC is above the second, -1 if below, 0 where their intervals overlap."""
    return int(one["auc_low"] > other["auc_high"]) - int(other["auc_low"] > one["auc_high"])


def _compare_rows(rows: list[pd.DataFrame], gap: Callable[[Any, Any], Any] | None) -> tuple[int, str]:
    """The same of their means, or by the paired difference of two single rows, which is then said."""
    if gap is None or [len(part) for part in rows] != [1, 1]:
        return _compare(*map(_average, rows)), ""
    value, low, high = gap(*(part.iloc[0] for part in rows))
    return int(low > 0) - int(high < 0), f"; paired difference {format_interval(value, low, high)}"


def _average(table: pd.DataFrame) -> pd.Series:
    return table[["auc", "auc_low", "auc_high"]].mean()


def shown(table: pd.DataFrame, by: str = "method", subject: str = "") -> str:
    """On which of several targets an attack is shown: ``PartCrop finds members of MAE and SimCLR, not of DINO``."""
    own = attacks(table)
    subject = subject or join(label_of(a) for a in own["attack"])
    names = own.groupby(by, sort=False)["verdict"].agg(lambda v: (v == "shown").any())
    yes, no = ([label_of(n) for n in names.index[names == want]] for want in (True, False))
    if not yes:
        return f"{subject}: no leak shown on " + (join(no) if len(join(no)) < 45 else f"any of {len(no)}")
    if len(join(yes + no)) > 48:
        return f"{subject}: leaks shown on {len(yes)} of {len(names)} targets"
    verb = "find" if " and " in subject else "finds"
    return f"{subject} {verb} members of {join(yes)}" + (f", not of {join(no)}" if no else "")


def best(table: pd.DataFrame, by: str = "attack") -> str:
    """Which line is ahead, if any: ``MIM attack is ahead: AUC .98; next PartCrop .88``."""
    own = attacks(table).sort_values("auc", ascending=False).drop_duplicates(by)
    first, second = own.iloc[0], own.iloc[min(1, len(own) - 1)]
    name, next_name = label_of(first[by]), label_of(second[by])
    if first["verdict"] != "shown":
        return f"No leak shown: {name} comes to AUC {_auc(first)}"
    if len(own) == 1:
        return f"{name} finds members: AUC {_auc(first)}"
    if _compare(first, second):
        return f"{name} is ahead: AUC {_auc(first)}; next {next_name} {_auc(second)}"
    return f"{name} and {next_name} lead together: AUC {_auc(first)} and {_auc(second)}"


def found(table: pd.DataFrame, by: str = "method") -> str:
    """How many members are found at the lowest false positive rate that can be measured, best and worst of ``by``."""
    own = attacks(table)
    rate = next((rate for rate in sorted(RATES) if RATES[rate] in own and own[RATES[rate]].notna().any()), None)
    if rate is None:
        return "Too few non-members to say how many members are found at a low false positive rate"
    name, percent = RATES[rate], f"{100 * rate:g}".lstrip("0")
    top, low = own.loc[own[name].idxmax()], own.loc[own[name].idxmin()]
    if by == "attack":
        said = [f"{label_of(row[by])} {format_value(row[name])}" for row in (top, low)]
        return f"Found at {percent} % FPR: " + said[0] + f", {said[1]}" * (top[by] != low[by])
    first = f"At {percent} % FPR {format_value(top[name])} of {label_of(top[by])}'s members are found"
    return first if top[by] == low[by] else f"{first}, {format_value(low[name])} of {label_of(low[by])}'s"


def plateau(table: pd.DataFrame, x: str, unit: str = "", gap: Callable[[Any, Any], Any] | None = None) -> str:
    """From which value of a sweep on no gain is shown: ``4 masks are enough: AUC .97; 64 give .98``; gap as below."""
    own = attacks(table).sort_values(x)
    first, last, top = own.iloc[[0]], own.iloc[[-1]], own.loc[[own["auc"].idxmax()]]
    enough = next(own.loc[[i]] for i in own.index if not _compare_rows([own.loc[[i]], top], gap)[0])
    ends = {name: _auc(part.iloc[0]) for name, part in (("first", first), ("enough", enough), ("last", last))}
    unit, n, n_last = unit or x.removeprefix("n_"), f"{enough[x].iloc[0]:,g}", f"{last[x].iloc[0]:,g}"
    if top["verdict"].iloc[0] != "shown":
        return f"No leak shown at any number of {unit}: AUC {ends['first']} to {ends['last']}"
    if enough.index[0] == first.index[0]:
        return f"{n} and {n_last} {unit} are not told apart: AUC {ends['enough']} and {ends['last']}"
    if enough.index[0] == last.index[0]:
        return f"More {unit} still help at {n_last}: AUC {ends['first']} to {ends['last']}"
    return f"{n} {unit} are enough: AUC {ends['enough']}; {n_last} give {ends['last']}"


def span(table: pd.DataFrame, by: str, what: str = "") -> str:
    """The two ends of a choice: ``Own parts .96, another image's tokens .55``; says where intervals overlap."""
    own = attacks(table)
    top, low = own.loc[own["auc"].idxmax()], own.loc[own["auc"].idxmin()]
    if not _compare(top, low):  # narrower intervals further in may be apart
        ends = own.loc[own["auc_low"].idxmax()], own.loc[own["auc_high"].idxmin()]
        top, low = ends if _compare(*ends) else (top, low)
    lead = f"{what}: " if what else ""
    if not _compare(top, low):
        return f"{lead}{'n' if lead else 'N'}o choice is clearly better, AUC {_auc(low)} to {_auc(top)}"
    return f"{lead}AUC {_auc(top)} with {label_of(top[by])}, {_auc(low)} with {label_of(low[by])}"


def versus(
    table: pd.DataFrame, one: str, other: str, names: tuple[str, str], gap: Callable[[Any, Any], Any] | None = None
) -> str:
    """Compare the mean rows of two queries: ``Own parts beat random vectors: AUC .96 against .55``, or neither.

    ``gap``: where each query has one row and both are of the same images, ``lab.difference``; without it intervals are
    compared, which tell less apart.
    """
    rows = [attacks(table).query(query) for query in (one, other)]
    first, second = map(_average, rows)
    if pd.isna(first["auc"]) or pd.isna(second["auc"]):
        return f"{names[0]} against {names[1]}: not both in this profile"
    if not _compare_rows(rows, gap)[0]:
        return f"{names[0]} and {names[1]} are not told apart: AUC {_auc(first)} and {_auc(second)}"
    if first["auc"] < second["auc"]:
        first, second, names = second, first, names[::-1]
    return f"{names[0][0].upper()}{names[0][1:]} beat {names[1]}: AUC {_auc(first)} against {_auc(second)}"


def grows(table: pd.DataFrame, x: str = "checkpoint", unit: str = "epochs", subject: str = "") -> str:
    """From which value on a leak is shown at every one: ``Leaks shown from 150 epochs on; AUC .98 at 2,500``."""
    own = attacks(table).sort_values(x)
    shown, last = own["verdict"] == "shown", own.iloc[-1]
    since = own.loc[~(own[x] <= own.loc[~shown, x].max()), x]  # all are shown there
    at = f"{last[x]:,g} {unit}"
    if len(since) == shown.sum() == 1:
        said = f"Leak first shown at {at}: AUC {_auc(last)}"
    elif len(since):
        said = f"Leaks shown from {since.iloc[0]:,g} {unit} on; AUC {_auc(last)} at {last[x]:,g}"
    elif shown.any():
        said = f"Leak shown at {own.loc[shown, x].iloc[0]:,g}, not at {at}: AUC {_auc(last)}"
    else:
        said = f"No leak shown up to {at}: AUC {_auc(last)}"
    return f"{subject}: {said[0].lower()}{said[1:]}" if subject else said


def transfer(table: pd.DataFrame, row: str = "shadow_method", column: str = "method") -> str:
    """Mean AUC where shadow and target agree, and where they do not."""
    own = attacks(table)
    same = own[row] == own[column]
    if not same.any() or same.all():
        return best(table, by=row)
    on, other = own.loc[same, "auc"].mean(), own[~same]
    n_shown = (other["verdict"] == "shown").sum()
    if 0 < n_shown < len(other):
        ends = (format_value(other["auc"].agg(end)) for end in ("min", "max"))
        return f"Transfer depends on the pair of methods: AUC {' to '.join(ends)} from another kind of shadow"
    verdict = "The attack transfers" if n_shown else "The attack does not transfer"
    off = format_value(other["auc"].mean())
    return f"{verdict}: mean AUC {format_value(on)} from its own kind of shadow, {off} from others"


@dataclass(frozen=True)
class Expectation:
    """What the theory predicts, and how the run answers; made by the functions below."""

    text: str
    judge: Callable[[pd.DataFrame], tuple[str, str]]  # table -> (a word, what was seen)

    def answer(self, table: pd.DataFrame) -> str:
        """Return the *Here:* line: ``"more masks, less noise": met; AUC .74 at 1 and .98 at 64``."""
        table = table.rename(columns={"value": "auc", "low": "auc_low", "high": "auc_high"})
        try:
            word, seen = self.judge(table)
        except (KeyError, IndexError, ValueError):
            word, seen = _ABSENT
        return f"“{self.text}”: {word}" + (f"; {seen}" if seen else "")


_ABSENT = "can't be said", "this profile has no such rows"
_ANSWERS = {1: "met", 0: "intervals overlap", -1: "not met"}


def rises(text: str, *, by: str = "x", falls: bool = False, query: str = "") -> Expectation:
    """Expect the AUC at the largest value of ``by`` above that at the smallest (``falls``: below) in a query."""

    def judge(table: pd.DataFrame) -> tuple[str, str]:
        own = attacks(table.query(query) if query else table).sort_values(by, kind="stable")
        first, last = own.iloc[0], own.iloc[-1]
        seen = f"AUC {_auc(first)} at {first[by]:,g} and {_auc(last)} at {last[by]:,g}"
        seen += ", all at the ceiling" if own["auc"].min() > 0.95 else ""  # where no setting can show its worth
        return _ANSWERS[_compare(first, last) if falls else _compare(last, first)], seen

    return Expectation(text, judge)


def above(text: str, high: str, low: str, gap: Callable[[Any, Any], Any] | None = None) -> Expectation:
    """Expect the rows of query ``high`` above those of query ``low`` (their means; ``gap`` as for :func:`versus`)."""

    def judge(table: pd.DataFrame) -> tuple[str, str]:
        rows = [attacks(table).query(query) for query in (high, low)]
        one, other = map(_average, rows)
        if pd.isna(one["auc"]) or pd.isna(other["auc"]):
            return _ABSENT
        ahead = _count_ahead(*(table.query(query) for query in (high, low)))
        order, paired = _compare_rows(rows, gap)
        word = _ANSWERS[order] if order or not paired else "no difference shown"
        return word, f"AUC {_auc(one)} against {_auc(other)}{ahead}{paired}"

    return Expectation(text, judge)


def _count_ahead(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """In how many trainings one is ahead, where both were measured on the same ones, once each."""
    if "target" not in one:
        return ""
    pair = [t.loc[(t["control"] == "") & t["seed"].notna()].set_index(["target", "seed"])["auc"] for t in (one, other)]
    if not all(len(p) and p.index.is_unique for p in pair) or set(pair[0].index) != set(pair[1].index):
        return ""
    ahead = pair[0] > pair[1].reindex(pair[0].index)
    return f"; ahead in {ahead.sum()} of {len(ahead)} trainings"


def all_shown(text: str, query: str = "") -> Expectation:
    """Expect a leak shown in every row (of a query)."""
    return Expectation(text, functools.partial(_count, query=query, every=True))


def none_shown(text: str, query: str = "") -> Expectation:
    """Expect no leak shown in any row (of a query; controls are rows too where the query names them)."""
    return Expectation(text, functools.partial(_count, query=query, every=False))


def _count(table: pd.DataFrame, *, query: str, every: bool) -> tuple[str, str]:
    own = table[table["seed"].isna()].query(query) if query else attacks(table)
    if own.empty:
        return _ABSENT
    n = int((own["verdict"] == "shown").sum())
    return ("met" if n == len(own) * every else "not met"), f"shown in {n} of {len(own)}"


def holds(text: str, test: Callable[[pd.DataFrame], bool], seen: Callable = lambda table: "") -> Expectation:
    """Expect what a function of the drawn table finds true; ``seen`` says the numbers."""
    return Expectation(text, lambda table: ("met" if test(table) else "not met", seen(table)))
