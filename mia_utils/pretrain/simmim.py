"""SimMIM: replace the hidden patches by one learned token, let the encoder see all places, predict pixels linearly.

Source: Xie et al. 2022 (arXiv 2111.09886): mask token at the patch embedding, one linear head, L1 on hidden pixels.
"""

from collections.abc import Sequence

import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from torch import Tensor, nn

from mia_utils.models.encoders import HALF
from mia_utils.pretrain.mae import MaskedImageModel

DEFAULTS = dict(lr=1.5e-3, weight_decay=0.05, batch_size=64, augmentation="none")


class SimMIM(MaskedImageModel):
    """SimMIM over a timm ViT or Swin (paper: 0.6 of units of 32 of 192 px are hidden).

    One mask entry hides one token of the encoder's output: a patch of a ViT, and in a Swin all patches that are merged
    into one place of its last stage (``swin_thin_32``: 4 x 4 patches of 2 px, so 16 units of 8 px).
    """

    penalize = staticmethod(torch.abs)  # L1

    def __init__(
        self, backbone: nn.Module, *, input_size: int, mask_ratio: float = 0.6, mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
    ):  # fmt: skip
        is_swin = hasattr(backbone, "layers") and getattr(backbone, "output_fmt", "") == "NHWC"
        if not hasattr(backbone, "patch_embed") or not (is_swin or hasattr(backbone, "blocks")):
            raise ValueError(f"simmim needs a plain ViT or a Swin, got {type(backbone).__name__}")
        patch = backbone.patch_embed.patch_size[0]
        unit = backbone.feature_info[-1]["reduction"] if is_swin else patch
        super().__init__(backbone, input_size=input_size, patch=unit, mask_ratio=mask_ratio, mean=mean, std=std)
        self.patches_per_side = unit // patch  # patches of the embedding along one side of a unit
        self.decoder = nn.Module()  # what is trained beside the encoder: the token that hides a patch, and the head
        self.decoder.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.patch_embed.proj.out_channels))
        self.decoder.predict = nn.Linear(backbone.num_features, 3 * unit**2)
        nn.init.trunc_normal_(self.decoder.mask_token, std=0.02)
        self.encoder = None if is_swin else MaskedVisionTransformerTIMM(backbone, mask_token=self.decoder.mask_token)

    def embed(self, images: Tensor) -> Tensor:
        """Embed all patches of normalized images (N, 3, H, W): (N, L, D), row by row; no positions yet."""
        return self.backbone.patch_embed(images).flatten(1, 2)  # (N, h, w, D) -> (N, h w, D)

    def predict_from(self, tokens: Tensor, masks: Tensor) -> Tensor:
        """Replace the hidden tokens, encode all places, predict all units: (N, L, 3 p p)."""
        n, side, r = len(masks), round(self.n_tokens**0.5), self.patches_per_side
        hidden = masks.view(n, side, side).repeat_interleave(r, dim=1).repeat_interleave(r, dim=2).flatten(1)
        tokens = torch.where(hidden.unsqueeze(-1), self.decoder.mask_token.to(tokens.dtype), tokens)
        if self.encoder is None:  # Swin: positions are in its attention
            tokens = self.backbone.layers(tokens.unflatten(1, (side * r, side * r)))
            tokens = self.backbone.norm(tokens).flatten(1, 2)
        else:
            tokens = self.encoder.add_pos_embed(self.encoder.prepend_prefix_tokens(tokens))
            tokens = self.backbone.blocks(self.backbone.norm_pre(tokens))
            tokens = self.backbone.norm(tokens)[:, self.backbone.num_prefix_tokens :]
        return self.decoder.predict(tokens)
