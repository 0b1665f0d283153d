"""What a profile will cost: seconds of a CPU thread, or hours of a GPU (counted, never measured there)."""

import functools
import math
import time

from mia_utils.runner.choices import PRECISIONS, SEGMENTERS
from mia_utils.runner.profiles import Profile, Row

# Seconds of one thread of the reference machine (AMD EPYC with AVX-512), where measure_pace() is 1.
PACE_SECONDS = 0.0072  # of the probe's piece of work
START_SECONDS = 8.0  # until the first job begins
ROW_SECONDS = 3.0  # of a row beside its steps: data, records, utility
NOTEBOOK_SECONDS, CACHED_SECONDS = 60.0, 6.0  # of a notebook that the profile does not name; whose scores are kept
CHECKPOINTS = 8  # kept along one training, the decoder and the resume state included
# Training images per second with vit_micro_patch8_32 (segmenters: mobilenet_v2, 32 x 32), or with what is named.
IMAGES_PER_SECOND = {
    "mae": 2370.0, "simmim": 1080.0, "simclr": 553.0, "dino": 378.0, "moco": 327.0, "moco-v1": 528.0, "moco-v2": 528.0,
    "supervised": 1180.0, "unet": 69.0, "upernet": 92.0, "pspnet": 390.0, "deeplabv3plus": 94.0,
    "mae vit_nano_patch8_32": 5800.0, "simmim swin_thin_32": 268.0, "simclr resnet_thin_32": 176.0,
    "simclr swin_thin_32": 114.0, "moco-v2 resnet_thin_32": 288.0,
}  # fmt: skip
# Cost of one image relative to that, and millions of parameters (weights on disk, per checkpoint).
ARCH_COST = {
    "vit_nano_patch8_32": (0.6, 0.12), "vit_micro_patch8_32": (1.0, 0.82), "vit_micro_patch4_32": (4.0, 0.82),
    "vit_micro_patch8_64": (4.0, 0.82), "resnet_thin_32": (2.0, 0.4), "swin_thin_32": (4.0, 0.5),
    "vit_small_patch8_32": (20.0, 21.4), "resnet18_32": (35.0, 11.2), "mobilenet_v2": (1.0, 6.6),
}  # fmt: skip
# A private step against a plain one; with distillation there is a second network, the teacher.
PRIVATE_COST = {"mae": 6.9, "simmim": 6.9, "unet": 4.3}
SECOND_NETWORK = {"distillation": 2.0, "min-max": 2.0}
# What a GPU is assumed to do beside the rate of the profile (gpu_tflops, in bfloat16). Never measured.
STEP_SECONDS = 0.02  # launching the kernels of one step, however small the batch
FLOAT32_SHARE = 1 / 8  # of that rate in float32
# Options that change a step, and the size that segmenters are counted at: their cost grows with the pixels.
COUNTED = ("mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "n_local", "hidden_dim", "output_dim")
COUNTED_SIZE = (64, 128)


@functools.cache
def measure_pace(seconds: float = 0.5) -> float:
    """Measure how many times longer than on the reference machine a piece of a small model's step takes."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    tokens = np.linspace(-1, 1, 1088 * 128, dtype=np.float32).reshape(1088, 128)
    weights, took, began = np.full((128, 512), 0.01, np.float32), [], time.perf_counter()
    with threadpool_limits(1):
        while time.perf_counter() < began + seconds:
            start = time.process_time()  # what else is running now is no property of the machine
            for _ in range(2):
                out = np.tanh(tokens @ weights) @ weights.T
                out - out.mean(1, keepdims=True)
            sum(range(20_000))  # the interpreter's share
            took.append(time.process_time() - start)
    return float(np.median(took)) / PACE_SECONDS


def _get_factor(row: Row) -> float:
    """How much more than a plain one a step of the row's defense costs."""
    return PRIVATE_COST[row.method] if row.defense == "dp-sgd" else SECOND_NETWORK.get(row.defense, 1.0)


def estimate_seconds(row: Row, profile: Profile) -> float:
    """Estimate the seconds of one CPU thread of the reference machine that a row takes."""
    plain = IMAGES_PER_SECOND[row.method] / ARCH_COST.get(row.arch, (20.0,))[0]
    cost = _get_factor(row) / IMAGES_PER_SECOND.get(f"{row.method} {row.arch}", plain)
    if row.method in SEGMENTERS:  # encoders see images at their own size, a segmenter at that of the profile
        cost *= math.prod(_get_size(profile, row.dataset)) / 32**2
    return ROW_SECONDS + row.n_train * row.epochs * cost


def estimate_gpu_seconds(row: Row, profile: Profile) -> float:
    """Estimate the seconds of one GPU that a row's training takes: arithmetic at the assumed rate, and its steps."""
    gflop, default = count_row(row, profile)
    batch = min(row.options.get("batch_size", default), row.n_train)
    steps = row.epochs * max(row.n_train // batch, 1)
    mixed = row.options.get("precision", PRECISIONS[0]) != PRECISIONS[0]
    rate = profile.gpu_tflops * 1e12 * (1 if mixed else FLOAT32_SHARE)
    return _get_factor(row) * steps * (STEP_SECONDS + batch * gflop * 1e9 / rate)


def count_row(row: Row, profile: Profile) -> tuple[float, int]:
    """1e9 operations of a training step of a row, an image, and its method's own batch size."""
    counted = {key: value for key, value in row.options.items() if key in COUNTED}
    kind = row.augmentation.partition(":")[0]  # how large the crops are costs nothing
    gflop, batch = count_step(row.method, row.arch, kind, **counted)
    if row.method in SEGMENTERS:
        gflop *= math.prod(_get_size(profile, row.dataset)) / math.prod(COUNTED_SIZE)
    return gflop, batch


@functools.cache
def count_step(method: str, arch: str, augmentation: str, *, batch: int = 2, **options) -> tuple[float, int]:
    """Count one training step on the CPU, forward and backward of ``batch`` images in all views.

    Returns:
        1e9 operations (x + y z are two) an image, and the method's own batch size.
    """
    import numpy as np
    import torch  # seconds: not needed for a plan on a CPU
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
