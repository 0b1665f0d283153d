"""Generated photographs of textured objects: the data set that needs no download.

Every image is one small ray-traced scene: an object of named parts (balls, tapered rods, tapered blocks) stands on a
ground before a wall or a sky, lit by one lamp or sun that casts shadows, seen by a noisy sensor. The camera is
orthographic, so a ray through a pixel is linear in the pixel's coordinates and a whole solid is intersected by one
matrix product: that is what makes thousands of images cheap in numpy.

Images are exactly i.i.d. (image ``i`` draws everything, its kind of object included, from its own random stream) and
every part carries fresh noise of its own. Texture is the point: in flat drawings membership inference sees nothing,
because a model has nothing individual to memorize about a part.

One scene shows the same thing at every size; only the sensor noise and the strokes of a sketch follow the pixels.
Arithmetic is float64 although an image has 8 bits: rounding differences between processors then practically never
reach a pixel, so that the hash of a pool is the same on another machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.datasets.scenes.objects import CLASS_NAMES, KIND_PARTS, MASK_CLASS_NAMES, PART_NAMES
from mia_utils.datasets.scenes.render import render

STYLES = ("scenes", "scenes-night", "scenes-sketch")
MIN_SIZE, MAX_SIZE = 16, 512
__all__ = ["CLASS_NAMES", "KIND_PARTS", "MASK_CLASS_NAMES", "PART_NAMES", "STYLES", "make_scenes"]


def make_scenes(
    n: int = 3000, *, size: int = 32, style: str = "scenes", seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Generate i.i.d. scenes, each from its own random stream: image i is the same whatever ``n`` is.

    The bounding box of the main object takes 35-70 % of the frame on average. In about 30 % of the scenes a second,
    small object of another kind stands beside it; it appears in the mask but not among the part boxes.

    Args:
        n: number of images, at least 1.
        size: side of the square images in pixels, 16 to 512.
        style: ``scenes`` (day and rooms), ``scenes-night`` (lamp light) or ``scenes-sketch`` (pencil on paper).
        seed: base seed; the stream of image i is ``seeds.rng(seed, "scenes", style, i)``.
        progress: show a bar when it takes more than two seconds.

    Returns:
        dict with the arrays of a ``Pool``; boxes lie around what is visible of each part of the main object, parts of
        different kinds that bear the same name share a column, ``KIND_PARTS`` lists the names of each kind.
    """
    if style not in STYLES:
        raise ValueError(f"expected a style among {', '.join(STYLES)}, got {style!r}")
    for name, value, low, high in (("n", n, 1, np.inf), ("size", size, MIN_SIZE, MAX_SIZE)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f"expected {name} to be a whole number from {low} to {high}, got {value!r}")
    images, masks = np.empty((n, size, size, 3), np.uint8), np.empty((n, size, size), np.uint8)
    labels, part_boxes = np.empty(n, np.int64), np.empty((n, len(PART_NAMES), 4), np.float32)
    for i in tqdm(range(n), desc=f"{style} {size} px", unit="image", delay=2, disable=not progress):
        images[i], masks[i], labels[i], part_boxes[i] = render(seeds.rng(seed, "scenes", style, i), int(size), style)
    return {
        "images": images,
        "masks": masks,
        "labels": labels,
        "image_ids": np.array([f"{style}/{i:06d}" for i in range(n)]),
        "class_names": CLASS_NAMES,
        "mask_class_names": MASK_CLASS_NAMES,
        "part_boxes": part_boxes,
        "part_names": PART_NAMES,
    }
