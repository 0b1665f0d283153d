"""The controls beside every attack; each holds an AUC of 0.5 when the protocol is sound.

*no-model*: a small classifier on statistics of the very images that the attack queries; above 0.5 members and
non-members differ as *data* (Das, Zhang, Tramer, arXiv 2406.16201). *untrained*: the attack on an encoder with fresh
weights. *permuted*: the attack on labels that are permuted within each role, the evaluation set's included.
"""

import numpy as np
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from mia_utils import seeds

THUMBNAIL = (6, 8)  # rows, columns
_CHUNK = 512  # images in float at once

Fold = tuple[np.ndarray, np.ndarray, np.ndarray]  # attack-training, attack-validation, evaluation


def extract_statistics(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """Describe images (N, H, W, 3) or (N, 3, H, W), uint8 or float in [0, 1], by numbers that need no model.

    Returns:
        (N, 56) float64: means and standard deviations of the channels (6), logarithms of the gradient and the Laplacian
        energy of the luminance (2), luminance thumbnail of 6 rows and 8 columns by area averaging (48).
    """
    x = images.detach().cpu() if isinstance(images, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    if x.ndim != 4 or 3 not in (x.shape[1], x.shape[3]):
        raise ValueError(f"expected images of shape (N, H, W, 3) or (N, 3, H, W), got {tuple(x.shape)}")
    if x.shape[3] == 3:  # also where both axes have 3: pools are channel-last
        x = x.permute(0, 3, 1, 2)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"expected images as uint8 or float in [0, 1], got {x.dtype}")
    return np.concatenate([_describe_chunk(part) for part in x.split(_CHUNK)])


def _describe_chunk(x: torch.Tensor) -> np.ndarray:
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    if not torch.isfinite(x).all() or x.min() < -0.01 or x.max() > 1.01:
        raise ValueError(f"expected float images in [0, 1], got values from {x.min():.3g} to {x.max():.3g}")
    gray = x.mean(dim=1)  # (N, H, W)
    pixels = gray.numpy()
    gradient = np.diff(pixels, axis=1)[:, :, :-1] ** 2 + np.diff(pixels, axis=2)[:, :-1] ** 2
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32)[None]
    laplacian = ndimage.convolve(pixels, kernel, mode="nearest") ** 2
    # energies are heavy-tailed: their logarithm is what a linear classifier can use; 1e-6 keeps flat images finite
    energies = np.log(np.stack([gradient.mean(axis=(1, 2)), laplacian.mean(axis=(1, 2))], axis=1) + 1e-6)
    thumbnail = F.adaptive_avg_pool2d(gray[:, None], THUMBNAIL).flatten(1)
    moments = torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)], dim=1)
    return np.concatenate([moments.numpy(), energies, thumbnail.numpy()], axis=1).astype(np.float64)


def score_without_model(images: np.ndarray | torch.Tensor, is_member: np.ndarray, fold: Fold) -> np.ndarray:
    """Score membership without a model: statistics of the images, standardized, and a logistic regression.

    The classifier is fit on the attack-training and attack-validation positions. Those of attack-validation are scored
    by one fit on attack-training only, so that a threshold can be chosen there.

    Args:
        images: the *views* that the attack queries, as in ``extract_statistics``, or their statistics (N, F).
        is_member, fold: (N,) bool; disjoint positions.

    Returns:
        (N,) float64, higher = more likely a member; NaN where a position is not scored.
    """
    is_member, (fit, validation, report) = _check(is_member, fold)
    x = np.asarray(images, dtype=np.float64) if np.ndim(images) == 2 else extract_statistics(images)
    if len(x) != len(is_member):
        raise ValueError(f"expected as many images as labels, got {len(x)} and {len(is_member)}")
    score, known = np.full(len(x), np.nan), np.concatenate([fit, validation])
    score[report] = _fit_blind(x[known], is_member[known]).decision_function(x[report])
    if len(validation):
        score[validation] = _fit_blind(x[fit], is_member[fit]).decision_function(x[validation])
    return score


def _fit_blind(x: np.ndarray, is_member: np.ndarray) -> Pipeline:
    # C = 0.1 is fixed: with 56 columns and a few hundred members a search would cost more images than it gains
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    return model.fit(x, is_member)


def permute_labels(is_member: np.ndarray, fold: Fold, *, seed: int = 0, groups: np.ndarray | None = None) -> np.ndarray:
    """Permute labels (N,) within each set of a fold, so that each keeps its number of members: (N,) bool.

    Args:
        is_member, fold: as in ``score_without_model``; positions outside the fold keep their label.
        groups: (N,) block ids: blocks of one side (others are a ValueError) change sides as a whole.
    """
    is_member, fold = _check(is_member, fold)
    permuted, rng = is_member.copy(), seeds.rng(seed, "controls.permute")
    for cell in fold:
        if groups is None:
            permuted[cell] = rng.permutation(is_member[cell])
            continue
        _, first, where = np.unique(np.asarray(groups)[cell], return_index=True, return_inverse=True)
        sides = is_member[cell][first]
        if (sides[where] != is_member[cell]).any():
            raise ValueError("expected blocks of members or of non-members, got a block that holds both")
        permuted[cell] = rng.permutation(sides)[where]
    return permuted


def _check(is_member: np.ndarray, fold: Fold) -> tuple[np.ndarray, Fold]:
    fold = tuple(np.asarray(part, dtype=np.int64) for part in fold)
    used = np.concatenate(fold)
    if len(np.unique(used)) != len(used) or not np.isin(used, np.arange(len(is_member))).all():
        raise ValueError(f"expected disjoint positions below {len(is_member)} in the sets of a fold")
    return np.asarray(is_member).astype(bool), fold
