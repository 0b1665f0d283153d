"""The checkpoint doctor: every layout opens to the model's own outputs, or stops with the one line that helps."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer, resnet18, resnet50

from mia_utils.attacks import mim
from mia_utils.models import checkpoints, encoders
from mia_utils.pretrain import mae

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NORMALIZED = (IMAGES - torch.tensor(encoders.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(encoders.IMAGENET_STD).view(
    3, 1, 1
)


def make_vit(seed=0, **settings):
    """A small ViT with no weight at its usual start (LayerScale and norms too), so that each one counts."""
    defaults = dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_classes=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        module = timm.create_model("vit_tiny_patch16_224", **defaults | settings).eval()
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return module


def put(prefix, state):
    return {prefix + key: value for key, value in state.items()}


VIT = make_vit()
STATE, OTHER = VIT.state_dict(), make_vit(seed=1).state_dict()
HEAD = {"head.0.weight": torch.zeros(8, 192), "head.0.bias": torch.zeros(8)}
with torch.no_grad():
    TOKENS = VIT.forward_features(NORMALIZED)


def chunk(state):
    return {k.replace("blocks.", "blocks.0.", 1) if k.startswith("blocks.") else k: v for k, v in state.items()}


FILES = {  # content of a .pth, and a word of what the facts say of the weights
    "plain": (STATE, "file itself"),
    "nested": ({"model_state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: {"avg": torch.zeros(2)}}}}, "model_"),
    "head beside it": ({"net": {**STATE, **HEAD}}, "net"),
    "wrapped and compiled": ({"state_dict": put("module._orig_mod.", STATE)}, "_orig_mod"),
    "lightning": ({"state_dict": put("model.backbone.", STATE), "hyper_parameters": {"lr": 0.1}}, "model.backbone"),
    "lightly masked": ({"state_dict": put("backbone.vit.", STATE)}, "backbone.vit"),
    "lightly dino": (put("student_backbone.", OTHER) | put("teacher_backbone.", STATE), "teacher"),
    "lightly moco": (put("backbone.", STATE) | put("backbone_momentum.", OTHER), "encoder at backbone"),
    "byol": (put("online_encoder.", STATE) | put("target_encoder.", OTHER), "online"),
    "dino": (
        {"student": put("module.backbone.", OTHER), "teacher": put("backbone.", STATE) | HEAD,
         "args": argparse.Namespace(arch="vit_tiny")}, "teacher",
    ),
    "dinov2": ({"model": put("teacher.backbone.", chunk(STATE)) | put("student.backbone.", chunk(OTHER))}, "teacher"),
    "mocov3": (put("module.base_encoder.", STATE) | put("module.momentum_encoder.", OTHER), "base_encoder"),
    "ibot": ({"teacher": put("backbone.", {**STATE, "masked_embed": torch.zeros(1, 192)})}, "teacher"),
    "ijepa": ({"encoder": put("module.", OTHER), "target_encoder": put("module.", STATE)}, "target_encoder"),
    "ema": ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_every_prefix_and_nesting_opens_to_the_models_own_tokens(tmp_path, kind):
    content, where = FILES[kind]
    torch.save(content, tmp_path / "weights.pth")
    encoder = encoders.open(tmp_path / "weights.pth")
    with torch.inference_mode():
        assert torch.equal(encoder.tokens(IMAGES), TOKENS[:, 1:])
        assert torch.equal(encoder.embed(IMAGES, pooling="cls"), TOKENS[:, 0])
    assert where in encoder.facts["weights"][0]
    assert encoder.facts["normalization"][1] == "assumed" and "heads" in encoder.facts
    assert encoder.facts["heads"] == ("3", "read" if kind == "dino" else "assumed")


def test_the_same_weights_are_normalized_alike_in_every_kind_of_file(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    save_file(STATE, tmp_path / "b.safetensors", metadata={"format": "pt"})
    save_file(put("encoder.", STATE), tmp_path / "c.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(STATE)}
    for file in set(names.values()):
        save_file({key: STATE[key] for key in names if names[key] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name in ("a.pth", "b.safetensors", "c.safetensors", "shards", "shards/model.safetensors.index.json"):
        with torch.inference_mode():
            assert torch.equal(encoders.open(tmp_path / name).tokens(IMAGES), TOKENS[:, 1:]), name
    half = {key: value.half() for key, value in STATE.items()}
    torch.save(half, tmp_path / "half.pth")
    encoder = encoders.open(tmp_path / "half.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert "float16" in encoder.facts["precision"][0] and encoder.facts["normalization"][1] == "given"


def test_weights_names_the_encoder_to_take(tmp_path):
    torch.save(FILES["dino"][0] | {"state_dict_ema": STATE}, tmp_path / "dino.pth")
    with torch.inference_mode():
        for weights, state in [("student", OTHER), ("student.module", OTHER), ("teacher", STATE), ("ema", STATE)]:
            encoder = encoders.open(tmp_path / "dino.pth", weights=weights)
            assert torch.equal(encoder.module.norm.weight, state["norm.weight"]), weights
            assert encoder.facts["weights"][1] == "given"
    with pytest.raises(ValueError, match="holds no weights 'swa': expected auto, or one of .*teacher.backbone"):
        encoders.open(tmp_path / "dino.pth", weights="swa")
    torch.save(put("image.", STATE) | put("depth.", OTHER), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two.pth holds 2 encoders \(depth, image\): give weights="):
        encoders.open(tmp_path / "two.pth")


@pytest.mark.parametrize(
    "settings",
    [
        dict(init_values=1e-5, patch_size=14, img_size=28), dict(reg_tokens=4, no_embed_class=True),
        dict(qkv_bias=False), dict(class_token=False), dict(pre_norm=True), dict(qk_norm=True), dict(mlp_ratio=2.5),
        dict(img_size=(32, 64)),
        dict(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=2.66667 * 2),
    ],
)  # fmt: skip
def test_variants_of_a_vit_are_read_from_their_weights(tmp_path, settings):
    module = make_vit(global_pool="", **settings)
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    size = settings.get("img_size", 32)
    if isinstance(size, tuple):
        with pytest.raises(ValueError, match=r"32 patches of \(8, 8\) px, no square: give size=\(H, W\)"):
            encoders.open(tmp_path / "vit.pth")
    encoder = encoders.open(tmp_path / "vit.pth", size=size if isinstance(size, tuple) else None)
    images = torch.rand(2, 3, *encoder.shape)
    with torch.inference_mode():
        out = module.forward_features(encoder._prepare(images))
        torch.testing.assert_close(encoder.tokens(images), out[:, module.num_prefix_tokens :], rtol=0, atol=1e-6)
        again = encoders.open(encoders.save(encoder, tmp_path / "own.safetensors"))
        assert torch.equal(again.tokens(images), encoder.tokens(images)) and again.pooling == encoder.pooling
        assert encoder.embed(torch.rand(1, 3, 56, 56)).shape == (1, 192)  # the attacks' views are square
    twin = encoders.make_untrained(encoder)
    assert twin.n_tokens == encoder.n_tokens and not torch.equal(twin.module.norm.weight, encoder.module.norm.weight)
    assert torch.equal(twin._mean, encoder._mean)


@pytest.mark.parametrize(
    ("dim", "prefix", "given", "heads"),
    [(384, "", None, 6), (384, "module.base_encoder.", None, 12), (128, "", 4, 4), (384, "", 12, 12)],
)
def test_the_number_of_heads_is_never_a_silent_guess(tmp_path, dim, prefix, given, heads):
    module = make_vit(embed_dim=dim, num_heads=heads)
    torch.save(put(prefix, module.state_dict()), tmp_path / "vit.pth")
    if dim == 128:
        with pytest.raises(ValueError, match="number of heads .* width 128 is in no weight: give it"):
            encoders.open(tmp_path / "vit.pth")
    encoder = encoders.open(tmp_path / "vit.pth", arch_args={"num_heads": given} if given else None)
    assert encoder.facts["heads"] == (str(heads), "given" if given else "assumed")
    assert any(line.startswith("heads") for line in encoder.facts.assumed) == (given is None)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.tokens(IMAGES), module.forward_features(NORMALIZED)[:, 1:], rtol=0, atol=0)
    with pytest.raises(ValueError, match="5 heads don't divide"):
        encoders.open(tmp_path / "vit.pth", arch_args={"num_heads": 5})


def test_facebooks_registers_and_swiglu_names_are_those_of_timm(tmp_path):
    module = make_vit(
        global_pool="", reg_tokens=4, no_embed_class=True, init_values=1.0, act_layer=nn.SiLU,
        mlp_layer=timm.layers.SwiGLUPacked,
    )  # fmt: skip
    state = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in module.state_dict().items()}
    position = torch.randn(1, 1, 192)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"], state["cls_token"] = torch.cat([position, state["pos_embed"]], 1), state["cls_token"] - position
    torch.save(state | {"mask_token": torch.zeros(1, 192)}, tmp_path / "dinov2.pth")
    encoder = encoders.open(tmp_path / "dinov2.pth")
    with torch.inference_mode():
        out = module.forward_features(NORMALIZED)
        torch.testing.assert_close(encoder.tokens(IMAGES), out[:, 5:], rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.embed(IMAGES), out[:, 0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ other libraries


_QKV = ("query", "key", "value")


def to_transformers(state, *, new=False, dino=False):
    """A ViT's state under the names of transformers: before 5.18 and after it."""
    layer = "layers" if new else "encoder.layer"
    qkv = [f"attention.{p}_proj" if new else f"attention.attention.{p}" for p in ("qkv" if new else _QKV)]
    norms = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    mlp = ("mlp.fc1", "mlp.fc2") if new or dino else ("intermediate.dense", "output.dense")
    swaps = {
        "attn.proj": "attention.o_proj" if new else "attention.output.dense", "norm1": norms[0], "norm2": norms[1],
        "mlp.fc1": mlp[0], "mlp.fc2": mlp[1], "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "attn.relative_position": "attention.attention.relative_position_bias.relative_position",
        "gamma_": "lambda_",
    }  # fmt: skip
    top = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias", "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }  # fmt: skip
    named = {}
    for key, value in state.items():
        if not key.startswith("blocks."):
            named[top[key]] = value
            continue
        _, number, rest = key.split(".", 2)
        if rest.startswith("attn.qkv."):
            for part, name in zip(value.chunk(3), qkv, strict=True):
                named[f"{layer}.{number}.{name}.{rest[9:]}"] = part.clone()
            continue
        if rest in ("attn.q_bias", "attn.v_bias"):
            named[f"{layer}.{number}.{qkv['qkv'.index(rest[5])]}.bias"] = value
            continue
        for ours, theirs in swaps.items():
            rest = rest.replace(ours, theirs)
        named[f"{layer}.{number}.{rest}"] = value
    return named


def write_folder(folder, state, **config):
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    config = dict(num_attention_heads=3, hidden_act="gelu", image_size=32, layer_norm_eps=1e-12) | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("kind", ["vit", "vit_mae", "dinov2", "beit"])
def test_folders_of_transformers_open_in_both_layouts(tmp_path, kind, new):
    if kind == "beit":
        if new:
            pytest.skip("one layout is known")
        module = timm.create_model(
            "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0,
            global_pool="",
        ).eval()  # fmt: skip
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    else:
        module = make_vit(init_values=1.0 if kind == "dinov2" else None)
    state = to_transformers(module.state_dict(), new=new, dino=kind == "dinov2")
    if kind == "vit_mae":
        state = put("vit.", state) | {"decoder.decoder_embed.weight": torch.zeros(64, 192)}
    if kind == "vit":
        state |= {"pooler.dense.weight": torch.zeros(192, 192), "pooler.dense.bias": torch.zeros(192)}
    folder = write_folder(tmp_path / kind, state, model_type=kind)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    encoder = encoders.open(folder)
    assert encoder.facts["heads"] == ("3", "read") and encoder.facts["normalization"][1] == "read"
    assert encoder.pooling == ("mean" if kind == "vit_mae" else "cls")
    with torch.inference_mode():  # transformers' eps of 1e-12 against timm's 1e-6
        out = module.forward_features((IMAGES - 0.5) / 0.5)
        torch.testing.assert_close(encoder.tokens(IMAGES), out[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["facebook", "transformers"])
def test_the_decoder_of_a_foreign_mae_is_kept_for_the_mim_attack(tmp_path, layout):
    """Against the released code's forward, step by step."""
    blocks = make_vit(embed_dim=64, num_heads=16 if layout == "facebook" else 2, mlp_ratio=1.0).blocks
    with torch.random.fork_rng():
        torch.manual_seed(2)
        embed, norm, predict = nn.Linear(192, 64), nn.LayerNorm(64, eps=1e-6), nn.Linear(64, 192)
        mask_token, position = torch.randn(1, 1, 64), torch.randn(1, 17, 64)
    outer = {"decoder_embed": embed, "decoder_norm": norm, "decoder_pred": predict}
    state = {f"{name}.{key}": v for name, module in outer.items() for key, v in module.state_dict().items()}
    state["decoder_pos_embed"], state["mask_token"] = position, mask_token
    inner = {f"blocks.{key}": v for key, v in blocks.state_dict().items()}
    if layout == "facebook":
        state |= put("decoder_", inner) | STATE
        torch.save({"model": state, "args": argparse.Namespace(norm_pix_loss=False)}, tmp_path / "mae")
    else:
        inner = {k.replace("encoder.layer.", "decoder_layers."): v for k, v in to_transformers(inner).items()}
        config = dict(decoder_num_attention_heads=2, norm_pix_loss=False)
        write_folder(tmp_path / "mae", put("decoder.", state | inner) | put("vit.", to_transformers(STATE)), **config)
    encoder = encoders.open(tmp_path / "mae")
    assert encoder.facts["decoder heads"] == (("16", "assumed") if layout == "facebook" else ("2", "read"))
    assert encoder.facts["decoder predicts"] == ("pixels as they are", "read") and encoder.method == "mae"
    model, masks = mae.open_decoder(encoder), torch.zeros(16, dtype=torch.bool)
    masks[[1, 2, 5, 7, 11, 12, 13, 15]] = True
    with torch.inference_mode():
        x = VIT.patch_embed(NORMALIZED) + VIT.pos_embed[:, 1:]
        x = torch.cat([(VIT.cls_token + VIT.pos_embed[:, :1]).expand(3, -1, -1), x[:, ~masks]], 1)
        x = embed(VIT.norm(VIT.blocks(x)))
        full = mask_token.repeat(3, 17, 1)
        full[:, [0, *(1 + i for i in range(16) if not masks[i])]] = x
        patches = predict(norm(blocks(full + position)))[:, 1:]
        pixels = patches.reshape(3, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 32, 32)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD))
        torch.testing.assert_close(model.reconstruct(IMAGES, masks), pixels * std + mean, rtol=0, atol=1e-4)
        fresh = mae.open_decoder(encoder, untrained_seed=0).reconstruct(IMAGES, masks)
        assert fresh.shape == IMAGES.shape and not torch.allclose(fresh, pixels * std + mean, atol=0.1)
    queried = (255 * IMAGES).byte().permute(0, 2, 3, 1).numpy()
    assert mim.compute_distances(model, queried, n_masks=2).shape == (3, 2)
    assert mae.open_decoder(encoders.make("vit_nano_patch8_32")) is None


def test_a_folder_of_timm_is_read_by_its_config(tmp_path):
    module = timm.create_model("resnet10t", num_classes=0).eval()
    config = dict(architecture="resnet10t", pretrained_cfg={"mean": [0.1] * 3, "std": [0.2] * 3})
    encoder = encoders.open(write_folder(tmp_path / "hub", module.state_dict(), **config))
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        out = module.forward_features((images - 0.1) / 0.2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder.tokens(images), out, rtol=0, atol=1e-5)
    assert encoder.facts["normalization"][1] == encoder.facts["architecture"][1] == "read"


@pytest.mark.parametrize("kind", ["plain", "moco v2", "lightly", "cifar stem", "resnet50", "vit"])
def test_torchvisions_networks_open_to_their_own_outputs(tmp_path, kind):
    if kind == "vit":
        module = VisionTransformer(32, 8, 2, 3, 192, 384).eval()
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        state = module.state_dict()
    else:
        module = (resnet50 if kind == "resnet50" else resnet18)(weights=None).eval()
        if kind == "cifar stem":
            module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        state = module.state_dict()
    if kind == "moco v2":
        state = {"state_dict": put("module.encoder_q.", state) | put("module.encoder_k.", resnet18().state_dict())}
    if kind == "lightly":
        state = put("backbone.", nn.Sequential(*list(module.children())[:-1]).state_dict())
    torch.save(state, tmp_path / "weights.pth.tar")
    encoder = encoders.open(tmp_path / "weights.pth.tar")
    images = IMAGES if kind in ("vit", "cifar stem") else torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        if kind == "vit":
            x = module._process_input(encoder._prepare(images))
            out = module.encoder(torch.cat([module.class_token.expand(len(x), -1, -1), x], 1))[:, 0]
        else:
            out = nn.Sequential(*list(module.children())[:-1])(encoder._prepare(images)).flatten(1)
        torch.testing.assert_close(encoder.embed(images), out, rtol=0, atol=1e-4)
    assert ("stem" in encoder.facts) == (kind == "cifar stem")


@pytest.mark.parametrize("arch", ["hf-hub:evil/model", "local-dir:somewhere/x", "../vit", "http://x", "vit_tiny.{x}"])
def test_a_header_that_points_elsewhere_is_refused(tmp_path, arch):
    save_file(STATE, tmp_path / "evil.safetensors", metadata={"arch": arch, "method": "mae"})
    (tmp_path / "hub").mkdir()
    save_file(STATE, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"architecture": arch}))
    for spec in ("evil.safetensors", "hub"):
        with pytest.raises(ValueError, match="no encoder .*or a timm name") as info:
            encoders.open(tmp_path / spec)
        assert "\n" not in str(info.value)
    for built in ("[]", '["hf-hub:x", {}]', '["vit_tiny_patch16_224", {"checkpoint_path": "x"}]', "{"):
        header = {"arch": "vit_evil", "method": "mae", "built": built}
        save_file(STATE, tmp_path / "built.safetensors", metadata=header)
        with pytest.raises(ValueError, match="refused|no encoder"):
            encoders.open(tmp_path / "built.safetensors")


def test_what_cant_be_read_stops_with_the_way_out(tmp_path):
    torch.save(make_vit(), tmp_path / "module.pt")
    torch.jit.trace(VIT, IMAGES).save(str(tmp_path / "script.pt"))
    torch.save({"a.weight": torch.zeros(3, 3)}, tmp_path / "linear.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save(STATE | {"blocks.0.gate.weight": torch.zeros(2)}, tmp_path / "more.pth")
    torch.save({"class_embedding": torch.zeros(192), "conv1.weight": torch.zeros(192, 3, 8, 8),
                "transformer.resblocks.0.ln_1.weight": torch.zeros(192), "positional_embedding": torch.zeros(17, 192)},
               tmp_path / "clip.pt")  # fmt: skip
    (tmp_path / "nothing").mkdir()
    whole = (tmp_path / "linear.pth").read_bytes()
    for name, content in {"cut.pth": whole[:-40], "zero.pth": bytes(len(whole)), "void.pth": b""}.items():
        (tmp_path / name).write_bytes(content)
    torch.save({key: value * 0 for key, value in STATE.items()}, tmp_path / "zeros.pth")
    for name, index in {"up": {"a": "../x.safetensors"}, "self": {"a": "self.index.json"}, "no": 3}.items():
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "list.index.json").write_text("[1]")
    write_folder(tmp_path / "quick", to_transformers(STATE), hidden_act="quick_gelu")
    for name, message in {
        "module.pt": r"holds timm.*VisionTransformer: refused.*model.state_dict\(\)",
        "script.pt": r"TorchScript.*torch.jit.load\('script.pt'\), then encoders.wrap",
        "cut.pth": "can't be read: refused",
        "zero.pth": "can't be read: refused",
        "void.pth": "can't be read: refused",
        "zeros.pth": "embeddings are not finite, do not repeat or do not depend on the image",
        "up.index.json": "names no shards in its own folder",
        "self.index.json": "names no shards in its own folder",
        "no.index.json": "names no shards in its own folder",
        "list.index.json": "expected a JSON object, got list",
        "linear.pth": "can't tell the architecture .first weight a.weight.: give arch=",
        "empty.pth": "holds no tensors",
        "more.pth": "does not fit vit_192x2.*blocks.0.gate.weight: expected nothing",
        "clip.pt": "CLIP tower.*give arch=",
        "nothing": "no weights file in",
        "quick": "activation 'quick_gelu' is not read here: use encoders.wrap",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as info:
            encoders.open(tmp_path / name)
        assert "\n" not in str(info.value)


def test_a_clip_tower_opens_where_its_architecture_is_given(tmp_path):
    settings = dict(embed_dim=64, depth=2, num_heads=2)
    module = timm.create_model("vit_base_patch32_clip_224", img_size=64, num_classes=0, global_pool="", **settings)
    module.eval()
    swaps = {
        "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.", "norm1.": "ln_1.",
        "norm2.": "ln_2.", "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.", "norm.": "ln_post.", "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
    }  # fmt: skip
    state = {}
    for key, value in module.state_dict().items():
        for ours, theirs in swaps.items():
            key = key.replace(ours, theirs)
        state[f"visual.{key}"] = value.squeeze(0).squeeze(0) if value.ndim == 3 else value
    torch.save(state, tmp_path / "clip.pt")
    encoder = encoders.open(tmp_path / "clip.pt", arch="vit_base_patch32_clip_224", arch_args=settings, size=64)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(module.forward_features(encoder._prepare(images))[:, 1:], encoder.tokens(images))


def test_facts_print_as_a_table():
    facts = checkpoints.Facts()
    facts.add("heads", 3, "assumed")
    facts.add("normalization", "x", "read")
    assert str(facts).splitlines() == ["heads          assumed  3", "normalization  read     x"]
    assert facts.assumed == ["heads: 3"]
