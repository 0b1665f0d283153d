"""DINO: a student matches the sharpened, centered output of its own momentum teacher over views of many scales.

Source: Caron et al. 2021 (arXiv 2104.14294); loss and head from lightly. Ours: saturation .4 as in our SimCLR
(released: .2), blur of half of all views (released: all first, a tenth of the second, half of the local ones).
"""

import copy

import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from numpy.random import Generator
from torch import Tensor, nn

from mia_utils.models import views
from mia_utils.pretrain import inputs
from mia_utils.pretrain.method import Method

DEFAULTS = dict(lr=1e-3, weight_decay=0.05, batch_size=64, augmentation="dino", clip=3.0)


class DINO(Method):
    """DINO over a timm ViT, the encoder that is kept; the class token is trained.

    Args:
        output_dim: number of prototypes (paper: 65,536).
        n_local: local crops of half the side (the released PartCrop recipe: none).
        momentum: start of the teacher momentum that grows to 1 by a cosine (paper: 0.996).
        hidden_dim, bottleneck_dim: of the head (paper: 2048, 256).
        keep: which of the two networks (DINO's users take the teacher, PartCrop's released code attacks the student).
    """

    def __init__(
        self, backbone: nn.Module, *, input_size: int, output_dim: int = 1024, n_local: int = 2,
        momentum: float = 0.996, teacher_temperature: float = 0.04, student_temperature: float = 0.1,
        hidden_dim: int = 256, bottleneck_dim: int = 64, keep: str = "teacher",
    ):  # fmt: skip
        super().__init__()
        if not getattr(backbone, "num_prefix_tokens", 0):
            raise ValueError(f"dino needs a ViT with a class token, got {type(backbone).__name__}")
        self.n_local, self.momentum = n_local, momentum
        self.other, self.backbone = copy.deepcopy(backbone), backbone
        pair = (self.other, backbone) if keep == "teacher" else (backbone, self.other)
        self.networks = dict(zip(("student", "teacher"), pair, strict=True))  # a dict: nothing is registered twice
        self.networks["teacher"].requires_grad_(False)
        sizes = dict(hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, output_dim=output_dim)
        self.student_head = DINOProjectionHead(backbone.embed_dim, **sizes)
        self.teacher_head = DINOProjectionHead(backbone.embed_dim, **sizes)  # weight norm can't be deep-copied
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher_head.requires_grad_(False)
        self.criterion = DINOLoss(output_dim, teacher_temp=teacher_temperature, student_temp=student_temperature)

    def loss(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """Cross-entropy between teacher (two global views) and student (all views) of a batch (B, 3, H, W) uint8."""
        settings = views.parse_augmentation(augmentation)
        local = {**settings, "scale": views.AUGMENTATIONS["dino-local"]["scale"]}
        large = torch.cat([inputs.augment(images, size=size, rng=rng, **settings, solarize=0.2 * i) for i in range(2)])
        large = (large - 0.5) / 0.5
        with torch.no_grad():
            teacher = self.teacher_head(self.networks["teacher"].forward_features(large)[:, 0]).float().chunk(2)
        vectors = [self.networks["student"].forward_features(large)[:, 0]]
        if self.n_local:
            small = [inputs.augment(images, size=size // 2, rng=rng, **local) for _ in range(self.n_local)]
            vectors.append(self.networks["student"].forward_features((torch.cat(small) - 0.5) / 0.5)[:, 0])
        student = self.student_head(torch.cat(vectors)).float().chunk(2 + self.n_local)
        center = self.criterion.center.clone()
        with torch.autocast(center.device.type, enabled=False):  # it sums products over batch and prototypes
            loss = self.criterion(list(teacher), list(student))  # and means the center over all processes
        if not self.training:  # measuring a loss must not move the center
            self.criterion.center.copy_(center)
        return loss

    def after_step(self, progress: float) -> None:
        """Move the teacher."""
        m = cosine_schedule(round(progress * 10_000), 10_001, self.momentum, 1.0)
        update_momentum(*self.networks.values(), m)
        update_momentum(self.student_head, self.teacher_head, m)
