"""MAEs that were trained elsewhere: the decoder that a checkpoint kept beside its encoder, for the MIM attack."""

import copy

import torch
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from torch import Tensor

from mia_utils.models import encoders
from mia_utils.models.encoders import Encoder
from mia_utils.pretrain.mae import MAE


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
