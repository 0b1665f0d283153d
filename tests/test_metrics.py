"""metrics: the weighted ROC against scikit-learn and a naive bootstrap, p-values, thresholds, trainings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from mia_utils.protocol import metrics, resampling


def make_scores(n_members=60, n_nonmembers=200, *, shift=1.0, seed=0, digits=None):
    rng = np.random.default_rng(seed)
    is_member = rng.permutation(np.arange(n_members + n_nonmembers) < n_members)
    score = rng.normal(size=len(is_member)) + shift * is_member
    return (score if digits is None else np.round(score, digits)), is_member


@pytest.mark.parametrize("digits", [None, 0])
def test_weighted_roc_matches_sklearn(digits):
    score, is_member = make_scores(digits=digits)
    weights = np.random.default_rng(1).integers(0, 4, size=(7, len(score)))
    auc, tpr = resampling.measure(resampling.check(score, is_member), weights, np.array([0.05, 0.3]))
    for b, w in enumerate(weights):
        assert auc[b] == pytest.approx(roc_auc_score(is_member, score, sample_weight=w), abs=1e-12)
        fpr, hits, _ = roc_curve(is_member, score, sample_weight=w, drop_intermediate=False)
        assert tpr[b] == pytest.approx([hits[fpr <= rate + 1e-12].max() for rate in (0.05, 0.3)])


def test_interval_matches_a_naive_bootstrap():
    score, is_member = make_scores(40, 80)
    rng, members, others = np.random.default_rng(3), np.flatnonzero(is_member), np.flatnonzero(~is_member)
    naive = []
    for _ in range(2000):
        m, n = score[rng.choice(members, len(members))], score[rng.choice(others, len(others))]
        naive.append(np.mean(m[:, None] > n))
    got = metrics.evaluate(score, is_member, n_bootstrap=2000)
    # Monte-Carlo error of a 2.5 % quantile of 2,000 draws with sd .045: about .003
    assert (got.auc_low, got.auc_high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.012)
    assert got.auc == pytest.approx(roc_auc_score(is_member, score))


def test_folds_are_averaged_and_never_pooled():
    score, is_member = make_scores(100, 400, shift=2.0)
    folds = np.arange(500) % 5
    score = score + 100.0 * folds  # each attacker on a scale of its own
    got = metrics.evaluate(score, is_member, folds=folds, n_bootstrap=200)
    each = [roc_auc_score(is_member[folds == f], score[folds == f]) for f in range(5)]
    assert got.auc == pytest.approx(np.mean(each))
    assert got.auc_low < got.auc < got.auc_high
    assert got.auc - roc_auc_score(is_member, score) > 0.2  # what pooling would have said
    # each fold alone cannot hold a false positive at 1 %, the five together may make four
    assert resampling._share_budget(np.full((1, 5), 80), np.array([0.01])).sum() == 4


def test_roc_grid_is_monotone_and_brackets_the_curve():
    got = metrics.evaluate(*make_scores(100, 500), folds=np.arange(600) % 3, n_bootstrap=200)
    assert got.roc.fpr[0] == pytest.approx(1 / 500) and got.roc.fpr[-1] == 1
    assert (np.diff(got.roc.tpr) >= 0).all() and got.roc.tpr[-1] == pytest.approx(1)
    assert (got.roc.low <= got.roc.tpr).all() and (got.roc.tpr <= got.roc.high).all()


def test_tpr_is_hidden_where_nonmembers_are_few():
    got = metrics.evaluate(*make_scores(50, 999), n_bootstrap=50)
    assert got.tpr_at[0.1] is not None and got.tpr_at[0.01] is None and got.tpr_at[0.001] is None
    got = metrics.evaluate(*make_scores(50, 1000), n_bootstrap=50)
    assert got.tpr_at[0.01] is not None


def test_ties_never_exceed_the_false_positive_rate():
    is_member = np.r_[np.ones(50, bool), np.zeros(200, bool)]
    score = np.r_[np.ones(50), np.ones(30), np.zeros(170)]  # 15 % of non-members tie with every member
    _, tpr = resampling.measure_all([resampling.check(score, is_member)], np.array([0.1, 0.2]))
    assert tpr.tolist() == [[0, 1]]  # letting part of the tie through would claim a detection nobody can make


@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_separation_has_an_honest_interval(sign):
    is_member = np.r_[np.ones(60, bool), np.zeros(300, bool)]
    got = metrics.evaluate(sign * np.r_[np.full(60, 2.0), np.zeros(300)], is_member, n_bootstrap=100)
    low, high = (got.auc_low, got.auc_high) if sign > 0 else (1 - got.auc_high, 1 - got.auc_low)
    assert high == 1 and 0.9 < low < 0.99
    tpr = got.tpr_at[0.1]
    assert tpr.low < tpr.high and (tpr.low, tpr.high) != (tpr.value, tpr.value)
    assert got.p_value < 1e-6


def test_constant_scores_say_nothing():
    got = metrics.evaluate(np.zeros(100), np.arange(100) < 50, n_bootstrap=50)
    assert got.auc == 0.5 and got.p_value == 1 and got.auc_low < 0.45 and got.auc_high > 0.55


def test_tpr_coverage():
    rate, held = 0.1, []
    truth = stats.norm.sf(stats.norm.isf(rate) - 1)
    for i in range(100):
        options = {"folds": np.arange(360) % 3, "n_bootstrap": 100, "seed": i}
        got = metrics.evaluate(*make_scores(60, 300, seed=i), **options).tpr_at[rate]
        held.append(got.low <= truth <= got.high)
    # nominal .95; three standard errors of 100 simulations are .065, and the percentile bootstrap may lose .03
    assert np.mean(held) > 0.855


@pytest.mark.parametrize("blocks", [False, True])
def test_p_values_are_uniform_under_the_null(blocks):
    rng, p = np.random.default_rng(5), []
    for i in range(200):
        if blocks:  # frames of a block share a level: frame-level tests would reject far too often
            groups = np.repeat(np.arange(40), 6)
            score = rng.normal(size=40)[groups] + 0.5 * rng.normal(size=240)
            p.append(metrics.evaluate(score, groups < 20, groups=groups, n_bootstrap=100, seed=i).p_value)
        else:
            score = np.round(rng.normal(size=240), 1)
            p.append(metrics.evaluate(score, np.arange(240) % 4 == 0, n_bootstrap=2).p_value)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert 0.005 <= np.mean(np.array(p) < 0.05) <= 0.11  # binomial band of 200 draws at .05, four standard errors


def test_p_values_hold_for_cross_fitted_attackers_without_any_signal():
    """Folds that share fit images scatter together; taken as independent they would reject about one time in six."""
    rng, p, naive = np.random.default_rng(8), [], []
    for _ in range(100):
        features, label = rng.normal(size=(320, 12)), rng.permutation(np.arange(320) % 5 == 0)
        order = np.concatenate([rng.permutation(np.flatnonzero(label == c)) for c in (True, False)])
        fold = np.empty(320, int)
        fold[order] = np.arange(320) % 5
        score = np.empty(320)
        for f in range(5):
            fit = fold != f
            direction = features[fit & label].mean(0) - features[fit & ~label].mean(0)
            score[fold == f] = features[fold == f] @ direction
        p.append(metrics.evaluate(score, label, folds=fold, n_bootstrap=2).p_value)
        aucs = [roc_auc_score(label[fold == f], score[fold == f]) for f in range(5)]
        naive.append(abs(np.mean(aucs) - 0.5) / np.sqrt((65) / (12 * 13 * 51) / 5) > 1.96)
    assert np.mean(naive) > 0.1
    assert np.mean(np.array(p) < 0.05) <= 0.12 and np.mean(np.array(p) < 0.5) >= 0.2


def test_blocks_widen_the_interval():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(40), 8)
    score = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=320) + 0.5 * (groups < 20)
    by_frame = metrics.evaluate(score, groups < 20, n_bootstrap=300)
    by_block = metrics.evaluate(score, groups < 20, groups=groups, n_bootstrap=300)
    assert by_block.auc == by_frame.auc and by_block.auc_se > 2 * by_frame.auc_se


def test_threshold_numbers_by_hand():
    score = np.array([3.0, 2.0, 1.0, 0.0, 2.5, 0.5, -1.0, -2.0, -3.0, -4.0])
    got = metrics.evaluate(score, np.arange(10) < 4, threshold=2.0, n_bootstrap=10)  # tp 2, fp 1, fn 2, tn 5
    assert (got.accuracy, got.precision, got.recall) == pytest.approx((0.7, 2 / 3, 0.5))
    assert (got.balanced_accuracy, got.f1) == pytest.approx(((0.5 + 5 / 6) / 2, 4 / 7))
    same = metrics.evaluate(score, np.arange(10) < 4, threshold=np.full(10, 2.0), n_bootstrap=10)
    assert (same.accuracy, same.f1) == (got.accuracy, got.f1)
    nobody = metrics.evaluate(score, np.arange(10) < 4, threshold=np.inf, n_bootstrap=10)
    assert nobody.precision is None and nobody.recall == 0
    assert metrics.evaluate(score, np.arange(10) < 4, n_bootstrap=10).accuracy is None


def test_combine_of_one_seed_is_evaluate():
    score, is_member = make_scores()
    one = metrics.evaluate(score, is_member, threshold=0.5, n_bootstrap=100)
    got = metrics.combine([one], n_bootstrap=100)
    assert all(getattr(got, k) == getattr(one, k) for k in ("auc_low", "auc_high", "tpr_at", "f1", "p_value", "test"))
    for nothing in ([], [np.zeros(3)]):
        with pytest.raises(ValueError, match="at least one result"):
            metrics.combine(nothing)


def test_combine_averages_seeds_and_resamples_them():
    inputs = [make_scores(100, 300, shift=shift, seed=i) for i, shift in enumerate((0.6, 1.0, 1.4))]
    each = [metrics.evaluate(*x, n_bootstrap=200) for x in inputs]
    got = metrics.combine(each, n_bootstrap=500)
    assert got.per_seed == pytest.approx([r.auc for r in each])
    assert got.auc == pytest.approx(np.mean(got.per_seed)) and (got.n_members, got.n_nonmembers) == (100, 300)
    expected = stats.t.ppf(0.975, 2) * np.sqrt(np.var(got.per_seed, ddof=1) / 3)  # they scatter more than their images
    assert (got.auc - got.auc_low, got.minimum_detectable - 0.5) == pytest.approx((expected, expected))
    assert got.auc_high == 1 and got.auc_se == pytest.approx(np.std(got.per_seed, ddof=1) / 3**0.5)
    assert got.p_value < min(r.p_value for r in each)


def test_combine_resamples_blocks_jointly():
    # the same blocks in each seed, with the same level and side: three seeds are no more evidence than one
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(40), 6)
    level = rng.normal(size=40)[groups]
    noisy = [level + 0.01 * rng.normal(size=240) for _ in range(3)]
    parts = [resampling.check(score, groups < 20, groups=groups) for score in noisy]
    one, three = metrics.combine(parts[:1], n_bootstrap=400), metrics.combine(parts, n_bootstrap=400)
    assert three.auc_high - three.auc_low > one.auc_high - one.auc_low and three.auc_se > 0.8 * one.auc_se
    with pytest.raises(ValueError, match="for all results or for none"):
        metrics.combine([parts[0], resampling.check(level, groups < 20)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, np.nan], [True, False]), "finite scores"),
        (([1.0, np.inf], [True, False]), "finite scores"),
        (([1.0, 2.0], [True]), "one shape"),
        (([[1.0], [2.0]], [[True], [False]]), "one shape"),
        (([1.0, 2.0], [True, True]), "0 non-members"),
        (([1.0, 2.0], [2, 0]), "bool or 0/1"),
        (([], []), "0 members and 0 non-members"),
        (([1.0, 2.0], [1, 0], {"threshold": np.nan}), "threshold as a number"),
        (([1.0, 2.0], [1, 0], {"groups": [1]}), "groups of shape"),
        (([1.0, 2.0], [1, 0], {"groups": [1, 1]}), "at least 2 blocks"),
        (([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 1], {"folds": [0, 0, 1, 1]}), "non-members in fold 1, got 2 members"),
        (([1.0, 2.0], [1, 0], {"confidence": 1}), "confidence in"),
        (([1.0, 2.0], [1, 0], {"n_bootstrap": 1}), "n_bootstrap >= 2"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    score, is_member, options = (*arguments, {})[:3]
    with pytest.raises(ValueError, match=message) as error:
        metrics.evaluate(score, is_member, **options)
    assert "\n" not in str(error.value)


def test_it_repeats_and_leaves_the_global_seed_alone():
    score, is_member = make_scores()
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    one, two, other = (metrics.evaluate(score, is_member, n_bootstrap=50, seed=s) for s in (0, 0, 1))
    assert (np.random.get_state()[1] == before).all()
    assert (one.auc_low, one.tpr_at) == (two.auc_low, two.tpr_at) and one.auc_low != other.auc_low
