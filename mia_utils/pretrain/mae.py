"""MAE: encode the visible patches, reconstruct the pixels of the hidden ones.

Source: He et al. 2022 (arXiv 2111.06377); small-image recipe of METHODS section 5, modules from lightly.
"""

from __future__ import annotations

import numpy as np
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from torch import Tensor, nn

from mia_utils import views
from mia_utils.encoders import HALF

DEFAULTS = dict(lr=1.5e-3, weight_decay=0.05, batch_size=64, augmentation="none")


def draw_masks(n: int, n_tokens: int, mask_ratio: float, rng: np.random.Generator) -> Tensor:
    """Draw n masks that each hide the same number of patches.

    Returns:
        (n, L) bool, True = hidden.
    """
    n_hidden = round(n_tokens * mask_ratio)
    if not 0 < n_hidden < n_tokens:
        raise ValueError(f"mask_ratio {mask_ratio} hides {n_hidden} of {n_tokens} patches: expected some, but not all")
    order = rng.random((n, n_tokens)).argsort(axis=1)
    masks = torch.zeros(n, n_tokens, dtype=torch.bool)
    return masks.scatter_(1, torch.from_numpy(order[:, :n_hidden].copy()), True)


class MAE(nn.Module):
    """Masked autoencoder over a timm ViT; also the attacks' ``autoencoder`` (``reconstruct``).

    Args:
        backbone: timm VisionTransformer.
        input_size: image side in pixels.
        mask_ratio: share of hidden patches (paper: 0.75).
        decoder_dim, decoder_depth, decoder_heads: the decoder (paper: 512, 8, 16; small images: 64, 1, 4).
    """

    pooling = "mean"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_size: int,
        mask_ratio: float = 0.75,
        decoder_dim: int = 64,
        decoder_depth: int = 1,
        decoder_heads: int = 4,
    ):
        super().__init__()
        if not hasattr(backbone, "patch_embed") or not hasattr(backbone, "blocks"):
            raise ValueError(f"mae needs a plain ViT, got {type(backbone).__name__}")
        self.backbone, self.mask_ratio = backbone, mask_ratio
        self.encoder = MaskedVisionTransformerTIMM(vit=backbone)
        self.patch = backbone.patch_embed.patch_size[0]
        self.n_tokens = (input_size // self.patch) ** 2
        self.decoder = nn.ModuleDict(
            {
                "embed": nn.Linear(backbone.embed_dim, decoder_dim),
                "blocks": MaskedVisionTransformerDecoderTIMM(
                    num_patches=self.n_tokens, embed_dim=decoder_dim, depth=decoder_depth, num_heads=decoder_heads
                ),
                "predict": nn.Linear(decoder_dim, 3 * self.patch**2),
            }
        )
        self.register_buffer("mean", torch.tensor(HALF).view(1, 3, 1, 1), persistent=False)

    def patchify(self, images: Tensor) -> Tensor:
        """Cut normalized images (N, 3, H, W) into patches (N, L, 3 p p)."""
        n, _, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        patches = images.reshape(n, 3, rows, self.patch, columns, self.patch)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches (N, L, 3 p p) together to images (N, 3, H, W)."""
        n, n_tokens, _ = patches.shape
        side = round(n_tokens**0.5)
        grid = patches.reshape(n, side, side, self.patch, self.patch, 3)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, 3, side * self.patch, side * self.patch)

    def predict(self, images: Tensor, masks: Tensor) -> Tensor:
        """Predict all patches of normalized images (N, 3, H, W) from those that masks (N, L) leave visible."""
        prefix = self.backbone.num_prefix_tokens
        hidden_last = masks.to(torch.uint8).argsort(dim=1, stable=True)
        keep = hidden_last[:, : self.n_tokens - int(masks[0].sum())] + prefix
        first = torch.arange(prefix, device=keep.device).expand(len(keep), prefix)
        keep = torch.cat([first, keep], dim=1)  # prefix tokens are always visible
        visible = self.decoder["embed"](self.encoder.encode(images, idx_keep=keep))
        decoder = self.decoder["blocks"]
        full = decoder.mask_token.to(visible.dtype).expand(len(images), self.n_tokens + prefix, -1)
        full = full.scatter(1, keep.unsqueeze(-1).expand(-1, -1, visible.shape[-1]), visible)
        return self.decoder["predict"](decoder.decode(decoder.add_pos_embed(full)))[:, prefix:]

    def loss(
        self, images: Tensor, *, augmentation: str, size: int, rng: np.random.Generator, progress: float
    ) -> Tensor:
        """Mean squared error over the hidden patches of a batch (B, 3, H, W) uint8, pixels scaled to [-1, 1]."""
        x = views.augment(images, size=size, rng=rng, **views.parse_augmentation(augmentation))
        x = (x - 0.5) / 0.5
        masks = draw_masks(len(x), self.n_tokens, self.mask_ratio, rng).to(x.device)
        error = (self.predict(x, masks).float() - self.patchify(x)).square().mean(-1)  # (B, L)
        return (error * masks).sum() / masks.sum()

    @torch.inference_mode()
    def reconstruct(self, images: Tensor, masks: Tensor) -> Tensor:
        """Reconstruct images from their visible patches.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            masks: (N, L) or (L,) bool, True = hidden; every mask hides the same number of patches.

        Returns:
            (N, 3, H, W) prediction of every patch, about [0, 1], not clipped.
        """
        masks = masks.expand(len(images), -1) if masks.ndim == 1 else masks
        if masks.shape != (len(images), self.n_tokens):
            raise ValueError(f"expected masks ({len(images)}, {self.n_tokens}), got {tuple(masks.shape)}")
        device = self.mean.device
        return self.unpatchify(self.predict((images.to(device) - 0.5) / 0.5, masks.to(device))) * 0.5 + 0.5

    def after_step(self, progress: float) -> None:
        """Nothing to update: MAE has no momentum encoder."""
