"""LpLA: the length of an embedding alone leaks membership, with one query per image.

Source: Sun et al. (arXiv 2506.05743). Steps: 1 the whole image, 2 its vector, 3 the vector's p-norm, 4 the likelihood
ratio of that norm under two densities, one fitted to members and one to non-members.

Ours: of the paper only the abstract was at hand, so p = 2, the normal densities and their maximum-likelihood fit are
our reading of "likelihood of the p-norm"; a kernel density stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mia_utils.attacks import network, query
from mia_utils.models import views

DENSITIES = ("normal", "kernel")


def extract_norms(
    encoder,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    p: float = 2.0,
    pooling: str = "auto",
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Query a frozen encoder once per image and measure its output (steps 1-3): (N, 1) float32 on the CPU.

    Args:
        encoder: has ``embed`` and ``input_size``; the arguments of all queries: ``attacks/query.py``.
        p: order of the norm, > 0; ``float("inf")`` is the largest entry. On a class token after its layer norm the
            2-norm is all but constant: other p, or ``pooling="mean"``, have more to say.
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


@dataclass(frozen=True)
class RatioAttacker:
    """Log-densities (N,) -> (N,) of the norm among members and among non-members (step 4)."""

    members: Callable
    nonmembers: Callable

    def score(self, features: np.ndarray | Tensor) -> np.ndarray:
        """Score images: (N, 1) norms -> (N,) float64 log likelihood ratio, higher = more likely a member."""
        x = _check_norms(network.check_features(features, "features"))
        return self.members(x) - self.nonmembers(x)


def fit_ratio(
    features: np.ndarray | Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    density: str = "normal",
    seed: int = 0,
) -> RatioAttacker:
    """Fit the density of norms (N, 1) among members and non-members: ``"normal"``, or ``"kernel"`` (Scott's rule).

    ``validation`` and ``seed`` are not used, nothing is chosen or drawn: every attacker is called alike.
    """
    x, y = network.check_pair(features, is_member, "fit")
    x = _check_norms(x)
    if density not in DENSITIES:
        raise ValueError(f"expected density {' or '.join(DENSITIES)}, got {density!r}")
    return RatioAttacker(*(_fit_density(x[y == side], density) for side in (True, False)))


def _fit_density(x: np.ndarray, density: str) -> Callable:
    # norms that agree to rounding have no density; the floor keeps their ratio finite
    sd = max(x.std(), 1e-6 * max(np.abs(x).max(), 1e-6))
    if density == "normal":
        return stats.norm(x.mean(), sd).logpdf
    if len(x) < 2 or x.std() < sd:
        raise ValueError(f"expected norms that differ, got {len(x)} equal ones: use density='normal' or another p")
    return stats.gaussian_kde(x).logpdf


def _check_norms(x: np.ndarray) -> np.ndarray:
    if x.shape[1] != 1:
        raise ValueError(f"expected features of shape (N, 1), got {x.shape}")
    return x[:, 0].astype(np.float64)
