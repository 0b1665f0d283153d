"""A supervised row beside the self-supervised ones: cross-entropy on the labels of the members."""

from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mia_utils.pretrain import inputs
from mia_utils.pretrain.method import Method, make_reader

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="flip")


class Supervised(Method):
    """A linear head for ``n_classes`` labels on the mean over tokens of any timm backbone."""

    needs_labels = True

    def __init__(self, backbone: nn.Module, *, input_size: int, n_classes: int):
        super().__init__()
        self.backbone = backbone
        self._read, dim = make_reader(backbone, input_size)
        self.head = nn.Linear(dim, n_classes)

    def loss(
        self, images: Tensor, *, labels: Tensor, augmentation: str, size: int, rng: Generator, progress: float
    ) -> Tensor:
        """Cross-entropy of a batch (B, 3, H, W) uint8 with labels (B,)."""
        x = inputs.draw_views(images, 1, augmentation=augmentation, size=size, rng=rng)
        return cross_entropy(self.head(self._read(x)).float(), labels)
