"""Querying a frozen model image by image: one loop over chunks, sized to fit memory, for every attack's extraction.

What every ``extract`` takes, beside the model:
    images: (N, H, W, 3) uint8; streamed ones are decoded a chunk at a time.
    image_ids: N ids that key all draws: an image's features do not depend on its batch or its order.
    seed: of the draws; deterministic queries take it so that every extract is called alike.
    pooling: vector of an image: ``"cls"``, ``"mean"``, or ``"auto"`` = the one that the method trained.
    batch_size: images per forward; None fits it to memory. Changes nothing but speed.
    progress: show a bar with images/s when it takes longer than five seconds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from mia_utils.models import views


def iterate_chunks(n: int, chunk: int, *, label: str, progress: bool) -> Iterator[slice]:
    """Yield the rows of successive chunks of n images."""
    with tqdm(total=n, unit="image", desc=label, disable=not progress, delay=5, leave=False) as bar:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            yield rows
            bar.update(rows.stop - start)


def fit_chunk(device: torch.device, image_bytes: float, *, cache: float, most: float = 65536) -> int:
    """Images per forward: of a GPU's free memory 0.3, on a CPU what stays in its ``cache`` bytes (fastest there)."""
    budget = 0.3 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else cache
    return max(1, int(min(budget / image_bytes, most)))


def fit_views(encoder: Any, n_views: int, view_bytes: float, *, share: float = 1.0, cache: float) -> int:
    """Images per forward of an encoder whose views have ``share`` of the tokens; no kernel indexes past 32 bits."""
    token_bytes = 4 * 16 * getattr(encoder, "dim", 768) * max(1, share * (getattr(encoder, "n_tokens", None) or 196))
    return fit_chunk(get_device(encoder), n_views * (view_bytes + token_bytes), cache=cache, most=65536 / n_views)


def get_device(model: Any) -> torch.device:
    """Device of a model; the CPU for a bare callable."""
    return torch.device(getattr(model, "device", "cpu"))


def check_query(model: Any, images: Any, image_ids: Sequence[str], *, need: str = "embed") -> Any:
    """Check what is queried; return (N, H, W, 3) uint8 images to slice, streamed ones as they are."""
    images = views.check_images(images, image_ids)
    if not callable(getattr(model, need, None)):
        raise ValueError(f"expected a model with {need}(images), got {type(model).__name__}: use encoders.wrap")
    return images
