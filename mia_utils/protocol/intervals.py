"""The one rule: what an interval must clear before anything here says "shown".

Titles, tables, checks, exercises and audits call :func:`decide` on the interval that is printed, with the no-model
control of the same split beside it, and :func:`say` for the words.

Example:
    >>> say(decide(0.55, 0.48, 0.62), minimum_detectable=0.57)
    'not shown; minimum detectable AUC .57'
    >>> str(decide(0.70, 0.64, 0.76, control=Control(0.51, 0.46, 0.56)))
    'shown'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

VERDICTS = ("shown", "reversed", "not shown", "invalid")
FAMILIES = ("no-model", "untrained", "permuted")


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Control(NamedTuple):
    """The no-model control of the same split, as :func:`decide` needs it.

    Attributes:
        auc, low, high: its AUC and interval.
        rejected: whether its family (:func:`judge_controls`), or in a single audit its own interval
            (:func:`two_sided`), rejects 0.5.
        clear: whether the attack stands clear of it (``metrics.clear_of``); None where not computed: then the two
            intervals must not overlap.
    """

    auc: float
    low: float
    high: float
    rejected: bool = False
    clear: bool | None = None


class Verdict(NamedTuple):
    """One of ``VERDICTS``, and why where a control decided; ``str`` gives the word alone."""

    verdict: str
    because: str = ""

    @property
    def shown(self) -> bool:
        """Whether the attack is shown to tell members from non-members."""
        return self.verdict == "shown"

    def __str__(self) -> str:
        return self.verdict


def decide(auc: float, low: float, high: float, *, control: Control | None = None) -> Verdict:
    """Decide what an attack's AUC shows.

    *invalid*: the no-model control is rejected, whatever the attack reaches. *shown*: the lower end is above 0.5 and,
    where the control's own interval leaves 0.5, the attack stands clear of that control. *reversed*: the upper end is
    below 0.5. *not shown*: everything else.

    Args:
        auc, low, high: AUC in [0, 1] with its two-sided interval.
        control: no-model control of the same split; None where there is none (a control judged itself).

    Returns:
        ``Verdict``. Raises ValueError where the three numbers are no interval in [0, 1].
    """
    if not 0 <= low <= auc <= high <= 1:
        raise ValueError(f"expected 0 <= low <= auc <= high <= 1, got low {low}, auc {auc}, high {high}")
    if control is not None and control.rejected:
        return Verdict("invalid", f"no-model control {format_interval(*control[:3])}")
    if high < 0.5:
        return Verdict("reversed")
    if low <= 0.5:
        return Verdict("not shown")
    if control is not None and leaves_half(control.low, control.high):
        if not (low > control.high if control.clear is None else control.clear):
            return Verdict("not shown", f"not clear of the no-model control {format_interval(*control[:3])}")
    return Verdict("shown")


def two_sided(auc: float, low: float, high: float) -> Control:
    """Judge the no-model control of a single audit by its own interval: there is no family to share a level with."""
    return Control(auc, low, high, rejected=leaves_half(low, high))


def leaves_half(low: float, high: float) -> bool:
    """Whether an interval excludes 0.5."""
    return low > 0.5 or high < 0.5


def say(verdict: Verdict, *, minimum_detectable: float | None = None) -> str:
    """Say a verdict in the words used everywhere, with what could have been seen where nothing was."""
    if verdict.because:
        return f"{verdict}{':' if verdict.verdict == 'invalid' else ','} {verdict.because}"
    if verdict.verdict == "not shown" and minimum_detectable is not None and np.isfinite(minimum_detectable):
        return f"not shown; minimum detectable AUC {format_auc(minimum_detectable)}"
    return str(verdict)


def format_auc(value: float) -> str:
    """Two digits without the leading zero: ``.57``, ``1.00``."""
    return f"{value:.2f}".removeprefix("0")


def format_interval(auc: float, low: float, high: float) -> str:
    """An AUC with its interval: ``.57 [.52, .62]``."""
    return f"{format_auc(auc)} [{format_auc(low)}, {format_auc(high)}]"


def judge_controls(
    rows: Mapping[str, Any], level: float = 0.01, *, families: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Judge control rows with Holm's step-down test (Holm 1979), each family at its own level.

    No-model rows are a family (each split once), untrained rows are one, permuted rows are one (only of attacks that
    train something: without training they are 0.5 by construction and would only raise the bar).

    Args:
        rows: control -> its ``metrics.Result`` or ``attacks.Result``, or its two-sided p-value against 0.5; None marks
            a control that was not run.
        level: chance in (0, 1) that a family of sound controls loses any row.
        families: control -> family; without it all rows are one family.

    Returns:
        DataFrame ``control, family, p, p_holm, rejected, rejects_above`` in the order given. ``rejects_above``: the
        smallest AUC that would have rejected the row were the others sound (p <= level / rows of its family); NaN
        where no AUC would, or where only a p-value was given. Raises ValueError for a level or p outside its range.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    table = pd.DataFrame({"control": list(rows), "family": [(families or {}).get(name, "") for name in rows]})
    found = [getattr(value, "metrics", value) for value in rows.values()]
    table["p"] = np.array([_get_p(name, value) for name, value in zip(rows, found, strict=True)], dtype=np.float64)
    table["p_holm"], table["rejects_above"] = np.nan, np.nan
    for _, part in table[table["p"].notna()].groupby("family", sort=False):
        p, m = part["p"].sort_values(kind="stable"), len(part)
        # Holm: the k-th smallest of m p-values is multiplied by m - k, and never falls below its predecessor
        table.loc[p.index, "p_holm"] = np.minimum(1.0, np.maximum.accumulate(p * (m - np.arange(m))))
        for i in part.index:
            if hasattr(found[i], "rejects_above"):
                table.loc[i, "rejects_above"] = found[i].rejects_above(level / m)
    table["rejected"] = table["p_holm"] <= level
    return table[["control", "family", "p", "p_holm", "rejected", "rejects_above"]]


def _get_p(name: str, value: Any) -> float:
    if value is None:
        return np.nan
    p = float(getattr(value, "p_value", value))
    if not 0 <= p <= 1:
        raise ValueError(f"expected a p-value in [0, 1] for control {name!r}, got {p}; None = control not run")
    return p
