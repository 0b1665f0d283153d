"""How well a score separates members from non-members, with intervals that hold on small sets.

A score is float64 ``(N,)`` and **higher = more likely a member**. Intervals and verdicts: :mod:`intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mia_utils import seeds
from mia_utils.protocol import intervals, resampling
from mia_utils.protocol.intervals import Interval
from mia_utils.protocol.resampling import NullTest, Scores

FPRS = (0.1, 0.01, 0.001)
_NONE = np.empty(0)


class Roc(NamedTuple):
    """ROC on a grid of false-positive rates from 1/n_nonmembers to 1, arrays ``(G,)``, with a pointwise interval."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Result:
    """Numbers of one attack on one model, or their mean over several trainings.

    Attributes:
        auc, auc_low, auc_high: area under the ROC (probability that a member outranks a non-member, ties count half).
        auc_se: its standard error, widened as the interval is.
        minimum_detectable: smallest AUC that an interval of this row would call above 0.5.
        tpr_at: FPR -> (value, low, high), or None where there are fewer than 10/FPR non-members.
        accuracy, balanced_accuracy, precision, recall, f1: at the threshold given, else None. precision is None when
            no image is flagged as member.
        at_threshold: {"fpr": (value, low, high), "tpr": (value, low, high)} at the threshold given, else None.
        n_members, n_nonmembers: images per training (rounded mean).
        test: two-sided test of AUC 0.5.
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
        """Two-sided p-value: are the sides exchangeable? It knows no scatter between trainings, the interval does."""
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
    every resample; score intervals join it where errors or hits are rare, so an AUC of 1 never gets [1, 1]. The AUC's
    interval is ``intervals.estimate``.

    Args:
        score: (N,) float, higher = more likely a member.
        is_member: (N,) bool or 0/1.
        threshold: ``score >= threshold`` means member, chosen on other data; one number, or (N,) for one per fold.
        groups: (N,) block ids (video, patients): resampled as a whole.
        folds: (N,) fold ids: AUC and ROC are unweighted means over folds.
        fitted: whether the folds' attackers were trained (on images they share): the AUC's interval is widened.
        fprs: false-positive rates in (0, 1).
        confidence, n_bootstrap, seed: level of all intervals, number of resamples, seed of their private stream.

    Returns:
        ``Result`` with one entry in ``per_seed``. Raises ValueError for shapes that differ, scores that are not finite,
        a class that is empty (in a fold), a single block, or an option out of range.
    """
    inputs = resampling.check(score, is_member, threshold, groups, folds, fitted)
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

    AUC: ``intervals.estimate``; TPR: bootstrap over trainings, then over images within each.

    Args:
        results: one entry per training: a ``Result``, an object with such a ``.metrics``, or a tuple
            ``(score, is_member[, folds[, groups[, threshold]]])``.
        fprs, confidence, n_bootstrap, seed: as in ``evaluate``.

    Returns:
        ``Result``; with one entry it equals ``evaluate``. Raises ValueError for an empty list or an unknown entry.
    """
    inputs = _unpack(results)
    fprs = tuple(float(r) for r in fprs)
    if any(not 0 < r < 1 for r in fprs):
        raise ValueError(f"expected false-positive rates in (0, 1), got {fprs}")
    if not 0 < confidence < 1 or n_bootstrap < 2:
        raise ValueError(f"expected confidence in (0, 1) and n_bootstrap >= 2, got {confidence} and {n_bootstrap}")
    n_members = [int(x.is_member.sum()) for x in inputs]
    n_nonmembers = [len(x.score) - m for x, m in zip(inputs, n_members, strict=True)]
    fewest = min(n_nonmembers)
    grid = np.unique(np.round(np.geomspace(1, fewest, 100))) / fewest
    rates = np.concatenate([fprs, grid])

    per_seed, tpr = _measure_points(inputs, rates)
    tpr = tpr.mean(axis=0)
    drawn_auc, drawn_tpr, drawn_calls = resampling.resample(inputs, rates, n_bootstrap, seed)

    test = resampling.test_half(inputs, per_seed, drawn_auc, widen=max(_widen_folds(x) for x in inputs), seed=seed)
    units = [x.count_units() for x in inputs]
    auc = intervals.estimate(per_seed, drawn_auc, **_get_options(inputs, confidence), units=units)
    low, high, detectable = auc.value - auc.below, auc.value + auc.above, 0.5 + auc.below
    if len(inputs) == 1:  # interval and test never contradict each other
        low, high = (min(low, 0.5), max(high, 0.5)) if test.p > 1 - confidence else (low, high)
        detectable = max(detectable, 0.5 + test.se * float(stats.t.isf((1 - confidence) / 2, test.dof)))
    ends = _pick_quantiles(_draw_seeds(drawn_tpr, inputs, seed), tpr, float(np.mean([m for m, _ in units])), confidence)
    k = len(fprs)
    return Result(
        auc=auc.value,
        auc_low=max(0.0, low),
        auc_high=min(1.0, high),
        auc_se=auc.se,
        minimum_detectable=min(1.0, detectable),
        # fewer than 10 / rate non-members: the rate would rest on fewer than ten false positives
        tpr_at={
            rate: Interval(float(tpr[i]), float(ends[0][i]), float(ends[1][i])) if fewest >= 10 / rate - 1e-9 else None
            for i, rate in enumerate(fprs)
        },
        **_judge_threshold(inputs, drawn_calls, confidence=confidence, seed=seed),
        n_members=round(float(np.mean(n_members))),
        n_nonmembers=round(float(np.mean(n_nonmembers))),
        test=test,
        roc=Roc(grid, *(np.maximum.accumulate(part[k:]) for part in (tpr, *ends))),  # score intervals join by points
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
        confidence, n_bootstrap, seed: as in ``evaluate``.

    Returns:
        (difference of the AUCs, low, high) in [-1, 1]; the attack stands clear of the control where low > 0. Raises
        ValueError where the images differ.
    """
    mine, other = (_unpack(x if isinstance(x, list) else [x]) for x in (attack, control))
    other = other * len(mine) if len(other) == 1 else other
    pairs = list(zip(mine, other, strict=False))
    same = [np.array_equal(getattr(a, k), getattr(b, k)) for a, b in pairs for k in ("is_member", "groups")]
    if len(mine) != len(other) or not all(same):
        raise ValueError("expected attack and control on the same images in one order, got other sides or blocks")
    found = []
    for inputs in (mine, other):  # the streams are those of the sides: both get the same resamples
        found.append((_measure_points(inputs)[0], resampling.resample(inputs, _NONE, n_bootstrap, seed)[0]))
    (auc, drawn), (control_auc, control_drawn) = found
    options = _get_options([a if _widen(a) > _widen(b) else b for a, b in pairs], confidence)
    value, below, above, _ = intervals.estimate(auc - control_auc, drawn - control_drawn, **options)
    return Interval(value, max(-1.0, value - below), min(1.0, value + above))


def _get_options(inputs: list[Scores], confidence: float) -> dict[str, Any]:
    shared = inputs[0].groups is not None
    return {"widen": [_widen(x) for x in inputs], "shared": shared, "confidence": confidence}


def _widen_folds(x: Scores) -> float:
    return intervals.widen_folds(len(x.fold_idx)) if x.fitted else 1.0


def _widen(x: Scores) -> float:
    return _widen_folds(x) * (1.0 if x.groups is None else intervals.widen_blocks(min(x.count_units())))


def _measure_points(inputs: list[Scores], rates: np.ndarray = _NONE) -> tuple[np.ndarray, np.ndarray]:
    """AUCs (S,) and TPRs (S, R) of the scores themselves."""
    found = [resampling.measure(resampling.make_curves(x), np.ones((1, len(x.score)), np.int64), rates) for x in inputs]
    return np.array([auc[0] for auc, _ in found]), np.array([tpr[0] for _, tpr in found])


def _unpack(entries: Sequence[Any]) -> list[Scores]:
    inputs: list[Scores] = []
    for entry in entries:
        entry = getattr(entry, "metrics", entry)
        if isinstance(entry, tuple) and 2 <= len(entry) <= 5:
            score, is_member, folds, groups, threshold = (*entry, None, None, None)[:5]
            entry = resampling.check(score, is_member, threshold, groups, folds)
        if not isinstance(entry, (Result, Scores)):
            raise ValueError(f"expected a result or (score, is_member, folds, groups), got {type(entry).__name__}")
        inputs += entry.inputs if isinstance(entry, Result) else [entry]
    if not inputs:
        raise ValueError("expected at least one result to combine, got an empty list")
    n_grouped = sum(x.groups is not None for x in inputs)
    if n_grouped not in (0, len(inputs)):
        raise ValueError(f"expected groups for all results or for none, got them for {n_grouped} of {len(inputs)}")
    return inputs


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


def _pick_quantiles(drawn: np.ndarray, value: Any, n: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of rates (B, R), joined with Wilson's (1927) where few hits or misses are expected."""
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    z2 = stats.norm.ppf((1 + confidence) / 2) ** 2
    center = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (value * (1 - value) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    rare = np.minimum(value, 1 - value) * n < intervals.RARE
    low = np.where(rare, np.minimum(low, np.maximum(center - half, 0.0)), low)
    high = np.where(rare, np.maximum(high, np.minimum(center + half, 1.0)), high)
    return np.minimum(low, value), np.maximum(high, value)


def _judge_threshold(
    inputs: list[Scores], drawn: np.ndarray, *, confidence: float, seed: int
) -> dict[str, float | dict[str, Interval] | None]:
    """Numbers at the threshold given, averaged over trainings.

    One model, independent images: Clopper-Pearson (the threshold is fixed, so both rates are plain proportions). Blocks
    or several trainings: the bootstrap of the AUC, joined with Wilson where counts are small.
    """
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    if any(x.threshold is None for x in inputs):
        return {**dict.fromkeys(names), "at_threshold": None}
    counts = np.concatenate([resampling.count_calls(x, np.ones((1, len(x.score)))) for x in inputs])  # (S, 4)
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

    ``auc`` is the chance that an image of mine outranks a reference image (ties count half).
    """

    p_value: float
    auc: float
    n_mine: int
    n_reference: int
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
    one, or use :mod:`mia_utils.audit`, which does. The statistic is the rank sum: no extreme image can decide it.

    Args:
        score_mine: (n,) float, higher = more likely a member; not of an attacker fitted to these labels.
        score_reference: (m,) float, of images that were surely not used but are otherwise alike.
        n_permutations, seed: random divisions (where no more exist, each is counted once), seed of their stream.
        alternative: ``"greater"`` (mine score higher), ``"less"`` or ``"two-sided"``.

    Returns:
        ``SetTest`` with p >= 1 / (1 + n_permutations). Raises ValueError for an empty set or scores not finite.
    """
    mine, reference = (np.asarray(s, dtype=np.float64).reshape(-1) for s in (score_mine, score_reference))
    if alternative not in ("greater", "less", "two-sided") or n_permutations < 1:
        given = f"{alternative!r} and {n_permutations}"
        raise ValueError(f"expected alternative 'greater', 'less' or 'two-sided' and n_permutations >= 1, got {given}")
    x = resampling.check(np.concatenate([mine, reference]), np.arange(len(mine) + len(reference)) < len(mine))
    auc = float(_measure_points([x])[0][0])
    null = resampling.permute(x, n_permutations, seeds.rng(seed, "metrics.test_set"), complete=True)
    higher, lower = resampling.count_tails(null, auc, n_permutations)
    p = {"greater": higher, "less": lower, "two-sided": min(1.0, 2 * min(higher, lower))}[alternative]
    return SetTest(p, auc, len(mine), len(reference), alternative)
