"""One face for every encoder: ``tokens`` and ``embed`` of images in [0, 1], whatever the backbone.

``open`` reads checkpoints and says what it read or assumed (``Encoder.facts``), ``wrap`` takes anything callable,
``make`` and ``make_untrained`` give fresh weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mia_utils.models import checkpoints, layouts, wrapping
from mia_utils.models.backbones import ARCHS, BUILT_IN, find_reader, first_line, is_model, make_backbone
from mia_utils.models.checkpoints import ASSUMED, GIVEN, READ, Facts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NONE, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
Size = int | Sequence[int]  # side, or (height, width), in pixels


def to_shape(size: Size) -> tuple[int, int]:
    """(height, width) of a side or of both."""
    return (size, size) if isinstance(size, int) else tuple(map(int, size))


def check_pixels(images: Tensor) -> None:
    """Refuse what are no float images (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected float images (N, 3, H, W) in [0, 1], got {tuple(images.shape)} {images.dtype}")


class Encoder:
    """An image encoder as the attacks see it.

    Attributes:
        arch, method: backbone name and training method (``None`` when unknown).
        pooling: the vector the method trained, ``"cls"`` or ``"mean"``; what ``pooling="auto"`` means.
        shape, input_size: (height, width) it was trained at, and the longer side; inputs are resized where ``fixed``.
        min_size: smaller inputs are resized up to it.
        n_tokens, dim: L and D at ``shape``.
        module: the torch module, or ``None`` for a wrapped callable.
        facts: what is known of it; decoder: what an MAE checkpoint kept of it, for ``pretrain.mae.open_decoder``.
    """

    def __init__(
        self, tokens: Callable[[Tensor], tuple[Tensor | None, Tensor]] | None, *, name: str, input_size: Size,
        min_size: int, mean: Sequence[float], std: Sequence[float], pooling: str = "mean", arch: str | None = None,
        method: str | None = None, module: nn.Module | None = None, vector: Callable[[Tensor], Tensor] | None = None,
        fixed: bool = False, weights: nn.Module | None = None, remake: "Callable[[int], Encoder] | None" = None,
        facts: Facts | None = None,
    ):  # fmt: skip
        self._forward, self._vector, self._remake = tokens, vector, remake
        self._weights = module if weights is None else weights
        self.name, self.arch, self.method, self.module = name, arch, method, module
        self.shape, self.min_size, self.pooling = to_shape(input_size), min_size, pooling
        self.input_size, self.fixed = max(self.shape), fixed or self.shape[0] != self.shape[1]
        self.facts = Facts() if facts is None else facts
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.device, self._dtype, self.n_tokens = torch.device("cpu"), None, 0
        self.decoder: dict[str, Any] | None = None
        self.offers = {"tokens", "embed"} if tokens is not None else {"embed"}
        with torch.inference_mode():
            probe = torch.zeros(1, 3, *self.shape)
            if tokens is None:
                self.dim = int(self.embed(probe).shape[1])
                return
            _, self.n_tokens, self.dim = map(int, self.tokens(probe).shape)
        if self.n_tokens < 2:
            raise ValueError(f"{name} gives {self.n_tokens} token at {input_size} px: expected at least 2")

    def _prepare(self, images: Tensor) -> Tensor:
        """Resize and normalize; the owner of a wrapped module may have moved it meanwhile."""
        check_pixels(images)
        weights = self._weights.parameters() if self._weights is not None else ()
        if (weight := next(filter(torch.is_floating_point, weights), None)) is not None:
            self.device, self._dtype = weight.device, weight.dtype
        images = images.to(self.device)
        size = self.shape if self.fixed and images.shape[-2:] != self.shape else None
        if size is None and min(images.shape[-2:]) < self.min_size:
            size = self.min_size
        if size is not None:
            images = nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return ((images - self._mean.to(self.device)) / self._std.to(self.device)).to(self._dtype or images.dtype)

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [0, 1] to patch tokens after the final norm, (N, L, D), class token dropped."""
        if "tokens" not in self.offers:
            raise ValueError(f"{self.name} offers no tokens: this attack needs an encoder with a token or feature map")
        return self._forward(self._prepare(images))[1].float()

    def embed(self, images: Tensor, pooling: str | None = None) -> Tensor:
        """Encode images (N, 3, H, W) in [0, 1] to vectors (N, D).

        ``pooling`` is ``"cls"``, ``"mean"``, or None / ``"auto"`` for the vector the method trained.
        """
        if self._vector is not None:
            return self._vector(self._prepare(images)).float()
        pooling = self.pooling if pooling in (None, "auto") else pooling
        cls, tokens = self._forward(self._prepare(images))
        if pooling == "mean":
            return tokens.mean(dim=1).float()
        if pooling != "cls":
            raise ValueError(f"expected pooling 'auto', 'cls' or 'mean', got {pooling!r}")
        if cls is None:
            raise ValueError(f"{self.name} has no class token: use pooling='mean'")
        return cls.float()

    def to(self, device: str | torch.device) -> "Encoder":
        """Move the module to a device; returns self."""
        if self.module is not None:
            self.module.to(device)
            self.device = torch.device(device)
        return self

    def __repr__(self) -> str:
        size, grid = self.input_size, f"L={self.n_tokens}, D={self.dim}"
        return f"Encoder({self.name}: {self.method or 'unknown method'}, {self.arch}, {size} px, {grid})"


def from_module(
    module: nn.Module, *, arch: str, method: str | None = None, name: str | None = None, mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF, input_size: Size | None = None, pooling: str | None = None, facts: Facts | None = None,
) -> Encoder:  # fmt: skip
    """Make an Encoder of a timm module, in eval mode (see ``Encoder`` for what it offers)."""
    module.eval()
    embedding = getattr(module, "patch_embed", None)
    if input_size is None:
        config = int(getattr(module, "default_cfg", {}).get("input_size", (3, 224, 224))[-1])
        input_size = getattr(embedding, "img_size", None) or (32 if arch.endswith("_32") else config)
    shape, patch, weights = to_shape(input_size), getattr(embedding, "patch_size", None), next(module.parameters())
    is_vit = patch is not None and hasattr(module, "blocks")
    # a ViT that does not resize its positions (BEiT, EVA) takes one size only
    fixed = is_vit and getattr(embedding, "strict_img_size", False) and not getattr(module, "dynamic_img_size", False)
    with torch.inference_mode():
        probe = torch.zeros(1, 3, *shape, device=weights.device, dtype=weights.dtype)
        try:
            read = find_reader(module, probe)
            has_class = read(probe)[0] is not None
        except (AttributeError, RuntimeError, IndexError, AssertionError) as error:
            why = f"its feature map can't be read ({first_line(error)})"
            raise ValueError(f"{arch} can't be an encoder here: {why}") from None
    if pooling is None:
        pooling = "cls" if has_class and method in ("dino", "moco", None) else "mean"
    min_size = 2 * int(patch[0]) if is_vit else max(max(shape) // 4, 8)
    return Encoder(
        read, name=name or arch, input_size=shape, min_size=min_size, mean=mean, std=std, pooling=pooling, arch=arch,
        method=method, module=module, fixed=fixed, facts=facts,
    )  # fmt: skip


def make(arch: str, *, method: str | None = None, seed: int = 0) -> Encoder:
    """Make an encoder with fresh weights: the untrained control of a trained one."""
    return from_module(make_backbone(arch, seed=seed), arch=arch, method=method, name=f"untrained-{arch}")


def make_untrained(encoder: Encoder, *, seed: int = 0) -> Encoder | None:
    """Make the control of any encoder: the same architecture, size, normalization and pooling, fresh weights.

    Of a wrapped module a copy is re-initialized, the module stays as it is. None where a function holds no module, or
    an object (a dict, a service) that may hide another: what stays trained is no control.
    """
    if encoder.module is None:
        return encoder._remake(seed) if encoder._remake else None
    mean, std = encoder._mean.flatten().tolist(), encoder._std.flatten().tolist()
    return from_module(
        make_backbone(encoder.arch, seed=seed), arch=encoder.arch, method=encoder.method, mean=mean, std=std,
        name=f"untrained-{encoder.arch}", input_size=encoder.shape, pooling=encoder.pooling,
    ).to(encoder.device)  # fmt: skip


def wrap(
    embed: Callable[[Tensor], Any] | None = None, *, size: Size, mean: Sequence[float] = NONE,
    std: Sequence[float] = ONE, tokens: Callable[[Tensor], Any] | None = None, min_size: int = 1,
    name: str = "wrapped",
) -> Encoder:  # fmt: skip
    """Make an Encoder of anything callable.

    Modules found in it (itself, the owner of a method, variables of a function) are in eval mode during a call and as
    they were after it; their device and dtype are followed.

    Args:
        embed: normalized images (N, 3, H, W) -> (N, D); left out: the mean over ``tokens``. Outputs of transformers
            are unpacked, and give tokens too.
        size: side, or (height, width), in pixels that it expects.
        mean, std: normalization applied to images in [0, 1] before the call.
        tokens: normalized images -> (N, L, D), or (N, D, h, w) feature maps.
        min_size: smaller inputs are resized up to this.

    Returns:
        Encoder; outputs that differ between two calls or depend on the other images of a batch raise ValueError.
    """
    given = {key: value for key, value in (("embed", embed), ("tokens", tokens)) if value is not None}
    if not given:
        raise ValueError("expected embed= or tokens= (a callable on normalized images), got neither")
    for what, function in given.items():
        if not callable(function):
            raise ValueError(f"expected {what}= callable on normalized images, got {type(function).__name__}")
    (modules, complete), shape = wrapping.find_modules(*given.values()), to_shape(size)
    for function in given.values():
        answer = wrapping.check_outputs(function, modules, shape, name)
        if tokens is None and getattr(answer, "last_hidden_state", None) is not None:
            tokens = embed
    patch = next((p for m in modules if (p := getattr(getattr(m, "config", None), "patch_size", None))), None)
    facts, unknown = Facts(), (tuple(mean), tuple(std)) == (NONE, ONE)
    facts.add("architecture", type(modules[0]).__name__ if modules else "a function", READ)
    facts.add("normalization", f"mean {tuple(mean)}, std {tuple(std)}", ASSUMED if unknown else GIVEN)
    facts.add("pooling", *(("mean", ASSUMED) if embed is None else ("its own vectors", READ)))

    def build(weights: Sequence[nn.Module], **more: Any) -> Encoder:
        def read(x: Tensor) -> tuple[None, Tensor]:
            with wrapping.evaluating(modules, weights):
                return None, wrapping.unpack_tokens(tokens(x), x, patch)

        def vector(x: Tensor) -> Tensor:
            with wrapping.evaluating(modules, weights):
                return wrapping.unpack_vector(embed(x))

        return Encoder(
            None if tokens is None else read, vector=None if embed is None else vector, input_size=shape,
            min_size=min_size, mean=mean, std=std, weights=modules[0] if modules else None, **more,
        )  # fmt: skip

    def remake(seed: int) -> Encoder:
        return build([wrapping.reinitialize(module, seed=seed) for module in modules], name=f"untrained-{name}")

    return build(modules, name=name, facts=facts, remake=remake if modules and complete else None)


# ---------------------------------------------------------------------------------------------- weights on disk


def save(encoder: Encoder, path: str | Path) -> Path:
    """Write an encoder's weights as safetensors; what it is and how it is normalized stands in the header."""
    state = {key: value.contiguous() for key, value in encoder.module.state_dict().items()}
    header = {"arch": str(encoder.arch), "method": str(encoder.method), "pooling": encoder.pooling}
    header |= {key: json.dumps(getattr(encoder, f"_{key}").flatten().tolist()) for key in ("mean", "std")}
    if encoder.arch in ARCHS and encoder.arch not in BUILT_IN:
        header["built"] = json.dumps(ARCHS[encoder.arch])
    save_file(state, str(path), metadata=header)
    return Path(path)


def open(  # noqa: A001 - encoders.open is the public name
    spec: str | Path, *, arch: str | None = None, arch_args: Mapping[str, Any] | None = None, weights: str = "auto",
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, pooling: str | None = None,
    size: Size | None = None, method: str | None = None,
) -> Encoder:  # fmt: skip
    """Open an encoder; ``facts`` of what it returns say what was read, given or assumed.

    Args:
        spec: ``timm:NAME`` (timm downloads the weights), a ``.safetensors`` or ``.pth`` file, a folder with
            ``config.json`` of transformers or timm, an index of shards, or the folder of an artifact. Only tensors
            are read, no code is run.
        arch, arch_args: backbone and further arguments of timm, where the file does not tell them; ``num_heads`` alone
            may be given for a ViT whose other sizes the weights tell.
        weights: which encoder of the file: ``"auto"`` (what the method hands on: EMA, teacher, target encoder; of MoCo
            the trained one), ``"ema"``, ``"teacher"``, ``"student"``, or a key.
        mean, std, pooling, size, method: None: read from the file, else ImageNet's normalization, the vector the
            method trained (``"cls"`` or ``"mean"``), the size of the positions.

    Returns:
        Encoder. What does not fit or can't be told raises one line (ValueError, FileNotFoundError) with the way out.
    """
    text, changes, facts, told, decoder = str(spec), dict(arch_args or {}), Facts(), {}, None
    if elsewhere := [key for key in changes if key.startswith(("pretrained", "checkpoint", "cache_dir"))]:
        raise ValueError(f"arch_args: {elsewhere[0]} reads weights from elsewhere: give the file itself")
    shape, source = None if size is None else to_shape(size), READ
    if text.startswith("timm:"):
        arch = name = text[5:]
        if not is_model(name):
            raise ValueError(f"timm knows no model {name!r}: timm.list_models() lists them")
        module = make_backbone(name, pretrained=True, **changes)
        config = module.default_cfg
        method = method or next((m for m in ("dino", "mae", "moco", "clip") if m in name.split(".")[-1]), None)
    else:
        checkpoint = checkpoints.read(Path(text))
        told, config = {k: v for k, v in checkpoint.header.items() if v != "None"}, dict(checkpoint.config)
        arch, source = arch or told.get("arch") or config.get("architecture"), GIVEN if arch else READ
        if "built" in told and source == READ:
            layouts.register(arch, told["built"])
        module, arch, state, found, decoder = layouts.build(checkpoint, arch, changes, weights, shape, facts)
        layouts.fill(module, state, checkpoint.name, arch, facts)
        name, method = Path(text).stem, method or told.get("method") or found
        config |= config.get("pretrained_cfg", {})
        config |= {key: config[f"image_{key}"] for key in ("mean", "std") if config.get(f"image_{key}")}
        if "arch" in told:  # what save() wrote; before it noted the normalization, it was always this one
            config |= {key: json.loads(told.get(key, json.dumps(HALF))) for key in ("mean", "std")}
    facts.add("architecture", arch, source)
    seen = GIVEN if mean or std else READ if config.get("mean") else ASSUMED
    mean, std = mean or config.get("mean") or IMAGENET_MEAN, std or config.get("std") or IMAGENET_STD
    facts.add("normalization", f"mean {tuple(mean)}, std {tuple(std)}", seen)
    encoder = from_module(
        module, arch=arch, method=method, name=name, mean=mean, std=std, input_size=shape, facts=facts,
        pooling=pooling or told.get("pooling"),
    )  # fmt: skip
    encoder.decoder = decoder
    facts.add("method", method or "unknown", READ if method else ASSUMED)
    facts.add("pooling", encoder.pooling, GIVEN if pooling else READ if "pooling" in told else ASSUMED)
    facts.add("input", f"{encoder.shape[0]} x {encoder.shape[1]} px", GIVEN if size else READ)
    if "heads" not in facts and (attention := getattr(getattr(module, "blocks", [None])[0], "attn", None)):
        facts.add("heads", attention.num_heads, source)
    with torch.inference_mode():  # what it says must repeat and depend on the image
        images = torch.rand(2, 3, *encoder.shape, generator=torch.Generator().manual_seed(0))
        first, again = encoder.embed(images), encoder.embed(images)
    if not torch.isfinite(first).all() or not torch.allclose(first, again) or torch.equal(first[0], first[1]):
        raise ValueError(f"{name}: embeddings are not finite, do not repeat or do not depend on the image")
    return encoder
