"""Training of segmenters: cross-entropy over valid pixels, and the regularizers that may defend against attacks."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.models import segmenters, views
from mia_utils.models.segmenters import VOID, Segmenter
from mia_utils.pretrain.method import Method

DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, batch_size=8, augmentation="none")
TRAINING_OPTIONS = ("dropout", "label_smoothing", "mixup", "distill", "minmax")  # not of the network that is kept


def augment_pair(
    images: Tensor, masks: Tensor, *, rng: Generator, scale: Sequence[float] | None = None, flip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Augment images (B, 3, H, W) uint8 and their label maps (B, H, W) together, in batch on their device.

    Args:
        scale: area range of a random crop of the image's own shape, scaled to its size; None: no crop.
        flip: probability of mirroring.

    Returns:
        (B, 3, H, W) float32 in [0, 1] (bilinear) and (B, H, W) int64 (nearest: no label is ever mixed).
    """
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]):
        shapes = f"{tuple(images.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"expected images (B, 3, H, W) and masks (B, H, W), got {shapes}")
    u = torch.from_numpy(rng.random((len(images), 4), dtype=np.float32)).to(images.device)
    x, y = images.float().div_(255), masks.unsqueeze(1).float()  # labels up to 255 are exact
    mirrored = u[:, 0] < flip
    if scale is not None:
        side = (scale[0] + (scale[1] - scale[0]) * u[:, 1]).sqrt()  # of the crop, as a share of H and of W
        shift = (1 - side[:, None]) * (2 * u[:, 2:] - 1)  # its center in [-1, 1] coordinates: inside the image
        theta = torch.zeros(len(x), 2, 3, device=x.device)
        theta[:, 0, 0], theta[:, 1, 1] = torch.where(mirrored, -side, side), side
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        y = F.grid_sample(y, grid, mode="nearest", padding_mode="border", align_corners=False)
    else:
        x, y = (torch.where(mirrored[:, None, None, None], z.flip(3), z) for z in (x, y))
    return x, y[:, 0].round().long()


def _drop_features(decoder: nn.Module, inputs: tuple[Sequence[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """Drop channels of what the encoder hands over, except the image itself, which comes first."""
    image, *features = inputs[0]
    return ([image, *(decoder.feature_dropout(x) for x in features)], *inputs[1:])


def _make_adversary(n_classes: int) -> nn.Module:
    """Membership classifier over posteriors beside one-hot labels, (B, 2C, H, W) -> (B, 1) logits."""
    widths, layers = (2 * n_classes, 16, 32, 32), []
    for width, next_width in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))


class Segmentation(Method):
    """A network of ``segmenters.make_network`` as a method of the training loop.

    Args:
        dropout: share of channels dropped, in training, of every feature map that the encoder hands to the decoder.
        label_smoothing: share of the label that is spread over all classes.
        mixup: alpha of the Beta(alpha, alpha) that every image and its labels are mixed with another one's by
            (Zhang et al. 2018, arXiv 1710.09412).
        distill: temperature of a distillation: the backbone never sees a label, only the softened posteriors of
            ``teacher``, which is trained beside it on the labels (Hinton et al. 2015, arXiv 1503.02531).
        teacher: network of the same kind; not part of the segmenter that is kept.
        minmax: weight of a membership attacker in the loss, which is trained beside the segmenter to tell its outputs
            on training images from those on ``reference`` images (min-max game: Nasr, Shokri, Houmansadr 2018,
            arXiv 1807.05852; here with a reversed gradient).
    """

    needs_labels = True  # label maps (N, H, W), void 255
    input_size = None  # the images' own

    def __init__(
        self, backbone: nn.Module, *, n_classes: int, dropout: float = 0.0, label_smoothing: float = 0.0,
        mixup: float = 0.0, distill: float = 0.0, teacher: nn.Module | None = None, minmax: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.n_classes = backbone, n_classes
        for name, value in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"expected {name} from 0 to below 1, got {value!r}")
        if min(mixup, distill, minmax) < 0 or bool(mixup) + bool(distill) + bool(minmax) > 1:
            raise ValueError(f"expected one of mixup, distill, minmax above 0, got {mixup!r}, {distill!r}, {minmax!r}")
        self.label_smoothing, self.mixup, self.distill, self.minmax = label_smoothing, mixup, distill, minmax
        self.adversary = _make_adversary(n_classes) if minmax else None
        self.reference: tuple[Tensor, Tensor] | None = None
        self.teacher = teacher if distill else None
        if dropout:
            backbone.decoder.feature_dropout = nn.Dropout2d(dropout)  # holds no weights; rests in eval mode
            backbone.decoder.register_forward_pre_hook(_drop_features)

    @classmethod
    def build(cls, network: str, arch: str, *, n_classes: int, seed: int = 0, **options: Any) -> "Segmentation":
        """Build a network of ``segmenters.ARCHS`` on the encoder ``arch``; ``options`` also of ``make_network``."""
        training = {key: options.pop(key) for key in TRAINING_OPTIONS if key in options}
        make_one = functools.partial(segmenters.make_network, network, n_classes, encoder=arch, **options)
        if training.get("distill"):
            training["teacher"] = make_one(seed=seeds.derive(seed, "teacher") % 2**31)
        method = cls(make_one(seed=seed), n_classes=n_classes, **training)
        method.facts = dict(method=network, arch=arch, n_classes=n_classes, options=options)
        return method

    def as_segmenter(self, name: str | None = None) -> Segmenter:
        """Return the network as the attacks see it (the same weights, now in eval mode)."""
        return segmenters.from_module(self.backbone, name=name, **self.facts)

    def loss(self, images: Tensor, *, labels: Tensor, progress: float, **view: Any) -> Tensor:
        """Mean cross-entropy over the valid pixels of a batch (B, 3, H, W) uint8 with labels (B, H, W).

        A batch of void alone has loss 0 and no gradient. ``view``: ``augmentation``, ``rng``, ``size``.
        """
        x, y = self._augment(images, labels, **view)
        if self.training and self.mixup:
            return self._mix(x, y, view["rng"])
        if self.training and self.minmax:
            return self._play(x, y, **view)
        logits, n_valid = self._predict(self.backbone, x), (y != VOID).sum().clamp_min(1)
        if self.training and self.teacher is not None:
            taught = self._predict(self.teacher, x)
            loss = F.cross_entropy(taught, y, ignore_index=VOID, reduction="sum") / n_valid
            soft, output = ((z / self.distill).log_softmax(1) for z in (taught.detach(), logits))
            gap = F.kl_div(output, soft, log_target=True, reduction="none").sum(1)  # (B, H, W)
            return loss + self.distill**2 * (gap * (y != VOID)).sum() / n_valid
        return self._compare(logits, y, reduction="sum") / n_valid

    def losses(self, images: Tensor, *, labels: Tensor, progress: float, **view: Any) -> Tensor:
        """Mean cross-entropy over the valid pixels of each image (B,), whose weight then depends on no other image."""
        x, y = self._augment(images, labels, **view)
        return self._compare(self._predict(self.backbone, x), y).sum((1, 2)) / (y != VOID).sum((1, 2)).clamp_min(1)

    def _compare(self, logits: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        """Cross-entropy of every pixel (B, H, W), 0 where it is void, or its sum."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, y, ignore_index=VOID, reduction=reduction, label_smoothing=smoothing)

    def _mix(self, x: Tensor, y: Tensor, rng: Generator) -> Tensor:
        """Loss of images (B, 3, H, W) mixed with others of the batch, each with a share of its own."""
        share = torch.from_numpy(rng.beta(self.mixup, self.mixup, len(x)).astype(np.float32)).to(x.device)
        other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        part = share.view(-1, 1, 1, 1)
        logits = self._predict(self.backbone, part * x + (1 - part) * x[other])
        own, others = (self._compare(logits, labels).sum((1, 2)) for labels in (y, y[other]))
        valid = (y != VOID).sum((1, 2))
        n_valid = (share * valid + (1 - share) * valid[other]).sum().clamp_min(1)
        return (share * own + (1 - share) * others).sum() / n_valid

    def _play(self, x: Tensor, y: Tensor, **view: Any) -> Tensor:
        """Loss of members (B, 3, H, W) and of the attacker that tells them from as many reference images.

        Both pass the network in one batch, so that batch norm treats them alike. The attacker moves outputs on members
        only, by its reversed gradient.
        """
        if self.reference is None:
            raise ValueError("minmax needs images that are not trained on: pass reference= and reference_labels=")
        images, labels = self.reference
        drawn = view["rng"].choice(len(images), len(x), replace=len(images) < len(x))
        x_reference, y_reference = self._augment(images[drawn], labels[drawn], **view)
        logits, logits_reference = self._predict(self.backbone, torch.cat([x, x_reference])).chunk(2)
        loss = self._compare(logits, y).sum((1, 2)).sum() / (y != VOID).sum().clamp_min(1)
        posteriors = logits.softmax(1)
        reversed_ = posteriors.detach() - self.minmax * (posteriors - posteriors.detach())  # the same numbers
        outputs = torch.cat([reversed_, logits_reference.softmax(1).detach()])
        labels_seen = F.one_hot(torch.cat([y, y_reference]).clamp_max(self.n_classes), self.n_classes + 1)
        labels_seen = labels_seen[..., :-1].permute(0, 3, 1, 2).to(outputs)  # void is no class
        is_member = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)]).to(outputs)
        guess = self.adversary(torch.cat([outputs, labels_seen], 1))
        return loss + F.binary_cross_entropy_with_logits(guess, is_member)

    def _augment(
        self, images: Tensor, labels: Tensor, *, augmentation: str, rng: Generator, size: None
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch and check its labels, see ``augment_pair``."""
        settings = views.parse_augmentation(augmentation)
        if set(settings) - {"scale", "flip"}:
            allowed = "none, flip, crop, crop-weak, crop:LOW-HIGH"
            raise ValueError(f"augmentation {augmentation!r} changes colors, segmenters take {allowed}")
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 grids would move pixels and labels
            x, y = augment_pair(images, labels, rng=rng, **settings)
        if (wrong := y[(y != VOID) & (y >= self.n_classes)]).numel():
            raise ValueError(f"labels hold the id {wrong.max()}, expected 0 to {self.n_classes - 1}, or {VOID} (void)")
        return x, y

    def _predict(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images (B, 3, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        return network(segmenters.pad((x - 0.5) / 0.5, segmenters.MULTIPLE))[:, :, :height, :width].float()
