"""The same photograph in another framing: what mirroring, cropping, compressing or editing a query leaves of a leak."""

import io

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mia_utils import seeds


def _shift(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Move to the right: the border is repeated on the left, columns are lost on the right."""
    return F.pad(images, [columns, 0, 0, 0], padding_mode="edge")[..., :-columns]


def _add_noise(images: torch.Tensor, amount: float, image_ids: np.ndarray, seed: int) -> torch.Tensor:
    drawn = [seeds.rng(seed, "framing-noise", str(i)).standard_normal(images.shape[1:]) for i in image_ids]
    return (images + amount * torch.from_numpy(np.stack(drawn))).round().clip(0, 255).byte()


def _compress(images: torch.Tensor, quality: int) -> torch.Tensor:
    decoded = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


FRAMINGS = {  # uint8 (N, 3, H, W) -> the same, with the images' ids and a seed for what is drawn
    "JPEG of quality 50": lambda x, ids, seed: _compress(x, 50),
    "noise of 8/255": lambda x, ids, seed: _add_noise(x, 8.0, ids, seed),
    "20 % brighter": lambda x, ids, seed: F.adjust_brightness(x, 1.2),
    "shifted by 1 px": lambda x, ids, seed: _shift(x, 1),
    "shifted by 2 px": lambda x, ids, seed: _shift(x, 2),
    "shifted by 4 px": lambda x, ids, seed: _shift(x, 4),
    "mirrored": lambda x, ids, seed: F.hflip(x),
}


def reframe(images: np.ndarray, framing: str, *, image_ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Change how images (N, H, W, 3) uint8 are framed before they are queried: a name of ``FRAMINGS``."""
    queries = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
    return FRAMINGS[framing](queries, image_ids, seed).permute(0, 2, 3, 1).contiguous().numpy()
