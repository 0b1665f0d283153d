"""One face for every encoder: ``tokens`` and ``embed`` of images in [0, 1], whatever the backbone.

Backbones come from timm (ViT, Swin, ResNet, ConvNeXt ...). Weights are read without unpickling code.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# Small-image backbones: a timm name and what differs from it. 32 px and patch 8 give L = 16 tokens.
ARCHS: dict[str, tuple[str, dict]] = {
    "vit_nano_patch8_32": ("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)),
    "vit_micro_patch8_32": (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    ),
    "vit_micro_patch4_32": (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4),
    ),
    "vit_micro_patch8_64": (
        "vit_tiny_patch16_224",
        dict(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    ),
    "vit_mini_patch8_32": (
        "vit_tiny_patch16_224",
        dict(img_size=32, patch_size=8, embed_dim=192, depth=6, num_heads=3),
    ),
    "vit_small_patch8_32": ("vit_small_patch16_224", dict(img_size=32, patch_size=8)),
    "vit_small_patch8_64": ("vit_small_patch16_224", dict(img_size=64, patch_size=8)),
    "swin_thin_32": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(1, 2, 1), num_heads=(2, 4, 8)),
    ),
    "resnet_thin_32": ("resnet10t", dict(channels=(16, 32, 64, 128))),
    "resnet_wide_32": ("resnet10t", dict(channels=(32, 64, 128, 256))),
    "resnet18_32": ("resnet18", {}),
}


class Encoder:
    """An image encoder as the attacks see it.

    Attributes:
        name: what to call it in tables.
        arch, method: backbone name and training method (``None`` when unknown).
        pooling: the vector the method trained, ``"cls"`` or ``"mean"``; what ``pooling="auto"`` means.
        input_size, min_size: side in pixels it was trained at, and the smallest it takes (smaller inputs are
            resized up to it).
        n_tokens, dim: L and D at ``input_size``.
        module: the torch module, or ``None`` for a wrapped callable.
    """

    def __init__(
        self,
        tokens: Callable[[Tensor], tuple[Tensor | None, Tensor]],
        *,
        name: str,
        input_size: int,
        min_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: str = "mean",
        arch: str | None = None,
        method: str | None = None,
        module: nn.Module | None = None,
        vector: Callable[[Tensor], Tensor] | None = None,
    ):
        self._forward, self._vector = tokens, vector
        self.name, self.arch, self.method, self.module = name, arch, method, module
        self.input_size, self.min_size, self.pooling = input_size, min_size, pooling
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.device = next(module.parameters()).device if module is not None else torch.device("cpu")
        self.offers = {"tokens", "embed"} if tokens is not None else {"embed"}
        if tokens is not None:
            with torch.inference_mode():
                shape = self.tokens(torch.zeros(1, 3, input_size, input_size)).shape
            self.n_tokens, self.dim = int(shape[1]), int(shape[2])
            if self.n_tokens < 2:
                raise ValueError(f"{name} gives {self.n_tokens} token at {input_size} px: expected at least 2")
        else:
            self.n_tokens, self.dim = 0, int(self.embed(torch.zeros(1, 3, input_size, input_size)).shape[1])

    def _prepare(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float images (N, 3, H, W) in [0, 1], got {tuple(images.shape)} {images.dtype}")
        images = images.to(self.device)
        if min(images.shape[-2:]) < self.min_size:
            images = nn.functional.interpolate(images, size=self.min_size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self._mean.to(self.device)) / self._std.to(self.device)

    def tokens(self, images: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [0, 1] to patch tokens after the final norm, (N, L, D), class token dropped."""
        if "tokens" not in self.offers:
            raise ValueError(f"{self.name} offers no tokens: this attack needs an encoder with a token or feature map")
        return self._forward(self._prepare(images))[1]

    def embed(self, images: Tensor, pooling: str | None = None) -> Tensor:
        """Encode images (N, 3, H, W) in [0, 1] to vectors (N, D).

        Args:
            images: float in [0, 1].
            pooling: ``"cls"``, ``"mean"``, or None / ``"auto"`` for the vector the method trained.
        """
        if self._vector is not None:
            return self._vector(self._prepare(images))
        pooling = self.pooling if pooling in (None, "auto") else pooling
        cls, tokens = self._forward(self._prepare(images))
        if pooling == "mean":
            return tokens.mean(dim=1)
        if pooling != "cls":
            raise ValueError(f"expected pooling 'auto', 'cls' or 'mean', got {pooling!r}")
        if cls is None:
            raise ValueError(f"{self.name} has no class token: use pooling='mean'")
        return cls

    def to(self, device: str | torch.device) -> Encoder:
        """Move the module to a device; returns self."""
        if self.module is not None:
            self.module.to(device)
            self.device = torch.device(device)
        return self

    def __repr__(self) -> str:
        size, grid = self.input_size, f"L={self.n_tokens}, D={self.dim}"
        return f"Encoder({self.name}: {self.method or 'unknown method'}, {self.arch}, {size} px, {grid})"


def make_backbone(
    arch: str, *, seed: int = 0, pretrained: bool = False, dropout: float | None = None, drop_path: float | None = None
) -> nn.Module:
    """Build a backbone without a head: an alias of ``ARCHS``, or any timm name.

    The weights come from a private random stream: the global random state is left as it was.

    Args:
        arch: its name.
        seed: of the weights; the same for every ``dropout`` and ``drop_path``.
        pretrained: let timm download its weights.
        dropout: share of values that a ViT drops in training, after its projections and positions; None: timm's.
        drop_path: share of residual branches dropped in the last block, growing linearly up to it; None: timm's.
    """
    base, changes = ARCHS.get(arch, (arch, {}))
    family = base.split("_")[0]
    settings = dict(num_classes=0, pretrained=pretrained, **changes)
    if family in ("vit", "deit", "deit3"):
        # global_pool='' keeps the final norm on the tokens ('avg' would turn it into Identity)
        settings |= dict(global_pool="", dynamic_img_size=True)
    elif family in ("swin", "swinv2"):
        settings |= dict(strict_img_size=False)
    settings |= _name_regularizers(arch, family, dropout=dropout, drop_path=drop_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = timm.create_model(base, **settings)
        except (RuntimeError, TypeError, ValueError) as error:
            known = ", ".join(ARCHS)
            raise ValueError(f"no encoder {arch!r} ({error}): expected {known} or a timm name") from None
        if arch.startswith("resnet") and arch.endswith("_32"):  # CIFAR stem: 3 x 3, stride 1, no max-pool
            module.conv1 = nn.Conv2d(3, module.bn1.num_features, 3, 1, 1, bias=False)
            module.maxpool = nn.Identity()
            nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    return module


def _name_regularizers(arch: str, family: str, *, dropout: float | None, drop_path: float | None) -> dict[str, float]:
    """Return timm's arguments for dropout and drop-path of a family of backbones."""
    known = {"dropout": ("proj_drop_rate", "pos_drop_rate"), "drop_path": ("drop_path_rate",)}
    settings = {}
    for option, value in (("dropout", dropout), ("drop_path", drop_path)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"expected {option} from 0 to below 1, got {value!r}")
        if family not in ("vit", "deit", "deit3") and not (option == "drop_path" and family in ("swin", "resnet")):
            raise ValueError(
                f"option {option} does not fit {arch}: expected a plain ViT (drop_path: also Swin, ResNet)"
            )
        settings |= dict.fromkeys(known[option], value)
    return settings


def _read_tokens(module: nn.Module, prefix: int) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    """Return x -> (class vector or None, tokens (N, L, D)) for a timm module."""

    def forward(x: Tensor) -> tuple[Tensor | None, Tensor]:
        out = module.forward_features(x)
        if out.ndim == 4:  # feature map, NHWC (Swin) or NCHW
            channels_last = getattr(module, "output_fmt", "NCHW") == "NHWC"
            out = out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)
            return None, out
        return (out[:, 0] if prefix else None), out[:, prefix:]

    return forward


def _read_stage(module: nn.Module, stage: int) -> Callable[[Tensor], tuple[None, Tensor]]:
    def forward(x: Tensor) -> tuple[None, Tensor]:
        (grid,) = module.forward_intermediates(x, indices=[stage], intermediates_only=True, output_fmt="NCHW")
        return None, grid.flatten(2).transpose(1, 2)

    return forward


def from_module(
    module: nn.Module,
    *,
    arch: str,
    method: str | None = None,
    name: str | None = None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
    input_size: int | None = None,
) -> Encoder:
    """Make an Encoder of a timm module, in eval mode (see ``Encoder`` for what it offers)."""
    module.eval()
    if input_size is None:
        grid = getattr(getattr(module, "patch_embed", None), "img_size", None)
        config = getattr(module, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
        input_size = int(grid[0]) if grid else (32 if arch.endswith("_32") else int(config))
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    is_vit = patch is not None and hasattr(module, "blocks")
    min_size = 2 * int(patch[0]) if is_vit else max(input_size // 4, 8)
    pooling = "cls" if prefix and method in ("dino", "moco", None) else "mean"
    read = _read_tokens(module, prefix)
    with torch.inference_mode():
        device = next(module.parameters()).device
        try:
            n_tokens = read(torch.zeros(1, 3, input_size, input_size, device=device))[1].shape[1]
            n_stages = len(getattr(module, "feature_info", []) or [])
            while n_tokens < 4 and n_stages > 1:  # the deepest stage with at least four places
                n_stages -= 1
                read = _read_stage(module, n_stages - 1)
                n_tokens = read(torch.zeros(1, 3, input_size, input_size, device=device))[1].shape[1]
        except (AttributeError, RuntimeError, IndexError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(
                f"{arch} can't be used as an encoder here: its feature map can't be read ({line})"
            ) from None
    return Encoder(
        read,
        name=name or arch,
        input_size=input_size,
        min_size=min_size,
        mean=mean,
        std=std,
        pooling=pooling,
        arch=arch,
        method=method,
        module=module,
    )


def make(arch: str, *, method: str | None = None, seed: int = 0) -> Encoder:
    """Make an encoder with fresh weights: the untrained twin of a trained one."""
    return from_module(make_backbone(arch, seed=seed), arch=arch, method=method, name=f"untrained-{arch}")


def wrap(
    embed: Callable[[Tensor], Tensor] | None = None,
    *,
    size: int,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    tokens: Callable[[Tensor], Tensor] | None = None,
    min_size: int = 1,
    name: str = "wrapped",
) -> Encoder:
    """Make an Encoder of anything callable.

    Args:
        embed: normalized images (N, 3, H, W) -> (N, D); left out: the mean over ``tokens``.
        size: side in pixels it expects.
        mean, std: normalization applied to images in [0, 1] before the call.
        tokens: normalized images -> (N, L, D), or (N, D, h, w) feature maps.
        min_size: smaller inputs are resized up to this.
    """
    if embed is None and tokens is None:
        raise ValueError("expected embed= or tokens= (a callable on normalized images), got neither")
    read = None
    if tokens is not None:

        def read(x: Tensor) -> tuple[None, Tensor]:
            out = tokens(x)
            out = out.flatten(2).transpose(1, 2) if out.ndim == 4 else out
            if out.ndim != 3:
                raise ValueError(f"expected tokens (N, L, D) or a map (N, D, h, w), got {tuple(out.shape)}")
            return None, out

    return Encoder(read, name=name, input_size=size, min_size=min_size, mean=mean, std=std, vector=embed)


# ---------------------------------------------------------------------------------------------- weights on disk


def save(encoder: Encoder, path: str | Path) -> Path:
    """Write an encoder's weights as safetensors, its arch and method in the header."""
    state = {key: value.contiguous() for key, value in encoder.module.state_dict().items()}
    save_file(state, str(path), metadata={"arch": str(encoder.arch), "method": str(encoder.method)})
    return Path(path)


def load(path: str | Path, *, arch: str | None = None, method: str | None = None) -> Encoder:
    """Read an encoder from safetensors, or from a MAE / DINO / MoCo ``.pth`` (weights only, no code is run).

    Args:
        path: the file.
        arch: backbone; None: from the header, or inferred from the weights of a plain ViT.
        method: training method; None: from the header.

    Raises:
        FileNotFoundError, ValueError: one line that names the file and what does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as handle:
                header = handle.metadata() or {}
                state = {key: handle.get_tensor(key) for key in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is no readable safetensors file ({error})") from None
        arch, method = arch or header.get("arch"), method or header.get("method")
        mean, std = HALF, HALF
    else:
        state, (mean, std) = _read_pth(path), (IMAGENET_MEAN, IMAGENET_STD)
    module = _make_matching(arch, state) if arch in (None, "None") else make_backbone(arch)
    arch = module.arch_guess if arch in (None, "None") else arch
    own = module.state_dict()
    state = {
        key: value for key, value in state.items() if key in own or not re.match(r"(head|fc|decoder|mask_token)", key)
    }
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        got = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        want = tuple(own[wrong[0]].shape) if wrong[0] in own else "nothing"
        raise ValueError(
            f"{path.name} does not fit {arch}: {len(wrong)} of {len(own)} weights differ, "
            f"first {wrong[0]}: expected {want}, got {got}"
        )
    module.load_state_dict(state)
    return from_module(
        module, arch=arch, method=method if method != "None" else None, name=path.stem, mean=mean, std=std
    )


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a released checkpoint: weights only, argparse.Namespace allowed, nothing else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found.group(1)}" if found else "can't be read"
        raise ValueError(f"{path.name} {what}: refused, only tensors are read and no code is run") from None
    for key in ("model", "teacher", "state_dict", "student"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    for prefix in ("module.", "backbone.", "base_encoder.", "encoder_q.", "encoder."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors: expected a state_dict")
    return tensors


def _make_matching(arch: None, state: dict[str, Tensor]) -> nn.Module:
    """Build the plain ViT whose sizes the weights tell; heads are 64 wide, as in every released one."""
    try:
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = int((state["pos_embed"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError):
        first = next(iter(state))
        raise ValueError(f"can't tell the architecture (first weight {first}): give arch=, a timm name") from None
    settings = dict(img_size=side * patch, patch_size=patch, embed_dim=dim, depth=depth, num_heads=max(dim // 64, 1))
    ARCHS.setdefault(f"vit_{dim}x{depth}_patch{patch}_{side * patch}", ("vit_tiny_patch16_224", settings))
    module = make_backbone(f"vit_{dim}x{depth}_patch{patch}_{side * patch}")
    module.arch_guess = f"vit_{dim}x{depth}_patch{patch}_{side * patch}"
    return module


def open(spec: str | Path, *, arch: str | None = None) -> Encoder:  # noqa: A001 - encoders.open is the public name
    """Open an encoder.

    Args:
        spec: ``timm:NAME`` (timm downloads the weights), a ``.safetensors`` file, a MAE / DINO / MoCo ``.pth``, or
            the folder of an artifact.
        arch: backbone of a bare weights file whose header does not say.

    Raises:
        FileNotFoundError, ValueError: one line that says what was expected.
    """
    text = str(spec)
    if text.startswith("timm:"):
        name = text[5:]
        if not timm.is_model(name.split(".")[0]):
            raise ValueError(f"timm knows no model {name!r}: timm.list_models() lists them")
        module = make_backbone(name, pretrained=True)
        config = module.default_cfg
        method = next((m for m in ("dino", "mae", "moco", "clip") if m in name.split(".")[-1]), None)
        mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
        return from_module(module, arch=name, method=method, name=name, mean=mean, std=std)
    path = Path(text)
    return load(path / "encoder.safetensors" if path.is_dir() else path, arch=arch)
