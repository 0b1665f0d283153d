"""Segmentation membership inference: a segmenter is surer of the pixels it was trained on.

Source: He, Rahimian, Schiele, Fritz: Segmentations-Leak (ECCV 2020, arXiv 1912.09685); the attackers that see less:
Type-I (prediction only) after Chobola et al. (arXiv 2212.01082), label-only after the paper's Argmax defense. Steps:
1 posteriors of the whole image, 2 an input map that sets them beside the ground-truth labels, 3 patches of it, 4 a
small ResNet judges each, 5 their logits are summed. Ours: their *difference* is summed, at seeded positions.
Letters: N images, C classes, H W pixels, P patches, h w side of a patch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.attacks import query
from mia_utils.attacks.network import check_features, check_sets, compute_auc, stop_early
from mia_utils.datasets import VOID
from mia_utils.models import views
from mia_utils.models.outputs import change_posteriors

TINY = 1e-30  # smallest posterior inside the logarithm, as released: no loss exceeds 69.08
ARGMAX_DIVISOR = 50.0  # the released code divides the loss map of argmax posteriors (0 or 69.08) by this
GRID_FROM, GRID_STEP = 512, 8  # maps of images this high are averaged over cells of 8 x 8 (paper: 1024 -> 128 rows)
PATCH_SHARE = 0.7  # side of a patch as a share of the map's height (paper: 90 of 128)
# The paper's attacker is a ResNet-50 with a deep stem; the thin one trains nine times as fast as resnet10t.
NETWORKS = {"resnet10t-thin": ("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 8})}
NETWORKS |= {"resnet50": ("resnet50c", {})}


def make_loss_map(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Structured loss map (N, 1, H, W): -log posterior of the labeled class; higher = more likely a non-member.

    Source: section 3; released code: posteriors (N, C, H, W) renormalized per pixel and kept above 1e-30, void pixels
    0. Labels are (N, H, W) integer in [0, C) or 255.
    """
    labels = _check_labels(posteriors, labels)
    valid = (labels != VOID).unsqueeze(1)  # (N, 1, H, W)
    index = labels.unsqueeze(1).where(valid, 0)
    p = posteriors.gather(1, index) / posteriors.sum(1, keepdim=True).clamp_min(TINY)
    return -torch.log(p.clamp_min(TINY)) * valid + 0.0  # + 0: no negative zeros


def compute_mean_loss(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Mean loss (N,) over valid pixels; an image without one gets log C, the loss of a model that guesses evenly."""
    loss = make_loss_map(posteriors, labels).flatten(1)  # void pixels are 0
    n_valid = (labels != VOID).flatten(1).sum(1).to(loss.device)
    return torch.where(n_valid > 0, loss.sum(1) / n_valid.clamp_min(1), math.log(posteriors.shape[1]))


def compute_class_losses(loss_map: Tensor | np.ndarray, labels: Tensor | np.ndarray, n_classes: int) -> np.ndarray:
    """Mean loss (N, C) float64 of every class in loss maps (N, 1, H, W), NaN where it is absent: which classes leak?"""
    pairs = zip(np.asarray(loss_map, np.float64)[:, 0], np.asarray(labels), strict=True)
    with np.errstate(invalid="ignore"):
        return np.array([ndimage.mean(loss, classes, range(n_classes)) for loss, classes in pairs])


def _check_labels(posteriors: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("expected masks= (label maps) for this attacker, got none: extract_posteriors needs no labels")
    if posteriors.ndim != 4 or labels.shape != (len(posteriors), *posteriors.shape[2:]):
        got = f"{tuple(posteriors.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected posteriors (N, C, H, W) and labels (N, H, W) of the same N, H and W, got {got}")
    labels, n_classes = labels.to(posteriors.device).long(), posteriors.shape[1]
    wrong = (labels != VOID) & ((labels < 0) | (labels >= n_classes))
    if wrong.any():
        got = f"labels hold the id {int(labels[wrong][0])}, expected 0 to {n_classes - 1} or {VOID} (void)"
        raise ValueError(f"{got}: map the label spaces first")
    return labels


def _to_grid(maps: Tensor) -> Tensor:
    """Average (N, C, H, W) over cells of 8 x 8 where images are large; small ones keep their resolution."""
    return F.avg_pool2d(maps, GRID_STEP) if maps.shape[2] >= GRID_FROM else maps


def get_chunk(device: str | torch.device, height: int, width: int) -> int:
    """Images per forward, so that activations stay near the cache (CPU: 21 of 96 x 128) or fit in memory."""
    pixels = 2**18 if torch.device(device).type == "cpu" else 2**23
    return max(1, pixels // (height * width))


def _query_with(make: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., np.ndarray]:
    """Turn ``make(posteriors, labels)`` of a chunk into an extract that queries a segmenter about all images (step 1).

    The model has ``posteriors(images (N, 3, H, W) in [0, 1]) -> (N, C, H, W)``; ``masks`` are (N, H, W) uint8
    ground-truth labels, void 255; all else: ``attacks/query.py``.
    """

    def extract(
        model: Any, images: np.ndarray, *, image_ids: Sequence[str], masks: np.ndarray | None = None, seed: int = 0,
        batch_size: int | None = None, progress: bool = False,
    ) -> np.ndarray:  # fmt: skip
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
            if out is None:  # one array from the start, and 3 digits of a loss: maps fill the memory
                out = np.empty((len(images), *part.shape[1:]), np.float16 if part.ndim == 4 else part.dtype)
            out[rows] = part
        return out

    # its name is part of the identity of cached features; its signature is not make's
    functools.update_wrapper(extract, make, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    del extract.__wrapped__
    return extract


@_query_with
def extract_loss_map(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Query a segmenter and compare its posteriors with the ground-truth labels: (N, 1, H, W) float16 loss maps."""
    return _to_grid(make_loss_map(posteriors, labels))


@_query_with
def extract_label_only(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Loss maps of a model that only names classes: (N, 1, H, W) float16, 0 right and 1.38 = 69.08 / 50 wrong."""
    return _to_grid(make_loss_map(change_posteriors(posteriors, "argmax"), labels) / ARGMAX_DIVISOR)


@_query_with
def extract_posteriors_and_labels(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Posteriors and, as one more channel, the label of a pixel (of a cell's central one): (N, C + 1, H, W) float16."""
    labels, grid = _check_labels(posteriors, labels).unsqueeze(1).float(), _to_grid(posteriors)
    if grid.shape != posteriors.shape:
        middle = slice(GRID_STEP // 2, None, GRID_STEP)
        labels = labels[:, :, middle, middle][:, :, : grid.shape[2], : grid.shape[3]]
    return torch.cat([grid, labels], dim=1)


@_query_with
def extract_posteriors(posteriors: Tensor, labels: Tensor | None) -> Tensor:
    """Prediction only (Type-I): the posteriors (N, C, H, W) float16, no label."""
    return _to_grid(posteriors)


@_query_with
def extract_mean_loss(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Global loss: (N, 1) float32, mean loss over valid pixels (void-only image: log C)."""
    return compute_mean_loss(posteriors, labels)[:, None]


def score_mean_loss(features: np.ndarray) -> np.ndarray:
    """(N, 1) mean losses -> (N,) float64 scores, higher = more likely a member."""
    return -np.asarray(features, np.float64)[:, 0]


def get_patch_size(height: int, width: int, *, share: float = PATCH_SHARE) -> tuple[int, int]:
    """Side of the square patches on a map: the paper's 90 of 128 rows, never wider than the map."""
    side = max(1, min(round(share * height), height, width))
    return side, side


def draw_patches(
    image_ids: Sequence[str], n_patches: int, *, height: int, width: int, size: tuple[int, int], seed: int
) -> Tensor:
    """Draw patches of ``size`` (h, w) per image: (N, P, 2) int64 top, left; a longer draw begins with the shorter."""
    room = np.array([height - size[0] + 1, width - size[1] + 1])
    if room.min() < 1:
        raise ValueError(f"expected patches of at most {height} x {width}, got {size[0]} x {size[1]}")
    streams = [seeds.rng(seed, "segmentation-patches", image_id) for image_id in image_ids]
    shares = np.array([stream.random((n_patches, 2)) for stream in streams]).reshape(-1, n_patches, 2)
    return torch.from_numpy((shares * room).astype(np.int64))  # rounds down


def gather_patches(maps: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut patches of ``size`` at corners (N, P, 2) out of maps (N, C, H, W) in one gather: (N, P, C, h, w)."""
    device, (height, width) = maps.device, maps.shape[2:]
    corners = corners.to(device)
    ends = corners.flatten(0, 1) + torch.tensor(size, device=device)
    if len(ends) and (corners.min() < 0 or (ends > torch.tensor([height, width], device=device)).any()):
        raise ValueError(f"expected patches inside maps of {height} x {width}, got one across the border")
    image = torch.arange(len(maps), device=device)[:, None, None, None]
    rows = (corners[..., 0, None] + torch.arange(size[0], device=device))[:, :, :, None]  # (N, P, h, 1)
    columns = (corners[..., 1, None] + torch.arange(size[1], device=device))[:, :, None, :]  # (N, P, 1, w)
    return maps[image, :, rows, columns].permute(0, 1, 4, 2, 3)  # gathered as (N, P, h, w, C)


def unfold_labels(maps: Tensor) -> Tensor:
    """Concatenation input: (B, C + 1, h, w) with labels as last channel -> (B, 2C, h, w), one-hot, void all zeros."""
    posteriors, labels = maps[:, :-1], maps[:, -1:]
    classes = torch.arange(posteriors.shape[1], device=maps.device).view(1, -1, 1, 1)
    return torch.cat([posteriors, (labels == classes).to(maps.dtype)], dim=1)


def make_network(n_channels: int, *, network: str = "resnet10t-thin", seed: int = 0) -> nn.Module:
    """Patch classifier (B, n_channels, h, w) -> (B, 2) logits (non-member, member): a timm ResNet, last stride 1."""
    name, changes = NETWORKS.get(network, (network, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "segmentation.init"))
        try:
            built = timm.create_model(name, in_chans=n_channels, num_classes=2, output_stride=16, **changes)
        except Exception as error:  # whatever timm raises for a name or for a network without this stride
            expected = f"expected {', '.join(NETWORKS)} or a timm ResNet"
            raise ValueError(f"no patch network {network!r} ({str(error).partition(chr(10))[0]}): {expected}") from None
    return built.to(memory_format=torch.channels_last)  # a third faster on a CPU; patches are gathered so


@dataclass
class PatchAttacker:
    """A fitted patch attacker, as ``network.Attacker``; ``size`` (h, w) of patches, ``shape`` (C', H, W) of maps."""

    network: nn.Module
    size: tuple[int, int]
    n_patches: int
    labels_last: bool
    seed: int
    shape: tuple[int, ...]

    def score(self, features: np.ndarray | Tensor, *, image_ids: Sequence[str]) -> np.ndarray:
        """Sum of member minus non-member logit over patches keyed by ``image_ids``: (N,) float64, higher = member."""
        maps = torch.from_numpy(np.ascontiguousarray(check_features(features, "features", maps=True)))
        if tuple(maps.shape[1:]) != tuple(self.shape):
            raise ValueError(f"expected features (N, {', '.join(map(str, self.shape))}), got {tuple(maps.shape)}")
        if len(image_ids) != len(maps):
            raise ValueError(f"expected one image id per image, got {len(image_ids)} ids for {len(maps)} images")
        channels, height, width = self.shape
        grid = dict(height=height, width=width, size=self.size, seed=self.seed)
        corners = draw_patches(image_ids, self.n_patches, **grid)  # (N, P, 2)
        device, scores = next(self.network.parameters()).device, [np.empty(0)]
        # chunks bound the memory only: the cut is one gather for all images of a chunk
        chunk = max(1, 2**22 // (self.n_patches * channels * math.prod(self.size)))
        for rows in query.iterate_chunks(len(maps), chunk, label="patches", progress=False):
            with torch.inference_mode():
                patches = gather_patches(maps[rows].to(device), corners[rows], self.size)  # (n, P, C', h, w)
                patches = patches.flatten(0, 1).float()
                logits = self.network(unfold_labels(patches) if self.labels_last else patches)  # (n P, 2)
                difference = (logits[:, 1] - logits[:, 0]).double()
                scores.append(difference.unflatten(0, (-1, self.n_patches)).sum(1).cpu().numpy())
        return np.concatenate(scores)


def fit(
    features: np.ndarray | Tensor, is_member: np.ndarray, *, validation: tuple[Any, Any], n_patches: int = 6,
    patch_share: float = PATCH_SHARE, whole: bool = False, labels_last: bool = False, network: str = "resnet10t-thin",
    epochs: int = 30, steps_per_epoch: int = 20, images_per_step: int = 32, patience: int | None = 6, lr: float = 1e-3,
    weight_decay: float = 5e-4, seed: int = 0, device: str | None = None,
) -> PatchAttacker:  # fmt: skip
    """Fit the patch attacker on maps (N, C', H, W) of images whose membership is known; options as in ``network.fit``.

    Every step takes as many members as non-members, one fresh random patch of each, mirrored half of the time: the
    paper trains on thousands of maps, we on a few hundred.

    Args:
        n_patches, patch_share: patches an image is judged by (paper: 6), their side as a share of the map's height.
        whole, labels_last: the full-image attacker (one patch, the whole map); see :func:`unfold_labels`.
        images_per_step: half of them members; less where a class has fewer.
    """
    x, y, x_val, y_val = check_sets(features, is_member, validation, maps=True)
    if n_patches < 1 or images_per_step < 2 or not 0 < patch_share <= 1:
        given = f"{n_patches}, {images_per_step}, {patch_share}"
        raise ValueError(f"expected n_patches >= 1, images_per_step >= 2 and patch_share in (0, 1], got {given}")
    height, width = x.shape[2:]
    size = (height, width) if whole else get_patch_size(height, width, share=patch_share)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n_channels = 2 * (x.shape[1] - 1) if labels_last else x.shape[1]
    model = make_network(n_channels, network=network, seed=seed).to(device)
    attacker = PatchAttacker(model, size, 1 if whole else n_patches, labels_last, seed, x.shape[1:])
    validation_ids = [f"validation-{i}" for i in range(len(x_val))]  # positions of their own, the same at every look
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    rng, maps = seeds.rng(seed, "segmentation.batches"), torch.from_numpy(np.ascontiguousarray(x))
    classes = [np.flatnonzero(y), np.flatnonzero(~y)]
    per_class = min(images_per_step // 2, *map(len, classes))
    target = torch.tensor([1] * per_class + [0] * per_class, device=device)
    room = np.array([height - size[0] + 1, width - size[1] + 1])

    def take_step() -> None:
        picked = np.concatenate([rng.choice(idx, per_class, replace=False) for idx in classes])
        corners = torch.from_numpy((rng.random((len(picked), 1, 2)) * room).astype(np.int64))
        patches = gather_patches(maps[picked].to(device), corners, size)[:, 0].float()  # (B, C', h, w)
        mirrored = torch.from_numpy(rng.random(len(picked)) < 0.5).to(device).view(-1, 1, 1, 1)
        patches = torch.where(mirrored, patches.flip(3), patches)
        loss = F.cross_entropy(model(unfold_labels(patches) if labels_last else patches), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def look() -> dict[str, float]:
        return {"validation_auc": compute_auc(attacker.score(x_val, image_ids=validation_ids), y_val)}

    length = dict(epochs=epochs, steps_per_epoch=steps_per_epoch, patience=patience)
    stop_early(model, take_step, look, **length)
    return attacker
