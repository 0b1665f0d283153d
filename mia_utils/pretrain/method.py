"""What the methods share: the shape that the loop knows, and the vector that a method without class token trains."""

from collections.abc import Callable

import torch
from numpy.random import Generator
from torch import Tensor, nn

from mia_utils.models.encoders import from_module


class Method(nn.Module):
    """A network with ``backbone``, which is kept, and ``loss``, a mean over a batch; see ``registry.register``."""

    needs_labels = False

    def after_step(self, progress: float) -> None:
        """Update what no gradient moves; ``progress`` in [0, 1] is the share of the training done."""


def make_reader(backbone: nn.Module, input_size: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return what gives the mean over tokens (B, D) of normalized images (B, 3, H, W), and D."""
    encoder = from_module(backbone, arch="resnet_32" if input_size <= 64 else "resnet")
    return lambda images: encoder._forward(images)[1].mean(1), encoder.dim


def draw_masks(n: int, n_tokens: int, mask_ratio: float, rng: Generator) -> Tensor:
    """Draw n masks (n, L) bool, True = hidden, that each hide the same number of patches."""
    n_hidden = round(n_tokens * mask_ratio)
    if not 0 < n_hidden < n_tokens:
        raise ValueError(f"mask_ratio {mask_ratio} hides {n_hidden} of {n_tokens} patches: expected some, but not all")
    order = rng.random((n, n_tokens)).argsort(axis=1)
    masks = torch.zeros(n, n_tokens, dtype=torch.bool)
    return masks.scatter_(1, torch.from_numpy(order[:, :n_hidden].copy()), True)
