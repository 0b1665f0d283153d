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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

VERDICTS = ("shown", "reversed", "not shown", "invalid")
RARE = 5  # fewer expected errors (or hits) than this: the bootstrap is too short and a score interval joins it


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


# --- the interval ----------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """An AUC with its interval, standard error, and the smallest AUC such an interval would call above 0.5."""

    value: float
    low: float
    high: float
    se: float
    minimum_detectable: float

    def agree(self, p: float, critical: float, confidence: float) -> Estimate:
        """Hold 0.5 where the test of the same scores does not reject it, whose critical AUC is given."""
        low, high = (min(self.low, 0.5), max(self.high, 0.5)) if p > 1 - confidence else (self.low, self.high)
        return self._replace(low=low, high=high, minimum_detectable=min(1.0, max(self.minimum_detectable, critical)))


def estimate_auc(
    per_seed: np.ndarray,
    drawn: np.ndarray,
    *,
    units: Sequence[tuple[int, int]],
    widen: Sequence[float],
    shared: bool,
    confidence: float = 0.95,
) -> Estimate:
    """Put an interval around the mean AUC of S trainings.

    One training: percentile bootstrap, joined with a score interval where fewer than ``RARE`` errors are expected, half
    widths times ``widen``. Several: mean +- t(S - 1) sqrt(max(s^2, W) / S + max(C, 0)), s the standard deviation of
    the AUCs, W their mean variance within a training (widened), C the mean covariance between trainings of resamples
    that share blocks.

    Args:
        per_seed: (S,) AUCs.
        drawn: (S, B) AUCs of the resamples.
        units: independent units (images or blocks) of members and of non-members, per training.
        widen: factor on the standard error, per training (``widen_folds``).
        shared: whether the resamples of the trainings share their blocks.
        confidence: level.
    """
    z = stats.norm.ppf((1 + confidence) / 2)
    parts = []
    for auc, draws, (m, n), factor in zip(per_seed, drawn, units, widen, strict=True):
        low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        se = np.nanstd(draws)
        if min(auc, 1 - auc) * min(m, n) < RARE or low == high:
            ends = get_score_interval(auc, m, n, confidence)
            low, high, se = min(low, ends[0]), max(high, ends[1]), max(se, (auc - ends[0]) / z, (ends[1] - auc) / z)
        parts.append((factor * max(auc - low, 0), factor * max(high - auc, 0), factor * se))
    below, above, se = np.array(parts).T
    if len(parts) == 1:
        below, above, se = below[0], above[0], se[0]
    else:
        se = _combine_se(per_seed, se**2, drawn, np.array(widen), shared)
        below = above = stats.t.ppf((1 + confidence) / 2, len(parts) - 1) * se
    auc = float(np.mean(per_seed))
    low, high = max(0.0, float(auc - below)), min(1.0, float(auc + above))
    return Estimate(auc, low, high, float(se), min(1.0, float(0.5 + below)))


def _combine_se(per_seed: np.ndarray, within: np.ndarray, drawn: np.ndarray, widen: np.ndarray, shared: bool) -> float:
    covariance = 0.0
    if shared:
        scaled = widen[:, None] * drawn[:, np.isfinite(drawn).all(axis=0)]
        matrix = np.cov(scaled)
        covariance = (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))
    return float(np.sqrt(max(np.var(per_seed, ddof=1), within.mean()) / len(per_seed) + max(covariance, 0.0)))


def estimate_difference(
    per_seed: np.ndarray, drawn: np.ndarray, *, widen: Sequence[float], shared: bool, confidence: float = 0.95
) -> Interval:
    """Put the same interval around a paired difference of AUCs, (S,) with resamples (S, B); ends in [-1, 1]."""
    value, factor = float(np.mean(per_seed)), np.array(widen)
    if len(per_seed) == 1:
        low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        below, above = factor[0] * max(value - low, 0), factor[0] * max(high - value, 0)
    else:
        se = _combine_se(per_seed, (factor * np.nanstd(drawn, axis=1)) ** 2, drawn, factor, shared)
        below = above = stats.t.ppf((1 + confidence) / 2, len(per_seed) - 1) * se
    return Interval(value, max(-1.0, float(value - below)), min(1.0, float(value + above)))


def widen_folds(n_folds: int) -> float:
    """Factor on the standard error of a mean over k cross-fitted folds, whose attackers share most of their images.

    Source: Nadeau and Bengio (Machine Learning 52, 2003): 1/k becomes 1/k + n_test/n_fit = 1/k + 1/(k - 1).
    """
    return float(np.sqrt(1 + n_folds / (n_folds - 1))) if n_folds > 1 else 1.0


def get_score_interval(auc: float, n_members: float, n_nonmembers: float, confidence: float) -> tuple[float, float]:
    """Score interval of an AUC: all AUCs t with (auc - t)^2 <= z^2 var(t), as Newcombe (Statist. Med. 25, 2006).

    var(t) = t (1 - t) / (m n) * [1 + (m - 1) (1 - t) / (2 - t) + (n - 1) t / (1 + t)], Hanley and McNeil, Radiology 143
    (1982), Eq. (1) with Q1 = t / (2 - t), Q2 = 2 t^2 / (1 + t); the larger of its two orientations.
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


def get_wilson(value: np.ndarray | float, n: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson (1927) score interval of a proportion; n may be fractional."""
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    center = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)
