"""MoCo: the query of one view finds the momentum encoder's key of another view of the same image.

v3 (Chen, Xie, He 2021, arXiv 2104.02057, Algorithm 1) contrasts within the batch; v1 (He et al. 2020, arXiv
1911.05722) and v2 (Chen et al. 2020, arXiv 2003.04297) against a queue of earlier keys: EncoderMI's targets. Heads and
momentum from lightly; it has no loss for v3, and its queue is no part of a state, so no training could be resumed.
"""

import copy

import torch
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils import dist
from lightly.utils.scheduler import cosine_schedule
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, normalize

from mia_utils.pretrain import inputs
from mia_utils.pretrain.method import Method, make_reader

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="simclr-weak")


def compute_contrast(queries: Tensor, keys: Tensor, temperature: float, *, first: int = 0) -> Tensor:
    """InfoNCE of queries (B, D) against keys (M, D), query i's at ``first + i``, times 2 tau (Algorithm 1, ``ctr``)."""
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 does not tell similar similarities apart
        logits = normalize(queries, dim=1) @ normalize(keys, dim=1).T / temperature
    return 2 * temperature * cross_entropy(logits, first + torch.arange(len(queries), device=queries.device))


def _gather(keys: Tensor) -> Tensor:
    """Put the keys (B, D) of all processes one after the other, (M, D)."""
    return torch.cat(dist.gather(keys)) if dist.world_size() > 1 else keys


class MoCo(Method):
    """MoCo v3 over a timm ViT, its patch projection frozen as in the paper; the class token is the trained vector.

    Args:
        temperature: paper: 0.2.
        momentum: start of the momentum that grows to 1 by a cosine (paper: 0.99).
        hidden_dim, output_dim: of projector and predictor (paper: 4096, 256).
    """

    def __init__(
        self, backbone: nn.Module, *, input_size: int, temperature: float = 0.2, momentum: float = 0.99,
        hidden_dim: int = 512, output_dim: int = 128,
    ):  # fmt: skip
        super().__init__()
        if not getattr(backbone, "num_prefix_tokens", 0):
            raise ValueError(f"moco (v3) needs a ViT with a class token, got {type(backbone).__name__}")
        self.backbone, self.temperature, self.momentum = backbone, temperature, momentum
        backbone.patch_embed.requires_grad_(False)
        self.projector = MoCoProjectionHead(backbone.embed_dim, hidden_dim, output_dim, num_layers=3, batch_norm=True)
        self.predictor = MoCoProjectionHead(output_dim, hidden_dim, output_dim, num_layers=2, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(backbone).requires_grad_(False)
        self.projector_momentum = copy.deepcopy(self.projector).requires_grad_(False)

    def loss(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """Symmetrized contrast over two views of a batch (B, 3, H, W) uint8."""
        both = inputs.draw_views(images, 2, augmentation=augmentation, size=size, rng=rng)
        q1, q2 = self.predictor(self.projector(self.backbone.forward_features(both)[:, 0])).float().chunk(2)
        with torch.no_grad():
            keys = self.projector_momentum(self.backbone_momentum.forward_features(both)[:, 0])
            k1, k2 = keys.float().chunk(2)
            if self.training:  # a measured batch is whole in every process
                k1, k2 = _gather(k1), _gather(k2)
        first = dist.rank() * len(q1) if self.training else 0
        one = compute_contrast(q1, k2, self.temperature, first=first)
        return one + compute_contrast(q2, k1, self.temperature, first=first)

    def after_step(self, progress: float) -> None:
        """Move the momentum encoder."""
        m = cosine_schedule(round(progress * 10_000), 10_001, self.momentum, 1.0)
        update_momentum(self.backbone, self.backbone_momentum, m)
        update_momentum(self.projector, self.projector_momentum, m)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of each of ``n_splits`` parts of a batch, as on so many devices (MoCo's authors' CIFAR-10 demo)."""

    n_splits = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.n_splits:
            raise ValueError(
                f"expected a batch that bn_splits {self.n_splits} divides, got {len(x)} images: change batch_size"
            )
        outs, means, variances = [], [], []
        for part in x.chunk(self.n_splits):  # whole images: they stay as they lie in memory, twice as fast
            mean, var = self.running_mean.clone(), self.running_var.clone()
            outs.append(batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps))
            means.append(mean)
            variances.append(var)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(outs)


def split_batch_norm(backbone: nn.Module, n_splits: int) -> None:
    """Make every batch norm of a backbone a ``SplitBatchNorm``; its weights stay as they are."""
    norms = [module for module in backbone.modules() if type(module) is nn.BatchNorm2d]
    if n_splits < 1 or not norms:
        raise ValueError(f"bn_splits {n_splits}: expected at least 1, and a backbone with batch norm")
    for module in norms:
        module.__class__, module.n_splits = SplitBatchNorm, n_splits


class MoCoV2(Method):
    """MoCo v2 with its queue, over any timm backbone; the mean over tokens is the trained vector.

    Args:
        temperature: paper: 0.07 (v1), 0.2 (v2); EncoderMI's target: 0.1.
        momentum: of the key encoder, constant (EncoderMI's target: 0.99).
        queue_size: keys of earlier batches (EncoderMI's target: 4,096 for 10,000 images); of more than half the
            images' keys an image's own last one would often be among the negatives.
        output_dim: of the head (paper: 128).
        bn_splits: parts of a batch that batch norm sees apart (EncoderMI's target and the papers: 8, one per GPU), keys
            in shuffled order (v1, section 3.3: else the statistics tell the positive from the negatives).
    """

    hidden_layers = 1

    def __init__(
        self, backbone: nn.Module, *, input_size: int, temperature: float = 0.1, momentum: float = 0.99,
        queue_size: int = 64, output_dim: int = 128, bn_splits: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.temperature, self.momentum, self.queue_size = backbone, temperature, momentum, queue_size
        self.bn_splits = bn_splits
        if bn_splits != 1:
            split_batch_norm(backbone, bn_splits)
        self.backbone_momentum = copy.deepcopy(backbone).requires_grad_(False)
        self._read, dim = make_reader(self.backbone, input_size)
        self._read_key, _ = make_reader(self.backbone_momentum, input_size)
        layers = [m for _ in range(self.hidden_layers) for m in (nn.Linear(dim, dim), nn.ReLU())]
        self.projector = nn.Sequential(*layers, nn.Linear(dim, output_dim))
        self.projector_momentum = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(queue_size, output_dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def loss(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """InfoNCE of a batch (B, 3, H, W) uint8: its own key against the queue, which then takes the new keys."""
        one, two = inputs.draw_views(images, 2, augmentation=augmentation, size=size, rng=rng).chunk(2)
        query = normalize(self.projector(self._read(one)).float(), dim=1)
        if shuffled := self.bn_splits > 1 and self.training:
            order = torch.from_numpy(rng.permutation(len(two))).to(two.device)
            two = two[order]
        with torch.no_grad():
            key = normalize(self.projector_momentum(self._read_key(two)).float(), dim=1)
            key = key[order.argsort()] if shuffled else key
        with torch.autocast(query.device.type, enabled=False):  # bfloat16 does not tell similar similarities apart
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], dim=1)
        if self.training:
            key = _gather(key)
            slots = (self.oldest + torch.arange(len(key), device=key.device)) % self.queue_size
            self.queue[slots[-self.queue_size :]] = key[-self.queue_size :]
            self.oldest.copy_((self.oldest + len(key)) % self.queue_size)
        return cross_entropy(logits / self.temperature, torch.zeros(len(query), dtype=torch.long, device=key.device))

    def after_step(self, progress: float) -> None:
        """Move the momentum encoder."""
        update_momentum(self.backbone, self.backbone_momentum, self.momentum)
        update_momentum(self.projector, self.projector_momentum, self.momentum)


class MoCoV1(MoCoV2):
    """MoCo v1: as v2, with a linear head."""

    hidden_layers = 0
