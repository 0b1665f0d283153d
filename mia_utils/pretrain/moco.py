"""MoCo v3: a query encoder predicts the momentum encoder's key of another view, against the batch.

Source: Chen, Xie, He 2021 (arXiv 2104.02057), Algorithm 1; heads and momentum update from lightly. The loss is ours:
lightly has none for v3.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mia_utils import views

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="simclr-weak")


def compute_contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE of queries (B, D) against keys (B, D), scaled by 2 tau (paper: Algorithm 1, ``ctr``)."""
    logits = normalize(queries, dim=1) @ normalize(keys, dim=1).T / temperature
    return 2 * temperature * cross_entropy(logits, torch.arange(len(queries), device=queries.device))


class MoCo(nn.Module):
    """MoCo v3 over a timm ViT; the class token is the trained vector.

    Args:
        backbone: timm VisionTransformer (its patch projection is frozen, as in the paper, for stability).
        input_size: image side in pixels.
        temperature: paper: 0.2.
        momentum: start of the momentum that grows to 1 by a cosine (paper: 0.99).
        hidden_dim, output_dim: of projector and predictor (paper: 4096, 256).
    """

    pooling = "cls"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_size: int,
        temperature: float = 0.2,
        momentum: float = 0.99,
        hidden_dim: int = 512,
        output_dim: int = 128,
    ):
        super().__init__()
        if not getattr(backbone, "num_prefix_tokens", 0):
            raise ValueError(f"moco (v3) needs a ViT with a class token, got {type(backbone).__name__}")
        self.backbone, self.temperature, self.momentum = backbone, temperature, momentum
        backbone.patch_embed.requires_grad_(False)
        self.projector = MoCoProjectionHead(backbone.embed_dim, hidden_dim, output_dim, num_layers=3, batch_norm=True)
        self.predictor = MoCoProjectionHead(output_dim, hidden_dim, output_dim, num_layers=2, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(backbone).requires_grad_(False)
        self.projector_momentum = copy.deepcopy(self.projector).requires_grad_(False)

    def loss(
        self, images: Tensor, *, augmentation: str, size: int, rng: np.random.Generator, progress: float
    ) -> Tensor:
        """Symmetrized contrast over two views of a batch (B, 3, H, W) uint8."""
        settings = views.parse_augmentation(augmentation)
        both = torch.cat([views.augment(images, size=size, rng=rng, **settings) for _ in range(2)])
        both = (both - 0.5) / 0.5
        q1, q2 = self.predictor(self.projector(self.backbone.forward_features(both)[:, 0])).float().chunk(2)
        with torch.no_grad():
            keys = self.projector_momentum(self.backbone_momentum.forward_features(both)[:, 0])
            k1, k2 = keys.float().chunk(2)
        return compute_contrast(q1, k2, self.temperature) + compute_contrast(q2, k1, self.temperature)

    def after_step(self, progress: float) -> None:
        """Move the momentum encoder; ``progress`` in [0, 1] is the share of the training done."""
        m = cosine_schedule(round(progress * 10_000), 10_001, self.momentum, 1.0)
        update_momentum(self.backbone, self.backbone_momentum, m)
        update_momentum(self.projector, self.projector_momentum, m)
