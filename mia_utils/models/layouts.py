"""What the keys of a checkpoint mean: other libraries' names under timm's, and the backbone that weights fit.

Known: timm, DINO, DINOv2 (chunks, LayerScale, registers), MoCo, I-JEPA, iBOT, lightly, torchvision ResNet and ViT,
transformers ViT, ViTMAE, DeiT, DINOv2 and BEiT in both of their layouts, CLIP towers where the architecture is given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mia_utils.models.backbones import ARCHS, BUILT_IN, make_backbone
from mia_utils.models.checkpoints import ASSUMED, GIVEN, READ, Checkpoint, Facts, pick

# a key by which an encoder is found, and keys beside it that it must have
_ANCHORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("patch_embed.proj.weight", ()),
    ("embeddings.patch_embeddings.projection.weight", ()),  # transformers
    ("conv_proj.weight", ("class_token",)),  # torchvision ViT
    ("conv1.weight", ("layer1.0.conv1.weight",)),  # ResNet
    ("0.weight", ("4.0.conv1.weight",)),  # the same as nn.Sequential (lightly)
    ("class_embedding", ("transformer.resblocks.0.ln_1.weight",)),  # CLIP
)
# heads of the published widths: DeiT, ViT and MAE; 1408 and 1536 are the giants of ViT and DINOv2
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
_NAMED = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
_RESNETS = {
    (False, (1, 1, 1, 1)): "resnet10", (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101", (True, (3, 8, 36, 3)): "resnet152",
}  # fmt: skip


def find_encoders(tensors: Iterable[str], own: Sequence[str] = ()) -> list[str]:
    """Return the prefixes at which an encoder begins, sorted.

    Args:
        tensors: dotted names.
        own: keys of the architecture, where it was given.
    """
    keys = set(tensors)
    anchors = ((own[0], (own[-1],)), *_ANCHORS) if own else _ANCHORS
    found = set()
    for key in keys:
        for anchor, beside in anchors:
            if key == anchor or key.endswith("." + anchor):
                prefix = key[: len(key) - len(anchor)]
                if all(prefix + other in keys for other in beside) and not re.search(r"decoder|optimizer", prefix):
                    found.add(prefix)
    return sorted(found)


_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers": (
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"^embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attn.q."),
        (r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attn.k."),
        (r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attn.v."),
        (r"attention\.(?:output\.dense|o_proj|out_proj)\.", "attn.proj."),
        (r"attention\.(?:attention\.)?relative_position_bias\.", "attn."),
        (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
        (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
        (r"\.(?:output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"^layernorm\.", "norm."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"), (r"\.lambda_(\d)$", r".gamma_\1"),
    ),
    "torchvision": (
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."), (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"self_attention\.in_proj_", "attn.qkv."), (r"self_attention\.out_proj\.", "attn.proj."),
        (r"\.ln_(\d)\.", r".norm\1."), (r"mlp\.(?:0|linear_1)\.", "mlp.fc1."), (r"mlp\.(?:3|linear_2)\.", "mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
    ),
    "clip": (
        (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."), (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."), (r"\.ln_(\d)\.", r".norm\1."),
        (r"attn\.in_proj_", "attn.qkv."), (r"attn\.out_proj\.", "attn.proj."),
        (r"mlp\.c_fc\.", "mlp.fc1."), (r"mlp\.c_proj\.", "mlp.fc2."), (r"^proj$", "head.weight"),
    ),
    "sequential": (
        (r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^4\.", "layer1."), (r"^5\.", "layer2."), (r"^6\.", "layer3."),
        (r"^7\.", "layer4."),
    ),
    "timm": (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 keeps its blocks in chunks
        (r"mlp\.w12\.", "mlp.fc1."), (r"mlp\.w3\.", "mlp.fc2."),
    ),
}  # fmt: skip


def rename(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Give the weights of an encoder timm's names; returns them and the layout they came in."""
    if "embeddings.patch_embeddings.projection.weight" in state:
        layout = "transformers"
    elif "conv_proj.weight" in state:
        layout = "torchvision"
    elif "class_embedding" in state:
        layout = "clip"
    else:
        layout = "sequential" if "4.0.conv1.weight" in state else "timm"
    named = {}
    for key, value in state.items():
        for pattern, new in _RENAMES[layout]:
            key = re.sub(pattern, new, key)
        named[key] = value
    if layout == "clip":
        named["cls_token"], named["pos_embed"] = named["cls_token"].view(1, 1, -1), named["pos_embed"][None]
    for key in [key for key in named if key.endswith("attn.q.weight")]:
        stem = key.removesuffix("q.weight")
        named[f"{stem}qkv.weight"] = torch.cat([named.pop(f"{stem}{part}.weight") for part in "qkv"])
        biases = {part: named.pop(f"{stem}{part}.bias", None) for part in "qkv"}
        if biases["q"] is not None and biases["k"] is None:  # BEiT has no bias of keys
            named[f"{stem}q_bias"], named[f"{stem}v_bias"] = biases["q"], biases["v"]
        elif biases["q"] is not None:
            named[f"{stem}qkv.bias"] = torch.cat(list(biases.values()))
    if "register_tokens" in named:  # DINOv2 adds positions to the class token and the patches, never to registers
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return {k: v for k, v in named.items() if not k.endswith(("relative_position_index", "attn_mask"))}, layout


def tell_method(keys: Iterable[str], prefix: str) -> str | None:
    """Tell the training method from what stands beside the encoder; None where nothing says it."""
    keys = list(keys)
    if any(re.search(r"(^|\.)decoder(_blocks|_embed|\.decoder_layers)", key) for key in keys):
        return "mae"
    if "teacher" in prefix or "student" in prefix:
        return "dino"
    return "moco" if re.search(r"base_encoder|momentum_encoder|encoder_[qk]", prefix) else None


def guess_resnet(state: dict[str, Tensor], name: str, facts: Facts) -> str:
    """Name the ResNet whose blocks the weights have; ``_32`` at its end stands for a 3 x 3 stem without pooling."""
    counts = tuple(1 + max(_numbers(state, rf"layer{stage}\.(\d+)\."), default=-1) for stage in (1, 2, 3, 4))
    deep = "layer1.0.conv3.weight" in state
    arch, width = _RESNETS.get((deep, counts)), state["layer1.0.conv2.weight"].shape
    if arch and deep and width[1] != 64:  # (128, 128): twice as wide; (128, 4): 32 groups
        arch = {128: f"wide_{arch}_2", 4: f"{arch.replace('net', 'next')}_32x4d"}.get(width[1])
    if arch is None:
        raise ValueError(f"{name}: a ResNet of {counts} blocks is not known here: give arch=, a timm name")
    if state["conv1.weight"].shape[-1] == 3:
        facts.add("stem", "3 x 3, stride 1, no pooling (CIFAR's)", ASSUMED)
        arch = f"{arch}_32"
    return arch


def guess_vit(
    state: dict[str, Tensor], checkpoint: Checkpoint, *, prefix: str, layout: str, heads: int | None,
    size: Sequence[int] | None, facts: Facts,
) -> tuple[str, str, dict[str, Any]]:  # fmt: skip
    """Read the sizes of a plain ViT or BEiT from its weights.

    Args:
        state: weights under timm's names.
        checkpoint: where they come from: its config or training arguments may tell the heads.
        prefix, layout: where they stood, and whose layout they had.
        heads, size: number of heads and (height, width) where given.
        facts: what was read or assumed is noted here.

    Returns:
        a name for it, the timm name it is a variant of, and what differs. What no weight tells must be given.
    """
    if layout == "clip":
        raise ValueError(
            f"{checkpoint.name} is a CLIP tower, whose activation no weight tells: give arch=, for example "
            "'vit_base_patch32_clip_224' (open_clip) or 'vit_base_patch32_clip_quickgelu_224' (OpenAI)"
        )
    config, weight = checkpoint.config, state["patch_embed.proj.weight"]
    depth = 1 + max(_numbers(state, r"blocks\.(\d+)\."), default=-1)
    if weight.ndim != 4 or depth < 1 or weight.shape[1] != 3:
        raise ValueError(
            f"{checkpoint.name}: can't tell the architecture (patch weights {tuple(weight.shape)}, {depth} blocks): "
            "give arch=, a timm name"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{checkpoint.name}: activation {config['hidden_act']!r} is not read here: use encoders.wrap")
    (dim, _, *patch), hidden = weight.shape, state["blocks.0.mlp.fc1.weight"].shape[0]
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    is_beit = bool(tables) or "blocks.0.gamma_1" in state
    swiglu = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden
    height, width = _tell_size(state, checkpoint, patch, size, tables)
    heads = _tell_heads(state, checkpoint, dim, prefix=prefix, given=heads, tables=tables, facts=facts)
    settings = dict(img_size=(height, width), patch_size=tuple(patch), embed_dim=dim, depth=depth, num_heads=heads)
    settings["mlp_ratio"] = (hidden + 0.5) / dim  # timm rounds the product down
    if "layer_norm_eps" in config:
        settings["eps"] = float(config["layer_norm_eps"])
    n_positions, n_patches = state["pos_embed"].shape[1] if "pos_embed" in state else 0, height * width
    n_patches //= patch[0] * patch[1]
    if is_beit:
        base = "beit_base_patch16_224"
        settings |= dict(
            init_values=1e-5 if "blocks.0.gamma_1" in state else None, use_abs_pos_emb=n_positions > 0,
            use_rel_pos_bias="blocks.0.attn.relative_position_bias_table" in state,
            use_shared_rel_pos_bias="rel_pos_bias.relative_position_bias_table" in state,
            use_fc_norm="norm.weight" not in state, qkv_bias="blocks.0.attn.q_bias" in state,
        )  # fmt: skip
    else:
        base = "vit_tiny_patch16_224"
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        extra = dict(
            init_values=1e-5 if "blocks.0.ls1.gamma" in state else None, class_token="cls_token" in state,
            reg_tokens=registers, no_embed_class=n_positions == n_patches, pre_norm="norm_pre.weight" in state,
            qk_norm="blocks.0.attn.q_norm.weight" in state, qkv_bias="blocks.0.attn.qkv.bias" in state,
            final_norm="norm.weight" in state, swiglu=swiglu,
        )  # fmt: skip
        usual = dict(init_values=None, class_token=True, reg_tokens=0, no_embed_class=False, pre_norm=False)
        usual |= dict(qk_norm=False, qkv_bias=True, final_norm=True, swiglu=False)
        settings |= {key: value for key, value in extra.items() if value != usual[key]}
    side = f"{height}" if height == width else f"{height}x{width}"
    kind = "beit" if is_beit else "vit"
    arch = f"{kind}_{dim}x{depth}_heads{heads}_patch{patch[0]}_{side}"
    extras = [key for key in ("reg_tokens", "qk_norm", "pre_norm", "swiglu") if key in settings]
    return "_".join([arch, *extras]), base, settings


def _numbers(state: Iterable[str], pattern: str) -> list[int]:
    return [int(found.group(1)) for key in state if (found := re.match(pattern, key))]


def _tell_size(
    state: dict[str, Tensor], checkpoint: Checkpoint, patch: Sequence[int], size: Sequence[int] | None,
    tables: list[str],
) -> tuple[int, int]:  # fmt: skip
    """Height and width in pixels from the positions: those of a square, or as given."""
    if size is None and "image_size" in checkpoint.config:
        side = checkpoint.config["image_size"]
        size = side if isinstance(side, (list, tuple)) else (side, side)
    if "pos_embed" in state:
        n = state["pos_embed"].shape[1]
        n_before = int("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)
        counts = [n - k for k in dict.fromkeys((n_before, int("cls_token" in state), 0)) if n > k]
    elif tables:  # (2 h - 1)(2 w - 1) offsets, and three of the class token
        offsets = math.isqrt(state[tables[0]].shape[0] - 3)
        counts = [((offsets + 1) // 2) ** 2]
    else:
        raise ValueError(f"{checkpoint.name} holds no positions: give arch=, a timm name")
    if size is not None:
        height, width = int(size[0]), int(size[1])
        if (height // patch[0]) * (width // patch[1]) not in counts:
            raise ValueError(f"{checkpoint.name}: {height} x {width} px give no {counts[0]} patches of {tuple(patch)}")
        return height, width
    for count in counts:
        if (side := math.isqrt(count)) ** 2 == count:
            return side * patch[0], side * patch[1]
    raise ValueError(f"{checkpoint.name} has {counts[0]} patches of {tuple(patch)} px, no square: give size=(H, W)")


def _tell_heads(
    state: dict[str, Tensor], checkpoint: Checkpoint, dim: int, *, prefix: str, given: int | None, tables: list[str],
    facts: Facts,
) -> int:  # fmt: skip
    """Number of attention heads: given, read where something tells it, else that of the published width, flagged."""
    named = [v for k, v in checkpoint.settings.items() if re.search(r"(^|\.)(arch|model)$", k) and isinstance(v, str)]
    moco_v3 = re.search(r"base_encoder|momentum_encoder", prefix)
    if given is not None:
        heads, source = int(given), GIVEN
    elif "num_attention_heads" in checkpoint.config:
        heads, source = int(checkpoint.config["num_attention_heads"]), READ
    elif tables:
        heads, source = state[tables[0]].shape[1], READ
    elif "blocks.0.attn.q_norm.weight" in state:
        heads, source = dim // state["blocks.0.attn.q_norm.weight"].shape[0], READ
    elif moco_v3 and dim == 384:  # Chen et al. 2021 (arXiv 2104.02057): 12 heads of 32, where DeiT's ViT-S has 6
        heads, source = 12, ASSUMED
    elif not moco_v3 and any(_NAMED.get(word) == dim for name in named for word in re.split(r"[_\W]", name)):
        heads, source = _HEADS[dim], READ
    elif dim in _HEADS:
        heads, source = _HEADS[dim], ASSUMED
    else:
        raise ValueError(
            f"{checkpoint.name}: the number of heads of a ViT of width {dim} is in no weight: give it, as in "
            "arch_args={'num_heads': 4}"
        )
    if heads < 1 or dim % heads:
        raise ValueError(f"{checkpoint.name}: {heads} heads don't divide the width {dim}")
    facts.add("heads", heads, source)
    return heads


_BUILT_KEYS = {
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "eps", "init_values", "class_token",
    "reg_tokens", "no_embed_class", "pre_norm", "qk_norm", "qkv_bias", "final_norm", "swiglu", "use_abs_pos_emb",
    "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_fc_norm",
}  # fmt: skip


def register(arch: str, built: str) -> None:
    """Make a variant that ``encoders.save`` described known again: plain values of the settings above only."""
    try:
        base, settings = json.loads(built)
        plain = all(isinstance(v, (int, float, list, type(None))) for v in settings.values())
    except (ValueError, TypeError, AttributeError):
        base, settings, plain = None, {}, False
    if not plain or not isinstance(base, str) or not set(settings) <= _BUILT_KEYS or arch in BUILT_IN:
        raise ValueError(f"the header describes {arch!r} in a way that save() does not: refused")
    ARCHS[arch] = (base, {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def build(
    checkpoint: Checkpoint, arch: str | None, changes: dict[str, Any], weights: str, size: Sequence[int] | None,
    facts: Facts,
) -> tuple[nn.Module, str, dict[str, Tensor], str | None]:  # fmt: skip
    """Build the backbone of a checkpoint, of the given architecture or of the one that its weights tell.

    Returns the module, its architecture, the encoder's weights under its names, and the training method if told.
    """
    if size is not None and arch is not None and hasattr(make_backbone(arch, **changes), "pos_embed"):
        changes = changes | {"img_size": tuple(size)}
    module = make_backbone(arch, **changes) if arch is not None else None
    prefixes = find_encoders(checkpoint.tensors, list(module.state_dict()) if module else ())
    if not prefixes:
        first = next(iter(checkpoint.tensors), "none")
        way = f"its weights are not those of {arch}" if arch else "give arch=, a timm name, or use encoders.wrap"
        raise ValueError(f"{checkpoint.name}: can't tell the architecture (first weight {first}): {way}")
    prefix, state = pick(checkpoint, prefixes, weights, facts)
    state, layout = rename(state)
    if module is None and "layer1.0.conv1.weight" in state:
        arch = guess_resnet(state, checkpoint.name, facts)
        ARCHS.setdefault(arch, (arch.removesuffix("_32"), {}))
        module = make_backbone(arch, **changes)
    elif module is None:
        heads = changes.pop("num_heads", None)
        arch, *variant = guess_vit(state, checkpoint, prefix=prefix, layout=layout, heads=heads, size=size, facts=facts)
        ARCHS[arch] = tuple(variant)
        module = make_backbone(arch, **changes)
    return module, arch, state, tell_method(checkpoint.tensors, prefix)


def fill(module: nn.Module, state: dict[str, Tensor], name: str, arch: str, facts: Facts | None = None) -> None:
    """Load weights that must fit; with ``facts``, heads and decoders beside an encoder are dropped and named there."""
    own = module.state_dict()
    parts = {key.split(".")[0] for key in own} | {"norm", "reg_token", "dist_token", "rel_pos_bias", "stages", "layers"}
    foreign = [k for k in state if k not in own and (k.split(".")[0] not in parts or re.match(r"(head|fc)\b", k))]
    dropped = [] if facts is None else foreign
    state = {key: value for key, value in state.items() if key not in dropped}
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        want, got = (tuple(d[wrong[0]].shape) if wrong[0] in d else "nothing" for d in (own, state))
        raise ValueError(
            f"{name} does not fit {arch}: {len(wrong)} of {len(own)} weights differ, first {wrong[0]}: "
            f"expected {want}, got {got}"
        )
    if dropped:
        names = sorted({key.split(".")[0] for key in dropped})
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        facts.add("dropped", f"{len(dropped)} weights beside the encoder: {', '.join(names[:6])}{more}", READ)
    module.load_state_dict(state)
