"""Crops and augmentations of whole batches on the device: query views of the attacks, training views of the encoders.

A crop with antialiased bicubic resizing is linear in the image, so all crops of a batch are two matrix products
(one along the width, one along the height) whose weights depend on the boxes only.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mia_utils import seeds

Range = Sequence[float]
RATIO = (3 / 4, 4 / 3)  # width / height of a random resized crop
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))


def _draw_tries(rng: np.random.Generator, n: int, scale: Range) -> tuple[np.ndarray, ...]:
    """Share, log_ratio and shift of n boxes; the order is fixed, because resumed trainings repeat it."""
    return rng.uniform(*scale, (n, 10)), rng.uniform(*_LOG_RATIO, (n, 10)), rng.random((n, 2))


def _place_boxes(share: np.ndarray, log_ratio: np.ndarray, shift: np.ndarray, height: int, width: int) -> np.ndarray:
    """Place boxes by torchvision's RandomResizedCrop rule: the first of ten tries that fits, or the central crop.

    ``share`` of the area and ``log_ratio`` of width to height are (n, 10), one of each try; ``shift`` (n, 2) is the
    place of the box from top (left) 0 to bottom (right) 1. Returns (n, 4) int64 top, left, height, width.
    """
    for n_tries in (1, share.shape[1]):  # small boxes always fit at once
        area, aspect = height * width * share[:, :n_tries], np.exp(log_ratio[:, :n_tries])
        w, h = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        if fits.any(axis=1).all():
            break
    first = fits.argmax(axis=1)
    w, h = np.take_along_axis(w, first[:, None], 1)[:, 0], np.take_along_axis(h, first[:, None], 1)[:, 0]
    none = ~fits.any(axis=1)
    if none.any():
        in_ratio = width / height
        fallback_w = width if in_ratio <= RATIO[1] else round(height * RATIO[1])
        fallback_h = height if in_ratio >= RATIO[0] else round(width / RATIO[0])
        w, h, shift = np.where(none, fallback_w, w), np.where(none, fallback_h, h), np.where(none[:, None], 0.5, shift)
    top, left = (shift[:, 0] * (height - h + 1)).astype(int), (shift[:, 1] * (width - w + 1)).astype(int)
    return np.stack([top, left, h, w], axis=1)


def draw_boxes(
    image_ids: Sequence[str], n: int, *, height: int, width: int, scale: Range = (0.08, 0.2), seed: int, stream: str
) -> tuple[Tensor, Tensor]:
    """Draw n = K random-resized-crop boxes and flips per image, from a stream keyed by the image alone.

    ``scale`` is the range of the box's share of the area. Returns boxes (N, K, 4) int64 as top, left, height, width in
    pixels, and flips (N, K) bool (probability 0.5).
    """
    if n < 1 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"expected n >= 1 and 0 < scale low <= high <= 1, got n={n}, scale={tuple(scale)}")
    tries, flips = [np.empty((len(image_ids), n, m)) for m in (10, 10, 2)], np.empty((len(image_ids), n), bool)
    for i, image_id in enumerate(image_ids):
        rng = seeds.rng(seed, stream, image_id)
        for drawn, values in zip(tries, _draw_tries(rng, n, scale), strict=True):
            drawn[i] = values
        flips[i] = rng.random(n) < 0.5
    # placed together: one pass over all images costs less than one for each
    boxes = _place_boxes(*(drawn.reshape(-1, drawn.shape[-1]) for drawn in tries), height, width)
    return torch.from_numpy(boxes).reshape(len(image_ids), n, 4), torch.from_numpy(flips)


def _bicubic_weights(start: Tensor, length: Tensor, n_in: int, n_out: int, flips: Tensor | None = None) -> Tensor:
    """Weights (B, n_out, n_in) of antialiased bicubic resizing (a = -0.5) of [start, start + length) to n_out samples.

    Rows sum to one, zero outside the box (cropped first, resized then); reversed where ``flips`` (B,) is set. Few
    intervals of whole pixels differ: those of small images are kept in a table.
    """
    n_intervals = n_in * (n_in + 1)
    interval = start * (n_in + 1) + length
    if flips is not None:
        interval = interval + flips * n_intervals
    if 8 * n_intervals * n_out * n_in <= _TABLE_BYTES:
        return _tabulate_weights(n_in, n_out, interval.device)[interval]
    interval, which = torch.unique(interval, return_inverse=True)
    weight, mirrored = _compute_weights(interval % n_intervals, n_in, n_out), interval >= n_intervals
    return torch.where(mirrored[:, None, None], weight.flip(1), weight)[which]


_TABLE_BYTES = 64e6  # 64 px to 16 px takes 34 MB, 32 px to 16 px 4 MB


@functools.lru_cache(maxsize=8)
def _tabulate_weights(n_in: int, n_out: int, device: torch.device) -> Tensor:
    """Weights of every interval of n_in pixels, then all mirrored (what reaches beyond n_in is never looked up)."""
    with torch.inference_mode(False):  # a table made by an attack also serves a training
        weight = _compute_weights(torch.arange(n_in * (n_in + 1), device=device), n_in, n_out)
        return torch.cat([weight, weight.flip(1)])


def _compute_weights(interval: Tensor, n_in: int, n_out: int) -> Tensor:
    """Weights (B, n_out, n_in) of intervals numbered start * (n_in + 1) + length."""
    start, length = (interval // (n_in + 1)).float()[:, None, None], (interval % (n_in + 1)).float()[:, None, None]
    stretch = length / n_out
    centre = start + (torch.arange(n_out, device=start.device) + 0.5)[None, :, None] * stretch
    pixel = torch.arange(n_in, device=start.device, dtype=torch.float32)[None, None, :]
    x = ((pixel + 0.5 - centre) / stretch.clamp(min=1.0)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (pixel >= start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


_LARGE = 80 * 80  # pixels of an image from which one crop after the other is faster on a CPU than two dense products


def resized_crop(
    images: Tensor, boxes: Tensor, size: int, *, flips: Tensor | None = None, rounded: bool = True
) -> Tensor:
    """Cut and resize K boxes of every image at once: (N, K, 3, size, size) float32 in [0, 1].

    Args:
        images: (N, 3, H, W) uint8, or float in [0, 1].
        boxes, flips: (N, K, 4) int64 top, left, height, width; (N, K) bool, mirrored left to right.
        size: side of the square output in pixels.
        rounded: round to 1/255 between the passes and at the end, as uint8 pipelines do (training skips it).
    """
    if images.ndim != 4 or boxes.ndim != 3 or boxes.shape[-1] != 4 or len(images) != len(boxes):
        raise ValueError(f"expected (N, 3, H, W) and (N, K, 4), got {tuple(images.shape)} and {tuple(boxes.shape)}")
    n, channels, height, width = images.shape
    k, on_cpu = boxes.shape[1], images.device.type == "cpu"
    if on_cpu and rounded and height * width >= _LARGE and (levels := _find_levels(images)) is not None:
        return _cut_large(levels, boxes, size, flips)
    boxes, flips = boxes.to(images.device), None if flips is None else flips.to(images.device)
    crops = torch.empty(n, k, channels, size, size, device=images.device)
    # on a CPU as many images at once as its cache holds: about 2 MB for crops of 16 pixels
    step = max(1, 128 // max(k, 1)) if on_cpu else max(n, 1)
    for first in range(0, n, step):
        block = slice(first, first + step)
        flipped = None if flips is None else flips[block]
        with torch.autocast(images.device.type, enabled=False):  # pixels are never rounded to bfloat16
            _cut(images[block], boxes[block], flipped, rounded=rounded, out=crops[block])
    return crops


def _find_levels(images: Tensor) -> Tensor | None:
    """Images as uint8 where they hold nothing else than multiples of 1/255."""
    if images.dtype == torch.uint8:
        return images
    levels = (images * 255).round()
    return levels.to(torch.uint8) if bool(((levels - images * 255).abs() < 1e-3).all()) else None


def _cut_large(images: Tensor, boxes: Tensor, size: int, flips: Tensor | None) -> Tensor:
    """Crops of large uint8 images by the integer kernel that torchvision calls, one box after the other."""
    images = images.contiguous(memory_format=torch.channels_last)
    crops = torch.empty(*boxes.shape[:2], images.shape[1], size, size, dtype=torch.uint8)
    for i, rows in enumerate(boxes.tolist()):
        for k, (top, left, height, width) in enumerate(rows):
            part = images[i : i + 1, :, top : top + height, left : left + width]
            crops[i, k] = F.interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]
    if flips is not None:
        crops = torch.where(flips.to(crops.device)[:, :, None, None, None], crops.flip(-1), crops)
    return crops.float().div_(255)


def _cut(images: Tensor, boxes: Tensor, flips: Tensor | None, *, rounded: bool, out: Tensor) -> None:
    """Cut one block into ``out`` (N, K, C, S, S); the products are ordered so that nothing is copied between them."""
    (n, k, channels, size, _), (height, width) = out.shape, images.shape[2:]
    boxes, flips = boxes.reshape(n * k, 4), None if flips is None else flips.reshape(-1)
    pixels = images.float() if images.dtype == torch.uint8 else images * 255.0
    weight_y = _bicubic_weights(boxes[:, 0], boxes[:, 2], height, size)  # (N K, S, H)
    weight_x = _bicubic_weights(boxes[:, 1], boxes[:, 3], width, size, flips)  # (N K, S, W)
    # along the width: (N, K S, W) x (N, W, C H) -> (N, K S, C H)
    columns = weight_x.reshape(n, k * size, width) @ pixels.reshape(n, channels * height, width).transpose(1, 2)
    if rounded:
        columns = columns.round_().clamp_(0, 255)
    # along the height: (N K, S, H) x (N K, H, S C) -> (N K, S, S C)
    crops = weight_y @ columns.reshape(n * k, size * channels, height).transpose(1, 2)
    if rounded:
        crops = crops.round_()
    crops = crops.clamp_(0, 255).reshape(n, k, size, size, channels)
    torch.div(crops.permute(0, 1, 4, 2, 3), 255.0, out=out)


def check_images(images: Any, image_ids: Sequence[str] | None = None) -> Any:
    """Check what is queried: (N, H, W, 3) uint8 images, streamed ones as they are, and one id for each, if any."""
    images = images if hasattr(images, "shape") and not isinstance(images, Tensor) else np.asarray(images)
    if len(images.shape) != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images: expected (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if image_ids is not None and len(image_ids) != len(images):
        raise ValueError(f"expected one image id per image, got {len(image_ids)} ids for {len(images)} images")
    return images


def read_pixels(images: Any, rows: slice | np.ndarray | list[int]) -> Tensor:
    """Return some images as (n, 3, H, W) uint8; streamed ones are decoded here."""
    return torch.from_numpy(np.ascontiguousarray(images[rows])).permute(0, 3, 1, 2)


def make_views(images: Tensor, image_ids: Sequence[str], *, view: str = "resize", size: int, seed: int) -> Tensor:
    """Make the query view of images (N, 3, H, W), uint8 or in [0, 1]: (N, 3, size, size) float32 in [0, 1].

    ``view`` is ``"resize"`` (deterministic; the same for members and non-members) or ``"random_resized_crop"`` (scale
    (0.2, 1) and flip: what the released PartCrop code gives members only).
    """
    n, _, height, width = images.shape
    if view == "resize":
        boxes, flips = torch.tensor([0, 0, height, width]).repeat(n, 1, 1), None
    elif view == "random_resized_crop":
        draws = dict(scale=(0.2, 1.0), seed=seed, stream="query-view")
        boxes, flips = draw_boxes(image_ids, 1, height=height, width=width, **draws)
    else:
        raise ValueError(f"expected view 'resize' or 'random_resized_crop', got {view!r}")
    return resized_crop(images, boxes, size, flips=flips)[:, 0]


# probabilities, and the range of the area of a crop; the same in training and in queries
_COLORS = {"flip": 0.5, "jitter": 0.8, "gray": 0.2}
AUGMENTATIONS = {
    "none": {}, "flip": {"flip": 0.5},
    "crop": {"scale": (0.2, 1.0), "flip": 0.5}, "crop-weak": {"scale": (0.5, 1.0), "flip": 0.5},
    "simclr": {"scale": (0.2, 1.0), **_COLORS}, "simclr-weak": {"scale": (0.5, 1.0), **_COLORS},
    "dino": {"scale": (0.5, 1.0), "blur": 0.5, **_COLORS},
    "dino-local": {"scale": (0.08, 0.3), "blur": 0.5, **_COLORS},
}  # fmt: skip


def parse_augmentation(name: str) -> dict[str, Any]:
    """Settings of an augmentation: a name of ``AUGMENTATIONS`` or ``crop:LOW-HIGH``."""
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    if found := re.fullmatch(r"crop:([\d.]+)-([\d.]+)", name):
        with contextlib.suppress(ValueError):
            low, high = map(float, found.groups())
            if 0 < low <= high <= 1:
                return {"scale": (low, high), "flip": 0.5}
    raise ValueError(f"unknown augmentation {name!r}: expected one of {', '.join(AUGMENTATIONS)} or crop:LOW-HIGH")


_N_CHANCES = 11  # uniform numbers per view; see _apply


def _jitter(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, contrast, saturation (x 0.6 to 1.4) and hue (+-0.1 turn), one set of factors per image.

    Ours: hue turns around the gray axis; torchvision shifts it in HSV. They turn the same way and differ by nearly as
    much as the shift changes a pixel (a test measures both).
    """
    factor = 1 + 0.4 * (2 * u[:, :3] - 1)
    x = (x * factor[:, 0, None, None, None]).clamp_(0, 1)
    gray = _to_gray(x)
    x = torch.lerp(gray.mean((1, 2, 3), keepdim=True), x, factor[:, 1, None, None, None]).clamp_(0, 1)
    x = torch.lerp(_to_gray(x), x, factor[:, 2, None, None, None]).clamp_(0, 1)
    # a rotation is linear: one 3 x 3 product per image (an HSV detour costs ten times)
    angle = 0.2 * math.pi * (2 * u[:, 3] - 1)
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    third = (1 - cos) / 3
    diagonal, plus, minus = cos + third, third - sin, third + sin
    turn = torch.stack([diagonal, plus, minus, minus, diagonal, plus, plus, minus, diagonal], 1).reshape(-1, 3, 3)
    return (turn @ x.flatten(2)).reshape(x.shape).clamp_(0, 1)


def _to_gray(x: Tensor) -> Tensor:
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _blur(x: Tensor, u: Tensor) -> Tensor:
    """3-tap Gaussian per axis, sigma in (0.1, 2): the side tap's weight follows from sigma."""
    side = torch.exp(-0.5 / (0.1 + 1.9 * u) ** 2)[:, None, None, None]
    for axis in (2, 3):
        size = x.shape[axis]
        before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)], axis)
        x = before.add_(after).mul_(side).add_(x).div_(1 + 2 * side)
    return x


def _change(x: Tensor, picked: Tensor, change: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """Change the picked views of x (B, 3, H, W) in place and compute nothing for the others.

    ``picked`` (B,) bool and the factors (B, ...) lie on the CPU, so that no step waits for the device to count.
    """
    rows = picked.nonzero()[:, 0]
    if not len(rows):
        return x
    factors, rows = [factor[rows].to(x.device) for factor in factors], rows.to(x.device)
    return x.index_copy_(0, rows, change(x.index_select(0, rows), *factors))


def augment(
    images: Tensor, *, size: int, rng: np.random.Generator, scale: Range | None = None, **chances: float
) -> Tensor:
    """Augment a training batch (B, 3, H, W) uint8 on its device: (B, 3, size, size) float32 in [0, 1].

    Every image draws its own crop and factors from ``rng``, which is keyed by seed and step, so a resumed run repeats
    it. ``scale`` is the area range of the crop (None: no crop), ``chances`` the probabilities of flip, jitter, gray,
    blur, solarize.
    """
    b, _, height, width = images.shape
    chance, boxes = torch.from_numpy(rng.random((b, 1, _N_CHANCES), dtype=np.float32)), None
    if scale is not None:
        boxes = torch.from_numpy(_place_boxes(*_draw_tries(rng, b, scale), height, width))[:, None]
    return _apply(images, boxes, chance, size=size, **chances)


def query_views(
    images: Tensor, image_ids: Sequence[str], n: int, *, augmentation: str = "simclr", size: int, seed: int
) -> Tensor:
    """Make n augmented query views of images (N, 3, H, W) uint8: (N, n, 3, size, size) float32 in [0, 1].

    :func:`augment`, drawn from a stream keyed by the image alone; not rounded to 1/255, as in training. The first views
    are the same whatever n is, and augmentations share their draws (a crop of ``"simclr"`` lies where that of
    ``"crop"`` lies), so that sweeps over both are paired.
    """
    settings = dict(parse_augmentation(augmentation))
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"expected images (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
    if n < 1 or len(image_ids) != len(images):
        raise ValueError(f"expected n >= 1 and {len(images)} image ids, got n={n} and {len(image_ids)} ids")
    height, width = images.shape[2:]
    draws = np.empty((len(images), n, _N_CHANCES + 22))  # one row a view, so fewer views are the first rows
    for row, image_id in zip(draws, image_ids, strict=True):
        seeds.rng(seed, "encodermi", image_id).random(out=row)
    chance = torch.from_numpy(draws[..., :_N_CHANCES].astype(np.float32))
    scale, boxes = settings.pop("scale", None), None
    if scale is not None:
        low, high = _LOG_RATIO
        share, log_ratio, shift = np.split(draws[..., _N_CHANCES:].reshape(-1, 22), (10, 20), axis=1)
        share, log_ratio = scale[0] + (scale[1] - scale[0]) * share, low + (high - low) * log_ratio
        boxes = torch.from_numpy(_place_boxes(share, log_ratio, shift, height, width)).reshape(-1, n, 4)
    return _apply(images, boxes, chance, size=size, **settings).unflatten(0, (len(images), n))


def _apply(
    images: Tensor, boxes: Tensor | None, chance: Tensor, *, size: int, flip: float = 0.0, jitter: float = 0.0,
    gray: float = 0.0, blur: float = 0.0, solarize: float = 0.0,
) -> Tensor:  # fmt: skip
    """Apply draws to a batch: K views of each of B images, in the order of the images, (B K, 3, size, size).

    ``boxes`` are (B, K, 4) crops, None: the whole image; ``chance`` (B, K, 11) is uniform in [0, 1), on the CPU: flip,
    jitter, its 4 factors, gray, blur, its width, solarize, unused.
    """
    (b, _, height, width), k = images.shape, chance.shape[1]
    mirrored = chance[:, :, 0] < flip
    if boxes is not None:
        x = resized_crop(images, boxes, size, flips=mirrored, rounded=False).flatten(0, 1)
    else:
        if size != height or size != width:
            x = resized_crop(images, torch.tensor([0, 0, height, width]).repeat(b, 1, 1), size, rounded=False)[:, 0]
        else:
            x = images.float().div_(255.0)
        x = x.repeat_interleave(k, dim=0) if k > 1 else x
        x = _change(x, mirrored.flatten(), lambda part: part.flip(3))
    chance = chance.flatten(0, 1)
    if jitter:
        x = _change(x, chance[:, 1] < jitter, _jitter, chance[:, 2:6])
    if gray:
        x = _change(x, chance[:, 6] < gray, lambda part: _to_gray(part).expand_as(part))
    if blur:
        x = _change(x, chance[:, 7] < blur, _blur, chance[:, 8])
    if solarize:
        x = _change(x, chance[:, 9] < solarize, lambda part: torch.where(part >= 0.5, 1 - part, part))
    return x.contiguous()
