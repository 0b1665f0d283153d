"""How well a score, float64 (N,), **higher = more likely a member**, separates members from non-members.

Intervals hold on small sets; the AUC's interval and every verdict come from :mod:`intervals`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mia_utils import seeds
from mia_utils.protocol import intervals, resampling
from mia_utils.protocol.intervals import Interval
from mia_utils.protocol.resampling import NullTest, Scores

RATES = {0.1: "tpr_at_10", 0.01: "tpr_at_1", 0.001: "tpr_at_01"}  # FPR -> column of results with the TPR there
FPRS = tuple(RATES)


class Roc(NamedTuple):
    """ROC on a grid of false-positive rates from 1/n_nonmembers to 1, arrays ``(G,)``, with a pointwise interval."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Result:
    """Numbers of one attack on one model, or their mean over several trainings."""

    auc: float  # probability that a member outranks a non-member, ties count half
    auc_low: float
    auc_high: float
    auc_se: float  # widened as the interval is
    minimum_detectable: float  # smallest AUC that an interval of this row would call above 0.5
    tpr_at: dict[float, Interval | None]  # by FPR; None where there are fewer than 10 / FPR non-members
    accuracy: float | None  # these five at the threshold given, else None
    balanced_accuracy: float | None
    precision: float | None  # None also where no image is flagged as member
    recall: float | None
    f1: float | None
    n_members: int  # images per training (rounded mean)
    n_nonmembers: int
    test: NullTest  # of AUC 0.5
    roc: Roc = field(repr=False)
    per_seed: tuple[float, ...]  # AUC of each training
    inputs: tuple[Scores, ...] = field(repr=False, compare=False)  # checked scores of each training

    @property
    def p_value(self) -> float:
        """Two-sided p-value: are the sides exchangeable? It knows no scatter between trainings, the interval does."""
        return self.test.p


def evaluate(
    score: np.ndarray, is_member: np.ndarray, *, threshold: float | np.ndarray | None = None,
    groups: np.ndarray | None = None, folds: np.ndarray | None = None, confidence: float = 0.95,
    n_bootstrap: int = 1000, seed: int = 0,
) -> Result:  # fmt: skip
    """Evaluate one score: AUC, TPR at fixed FPRs, and what the threshold does, with two-sided intervals.

    Stratified percentile bootstrap over images (whole blocks with ``groups``), the threshold of each FPR picked anew in
    every resample; score intervals join it where errors or hits are rare, so an AUC of 1 never gets [1, 1].

    Args:
        score, is_member: (N,) float, higher = more likely a member; (N,) bool or 0/1.
        threshold: ``score >= threshold`` means member, chosen on other data; one number, or (N,) for one per fold.
        groups: (N,) block ids (video, patients): resampled as a whole.
        folds: (N,) ids of folds whose attackers were fitted on one another's images: AUC and ROC are unweighted means
            over folds, the AUC's interval is widened.
        confidence, n_bootstrap, seed: level of all intervals, number of resamples, seed of their private stream.
    """
    inputs = resampling.check(score, is_member, threshold, groups, folds)
    return combine([inputs], confidence=confidence, n_bootstrap=n_bootstrap, seed=seed)


def combine(results: Sequence[Any], *, confidence: float = 0.95, n_bootstrap: int = 1000, seed: int = 0) -> Result:
    """Average over trainings: mean of the AUCs and ROCs, never a ROC of pooled scores; one entry: ``evaluate``.

    AUC: ``intervals.estimate``; TPR: bootstrap over trainings, then over images within each.

    Args:
        results: one entry per training: a ``Result``, a ``result.Result``, or ``Scores``.
        confidence, n_bootstrap, seed: as in ``evaluate``.
    """
    inputs = _unpack(results)
    if not 0 < confidence < 1 or n_bootstrap < 2:
        raise ValueError(f"expected confidence in (0, 1) and n_bootstrap >= 2, got {confidence} and {n_bootstrap}")
    n_members = np.array([x.is_member.sum() for x in inputs])
    n_nonmembers = np.array([(~x.is_member).sum() for x in inputs])
    fewest = int(n_nonmembers.min())
    grid = np.unique(np.round(np.geomspace(1, fewest, 100))) / fewest
    rates = np.concatenate([FPRS, grid])

    per_seed, tpr = resampling.measure_all(inputs, rates)
    tpr = tpr.mean(axis=0)
    drawn_auc, drawn_tpr = resampling.resample(inputs, rates, n_bootstrap, seed)
    test = resampling.test_half(inputs, per_seed, drawn_auc, seed=seed)
    units = [x.n_units for x in inputs]
    options = {"shared": inputs[0].groups is not None, "confidence": confidence}
    auc = intervals.estimate(per_seed, drawn_auc, widen=[x.widen for x in inputs], units=units, **options)
    low, high, detectable = auc.value - auc.below, auc.value + auc.above, 0.5 + auc.below
    if len(inputs) == 1:  # interval and test never contradict each other
        low, high = (min(low, 0.5), max(high, 0.5)) if test.p > 1 - confidence else (low, high)
        detectable = max(detectable, 0.5 + test.se * float(stats.t.isf((1 - confidence) / 2, test.dof)))
    ends = _pick_quantiles(_draw_seeds(drawn_tpr, inputs, seed), tpr, float(np.mean([m for m, _ in units])), confidence)
    at = [Interval(*map(float, triple)) for triple in zip(tpr, *ends, strict=True)]
    return Result(
        auc=auc.value,
        auc_low=max(0.0, low),
        auc_high=min(1.0, high),
        auc_se=auc.se,
        minimum_detectable=min(1.0, detectable),
        # fewer than 10 / rate non-members: the rate would rest on fewer than ten false positives
        tpr_at={rate: at[i] if fewest >= 10 / rate - 1e-9 else None for i, rate in enumerate(FPRS)},
        **_judge_threshold(inputs, n_members, n_nonmembers),
        n_members=round(float(n_members.mean())),
        n_nonmembers=round(float(n_nonmembers.mean())),
        test=test,
        # score intervals join point by point: only the running maximum is monotone
        roc=Roc(grid, *(np.maximum.accumulate(part[len(FPRS) :]) for part in (tpr, *ends))),
        per_seed=tuple(map(float, per_seed)),
        inputs=tuple(inputs),
    )


def clear_of(
    attack: Any, control: Any, *, confidence: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> Interval:
    """Compare an attack with a control of the same split: paired bootstrap of the difference on the same images.

    Args:
        attack, control: an entry as ``combine`` takes it, or a list with one per training, with the same images in the
            same order. One control serves all trainings on its split.
        confidence, n_bootstrap, seed: as in ``evaluate``.

    Returns:
        (difference of the AUCs, low, high) in [-1, 1]; the attack stands clear of the control where low > 0.
    """
    mine, other = (_unpack(x if isinstance(x, list) else [x]) for x in (attack, control))
    other = other * len(mine) if len(other) == 1 else other
    pairs = list(zip(mine, other, strict=False))
    same = [np.array_equal(getattr(a, k), getattr(b, k)) for a, b in pairs for k in ("is_member", "groups")]
    if len(mine) != len(other) or not all(same):
        raise ValueError("expected attack and control on the same images in one order, got other sides or blocks")
    none = np.empty(0)  # the streams are those of the sides: both get the same resamples
    auc, control_auc = (resampling.measure_all(inputs, none)[0] for inputs in (mine, other))
    drawn, control_drawn = (resampling.resample(inputs, none, n_bootstrap, seed)[0] for inputs in (mine, other))
    options = {"shared": mine[0].groups is not None, "confidence": confidence}
    widen = [max(a.widen, b.widen) for a, b in pairs]
    value, below, above, _ = intervals.estimate(auc - control_auc, drawn - control_drawn, widen=widen, **options)
    return Interval(value, max(-1.0, value - below), min(1.0, value + above))


def _unpack(entries: Sequence[Any]) -> list[Scores]:
    """Scores of every training behind results, or scores, of one or several trainings."""
    inputs = [x for entry in entries for x in getattr(entry, "inputs", [entry])]
    if not inputs or not all(isinstance(x, Scores) for x in inputs):
        raise ValueError(f"expected at least one result with scores, got {[type(x).__name__ for x in inputs]}")
    n_grouped = sum(x.groups is not None for x in inputs)
    if n_grouped not in (0, len(inputs)):
        raise ValueError(f"expected groups for all results or for none, got them for {n_grouped} of {len(inputs)}")
    return inputs


def _draw_seeds(drawn: np.ndarray, inputs: list[Scores], seed: int) -> np.ndarray:
    """Bootstrap over trainings, on top of the resamples within each: (S, B, R) -> (B, R)."""
    n_seeds, n_bootstrap = drawn.shape[:2]
    if n_seeds == 1:
        return drawn[0]
    rng = seeds.rng(seed, "metrics.bootstrap", "seeds")
    chosen = rng.integers(0, n_seeds, size=(n_seeds, n_bootstrap))
    joint = inputs[0].groups is not None  # resamples that share blocks stay together; else one drawn twice differs
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


def _judge_threshold(inputs: list[Scores], m: np.ndarray, n: np.ndarray) -> dict[str, float | None]:
    """Numbers at the threshold given, averaged over trainings with m members and n non-members (S,) each."""
    names = ("accuracy", "balanced_accuracy", "precision", "recall", "f1")
    if any(x.threshold is None for x in inputs):
        return dict.fromkeys(names)
    flagged = [x.score >= x.threshold for x in inputs]
    tp = np.array([(f & x.is_member).sum() for f, x in zip(flagged, inputs, strict=True)])
    fp = np.array([(f & ~x.is_member).sum() for f, x in zip(flagged, inputs, strict=True)])
    precision = tp / np.where(tp + fp > 0, tp + fp, np.nan)
    rows = ((tp + n - fp) / (m + n), (tp / m + 1 - fp / n) / 2, precision, tp / m, 2 * tp / (tp + fp + m))
    return {k: None if np.isnan(v).any() else float(v.mean()) for k, v in zip(names, rows, strict=True)}
