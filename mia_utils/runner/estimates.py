"""What a profile will cost: seconds of a CPU thread, or hours of a GPU (counted, never measured there)."""

from __future__ import annotations

import functools
import math

from mia_utils.runner.profiles import PRECISIONS, SEGMENTERS, Profile, Row

START_SECONDS = 6.0  # imports of one process
CHECKPOINTS = 8  # kept along one training, the decoder and the resume state included
# Training images per second of one CPU thread with vit_micro_patch8_32 (segmenters: mobilenet_v2, 32 x 32), to tell a
# newcomer the minutes before they start. Measured seconds replace the estimate as soon as an artifact exists.
IMAGES_PER_SECOND = {
    "mae": 1400.0, "simmim": 700.0, "simclr": 350.0, "dino": 230.0, "moco": 350.0, "moco-v1": 450.0, "moco-v2": 450.0,
    "supervised": 1100.0, "unet": 110.0, "upernet": 55.0, "pspnet": 220.0, "deeplabv3plus": 110.0,
}  # fmt: skip
# Cost of one image relative to that, and millions of parameters (weights on disk, per checkpoint).
ARCH_COST = {
    "vit_nano_patch8_32": (0.35, 0.12), "vit_micro_patch8_32": (1.0, 0.82), "vit_micro_patch4_32": (4.0, 0.82),
    "vit_micro_patch8_64": (4.0, 0.82), "resnet_thin_32": (1.4, 0.4), "swin_thin_32": (2.0, 0.5),
    "vit_small_patch8_32": (20.0, 21.4), "resnet18_32": (35.0, 11.2), "mobilenet_v2": (1.0, 6.6),
}  # fmt: skip
# A private step measured against a plain one (vit_micro, batch 64: 4.1 to 4.9; unet, 96 x 128, batch 8: 2.7); with
# distillation there is a second network, the teacher.
PRIVATE_COST = {"mae": 4.5, "simmim": 4.5, "unet": 3.0}
SECOND_NETWORK = {"distillation": 2.0, "min-max": 2.0}
# What a GPU is assumed to do beside the rate of the profile (gpu_tflops, in bfloat16). Never measured.
STEP_SECONDS = 0.02  # launching the kernels of one step, however small the batch
FLOAT32_SHARE = 1 / 8  # of that rate in float32
# Options that change a step, and the size that segmenters are counted at: their cost grows with the pixels.
COUNTED = ("mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "n_local", "hidden_dim", "output_dim")
COUNTED_SIZE = (64, 128)


def estimate_seconds(row: Row, profile: Profile | None = None) -> float:
    """Estimate the seconds of one CPU thread that a row's training takes, imports apart.

    Encoders see images at their own size; a segmenter at the size that the profile loads them with.
    """
    cost, _ = ARCH_COST.get(row.arch, (20.0, 20.0))
    if row.method in SEGMENTERS and profile is not None:
        height, width = _get_size(profile, row.dataset)
        cost *= height * width / 32**2
    cost *= PRIVATE_COST[row.method] if row.defense == "dp-sgd" else SECOND_NETWORK.get(row.defense, 1.0)
    return row.n_train * row.epochs * cost / IMAGES_PER_SECOND[row.method]


def estimate_bytes(row: Row) -> float:
    """Estimate the bytes of a row's artifact: float32 weights times the checkpoints kept."""
    return ARCH_COST.get(row.arch, (20.0, 20.0))[1] * 1e6 * 4 * CHECKPOINTS


def estimate_gpu_seconds(row: Row, profile: Profile) -> float:
    """Estimate the seconds of one GPU that a row's training takes: arithmetic at the assumed rate, and its steps."""
    counted = {key: value for key, value in row.options.items() if key in COUNTED}
    kind = row.augmentation.partition(":")[0]  # how large the crops are costs nothing
    gflop, default = count_step(row.method, row.arch, kind, **counted)
    if row.method in SEGMENTERS:
        gflop *= math.prod(_get_size(profile, row.dataset)) / math.prod(COUNTED_SIZE)
    batch = min(row.options.get("batch_size", default), row.n_train)
    steps = row.epochs * max(row.n_train // batch, 1)
    factor = PRIVATE_COST[row.method] if row.defense == "dp-sgd" else SECOND_NETWORK.get(row.defense, 1.0)
    mixed = row.options.get("precision", PRECISIONS[0]) != PRECISIONS[0]
    rate = profile.gpu_tflops * 1e12 * (1 if mixed else FLOAT32_SHARE)
    return factor * (steps * STEP_SECONDS + steps * batch * gflop * 1e9 / rate)


@functools.cache
def count_step(method: str, arch: str, augmentation: str, *, batch: int = 2, **options) -> tuple[float, int]:
    """Count one training step on the CPU: 1e9 operations an image, all views, forward and backward (x + y z are two).

    Args:
        batch: images that are counted, of the encoder's own size or ``COUNTED_SIZE``.
        options: of the method, those of ``COUNTED``.

    Returns:
        the count, and the method's own batch size.
    """
    import numpy as np  # seconds: neither is needed for a plan on a CPU
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mia_utils import pretrain

    labeled = getattr(pretrain.METHODS[method][0], "needs_labels", False)
    model = pretrain.build(method, arch, seed=0, **options, **({"n_classes": 19} if labeled else {})).train()
    size = None if method in SEGMENTERS else model.input_size
    shape = COUNTED_SIZE if size is None else (size, size)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, *shape), dtype=np.uint8))
    extra = {"labels": torch.zeros(batch, *(() if size else shape), dtype=torch.long)} if labeled else {}
    call = dict(augmentation=augmentation, size=size, rng=np.random.default_rng(0), progress=0.5, **extra)
    with FlopCounterMode(display=False) as counter:
        model.loss(images, **call).backward()
    return counter.get_total_flops() / 1e9 / batch, pretrain.METHODS[method][1]["batch_size"]


def _get_size(profile: Profile, dataset: str) -> tuple[int, int]:
    """Height and width that a profile loads a data set with; 32 where it does not say."""
    size = profile.datasets[dataset].get("size", 32)
    return (size, size) if isinstance(size, int) else tuple(size)
