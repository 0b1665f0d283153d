"""LpLA: the length of an embedding alone leaks membership, with one query per image.

Source: Sun et al. (arXiv 2506.05743). Steps: 1 the whole image, 2 its vector, 3 the vector's p-norm, 4 the likelihood
ratio of that norm under two densities, one fitted to members and one to non-members. Ours: of the paper only the
abstract was at hand, so p = 2, the normal densities and their maximum-likelihood fit are our reading of it.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mia_utils.attacks import network, query
from mia_utils.models import views


def extract_norms(
    encoder, images: np.ndarray, *, image_ids: Sequence[str], p: float = 2.0, pooling: str = "auto", seed: int = 0,
    batch_size: int = 64, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Query a frozen encoder once per image and take the p-norm of its output (steps 1-3): (N, 1) float32 on the CPU.

    On a class token after its layer norm the 2-norm is all but constant: other p, or ``pooling="mean"``, say more.
    """
    images = query.check_query(encoder, images, image_ids)
    if not p > 0:
        raise ValueError(f"expected p > 0, got {p}")
    device, norms = query.get_device(encoder), [torch.empty(0, 1)]
    for rows in query.iterate_chunks(len(images), batch_size, label="norms", progress=progress):
        pixels = views.read_pixels(images, rows).to(device)
        with torch.inference_mode():
            whole = views.make_views(pixels, image_ids[rows], size=encoder.input_size, seed=seed)  # 1. (n, 3, S, S)
            vectors = encoder.embed(whole, pooling=pooling)  # 2. (n, D)
            norm = torch.linalg.vector_norm(vectors.float(), ord=float(p), dim=1, keepdim=True)  # 3. (n, 1)
        norms.append(norm.cpu())
    return torch.cat(norms)


def fit_ratio(
    features: np.ndarray | Tensor, is_member: np.ndarray, *, validation: tuple[Any, Any], seed: int = 0
) -> SimpleNamespace:
    """Fit the ratio of norms (N, 1), step 4; ``.score`` maps them to (N,) float64, higher = more likely a member."""
    x, y = network.check_pair(features, is_member, "fit")
    if x.shape[1] != 1:
        raise ValueError(f"expected features of shape (N, 1), got {x.shape}")
    members, others = (_fit_normal(x[side, 0].astype(np.float64)) for side in (y, ~y))

    def score(features: np.ndarray | Tensor) -> np.ndarray:
        norms = network.check_features(features, "features")[:, 0].astype(np.float64)
        return members.logpdf(norms) - others.logpdf(norms)

    return SimpleNamespace(score=score)


def _fit_normal(x: np.ndarray) -> Any:
    # norms that agree to rounding have no density; the floor keeps their ratio finite
    return stats.norm(x.mean(), max(x.std(), 1e-6 * max(np.abs(x).max(), 1e-6)))
