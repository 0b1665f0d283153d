"""Backbones without a head: small ones for small images under names of our own, and every one of timm."""

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
_PLAIN = ("vit", "deit", "deit3")
# global_pool='' keeps the final norm on the tokens ('avg' would turn it into Identity)
_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_PLAIN, dict(global_pool="", dynamic_img_size=True)), "beit": dict(global_pool=""),
    **dict.fromkeys(("swin", "swinv2"), dict(strict_img_size=False)),
}  # fmt: skip
TOLERANCE = 1e-5  # relative error of one product: float32 kernels stay at 1e-6, bfloat16 ones reach 1e-3
_REGULARIZERS = {"dropout": ("proj_drop_rate", "pos_drop_rate"), "drop_path": ("drop_path_rate",)}  # timm's names


def is_model(name: str) -> bool:
    """Tell whether timm knows a name by itself: it may come from a file and point elsewhere (hf-hub:, local-dir:)."""
    return bool(re.fullmatch(r"[\w.\-]+", name)) and timm.is_model(name.split(".")[0])


def make_backbone(arch: str, *, seed: int = 0, dropout: float | None = None, drop_path: float | None = None,
                  **changes: Any) -> nn.Module:  # fmt: skip
    """Build a backbone from a private random stream; the global random state is left as it was.

    Args:
        arch: a key of ``ARCHS``, or any timm name.
        seed: of the weights; the same for every ``dropout`` and ``drop_path``.
        dropout: share of values that a ViT drops in training, after its projections and positions; None: timm's.
        drop_path: share of residual branches dropped in the last block, growing linearly up to it; None: timm's.
        changes: further arguments of timm, for example ``num_heads`` or ``pretrained`` (downloads).
    """
    base, own = ARCHS.get(arch, (arch, {}))
    expected = f"expected {', '.join(BUILT_IN)} or a timm name"
    if not is_model(base):
        raise ValueError(f"no encoder {arch!r}: {expected}")
    family = base.split("_")[0]
    settings = dict(num_classes=0) | own | _SETTINGS.get(family, {})
    for option, value in (("dropout", dropout), ("drop_path", drop_path)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"expected {option} from 0 to below 1, got {value!r}")
        if family not in _PLAIN and not (option == "drop_path" and family in ("swin", "resnet")):
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
        except Exception as error:  # timm and torch raise many types
            raise ValueError(f"no encoder {arch!r} ({first_line(error)}): {expected}") from None
        if arch.endswith("_32") and "resne" in arch:  # CIFAR stem: 3 x 3, stride 1, no max-pool
            module.conv1 = nn.Conv2d(3, module.bn1.num_features, 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()
            nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    return module


def first_line(error: Exception) -> str:
    """What a library said, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def find_reader(module: nn.Module, probe: Tensor) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    """Return what reads a backbone's class vector (or None) and tokens (N, L, D).

    Of a CNN or Swin: the deepest stage with L >= 4 for the probe's size.
    """
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


def measure_error(n: int = 256) -> float:
    """Largest error of a product of two (n, n) float32 matrices, as a share of its largest value; about 5 ms."""
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


def use_fast_products() -> str:
    """Let oneDNN multiply where that is exact on this CPU; returns what was chosen, as words. Call it before models.

    PyTorch's default takes MKL's AVX2 path on AMD; ``"medium"`` takes oneDNN at twice its rate, and on CPUs with AMX
    bfloat16, which the probe sees. Beside it timm's own attention is 5 to 9 times faster than the fused kernel.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        return f"{before}: a GPU does the products"
    torch.set_float32_matmul_precision("medium")
    error = measure_error()
    if error >= TOLERANCE:
        torch.set_float32_matmul_precision(before)
        return f"{before}: medium is off by {error:.0e} on this CPU"
    timm.layers.set_fused_attn(False)
    return f"medium: off by {error:.0e}, attention not fused"
