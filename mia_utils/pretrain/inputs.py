"""What a training step sees: batches of images, on the device or streamed from disk, and their views in float32."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from mia_utils.models import views

Rows = TypeVar("Rows", slice, np.ndarray)
AHEAD = 3  # batches that are decoded while one is trained on: what streaming holds in memory


class Streamed:
    """Images that stay where they are, (N, H, W, 3) uint8: ``images[rows]`` decodes them, (B, 3, H, W)."""

    def __init__(self, images: Any, device: torch.device):
        self.images, self.device = images, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        return views.read_pixels(self.images, rows).contiguous().to(self.device)


def place(images: Any, device: torch.device) -> Tensor | Streamed:
    """Put an array on the device; leave anything else, and files mapped into memory, where it is."""
    streamed = Streamed(images, device)
    return streamed[:] if isinstance(images, np.ndarray) and not isinstance(images, np.memmap) else streamed


def read(images: Tensor | Streamed, batches: Iterable[Rows]) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the rows of every batch and their images (B, 3, H, W); streamed ones are decoded ahead in a thread."""
    if isinstance(images, Tensor):
        yield from ((rows, images[rows]) for rows in batches)
        return
    pool, waiting = ThreadPoolExecutor(1), deque()
    try:
        for rows in itertools.chain(batches, [None] * AHEAD):  # None: no more to decode, only to wait for
            waiting.append(None if rows is None else (rows, pool.submit(images.__getitem__, rows)))
            if len(waiting) > AHEAD:
                first, decoded = waiting.popleft()
                yield first, decoded.result()
    finally:  # also when the training stops early
        pool.shutdown(cancel_futures=True)


def augment(images: Tensor, **settings: Any) -> Tensor:
    """``views.augment`` in float32: its resampling, a product, would move pixels by up to 3/255 in bfloat16."""
    with torch.autocast(images.device.type, enabled=False):
        return views.augment(images, **settings)


def draw_views(images: Tensor, n: int, *, augmentation: str, size: int, rng: Generator) -> Tensor:
    """Draw ``n`` views of a batch (B, 3, H, W) uint8, one after the other and scaled to [-1, 1]: (n B, 3, h, w)."""
    settings = views.parse_augmentation(augmentation)
    return 2 * torch.cat([augment(images, size=size, rng=rng, **settings) for _ in range(n)]) - 1
