"""Random inputs against slow references: pairs, thresholds one by one, every assignment of the sides.

``MIA_INPUTS=1000000 python -m pytest tests/test_random_inputs.py`` draws a million.
"""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
from scipy import stats

from mia_utils.protocol import intervals, metrics, resampling

N_INPUTS = int(os.environ.get("MIA_INPUTS", "10000"))
N_WEIGHTS = 200  # an input is a score, its sides and weights; these share a score, which is evaluated as a whole too
RATES = np.array([0.1, 0.3, 0.55, 1.0])


def draw_input(rng) -> resampling.Scores | None:
    """Few images with many ties, in folds or blocks of one or both sides, from reversed to perfect; None: refused."""
    n, n_folds = int(rng.integers(2, 15)), int(rng.choice([1, 1, 1, 2, 3]))
    n, folds = (n, None) if n_folds == 1 else (n + 6, np.arange(n + 6) % n_folds)
    is_member, groups = rng.permutation(n) < rng.integers(n // 10, n), None
    if folds is None and rng.random() < 0.4:
        groups = rng.integers(0, rng.integers(2, 9), size=n)
        is_member = (rng.random(9) < 0.5)[groups] if rng.random() < 0.6 else is_member
    score = np.round(rng.normal(size=n) + rng.choice([-3, 0, 1, 5]) * is_member, int(rng.integers(0, 3)))
    parts = [is_member] if folds is None else [is_member[folds == f] for f in range(n_folds)]
    usable = all(0 < part.sum() < len(part) for part in parts) and (groups is None or len(np.unique(groups)) > 1)
    try:
        x = resampling.check(score, is_member, float(rng.normal()), groups, folds)
    except ValueError as error:
        assert not usable and "\n" not in str(error)
        return None
    assert usable
    return x


def count_wins(score: np.ndarray, sides: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC (B,) pair by pair: sides and weights (B, n); NaN without one side."""
    wins = (np.sign(score[:, None] - score) + 1) / 2
    pairs = ((sides * weights) @ wins * (~sides * weights)).sum(axis=1)
    n_pairs = (sides * weights).sum(axis=1) * (~sides * weights).sum(axis=1)
    return pairs / np.where(n_pairs > 0, n_pairs, np.nan)


def find_tpr(x: resampling.Scores, weights: np.ndarray) -> np.ndarray:
    """Highest TPR (B, R) of any threshold that holds the false-positive rate."""
    flagged = x.score >= np.append(np.unique(x.score), np.inf)[:, None]  # (T, n)
    tp, fp = weights @ (flagged & x.is_member).T, weights @ (flagged & ~x.is_member).T  # (B, T)
    allowed = fp[:, :, None] <= RATES * fp.max(axis=1)[:, None, None] + 1e-9
    with np.errstate(invalid="ignore"):
        tpr = (tp[:, :, None] * allowed).max(axis=1) / tp.max(axis=1)[:, None]
    return np.where((tp.max(axis=1) * fp.max(axis=1))[:, None] > 0, tpr, np.nan)


def enumerate_p(x: resampling.Scores, auc: float) -> float:
    """Two-sided p over every assignment of the sides to the images, or to the blocks."""
    units = np.arange(len(x.score)) if x.groups is None else x.groups
    ids, m = np.unique(units), len(np.unique(units[x.is_member]))
    sides = np.array([np.isin(units, ids[list(c)]) for c in itertools.combinations(range(len(ids)), m)])
    null = count_wins(x.score, sides, np.ones(len(x.score)))
    return min(1.0, 2 * min(np.mean(null >= auc - 1e-9), np.mean(null <= auc + 1e-9)))


def check_whole(x: resampling.Scores, auc: float) -> None:
    """What ``evaluate`` says of one score with all weights 1."""
    options = {"folds": x.folds, "groups": x.groups, "n_bootstrap": 8}
    got = metrics.evaluate(x.score, x.is_member, threshold=x.threshold, **options)
    assert got.auc == pytest.approx(auc, abs=1e-9) and got.auc_se >= 0 and 0.5 <= got.minimum_detectable <= 1
    assert 0 <= got.auc_low <= got.auc <= got.auc_high <= 1 and 0 < got.p_value <= 1
    assert not (got.p_value > 0.05 and intervals.leaves_half(got.auc_low, got.auc_high))
    intervals.decide(got.auc, got.auc_low, got.auc_high)
    fpr, tpr, low, high = got.roc
    assert all((np.diff(part) >= 0).all() for part in got.roc) and 0 < fpr[0] and fpr[-1] == 1
    assert (low >= 0).all() and (low <= tpr).all() and (tpr <= high).all() and (high <= 1 + 1e-12).all()
    assert all(at is None or 0 <= at.low <= at.value <= at.high <= 1 for at in got.tpr_at.values())
    called = x.score >= x.threshold
    assert got.accuracy == pytest.approx((called == x.is_member).mean())
    n_all = math.comb(sum(x.n_units), x.n_units[0])
    if x.folds is None and not x.is_mixed and n_all < 500:
        assert got.p_value == pytest.approx(enumerate_p(x, auc))
        back = metrics.evaluate(-x.score, x.is_member, **options)
        assert back.auc == pytest.approx(1 - auc) and back.p_value == pytest.approx(got.p_value)
    control = resampling.check(x.score[::-1], x.is_member, None, x.groups, x.folds)
    clear = metrics.clear_of(got, control, n_bootstrap=8)
    assert -1 <= clear.low <= clear.value <= clear.high <= 1 and metrics.clear_of(got, got, n_bootstrap=8) == (0, 0, 0)
    mean = metrics.combine([x, control], n_bootstrap=8)
    assert mean.auc_low <= mean.auc <= mean.auc_high and mean.auc == pytest.approx(np.mean(mean.per_seed))


def test_random_inputs_agree_with_slow_references():
    rng, n_refused = np.random.default_rng(0), 0
    for _ in range(N_INPUTS // N_WEIGHTS):
        x = draw_input(rng)
        if x is None:
            n_refused += N_WEIGHTS
            continue
        weights = rng.integers(0, 4, size=(N_WEIGHTS, len(x.score)))
        weights[0] = 1
        auc, tpr = resampling.measure(x, weights, RATES)
        parts = [count_wins(x.score[f], x.is_member[None, f], weights[:, f]) for f in x.fold_idx]
        usable = np.isfinite(parts).any(axis=0)
        np.testing.assert_allclose(auc[usable], np.nanmean(np.array(parts)[:, usable], axis=0), atol=1e-9)
        assert np.isnan(auc[~usable]).all() and (np.diff(tpr[usable], axis=1) >= -1e-12).all()
        np.testing.assert_allclose(tpr[usable, -1], 1)
        if x.folds is None:
            np.testing.assert_allclose(tpr, find_tpr(x, weights), atol=1e-12)
        check_whole(x, auc[0])
    print(f"{N_INPUTS:,} inputs, {n_refused:,} of them refused (a side or a second block is missing), none wrong")


def test_few_images_get_the_exact_p_of_scipy():
    rng = np.random.default_rng(0)
    for _ in range(40):
        m, n = rng.integers(1, 6, size=2)
        score = rng.normal(size=m + n)
        want = stats.mannwhitneyu(score[:m], score[m:], method="exact").pvalue
        assert metrics.evaluate(score, np.arange(m + n) < m, n_bootstrap=2).p_value == pytest.approx(want)


def test_score_intervals_agree_with_slow_references():
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, 20_001)[1:-1]
    p, q = (1 - grid) / (2 - grid), grid / (1 + grid)
    for _ in range(100):
        m, n = rng.integers(2, 200, size=2)
        hits = int(rng.choice([0, 1, 2, 4, n - 4, n - 1, n])) % (n + 1)
        value = hits / n
        spread = np.maximum((m - 1) * p + (n - 1) * q, (n - 1) * p + (m - 1) * q)
        inside = grid[(value - grid) ** 2 <= stats.norm.ppf(0.975) ** 2 * grid * (1 - grid) / (m * n) * (1 + spread)]
        assert intervals.get_score_interval(value, m, n, 0.95) == pytest.approx((inside[0], inside[-1]), abs=1e-4)
        if min(hits, n - hits) < intervals.RARE:
            ends = metrics._pick_quantiles(np.full((4, 1), value), value, n, 0.95)
            want = stats.binomtest(hits, n).proportion_ci(method="wilson")
            assert np.ravel(ends) == pytest.approx([min(want.low, value), max(want.high, value)], abs=1e-9)
