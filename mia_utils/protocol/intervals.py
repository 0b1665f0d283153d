"""The one rule: what an interval must clear before anything here says "shown", and the interval itself.

Titles, tables, checks, exercises and audits call :func:`decide` on the interval that is printed, with the no-model
control of the same split beside it, and :func:`say` for the words.

Example:
    >>> say(decide(0.55, 0.48, 0.62), minimum_detectable=0.57)
    'not shown; minimum detectable AUC .57'
    >>> say(decide(0.70, 0.64, 0.76, control=Control(0.57, 0.52, 0.62, clear=True)))
    'shown'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

RARE = 5  # fewer expected errors (or hits) than this: the bootstrap is too short and a score interval joins it


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Control(NamedTuple):
    """AUC and interval of the no-model control of the same split.

    ``rejected``: by its family (:func:`judge_controls`) or, in a single audit, its own interval (:func:`two_sided`).
    ``clear``: the attack stands clear of it (``metrics.clear_of``); None = not computed: intervals must not overlap.
    """

    auc: float
    low: float
    high: float
    rejected: bool = False
    clear: bool | None = None


class Verdict(NamedTuple):
    """``"shown"``, ``"reversed"``, ``"not shown"`` or ``"invalid"``, and why where a control decided."""

    verdict: str
    because: str = ""

    def __str__(self) -> str:
        return self.verdict


def decide(auc: float, low: float, high: float, *, control: Control | None = None) -> Verdict:
    """Decide what an AUC in [0, 1] with its two-sided interval shows.

    *invalid*: the no-model control is rejected, whatever the attack reaches. *shown*: the lower end is above 0.5 and,
    where the control's own interval leaves 0.5, the attack stands clear of it. *reversed*: the upper end is below 0.5.
    *not shown*: everything else. Raises ValueError where the three numbers are no interval in [0, 1].
    """
    if not 0 <= low <= auc <= high <= 1:
        raise ValueError(f"expected 0 <= low <= auc <= high <= 1, got low {low}, auc {auc}, high {high}")
    beside = "" if control is None else f"no-model control {format_interval(*control[:3])}"
    if control is not None and control.rejected:
        return Verdict("invalid", beside)
    if high < 0.5 or low <= 0.5:
        return Verdict("reversed" if high < 0.5 else "not shown")
    if control is not None and leaves_half(control.low, control.high):
        if not (low > control.high if control.clear is None else control.clear):
            return Verdict("not shown", f"not clear of the {beside}")
    return Verdict("shown")


def two_sided(auc: float, low: float, high: float) -> Control:
    """Judge the no-model control of a single audit by its own interval: there is no family to share a level with."""
    return Control(auc, low, high, rejected=leaves_half(low, high))


def leaves_half(low: float, high: float) -> bool:
    """Tell whether an interval excludes 0.5."""
    return bool(low > 0.5 or high < 0.5)


def say(verdict: Verdict, *, minimum_detectable: float | None = None) -> str:
    """Say a verdict in the words used everywhere, with what could have been seen where nothing was."""
    if verdict.because:
        return f"{verdict}{':' if verdict.verdict == 'invalid' else ','} {verdict.because}"
    if verdict.verdict == "not shown" and minimum_detectable is not None and np.isfinite(minimum_detectable):
        return f"not shown; minimum detectable AUC {format_auc(minimum_detectable)}"
    return str(verdict)


def format_auc(value: float) -> str:
    """Format with two digits and without the leading zero: ``.57``, ``1.00``."""
    return f"{value:.2f}".removeprefix("0")


def format_interval(auc: float, low: float, high: float) -> str:
    """Format an AUC with its interval: ``.57 [.52, .62]``."""
    return f"{format_auc(auc)} [{format_auc(low)}, {format_auc(high)}]"


def judge_controls(
    rows: Mapping[str, Any], level: float = 0.01, *, families: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Judge control rows with Holm's step-down test (Holm 1979), each family at its own level.

    Families: no-model rows (each split once), untrained rows, permuted rows of attacks that train something (the others
    are 0.5 by construction and would only raise the bar).

    Args:
        rows: control -> its result, or its two-sided p-value against 0.5; None: the control was not run.
        level: chance in (0, 1) that a family of valid controls loses any row.
        families: control -> family; without it all rows are one family.

    Returns:
        DataFrame ``control, family, p, p_holm, rejected, rejects_above`` in the order given; ``rejects_above``: the
        smallest AUC that would have rejected the row were the others valid, NaN where none would or only p is known.
        Raises ValueError for a level or p outside its range.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    found = {name: getattr(value, "metrics", value) for name, value in rows.items()}
    table = pd.DataFrame({"control": list(rows), "family": [(families or {}).get(name, "") for name in rows]})
    table["p"] = [np.nan if x is None else float(getattr(x, "p_value", x)) for x in found.values()]
    table["p_holm"] = table["rejects_above"] = np.nan
    for (name, x), p in zip(found.items(), table["p"], strict=True):
        if x is not None and not 0 <= p <= 1:
            raise ValueError(f"expected a p-value in [0, 1] for control {name!r} (None = not run), got {p}")
    for _, part in table[table["p"].notna()].groupby("family", sort=False):
        p, m = part["p"].sort_values(kind="stable"), len(part)
        # Holm: the k-th smallest of m p-values is multiplied by m - k, and never falls below its predecessor
        table.loc[p.index, "p_holm"] = np.minimum(1.0, np.maximum.accumulate(p * (m - np.arange(m))))
        for i, name in part["control"].items():
            if hasattr(found[name], "rejects_above"):
                table.loc[i, "rejects_above"] = found[name].rejects_above(level / m)
    table["rejected"] = table["p_holm"] <= level
    return table[["control", "family", "p", "p_holm", "rejected", "rejects_above"]]


# --- the interval ----------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, how far its interval reaches below and above, and its standard error."""

    value: float
    below: float
    above: float
    se: float


def estimate(
    per_seed: np.ndarray,
    drawn: np.ndarray,
    *,
    widen: Sequence[float],
    shared: bool,
    units: Sequence[tuple[int, int]] | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Put an interval around the mean AUC (or difference of AUCs) of S trainings: its ends lie below and above it.

    One training: percentile bootstrap, half widths times ``widen``. Several: mean +- t(S - 1) sqrt(max(s^2, W) / S +
    max(C, 0)); s: standard deviation of the AUCs, W: their mean variance within a training (widened), C: mean
    covariance between trainings of resamples that share blocks. C is added to s^2 / S too, which cannot see it (what
    trainings share does not scatter between them), and is never taken off: a negative one is mostly noise.

    Args:
        per_seed, drawn: (S,) AUCs, and (S, B) those of the resamples.
        widen: factor on the standard error, per training (:func:`widen_folds`, :func:`widen_blocks`).
        shared: whether the resamples of the trainings share their blocks.
        units: members and non-members (images or blocks) per training: where fewer than ``RARE`` errors are expected
            the score interval joins. None for differences.
        confidence: level.
    """
    z, tails = stats.norm.ppf((1 + confidence) / 2), [(1 - confidence) / 2, (1 + confidence) / 2]
    parts = []
    for s, (auc, draws) in enumerate(zip(per_seed, drawn, strict=True)):
        low, high = np.nanquantile(draws, tails)
        below, above, se = max(auc - low, 0.0), max(high - auc, 0.0), float(np.nanstd(draws))
        if units is not None and (min(auc, 1 - auc) * min(units[s]) < RARE or low == high):
            low, high = get_score_interval(auc, *units[s], confidence)
            below, above = max(below, auc - low), max(above, high - auc)
            se = max(se, below / z, above / z)
        parts.append(np.array([below, above, se]) * widen[s])
    if len(parts) == 1:
        return Estimate(float(per_seed[0]), *map(float, parts[0]))
    n, covariance = len(parts), 0.0
    if shared:
        matrix = np.cov(np.array(widen)[:, None] * drawn[:, np.isfinite(drawn).all(axis=0)])
        covariance = max(0.0, (matrix.sum() - np.trace(matrix)) / (n * (n - 1)))
    within = np.mean([se**2 for _, _, se in parts])
    se = float(np.sqrt(max(np.var(per_seed, ddof=1), within) / n + covariance))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * se
    return Estimate(float(np.mean(per_seed)), half, half, se)


def widen_folds(n_folds: int) -> float:
    """Factor on the standard error of a mean over k cross-fitted folds, whose attackers share most of their images.

    Source: Nadeau and Bengio (Machine Learning 52, 2003): 1/k becomes 1/k + n_test/n_fit = 1/k + 1/(k - 1).
    """
    return float(np.sqrt(1 + n_folds / (n_folds - 1))) if n_folds > 1 else 1.0


def widen_blocks(n_blocks: int) -> float:
    """Factor for few blocks of the rarer side: Student's t for the normal, and the bootstrap's n for n - 1."""
    n = max(n_blocks, 2)
    return float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * np.sqrt(n / (n - 1)))


def get_score_interval(auc: float, n_members: float, n_nonmembers: float, confidence: float) -> tuple[float, float]:
    """Score interval of an AUC: all AUCs t with (auc - t)^2 <= z^2 var(t).

    Source: Newcombe (Statistics in Medicine 25, 2006, part 2) on Hanley and McNeil (Radiology 143, 1982), Eq. (1):
    var(t) = t (1 - t) / (m n) * [1 + (m - 1) (1 - t) / (2 - t) + (n - 1) t / (1 + t)], the larger orientation.
    """
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    m, n = n_members, n_nonmembers

    def excess(t: float) -> float:
        p, q = (1 - t) / (2 - t), t / (1 + t)
        var = t * (1 - t) / (m * n) * (1 + max((m - 1) * p + (n - 1) * q, (n - 1) * p + (m - 1) * q))
        return (auc - t) ** 2 - z2 * var

    tiny = 1e-12
    low = optimize.brentq(excess, 0, min(auc, 1 - tiny)) if auc > tiny else 0.0
    high = optimize.brentq(excess, max(auc, tiny), 1) if auc < 1 - tiny else 1.0
    return low, high
