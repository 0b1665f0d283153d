"""Backbones without a head: small ones for small images under names of our own, and every one of timm."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

_TINY, _SMALL = "vit_tiny_patch16_224", "vit_small_patch16_224"
# A timm name and what differs from it. 32 px and patch 8 give L = 16 tokens.
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_nano_patch8_32": (_TINY, dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)),
    "vit_micro_patch8_32": (_TINY, dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4)),
    "vit_micro_patch4_32": (_TINY, dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4)),
    "vit_micro_patch8_64": (_TINY, dict(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4)),
    "vit_mini_patch8_32": (_TINY, dict(img_size=32, patch_size=8, embed_dim=192, depth=6, num_heads=3)),
    "vit_small_patch8_32": (_SMALL, dict(img_size=32, patch_size=8)),
    "vit_small_patch8_64": (_SMALL, dict(img_size=64, patch_size=8)),
    "swin_thin_32": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(1, 2, 1), num_heads=(2, 4, 8)),
    ),
    "resnet_thin_32": ("resnet10t", dict(channels=(16, 32, 64, 128))),
    "resnet_wide_32": ("resnet10t", dict(channels=(32, 64, 128, 256))),
    "resnet18_32": ("resnet18", {}),
}
BUILT_IN = tuple(ARCHS)  # opened checkpoints add variants of their own to ARCHS
_VITS = ("vit", "deit", "deit3")
# what ``dropout`` and ``drop_path`` are called in timm
_REGULARIZERS = {"dropout": ("proj_drop_rate", "pos_drop_rate"), "drop_path": ("drop_path_rate",)}


def make_backbone(arch: str, *, seed: int = 0, dropout: float | None = None, drop_path: float | None = None,
                  **changes: Any) -> nn.Module:  # fmt: skip
    """Build a backbone: a key of ``ARCHS``, or any timm name.

    The weights come from a private random stream: the global random state is left as it was.

    Args:
        arch: its name.
        seed: of the weights; the same for every ``dropout`` and ``drop_path``.
        dropout: share of values that a ViT drops in training, after its projections and positions; None: timm's.
        drop_path: share of residual branches dropped in the last block, growing linearly up to it; None: timm's.
        changes: further arguments of timm, for example ``num_heads`` or ``pretrained`` (downloads).
    """
    base, own = ARCHS.get(arch, (arch, {}))
    # a name may come from a file: nothing that timm would look up elsewhere (hf-hub:, local-dir:)
    if not re.fullmatch(r"[\w.\-]+", base) or not timm.is_model(base.split(".")[0]):
        raise ValueError(f"no encoder {arch!r}: expected {', '.join(BUILT_IN)} or a timm name")
    family = base.split("_")[0]
    settings = dict(num_classes=0) | own
    if family in _VITS:
        # global_pool='' keeps the final norm on the tokens ('avg' would turn it into Identity)
        settings |= dict(global_pool="", dynamic_img_size=True)
    elif family in ("swin", "swinv2"):
        settings |= dict(strict_img_size=False)
    elif family == "beit":
        settings |= dict(global_pool="")
    for option, value in (("dropout", dropout), ("drop_path", drop_path)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"expected {option} from 0 to below 1, got {value!r}")
        if family not in _VITS and not (option == "drop_path" and family in ("swin", "resnet")):
            fitting = "a plain ViT (drop_path: also Swin, ResNet)"
            raise ValueError(f"option {option} does not fit {arch}: expected {fitting}")
        settings |= dict.fromkeys(_REGULARIZERS[option], value)
    settings |= changes
    if "eps" in settings:
        settings["norm_layer"] = functools.partial(nn.LayerNorm, eps=settings.pop("eps"))
    if settings.pop("swiglu", False):
        settings |= dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = timm.create_model(base, **settings)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"no encoder {arch!r} ({reason}): expected {', '.join(BUILT_IN)} or a timm name") from None
        if arch.endswith("_32") and "resne" in arch:  # CIFAR stem: 3 x 3, stride 1, no max-pool
            module.conv1 = nn.Conv2d(3, module.bn1.num_features, 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()
            nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    return module


Reader = Callable[[Tensor], tuple[Tensor | None, Tensor]]  # x -> (class vector or None, tokens (N, L, D))


def find_reader(module: nn.Module, probe: Tensor) -> Reader:
    """Return what reads a backbone's tokens; of a CNN or Swin the deepest stage with L >= 4 for the probe's size."""
    n_before = int(getattr(module, "num_prefix_tokens", 0))
    has_class = n_before and getattr(module, "cls_token", True) is not None

    def read(x: Tensor) -> tuple[Tensor | None, Tensor]:
        out = module.forward_features(x)
        if out.ndim == 4:  # feature map, NHWC (Swin) or NCHW
            channels_last = getattr(module, "output_fmt", "NCHW") == "NHWC"
            return None, out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)
        return (out[:, 0] if has_class else None), out[:, n_before:]

    stage = len(getattr(module, "feature_info", None) or [])
    while read(probe)[1].shape[1] < 4 and stage > 1:
        stage -= 1
        read = functools.partial(_read_stage, module, stage - 1)
    return read


def _read_stage(module: nn.Module, stage: int, x: Tensor) -> tuple[None, Tensor]:
    (grid,) = module.forward_intermediates(x, indices=[stage], intermediates_only=True, output_fmt="NCHW")
    return None, grid.flatten(2).transpose(1, 2)
