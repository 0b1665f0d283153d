"""Methods of training by name: ``METHODS`` maps it to (class, defaults); ``register`` adds one from outside."""

import torch
from torch import nn

from mia_utils import seeds
from mia_utils.models import segmenters
from mia_utils.models.encoders import from_module, make_backbone
from mia_utils.pretrain import dino, mae, moco, segmentation, simclr, simmim, supervised

METHODS: dict[str, tuple[type, dict]] = {
    "mae": (mae.MAE, mae.DEFAULTS),
    "simmim": (simmim.SimMIM, simmim.DEFAULTS),
    "dino": (dino.DINO, dino.DEFAULTS),
    "moco": (moco.MoCo, moco.DEFAULTS),
    "moco-v1": (moco.MoCoV1, moco.DEFAULTS),
    "moco-v2": (moco.MoCoV2, moco.DEFAULTS),
    "simclr": (simclr.SimCLR, simclr.DEFAULTS),
    "supervised": (supervised.Supervised, supervised.DEFAULTS),
    **dict.fromkeys(segmenters.ARCHS, (segmentation.Segmentation, segmentation.DEFAULTS)),
}


def get(name: str) -> tuple[type, dict]:
    """Return class and defaults of a method, or raise a one-line ValueError."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def register(name: str, method: type, *, lr: float, weight_decay: float, batch_size: int, augmentation: str) -> None:
    """Add a training method under the name that profiles call it; ``pretrain/simclr.py`` is the shortest one.

    ``method``: ``nn.Module`` with ``backbone``, ``loss(images, *, augmentation, size, rng, progress)``, a mean over the
    images that draws one row of numbers for each and augments by ``pretrain.inputs.augment``, and
    ``after_step(progress)``; for several processes every step must reach the same weights.
    """
    METHODS[name] = (method, dict(lr=lr, weight_decay=weight_decay, batch_size=batch_size, augmentation=augmentation))


def build(name: str, arch: str, *, seed: int = 0, **options) -> nn.Module:
    """Build a method on a backbone (``encoders.ARCHS`` or a timm name) with fresh weights, from its own random state.

    ``options``: keyword arguments of the method; ``dropout`` and ``drop_path`` go to the backbone of an encoder, whose
    ``input_size`` is the backbone's own where it is not given.
    """
    cls, _ = get(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(cls, "build"):  # a network that is no head on a backbone builds itself
            return cls.build(name, arch, seed=seed, **options)
        dropped = {key: options.pop(key, None) for key in ("dropout", "drop_path")}
        backbone = make_backbone(arch, seed=seed, **dropped)
        size = options.pop("input_size", None) or from_module(backbone, arch=arch, method=name).input_size
        torch.manual_seed(seed)
        try:
            method = cls(backbone, input_size=size, **options)
        except TypeError as error:
            raise ValueError(f"{name} does not take these options: {error}") from None
    method.input_size = size
    return method


def derive_seed(seed: int, role: str) -> int:
    """Seed of a row's training: a target and its shadow share the split's seed, never weights or order."""
    return seeds.derive(seed, "training", role) % 2**31
