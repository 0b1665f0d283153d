"""How well a score separates members from non-members, with intervals that hold on small sets.

A score is float64 ``(N,)`` and **higher = more likely a member**. Intervals and verdicts: :mod:`intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mia_utils import seeds
from mia_utils.protocol import bootstrap, intervals
from mia_utils.protocol.bootstrap import Scores
from mia_utils.protocol.intervals import Interval

FPRS = (0.1, 0.01, 0.001)
N_PERMUTATIONS = 10_000
_FEW_BLOCKS = 10  # of the rarer side: below, the p-value permutes blocks instead of resampling them


class Roc(NamedTuple):
    """ROC on a grid of false-positive rates from 1/n_nonmembers to 1, arrays ``(G,)``, with a pointwise interval."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


class NullTest(NamedTuple):
    """Two-sided test of AUC 0.5: p, the standard error and degrees of freedom behind it, the smallest p it can give."""

    p: float
    se: float
    dof: float = np.inf
    floor: float = 0.0


@dataclass(frozen=True)
class Result:
    """Numbers of one attack on one model, or their mean over several trainings.

    Attributes:
        auc, auc_low, auc_high: area under the ROC (probability that a member outranks a non-member, ties count half).
        auc_se, half_width: standard error, widened as the interval is, and half the width of the interval.
        minimum_detectable: smallest AUC that this row's interval would call above 0.5; 1 where none would.
        tpr_at: FPR -> (value, low, high), or None where there are fewer than 10/FPR non-members.
        accuracy, balanced_accuracy, precision, recall, f1: at the threshold given, else None. precision is None when
            no image is flagged as member.
        at_threshold: {"fpr": (value, low, high), "tpr": (value, low, high)} at the threshold given, else None.
        n_members, n_nonmembers: images per training (rounded mean).
        test: the two-sided test of AUC 0.5.
        roc: the averaged ROC on a grid.
        per_seed: AUC of each training.
        inputs: the checked scores, one entry per training.
    """

    auc: float
    auc_low: float
    auc_high: float
    auc_se: float
    minimum_detectable: float
    tpr_at: dict[float, Interval | None]
    accuracy: float | None
    balanced_accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    at_threshold: dict[str, Interval] | None
    n_members: int
    n_nonmembers: int
    test: NullTest
    roc: Roc = field(repr=False)
    per_seed: tuple[float, ...]
    inputs: tuple[Scores, ...] = field(repr=False, compare=False)

    @property
    def half_width(self) -> float:
        """Half the width of the AUC interval."""
        return (self.auc_high - self.auc_low) / 2

    @property
    def p_value(self) -> float:
        """Two-sided p-value of AUC 0.5: of exchangeable sides, not of the interval's scatter between trainings."""
        return self.test.p

    @property
    def n_seeds(self) -> int:
        """Number of trainings averaged."""
        return len(self.per_seed)

    @property
    def scope(self) -> str:
        """What the interval speaks of."""
        return "this model only" if self.n_seeds == 1 else f"over {self.n_seeds} trainings"

    def rejects_above(self, level: float) -> float:
        """Smallest AUC whose p-value would reach a level; NaN where none would."""
        value = 0.5 + self.test.se * float(stats.t.isf(level / 2, self.test.dof))
        return value if level >= self.test.floor and value <= 1 else np.nan


def evaluate(
    score: np.ndarray,
    is_member: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    groups: np.ndarray | None = None,
    folds: np.ndarray | None = None,
    fitted: bool = True,
    fprs: Sequence[float] = FPRS,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Evaluate one score: AUC, TPR at fixed FPRs, and what the threshold does, with two-sided intervals.

    Stratified percentile bootstrap over images (whole blocks with ``groups``), the threshold of each FPR picked anew in
    every resample. Where fewer than five errors or hits are expected a score interval joins it, so an AUC of 1 never
    gets [1, 1]. ``intervals.estimate_auc`` says how the AUC's interval is widened.

    Args:
        score: (N,) float, higher = more likely a member.
        is_member: (N,) bool or 0/1.
        threshold: ``score >= threshold`` means member; one number, or (N,) where attackers of several folds have their
            own. It must have been chosen on other data.
        groups: (N,) block ids (video, patients): resampled as a whole.
        folds: (N,) fold ids: AUC and ROC are unweighted means over folds.
        fitted: whether the folds' attackers were trained (on images they share): the AUC's interval is widened.
        fprs: false-positive rates in (0, 1).
        confidence: level of all intervals.
        n_bootstrap: number of resamples.
        seed: seed of the private resampling stream.

    Returns:
        ``Result`` with one entry in ``per_seed``. Raises ValueError for shapes that differ, scores that are not finite,
        a class that is empty (in a fold), a single block, or an option out of range.
    """
    inputs = bootstrap.check(score, is_member, threshold, groups, folds, fitted)
    return combine([inputs], fprs=fprs, confidence=confidence, n_bootstrap=n_bootstrap, seed=seed)


def combine(
    results: Sequence[Any],
    *,
    fprs: Sequence[float] = FPRS,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Average over trainings: mean of the AUCs and ROCs, never a ROC of pooled scores.

    The AUC's interval is ``intervals.estimate_auc``; TPR: bootstrap over trainings, then over images within each.

    Args:
        results: one entry per training: a ``Result``, an object with such a ``.metrics``, a mapping of the arguments of
            ``evaluate``, or a tuple ``(score, is_member[, folds[, groups[, threshold]]])``.
        fprs, confidence, n_bootstrap, seed: as in ``evaluate``.

    Returns:
        ``Result``; with one entry it equals ``evaluate``. Raises ValueError for an empty list or an unknown entry.
    """
    inputs = _unpack(results)
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

    curves = [bootstrap.make_curves(x) for x in inputs]
    points = [bootstrap.measure(c, np.ones((1, len(x.score)), np.int64), rates) for x, c in zip(inputs, curves)]
    per_seed, tpr = np.array([p[0][0] for p in points]), np.mean([p[1][0] for p in points], axis=0)
    drawn_auc, drawn_tpr, drawn_calls = bootstrap.resample(inputs, curves, rates, n_bootstrap, seed)

    test = _test_half(inputs, per_seed, drawn_auc, seed)
    auc = intervals.estimate_auc(
        per_seed,
        drawn_auc,
        units=[x.count_units() for x in inputs],
        widen=[_get_widening(x) for x in inputs],
        shared=inputs[0].groups is not None,
        confidence=confidence,
    )
    if len(inputs) == 1:  # interval and test never contradict each other
        auc = auc.agree(test.p, 0.5 + test.se * float(stats.t.isf((1 - confidence) / 2, test.dof)), confidence)

    units = float(np.mean([x.count_units()[0] for x in inputs]))
    low, high = _pick_quantiles(_draw_seeds(drawn_tpr, inputs, seed), tpr, units, confidence)
    roc = Roc(grid, *(part[len(fprs) :] for part in (tpr, low, high)))

    def pick(i: int, rate: float) -> Interval | None:
        if fewest < 10 / rate - 1e-9:
            return None  # the rate would rest on fewer than ten false positives
        return Interval(float(tpr[i]), float(low[i]), float(high[i]))

    return Result(
        auc=auc.value,
        auc_low=auc.low,
        auc_high=auc.high,
        auc_se=auc.se,
        minimum_detectable=auc.minimum_detectable,
        tpr_at={rate: pick(i, rate) for i, rate in enumerate(fprs)},
        **_judge_threshold(inputs, drawn_calls, confidence=confidence, seed=seed),
        n_members=round(float(np.mean(n_members))),
        n_nonmembers=round(float(np.mean(n_nonmembers))),
        test=test,
        roc=roc,
        per_seed=tuple(float(a) for a in per_seed),
        inputs=tuple(inputs),
    )


def clear_of(
    attack: Any, control: Any, *, confidence: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> Interval:
    """Compare an attack with a control of the same split: paired bootstrap of the difference on the same images.

    Args:
        attack, control: a result, or a list of entries as ``combine`` takes them, one per training, with the same
            images in the same order. One control serves all trainings on its split.

    Returns:
        (difference of the AUCs, low, high) in [-1, 1]; the attack stands clear of the control where low > 0. Raises
        ValueError where the images differ.
    """
    mine, other = (_unpack(x if isinstance(x, (list, tuple)) else [x]) for x in (attack, control))
    other = other * len(mine) if len(other) == 1 else other
    same = len(mine) == len(other) and all(
        np.array_equal(a.is_member, b.is_member) and np.array_equal(a.groups, b.groups) for a, b in zip(mine, other)
    )
    if not same:
        raise ValueError("expected attack and control with the same images in the same order, got other sides or blocks")
    ones = [np.ones((1, len(x.score)), np.int64) for x in mine]
    found = []
    for inputs in (mine, other):  # the same streams, hence the same resamples
        curves = [bootstrap.make_curves(x) for x in inputs]
        point = np.concatenate([bootstrap.measure(c, one, np.empty(0))[0] for c, one in zip(curves, ones)])
        found.append((point, bootstrap.resample(inputs, curves, np.empty(0), n_bootstrap, seed)[0]))
    return intervals.estimate_difference(
        found[0][0] - found[1][0],
        found[0][1] - found[1][1],
        widen=[max(_get_widening(a), _get_widening(b)) for a, b in zip(mine, other)],
        shared=mine[0].groups is not None,
        confidence=confidence,
    )


def _unpack(entries: Sequence[Any]) -> list[Scores]:
    if not len(entries):
        raise ValueError("expected at least one result to combine, got an empty list")
    inputs = [x for entry in entries for x in _unpack_one(entry)]
    n_grouped = sum(x.groups is not None for x in inputs)
    if n_grouped not in (0, len(inputs)):
        raise ValueError(f"expected groups for all results or for none, got them for {n_grouped} of {len(inputs)}")
    return inputs


def _unpack_one(entry: Any) -> tuple[Scores, ...]:
    entry = getattr(entry, "metrics", entry)
    if isinstance(entry, Result):
        return entry.inputs
    if isinstance(entry, Scores):
        return (entry,)
    names = ("score", "is_member", "folds", "groups", "threshold")
    if isinstance(entry, (tuple, list)) and 2 <= len(entry) <= 5:
        entry = dict(zip(names, entry, strict=False))
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected a result, a mapping or (score, is_member, folds, groups), got {type(entry).__name__}")
    if unknown := set(entry) - {*names, "fitted"}:
        raise ValueError(f"expected keys {', '.join(names)}, fitted, got also {sorted(unknown)}")
    return (bootstrap.check(**entry),)


# --- the test of AUC 0.5 ---------------------------------------------------------------------------------------------


def _test_half(inputs: list[Scores], per_seed: np.ndarray, drawn: np.ndarray, seed: int) -> NullTest:
    """Test the mean AUC against 0.5, the splits of several trainings taken as independent draws.

    Images: normal with the exact permutation variance of the Mann-Whitney statistic with ties (Lehmann, Nonparametrics,
    1975), averaged over folds. Blocks: Student's t on the joint block bootstrap, (blocks of the rarer side - 1) degrees
    of freedom. Few images, blocks or distinct scores: permutation, exact where all assignments can be listed.
    """
    distance = float(per_seed.mean()) - 0.5
    widen = max(_get_widening(x) for x in inputs)
    fewest = min(min(x.count_units()) for x in inputs)
    if inputs[0].groups is None:
        pulls, variances = zip(*(_measure_null(x) for x in inputs), strict=True)
        se, dof, few = widen * np.sqrt(sum(variances)) / len(inputs), np.inf, max(pulls) > 0.25
    else:
        se, dof = widen * float(np.nanstd(drawn.mean(axis=0))), max(fewest - 1, 1)
        few = fewest < _FEW_BLOCKS and not any(x.is_mixed() for x in inputs)
    if few:
        return _permute_half(inputs, distance, widen, seed)
    if se == 0:
        return NullTest(1.0, 0.0, dof)
    # blocks that hold both sides: were each as likely to turn the AUC up as down, p could not be smaller than this
    floor = 0.0 if inputs[0].groups is None else 2.0 ** (1 - min(len(np.unique(x.groups)) for x in inputs))
    return NullTest(min(1.0, max(floor, 2 * float(stats.t.sf(abs(distance) / se, dof)))), float(se), dof, floor)


def _permute_half(inputs: list[Scores], distance: float, widen: float, seed: int) -> NullTest:
    """Permutation test: twice the smaller tail of the mean AUC under random assignment of the sides."""
    sides = [dict(zip(x.groups, x.is_member)) if x.groups is not None else s for s, x in enumerate(inputs)]
    shared = all(side == sides[0] for side in sides)  # one split of the blocks for all trainings: permuted jointly
    rngs = [seeds.rng(seed, "metrics.permute", 0 if shared else s) for s in range(len(inputs))]
    null = np.mean([bootstrap.permute(x, N_PERMUTATIONS, rng, complete=len(inputs) == 1) for x, rng in zip(inputs, rngs)], 0)
    null = widen * (null - 0.5)
    tail = min(int((null >= distance - 1e-9).sum()), int((null <= distance + 1e-9).sum()))
    n = len(null) + 1
    if len(null) < N_PERMUTATIONS:  # every assignment, the observed one among them
        tail, n = tail - 1, n - 1
    return NullTest(min(1.0, 2 * (tail + 1) / n), float(null.std()), np.inf, min(1.0, 2 / n))


def _measure_null(x: Scores) -> tuple[float, float]:
    """What a single image can do to the AUC (squared, over the variance), and the variance, if the sides are random."""
    pull = variance = 0.0
    for where in x.fold_idx:
        n, m = len(where), int(x.is_member[where].sum())
        away = stats.rankdata(x.score[where]) - (n + 1) / 2
        variance += float(away @ away) / (n * (n - 1) * m * (n - m))  # of the rank sum, over (m (n - m))^2
        pull = max(pull, float(np.abs(away).max()) / (m * (n - m)))
    return pull**2 / variance if variance else 0.0, variance / len(x.fold_idx) ** 2


def _get_widening(x: Scores) -> float:
    return intervals.widen_folds(len(x.fold_idx)) if x.fitted else 1.0


# --- TPR and threshold -----------------------------------------------------------------------------------------------


def _draw_seeds(drawn: np.ndarray, inputs: list[Scores], seed: int) -> np.ndarray:
    """Bootstrap over trainings, on top of the resamples within each: (S, B, R) -> (B, R).

    With blocks the b-th resample of all trainings shares its blocks and stays together.
    """
    n_seeds, n_bootstrap = drawn.shape[:2]
    if n_seeds == 1:
        return drawn[0]
    rng = seeds.rng(seed, "metrics.bootstrap", "seeds")
    chosen = rng.integers(0, n_seeds, size=(n_seeds, n_bootstrap))
    joint = inputs[0].groups is not None  # else a training drawn twice brings two different resamples of its images
    row = np.arange(n_bootstrap) if joint else rng.integers(0, n_bootstrap, size=(n_seeds, n_bootstrap))
    return drawn[chosen, row].mean(axis=0)


def _pick_quantiles(drawn: np.ndarray, value: Any, units: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of rates (B, R), joined with Wilson's where few hits or misses are expected; holds value."""
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    rare = np.minimum(value, 1 - value) * units < intervals.RARE
    wilson = intervals.get_wilson(value, units, confidence)
    low, high = np.where(rare, np.minimum(low, wilson[0]), low), np.where(rare, np.maximum(high, wilson[1]), high)
    return np.minimum(low, value), np.maximum(high, value)


def _judge_threshold(
    inputs: list[Scores], drawn: np.ndarray, *, confidence: float, seed: int
) -> dict[str, float | dict[str, Interval] | None]:
    """Numbers at the threshold given, averaged over trainings.

    One model, independent images: Clopper-Pearson (the threshold is fixed, so FPR and TPR are plain proportions). Blocks
    or several trainings: the bootstrap of the AUC, joined with Wilson where counts are small.
    """
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    if any(x.threshold is None for x in inputs):
        return {**dict.fromkeys(names), "at_threshold": None}
    counts = np.concatenate([bootstrap.count_calls(x, np.ones((1, len(x.score)))) for x in inputs])  # (S, 4)
    tp, fp, m, n = counts.T
    called = tp + fp
    precision = tp / np.where(called > 0, called, np.nan)
    rows = ((tp + n - fp) / (m + n), (tp / m + 1 - fp / n) / 2, precision, tp / m, 2 * tp / (called + m))
    values = {k: None if np.isnan(v).any() else float(v.mean()) for k, v in zip(names, rows, strict=True)}
    at = {}
    for name, hits, trials in (("fpr", 1, 3), ("tpr", 0, 2)):
        value = float((counts[:, hits] / counts[:, trials]).mean())
        if len(inputs) == 1 and inputs[0].groups is None:
            test = stats.binomtest(int(counts[0, hits]), int(counts[0, trials]))
            low, high = test.proportion_ci(confidence, method="exact")
        else:
            rates = drawn[:, :, hits] / np.where(drawn[:, :, trials] > 0, drawn[:, :, trials], np.nan)
            units = float(np.mean([x.count_units()[trials - 2] for x in inputs]))
            low, high = _pick_quantiles(_draw_seeds(rates, inputs, seed), value, units, confidence)
        at[name] = Interval(value, float(min(low, value)), float(max(high, value)))
    return {**values, "at_threshold": at}


# --- whole sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetTest:
    """Whether a set of images scores higher than reference images; see :func:`test_set`.

    Attributes:
        p_value: permutation p-value, at least 1 / (1 + n_permutations).
        auc: chance that an image of mine outranks a reference image (ties count half): the statistic, rescaled.
        difference: mean score of mine minus mean score of the reference, for reading; not tested.
        n_mine, n_reference: images.
        n_permutations: draws asked for; where fewer divisions of the images exist, all of them are counted.
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
            f"{self.n_mine} images against {self.n_reference} reference images: AUC {self.auc:.2f}, "
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
    """Test a whole set: were my fifty images used?

    H0: my images and the reference images are exchangeable, as if one pile had been divided at random. It is rejected
    by membership, but also by *any* other difference between the two sets: first let the no-model control look for
    one, or use :mod:`mia_utils.audit`, which does. The statistic is the rank sum: unlike a difference of means it does
    not hang on the score's scale or on one extreme image. p = (1 + permutations at least as extreme) /
    (1 + permutations): exact for any number of images and with ties (Phipson and Smyth, 2010).

    Args:
        score_mine: (n,) float, higher = more likely a member; not of an attacker fitted to these labels.
        score_reference: (m,) float, of images that were surely not used but are otherwise alike.
        n_permutations: random divisions.
        seed: seed of the private stream.
        alternative: ``"greater"``: mine score higher.

    Returns:
        ``SetTest``. Raises ValueError for an empty set, a score that is not finite, an unknown option.
    """
    mine, reference = (np.asarray(s, dtype=np.float64) for s in (score_mine, score_reference))
    for name, s in (("score_mine", mine), ("score_reference", reference)):
        if s.ndim != 1 or not len(s):
            raise ValueError(f"expected {name} of shape (n,) with at least one image, got {s.shape}")
        if bad := int((~np.isfinite(s)).sum()):
            raise ValueError(f"expected finite {name}, got {bad} NaN or infinite of {len(s)}")
    if alternative not in ("greater", "less", "two-sided") or n_permutations < 1:
        given = f"{alternative!r} and {n_permutations}"
        raise ValueError(f"expected alternative 'greater', 'less' or 'two-sided' and n_permutations >= 1, got {given}")
    rank = stats.rankdata(np.concatenate([mine, reference]))
    n, m = len(mine), len(reference)
    test = stats.permutation_test(
        (rank[:n], rank[n:]),
        lambda x, y, axis: x.sum(axis=axis),  # halves of integers: sums are exact, ties compare equal
        n_resamples=n_permutations,
        alternative=alternative,
        vectorized=True,
        batch=max(1, 400_000 // len(rank)),
        rng=seeds.rng(seed, "metrics.test_set"),
    )
    auc = float((rank[:n].sum() - n * (n + 1) / 2) / (n * m))
    return SetTest(float(test.pvalue), auc, float(mine.mean() - reference.mean()), n, m, n_permutations, alternative)
