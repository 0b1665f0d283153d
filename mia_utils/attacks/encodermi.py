"""EncoderMI: the augmented views of a training image stay closer together.

Source: Liu, Jia, Qu, Gong: EncoderMI (CCS 2021, arXiv 2108.11023). An image is asked about in K augmented versions; the
similarities of all pairs of their vectors describe it. Steps: 1 views, 2 vectors (before the projection head), 3 the
K(K-1)/2 similarities, 4 an attacker: **V**ector (the sorted similarities and a perceptron), **S**et (Deep Sets on the
unordered similarities) or **T**hreshold (their mean).

Differences from the paper: its attackers see thousands of members, ours a few hundred images and more strangers than
members. So batches hold as many members as strangers, validation is looked at every 10 steps, and training stops when
it brought nothing better for long. Pilot on real similarities with a planted leak (82 members, 640 strangers):
V reached its best validation between 10 and 3,000 steps; S was no better with 256 channels than with 64 (AUC .652 both)
and nine times slower. The set attacker scales every set by its own mean and spread, as released, and so sees only how
scattered an image's similarities are beside their level; on a leak in the level alone that costs a little (.652
against .664 when scaled by the fit set, and .666 of T).

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
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.attacks import network
from mia_utils.models import views

MEASURES = ("cosine", "euclidean", "pearson")


def compare_views(vectors: Tensor, *, measure: str = "cosine") -> Tensor:
    """Compare all pairs of an image's views (step 3).

    Args:
        vectors: (N, K, D) embeddings of the K views.
        measure: ``"cosine"``; ``"pearson"``: the correlation over the D entries; ``"euclidean"``: minus the distance of
            the vectors as they are (on vectors of length one it would only bend the cosine).

    Returns:
        (N, P), higher = closer, in the order (2,1), (3,1), (3,2), (4,1) ...: the pairs of fewer views come first.

    Raises:
        ValueError: another shape, fewer than two views, or an unknown measure.
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
        encoder: has ``embed`` and ``input_size``.
        images: (N, H, W, 3) uint8; streamed ones (``datasets.folders.ImageFiles``) are decoded a chunk at a time.
        image_ids: N ids that key the views: an image's features do not depend on its batch or its order.
        n_views: views per image (K). The features of fewer views are the first columns of those of more.
        augmentation: a name of ``views.parse_augmentation``; ``"simclr"`` is the paper's (random resized crop (0.2, 1),
            flip .5, jitter .4/.4/.4/.1 with probability .8, gray .2).
        measure: ``"cosine"``, ``"euclidean"`` or ``"pearson"``, see :func:`compare_views`.
        pooling: ``"cls"``, ``"mean"``, or ``"auto"`` = the vector that the method trained.
        batch_size: images per forward; None fits it to memory. Changes nothing but speed.
        progress: show a bar with images/s when it takes longer than five seconds.

    Returns:
        (N, P) float32 on the CPU, higher = closer.

    Raises:
        ValueError: wrong shapes, fewer than two views, an unknown measure or augmentation, an encoder without vectors.
    """
    images = check_query(encoder, images, image_ids)
    if n_views < 2:
        raise ValueError(f"expected n_views >= 2, got {n_views}")
    if measure not in MEASURES:
        raise ValueError(f"expected measure {', '.join(MEASURES)}, got {measure!r}")
    views.parse_augmentation(augmentation)  # an unknown name is an error even for no images
    device, size = getattr(encoder, "device", "cpu"), encoder.input_size
    chunk = batch_size or _get_chunk(encoder, n_views, images.shape[1:3])
    features = [torch.empty(0, n_views * (n_views - 1) // 2)]
    with tqdm(total=len(images), unit="image", desc="views", disable=not progress, delay=5, leave=False) as bar:
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            ids, pixels = list(image_ids[rows]), views.read_pixels(images, rows).to(device)
            with torch.inference_mode():
                # 1. K views of every image
                x = views.query_views(pixels, ids, n_views, augmentation=augmentation, size=size, seed=seed)
                # 2. all views of the chunk in one forward
                vectors = encoder.embed(x.flatten(0, 1), pooling=pooling)  # (n K, D)
                # 3. all pairs
                vectors = vectors.float().unflatten(0, (len(ids), n_views))  # (n, K, D)
                features.append(compare_views(vectors, measure=measure).cpu())
            bar.update(len(ids))
    return torch.cat(features)


def check_query(encoder, images: np.ndarray, image_ids: Sequence[str]) -> np.ndarray:
    """Check what an attack on vectors is asked to query; return images to slice, streamed ones as they are."""
    images = views.check_images(images, image_ids)
    if not callable(getattr(encoder, "embed", None)):
        raise ValueError(f"expected an encoder with embed(images), got {type(encoder).__name__}: use encoders.wrap")
    return images


def _get_chunk(encoder, n_views: int, image_size: Sequence[int]) -> int:
    """Images per forward so that views, resampling and activations of a chunk fit a memory budget."""
    device = torch.device(getattr(encoder, "device", "cpu"))
    # CPU: the size at which the extraction was fastest (activations stay in the cache)
    budget = 0.3 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 16e6
    size, (height, width) = encoder.input_size, image_size
    view_bytes = 4 * size * (8 * 3 * size + 2 * 3 * height + height + width)  # colors; first pass; weights
    token_bytes = 4 * 16 * getattr(encoder, "dim", 768) * (getattr(encoder, "n_tokens", None) or 196)
    # and at most 65,536 views: kernels index with 32 bits
    return max(1, int(min(budget / (n_views * (view_bytes + token_bytes)), 65536 / n_views)))


# ------------------------------------------------------------------------------------------------------ attackers


def score_threshold(features: np.ndarray | Tensor) -> np.ndarray:
    """EncoderMI-T: the mean similarity. Nothing is trained; the threshold is chosen elsewhere.

    Args:
        features: (N, P) similarities.

    Returns:
        (N,) float64, higher = more likely a member.
    """
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
        is_member: (N,) bool.
        validation: ``(features (M, P), is_member (M,))``, disjoint from the fit set and from every image reported on.
        widths: hidden layers.
        batch_size: members and as many strangers per step (the paper's 100 in all); the rarer class where it has fewer.
        epochs, steps_per_epoch, patience: at most so many looks at validation, the steps between two of them, and the
            looks without a better AUC after which training stops (None: never). An epoch of the paper is a pass over
            its 20,000 images.
        lr, weight_decay: of Adam.
        seed: seed of the private streams of weights and batches.

    Returns:
        Attacker, ``.score(features) -> (N,)`` float64, higher = more likely a member.
    """
    generator = seeds.generator(seed, "encodermi-v.init")
    sizes = [_check_similarities(features).shape[1], *widths]
    layers: list[nn.Module] = [_Sort()]
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [_make_linear(n_in, n_out, generator), nn.Tanh()]
    return network.train(
        nn.Sequential(*layers, _make_linear(sizes[-1], 2, generator), _Difference()),
        features,
        is_member,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        steps_per_epoch=steps_per_epoch,
        patience=patience,
        seed=seed,
    )


def fit_set(
    features: np.ndarray | Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    width: int = 64,
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

    Source: the released code's network, which is the point-cloud classifier of Zaheer et al. (arXiv 1703.06114).

    Args:
        width: channels of the three layers (H).
        dropout: share of channels dropped before the logits.
        standardize: ``"set"``: over all coordinates of the points of a set, zeros included, as released: the level of
            the similarities cancels, their scatter beside the level stays. ``"fit"``: by mean and deviation of the
            fit set. A single pair has no scatter: it is always scaled by the fit set.
        max_norm: bound on the norm of a step's gradient.
        features, is_member, validation and the other options: as in :func:`fit_vector`.

    Returns:
        Attacker, ``.score(features) -> (N,)`` float64, higher = more likely a member.

    Raises:
        ValueError: an option out of range.
    """
    if standardize not in ("set", "fit") or width < 1 or not 0 <= dropout < 1:
        given = f"{standardize!r}, {width}, {dropout}"
        raise ValueError(f"expected standardize 'set' or 'fit', width >= 1 and dropout in [0, 1), got {given}")
    per_set = standardize == "set" and _check_similarities(features).shape[1] > 1
    return network.train(
        _SetNetwork(width=width, dropout=dropout, per_set=per_set, seed=seed),
        features,
        is_member,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        steps_per_epoch=steps_per_epoch,
        patience=patience,
        standardize=not per_set,
        max_norm=max_norm,
        seed=seed,
    )


class _SetNetwork(nn.Module):
    """Points (0, 0, s) -> three equivariant layers -> maximum over the set -> dropout -> two logits."""

    def __init__(self, *, width: int, dropout: float, per_set: bool, seed: int):
        super().__init__()
        generator = seeds.generator(seed, "encodermi-s.init")
        self.layers = nn.Sequential(*(_EquivariantLayer(n_in, width, generator) for n_in in (3, width, width)))
        self.dropout = _Dropout(dropout, seeds.generator(seed, "encodermi-s.dropout"))
        self.logits = nn.Sequential(_make_linear(width, 2, generator), _Difference())
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
    """Logits (stranger, member) -> their difference: its binary cross-entropy is the cross-entropy of the two."""

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
