"""The one rule: what the interval that is printed must clear before anything here says "shown", and the interval.

Example:
    >>> say(decide(0.70, 0.64, 0.76, control=Control(0.57, 0.52, 0.62, clear=True)))
    'shown'
    >>> say(decide(0.60, 0.54, 0.66, control=Control(0.57, 0.52, 0.62)))
    'not shown, not clear of the no-model control .57 [.52, .62]'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import optimize, stats

if TYPE_CHECKING:
    import pandas as pd

RARE = 5  # fewer expected errors (or hits) than this: the bootstrap is too short and a score interval joins it


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Control(NamedTuple):
    """AUC and interval of the no-model control of the same split."""

    auc: float
    low: float
    high: float
    rejected: bool = False  # by its family (judge_controls) or, in a single audit, its own interval
    clear: bool | None = None  # the attack stands clear of it (metrics.clear_of); None: intervals must not overlap


class Verdict(NamedTuple):
    """``"shown"``, ``"reversed"``, ``"not shown"`` or ``"invalid"``, and why where a control decided."""

    verdict: str
    because: str = ""

    def __str__(self) -> str:
        return self.verdict


def decide(auc: float, low: float, high: float, *, control: Control | None = None) -> Verdict:
    """Decide what an AUC in [0, 1] with its two-sided interval shows.

    *invalid*: the no-model control is rejected, whatever the attack reaches. *shown*: the lower end is above 0.5, the
    attack is ahead of the control and, where the control's own interval leaves 0.5, stands clear of it. *reversed*: the
    upper end is below 0.5. *not shown*: everything else.
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
    if control is not None and auc <= control.auc:
        return Verdict("not shown", f"not ahead of the {beside}")
    return Verdict("shown")


def leaves_half(low: float, high: float) -> bool:
    """Tell whether an interval excludes 0.5."""
    return bool(low > 0.5 or high < 0.5)


def say(verdict: Verdict) -> str:
    """Say a verdict, and why where a control decided."""
    colon = ":" if verdict.verdict == "invalid" else ","
    return f"{verdict}{colon} {verdict.because}" if verdict.because else str(verdict)


def format_value(value: float | None, digits: int = 2) -> str:
    """Print a share without its leading zero: 0.807 -> ``.81``; an empty value gives an empty text."""
    if value is None or not np.isfinite(value):
        return ""
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(float(value), digits) + 0.0:.{digits}f}")  # + 0: no -.00


def format_interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """Print ``.81 [.76, .86]``, or the value alone where it has no interval."""
    ends = f" [{format_value(low, digits)}, {format_value(high, digits)}]" if np.isfinite(low) else ""
    return format_value(value, digits) + ends


def judge_controls(
    p_values: Mapping[str, float], level: float = 0.01, *, families: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Judge control rows with Holm's step-down test (Holm 1979), each family at its own level.

    Args:
        p_values: control -> its two-sided p-value against 0.5.
        level: chance in (0, 1) that a family of valid controls loses any row.
        families: control -> family, such as no-model rows (each split once); None: all are one.

    Returns:
        DataFrame ``control, family, p, p_holm, rejected`` in the order given.
    """
    import pandas as pd  # audits start without it

    if not 0 < level < 1:
        raise ValueError(f"expected level in (0, 1), got {level}")
    if bad := [name for name, p in p_values.items() if p is None or not 0 <= p <= 1]:
        raise ValueError(f"expected a p-value in [0, 1] for control {bad[0]!r}, got {p_values[bad[0]]}")
    named = [(name, (families or {}).get(name, ""), float(p)) for name, p in p_values.items()]
    table = pd.DataFrame(named, columns=["control", "family", "p"]).assign(p_holm=np.nan)
    for _, part in table.groupby("family", sort=False):
        p, m = part["p"].sort_values(kind="stable"), len(part)
        # Holm: the k-th smallest of m p-values is multiplied by m - k, and never falls below its predecessor
        table.loc[p.index, "p_holm"] = np.minimum(1.0, np.maximum.accumulate(p * (m - np.arange(m))))
    return table.assign(rejected=table["p_holm"] <= level)


class Estimate(NamedTuple):
    """A mean, how far its interval reaches below and above, and its standard error."""

    value: float
    below: float
    above: float
    se: float


def estimate(
    per_seed: np.ndarray, drawn: np.ndarray, *, widen: Sequence[float], shared: bool,
    units: Sequence[tuple[int, int]] | None = None, confidence: float = 0.95,
) -> Estimate:  # fmt: skip
    """Put an interval around the mean AUC (or difference of AUCs) of S trainings.

    One training: percentile bootstrap, half widths times ``widen``. Several: mean +- t(S - 1) sqrt(max(s^2, W) / S +
    max(C, 0)); s: standard deviation of the AUCs, W: their mean variance within a training (widened), C: mean
    covariance between trainings of resamples that share blocks: what trainings share does not scatter between them, so
    s^2 cannot see it. A negative C is mostly noise.

    Args:
        per_seed, drawn: (S,) AUCs, and (S, B) those of the resamples.
        widen: factor on the standard error, per training.
        shared: whether the resamples of the trainings share their blocks.
        units: members and non-members (images or blocks) per training: where fewer than ``RARE`` errors are expected
            the score interval joins; None for differences.
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
