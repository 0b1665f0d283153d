"""SimCLR: two views of an image agree, all other images of the batch disagree.

Source: Chen et al. 2020 (arXiv 2002.05709); loss and head from lightly.
"""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from numpy.random import Generator
from torch import Tensor, nn

from mia_utils.pretrain import inputs
from mia_utils.pretrain.method import Method, make_reader

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="simclr-weak")


class SimCLR(Method):
    """SimCLR over any timm backbone; the mean over tokens is the trained vector.

    Args:
        temperature: of the NT-Xent loss (paper: 0.5 on CIFAR).
        hidden_dim, output_dim: of the projection head (paper: 2048, 128).
    """

    def __init__(
        self, backbone: nn.Module, *, input_size: int, temperature: float = 0.2, hidden_dim: int = 256,
        output_dim: int = 128,
    ):  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self._read, dim = make_reader(backbone, input_size)
        self.head = SimCLRProjectionHead(dim, hidden_dim, output_dim)
        self.criterion = NTXentLoss(temperature=temperature)

    def loss(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """NT-Xent over two views of a batch (B, 3, H, W) uint8, against the images of all processes."""
        z = self.head(self._read(inputs.draw_views(images, 2, augmentation=augmentation, size=size, rng=rng))).float()
        self.criterion.gather_distributed = self.training  # the batch of all processes; a measured one is whole already
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 does not tell similar similarities apart
            return self.criterion(*z.chunk(2))
