"""EncoderMI: the augmented views of a training image stay closer together.

Source: Liu, Jia, Qu, Gong: EncoderMI (CCS 2021, arXiv 2108.11023). The model is queried with K augmented views of an
image; the similarities of all pairs of their vectors describe it. Steps: 1 views, 2 vectors (before the projection
head), 3 the K(K-1)/2 similarities, 4 an attacker: **V**ector (the sorted similarities and a perceptron), **S**et (Deep
Sets on the unordered similarities) or **T**hreshold (their mean).

Ours: batches hold as many members as non-members, and training stops early, because our attackers see a few hundred
images where the paper's see thousands. On a pilot (82 members, 640 non-members) S was no better with 256 channels than
with 64 and nine times slower.

Letters: N images, K views, P = K(K-1)/2 pairs, D embedding, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.attacks import network, query
from mia_utils.models import views

MEASURES = ("cosine", "euclidean", "pearson")


def compare_views(vectors: Tensor, *, measure: str = "cosine") -> Tensor:
    """Compare all pairs of an image's views (step 3).

    Args:
        vectors: (N, K, D) embeddings of the K >= 2 views.
        measure: ``"cosine"``; ``"pearson"``: the correlation over the D entries; ``"euclidean"``: minus the distance of
            the vectors as they are (on vectors of length one it would only bend the cosine).

    Returns:
        (N, P), higher = closer, in the order (2,1), (3,1), (3,2), (4,1) ...: the pairs of fewer views come first.
    """
    if vectors.ndim != 3 or vectors.shape[1] < 2:
        raise ValueError(f"expected vectors (N, K, D) with K >= 2, got {tuple(vectors.shape)}")
    if measure not in MEASURES:
        raise ValueError(f"expected measure {', '.join(MEASURES)}, got {measure!r}")
    if measure == "euclidean":
        # not through a matrix product: close vectors would cancel
        similarity = -torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")  # (N, K, K)
    else:
        centered = vectors - vectors.mean(-1, keepdim=True) if measure == "pearson" else vectors
        unit = F.normalize(centered, dim=-1)
        similarity = unit @ unit.transpose(1, 2)  # (N, K, D) x (N, D, K) -> (N, K, K)
    later, earlier = torch.tril_indices(*similarity.shape[1:], offset=-1)
    return similarity[:, later, earlier]


def extract_features(
    encoder,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    n_views: int = 10,
    augmentation: str = "simclr",
    measure: str = "cosine",
    pooling: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Query a frozen encoder with augmented views of every image (steps 1-3).

    Args:
        encoder: has ``embed`` and ``input_size``; the arguments of all queries: ``attacks/query.py``.
        n_views: views per image (K >= 2). The features of fewer views are the first columns of those of more.
        augmentation: a name of ``views.parse_augmentation``; ``"simclr"`` is the paper's (random resized crop (0.2, 1),
            flip .5, jitter .4/.4/.4/.1 with probability .8, gray .2).
        measure: see :func:`compare_views`.

    Returns:
        (N, P) float32 on the CPU, higher = closer.
    """
    images = query.check_query(encoder, images, image_ids)
    if n_views < 2:
        raise ValueError(f"expected n_views >= 2, got {n_views}")
    if measure not in MEASURES:
        raise ValueError(f"expected measure {', '.join(MEASURES)}, got {measure!r}")
    views.parse_augmentation(augmentation)  # an unknown name is an error even for no images
    chunk = batch_size or get_chunk(encoder, n_views, images.shape[1:3])
    features = [torch.empty(0, n_views * (n_views - 1) // 2)]
    options = dict(augmentation=augmentation, size=encoder.input_size, seed=seed)
    for rows in query.iterate_chunks(len(images), chunk, label="views", progress=progress):
        pixels = views.read_pixels(images, rows).to(query.get_device(encoder))
        with torch.inference_mode():
            # 1. K views of every image
            x = views.query_views(pixels, list(image_ids[rows]), n_views, **options)  # (n, K, 3, S, S)
            # 2. all views of the chunk in one forward
            vectors = encoder.embed(x.flatten(0, 1), pooling=pooling).float().unflatten(0, x.shape[:2])  # (n, K, D)
            # 3. all pairs
            features.append(compare_views(vectors, measure=measure).cpu())
    return torch.cat(features)


def get_chunk(encoder, n_views: int, image_size: Sequence[int]) -> int:
    """Images per forward so that views, resampling and activations of a chunk fit memory."""
    size, (height, width) = encoder.input_size, image_size
    view_bytes = 4 * size * (8 * 3 * size + 2 * 3 * height + height + width)  # colors; first pass; weights
    token_bytes = 4 * 16 * getattr(encoder, "dim", 768) * (getattr(encoder, "n_tokens", None) or 196)
    image_bytes = n_views * (view_bytes + token_bytes)
    return query.fit_chunk(query.get_device(encoder), image_bytes, cache=16e6, most=65536 / n_views)


# ------------------------------------------------------------------------------------------------------ attackers


def score_threshold(features: np.ndarray | Tensor) -> np.ndarray:
    """EncoderMI-T, nothing is trained: (N, P) -> (N,) float64 mean similarity, higher = more likely a member."""
    return _check_similarities(features).mean(axis=1, dtype=np.float64)


def fit_vector(
    features: np.ndarray | Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    widths: Sequence[int] = (256, 256),
    epochs: int = 300,
    batch_size: int = 50,
    lr: float = 1e-4,
    weight_decay: float = 1e-6,
    steps_per_epoch: int = 10,
    patience: int | None = 50,
    seed: int = 0,
) -> network.Attacker:
    """EncoderMI-V: a perceptron P-256-256-2 with tanh on the sorted similarities.

    Args:
        features: (N, P) similarities in any order: the network sorts them.
        is_member, validation, epochs, lr, weight_decay, steps_per_epoch, patience, seed: as in :func:`network.fit`.
            An epoch of the paper is a pass over its 20,000 images, ours a look at the validation set.
        widths: hidden layers.
        batch_size: members and as many non-members per step (the paper's 100 in all).

    Returns:
        Attacker, ``.score(features) -> (N,)`` float64, higher = more likely a member.
    """
    generator = seeds.generator(seed, "encodermi-v.init")
    sizes = [_check_similarities(features).shape[1], *widths]
    layers: list[nn.Module] = [_Sort()]
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [_make_linear(n_in, n_out, generator), nn.Tanh()]
    perceptron = nn.Sequential(*layers, _make_linear(sizes[-1], 2, generator), _Difference())
    options = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience, seed=seed)
    options |= dict(validation=validation, steps_per_epoch=steps_per_epoch)
    return network.train(perceptron, features, is_member, **options)


def fit_set(
    features: np.ndarray | Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    widths: Sequence[int] = (64, 64, 64),
    dropout: float = 0.5,
    standardize: str = "set",
    epochs: int = 100,
    batch_size: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 1e-7,
    max_norm: float = 5.0,
    steps_per_epoch: int = 10,
    patience: int | None = 10,
    seed: int = 0,
) -> network.Attacker:
    """EncoderMI-S: Deep Sets on all P similarities as points (0, 0, s); their order says nothing.

    Source: EncoderMI's released code, whose network is the point-cloud classifier of Zaheer et al. (arXiv 1703.06114).
    Ours differs from it in three ways: the *head* is one dropout and one linear layer (released: dropout, linear, tanh,
    dropout, linear); the *normalization* is over all coordinates of the P points without its clipping of outliers,
    in the network itself; and the layers have 64 channels, not 256. So it is our Set attacker, not a copy of theirs.

    Args:
        widths: channels of the equivariant layers.
        dropout: share of channels dropped before the logits.
        standardize: ``"set"``: by mean and deviation of the points of a set, zeros included: the level of the
            similarities cancels, their scatter beside the level stays. ``"fit"``: by mean and deviation of the
            fit set. A single pair has no scatter: it is always scaled by the fit set.
        max_norm: bound on the norm of a step's gradient.
        features, is_member, validation and the other options: as in :func:`fit_vector`.

    Returns:
        Attacker, ``.score(features) -> (N,)`` float64, higher = more likely a member.
    """
    if standardize not in ("set", "fit") or not widths or min(widths) < 1 or not 0 <= dropout < 1:
        given = f"{standardize!r}, {tuple(widths)}, {dropout}"
        raise ValueError(f"expected standardize 'set' or 'fit', widths >= 1 and dropout in [0, 1), got {given}")
    per_set = standardize == "set" and _check_similarities(features).shape[1] > 1
    model = _SetNetwork(widths=widths, dropout=dropout, per_set=per_set, seed=seed)
    options = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, patience=patience, seed=seed)
    options |= dict(validation=validation, steps_per_epoch=steps_per_epoch, max_norm=max_norm, standardize=not per_set)
    return network.train(model, features, is_member, **options)


class _SetNetwork(nn.Module):
    """Points (0, 0, s) -> equivariant layers -> maximum over the set -> dropout -> two logits."""

    def __init__(self, *, widths: Sequence[int], dropout: float, per_set: bool, seed: int):
        super().__init__()
        generator, sizes = seeds.generator(seed, "encodermi-s.init"), [3, *widths]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.Sequential(*(_EquivariantLayer(n_in, n_out, generator) for n_in, n_out in pairs))
        self.dropout = _Dropout(dropout, seeds.generator(seed, "encodermi-s.dropout"))
        self.logits = nn.Sequential(_make_linear(sizes[-1], 2, generator), _Difference())
        self.per_set = per_set

    def forward(self, x: Tensor) -> Tensor:
        """(N, P) -> (N, 1)."""
        if not self.training and len(x) > 256:  # P times H numbers an image: keep them few
            return torch.cat([self(part) for part in x.split(256)])
        points = F.pad(x[:, :, None], (2, 0))  # (N, P, 3)
        if self.per_set:
            sd, mean = torch.std_mean(points, dim=(1, 2), keepdim=True, correction=0)
            points = (points - mean) / sd.clamp(min=1e-12)  # equal zeros stay zeros
        pooled = self.layers(points).amax(1)  # (N, P, H) -> (N, H)
        return self.logits(self.dropout(pooled))


class _EquivariantLayer(nn.Module):
    """x_i -> tanh(G x_i + b - L max_j x_j): Deep Sets (arXiv 1703.06114), Eq. (4) with the maximum as pooling."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator):
        super().__init__()
        self.own = _make_linear(n_in, n_out, generator)
        self.largest = _make_linear(n_in, n_out, generator, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.own(x) - self.largest(x.amax(1, keepdim=True)))


class _Dropout(nn.Module):
    """Dropout from a private stream: torch's own would draw from the global one."""

    def __init__(self, share: float, generator: torch.Generator):
        super().__init__()
        self.share, self.generator = share, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self.generator) >= self.share) / (1 - self.share)


class _Sort(nn.Module):
    """Similarities in descending order: which views made a pair says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1, descending=True).values


class _Difference(nn.Module):
    """Logits (non-member, member) -> their difference: its binary cross-entropy is the cross-entropy of the two."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:] - x[:, :1]


def _make_linear(n_in: int, n_out: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer with torch's default weights from a private stream."""
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    return linear


def _check_similarities(features: np.ndarray | Tensor) -> np.ndarray:
    x = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"expected features of shape (N, P) with P >= 1 pairs, got {x.shape}")
    return x
