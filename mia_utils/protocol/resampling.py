"""The weighted ROC of a score, its resamples and the test of AUC 0.5: what the numbers of ``metrics`` rest on.

A bootstrap resample gives every image an integer weight, so AUC and ROC of 1,000 resamples are cumulative sums over
scores that are sorted once. With folds (cross-fitting) each fold's attacker has a ROC of its own and the ROCs are
averaged; scores of different attackers are never ranked against each other.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mia_utils import seeds

_CHUNK = 400_000  # resampled weights held in memory at once
_FEW_BLOCKS = 10  # of the rarer side: below, the test permutes blocks instead of resampling them
_N_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Scores:
    """Checked scores of one attack on one model; ``fitted``: the attackers of the folds were trained."""

    score: np.ndarray
    is_member: np.ndarray
    threshold: np.ndarray | None = None
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None
    fitted: bool = True

    @property
    def fold_idx(self) -> list[np.ndarray]:
        """Positions of the images of every fold."""
        folds = np.zeros(len(self.score)) if self.folds is None else self.folds
        return [np.flatnonzero(folds == name) for name in np.unique(folds)]

    def count_units(self) -> tuple[int, int]:
        """Count the independent units (images, or blocks) of members and of non-members."""
        units = np.arange(len(self.score)) if self.groups is None else self.groups
        return len(np.unique(units[self.is_member])), len(np.unique(units[~self.is_member]))

    def is_mixed(self) -> bool:
        """Tell whether some block holds members and non-members."""
        return self.groups is not None and sum(self.count_units()) > len(np.unique(self.groups))


def check(
    score: Any, is_member: Any, threshold: Any = None, groups: Any = None, folds: Any = None, fitted: bool = True
) -> Scores:
    """Check the arguments of ``metrics.evaluate``; raises ValueError with what was expected and what came."""
    score, is_member = np.asarray(score, dtype=np.float64), np.asarray(is_member)
    if score.ndim != 1 or is_member.shape != score.shape:
        raise ValueError(f"expected score and is_member of one shape (N,), got {score.shape} and {is_member.shape}")
    if bad := int((~np.isfinite(score)).sum()):
        raise ValueError(f"expected finite scores, got {bad} NaN or infinite of {len(score)}")
    if is_member.dtype != bool and not np.isin(is_member, (0, 1)).all():
        raise ValueError("expected is_member as bool or 0/1, got other values")
    is_member = is_member.astype(bool)
    groups, folds = (None if x is None else np.asarray(x) for x in (groups, folds))
    for name, x in (("groups", groups), ("folds", folds)):
        if x is not None and x.shape != score.shape:
            raise ValueError(f"expected {name} of shape {score.shape}, got {x.shape}")
    if threshold is not None:
        threshold = np.asarray(threshold, dtype=np.float64)
        if threshold.shape not in ((), score.shape) or np.isnan(threshold).any():
            raise ValueError(f"expected threshold as a number or (N,) without NaN, got shape {threshold.shape}")
        threshold = np.broadcast_to(threshold, score.shape)
    x = Scores(score, is_member, threshold, groups, folds, bool(fitted))
    for where in x.fold_idx or [np.arange(0)]:
        n, m = len(where), int(is_member[where].sum())
        if not 0 < m < n:
            place = "" if folds is None else f" in fold {folds[where[0]]}"
            raise ValueError(f"expected members and non-members{place}, got {m} members and {n - m} non-members")
    if groups is not None and len(np.unique(groups)) < 2:
        raise ValueError("expected at least 2 blocks in groups, got 1: nothing is left to resample")
    return x


# --- weighted ROC ----------------------------------------------------------------------------------------------------


class Curve:
    """The scores of one fold, sorted descending once; ties are one step."""

    def __init__(self, score: np.ndarray, is_member: np.ndarray, where: np.ndarray) -> None:
        self.columns = where[np.argsort(-score[where], kind="stable")]
        ranked = score[self.columns]
        self.is_member = is_member[self.columns]
        self.ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last position of every tie

    def count(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative weight of members and of non-members at the end of every tie: (B, N) -> two (B, G) int64."""
        w = weights.take(self.columns, axis=1)
        members = np.cumsum(w * self.is_member, axis=1, dtype=w.dtype).take(self.ends, axis=1).astype(np.int64)
        everyone = np.cumsum(w, axis=1, out=w).take(self.ends, axis=1).astype(np.int64)
        return members, everyone - members


def make_curves(x: Scores) -> list[Curve]:
    """Sort the scores of every fold."""
    return [Curve(x.score, x.is_member, where) for where in x.fold_idx]


def measure(curves: list[Curve], weights: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure AUC (B,) and TPR (B, R) of weighted images, averaged over folds.

    Ties are passed as a whole and the share of false positives never exceeds the rate, so the ROC is a step function.

    Args:
        weights: (B, N) int weights of the images.
        rates: (R,) false-positive rates; none: only the AUC is computed.

    Returns:
        auc and tpr; a fold that a resample left without a class is skipped in that resample.
    """
    counts = [curve.count(weights) for curve in curves]
    n_fp = np.stack([fp[:, -1] for _, fp in counts], axis=1)  # (B, F)
    n_tp = np.stack([tp[:, -1] for tp, _ in counts], axis=1)
    auc = np.stack([_sum_ranks(tp, fp) for tp, fp in counts], axis=1) / np.maximum(n_fp * n_tp, 1)
    tpr = np.empty((*n_fp.shape, len(rates)))
    budget = _share_budget(n_fp, rates) if len(rates) else None
    for f, (tp, fp) in enumerate(counts if len(rates) else ()):
        tpr[:, f] = _count_hits(tp, fp, budget[:, f], len(counts)) / np.maximum(n_tp[:, f, None], 1)
    usable = (n_fp > 0) & (n_tp > 0)
    auc[~usable], tpr[~usable] = np.nan, np.nan
    n_usable = np.where(usable.any(axis=1), usable.sum(axis=1), np.nan)
    return np.nansum(auc, axis=1) / n_usable, np.nansum(tpr, axis=1) / n_usable[:, None]


def _sum_ranks(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    """Mann-Whitney's U: every non-member meets the members above it, and half of those it ties with."""
    above = tp.copy()
    above[:, 1:] += tp[:, :-1]
    return 0.5 * np.einsum("bg,bg->b", above, np.diff(fp, axis=1, prepend=0))


def _count_hits(tp: np.ndarray, fp: np.ndarray, budget: np.ndarray, n_folds: int) -> np.ndarray:
    """Members above the last step whose false positives stay within the budget: (B, G), (B, G), (B, R) -> (B, R)."""
    n_draws, n_steps = fp.shape
    row = np.arange(n_draws, dtype=np.int64)[:, None]
    offset = row * (int(fp[:, -1].max()) + 1)  # makes the rows disjoint, so that one search serves all
    flat = (fp + offset).ravel()
    taken = np.searchsorted(flat, (budget + offset).ravel(), side="right").reshape(budget.shape) - row * n_steps
    hits = np.pad(tp, ((0, 0), (1, 0)))
    found = np.take_along_axis(hits, taken, axis=1).astype(np.float64)
    if n_folds > 1:
        # Members between the last non-member allowed and the next one: the threshold may lie anywhere in that gap.
        # One ROC counts them all, as usual; F curves that all did would make F gaps' worth of false positives
        # unseen (measured: TPR .114 for a true .092 at 1 % of 5 x 200), so together they count one gap.
        spent = np.take_along_axis(np.pad(fp, ((0, 0), (1, 0))), taken, axis=1)
        last = np.searchsorted(flat, (spent + offset).ravel(), side="left").reshape(taken.shape) - row * n_steps + 1
        sure = np.take_along_axis(hits, np.minimum(last, taken), axis=1)
        found -= np.where(spent > 0, (found - sure) * (1 - 1 / n_folds), 0)
    return found


def _share_budget(n_nonmembers: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """False positives each fold may make: (B, F), (R,) -> (B, F, R) int, in all at most rate * non-members."""
    exact = n_nonmembers[:, :, None] * rates + 1e-9  # 0.1 * 30 must count as 3
    budget = np.floor(exact).astype(np.int64)
    if n_nonmembers.shape[1] > 1:  # what is left over goes to the largest remainders
        left = np.floor(n_nonmembers.sum(axis=1)[:, None] * rates + 1e-9).astype(np.int64) - budget.sum(axis=1)
        rank = np.argsort(np.argsort(budget - exact, axis=1, kind="stable"), axis=1, kind="stable")
        budget = np.minimum(budget + (rank < left[:, None, :]), n_nonmembers[:, :, None])
    return budget


# --- resampling ------------------------------------------------------------------------------------------------------


def _draw_weights(rng: np.random.Generator, n_draws: int, strata: np.ndarray) -> np.ndarray:
    """Weights of a stratified bootstrap: (n_draws, N) int, the number of units of every stratum kept."""
    weights = np.empty((n_draws, len(strata)), np.int32)  # half the memory: their sums are counts of images
    for stratum in np.unique(strata):
        where = np.flatnonzero(strata == stratum)
        n = len(where)
        drawn = rng.integers(0, n, size=(n_draws, n), dtype=np.int32)
        drawn += (np.arange(n_draws, dtype=np.int32) * np.int32(n))[:, None]
        weights[:, where] = np.bincount(drawn.ravel(), minlength=n_draws * n).reshape(n_draws, n)
    return weights


def resample(
    inputs: list[Scores], rates: np.ndarray, n_bootstrap: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resample images, or blocks by id jointly over the models.

    The streams depend on the seed, sides and blocks only: two scores of the same images get the same resamples.

    Returns:
        auc (S, B), tpr (S, B, R), and counts at the threshold (S, B, 4): tp, fp, members, non-members.
    """
    step = max(1, _CHUNK // max(len(x.score) for x in inputs))
    sizes = [min(step, n_bootstrap - start) for start in range(0, n_bootstrap, step)]
    if grouped := inputs[0].groups is not None:
        ids, where = np.unique(np.concatenate([x.groups for x in inputs]), return_inverse=True)
        where = np.split(where, np.cumsum([len(x.score) for x in inputs])[:-1])
        strata = np.zeros(len(ids), int)
        if len(inputs) == 1 and not inputs[0].is_mixed():
            # one model: both classes keep their number of blocks; over several a block may change sides
            strata[where[0]] = inputs[0].is_member
        rng = seeds.rng(seed, "metrics.bootstrap", "blocks")
        drawn = [_draw_weights(rng, size, strata) for size in sizes]
    found = []
    for s, x in enumerate(inputs):
        rng, curves, parts = seeds.rng(seed, "metrics.bootstrap", s), make_curves(x), []
        for i, size in enumerate(sizes):
            weights = drawn[i][:, where[s]] if grouped else _draw_weights(rng, size, x.is_member)
            parts.append((*measure(curves, weights, rates), count_calls(x, weights)))
        found.append([np.concatenate(p) for p in zip(*parts, strict=True)])
    return tuple(np.stack(p) for p in zip(*found, strict=True))


def count_calls(x: Scores, weights: np.ndarray) -> np.ndarray:
    """Weighted (tp, fp, members, non-members) at the threshold: (B, N) -> (B, 4); zeros without a threshold."""
    if x.threshold is None:
        return np.zeros((len(weights), 4))
    called = x.score >= x.threshold
    columns = np.stack([called & x.is_member, called & ~x.is_member, x.is_member, ~x.is_member], axis=1)
    return weights.astype(np.float64) @ columns


# --- the test of AUC 0.5 ---------------------------------------------------------------------------------------------


class NullTest(NamedTuple):
    """Two-sided test of AUC 0.5: p, the standard error and degrees of freedom behind it, the smallest p it can give."""

    p: float
    se: float
    dof: float = np.inf
    floor: float = 0.0


def test_half(inputs: list[Scores], per_seed: np.ndarray, drawn: np.ndarray, *, widen: float, seed: int) -> NullTest:
    """Test the mean AUC against 0.5, the splits of several trainings taken as independent draws.

    Images: normal with the exact permutation variance of the Mann-Whitney statistic with ties (Lehmann, Nonparametrics,
    1975), averaged over folds. Blocks: Student's t on the joint block bootstrap, (blocks of the rarer side - 1) degrees
    of freedom. Few images, blocks or distinct scores: random assignment of the sides, each once where they are few.

    Args:
        per_seed, drawn: AUCs (S,) and those of the resamples (S, B).
        widen: factor on the standard error.
        seed: seed of the private stream.
    """
    distance = float(per_seed.mean()) - 0.5
    fewest = min(min(x.count_units()) for x in inputs)
    dof, floor = np.inf, 0.0
    if inputs[0].groups is None:
        pulls, variances = zip(*(_measure_null(x) for x in inputs), strict=True)
        se, few = widen * float(np.sqrt(sum(variances))) / len(inputs), max(pulls) > 0.25  # half a standard error
    else:
        se = widen * float(np.nanstd(drawn.mean(axis=0)))
        few = fewest < _FEW_BLOCKS and not any(x.is_mixed() for x in inputs)
        # blocks that hold both sides: were each as likely to turn the AUC up as down, p could not be smaller than this
        dof, floor = max(fewest - 1, 1), 2.0 ** (1 - min(len(np.unique(x.groups)) for x in inputs))
    if not few:
        p = 2 * float(stats.t.sf(abs(distance) / se, dof)) if se else float(distance == 0)
        return NullTest(min(1.0, max(p, floor)), se, dof, floor)
    sides = [s if x.groups is None else dict(zip(x.groups, x.is_member, strict=True)) for s, x in enumerate(inputs)]
    shared = all(side == sides[0] for side in sides)  # one split of the blocks for all trainings: permuted jointly
    rngs = [seeds.rng(seed, "metrics.permute", 0 if shared else s) for s in range(len(inputs))]
    complete = len(inputs) == 1
    null = [permute(x, _N_PERMUTATIONS, rng, complete=complete) for x, rng in zip(inputs, rngs, strict=True)]
    null = widen * (np.mean(null, axis=0) - 0.5)
    p = min(1.0, 2 * min(count_tails(null, distance, _N_PERMUTATIONS)))
    return NullTest(p, float(null.std()), floor=min(1.0, 2 / (len(null) + (len(null) == _N_PERMUTATIONS))))


def _measure_null(x: Scores) -> tuple[float, float]:
    """What a single image can do to the AUC (squared, over the variance), and the variance, if the sides are random."""
    pull = variance = 0.0
    for where in x.fold_idx:
        n, m = len(where), int(x.is_member[where].sum())
        away = stats.rankdata(x.score[where]) - (n + 1) / 2
        variance += float(away @ away) / (n * (n - 1) * m * (n - m))  # of the rank sum, over (m (n - m))^2
        pull = max(pull, float(np.abs(away).max()) / (m * (n - m)))
    return pull**2 / variance if variance else 0.0, variance / len(x.fold_idx) ** 2


def permute(x: Scores, n_draws: int, rng: np.random.Generator, *, complete: bool) -> np.ndarray:
    """Assign the sides anew to the units (images, or blocks of one side) of every fold: AUCs (B,).

    ``complete``: where a single fold has at most ``n_draws`` assignments, each of them is taken once.
    """
    total, parts = 0.0, x.fold_idx
    for where in parts:
        groups = where if x.groups is None else x.groups[where]
        _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
        n_units, n_sides = len(first), int(x.is_member[where][first].sum())
        size, rank = np.bincount(unit), np.bincount(unit, stats.rankdata(x.score[where]))
        if complete and len(parts) == 1 and math.comb(n_units, n_sides) <= n_draws:
            side = np.zeros((math.comb(n_units, n_sides), n_units))
            np.put_along_axis(side, np.array(list(itertools.combinations(range(n_units), n_sides))), 1, axis=1)
        else:
            side = np.zeros((n_draws, n_units))
            order = np.argpartition(rng.random(side.shape), n_sides - 1, axis=1)[:, :n_sides]
            np.put_along_axis(side, order, 1, axis=1)
        n_members = side @ size
        total = total + (side @ rank - n_members * (n_members + 1) / 2) / (n_members * (len(where) - n_members))
    return total / len(parts)


def count_tails(null: np.ndarray, value: float, n_draws: int) -> tuple[float, float]:
    """Permutation p-values (higher, lower): (1 + as extreme) / (1 + draws), Phipson and Smyth (2010).

    Fewer than ``n_draws`` were all there are, and the observed assignment is among them.
    """
    extra = int(len(null) == n_draws)
    higher, lower = (null >= value - 1e-9).sum(), (null <= value + 1e-9).sum()
    return float(higher + extra) / (len(null) + extra), float(lower + extra) / (len(null) + extra)
