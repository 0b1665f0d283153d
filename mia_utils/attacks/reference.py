"""Calibration by reference models: an image is compared with what models that never saw it make of it.

Sources: difficulty calibration (arXiv 2111.08440), LiRA (arXiv 2112.03570), RMIA (arXiv 2312.03262), BaVarIA (arXiv
2603.11799), all offline. They read one number s of an image, higher = more likely a member, on a scale where a
difference is a log ratio. References trained longer than the target spoil the calibration.

>>> calibrate(np.array([-1.0, -2.0]), np.array([[-2.0, -2.0], [-4.0, -2.0]])).tolist()
[2.0, 0.0]
"""

import numpy as np
from scipy import special, stats

KINDS = ("log-ratio", "lira", "rmia", "bayes")
PRIOR_STRENGTH = 4.0  # of bayes: pseudo-observations of the common variance (ours: BaVarIA's abstract was at hand)


def calibrate(target: np.ndarray, references: np.ndarray, *, kind: str = "log-ratio") -> np.ndarray:
    """Calibrate the target's statistic s (N,) of every image by that of R reference models (R, N).

    ``"log-ratio"``: s minus the mean of the references, the only kind that does not depend on the other images;
    ``"lira"``: Gaussian test with one variance for all images; ``"rmia"``: share of images whose ratio is no larger;
    ``"bayes"``: LiRA with variances shrunk to their common value and Student's t.

    Returns:
        (N,) float64, higher = more likely a member.
    """
    s, refs = np.asarray(target, np.float64), np.asarray(references, np.float64)
    if s.ndim != 1 or not len(refs) or refs.shape != (len(refs), len(s)):
        raise ValueError(f"expected target (N,) and references (R, N) with R >= 1, got {s.shape} and {refs.shape}")
    if not (np.isfinite(s).all() and np.isfinite(refs).all()):
        raise ValueError("expected finite statistics, got NaN or infinite ones: a loss of 0 has no logarithm")
    if kind not in KINDS:
        raise ValueError(f"expected kind {', '.join(KINDS)}, got {kind!r}")
    mean = refs.mean(axis=0)
    if kind == "log-ratio":
        return s - mean
    if kind == "rmia":  # log Pr(x) = log mean_k exp s_k; the paper's correction a p + 1 - a needs probabilities, a = 1
        ratio = s - (special.logsumexp(refs, axis=0) - np.log(len(refs)))
        return np.searchsorted(np.sort(ratio), ratio, side="right") / len(ratio)
    squares, dof = ((refs - mean) ** 2).sum(axis=0), len(refs) - 1
    if not squares.any():
        raise ValueError("kinds 'lira' and 'bayes' need two references that differ per image: use 'log-ratio'")
    common = squares.sum() / (dof * len(s))
    out = stats.norm(mean, np.sqrt(common))
    if kind == "bayes":  # predictive of a new s: flat prior on the mean, inverse-gamma around the common variance
        spread = (PRIOR_STRENGTH * common + squares) / (PRIOR_STRENGTH + dof)
        out = stats.t(PRIOR_STRENGTH + dof, loc=mean, scale=np.sqrt(spread * (1 + 1 / len(refs))))
    return out.logcdf(s) - out.logsf(s)  # LiRA, Eq. (4): 1 - Pr[N(mu_out, sd_out) > s], its logit does not saturate
