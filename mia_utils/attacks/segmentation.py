"""Segmentation membership inference: a segmenter is surer of the pixels it was trained on.

Source: He, Rahimian, Schiele, Fritz: Segmentations-Leak (ECCV 2020, arXiv 1912.09685); the attackers that see less:
Type-I (prediction only) after Chobola et al. (arXiv 2212.01082), label-only after the paper's Argmax defense. Steps:
1 posteriors of the whole image, 2 an input map that sets them beside the ground-truth labels; then
``attacks/patches.py``: 3 patches of it, 4 a small ResNet judges each, 5 their logits are summed.

Letters: N images, C classes, H W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mia_utils.attacks import patches, query
from mia_utils.models import views

# steps 3 to 5, so that the whole attack is at hand under one name
fit, make_network, PatchAttacker = patches.fit, patches.make_network, patches.PatchAttacker
draw_patches, gather_patches, get_patch_size = patches.draw_patches, patches.gather_patches, patches.get_patch_size

TINY = 1e-30  # smallest posterior inside the logarithm, as released: no loss exceeds 69.08
ARGMAX_DIVISOR = 50.0  # the released code divides the loss map of argmax posteriors (0 or 69.08) by this
GRID_FROM, GRID_STEP = 512, 8  # maps of images this high are averaged over cells of 8 x 8 (paper: 1024 -> 128 rows)
STORED = np.float16  # maps of thousands of images; 3 digits of a loss are more than its noise


# ------------------------------------------------------------------------------------------ 2. input maps


def make_loss_map(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Structured loss map: -log of the posterior of the labeled class at every pixel.

    Source: Segmentations-Leak (arXiv 1912.09685), section 3; released code: posteriors renormalized per pixel and kept
    above 1e-30, ignored pixels 0.

    Args:
        posteriors: (N, C, H, W) float, not negative.
        labels: (N, H, W) integer in [0, C), or ``ignore_index``.
        ignore_index: label of pixels without a class.

    Returns:
        (N, 1, H, W), the dtype of ``posteriors``; higher = more likely a *non-member's* pixel.
    """
    labels = _check_labels(posteriors, labels, ignore_index)
    valid = (labels != ignore_index).unsqueeze(1)  # (N, 1, H, W)
    index = labels.unsqueeze(1).where(valid, 0)
    p = posteriors.gather(1, index) / posteriors.sum(1, keepdim=True).clamp_min(TINY)
    return -torch.log(p.clamp_min(TINY)) * valid + 0.0  # + 0: no negative zeros


def make_concatenation(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Concatenate posteriors and one-hot labels (ignored pixels: all zeros): (N, 2C, H, W); arguments as above."""
    return patches.join_one_hot(posteriors, _check_labels(posteriors, labels, ignore_index))


def make_argmax(posteriors: Tensor) -> Tensor:
    """One-hot posteriors (N, C, H, W): what is left when a model only names the class of every pixel.

    Of equals the first. The loss map of it is 0 where the class is right and 69.08 where it is wrong; attackers get it
    divided by ``ARGMAX_DIVISOR`` as in the released code.
    """
    if posteriors.ndim != 4:
        raise ValueError(f"posteriors: expected (N, C, H, W), got {tuple(posteriors.shape)}")
    return torch.zeros_like(posteriors).scatter_(1, posteriors.argmax(1, keepdim=True), 1.0)


def compute_mean_loss(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mean loss of an image over its valid pixels: the global-loss baseline, score = -mean loss.

    An image without one valid pixel says nothing: it gets log C, the loss of a model that guesses evenly.

    Returns:
        (N,) float; higher = more likely a *non-member*.
    """
    loss = make_loss_map(posteriors, labels, ignore_index=ignore_index).flatten(1)  # ignored pixels are 0
    n_valid = (labels != ignore_index).flatten(1).sum(1).to(loss.device)
    nothing = math.log(posteriors.shape[1])
    return torch.where(n_valid > 0, loss.sum(1) / n_valid.clamp_min(1), torch.full_like(loss[:, 0], nothing))


def compute_class_losses(
    loss_map: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_classes: int, *, ignore_index: int = 255
) -> np.ndarray:
    """Mean loss of every class in every image, (N, C) float64, NaN where it is absent: which classes leak membership.

    ``loss_map`` (N, 1, H, W) is that of :func:`make_loss_map` at full resolution, ``labels`` (N, H, W) integer.
    """
    loss, labels = np.asarray(loss_map, np.float64), np.asarray(labels).astype(np.int64)
    if loss.shape != (len(labels), 1, *labels.shape[1:]):
        raise ValueError(f"expected loss maps (N, 1, H, W) for labels (N, H, W), got {loss.shape} and {labels.shape}")
    image = np.broadcast_to(np.arange(len(labels))[:, None, None], labels.shape)
    valid = (labels != ignore_index) & (labels < n_classes)
    cell, n_cells = (image * n_classes + labels)[valid], len(labels) * n_classes
    total, count = np.bincount(cell, loss[:, 0][valid], minlength=n_cells), np.bincount(cell, minlength=n_cells)
    return np.divide(total, count, out=np.full(n_cells, np.nan), where=count > 0).reshape(-1, n_classes)


def _check_labels(posteriors: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    if labels is None:
        raise ValueError("expected masks= (label maps) for this attacker, got none: extract_posteriors needs no labels")
    if posteriors.ndim != 4 or labels.ndim != 3 or posteriors.shape[2:] != labels.shape[1:]:
        got = f"{tuple(posteriors.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected posteriors (N, C, H, W) and labels (N, H, W) of the same N, H and W, got {got}")
    if len(posteriors) != len(labels):
        raise ValueError(f"expected one label map per image, got {len(labels)} for {len(posteriors)} images")
    labels = labels.to(posteriors.device).long()
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= posteriors.shape[1]))
    if wrong.any():
        raise ValueError(
            f"labels hold the id {int(labels[wrong][0])}, expected 0 to {posteriors.shape[1] - 1} for posteriors of "
            f"{posteriors.shape[1]} classes, or {ignore_index} to ignore: map the label spaces first"
        )
    return labels


# ------------------------------------------------------------------------------------------ 1. queries


def _to_grid(maps: Tensor) -> Tensor:
    """Average (N, C, H, W) over cells of 8 x 8 where images are large; small ones keep their resolution."""
    return F.avg_pool2d(maps, GRID_STEP) if maps.shape[2] >= GRID_FROM else maps


def get_chunk(device: str | torch.device, height: int, width: int) -> int:
    """Images per forward, so that activations stay near the cache (CPU: 21 of 96 x 128) or fit in memory."""
    pixels = 2**18 if torch.device(device).type == "cpu" else 2**23
    return max(1, pixels // (height * width))


def _query_with(make: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., np.ndarray]:
    """Turn ``make(posteriors, labels)`` of a chunk into an extract that queries a segmenter about all images."""

    def extract(
        model: Any,
        images: np.ndarray,
        *,
        image_ids: Sequence[str],
        masks: np.ndarray | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        images = views.check_images(images, image_ids)
        if masks is not None and np.shape(masks) != images.shape[:3]:
            raise ValueError(f"masks: expected {images.shape[:3]} like the images, got {np.shape(masks)}")
        if not len(images):
            raise ValueError("expected at least 1 image, got 0: nothing to extract")
        device, out = query.get_device(model), None
        chunk = batch_size or get_chunk(device, *images.shape[1:3])
        for rows in query.iterate_chunks(len(images), chunk, label="segmenting", progress=progress):
            x = views.read_pixels(images, rows).contiguous().to(device).float().div_(255)
            with torch.inference_mode():
                p = model.posteriors(x).float()
            if p.ndim != 4 or len(p) != len(x) or p.shape[2:] != x.shape[2:]:
                raise ValueError(f"expected posteriors (N, C, H, W) for {tuple(x.shape)}, got {tuple(p.shape)}")
            part = make(p, None if masks is None else torch.from_numpy(np.asarray(masks[rows]))).cpu().numpy()
            if out is None:  # one array from the start: a second copy of all maps would double the memory
                out = np.empty((len(images), *part.shape[1:]), STORED if part.ndim == 4 else part.dtype)
            out[rows] = part
        return out

    # its name is part of the identity of cached features; its signature is not make's
    functools.update_wrapper(extract, make, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    del extract.__wrapped__
    return extract


@_query_with
def extract_loss_map(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Query a segmenter and compare its posteriors with the ground-truth labels: structured loss maps.

    Args:
        model: has ``posteriors(images (N, 3, H, W) in [0, 1]) -> (N, C, H, W)``; all else: ``attacks/query.py``.
        masks: (N, H, W) uint8 ground-truth labels, void 255.

    Returns:
        (N, 1, H, W) float16; images of 512 rows and more: averaged over cells of 8 x 8.
    """
    return _to_grid(make_loss_map(posteriors, labels))


@_query_with
def extract_label_only(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Loss maps of a model that only names classes: (N, 1, H, W) float16, 0 right and 1.38 = 69.08 / 50 wrong.

    Arguments as in :func:`extract_loss_map`. The division is the released code's (``ARGMAX_DIVISOR``).
    """
    return _to_grid(make_loss_map(make_argmax(posteriors), labels) / ARGMAX_DIVISOR)


@_query_with
def extract_posteriors_and_labels(posteriors: Tensor, labels: Tensor) -> Tensor:
    """What the concatenation input is made of: posteriors and, as one more channel, the label of every pixel.

    The one-hot labels are unfolded batch by batch in the attacker (:func:`make_concatenation`): stored here they would
    double the memory. Arguments as in :func:`extract_loss_map`.

    Returns:
        (N, C + 1, H, W) float16 (labels up to 255 are exact in it). Large images: posteriors averaged over cells of
        8 x 8, the label of the cell's central pixel.
    """
    labels, grid = _check_labels(posteriors, labels, 255).unsqueeze(1).float(), _to_grid(posteriors)
    if grid.shape != posteriors.shape:
        middle = slice(GRID_STEP // 2, None, GRID_STEP)
        labels = labels[:, :, middle, middle][:, :, : grid.shape[2], : grid.shape[3]]
    return torch.cat([grid, labels], dim=1)


@_query_with
def extract_posteriors(posteriors: Tensor, labels: Tensor | None) -> Tensor:
    """Prediction only (Type-I): the posteriors (N, C, H, W) float16, no label. Arguments as above."""
    return _to_grid(posteriors)


@_query_with
def extract_mean_loss(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Global loss: (N, 1) float32, mean loss over valid pixels (void-only image: log C). Arguments as above."""
    return compute_mean_loss(posteriors, labels)[:, None]


def score_mean_loss(features: np.ndarray) -> np.ndarray:
    """(N, 1) mean losses -> (N,) float64 scores, higher = more likely a member."""
    return -np.asarray(features, np.float64)[:, 0]
