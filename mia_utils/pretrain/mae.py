"""MAE: encode the visible patches, reconstruct the pixels of the hidden ones.

Source: He et al. 2022 (arXiv 2111.06377); small-image recipe ours, modules from lightly.
"""

import copy
from collections.abc import Sequence

import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from numpy.random import Generator
from torch import Tensor, nn

from mia_utils.models import encoders, views
from mia_utils.models.encoders import HALF, Encoder
from mia_utils.pretrain import inputs
from mia_utils.pretrain.method import Method, draw_masks

DEFAULTS = dict(lr=1.5e-3, weight_decay=0.05, batch_size=64, augmentation="none")


class MaskedImageModel(Method):
    """What MAE and SimMIM share: patches, loss on the hidden ones, and ``reconstruct``, which the attacks query.

    A method adds ``embed`` (normalized images -> tokens of all patches, before any mask) and ``predict_from`` (those
    and masks (N, L) -> patches (N, L, 3 p p)), and puts what is trained beside the encoder under ``decoder``.

    Args:
        patch: side in pixels of what one mask entry hides.
        mask_ratio: share of hidden patches in training.
        norm_pix_loss: predict patches that are standardized by their own mean and sd.
        mean, std: normalization of the encoder's input (a frozen encoder keeps its own).
    """

    penalize = staticmethod(torch.square)  # of the pixel differences in the training loss

    def __init__(
        self, backbone: nn.Module, *, input_size: int, patch: int, mask_ratio: float, norm_pix_loss: bool = False,
        mean: Sequence[float] = HALF, std: Sequence[float] = HALF,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.input_size, self.patch = backbone, input_size, patch
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.n_tokens = (input_size // patch) ** 2
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def predict(self, images: Tensor, masks: Tensor) -> Tensor:
        """Predict all patches of normalized images (N, 3, H, W) from those that masks (N, L) leave visible."""
        return self.predict_from(self.embed(images), masks)

    def _cut_targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is to be predicted of images in [0, 1], (N, L, 3 p p), and its mean and sd per patch."""
        patches = utils.patchify((images - 0.5) / 0.5, self.patch)
        if not self.norm_pix_loss:
            return patches, patches.new_zeros(1), patches.new_ones(1)
        mean, sd = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / sd, mean, sd

    def loss(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """Mean error over the hidden patches of a batch (B, 3, H, W) uint8, pixels scaled to [-1, 1]."""
        error, masks = self._measure_errors(images, augmentation, size, rng)
        return (error * masks).sum() / masks.sum()

    def losses(self, images: Tensor, *, augmentation: str, size: int, rng: Generator, progress: float) -> Tensor:
        """Mean error over the hidden patches of each image (B,), as private training needs it."""
        error, masks = self._measure_errors(images, augmentation, size, rng)
        return (error * masks).sum(1) / masks.sum(1)

    def _measure_errors(self, images: Tensor, augmentation: str, size: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Return the error of every patch and the drawn masks, both (B, L)."""
        x = inputs.augment(images, size=size, rng=rng, **views.parse_augmentation(augmentation))
        masks = draw_masks(len(x), self.n_tokens, self.mask_ratio, rng).to(x.device)
        predicted = self.predict((x - self.mean) / self.std, masks).float()
        return self.penalize(predicted - self._cut_targets(x)[0]).mean(-1), masks

    def embed_patches(self, images: Tensor) -> Tensor:
        """Embed the patches of images (N, 3, H, W) in [0, 1], once for all masks of ``reconstruct_from``."""
        return self.embed((images.to(self.mean.device) - self.mean) / self.std)

    @torch.inference_mode()
    def reconstruct(self, images: Tensor, masks: Tensor) -> Tensor:
        """Reconstruct images (N, 3, H, W) in [0, 1] from the visible patches of masks (N, L) or (L,); not clipped.

        With ``norm_pix_loss`` brightness and contrast of a hidden patch come from the image, which the attacker knows.
        """
        masks = masks.expand(len(images), -1) if masks.ndim == 1 else masks
        if masks.shape != (len(images), self.n_tokens):
            raise ValueError(f"expected masks ({len(images)}, {self.n_tokens}), got {tuple(masks.shape)}")
        images = images.to(self.mean.device)
        return self._to_images(self.predict_from(self.embed_patches(images), masks.to(images.device)), images)

    @torch.inference_mode()
    def reconstruct_from(self, tokens: Tensor, masks: Tensor, *, images: Tensor) -> Tensor:
        """Reconstruct every image (``tokens``: its embedded patches) from every mask (M, L): (N, M, 3, H, W)."""
        n, m = len(tokens), len(masks)
        tokens = tokens.repeat_interleave(m, dim=0)  # (N M, L, D)
        patches = self.predict_from(tokens, masks.to(tokens.device).repeat(n, 1))
        return self._to_images(patches, images).unflatten(0, (n, m))

    def _to_images(self, patches: Tensor, images: Tensor) -> Tensor:
        """Put predicted patches together, in [0, 1]; for an image M times as many as it has."""
        if self.norm_pix_loss:
            m = len(patches) // len(images)
            _, mean, sd = (part.repeat_interleave(m, dim=0) for part in self._cut_targets(images))
            patches = patches * sd + mean
        return utils.unpatchify(patches, self.patch) * 0.5 + 0.5


class MAE(MaskedImageModel):
    """Masked autoencoder over a timm ViT.

    Args:
        mask_ratio: paper: 0.75.
        decoder_dim, decoder_depth, decoder_heads: the decoder (paper: 512, 8, 16; small images: 64, 1, 4).
        norm_pix_loss: the paper's best ImageNet models standardize patches; for small images we do not.
    """

    def __init__(
        self, backbone: nn.Module, *, input_size: int, mask_ratio: float = 0.75, decoder_dim: int = 64,
        decoder_depth: int = 1, decoder_heads: int = 4, norm_pix_loss: bool = False, mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
    ):  # fmt: skip
        if not hasattr(backbone, "patch_embed") or not hasattr(backbone, "blocks"):
            raise ValueError(f"mae needs a plain ViT, got {type(backbone).__name__}")
        patch = backbone.patch_embed.patch_size[0]
        settings = dict(mask_ratio=mask_ratio, norm_pix_loss=norm_pix_loss, mean=mean, std=std)
        super().__init__(backbone, input_size=input_size, patch=patch, **settings)
        self.encoder = MaskedVisionTransformerTIMM(vit=backbone)
        embed = nn.Linear(backbone.embed_dim, decoder_dim)
        blocks = MaskedVisionTransformerDecoderTIMM(
            num_patches=self.n_tokens, embed_dim=decoder_dim, depth=decoder_depth, num_heads=decoder_heads,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )  # fmt: skip
        predict = nn.Linear(decoder_dim, 3 * self.patch**2)
        self.decoder = nn.ModuleDict({"embed": embed, "blocks": blocks, "predict": predict})

    def embed(self, images: Tensor) -> Tensor:
        """Embed all patches of normalized images (N, 3, H, W), class token and positions included: (N, 1 + L, D)."""
        return self.encoder.preprocess(images)

    def predict_from(self, tokens: Tensor, masks: Tensor) -> Tensor:
        """Encode the visible tokens alone, decode all places: patches (N, L, 3 p p)."""
        prefix = self.backbone.num_prefix_tokens
        hidden_last = masks.to(torch.uint8).argsort(dim=1, stable=True)
        keep = hidden_last[:, : self.n_tokens - int(masks[0].sum())] + prefix
        first = torch.arange(prefix, device=keep.device).expand(len(keep), prefix)
        keep = torch.cat([first, keep], dim=1)  # prefix tokens are always visible
        visible = self.backbone.blocks(self.backbone.norm_pre(utils.get_at_index(tokens, keep)))
        visible = self.decoder["embed"](self.backbone.norm(visible))
        decoder = self.decoder["blocks"]
        full = decoder.mask_token.to(visible.dtype).expand(len(tokens), self.n_tokens + prefix, -1)
        full = full.scatter(1, keep.unsqueeze(-1).expand(-1, -1, visible.shape[-1]), visible)
        return self.decoder["predict"](decoder.decode(decoder.add_pos_embed(full)))[:, prefix:]


class ForeignMAE(MAE):
    """An MAE that predicts pixels normalized as its encoder's input is (ours scale them to [-1, 1])."""

    def _cut_targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super()._cut_targets((images - self.mean) / self.std * 0.5 + 0.5)

    def _to_images(self, patches: Tensor, images: Tensor) -> Tensor:
        return (super()._to_images(patches, images) - 0.5) / 0.5 * self.std + self.mean


def open_decoder(encoder: Encoder, *, untrained_seed: int | None = None) -> ForeignMAE | None:
    """Build encoder and decoder of an opened MAE checkpoint as the MIM attack queries them; None: it kept no decoder.

    With ``untrained_seed`` the same with fresh weights: the control.
    """
    if encoder.decoder is None:
        return None
    state, trained = encoder.decoder["state"], encoder
    depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("blocks.blocks."))
    if untrained_seed is not None:
        trained = encoders.make_untrained(encoder, seed=untrained_seed)
    dim, hidden = len(state["embed.weight"]), len(state["blocks.blocks.0.mlp.fc1.weight"])
    normal = dict(mean=encoder._mean.flatten().tolist(), std=encoder._std.flatten().tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(untrained_seed or 0)
        model = ForeignMAE(
            copy.deepcopy(trained.module), input_size=encoder.input_size, decoder_dim=dim, decoder_heads=1,
            norm_pix_loss=encoder.decoder["norm_pix_loss"], **normal,
        )  # fmt: skip
        model.decoder["blocks"] = MaskedVisionTransformerDecoderTIMM(
            num_patches=model.n_tokens, embed_dim=dim, depth=depth, num_heads=encoder.decoder["heads"],
            num_prefix_tokens=model.backbone.num_prefix_tokens, mlp_ratio=(hidden + 0.5) / dim,
        )  # fmt: skip
    if untrained_seed is None:
        model.backbone.load_state_dict(encoder.module.state_dict())  # building it set new positions
        model.decoder.load_state_dict(state)
    return model.eval()
