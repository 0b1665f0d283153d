"""EncoderMI: the augmented views of a training image stay closer together.

Source: Liu, Jia, Qu, Gong: EncoderMI (CCS 2021, arXiv 2108.11023). Steps: 1 K augmented views of an image, 2 their
vectors (before the projection head), 3 the P = K(K-1)/2 similarities of all pairs, 4 an attacker: **V**ector (a
perceptron on the sorted similarities), **S**et (Deep Sets on the unordered ones) or **T**hreshold (their mean). Ours:
balanced batches and early stopping, because our attackers see a few hundred images where the paper's see thousands.
Letters: N images, K views, P pairs, D embedding, H hidden width.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.attacks import network, query
from mia_utils.models import views

MEASURES = ("cosine", "euclidean", "pearson")


def compare_views(vectors: Tensor, *, measure: str = "cosine") -> Tensor:
    """Compare all pairs of an image's views (step 3): (N, K, D) -> (N, P), higher = closer.

    In the order (2,1), (3,1), (3,2), (4,1) ...: the pairs of fewer views come first. ``"pearson"`` is the correlation
    over the D entries, ``"euclidean"`` minus the distance of the vectors as they are, not of length one.
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
    encoder, images: np.ndarray, *, image_ids: Sequence[str], n_views: int = 10, augmentation: str = "simclr",
    measure: str = "cosine", pooling: str = "auto", seed: int = 0, batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Query a frozen encoder with K = ``n_views`` augmented views of every image (steps 1-3): :func:`compare_views`.

    ``augmentation`` is a name of ``views.parse_augmentation``, ``"simclr"`` the paper's; see ``attacks/query.py``.
    """
    images = query.check_query(encoder, images, image_ids)
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
    return query.fit_views(encoder, n_views, view_bytes, cache=16e6)


def score_threshold(features: np.ndarray | Tensor) -> np.ndarray:
    """EncoderMI-T, nothing is trained: (N, P) -> (N,) float64 mean similarity, higher = more likely a member."""
    return network.check_features(features, "features").mean(axis=1, dtype=np.float64)


def make_vector(n_pairs: int, *, widths: Sequence[int], seed: int) -> nn.Sequential:
    """EncoderMI-V: a perceptron P-256-256-2 with tanh on the sorted similarities."""
    generator, sizes = seeds.generator(seed, "encodermi-v.init"), [n_pairs, *widths]
    layers: list[nn.Module] = [_Sort()]
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [_make_linear(n_in, n_out, generator), nn.Tanh()]
    return nn.Sequential(*layers, _make_linear(sizes[-1], 2, generator), _Difference())


class SetNetwork(nn.Module):
    """EncoderMI-S: Deep Sets on all P similarities as points (0, 0, s); their order says nothing.

    Points -> equivariant layers -> maximum over the set -> dropout -> two logits. By mean and deviation of the points,
    zeros included, the level of the similarities cancels and their scatter beside the level stays; a single pair has no
    scatter. Source: the released code, whose network is that of Zaheer et al. (arXiv 1703.06114). Ours: one dropout and
    one linear layer as head (released: dropout, linear, tanh, dropout, linear), no clipping of outliers, 64 channels,
    not 256.
    """

    def __init__(self, n_pairs: int, *, widths: Sequence[int], seed: int, dropout: float = 0.5):
        super().__init__()
        generator, sizes = seeds.generator(seed, "encodermi-s.init"), [3, *widths]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.Sequential(*(_EquivariantLayer(n_in, n_out, generator) for n_in, n_out in pairs))
        # a private stream: torch's own dropout would draw from the global one
        self.dropout, self.generator = dropout, seeds.generator(seed, "encodermi-s.dropout")
        self.logits = nn.Sequential(_make_linear(sizes[-1], 2, generator), _Difference())
        self.per_set = n_pairs > 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, P) -> (N, 1)."""
        if not self.training and len(x) > 256:  # P times H numbers an image: keep them few
            return torch.cat([self(part) for part in x.split(256)])
        points = F.pad(x[:, :, None], (2, 0))  # (N, P, 3)
        if self.per_set:
            sd, mean = torch.std_mean(points, dim=(1, 2), keepdim=True, correction=0)
            points = (points - mean) / sd.clamp(min=1e-12)  # equal zeros stay zeros
        pooled = self.layers(points).amax(1)  # (N, P, H) -> (N, H)
        if self.training:
            kept = torch.rand(pooled.shape, generator=self.generator) >= self.dropout
            pooled = pooled * kept / (1 - self.dropout)
        return self.logits(pooled)


class _EquivariantLayer(nn.Module):
    """x_i -> tanh(G x_i + b - L max_j x_j): Deep Sets (arXiv 1703.06114), Eq. (4) with the maximum as pooling."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator):
        super().__init__()
        self.own = _make_linear(n_in, n_out, generator)
        self.largest = _make_linear(n_in, n_out, generator, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.own(x) - self.largest(x.amax(1, keepdim=True)))


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


# the paper's schedules; its epoch is a pass over 20,000 images, ours a look at the validation set
_fit = partial(network.fit, batch_size=50)
fit_vector = partial(_fit, make=make_vector, widths=(256, 256), epochs=300, lr=1e-4, weight_decay=1e-6, patience=50)
fit_set = partial(_fit, make=SetNetwork, widths=(64, 64, 64), weight_decay=1e-7, max_norm=5.0)
