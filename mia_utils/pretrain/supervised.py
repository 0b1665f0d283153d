"""A supervised row beside the self-supervised ones: cross-entropy on the labels of the members."""

from __future__ import annotations

from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mia_utils.models import views
from mia_utils.models.encoders import from_module
from mia_utils.pretrain import inputs

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="flip")


class Supervised(nn.Module):
    """A linear head on the mean over tokens of any timm backbone.

    Args:
        backbone: timm module.
        input_size: image side in pixels.
        n_classes: number of labels.
    """

    pooling = "mean"
    needs_labels = True

    def __init__(self, backbone: nn.Module, *, input_size: int, n_classes: int):
        super().__init__()
        self.backbone = backbone
        encoder = from_module(backbone, arch="resnet_32" if input_size <= 64 else "resnet", method="supervised")
        self._read = encoder._forward
        self.head = nn.Linear(encoder.dim, n_classes)

    def loss(
        self, images: Tensor, *, labels: Tensor, augmentation: str, size: int, rng: Generator, progress: float
    ) -> Tensor:
        """Cross-entropy of a batch (B, 3, H, W) uint8 with labels (B,)."""
        x = inputs.augment(images, size=size, rng=rng, **views.parse_augmentation(augmentation))
        return cross_entropy(self.head(self._read((x - 0.5) / 0.5)[1].mean(1)).float(), labels)

    def after_step(self, progress: float) -> None:
        """Nothing to update."""
