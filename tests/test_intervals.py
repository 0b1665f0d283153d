"""intervals: the one rule, the coverage of what is printed (with fitted attackers), few units, controls in families."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
from scipy import stats

from mia_utils.protocol import intervals, metrics, resampling
from mia_utils.protocol.intervals import Control


@pytest.mark.parametrize(
    ("numbers", "control", "said"),
    [
        ((0.70, 0.64, 0.76), None, "shown"),
        ((0.70, 0.64, 0.76), Control(0.51, 0.46, 0.56, clear=False), "shown"),  # it holds .5
        ((0.70, 0.64, 0.76), Control(0.57, 0.52, 0.62, clear=True), "shown"),
        ((0.70, 0.64, 0.76), Control(0.57, 0.52, 0.62), "shown"),  # not compared, but the intervals do not overlap
        ((0.60, 0.54, 0.66), Control(0.57, 0.52, 0.62), "not shown, not clear of the no-model control .57 [.52, .62]"),
        ((0.60, 0.54, 0.66), Control(0.43, 0.38, 0.48), "shown"),
        ((0.56, 0.51, 0.61), Control(0.57, 0.499, 0.65), "not shown, not ahead of the no-model control .57 [.50, .65]"),
        ((0.98, 0.96, 1.00), Control(0.90, 0.85, 0.95, rejected=True), "invalid: no-model control .90 [.85, .95]"),
        ((0.50, 0.44, 0.56), Control(0.90, 0.85, 0.95, rejected=True), "invalid: no-model control .90 [.85, .95]"),
        ((0.56, 0.50, 0.62), None, "not shown"),
        ((0.13, 0.08, 0.18), None, "reversed"),
    ],
)
def test_the_rule(numbers, control, said):
    verdict = intervals.decide(*numbers, control=control)
    assert intervals.say(verdict) == said
    assert str(verdict) == said.split(";")[0].split(",")[0].split(":")[0]


def test_examples_and_bad_intervals():
    assert doctest.testmod(intervals).failed == 0
    for numbers in ((0.5, 0.6, 0.7), (0.5, 0.4, 1.1), (np.nan, 0.4, 0.6)):
        with pytest.raises(ValueError, match="low <= auc <= high"):
            intervals.decide(*numbers)


# --- coverage --------------------------------------------------------------------------------------------------------


def make_fitted(rng, *, shift, n_members=128, n_nonmembers=1000, n_features=10, groups=None, n_folds=5):
    """Scores of five cross-fitted linear discriminants; ``groups``: blocks whose features scatter together."""
    n = n_members + n_nonmembers
    unit = np.arange(n) if groups is None else groups
    side = rng.permutation(np.arange(n) < n_members) if groups is None else np.arange(n) < n_members
    features = rng.normal(size=(n, n_features)) + shift / np.sqrt(n_features) * side[:, None]
    if groups is not None:
        features = 0.7 * features + 0.7 * rng.normal(size=(groups.max() + 1, n_features))[groups]
    fold, score = np.empty(n, int), np.empty(n)
    for c in (True, False):
        ids = rng.permutation(np.unique(unit[side == c]))
        place = np.empty(unit.max() + 1, int)
        place[ids] = np.arange(len(ids)) % n_folds
        fold[side == c] = place[unit[side == c]]
    for f in range(n_folds):
        m, o = features[(fold != f) & side], features[(fold != f) & ~side]
        covariance = np.cov(np.concatenate([m - m.mean(0), o - o.mean(0)]).T) + 0.05 * np.eye(n_features)
        score[fold == f] = features[fold == f] @ np.linalg.solve(covariance, m.mean(0) - o.mean(0))
    return resampling.check(score, side, None, groups, fold)


def simulate(n_models, n_bootstrap=200, seed=0, **options):
    """AUC and resampled AUCs of models that are trained and attacked anew: (M,), (M, B)."""
    rng, auc, drawn = np.random.default_rng(seed), [], []
    for i in range(n_models):
        x = make_fitted(rng, **options)
        auc.append(resampling.measure_all([x], np.empty(0))[0][0])
        drawn.append(resampling.resample([x], np.empty(0), n_bootstrap, i)[0][0])
    return np.array(auc), np.array(drawn), x


def count_covered(auc, drawn, x, *, n_seeds, scatter, truth, seed=0, widen=None):
    """Share of experiments over ``n_seeds`` trainings whose interval holds the truth, and their mean half width.

    ``scatter``: standard deviation of the true AUC between trainings; in one training the model's own AUC is the truth.
    """
    rng, held, width = np.random.default_rng(seed), [], []
    options = {"widen": [widen or x.widen] * n_seeds, "shared": False}
    for rows in rng.permutation(len(auc))[: len(auc) // n_seeds * n_seeds].reshape(-1, n_seeds):
        off = scatter * rng.normal(size=n_seeds)
        got = intervals.estimate(auc[rows] + off, drawn[rows] + off[:, None], units=[x.n_units] * n_seeds, **options)
        aim = truth + (off[0] if n_seeds == 1 else 0)
        held.append(got.value - got.below <= aim <= got.value + got.above)
        width.append((got.below + got.above) / 2)
    return np.mean(held), np.mean(width), len(held)


def lower_bound(n, stated=0.94):
    """What a coverage of ``stated`` falls below in one of a thousand simulations of n experiments."""
    return stats.binom.ppf(0.001, n, stated) / n


@pytest.mark.parametrize("shift", [0.0, 0.85])  # chance, and an AUC of about .70
def test_intervals_of_fitted_attackers_cover(shift):
    auc, drawn, x = simulate(360, n_bootstrap=100, shift=shift)
    truth = 0.5 if shift == 0 else auc.mean()
    assert truth == pytest.approx(0.70 if shift else 0.5, abs=0.03)
    for n_seeds, scatter in [(1, 0), *itertools.product((3, 5), (0, 0.03, 0.06))]:
        covered, _, n = count_covered(auc, drawn, x, n_seeds=n_seeds, scatter=scatter, truth=truth)
        assert covered >= lower_bound(n), (n_seeds, scatter)
    # without the factor 1.5 the interval would not hold what it says
    assert count_covered(auc, drawn, x, n_seeds=1, scatter=0, truth=truth, widen=1.0)[0] < lower_bound(360)


@pytest.mark.parametrize("n_blocks", [(8, 16), (20, 40)])
def test_intervals_over_few_blocks_cover(n_blocks):
    """Blocks of an attack that trains nothing; three trainings share the blocks, with new sides or with the same."""
    rng, held = np.random.default_rng(0), {"one": [], "new sides": [], "same sides": []}
    groups = np.repeat(np.arange(sum(n_blocks)), 6)
    for i in range(120):
        level, inputs = rng.normal(size=sum(n_blocks)), {}
        sides = [rng.permutation(sum(n_blocks)) < n_blocks[0] for _ in range(3)]
        for name, chosen in (("one", sides[:1]), ("new sides", sides), ("same sides", sides[:1] * 3)):
            inputs[name] = [
                resampling.check(level[groups] + 0.5 * rng.normal(size=len(groups)), side[groups], groups=groups)
                for side in chosen
            ]
            auc = resampling.measure_all(inputs[name], np.empty(0))[0]
            drawn = resampling.resample(inputs[name], np.empty(0), 100, i)[0]
            got = intervals.estimate(auc, drawn, widen=[x.widen for x in inputs[name]], shared=True)
            held[name].append(got.value - got.below <= 0.5 <= got.value + got.above)
    for name, found in held.items():
        assert np.mean(found) >= lower_bound(120), name


# --- what an interval says -------------------------------------------------------------------------------------------


def test_several_trainings_by_hand():
    per_seed, drawn = np.array([0.6, 0.7, 0.8]), 0.01 * np.array([[-1.0, 1.0]] * 3) + np.array([[0.6], [0.7], [0.8]])
    got = intervals.estimate(per_seed, drawn, widen=[1, 1, 1], shared=False)
    assert got.value == pytest.approx(0.7) and got.se == pytest.approx(0.1 / np.sqrt(3))  # s = .1 outweighs W = .01^2
    assert got.below == got.above == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3))
    got = intervals.estimate(np.full(3, 0.7), drawn, widen=[15, 15, 15], shared=False)
    assert got.se == pytest.approx(0.15 / np.sqrt(3))  # trainings agree by chance: W, widened, holds
    got = intervals.estimate(np.full(3, 0.7), drawn, widen=[1, 1, 1], shared=True)
    assert got.se == pytest.approx(np.sqrt(1e-4 / 3 + 2e-4))  # shared blocks count once


def test_widening_and_the_minimum_detectable_auc():
    rng = np.random.default_rng(0)
    is_member = np.arange(600) < 100
    score, folds = rng.normal(size=600) + 0.6 * is_member, np.arange(600) % 5
    fitted = metrics.evaluate(score, is_member, folds=folds)
    drawn = resampling.resample(list(fitted.inputs), np.empty(0), 1000, 0)[0][0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    ends = [fitted.auc + 1.5 * (x - fitted.auc) for x in (low, high)]
    assert [fitted.auc_low, fitted.auc_high] == pytest.approx(ends)
    assert fitted.auc_se == pytest.approx(1.5 * drawn.std()) and intervals.widen_folds(1) == 1
    is_member = np.arange(120) < 30
    for i in range(40):  # shown exactly where the AUC reaches what the row could have seen, up to the test at .5
        got = metrics.evaluate(rng.normal(size=120) + 0.05 * i * is_member, is_member, n_bootstrap=200)
        assert (got.auc_low > 0.5) == (got.auc > got.minimum_detectable), i


@pytest.mark.parametrize("folds", [None, np.arange(300) % 5])
def test_an_attack_stands_clear_of_a_control(folds):
    rng = np.random.default_rng(1)
    is_member = np.arange(300) < 100
    noise = rng.normal(size=300)
    shifted = noise + 0.9 * is_member, noise + 0.5 * is_member  # they share what makes an image look like a member
    entries = [resampling.check(score, is_member, folds=folds) for score in shifted]
    got = metrics.clear_of(*entries)
    alone = [metrics.evaluate(score, is_member, folds=folds) for score in shifted]
    assert got.value == pytest.approx(alone[0].auc - alone[1].auc) and got.low > 0
    assert alone[0].auc_low < alone[1].auc_high  # unpaired, the two intervals overlap
    assert metrics.clear_of(alone[1], alone[1]) == (0, 0, 0) and metrics.clear_of(entries[1], entries[0]).high < 0
    assert metrics.clear_of([entries[0]] * 3, alone[1]).low > 0  # one control serves three trainings
    with pytest.raises(ValueError, match="same images"):
        metrics.clear_of(entries[0], resampling.check(shifted[1], ~is_member, folds=folds))


# --- few units -------------------------------------------------------------------------------------------------------


def test_ties_and_few_blocks_never_give_a_p_that_their_number_cannot():
    got = metrics.evaluate(np.r_[1.0, np.zeros(1000)], np.arange(1001) < 1)
    assert got.p_value == pytest.approx(2 / 1001) and got.auc == 1
    # two distinct scores among 1,048 ties, both members: hypergeometric, not normal
    got = metrics.evaluate(np.r_[1.0, 2.0, np.zeros(1048)], np.arange(1050) < 50)
    assert got.p_value == pytest.approx(2 * (50 * 49) / (1050 * 1049), rel=0.5)  # about 23 of 10,000 draws
    groups, score = np.repeat(np.arange(2), 20), np.r_[np.ones(20), np.zeros(20)]
    got = metrics.evaluate(score, groups < 1, groups=groups)
    assert got.p_value == 1 and got.auc_low <= 0.5
    groups = np.repeat(np.arange(6), 10)
    got = metrics.evaluate(1.0 * (groups < 3), groups < 3, groups=groups)
    assert got.p_value == pytest.approx(2 / 20) and got.auc_low <= 0.5  # the interval agrees with the exact test
    with pytest.raises(ValueError, match="at least 2 blocks"):
        metrics.evaluate(score, score > 0, groups=np.zeros(40))
    mixed = metrics.evaluate(np.tile([1.0, 0.0], 20), np.tile([True, False], 20), groups=np.repeat(np.arange(4), 10))
    assert mixed.p_value == pytest.approx(1 / 8)


# --- controls --------------------------------------------------------------------------------------------------------


def test_holm_by_hand_and_in_families():
    # 4 x .01 = .04, 3 x .02 = .06, 2 x .03 = .06, 1 x .04 -> .06 (never below its predecessor)
    rows = {"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.02}
    table = intervals.judge_controls(rows, level=0.05)
    assert list(table.control) == ["c", "a", "d", "b"]
    assert table.p_holm.tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert table.rejected.tolist() == [False, True, False, False]
    table = intervals.judge_controls(rows, level=0.05, families={"c": "x", "a": "x", "b": "y"})
    assert table.p_holm.tolist() == pytest.approx([0.03, 0.02, 0.04, 0.02])


def test_holm_is_the_step_down_test_and_holds_its_level():
    rng = np.random.default_rng(0)
    for _ in range(100):
        p = dict(enumerate(rng.random(int(rng.integers(1, 12))) ** rng.choice([1, 4])))
        left, rejected = sorted(p, key=p.get), set()  # by hand: as long as the smallest of m is below level / m
        while left and p[left[0]] <= 0.05 / len(left):
            rejected.add(left.pop(0))
        table = intervals.judge_controls(p, 0.05)
        assert set(table.control[table.rejected]) == rejected
    lost = [intervals.judge_controls(dict(enumerate(rng.random(20))), 0.05).rejected.any() for _ in range(200)]
    assert np.mean(lost) < 0.1  # binomial of 200 at .05: three standard errors are .046


@pytest.mark.parametrize("level", [0, 1, 7, -0.1, np.nan])
def test_levels_outside_their_range_are_refused(level):
    with pytest.raises(ValueError, match="level in"):
        intervals.judge_controls({"a": 0.5}, level)


@pytest.mark.parametrize("p", [1.2, -0.1, np.nan, None])
def test_p_values_outside_their_range_are_named(p):
    with pytest.raises(ValueError, match="control 'bad'"):
        intervals.judge_controls({"good": 0.5, "bad": p})
