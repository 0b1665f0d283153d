"""Segmentation membership inference: a segmenter is surer of the pixels it was trained on.

Source: He, Rahimian, Schiele, Fritz: Segmentations-Leak (ECCV 2020, arXiv 1912.09685); the attackers that see less:
Type-I (prediction only) after Chobola et al. (arXiv 2212.01082), label-only after the paper's Argmax defense. Steps:
1 posteriors of the whole image, 2 an input map that sets them beside the true labels, 3 patches of it at seeded
positions, 4 a small ResNet judges each patch, 5 the differences of its two logits are summed over the patches.

Letters: N images, C classes, H W pixels, P patches, h w side of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.attacks.network import pick_threshold
from mia_utils.models import views

TINY = 1e-30  # smallest posterior inside the logarithm, as released: no loss exceeds 69.08
ARGMAX_DIVISOR = 50.0  # the released code divides the loss map of argmax posteriors (0 or 69.08) by this
GRID_FROM, GRID_STEP = 512, 8  # maps of images this high are averaged over cells of 8 x 8 (paper: 1024 -> 128 rows)
PATCH_SHARE = 0.7  # side of a patch as a share of the map's height (paper: 90 of 128)
STORED = np.float16  # maps of thousands of images; 3 digits of a loss are more than its noise
# The paper's attacker is a ResNet-50 with a deep stem; the thin one trains nine times as fast as resnet10t.
NETWORKS = {
    "resnet10t-thin": ("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 8}),
    "resnet50": ("resnet50c", {}),
}


# ------------------------------------------------------------------------------------------ 2. input maps


def make_loss_map(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Structured loss map: -log of the posterior of the true class at every pixel.

    Source: Segmentations-Leak (arXiv 1912.09685), section 3; released code: posteriors renormalized per pixel and kept
    above 1e-30, ignored pixels 0.

    Args:
        posteriors: (N, C, H, W) float, not negative.
        labels: (N, H, W) integer in [0, C), or ``ignore_index``.
        ignore_index: label of pixels without a class.

    Returns:
        (N, 1, H, W), the dtype of ``posteriors``; higher = more likely a *stranger's* pixel.

    Raises:
        ValueError: wrong shapes, or labels outside the classes. One line.
    """
    labels = _check_labels(posteriors, labels, ignore_index)
    valid = (labels != ignore_index).unsqueeze(1)  # (N, 1, H, W)
    index = labels.unsqueeze(1).where(valid, 0)
    p = posteriors.gather(1, index) / posteriors.sum(1, keepdim=True).clamp_min(TINY)
    return -torch.log(p.clamp_min(TINY)) * valid + 0.0  # + 0: no negative zeros


def make_concatenation(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Concatenate posteriors and one-hot labels (ignored pixels: all zeros).

    Args:
        posteriors: (N, C, H, W) float.
        labels: (N, H, W) integer in [0, C), or ``ignore_index``.

    Returns:
        (N, 2C, H, W), posteriors first.
    """
    labels = _check_labels(posteriors, labels, ignore_index)
    classes = torch.arange(posteriors.shape[1], device=labels.device).view(1, -1, 1, 1)
    one_hot = labels.unsqueeze(1) == classes  # (N, 1, H, W) = (1, C, 1, 1); 255 equals no class
    return torch.cat([posteriors, one_hot.to(posteriors.dtype)], dim=1)


def make_argmax(posteriors: Tensor) -> Tensor:
    """One-hot posteriors: what is left when a model only names the class of every pixel (of equals: the first).

    Args:
        posteriors: (N, C, H, W) float.

    Returns:
        (N, C, H, W) of zeros and ones. Its loss map is 0 where the class is right and 69.08 where it is wrong;
        attackers get it divided by ``ARGMAX_DIVISOR`` as in the released code.
    """
    if posteriors.ndim != 4:
        raise ValueError(f"posteriors: expected (N, C, H, W), got {tuple(posteriors.shape)}")
    return torch.zeros_like(posteriors).scatter_(1, posteriors.argmax(1, keepdim=True), 1.0)


def compute_mean_loss(posteriors: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Mean loss of an image over its valid pixels: the global-loss baseline, score = -mean loss.

    An image without one valid pixel says nothing: it gets log C, the loss of a model that guesses evenly.

    Returns:
        (N,) float; higher = more likely a *stranger*.
    """
    loss = make_loss_map(posteriors, labels, ignore_index=ignore_index).flatten(1)  # ignored pixels are 0
    n_valid = (labels != ignore_index).flatten(1).sum(1).to(loss.device)
    nothing = math.log(posteriors.shape[1])
    return torch.where(n_valid > 0, loss.sum(1) / n_valid.clamp_min(1), torch.full_like(loss[:, 0], nothing))


def compute_class_losses(
    loss_map: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_classes: int, *, ignore_index: int = 255
) -> np.ndarray:
    """Mean loss of every class in every image: which classes betray membership.

    Args:
        loss_map: (N, 1, H, W) as of :func:`make_loss_map` at full resolution.
        labels: (N, H, W) integer.
        n_classes: C.

    Returns:
        (N, C) float64, NaN where the class is absent from the image.
    """
    loss, labels = np.asarray(loss_map, np.float64), np.asarray(labels).astype(np.int64)
    if loss.shape != (len(labels), 1, *labels.shape[1:]):
        raise ValueError(f"expected loss maps (N, 1, H, W) for labels (N, H, W), got {loss.shape} and {labels.shape}")
    image = np.broadcast_to(np.arange(len(labels))[:, None, None], labels.shape)
    valid = (labels != ignore_index) & (labels < n_classes)
    cell = (image * n_classes + labels)[valid]
    total = np.bincount(cell, loss[:, 0][valid], minlength=len(labels) * n_classes)
    count = np.bincount(cell, minlength=len(labels) * n_classes)
    mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean.reshape(len(labels), n_classes)


def _check_labels(posteriors: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
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


def _query(
    model: Any, images: np.ndarray, masks: np.ndarray | None, image_ids: Sequence[str], batch: int | None, bar: bool
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield rows, posteriors (n, C, H, W) float32 and labels (n, H, W) of successive chunks of images."""
    images = views.check_images(images, image_ids)
    if masks is not None and np.shape(masks) != images.shape[:3]:
        raise ValueError(f"masks: expected {images.shape[:3]} like the images, got {np.shape(masks)}")
    device = torch.device(getattr(model, "device", "cpu"))
    chunk = batch or get_chunk(device, *images.shape[1:3])
    with tqdm(total=len(images), unit="image", desc="segmenting", disable=not bar, delay=5, leave=False) as progress:
        for start in range(0, len(images), chunk):
            rows = slice(start, min(start + chunk, len(images)))
            x = views.read_pixels(images, rows).contiguous().to(device).float().div_(255)
            with torch.inference_mode():
                posteriors = model.posteriors(x).float()
            if posteriors.ndim != 4 or len(posteriors) != len(x) or posteriors.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"expected posteriors (N, C, H, W) for {tuple(x.shape)}, got {tuple(posteriors.shape)}"
                )
            yield rows, posteriors, None if masks is None else torch.from_numpy(np.asarray(masks[rows]))
            progress.update(len(x))


def _collect(n: int, parts: Iterator[tuple[slice, Tensor]]) -> np.ndarray:
    """Write chunks into one array as they come: a second copy of all maps would double the memory."""
    out = None
    for rows, part in parts:
        part = part.cpu().numpy()
        out = np.empty((n, *part.shape[1:]), STORED if part.ndim == 4 else part.dtype) if out is None else out
        out[rows] = part
    if out is None:
        raise ValueError("expected at least 1 image, got 0: nothing to extract")
    return out


def extract_loss_map(
    model: Any,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    masks: np.ndarray,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Query a segmenter and compare its posteriors with the true labels: structured loss maps.

    Args:
        model: has ``posteriors(images (N, 3, H, W) in [0, 1]) -> (N, C, H, W)``.
        images: (N, H, W, 3) uint8; streamed ones (``datasets.folders.ImageFiles``) are decoded a chunk at a time.
        image_ids: N ids (they key the patches, which are drawn later).
        masks: (N, H, W) uint8 true labels, void 255.
        seed: unused: queries are deterministic. It is here so that this extract is called as all others.
        batch_size: images per forward; None fits it to memory. Changes nothing but speed.
        progress: show a bar with images/s when it takes longer than five seconds.

    Returns:
        (N, 1, H, W) float16; images of 512 rows and more: averaged over cells of 8 x 8.
    """
    chunks = _query(model, images, masks, image_ids, batch_size, progress)
    return _collect(len(images), ((rows, _to_grid(make_loss_map(p, y))) for rows, p, y in chunks))


def extract_label_only(
    model: Any,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    masks: np.ndarray,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Loss maps of a model that only names classes: (N, 1, H, W) float16, 0 right and 1.38 = 69.08 / 50 wrong.

    Arguments as in :func:`extract_loss_map`. The division is the released code's (``ARGMAX_DIVISOR``).
    """
    chunks = _query(model, images, masks, image_ids, batch_size, progress)
    maps = ((rows, make_loss_map(make_argmax(p), y) / ARGMAX_DIVISOR) for rows, p, y in chunks)
    return _collect(len(images), ((rows, _to_grid(part)) for rows, part in maps))


def extract_posteriors_and_labels(
    model: Any,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    masks: np.ndarray,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """What the concatenation input is made of: posteriors and, as one more channel, the label of every pixel.

    The one-hot labels are unfolded batch by batch in the attacker (:func:`make_concatenation`): stored here they would
    double the memory. Arguments as in :func:`extract_loss_map`.

    Returns:
        (N, C + 1, H, W) float16 (labels up to 255 are exact in it). Large images: posteriors averaged over cells of
        8 x 8, the label of the cell's central pixel.
    """

    def join(posteriors: Tensor, labels: Tensor) -> Tensor:
        labels = _check_labels(posteriors, labels, 255).unsqueeze(1).float()
        grid = _to_grid(posteriors)
        if grid.shape != posteriors.shape:
            middle = GRID_STEP // 2
            labels = labels[:, :, middle::GRID_STEP, middle::GRID_STEP][:, :, : grid.shape[2], : grid.shape[3]]
        return torch.cat([grid, labels], dim=1)

    chunks = _query(model, images, masks, image_ids, batch_size, progress)
    return _collect(len(images), ((rows, join(p, y)) for rows, p, y in chunks))


def extract_posteriors(
    model: Any,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Prediction only (Type-I): the posteriors (N, C, H, W) float16, no true label. Arguments as above."""
    chunks = _query(model, images, None, image_ids, batch_size, progress)
    return _collect(len(images), ((rows, _to_grid(p)) for rows, p, _ in chunks))


def extract_mean_loss(
    model: Any,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    masks: np.ndarray,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Global loss: (N, 1) float32, mean loss over valid pixels (void-only image: log C). Arguments as above."""
    chunks = _query(model, images, masks, image_ids, batch_size, progress)
    return _collect(len(images), ((rows, compute_mean_loss(p, y)[:, None]) for rows, p, y in chunks))


def score_mean_loss(features: np.ndarray) -> np.ndarray:
    """(N, 1) mean losses -> (N,) float64 scores, higher = more likely a member."""
    return -np.asarray(features, np.float64)[:, 0]


# ------------------------------------------------------------------------------------------ 3. patches


def get_patch_size(height: int, width: int, *, share: float = PATCH_SHARE) -> tuple[int, int]:
    """Side of the square patches on a map: the paper's 90 of 128 rows, never wider than the map."""
    side = max(1, min(round(share * height), height, width))
    return side, side


def draw_patches(
    image_ids: Sequence[str], n_patches: int, *, height: int, width: int, size: tuple[int, int], seed: int
) -> Tensor:
    """Draw uniformly random patches per image, from a stream keyed by seed and image alone.

    Args:
        image_ids: N ids; an image gets the same patches in any batch and any order.
        n_patches: P; the first patches of a longer draw are those of a shorter one.
        height, width: of the maps.
        size: (h, w) of a patch.

    Returns:
        (N, P, 2) int64 top and left; every patch lies inside the map.

    Raises:
        ValueError: no patch asked for, or a patch larger than the map.
    """
    if n_patches < 1:
        raise ValueError(f"expected n_patches >= 1, got {n_patches}")
    room = np.array([height - size[0] + 1, width - size[1] + 1])
    if room.min() < 1 or min(size) < 1:
        raise ValueError(f"expected patches of at most {height} x {width}, got {size[0]} x {size[1]}")
    corners = np.empty((len(image_ids), n_patches, 2), np.int64)
    for i, image_id in enumerate(image_ids):
        corners[i] = seeds.rng(seed, "segmentation-patches", image_id).random((n_patches, 2)) * room  # rounds down
    return torch.from_numpy(corners)


def gather_patches(maps: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the patches of all images in one gather.

    Args:
        maps: (N, C, H, W).
        corners: (N, P, 2) int64 top and left.
        size: (h, w) of a patch.

    Returns:
        (N, P, C, h, w).
    """
    if maps.ndim != 4 or corners.ndim != 3 or len(maps) != len(corners):
        raise ValueError(f"expected (N, C, H, W) and (N, P, 2), got {tuple(maps.shape)} and {tuple(corners.shape)}")
    corners = corners.to(maps.device)
    ends = corners.flatten(0, 1) + torch.tensor(size, device=maps.device)
    if len(ends) and (corners.min() < 0 or (ends > torch.tensor(maps.shape[2:], device=maps.device)).any()):
        raise ValueError(
            f"expected patches inside maps of {maps.shape[2]} x {maps.shape[3]}, got one across the border"
        )
    image = torch.arange(len(maps), device=maps.device)[:, None, None, None]
    rows = (corners[..., 0, None] + torch.arange(size[0], device=maps.device))[:, :, :, None]  # (N, P, h, 1)
    columns = (corners[..., 1, None] + torch.arange(size[1], device=maps.device))[:, :, None, :]  # (N, P, 1, w)
    return maps[image, :, rows, columns].permute(0, 1, 4, 2, 3)  # gathered as (N, P, h, w, C)


# ------------------------------------------------------------------------------------------ 4. and 5. the attacker


def make_network(n_channels: int, *, network: str = "resnet10t-thin", seed: int = 0) -> nn.Module:
    """Build the patch classifier: a timm ResNet without a stride in its last stage, as in the paper.

    Args:
        n_channels: channels of the input map.
        network: ``"resnet10t-thin"`` (a laptop's), ``"resnet50"`` (the paper's, deep stem), or any timm ResNet.
        seed: seed of the private initialization stream.

    Returns:
        Module (B, n_channels, h, w) -> (B, 2) logits: stranger, member.
    """
    name, changes = NETWORKS.get(network, (network, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "segmentation.init"))
        try:
            built = timm.create_model(name, in_chans=n_channels, num_classes=2, output_stride=16, **changes)
            return built.to(memory_format=torch.channels_last)  # a third faster on a CPU; patches are gathered so
        except (RuntimeError, TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"no patch network {network!r} ({reason}): expected {', '.join(NETWORKS)} or a timm ResNet"
            ) from None


class PatchAttacker:
    """A fitted patch attacker.

    Attributes:
        network: (B, C', h, w) -> (B, 2) logits, with the weights of the best epoch.
        size: (h, w) of a patch; n_patches: P, patches an image is judged by.
        history: DataFrame ``epoch, steps, loss, validation_auc``; epoch counts from 1.
        best_epoch: epoch with the highest validation AUC, the first of equals.
        threshold: highest balanced accuracy on validation; ``score >= threshold`` means member.
    """

    def __init__(
        self, network: nn.Module, *, size: tuple[int, int], n_patches: int, labels_last: bool, seed: int, shape: tuple
    ) -> None:
        self.network, self.size, self.n_patches, self.labels_last = network, size, n_patches, labels_last
        self.history, self.best_epoch, self.threshold = pd.DataFrame(), 0, math.nan
        self._seed, self._shape = seed, tuple(shape)

    def score(self, features: np.ndarray | Tensor, *, image_ids: Sequence[str]) -> np.ndarray:
        """Score images by the sum, over their patches, of member logit minus stranger logit.

        Args:
            features: (N, C', H, W) as in ``fit``.
            image_ids: N ids that key the positions of the patches.

        Returns:
            (N,) float64, higher = more likely a member; does not depend on the other images.
        """
        maps = _check_maps(features, "features")
        if tuple(maps.shape[1:]) != self._shape:
            raise ValueError(f"expected features (N, {', '.join(map(str, self._shape))}), got {tuple(maps.shape)}")
        if len(image_ids) != len(maps):
            raise ValueError(f"expected one image id per image, got {len(image_ids)} ids for {len(maps)} images")
        height, width = self._shape[1:]
        corners = draw_patches(
            image_ids, self.n_patches, height=height, width=width, size=self.size, seed=self._seed
        )  # (N, P, 2)
        device = next(self.network.parameters()).device
        # chunks bound the memory only: the cut is one gather for all images of a chunk
        chunk = max(1, 2**22 // (self.n_patches * self._shape[0] * math.prod(self.size)))
        scores = []
        with torch.inference_mode():
            for part, where in zip(maps.split(chunk), corners.split(chunk), strict=True):
                patches = gather_patches(part.to(device), where, self.size).flatten(0, 1)  # (n P, C', h, w)
                logits = self.network(_unfold_labels(patches.float(), self.labels_last))
                difference = (logits[:, 1] - logits[:, 0]).double()
                scores.append(difference.unflatten(0, (len(part), self.n_patches)).sum(1).cpu())
        return torch.cat(scores).numpy() if scores else np.empty(0)


def fit(
    features: np.ndarray | Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    n_patches: int = 6,
    patch_share: float = PATCH_SHARE,
    whole: bool = False,
    labels_last: bool = False,
    network: str = "resnet10t-thin",
    epochs: int = 30,
    steps_per_epoch: int = 20,
    images_per_step: int = 32,
    patience: int | None = 6,
    lr: float = 1e-3,
    weight_decay: float = 5e-4,
    seed: int = 0,
    device: str | None = None,
) -> PatchAttacker:
    """Fit the patch attacker on maps of images whose membership is known.

    Every step takes as many members as strangers, one fresh random patch of each, mirrored half of the time: a few
    hundred maps are all there is to learn from. (The paper trains on thousands.)

    Args:
        features: (N, C', H, W) maps as an ``extract`` of this module gives them.
        is_member: (N,) bool.
        validation: ``(features (M, C', H, W), is_member (M,))``, disjoint from the fit set and from every image that is
            reported on. It chooses the epoch.
        n_patches: patches an image is judged by (paper: 6).
        patch_share: side of a patch as a share of the map's height (paper: 90 / 128).
        whole: the full-image attacker: one patch, the whole map.
        labels_last: the last channel is the label map: unfold it to one-hot (concatenation input).
        network: see :func:`make_network`.
        epochs, steps_per_epoch: upper bound of looks at the validation set, and optimizer steps between two of them.
        images_per_step: half of them members; less where a class has fewer.
        patience: stop after so many epochs without a better validation AUC; None trains all epochs.
        lr, weight_decay: of Adam.
        seed: seed of the private initialization and patch streams.
        device: None: CUDA when there is one, else the CPU.

    Returns:
        ``PatchAttacker``; its ``score`` takes ``image_ids``, which key the patches it looks at.

    Raises:
        ValueError: shapes differ, features are not finite, a class is missing. One line.
    """
    x, y = _check_pair(features, is_member, "fit")
    x_val, y_val = _check_pair(*validation, "validation")
    if x.shape[1:] != x_val.shape[1:]:
        raise ValueError(f"expected validation features {tuple(x.shape[1:])} an image, got {tuple(x_val.shape[1:])}")
    if min(epochs, steps_per_epoch, n_patches) < 1 or images_per_step < 2 or (patience is not None and patience < 1):
        given = f"{epochs}, {steps_per_epoch}, {n_patches}, {images_per_step}, {patience}"
        raise ValueError(
            f"expected epochs, steps_per_epoch, n_patches, patience >= 1 and images_per_step >= 2, got {given}"
        )
    if not 0 < patch_share <= 1:
        raise ValueError(f"expected patch_share in (0, 1], got {patch_share}")
    height, width = x.shape[2:]
    size = (height, width) if whole else get_patch_size(height, width, share=patch_share)
    n_patches = 1 if whole else n_patches
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    n_channels = 2 * (x.shape[1] - 1) if labels_last else x.shape[1]
    model = make_network(n_channels, network=network, seed=seed).to(device)
    attacker = PatchAttacker(
        model, size=size, n_patches=n_patches, labels_last=labels_last, seed=seed, shape=x.shape[1:]
    )
    validation_ids = [f"validation-{i}" for i in range(len(x_val))]  # positions of their own, the same at every look
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    rng = seeds.rng(seed, "segmentation.batches")
    classes = [np.flatnonzero(y), np.flatnonzero(~y)]
    per_class = min(images_per_step // 2, *map(len, classes))
    target = torch.tensor([1] * per_class + [0] * per_class, device=device)
    room = np.array([height - size[0] + 1, width - size[1] + 1])
    rows, best, best_state = [], None, None
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for _ in range(steps_per_epoch):
            picked = np.concatenate([rng.choice(idx, per_class, replace=False) for idx in classes])
            corners = torch.from_numpy((rng.random((len(picked), 1, 2)) * room).astype(np.int64))
            patches = gather_patches(x[picked].to(device), corners, size)[:, 0].float()  # (B, C', h, w)
            mirrored = torch.from_numpy(rng.random(len(picked)) < 0.5).to(device).view(-1, 1, 1, 1)
            patches = _unfold_labels(torch.where(mirrored, patches.flip(3), patches), labels_last)
            loss = F.cross_entropy(model(patches), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        auc = float(roc_auc_score(y_val, attacker.score(x_val, image_ids=validation_ids)))
        rows.append((epoch, epoch * steps_per_epoch, total / steps_per_epoch, auc))
        if best is None or auc > best[0]:
            best, best_state = (auc, epoch), {k: v.detach().clone() for k, v in model.state_dict().items()}
        if patience is not None and epoch - best[1] >= patience:
            break
    model.load_state_dict(best_state)
    model.eval().requires_grad_(False)
    attacker.history = pd.DataFrame(rows, columns=["epoch", "steps", "loss", "validation_auc"])
    attacker.best_epoch = best[1]
    attacker.threshold = pick_threshold(attacker.score(x_val, image_ids=validation_ids), y_val)
    return attacker


def _unfold_labels(maps: Tensor, labels_last: bool) -> Tensor:
    """(B, C + 1, h, w) with labels as its last channel -> (B, 2C, h, w)."""
    return make_concatenation(maps[:, :-1], maps[:, -1]) if labels_last else maps


def _check_maps(features: Any, name: str) -> Tensor:
    x = features if isinstance(features, Tensor) else torch.from_numpy(np.ascontiguousarray(features))
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"expected {name} as float maps (N, C, H, W), got {tuple(x.shape)} {x.dtype}")
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum()) if len(x) else 0
    if bad:
        raise ValueError(f"expected finite {name}, got NaN or infinite values in {bad} of {len(x)} maps")
    return x


def _check_pair(features: Any, is_member: Any, name: str) -> tuple[Tensor, np.ndarray]:
    x, y = _check_maps(features, f"{name} features"), np.asarray(is_member).astype(bool)
    if y.shape != (len(x),):
        raise ValueError(f"expected {name} labels of shape ({len(x)},), got {y.shape}")
    if not 0 < y.sum() < len(y):
        raise ValueError(f"expected members and non-members to {name}, got {int(y.sum())} members of {len(y)}")
    return x, y
