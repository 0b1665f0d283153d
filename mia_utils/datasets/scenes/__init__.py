"""Generated photographs of textured objects: the data set that needs no download.

Every image is one small ray-traced scene: an object of named parts on a ground before a wall or a sky, lit by a lamp
or sun that casts shadows, seen by a noisy sensor. Images are exactly i.i.d., and textured: in flat drawings membership
inference sees nothing, because a model has nothing individual to memorize about a part.

A scene shows the same thing at every size; only the sensor noise and the strokes of a sketch follow the pixels. In
float64 rounding differences between processors practically never reach a pixel: a pool has one hash on all machines.
"""

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mia_utils import seeds
from mia_utils.datasets.scenes.objects import CLASS_NAMES, KIND_PARTS, MASK_CLASS_NAMES, PART_NAMES
from mia_utils.datasets.scenes.render import render

STYLES = ("scenes", "scenes-night", "scenes-sketch")
__all__ = ["CLASS_NAMES", "KIND_PARTS", "MASK_CLASS_NAMES", "PART_NAMES", "STYLES", "make_scenes"]


def make_scenes(
    n: int = 3000, *, size: int = 32, style: str = "scenes", seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Generate i.i.d. scenes: image i has the stream ``seeds.rng(seed, "scenes", style, i)``, whatever ``n`` is.

    The box of the main object takes 35-70 % of the frame on average. About 30 % of the scenes show a second, small
    object of another kind; it appears in the mask but not among the part boxes.

    Args:
        size: side of the square images in pixels, 16 to 512.
        style: ``scenes`` (day and rooms), ``scenes-night`` (lamp light) or ``scenes-sketch`` (pencil on paper).
        progress: show a bar when it takes more than two seconds.

    Returns:
        dict with the arrays of a ``Pool``; boxes lie around what is visible of each part of the main object, parts of
        different kinds that bear the same name share a column, ``KIND_PARTS`` lists the names of each kind.
    """
    if style not in STYLES:
        raise ValueError(f"expected a style among {', '.join(STYLES)}, got {style!r}")
    for name, value, low, high in (("n", n, 1, np.inf), ("size", size, 16, 512)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f"expected {name} to be a whole number from {low} to {high}, got {value!r}")
    images, masks = np.empty((n, size, size, 3), np.uint8), np.empty((n, size, size), np.uint8)
    labels, boxes = np.empty(n, np.int64), np.empty((n, len(PART_NAMES), 4), np.float32)
    for i in tqdm(range(n), desc=f"{style} {size} px", unit="image", delay=2, leave=False, disable=not progress):
        images[i], masks[i], labels[i], boxes[i] = render(seeds.rng(seed, "scenes", style, i), int(size), style)
    return {
        "images": images, "masks": masks, "labels": labels, "class_names": CLASS_NAMES,
        "image_ids": np.array([f"{style}/{i:06d}" for i in range(n)]),
        "mask_class_names": MASK_CLASS_NAMES, "part_boxes": boxes, "part_names": PART_NAMES,
    }  # fmt: skip
