"""How well a score separates members from non-members, with intervals that hold on small sets.

A score is float64 ``(N,)`` and **higher = more likely a member**. Everything here is a weighted ROC: a bootstrap
resample gives every image an integer weight, and the AUC and the ROC of 1,000 resamples are cumulative sums over
scores that are sorted once. With folds (cross-fitting), each fold's attacker has a ROC of its own and the ROCs are
averaged; scores of different attackers are never ranked against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from mia_utils import seeds

FPRS = (0.1, 0.01, 0.001)
_RARE = 5  # fewer expected errors (or hits) than this: the bootstrap is too short and a score interval joins it
_CHUNK = 400_000  # resampled weights held in memory at once


class Interval(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Roc(NamedTuple):
    """ROC on a grid of false-positive rates from 1/n_nonmembers to 1, arrays ``(G,)``, with a pointwise interval."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Checked input of one seed: what ``combine`` needs to resample it again."""

    score: np.ndarray
    is_member: np.ndarray
    threshold: np.ndarray | None = None
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None


@dataclass(frozen=True)
class Result:
    """Numbers of one attack on one model, or their mean over seeds.

    Attributes:
        auc, auc_low, auc_high: area under the ROC (probability that a member outranks a non-member, ties count half).
        half_width: half the width of the AUC interval; a control at 0.5 "could have seen AUC >= 0.5 + half_width".
        tpr_at: FPR -> (value, low, high), or None where there are fewer than 10/FPR non-members.
        accuracy, balanced_accuracy, precision, recall, f1: at the threshold given, else None. precision is None when
            nobody is called a member.
        at_threshold: {"fpr": (value, low, high), "tpr": (value, low, high)} at the threshold given, else None.
        n_members, n_nonmembers: images per seed (rounded mean over seeds).
        p_value: two-sided against AUC 0.5.
        roc: the averaged ROC on a grid.
        per_seed: AUC of each seed.
        inputs: the checked scores, one entry per seed.
    """

    auc: float
    auc_low: float
    auc_high: float
    half_width: float
    tpr_at: dict[float, Interval | None]
    accuracy: float | None
    balanced_accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    at_threshold: dict[str, Interval] | None
    n_members: int
    n_nonmembers: int
    p_value: float
    roc: Roc = field(repr=False)
    per_seed: tuple[float, ...]
    inputs: tuple[Scores, ...] = field(repr=False, compare=False)

    @property
    def minimum_detectable(self) -> float:
        """Smallest AUC that an interval of this row's width calls above 0.5."""
        return min(1.0, 0.5 + self.auc - self.auc_low)

    @property
    def n_seeds(self) -> int:
        """Number of seeds averaged."""
        return len(self.per_seed)


def evaluate(
    score: np.ndarray,
    is_member: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    groups: np.ndarray | None = None,
    folds: np.ndarray | None = None,
    fprs: Sequence[float] = FPRS,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Evaluate one score.

    AUC and TPR at a fixed FPR: stratified percentile bootstrap over images (over whole blocks where ``groups`` is
    given), the threshold of each FPR picked anew in every resample. Where fewer than five errors or hits are expected
    the interval is joined with a score interval, so an AUC of 1 never gets [1, 1]: for the AUC the inversion of
    Hanley and McNeil's variance (Newcombe, Statistics in Medicine 25, 2006, part 2: the AUC inside the variance is
    the one tested, not the one seen), for the TPR Wilson (1927). Simulated at AUCs of .90 to .997 with 20 to 256
    members: the score interval covers .91 to 1.00, the bootstrap alone .29 to .95.

    Ties are handled conservatively: the ROC is a step function without interpolation, a tie is passed as a whole, and
    the share of false positives never exceeds the target. With folds the false positives allowed to the whole set are
    shared among the folds (largest remainder first), and members in the gap up to the next non-member count 1/n_folds,
    because a threshold picked among few non-members flatters the attack.

    The p-value is two-sided against 0.5: normal with the exact permutation variance of the Mann-Whitney statistic with
    ties (Lehmann, Nonparametrics, 1975), averaged over folds; with groups, Student's t on the block-bootstrap standard
    error with (blocks of the rarer class - 1) degrees of freedom. With folds the standard error is widened, because
    cross-fitted attackers share images (Nadeau and Bengio 2003); where folds are independent it is conservative.

    Args:
        score: (N,) float, higher = more likely a member.
        is_member: (N,) bool or 0/1.
        threshold: ``score >= threshold`` means member; one number, or (N,) where attackers of several folds have their
            own. It must have been chosen on other data.
        groups: (N,) block ids (video, patients): resampled as a whole.
        folds: (N,) fold ids: AUC and ROC are unweighted means over folds.
        fprs: false-positive rates in (0, 1).
        confidence: level of all intervals.
        n_bootstrap: number of resamples.
        seed: seed of the private resampling stream.

    Returns:
        ``Result`` with one entry in ``per_seed``.

    Raises:
        ValueError: shapes differ, a score is not finite, a class (or a class of a fold) is empty, an option is out of
            range.
    """
    inputs = _check(score, is_member, threshold, groups, folds)
    return _summarize([inputs], fprs=fprs, confidence=confidence, n_bootstrap=n_bootstrap, seed=seed)


def combine(
    results: Sequence[Any],
    *,
    fprs: Sequence[float] = FPRS,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Average over seeds: mean of the per-seed AUCs and ROCs, never a ROC of pooled scores.

    The interval is a bootstrap over seeds, then over images within each seed. Three seeds are few: simulated with 128
    members and 500 non-members, it covers .96, .87 and .79 where the true AUC of a seed scatters by 0, .03 and .06.
    With groups, the blocks are resampled by id jointly over the seeds, because the same block occurs in several
    seeds. The p-value takes the seeds' splits as independent draws (images), or uses the joint block bootstrap
    (groups).

    Args:
        results: one entry per seed: a ``Result``, an object with such a ``.metrics``, a mapping of the arguments of
            ``evaluate``, or a tuple ``(score, is_member[, folds[, groups[, threshold]]])``.
        fprs, confidence, n_bootstrap, seed: as in ``evaluate``.

    Returns:
        ``Result``; with one entry it equals ``evaluate``.

    Raises:
        ValueError: the list is empty, or an entry is not one of these.
    """
    inputs = [x for entry in results for x in _unpack(entry)]
    if not inputs:
        raise ValueError("expected at least one result to combine, got an empty list")
    n_grouped = sum(x.groups is not None for x in inputs)
    if n_grouped not in (0, len(inputs)):
        raise ValueError(f"expected groups for all results or for none, got them for {n_grouped} of {len(inputs)}")
    return _summarize(inputs, fprs=fprs, confidence=confidence, n_bootstrap=n_bootstrap, seed=seed)


def judge_controls(p_values: Mapping[str, Any], level: float = 0.01) -> pd.DataFrame:
    """Judge all control rows jointly with Holm's step-down test (Holm 1979) at a family level.

    Args:
        p_values: control row -> its two-sided p-value against 0.5, or a result with ``.p_value``; None or NaN marks a
            control that could not be run. Give each distinct control once (no-model: once per split).
        level: family level: the chance that any sound control is rejected.

    Returns:
        DataFrame ``control, p, p_holm, rejected`` in the order given; a control that could not be run has NaN and is
        not rejected. Controls hold when no row is rejected.
    """
    names = list(p_values)
    p = np.array([_get_p(name, p_values[name]) for name in names], dtype=np.float64)
    adjusted = np.full(len(p), np.nan)
    run = np.flatnonzero(~np.isnan(p))
    order = run[np.argsort(p[run], kind="stable")]
    # Holm: the k-th smallest of m p-values is multiplied by m - k, and never falls below its predecessor
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))))
    return pd.DataFrame({"control": names, "p": p, "p_holm": adjusted, "rejected": adjusted <= level})


def _get_p(name: str, value: Any) -> float:
    if value is None:
        return np.nan
    p = getattr(value, "p_value", None)
    if p is None and hasattr(value, "metrics"):
        p = value.metrics.p_value
    p = float(value if p is None else p)
    if not (np.isnan(p) or 0 <= p <= 1):
        raise ValueError(f"expected a p-value in [0, 1] for control {name!r}, got {p}")
    return p


@dataclass(frozen=True)
class SetTest:
    """Whether a set of pictures scores higher than reference pictures; see :func:`test_set`.

    Attributes:
        p_value: permutation p-value, at least 1 / (1 + n_permutations).
        auc: chance that a picture of mine outranks a reference picture (ties count half): the statistic, rescaled.
        difference: mean score of mine minus mean score of the reference, for reading; not tested.
        n_mine, n_reference: pictures.
        n_permutations: draws asked for; where fewer divisions of the pictures exist, all of them are counted.
        alternative: ``"greater"``, ``"less"`` or ``"two-sided"``.
    """

    p_value: float
    auc: float
    difference: float
    n_mine: int
    n_reference: int
    n_permutations: int
    alternative: str

    def __str__(self) -> str:
        side = {"greater": "mine higher", "less": "mine lower", "two-sided": "two-sided"}[self.alternative]
        return (
            f"{self.n_mine} pictures against {self.n_reference} reference pictures: AUC {self.auc:.2f}, "
            f"p = {self.p_value:.2g} ({side}) if the two sets are exchangeable"
        )


def test_set(
    score_mine: np.ndarray,
    score_reference: np.ndarray,
    *,
    n_permutations: int = 10_000,
    seed: int = 0,
    alternative: str = "greater",
) -> SetTest:
    """Test a whole set: were my fifty pictures used?

    H0: my pictures and the reference pictures are exchangeable, as if one pile had been divided at random. It is
    rejected by membership, but also by *any* other difference between the two sets: first let the no-model control
    (:mod:`mia_utils.protocol.controls`) look for one, or use :mod:`mia_utils.audit`, which does.

    The statistic is the rank sum (Mann-Whitney), the AUC of the rest of this module: unlike a difference of means it
    does not hang on the scale of the score or on one picture with an extreme one. p = (1 + permutations at least as
    extreme) / (1 + permutations): exact for any number of pictures and with ties (Phipson and Smyth, 2010). The score
    must not come from an attacker fitted to these labels.

    Args:
        score_mine: (n,) float, higher = more likely a member.
        score_reference: (m,) float, of pictures that were surely not used but are otherwise alike.
        n_permutations: random divisions.
        seed: seed of the private stream.
        alternative: ``"greater"``: mine score higher.

    Returns:
        ``SetTest``.

    Raises:
        ValueError: a set is empty or a score not finite, an unknown alternative, no permutation.
    """
    mine, reference = (np.asarray(s, dtype=np.float64) for s in (score_mine, score_reference))
    for name, s in (("score_mine", mine), ("score_reference", reference)):
        if s.ndim != 1 or not len(s):
            raise ValueError(f"expected {name} of shape (n,) with at least one picture, got {s.shape}")
        if bad := int((~np.isfinite(s)).sum()):
            raise ValueError(f"expected finite {name}, got {bad} NaN or infinite of {len(s)}")
    if alternative not in ("greater", "less", "two-sided") or n_permutations < 1:
        given = f"{alternative!r} and {n_permutations}"
        raise ValueError(f"expected alternative 'greater', 'less' or 'two-sided' and n_permutations >= 1, got {given}")
    rank = stats.rankdata(np.concatenate([mine, reference]))
    test = stats.permutation_test(
        (rank[: len(mine)], rank[len(mine) :]),
        lambda x, y, axis: x.sum(axis=axis),  # halves of integers: sums are exact, ties compare equal
        n_resamples=n_permutations,
        alternative=alternative,
        vectorized=True,
        batch=max(1, _CHUNK // len(rank)),
        rng=seeds.rng(seed, "metrics.test_set"),
    )
    smallest = len(mine) * (len(mine) + 1) / 2
    return SetTest(
        p_value=float(test.pvalue),
        auc=float((rank[: len(mine)].sum() - smallest) / (len(mine) * len(reference))),
        difference=float(mine.mean() - reference.mean()),
        n_mine=len(mine),
        n_reference=len(reference),
        n_permutations=n_permutations,
        alternative=alternative,
    )


# --- input -----------------------------------------------------------------------------------------------------------


def _check(score: Any, is_member: Any, threshold: Any = None, groups: Any = None, folds: Any = None) -> Scores:
    score, is_member = np.asarray(score, dtype=np.float64), np.asarray(is_member)
    if score.ndim != 1 or is_member.shape != score.shape:
        raise ValueError(f"expected score and is_member of one shape (N,), got {score.shape} and {is_member.shape}")
    bad = int((~np.isfinite(score)).sum())
    if bad:
        raise ValueError(f"expected finite scores, got {bad} NaN or infinite of {len(score)}")
    if is_member.dtype != bool:
        if not np.isin(is_member, (0, 1)).all():
            raise ValueError("expected is_member as bool or 0/1, got other values")
        is_member = is_member.astype(bool)
    _check_classes(is_member, "")
    if threshold is not None:
        threshold = np.asarray(threshold, dtype=np.float64)
        if threshold.shape not in ((), score.shape) or np.isnan(threshold).any():
            raise ValueError(f"expected threshold as a number or (N,) without NaN, got shape {threshold.shape}")
        threshold = np.broadcast_to(threshold, score.shape)
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != score.shape:
            raise ValueError(f"expected groups of shape {score.shape}, got {groups.shape}")
    if folds is not None:
        folds = np.asarray(folds)
        if folds.shape != score.shape:
            raise ValueError(f"expected folds of shape {score.shape}, got {folds.shape}")
        for name in np.unique(folds):
            _check_classes(is_member[folds == name], f" in fold {name}")
    return Scores(score, is_member, threshold, groups, folds)


def _check_classes(is_member: np.ndarray, where: str) -> None:
    n_members = int(is_member.sum())
    if not 0 < n_members < len(is_member):
        got = f"{n_members} members and {len(is_member) - n_members} non-members"
        raise ValueError(f"expected members and non-members{where}, got {got}")


def _unpack(entry: Any) -> tuple[Scores, ...]:
    if isinstance(entry, Result):
        return entry.inputs
    if isinstance(getattr(entry, "metrics", None), Result):
        return entry.metrics.inputs
    if isinstance(entry, Mapping):
        unknown = set(entry) - {"score", "is_member", "threshold", "groups", "folds"}
        if unknown:
            raise ValueError(f"expected keys score, is_member, threshold, groups, folds, got also {sorted(unknown)}")
        return (_check(**entry),)
    if isinstance(entry, (tuple, list)) and 2 <= len(entry) <= 5:
        score, is_member, folds, groups, threshold = (*entry, None, None, None)[:5]
        return (_check(score, is_member, threshold, groups, folds),)
    raise ValueError(f"expected a result, a mapping or (score, is_member, folds, groups), got {type(entry).__name__}")


# --- weighted ROC ----------------------------------------------------------------------------------------------------


class _Curve:
    """The scores of one fold, sorted descending once; ties are one step."""

    def __init__(self, score: np.ndarray, is_member: np.ndarray, where: np.ndarray) -> None:
        order = np.argsort(-score[where], kind="stable")
        self.columns = where[order]
        ranked = score[self.columns]
        self.is_member = is_member[self.columns]
        self.ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last position of every tie

    def count(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative weight of members and of non-members at the end of every tie: (B, N) -> two (B, G)."""
        w = weights.take(self.columns, axis=1)
        members = np.cumsum(w * self.is_member, axis=1, dtype=w.dtype).take(self.ends, axis=1).astype(np.int64)
        everyone = np.cumsum(w, axis=1, out=w).take(self.ends, axis=1).astype(np.int64)
        return members, everyone - members


def _measure(x: Scores, curves: list[_Curve], weights: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and TPR of weighted images, averaged over folds.

    Args:
        weights: (B, N) int weights of the images.
        rates: (R,) false-positive rates.

    Returns:
        auc (B,) and tpr (B, R); a fold that a resample left without a class is skipped in that resample.
    """
    counts = [curve.count(weights) for curve in curves]
    n_fp = np.stack([fp[:, -1] for _, fp in counts], axis=1)  # (B, F)
    n_tp = np.stack([tp[:, -1] for tp, _ in counts], axis=1)
    usable = (n_fp > 0) & (n_tp > 0)
    budget = _share_budget(n_fp, rates)  # (B, F, R)
    auc, tpr = np.empty(n_fp.shape), np.empty(budget.shape)
    for f, (tp, fp) in enumerate(counts):
        # Mann-Whitney: every non-member meets the members above it, and half of those it ties with
        above = tp.copy()
        above[:, 1:] += tp[:, :-1]  # twice the mean rank weight of members at each step
        step = np.diff(fp, axis=1, prepend=0)
        auc[:, f] = 0.5 * np.einsum("bg,bg->b", above, step) / np.maximum(n_fp[:, f] * n_tp[:, f], 1)
        # the last step whose false positives stay within the budget; rows made disjoint so that one search serves all
        offset = np.arange(len(fp), dtype=np.int64)[:, None] * (int(n_fp.max()) + 1)
        taken = np.searchsorted((fp + offset).ravel(), (budget[:, f] + offset).ravel(), side="right")
        taken = taken.reshape(-1, len(rates)) - np.arange(len(fp))[:, None] * fp.shape[1]
        hits = np.concatenate([np.zeros((len(tp), 1), np.int64), tp], axis=1)
        found = np.take_along_axis(hits, taken, axis=1).astype(np.float64)
        if len(counts) > 1:
            # Members between the last non-member allowed and the next one: the threshold may lie anywhere in that gap.
            # One ROC counts them all, as usual; F curves that all did would make F gaps' worth of false positives
            # unseen (measured: TPR .114 for a true .092 at 1 % of 5 x 200), so together they count one gap.
            spent = np.take_along_axis(np.concatenate([np.zeros((len(fp), 1), np.int64), fp], axis=1), taken, axis=1)
            last = np.searchsorted((fp + offset).ravel(), (spent + offset).ravel(), side="left").reshape(taken.shape)
            last = last - np.arange(len(fp))[:, None] * fp.shape[1] + 1
            sure = np.take_along_axis(hits, np.minimum(last, taken), axis=1)
            found -= np.where(spent > 0, (found - sure) * (1 - 1 / len(counts)), 0)
        tpr[:, f] = found / np.maximum(n_tp[:, f, None], 1)
    auc[~usable], tpr[~usable] = np.nan, np.nan
    n_usable = np.where(usable.any(axis=1), usable.sum(axis=1), np.nan)
    return np.nansum(auc, axis=1) / n_usable, np.nansum(tpr, axis=1) / n_usable[:, None]


def _share_budget(n_nonmembers: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """False positives each fold may make: (B, F), (R,) -> (B, F, R) int, in all at most rate * non-members."""
    exact = n_nonmembers[:, :, None] * rates + 1e-9  # 0.1 * 30 must count as 3
    budget = np.floor(exact).astype(np.int64)
    if n_nonmembers.shape[1] > 1:
        total = np.floor(n_nonmembers.sum(axis=1)[:, None] * rates + 1e-9).astype(np.int64)
        left = total - budget.sum(axis=1)
        rank = np.argsort(np.argsort(budget - exact, axis=1, kind="stable"), axis=1, kind="stable")
        budget = np.minimum(budget + (rank < left[:, None, :]), n_nonmembers[:, :, None])
    return budget


def _make_curves(x: Scores) -> list[_Curve]:
    folds = np.zeros(len(x.score), int) if x.folds is None else x.folds
    return [_Curve(x.score, x.is_member, np.flatnonzero(folds == name)) for name in np.unique(folds)]


# --- resampling ------------------------------------------------------------------------------------------------------


def _draw_counts(rng: np.random.Generator, n_draws: int, n: int) -> np.ndarray:
    """Draw n of n with replacement, n_draws times; how often each came: (n_draws, n) int."""
    drawn = rng.integers(0, n, size=(n_draws, n), dtype=np.int32)
    drawn += (np.arange(n_draws, dtype=np.int32) * np.int32(n))[:, None]
    return np.bincount(drawn.ravel(), minlength=n_draws * n).reshape(n_draws, n)


def _draw_weights(rng: np.random.Generator, n_draws: int, strata: np.ndarray) -> np.ndarray:
    """Weights of a stratified bootstrap: (n_draws, N) int, the number of units of every stratum kept."""
    weights = np.empty((n_draws, len(strata)), np.int32)  # half the memory: their sums are counts of images
    for stratum in np.unique(strata):
        where = np.flatnonzero(strata == stratum)
        weights[:, where] = _draw_counts(rng, n_draws, len(where))
    return weights


def _resample(
    inputs: list[Scores], curves: list[list[_Curve]], rates: np.ndarray, n_bootstrap: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Resample images (or blocks) of every seed.

    Returns:
        auc (S, B), tpr (S, B, R) and, per seed, counts at the threshold (B, 4): tp, fp, members, non-members.
    """
    grouped = inputs[0].groups is not None
    step = max(1, _CHUNK // max(len(x.score) for x in inputs))
    sizes = [min(step, n_bootstrap - start) for start in range(0, n_bootstrap, step)]
    if grouped:
        ids, where = np.unique(np.concatenate([x.groups for x in inputs]), return_inverse=True)
        where = np.split(where, np.cumsum([len(x.score) for x in inputs])[:-1])
        strata = np.zeros(len(ids), int)
        if len(inputs) == 1 and not _is_mixed(inputs[0]):
            # one seed: a block is a member or not, and both classes keep their number of blocks. Over several seeds
            # a block changes sides, so only the number of all blocks is kept.
            strata[where[0]] = inputs[0].is_member
        rng = seeds.rng(seed, "metrics.bootstrap", "blocks")
        drawn = [_draw_weights(rng, size, strata) for size in sizes]
    auc, tpr, confusion = [], [], []
    for s, x in enumerate(inputs):
        rng = seeds.rng(seed, "metrics.bootstrap", s)
        parts = []
        for i, size in enumerate(sizes):
            if grouped:
                weights = drawn[i][:, where[s]]
            else:
                weights = _draw_weights(rng, size, x.is_member)
            parts.append((*_measure(x, curves[s], weights, rates), _count_calls(x, weights)))
        auc.append(np.concatenate([p[0] for p in parts]))
        tpr.append(np.concatenate([p[1] for p in parts]))
        confusion.append(np.concatenate([p[2] for p in parts]))
    return np.stack(auc), np.stack(tpr), confusion


def _is_mixed(x: Scores) -> bool:
    """Whether some block holds members and non-members."""
    _, position = np.unique(x.groups, return_inverse=True)
    share = np.bincount(position, x.is_member) / np.bincount(position)
    return bool(((share > 0) & (share < 1)).any())


def _count_calls(x: Scores, weights: np.ndarray) -> np.ndarray:
    """Weighted (tp, fp, members, non-members) at the threshold: (B, N) -> (B, 4); zeros without a threshold."""
    called = np.zeros(len(x.score), bool) if x.threshold is None else x.score >= x.threshold
    columns = np.stack([called & x.is_member, called & ~x.is_member, x.is_member, ~x.is_member], axis=1)
    return weights @ columns.astype(np.int64)


# --- summary ---------------------------------------------------------------------------------------------------------


def _summarize(
    inputs: list[Scores], *, fprs: Sequence[float], confidence: float, n_bootstrap: int, seed: int
) -> Result:
    fprs = tuple(float(r) for r in fprs)
    if any(not 0 < r < 1 for r in fprs):
        raise ValueError(f"expected false-positive rates in (0, 1), got {fprs}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), got {confidence}")
    if n_bootstrap < 2:
        raise ValueError(f"expected n_bootstrap >= 2, got {n_bootstrap}")
    n_members = [int(x.is_member.sum()) for x in inputs]
    n_nonmembers = [len(x.score) - m for x, m in zip(inputs, n_members, strict=True)]
    fewest = min(n_nonmembers)
    grid = np.unique(np.round(np.geomspace(1, fewest, 100))) / fewest
    rates = np.concatenate([fprs, grid])

    curves = [_make_curves(x) for x in inputs]
    ones = [np.ones((1, len(x.score)), np.int64) for x in inputs]
    points = [_measure(x, c, one, rates) for x, c, one in zip(inputs, curves, ones, strict=True)]
    per_seed = np.array([p[0][0] for p in points])
    auc, tpr = float(per_seed.mean()), np.mean([p[1][0] for p in points], axis=0)

    drawn_auc, drawn_tpr, drawn_calls = _resample(inputs, curves, rates, n_bootstrap, seed)
    grouped = inputs[0].groups is not None
    boot_auc, boot_tpr = _draw_seeds(drawn_auc, drawn_tpr, joint=grouped, seed=seed)

    alpha = 1 - confidence
    low, high = np.nanquantile(boot_auc, [alpha / 2, 1 - alpha / 2])
    units_members = float(np.mean([_count_units(x, x.is_member) for x in inputs]))
    units_nonmembers = float(np.mean([_count_units(x, ~x.is_member) for x in inputs]))
    if min(auc, 1 - auc) * min(units_members, units_nonmembers) < _RARE or low == high:
        score_low, score_high = _invert_variance(auc, units_members, units_nonmembers, confidence)
        low, high = min(low, score_low), max(high, score_high)
    low, high = float(min(low, auc)), float(max(high, auc))

    tpr_low, tpr_high = np.nanquantile(boot_tpr, [alpha / 2, 1 - alpha / 2], axis=0)
    rare = np.minimum(tpr, 1 - tpr) * units_members < _RARE
    wilson = _wilson(tpr, units_members, confidence)
    tpr_low = np.minimum(np.where(rare, np.minimum(tpr_low, wilson[0]), tpr_low), tpr)
    tpr_high = np.maximum(np.where(rare, np.maximum(tpr_high, wilson[1]), tpr_high), tpr)

    def pick(i: int, rate: float) -> Interval | None:
        if fewest < 10 / rate - 1e-9:
            return None  # the rate would rest on fewer than ten false positives
        return Interval(float(tpr[i]), float(tpr_low[i]), float(tpr_high[i]))

    k = len(fprs)
    roc = Roc(grid, tpr[k:], tpr_low[k:], tpr_high[k:])
    return Result(
        auc=auc,
        auc_low=low,
        auc_high=high,
        half_width=(high - low) / 2,
        tpr_at={rate: pick(i, rate) for i, rate in enumerate(fprs)},
        **_judge_threshold(inputs, drawn_calls, confidence=confidence, seed=seed),
        n_members=round(float(np.mean(n_members))),
        n_nonmembers=round(float(np.mean(n_nonmembers))),
        p_value=_compute_p(inputs, per_seed, drawn_auc if grouped else None),
        roc=roc,
        per_seed=tuple(float(a) for a in per_seed),
        inputs=tuple(inputs),
    )


def _draw_seeds(auc: np.ndarray, tpr: np.ndarray, *, joint: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap over seeds, on top of the resamples within each seed: (S, B), (S, B, R) -> (B,), (B, R).

    ``joint``: the b-th resample of all seeds shares its blocks and stays together.
    """
    n_seeds, n_bootstrap = auc.shape
    if n_seeds == 1:
        return auc[0], tpr[0]
    rng = seeds.rng(seed, "metrics.bootstrap", "seeds")
    chosen = rng.integers(0, n_seeds, size=(n_seeds, n_bootstrap))
    # a seed drawn twice brings two different resamples of its images
    row = np.arange(n_bootstrap) if joint else rng.integers(0, n_bootstrap, size=(n_seeds, n_bootstrap))
    return auc[chosen, row].mean(axis=0), tpr[chosen, row].mean(axis=0)


def _count_units(x: Scores, where: np.ndarray) -> int:
    """Independent units among the images: images, or blocks."""
    return int(where.sum()) if x.groups is None else len(np.unique(x.groups[where]))


def _invert_variance(auc: float, n_members: float, n_nonmembers: float, confidence: float) -> tuple[float, float]:
    """Score interval of an AUC: all AUCs t with (auc - t)^2 <= z^2 var(t).

    var(t) = t (1 - t) / (m n) * [1 + (m - 1) (1 - t) / (2 - t) + (n - 1) t / (1 + t)], Hanley and McNeil, Radiology 143
    (1982), Eq. (1) with Q1 = t / (2 - t), Q2 = 2 t^2 / (1 + t). It is not symmetric in the classes: the larger of the
    two orientations is taken.
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


def _wilson(value: np.ndarray | float, n: float, confidence: float) -> tuple[Any, Any]:
    """Wilson (1927) score interval of a proportion; n may be fractional."""
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    center = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)


def _compute_p(inputs: list[Scores], per_seed: np.ndarray, blocks: np.ndarray | None) -> float:
    """Two-sided p-value of the mean AUC against 0.5; ``blocks``: (S, B) AUCs of the joint block bootstrap."""
    distance = abs(float(per_seed.mean()) - 0.5)
    if blocks is not None:
        se = float(np.nanstd(blocks.mean(axis=0)))
        fewest = min(min(_count_units(x, x.is_member), _count_units(x, ~x.is_member)) for x in inputs)
        tail = stats.t(max(fewest - 1, 1)).sf
    else:
        se = float(np.sqrt(sum(_null_variance(x) for x in inputs)) / len(inputs))
        tail = stats.norm.sf
    se *= max(_widen_folds(x) for x in inputs)
    if se == 0:
        return 1.0 if distance == 0 else 0.0
    return float(min(1.0, 2 * tail(distance / se)))


def _widen_folds(x: Scores) -> float:
    """Factor on the standard error of a mean over k cross-fitted folds, whose attackers share most of their images.

    Nadeau and Bengio (Machine Learning 52, 2003): the variance 1/k of a mean over independent folds becomes
    1/k + n_report/n_fit = 1/k + 1/(k - 1). Simulated here with 128 members, 512 non-members and five folds, attackers
    without any signal scatter 1.2 to 1.6 times as much as independent folds would; the factor is 1.5.
    """
    k = 1 if x.folds is None else len(np.unique(x.folds))
    return float(np.sqrt(1 + k / (k - 1))) if k > 1 else 1.0


def _null_variance(x: Scores) -> float:
    """Variance of the fold-averaged AUC when both classes are exchangeable (Mann-Whitney, ties corrected)."""
    folds = np.zeros(len(x.score), int) if x.folds is None else x.folds
    names = np.unique(folds)
    total = 0.0
    for name in names:
        part = folds == name
        n, m = int(part.sum()), int((part & x.is_member).sum())
        _, ties = np.unique(x.score[part], return_counts=True)
        correction = float((ties.astype(float) ** 3 - ties).sum()) / (n * (n - 1))
        total += (n + 1 - correction) / (12 * m * (n - m))
    return total / len(names) ** 2


def _judge_threshold(
    inputs: list[Scores], drawn: list[np.ndarray], *, confidence: float, seed: int
) -> dict[str, float | dict[str, Interval] | None]:
    """Numbers at the threshold given, averaged over seeds.

    One seed of independent images: FPR and TPR with Clopper-Pearson intervals (the threshold is fixed, so both are
    plain proportions). Blocks or several seeds: the bootstrap of the AUC, joined with Wilson where counts are small.
    """
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    if any(x.threshold is None for x in inputs):
        return {**dict.fromkeys(names), "at_threshold": None}
    counts = np.concatenate([_count_calls(x, np.ones((1, len(x.score)), np.int64)) for x in inputs])  # (S, 4)
    tp, fp, m, n = counts.T.astype(float)
    called = tp + fp
    rows = {
        "accuracy": (tp + n - fp) / (m + n),
        "balanced_accuracy": (tp / m + 1 - fp / n) / 2,
        "precision": tp / np.where(called > 0, called, np.nan),
        "recall": tp / m,
        "f1": 2 * tp / (called + m),
    }
    values = {k: None if np.isnan(v).any() else float(v.mean()) for k, v in rows.items()}
    at = {}
    for name, hits, trials in (("fpr", 1, 3), ("tpr", 0, 2)):
        value = float((counts[:, hits] / counts[:, trials]).mean())
        if len(inputs) == 1 and inputs[0].groups is None:
            test = stats.binomtest(int(counts[0, hits]), int(counts[0, trials]))
            low, high = test.proportion_ci(confidence, method="exact")
        else:
            rates = np.stack([d[:, hits] / np.where(d[:, trials] > 0, d[:, trials], np.nan) for d in drawn])
            grouped = inputs[0].groups is not None
            rates, _ = _draw_seeds(rates, rates[:, :, None], joint=grouped, seed=seed)
            low, high = np.nanquantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
            where = [x.is_member if name == "tpr" else ~x.is_member for x in inputs]
            units = float(np.mean([_count_units(x, w) for x, w in zip(inputs, where, strict=True)]))
            if min(value, 1 - value) * units < _RARE:
                wilson = _wilson(value, units, confidence)
                low, high = min(low, wilson[0]), max(high, wilson[1])
        at[name] = Interval(value, float(min(low, value)), float(max(high, value)))
    return {**values, "at_threshold": at}
