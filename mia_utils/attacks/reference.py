"""Calibration by reference models: an image is compared with what models that never saw it make of it.

Sources: difficulty calibration (Watson et al., arXiv 2111.08440), LiRA (Carlini et al., arXiv 2112.03570), RMIA
(Zarifzadeh et al., arXiv 2312.03262), BaVarIA (Brännvall, arXiv 2603.11799). All read one number s of an image, higher
= more likely a member, on a scale where a difference is a log ratio: a log-likelihood, or -log of a loss. References
are trained like the target, to the *target's epoch*; notebook 04 measures what another age costs.

>>> calibrate(np.array([-1.0, -2.0]), np.array([[-2.0, -2.0], [-4.0, -2.0]])).tolist()
[2.0, 0.0]
"""

import numpy as np
from scipy import special, stats

OFFLINE = ("log-ratio", "lira", "rmia", "bayes")  # no reference model saw the image
KINDS = (*OFFLINE, "midpoint")
VARIANCES = ("global", "image")


def calibrate(
    target: np.ndarray,
    references: np.ndarray,
    in_mask: np.ndarray | None = None,
    *,
    kind: str = "log-ratio",
    variance: str = "global",
    gamma: float = 1.0,
    prior_strength: float = 4.0,
) -> np.ndarray:
    """Calibrate the target's statistic of every image by that of R reference models.

    Args:
        target: (N,) s of the target.
        references: (R, N) s of the reference models; a masked array where some were not queried about every image.
        in_mask: (R, N) bool, True where a reference was trained on an image; None: no reference was on any (offline).
        kind: ``"log-ratio"``: s - mean_k s_k over the references that never saw the image; ``"midpoint"``: s minus the
            middle of both means (online); ``"lira"``: Gaussian test, offline or (with ``in_mask``) online;
            ``"rmia"``: share of the other images that the image's ratio beats; ``"bayes"``: LiRA with variances shrunk
            to their common value and Student's t instead of the Gaussian.
        variance: of lira: ``"global"``, pooled over images (Carlini et al. for few references), or per ``"image"``.
        gamma: of rmia: how many times the ratio of another image (the paper's 2 is for class probabilities; ratios of
            losses are smaller, and 1 keeps the ranking of the ratio).
        prior_strength: of bayes: pseudo-observations of the common variance (ours: BaVarIA's abstract was at hand).

    Returns:
        (N,) float64, higher = more likely a member. Of ``"log-ratio"``, ``"midpoint"`` and ``"lira"`` with per-image
        variance a value does not depend on the other images.
    """
    s, refs, outside, inside = _check(target, references, in_mask)
    if kind not in KINDS or variance not in VARIANCES:
        expected = f"kind {', '.join(KINDS)} and variance {', '.join(VARIANCES)}"
        raise ValueError(f"expected {expected}, got {kind!r} and {variance!r}")
    online = in_mask is not None
    if kind == "midpoint" and not online:
        raise ValueError("kind 'midpoint' needs references trained on the images: pass in_mask, or use 'log-ratio'")
    if kind == "log-ratio":
        return s - _average(refs, outside)
    if kind == "midpoint":
        return s - (_average(refs, inside) + _average(refs, outside)) / 2
    if kind == "rmia":
        return _score_pairs(s - _average_exponentials(refs, (outside, inside)[: 1 + online]), gamma)
    fit, option = (_fit_student, prior_strength) if kind == "bayes" else (_fit_normal, variance)
    out = fit(refs, outside, option)
    if not online:  # LiRA, Eq. (4): 1 - Pr[N(mu_out, sd_out) > s], here as its logit: it does not saturate
        return out.logcdf(s) - out.logsf(s)
    return fit(refs, inside, option).logpdf(s) - out.logpdf(s)  # LiRA, Algorithm 1: log of the likelihood ratio


def _average(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean over some references per image: (R, N) -> (N,)."""
    return x.sum(axis=0, where=where) / where.sum(axis=0)


def _average_exponentials(x: np.ndarray, sides: tuple[np.ndarray, ...]) -> np.ndarray:
    """RMIA (arXiv 2312.03262): log Pr(x) = log mean_k exp s_k.

    Online, references with and without the image weigh half each, as the target does a priori; offline only those
    without it are there (the paper's correction a p + 1 - a needs probabilities; a = 1 here).
    """
    parts = [special.logsumexp(x, axis=0, b=side) - np.log(side.sum(axis=0)) for side in sides]
    return special.logsumexp(parts, axis=0) - np.log(len(parts))


def _score_pairs(ratio: np.ndarray, gamma: float) -> np.ndarray:
    """RMIA, pairwise ratios: share of images z with ratio(x) / ratio(z) >= gamma, the log ratios given."""
    if gamma <= 0:
        raise ValueError(f"expected gamma > 0, got {gamma}")
    return np.searchsorted(np.sort(ratio), ratio - np.log(gamma), side="right") / len(ratio)


def _sum_squares(x: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (N,), sum of squared deviations (N,) and degrees of freedom (N,) of some references per image."""
    mean = _average(x, where)
    squares, dof = ((x - mean) ** 2).sum(axis=0, where=where), where.sum(axis=0) - 1
    if not squares.any():
        raise ValueError("kinds 'lira' and 'bayes' need two references that differ per image: use 'log-ratio'")
    return mean, squares, dof


def _fit_normal(x: np.ndarray, where: np.ndarray, variance: str):
    mean, squares, dof = _sum_squares(x, where)
    if variance == "image" and dof.min() < 1:
        raise ValueError("variance 'image' needs two references on each side of every image: use 'global'")
    spread = squares.sum() / dof.sum() if variance == "global" else squares / dof
    return stats.norm(mean, np.sqrt(np.maximum(spread, 1e-12 * squares.sum() / dof.sum())))


def _fit_student(x: np.ndarray, where: np.ndarray, strength: float):
    """Predictive of a new s: flat prior on the mean, inverse-gamma prior around the common variance (conjugate)."""
    if strength <= 0:
        raise ValueError(f"expected prior_strength > 0, got {strength}")
    mean, squares, dof = _sum_squares(x, where)
    spread = (strength * squares.sum() / dof.sum() + squares) / (strength + dof)
    return stats.t(strength + dof, loc=mean, scale=np.sqrt(spread * (1 + 1 / (dof + 1))))


def _check(target: np.ndarray, references: np.ndarray, in_mask: np.ndarray | None) -> tuple[np.ndarray, ...]:
    s, refs = np.asarray(target, np.float64), np.ma.filled(np.ma.asarray(references, np.float64), 0.0)
    queried = ~np.ma.getmaskarray(references)
    if s.ndim != 1 or refs.ndim != 2 or refs.shape[1] != len(s) or not len(refs):
        raise ValueError(f"expected target (N,) and references (R, N) with R >= 1, got {s.shape} and {refs.shape}")
    if not (np.isfinite(s).all() and np.isfinite(refs).all()):
        raise ValueError("expected finite statistics, got NaN or infinite ones: a loss of 0 has no logarithm")
    inside = np.zeros(refs.shape, bool) if in_mask is None else np.asarray(in_mask, bool)
    if inside.shape != refs.shape:
        raise ValueError(f"expected in_mask {refs.shape}, got {inside.shape}")
    outside, inside = queried & ~inside, queried & inside
    if not outside.any(axis=0).all() or (in_mask is not None and not inside.any(axis=0).all()):
        raise ValueError("expected for every image a reference without it (and, with in_mask, one trained on it)")
    return s, refs, outside, inside
