"""The weighted ROC of a score, its resamples and the test of AUC 0.5: what the numbers of ``metrics`` rest on.

A resample gives every image an integer weight, so AUC and ROC of 1,000 resamples are cumulative sums over scores that
are sorted once. With folds (cross-fitting) the ROCs of the folds are averaged: different attackers are never ranked
against each other.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mia_utils import seeds
from mia_utils.protocol import intervals

_CHUNK = 400_000  # resampled weights held in memory at once
_FEW_BLOCKS = 10  # of the rarer side: below, the test permutes blocks instead of resampling them
_N_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Scores:
    """Checked scores of one attack on one model, arrays (N,)."""

    score: np.ndarray
    is_member: np.ndarray
    threshold: np.ndarray | None = None
    groups: np.ndarray | None = None
    folds: np.ndarray | None = None

    @cached_property
    def fold_idx(self) -> list[np.ndarray]:
        """Positions of the images of every fold."""
        folds = np.zeros(len(self.score)) if self.folds is None else self.folds
        return [np.flatnonzero(folds == name) for name in np.unique(folds)]

    @cached_property
    def rankings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every fold the positions by descending score (n,), and the last place of every tie (G,)."""
        found = []
        for where in self.fold_idx:
            columns = where[np.argsort(-self.score[where], kind="stable")]
            ranked = self.score[columns]
            found.append((columns, np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))))
        return found

    @cached_property
    def n_units(self) -> tuple[int, int]:
        """Number of independent units (images, or blocks) of members and of non-members."""
        units = np.arange(len(self.score)) if self.groups is None else self.groups
        return len(np.unique(units[self.is_member])), len(np.unique(units[~self.is_member]))

    @property
    def is_mixed(self) -> bool:
        """Whether some block holds members and non-members."""
        return self.groups is not None and sum(self.n_units) > len(np.unique(self.groups))

    @property
    def widen(self) -> float:
        """Factor on the standard error of the AUC: folds that share images, few blocks."""
        few = 1.0 if self.groups is None else intervals.widen_blocks(min(self.n_units))
        return intervals.widen_folds(len(self.fold_idx)) * few


def check(score: Any, is_member: Any, threshold: Any = None, groups: Any = None, folds: Any = None) -> Scores:
    """Check the arguments of ``metrics.evaluate``; raises ValueError with what was expected and what came."""

    def expect(holds: Any, what: str) -> None:
        if not holds:
            raise ValueError(f"expected {what}")

    score, is_member = np.asarray(score, dtype=np.float64), np.asarray(is_member)
    shapes = f"got {score.shape} and {is_member.shape}"
    expect(score.ndim == 1 and is_member.shape == score.shape, f"score and is_member of one shape (N,), {shapes}")
    bad = int((~np.isfinite(score)).sum())
    expect(not bad, f"finite scores, got {bad} NaN or infinite of {len(score)}")
    expect(np.isin(is_member, (0, 1)).all(), "is_member as bool or 0/1, got other values")
    is_member = is_member.astype(bool)
    if threshold is not None:
        threshold = np.asarray(threshold, dtype=np.float64)
        usable = threshold.shape in ((), score.shape) and not np.isnan(threshold).any()
        expect(usable, f"threshold as a number or (N,) without NaN, got shape {threshold.shape}")
        threshold = np.broadcast_to(threshold, score.shape)
    groups, folds = (None if x is None else np.asarray(x) for x in (groups, folds))
    for name, x in (("groups", groups), ("folds", folds)):
        expect(x is None or x.shape == score.shape, f"{name} of shape {score.shape}, got {np.shape(x)}")
    x = Scores(score, is_member, threshold, groups, folds)
    for where in x.fold_idx or [np.arange(0)]:
        n, m = len(where), int(is_member[where].sum())
        place = "" if folds is None else f" in fold {', '.join(map(str, np.unique(folds[where])))}"
        expect(0 < m < n, f"members and non-members{place}, got {m} members and {n - m} non-members")
    expect(groups is None or len(np.unique(groups)) > 1, "at least 2 blocks in groups, got 1: nothing to resample")
    return x


def measure(x: Scores, weights: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure AUC (B,) and TPR (B, R) of images with int weights (B, N) at false-positive rates (R,), over folds.

    Ties are passed as a whole and the share of false positives never exceeds the rate, so the ROC is a step function.
    A fold that a resample left without a class is skipped in that resample.
    """
    counts = [_accumulate(weights.take(columns, axis=1), x.is_member[columns], ends) for columns, ends in x.rankings]
    n_fp = np.stack([fp[:, -1] for _, fp in counts], axis=1)  # (B, F)
    n_tp = np.stack([tp[:, -1] for tp, _ in counts], axis=1)
    auc = np.stack([_sum_ranks(tp, fp) for tp, fp in counts], axis=1) / np.maximum(n_fp * n_tp, 1)
    tpr = np.empty((*n_fp.shape, len(rates)))
    if len(rates):
        budget = _share_budget(n_fp, rates)
        for f, (tp, fp) in enumerate(counts):
            tpr[:, f] = _count_hits(tp, fp, budget[:, f], len(counts)) / np.maximum(n_tp[:, f, None], 1)
    usable = (n_fp > 0) & (n_tp > 0)
    auc[~usable], tpr[~usable] = np.nan, np.nan
    n_usable = np.where(usable.any(axis=1), usable.sum(axis=1), np.nan)
    return np.nansum(auc, axis=1) / n_usable, np.nansum(tpr, axis=1) / n_usable[:, None]


def measure_all(inputs: list[Scores], rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs (S,) and TPRs (S, R) of the scores themselves."""
    found = [measure(x, np.ones((1, len(x.score)), np.int64), rates) for x in inputs]
    return np.array([auc[0] for auc, _ in found]), np.array([tpr[0] for _, tpr in found])


def _accumulate(w: np.ndarray, is_member: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative weight of members and of non-members at the end of every tie: (B, n) -> two (B, G) int64."""
    members = np.cumsum(w * is_member, axis=1, dtype=w.dtype).take(ends, axis=1).astype(np.int64)
    everyone = np.cumsum(w, axis=1, out=w).take(ends, axis=1).astype(np.int64)
    return members, everyone - members


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
        in_gap = (spent > 0) & (spent < fp[:, -1:])  # below the last non-member nothing is left to hold out for
        found -= np.where(in_gap, (found - sure) * (1 - 1 / n_folds), 0)
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


def resample(inputs: list[Scores], rates: np.ndarray, n_bootstrap: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Resample images, or blocks by id jointly over the models: AUC (S, B), TPR (S, B, R).

    The streams depend on the seed, sides and blocks only: two scores of the same images get the same resamples.
    """
    step = max(1, _CHUNK // max(len(x.score) for x in inputs))
    sizes = [min(step, n_bootstrap - start) for start in range(0, n_bootstrap, step)]
    if grouped := inputs[0].groups is not None:
        ids, where = np.unique(np.concatenate([x.groups for x in inputs]), return_inverse=True)
        where = np.split(where, np.cumsum([len(x.score) for x in inputs])[:-1])
        strata = np.zeros(len(ids), int)
        if len(inputs) == 1 and not inputs[0].is_mixed:
            # one model: both classes keep their number of blocks; over several a block may change sides
            strata[where[0]] = inputs[0].is_member
        rng = seeds.rng(seed, "metrics.bootstrap", "blocks")
        drawn = [_draw_weights(rng, size, strata) for size in sizes]
    found = []
    for s, x in enumerate(inputs):
        rng, parts = seeds.rng(seed, "metrics.bootstrap", s), []
        for i, size in enumerate(sizes):
            weights = drawn[i][:, where[s]] if grouped else _draw_weights(rng, size, x.is_member)
            parts.append(measure(x, weights, rates))
        found.append([np.concatenate(p) for p in zip(*parts, strict=True)])
    auc, tpr = (np.stack(p) for p in zip(*found, strict=True))
    return auc, tpr


class NullTest(NamedTuple):
    """Two-sided test of AUC 0.5: p, the standard error and the degrees of freedom behind it."""

    p: float
    se: float
    dof: float = np.inf


def test_half(inputs: list[Scores], per_seed: np.ndarray, drawn: np.ndarray, *, seed: int) -> NullTest:
    """Test the mean of AUCs (S,) against 0.5; ``drawn``: (S, B) of their resamples.

    Images: normal with the exact permutation variance of the Mann-Whitney statistic with ties (Lehmann, Nonparametrics,
    1975), averaged over folds. Blocks: Student's t on the joint block bootstrap, (blocks of the rarer side - 1) degrees
    of freedom. Few images, blocks or distinct scores: random assignment of the sides, each once where they are few.
    The splits of several trainings are taken as independent draws.
    """
    distance = float(per_seed.mean()) - 0.5
    fewest = min(min(x.n_units) for x in inputs)
    widen, dof, floor = max(intervals.widen_folds(len(x.fold_idx)) for x in inputs), np.inf, 0.0
    if inputs[0].groups is None:
        pulls, variances = zip(*map(_measure_null, inputs), strict=True)
        se, few = widen * float(np.sqrt(sum(variances))) / len(inputs), max(pulls) > 0.25  # half a standard error
    else:
        se = widen * float(np.nanstd(drawn.mean(axis=0)))
        few = fewest < _FEW_BLOCKS and not any(x.is_mixed for x in inputs)
        # blocks that hold both sides: were each as likely to turn the AUC up as down, p could not be smaller than this
        dof, floor = max(fewest - 1, 1), 2.0 ** (1 - min(len(np.unique(x.groups)) for x in inputs))
    if not few:
        p = 2 * float(stats.t.sf(abs(distance) / se, dof)) if se else float(distance == 0)
        return NullTest(min(1.0, max(p, floor)), se, dof)
    sides = [s if x.groups is None else dict(zip(x.groups, x.is_member, strict=True)) for s, x in enumerate(inputs)]
    shared = all(side == sides[0] for side in sides)  # one split of the blocks for all trainings: permuted jointly
    rngs = [seeds.rng(seed, "metrics.permute", 0 if shared else s) for s in range(len(inputs))]
    complete = len(inputs) == 1 and len(inputs[0].fold_idx) == 1
    null = [_permute(x, rng, complete=complete) for x, rng in zip(inputs, rngs, strict=True)]
    null = widen * (np.mean(null, axis=0) - 0.5)
    # (1 + as extreme) / (1 + draws), Phipson and Smyth (2010); a complete set holds the observed assignment itself
    extra = int(len(null) == _N_PERMUTATIONS)
    tail = min((null >= distance - 1e-9).sum(), (null <= distance + 1e-9).sum())
    p = min(1.0, 2 * (float(tail + extra) / (len(null) + extra)))
    return NullTest(p, float(null.std()))


def _measure_null(x: Scores) -> tuple[float, float]:
    """What a single image can do to the AUC (squared, over the variance), and the variance, if the sides are random."""
    pull = variance = 0.0
    for where in x.fold_idx:
        n, m = len(where), int(x.is_member[where].sum())
        away = stats.rankdata(x.score[where]) - (n + 1) / 2
        variance += float(away @ away) / (n * (n - 1) * m * (n - m))  # of the rank sum, over (m (n - m))^2
        pull = max(pull, float(np.abs(away).max()) / (m * (n - m)))
    return pull**2 / variance if variance else 0.0, variance / len(x.fold_idx) ** 2


def _permute(x: Scores, rng: np.random.Generator, *, complete: bool) -> np.ndarray:
    """Assign the sides anew to the units (images, or blocks of one side) of every fold: AUCs (B,).

    ``complete`` (a single fold): where there are few assignments, each of them is taken once.
    """
    total, parts = 0.0, x.fold_idx
    for where in parts:
        groups = where if x.groups is None else x.groups[where]
        _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
        n_units, n_sides = len(first), int(x.is_member[where][first].sum())
        size, rank = np.bincount(unit), np.bincount(unit, stats.rankdata(x.score[where]))
        n_all = math.comb(n_units, n_sides)
        every = itertools.combinations(range(n_units), n_sides) if complete and n_all <= _N_PERMUTATIONS else None
        n_draws, step = _N_PERMUTATIONS if every is None else n_all, max(1, _CHUNK // n_units)
        found = []
        for n in [min(step, n_draws - start) for start in range(0, n_draws, step)]:
            if every is None:
                chosen = np.argpartition(rng.random((n, n_units)), n_sides - 1, axis=1)[:, :n_sides]
            else:
                chosen = np.array(list(itertools.islice(every, n)))
            side = np.zeros((n, n_units))
            np.put_along_axis(side, chosen, 1, axis=1)
            n_members = side @ size
            wins = side @ rank - n_members * (n_members + 1) / 2
            found.append(wins / (n_members * (len(where) - n_members)))
        total = total + np.concatenate(found)
    return total / len(parts)
