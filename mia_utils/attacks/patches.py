"""The patch attacker of Segmentations-Leak: a small ResNet judges patches of an input map, their logits are summed.

Source: He, Rahimian, Schiele, Fritz: Segmentations-Leak (ECCV 2020, arXiv 1912.09685), steps 3 to 5;
``attacks/segmentation.py`` makes the maps. Ours: the *difference* of the logits is summed, at seeded positions.

Letters: N images, C classes, H W pixels, P patches, h w side of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.attacks import query
from mia_utils.attacks.network import check_features, check_pair, compute_auc, pick_threshold, stop_early

PATCH_SHARE = 0.7  # side of a patch as a share of the map's height (paper: 90 of 128)
# The paper's attacker is a ResNet-50 with a deep stem; the thin one trains nine times as fast as resnet10t.
NETWORKS = {
    "resnet10t-thin": ("resnet10t", {"channels": (16, 32, 64, 128), "stem_width": 8}),
    "resnet50": ("resnet50c", {}),
}


def get_patch_size(height: int, width: int, *, share: float = PATCH_SHARE) -> tuple[int, int]:
    """Side of the square patches on a map: the paper's 90 of 128 rows, never wider than the map."""
    side = max(1, min(round(share * height), height, width))
    return side, side


def draw_patches(
    image_ids: Sequence[str], n_patches: int, *, height: int, width: int, size: tuple[int, int], seed: int
) -> Tensor:
    """Draw uniformly random patches per image, from a stream keyed by seed and image alone.

    Returns:
        (N, P, 2) int64 top and left of patches of ``size`` (h, w) inside maps of ``height`` x ``width``; the first of a
        longer draw are those of a shorter one.
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
    """Cut patches of ``size`` at corners (N, P, 2) out of maps (N, C, H, W) in one gather: (N, P, C, h, w)."""
    if maps.ndim != 4 or corners.ndim != 3 or len(maps) != len(corners):
        raise ValueError(f"expected (N, C, H, W) and (N, P, 2), got {tuple(maps.shape)} and {tuple(corners.shape)}")
    device, (height, width) = maps.device, maps.shape[2:]
    corners = corners.to(device)
    ends = corners.flatten(0, 1) + torch.tensor(size, device=device)
    if len(ends) and (corners.min() < 0 or (ends > torch.tensor([height, width], device=device)).any()):
        raise ValueError(f"expected patches inside maps of {height} x {width}, got one across the border")
    image = torch.arange(len(maps), device=device)[:, None, None, None]
    rows = (corners[..., 0, None] + torch.arange(size[0], device=device))[:, :, :, None]  # (N, P, h, 1)
    columns = (corners[..., 1, None] + torch.arange(size[1], device=device))[:, :, None, :]  # (N, P, 1, w)
    return maps[image, :, rows, columns].permute(0, 1, 4, 2, 3)  # gathered as (N, P, h, w, C)


def make_network(n_channels: int, *, network: str = "resnet10t-thin", seed: int = 0) -> nn.Module:
    """Build the patch classifier (B, n_channels, h, w) -> (B, 2) logits: non-member, member.

    A timm ResNet without a stride in its last stage, as in the paper: ``"resnet10t-thin"`` (a laptop's), ``"resnet50"``
    (the paper's, deep stem), or any other; ``seed`` of the private initialization stream.
    """
    name, changes = NETWORKS.get(network, (network, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "segmentation.init"))
        try:
            built = timm.create_model(name, in_chans=n_channels, num_classes=2, output_stride=16, **changes)
            return built.to(memory_format=torch.channels_last)  # a third faster on a CPU; patches are gathered so
        except (RuntimeError, TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            expected = f"expected {', '.join(NETWORKS)} or a timm ResNet"
            raise ValueError(f"no patch network {network!r} ({reason}): {expected}") from None


class PatchAttacker:
    """A fitted patch attacker.

    Attributes:
        network: (B, C', h, w) -> (B, 2) logits, with the weights of the best epoch.
        size: (h, w) of a patch; n_patches: P, patches an image is judged by.
        history, best_epoch, threshold: as of ``network.Attacker``, without a validation loss: of equals the first.
    """

    def __init__(
        self, network: nn.Module, *, size: tuple[int, int], n_patches: int, labels_last: bool, seed: int, shape: tuple
    ) -> None:
        self.network, self.size, self.n_patches, self.labels_last = network, size, n_patches, labels_last
        self.history, self.best_epoch, self.threshold = pd.DataFrame(), 0, math.nan
        self._seed, self._shape = seed, tuple(shape)

    def score(self, features: np.ndarray | Tensor, *, image_ids: Sequence[str]) -> np.ndarray:
        """Score maps (N, C', H, W) by the sum, over patches keyed by ``image_ids``, of member minus non-member logit.

        Returns:
            (N,) float64, higher = more likely a member; does not depend on the other images.
        """
        maps = torch.from_numpy(np.ascontiguousarray(check_features(features, "features", maps=True)))
        if tuple(maps.shape[1:]) != self._shape:
            raise ValueError(f"expected features (N, {', '.join(map(str, self._shape))}), got {tuple(maps.shape)}")
        if len(image_ids) != len(maps):
            raise ValueError(f"expected one image id per image, got {len(image_ids)} ids for {len(maps)} images")
        height, width = self._shape[1:]
        grid = dict(height=height, width=width, size=self.size, seed=self._seed)
        corners = draw_patches(image_ids, self.n_patches, **grid)  # (N, P, 2)
        device = next(self.network.parameters()).device
        # chunks bound the memory only: the cut is one gather for all images of a chunk
        chunk = max(1, 2**22 // (self.n_patches * self._shape[0] * math.prod(self.size)))
        scores = [np.empty(0)]
        for rows in query.iterate_chunks(len(maps), chunk, label="patches", progress=False):
            with torch.inference_mode():
                patches = gather_patches(maps[rows].to(device), corners[rows], self.size)  # (n, P, C', h, w)
                logits = self.network(unfold_labels(patches.flatten(0, 1).float(), self.labels_last))  # (n P, 2)
                difference = (logits[:, 1] - logits[:, 0]).double()
                scores.append(difference.unflatten(0, (-1, self.n_patches)).sum(1).cpu().numpy())
        return np.concatenate(scores)


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

    Every step takes as many members as non-members, one fresh random patch of each, mirrored half of the time: a few
    hundred maps are all there is to learn from. (The paper trains on thousands.)

    Args:
        features: (N, C', H, W) float maps as an ``extract`` of this module gives them.
        is_member, validation, epochs, steps_per_epoch, patience, lr, weight_decay, seed: as in ``network.fit``.
        n_patches: patches an image is judged by (paper: 6).
        patch_share: side of a patch as a share of the map's height (paper: 90 / 128).
        whole: the full-image attacker: one patch, the whole map.
        labels_last: the last channel is the label map: unfold it to one-hot (concatenation input).
        network: see :func:`make_network`.
        images_per_step: half of them members; less where a class has fewer.
        device: None: CUDA when there is one, else the CPU.

    Returns:
        ``PatchAttacker``; its ``score`` takes ``image_ids``, which key the patches it looks at.
    """
    x, y = check_pair(features, is_member, "fit", maps=True)
    x_val, y_val = check_pair(*validation, "validation", maps=True)
    if x.shape[1:] != x_val.shape[1:]:
        raise ValueError(f"expected validation features {x.shape[1:]} an image, got {x_val.shape[1:]}")
    if n_patches < 1 or images_per_step < 2 or not 0 < patch_share <= 1:
        given = f"{n_patches}, {images_per_step}, {patch_share}"
        raise ValueError(f"expected n_patches >= 1, images_per_step >= 2 and patch_share in (0, 1], got {given}")
    height, width = x.shape[2:]
    size = (height, width) if whole else get_patch_size(height, width, share=patch_share)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n_channels = 2 * (x.shape[1] - 1) if labels_last else x.shape[1]
    model = make_network(n_channels, network=network, seed=seed).to(device)
    about = dict(size=size, n_patches=1 if whole else n_patches, labels_last=labels_last, seed=seed, shape=x.shape[1:])
    attacker = PatchAttacker(model, **about)
    validation_ids = [f"validation-{i}" for i in range(len(x_val))]  # positions of their own, the same at every look
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    rng, maps = seeds.rng(seed, "segmentation.batches"), torch.from_numpy(np.ascontiguousarray(x))
    classes = [np.flatnonzero(y), np.flatnonzero(~y)]
    per_class = min(images_per_step // 2, *map(len, classes))
    target = torch.tensor([1] * per_class + [0] * per_class, device=device)
    room = np.array([height - size[0] + 1, width - size[1] + 1])

    def take_step() -> float:
        picked = np.concatenate([rng.choice(idx, per_class, replace=False) for idx in classes])
        corners = torch.from_numpy((rng.random((len(picked), 1, 2)) * room).astype(np.int64))
        patches = gather_patches(maps[picked].to(device), corners, size)[:, 0].float()  # (B, C', h, w)
        mirrored = torch.from_numpy(rng.random(len(picked)) < 0.5).to(device).view(-1, 1, 1, 1)
        patches = unfold_labels(torch.where(mirrored, patches.flip(3), patches), labels_last)
        loss = F.cross_entropy(model(patches), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def look() -> dict[str, float]:
        return {"validation_auc": compute_auc(attacker.score(x_val, image_ids=validation_ids), y_val)}

    attacker.history, attacker.best_epoch = stop_early(
        model, take_step, look, epochs=epochs, steps_per_epoch=steps_per_epoch, patience=patience
    )
    attacker.threshold = pick_threshold(attacker.score(x_val, image_ids=validation_ids), y_val)
    return attacker


def join_one_hot(posteriors: Tensor, labels: Tensor) -> Tensor:
    """Posteriors (N, C, H, W) and labels (N, H, W) -> (N, 2C, H, W); a label that is no class (255) becomes zeros."""
    classes = torch.arange(posteriors.shape[1], device=labels.device).view(1, -1, 1, 1)
    one_hot = labels.unsqueeze(1) == classes  # (N, 1, H, W) = (1, C, 1, 1)
    return torch.cat([posteriors, one_hot.to(posteriors.dtype)], dim=1)


def unfold_labels(maps: Tensor, labels_last: bool) -> Tensor:
    """(B, C + 1, h, w) with labels as its last channel -> (B, 2C, h, w)."""
    return join_one_hot(maps[:, :-1], maps[:, -1]) if labels_last else maps
