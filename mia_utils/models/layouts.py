"""What the keys of a checkpoint mean: other libraries' names under timm's, and the backbone that weights fit.

Known: timm, DINO, DINOv2 (chunks, LayerScale, registers), MoCo, I-JEPA, iBOT, lightly, torchvision ResNet and ViT,
transformers ViT, ViTMAE, DeiT, DINOv2 and BEiT in both of their layouts, CLIP towers where the architecture is given.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mia_utils.models.backbones import ARCHS, BUILT_IN, make_backbone
from mia_utils.models.checkpoints import ASSUMED, GIVEN, READ, Checkpoint, Facts, pick

Shape = Sequence[int]
# layout -> the key by which an encoder is found and what stands beside it; patterns of its keys and timm's names
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "transformers": (("embeddings.patch_embeddings.projection.weight",), {
        r"^(?:encoder\.)?layers?\.(\d+)\.": r"blocks.\1.",
        r"^embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
        r"^embeddings\.position_embeddings": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.": r"attn.\1.",
        r"attention\.(?:output\.dense|o_proj|out_proj)\.": "attn.proj.",
        r"attention\.(?:attention\.)?relative_position_bias\.": "attn.",
        r"^encoder\.relative_position_bias\.": "rel_pos_bias.",
        r"\.(?:intermediate\.dense|mlp\.weights_in)\.": ".mlp.fc1.",
        r"\.(?:output\.dense|mlp\.weights_out)\.": ".mlp.fc2.",
        r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.", r"^layernorm\.": "norm.",
        r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma", r"\.lambda_(\d)$": r".gamma_\1",
    }),
    "torchvision": (("conv_proj.weight", "class_token"), {
        r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.", r"^class_token$": "cls_token",
        r"^conv_proj\.": "patch_embed.proj.", r"^encoder\.pos_embedding$": "pos_embed", r"^encoder\.ln\.": "norm.",
        r"self_attention\.in_proj_": "attn.qkv.", r"self_attention\.out_proj\.": "attn.proj.",
        r"\.ln_(\d)\.": r".norm\1.", r"mlp\.(?:0|linear_1)\.": "mlp.fc1.", r"mlp\.(?:3|linear_2)\.": "mlp.fc2.",
    }),
    "clip": (("class_embedding", "transformer.resblocks.0.ln_1.weight"), {
        r"^class_embedding$": "cls_token", r"^positional_embedding$": "pos_embed", r"^conv1\.": "patch_embed.proj.",
        r"^ln_pre\.": "norm_pre.", r"^ln_post\.": "norm.", r"^transformer\.resblocks\.": "blocks.",
        r"\.ln_(\d)\.": r".norm\1.", r"attn\.in_proj_": "attn.qkv.", r"attn\.out_proj\.": "attn.proj.",
        r"mlp\.c_fc\.": "mlp.fc1.", r"mlp\.c_proj\.": "mlp.fc2.", r"^proj$": "head.weight",
    }),
    "sequential": (("0.weight", "4.0.conv1.weight"), {  # a ResNet of lightly
        r"^0\.": "conv1.", r"^1\.": "bn1.", **{rf"^{i}\.": f"layer{i - 3}." for i in range(4, 8)},
    }),
    "resnet": (("conv1.weight", "layer1.0.conv1.weight"), {}),
    "timm": (("patch_embed.proj.weight",), {  # DINOv2 keeps its blocks in chunks
        r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.", r"mlp\.w12\.": "mlp.fc1.", r"mlp\.w3\.": "mlp.fc2.",
    }),
}  # fmt: skip
# the decoder of an MAE (facebook's, transformers'), under the names of ``pretrain.mae.MAE.decoder``
_DECODER = {
    r"^decoder_embed\.": "embed.", "^mask_token$": "blocks.mask_token", "^decoder_pos_embed$": "blocks.pos_embed",
    r"^decoder_(?:blocks|layers)\.": "blocks.blocks.", r"^decoder_norm\.": "blocks.norm.",
    r"^decoder_pred\.": "predict.",
}  # fmt: skip
# heads of the published widths: DeiT, ViT and MAE; 1408 and 1536 are the giants of ViT and DINOv2
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}
_NAMED = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
_RESNETS = {
    (False, (1, 1, 1, 1)): "resnet10", (False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50", (True, (3, 4, 23, 3)): "resnet101", (True, (3, 8, 36, 3)): "resnet152",
}  # fmt: skip


def find_encoders(tensors: Iterable[str], own: Sequence[str] = ()) -> list[str]:
    """Return the prefixes at which an encoder begins, sorted; ``own``: keys of the architecture, where given."""
    keys, found = set(tensors), set()
    anchors = [keys_ for keys_, _ in LAYOUTS.values()] + ([(own[0], own[-1])] if own else [])
    for key in keys:
        for anchor, *beside in anchors:
            prefix = key.removesuffix(anchor)
            fits = key.endswith(anchor) and prefix[-1:] in ("", ".") and keys.issuperset(prefix + k for k in beside)
            if fits and not re.search(r"decoder|optimizer", prefix):
                found.add(prefix)
    return sorted(found)


def rename(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Give the weights of an encoder timm's names; returns them and the layout they came in."""
    layout = next((name for name, (keys, _) in LAYOUTS.items() if state.keys() >= set(keys)), "timm")
    named = _translate(state, LAYOUTS[layout][1])
    if layout == "clip":
        named["cls_token"], named["pos_embed"] = named["cls_token"].view(1, 1, -1), named["pos_embed"][None]
    if "register_tokens" in named:  # DINOv2 adds positions to the class token and the patches, never to registers
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return {k: v for k, v in named.items() if not k.endswith(("relative_position_index", "attn_mask"))}, layout


def _translate(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Rename keys by patterns; queries, keys and values become one weight."""
    named = {}
    for key, value in state.items():
        for pattern, new in names.items():
            key = re.sub(pattern, new, key)
        named[key] = value
    for stem in [key.removesuffix("q.weight") for key in named if key.endswith("attn.q.weight")]:
        named[f"{stem}qkv.weight"] = torch.cat([named.pop(f"{stem}{part}.weight") for part in "qkv"])
        q, k, v = (named.pop(f"{stem}{part}.bias", None) for part in "qkv")
        if k is not None:
            named[f"{stem}qkv.bias"] = torch.cat([q, k, v])
        elif q is not None:  # BEiT has no bias of keys
            named[f"{stem}q_bias"], named[f"{stem}v_bias"] = q, v
    return named


def take_decoder(checkpoint: Checkpoint, prefix: str, facts: Facts) -> dict[str, Any] | None:
    """The decoder that an MAE keeps beside its encoder, for ``pretrain.mae.open_decoder``; None where there is none."""
    key = re.compile(re.escape(re.sub(r"vit\.$", "", prefix)) + r"(?:decoder\.)?(decoder_.+|mask_token)$")
    found = {match[1]: value.float() for name, value in checkpoint.tensors.items() if (match := key.match(name))}
    state = _translate(found, LAYOUTS["transformers"][1] | _DECODER)
    if not {"embed.weight", "blocks.pos_embed", "predict.weight"} <= set(state):
        return None
    told = {name.rpartition(".")[2]: value for name, value in (checkpoint.settings | checkpoint.config).items()}
    heads, standardized = told.get("decoder_num_attention_heads"), told.get("norm_pix_loss")
    facts.add("decoder heads", heads or 16, READ if heads else ASSUMED)  # the paper's, of every released model
    what = "pixels as they are" if standardized is False else "standardized patches"
    facts.add("decoder predicts", what, ASSUMED if standardized is None else READ)
    return {"state": state, "heads": int(heads or 16), "norm_pix_loss": standardized is not False}


def tell_method(keys: Iterable[str], prefix: str) -> str | None:
    """Tell the training method from what stands beside the encoder; None where nothing says it."""
    if any(re.search(r"(^|\.)decoder(_blocks|_embed|\.decoder_layers)", key) for key in keys):
        return "mae"
    signs = {"dino": r"teacher|student", "moco": r"base_encoder|momentum_encoder|encoder_[qk]"}
    return next((method for method, sign in signs.items() if re.search(sign, prefix)), None)


def guess_resnet(state: dict[str, Tensor], name: str, facts: Facts) -> str:
    """Name the ResNet whose blocks the weights have; ``_32`` at its end stands for a 3 x 3 stem without pooling."""
    counts = tuple(_count(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    deep = "layer1.0.conv3.weight" in state
    arch, width = _RESNETS.get((deep, counts)), state["layer1.0.conv2.weight"].shape[1]
    if arch and deep and width != 64:  # 128 inputs: twice as wide; 4: 32 groups
        arch = {128: f"wide_{arch}_2", 4: f"{arch.replace('net', 'next')}_32x4d"}.get(width)
    if arch is None:
        raise ValueError(f"{name}: a ResNet of {counts} blocks is not known here: give arch=, a timm name")
    if state["conv1.weight"].shape[-1] == 3:
        facts.add("stem", "3 x 3, stride 1, no pooling (CIFAR's)", ASSUMED)
        arch = f"{arch}_32"
    return arch


def guess_vit(
    state: dict[str, Tensor], checkpoint: Checkpoint, *, prefix: str, layout: str, heads: int | None,
    size: Shape | None, facts: Facts,
) -> tuple[str, str, dict[str, Any]]:  # fmt: skip
    """Read the sizes of a plain ViT or BEiT from weights under timm's names; what no weight tells must be given.

    Returns a name for it, the timm name it is a variant of, and what differs.
    """
    name, config, weight = checkpoint.name, checkpoint.config, state["patch_embed.proj.weight"]
    depth = _count(state, r"blocks\.(\d+)\.")
    if layout == "clip":
        raise ValueError(
            f"{name} is a CLIP tower, whose activation no weight tells: give arch=, for example "
            "'vit_base_patch32_clip_224' (open_clip) or 'vit_base_patch32_clip_quickgelu_224' (OpenAI)"
        )
    if weight.ndim != 4 or depth < 1 or weight.shape[1] != 3:
        what = f"(patch weights {tuple(weight.shape)}, {depth} blocks)"
        raise ValueError(f"{name}: can't tell the architecture {what}: give arch=, a timm name")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{name}: activation {config['hidden_act']!r} is not read here: use encoders.wrap")
    (dim, _, *patch), hidden = weight.shape, state["blocks.0.mlp.fc1.weight"].shape[0]
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    height, width = _tell_size(state, checkpoint, patch, size, tables)
    heads = _tell_heads(state, checkpoint, dim, prefix=prefix, given=heads, tables=tables, facts=facts)
    n_positions = _length(state, "pos_embed")
    is_beit = bool(tables) or "blocks.0.gamma_1" in state

    def has(key: str) -> bool:
        return f"blocks.0.{key}" in state

    settings = dict(
        img_size=(height, width), patch_size=tuple(patch), embed_dim=dim, depth=depth, num_heads=heads,
        mlp_ratio=(hidden + 0.5) / dim,  # timm rounds the product down
        init_values=1e-5 if has("gamma_1") or has("ls1.gamma") else None,
    )  # fmt: skip
    if "layer_norm_eps" in config:
        settings["eps"] = float(config["layer_norm_eps"])
    if is_beit:
        settings |= dict(
            use_abs_pos_emb=n_positions > 0, use_rel_pos_bias=has("attn.relative_position_bias_table"),
            use_shared_rel_pos_bias="rel_pos_bias.relative_position_bias_table" in state,
            use_fc_norm="norm.weight" not in state, qkv_bias=has("attn.q_bias"),
        )  # fmt: skip
    else:
        settings |= dict(
            class_token="cls_token" in state, reg_tokens=_length(state, "reg_token"), qkv_bias=has("attn.qkv.bias"),
            no_embed_class=n_positions == height * width // (patch[0] * patch[1]), qk_norm=has("attn.q_norm.weight"),
            pre_norm="norm_pre.weight" in state, final_norm="norm.weight" in state,
            swiglu=state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden,
        )  # fmt: skip
    side = f"{height}" if height == width else f"{height}x{width}"
    extras = [key for key in ("reg_tokens", "qk_norm", "pre_norm", "swiglu") if settings.get(key)]
    arch = f"{'beit' if is_beit else 'vit'}_{dim}x{depth}_heads{heads}_patch{patch[0]}_{side}"
    base = "beit_base_patch16_224" if is_beit else "vit_tiny_patch16_224"
    return "_".join([arch, *extras]), base, settings


def _count(state: Iterable[str], pattern: str) -> int:
    """Number of blocks, from the largest that the keys name."""
    return 1 + max((int(found[1]) for key in state if (found := re.match(pattern, key))), default=-1)


def _length(state: dict[str, Tensor], key: str) -> int:
    return state[key].shape[1] if key in state else 0


def _tell_size(
    state: dict[str, Tensor], checkpoint: Checkpoint, patch: Shape, size: Shape | None, tables: list[Tensor]
) -> tuple[int, int]:
    """Height and width in pixels from the positions: those of a square, or as given."""
    name, size = checkpoint.name, size or checkpoint.config.get("image_size")
    if "pos_embed" in state:
        n = _length(state, "pos_embed")
        counts = [n - int("cls_token" in state) - _length(state, "reg_token"), n]
    elif tables:  # (2 h - 1)(2 w - 1) offsets, and three of the class token
        counts = [((math.isqrt(len(tables[0]) - 3) + 1) // 2) ** 2]
    else:
        raise ValueError(f"{name} holds no positions: give arch=, a timm name")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else map(int, size)
        if (height // patch[0]) * (width // patch[1]) not in counts:
            raise ValueError(f"{name}: {height} x {width} px give no {counts[0]} patches of {tuple(patch)}")
        return height, width
    for side in [math.isqrt(count) for count in counts if count > 0]:
        if side**2 in counts:
            return side * patch[0], side * patch[1]
    raise ValueError(f"{name} has {counts[0]} patches of {tuple(patch)} px, no square: give size=(H, W)")


def _tell_heads(
    state: dict[str, Tensor], checkpoint: Checkpoint, dim: int, *, prefix: str, given: int | None,
    tables: list[Tensor], facts: Facts,
) -> int:  # fmt: skip
    """Number of attention heads: given, read where something tells it, else that of the published width, flagged."""
    names = [v for k, v in checkpoint.settings.items() if re.search(r"(^|\.)(arch|model)$", k) and isinstance(v, str)]
    is_named = any(_NAMED.get(word) == dim for name in names for word in re.split(r"[_\W]", name))
    q_norm, moco_v3 = state.get("blocks.0.attn.q_norm.weight"), re.search(r"base_encoder|momentum_encoder", prefix)
    told = [
        (given, GIVEN), (checkpoint.config.get("num_attention_heads"), READ),
        (tables[0].shape[1] if tables else None, READ), (None if q_norm is None else dim // len(q_norm), READ),
        # Chen et al. 2021 (arXiv 2104.02057): 12 heads of 32, where DeiT's ViT-S has 6
        (12 if moco_v3 and dim == 384 else None, ASSUMED),
        (_HEADS.get(dim), READ if is_named and not moco_v3 else ASSUMED),
    ]  # fmt: skip
    heads, source = next(((int(value), source) for value, source in told if value is not None), (None, ""))
    if heads is None:
        what = f"the number of heads of a ViT of width {dim} is in no weight"
        raise ValueError(f"{checkpoint.name}: {what}: give it, --arch-args num_heads=4 or arch_args={{'num_heads': 4}}")
    if heads < 1 or dim % heads:
        raise ValueError(f"{checkpoint.name}: {heads} heads don't divide the width {dim}")
    facts.add("heads", heads, source)
    return heads


_BUILT_KEYS = set(
    "img_size patch_size embed_dim depth num_heads mlp_ratio eps init_values class_token reg_tokens no_embed_class "
    "pre_norm qk_norm qkv_bias final_norm swiglu use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias "
    "use_fc_norm".split()
)


def register(arch: str, built: str) -> None:
    """Make a variant known again as ``encoders.save`` described it: plain values of the settings above only."""
    try:
        base, settings = json.loads(built)
        plain = all(isinstance(v, (int, float, list, type(None))) for v in settings.values())
    except (ValueError, TypeError, AttributeError):
        base, settings, plain = None, {}, False
    if not plain or not isinstance(base, str) or not set(settings) <= _BUILT_KEYS or arch in BUILT_IN:
        raise ValueError(f"the header describes {arch!r} in a way that save() does not: refused")
    ARCHS[arch] = (base, {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def build(
    checkpoint: Checkpoint, arch: str | None, changes: dict[str, Any], weights: str, size: Shape | None, facts: Facts
) -> tuple[nn.Module, str, dict[str, Tensor], str | None, dict[str, Any] | None]:
    """Build the backbone of a checkpoint: module, its architecture, its weights, the method if told, its decoder."""
    module = make_backbone(arch, **changes) if arch is not None else None
    if size is not None and hasattr(module, "pos_embed"):
        module = make_backbone(arch, **changes, img_size=tuple(size))
    prefixes = find_encoders(checkpoint.tensors, list(module.state_dict()) if module else ())
    if not prefixes:
        first = next(iter(checkpoint.tensors), "none")
        way = f"its weights are not those of {arch}" if arch else "give arch=, a timm name, or use encoders.wrap"
        raise ValueError(f"{checkpoint.name}: can't tell the architecture (first weight {first}): {way}")
    prefix, state = pick(checkpoint, prefixes, weights, facts)
    state, layout = rename(state)
    if arch is None and "layer1.0.conv1.weight" in state:
        arch = guess_resnet(state, checkpoint.name, facts)
        ARCHS.setdefault(arch, (arch.removesuffix("_32"), {}))
    elif arch is None:
        known = dict(prefix=prefix, layout=layout, heads=changes.pop("num_heads", None), size=size)
        arch, *variant = guess_vit(state, checkpoint, facts=facts, **known)
        ARCHS[arch] = tuple(variant)
    module = make_backbone(arch, **changes) if module is None else module
    if decoder := take_decoder(checkpoint, prefix, facts):
        state = {key: value for key, value in state.items() if not re.match("decoder_|mask_token", key)}
    return module, arch, state, tell_method(checkpoint.tensors, prefix), decoder


def fill(module: nn.Module, state: dict[str, Tensor], name: str, arch: str, facts: Facts | None = None) -> None:
    """Load weights that must fit; with ``facts``, heads and decoders beside an encoder are dropped and named there."""
    own = module.state_dict()
    parts = {key.split(".")[0] for key in own} | {"norm", "reg_token", "dist_token", "rel_pos_bias", "stages", "layers"}
    foreign = [k for k in state if k not in own and (k.split(".")[0] not in parts or re.match(r"(head|fc)\b", k))]
    if facts is not None and foreign:
        names = sorted({key.split(".")[0] for key in foreign})
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        facts.add("dropped", f"{len(foreign)} weights beside the encoder: {', '.join(names[:6])}{more}", READ)
        state = {key: value for key, value in state.items() if key not in set(foreign)}
    wrong = [k for k in [*own, *state] if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        want, got = (tuple(d[wrong[0]].shape) if wrong[0] in d else "nothing" for d in (own, state))
        first = f"first {wrong[0]}: expected {want}, got {got}"
        raise ValueError(f"{name} does not fit {arch}: {len(set(wrong))} of {len(own)} weights differ, {first}")
    module.load_state_dict(state)
