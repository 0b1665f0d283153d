"""What a row may say: methods, defenses, and the options of each method with type and range."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from mia_utils.runner.profiles import Row

SEGMENTERS = ("unet", "upernet", "pspnet", "deeplabv3plus")  # their arch is the encoder
METHODS = ("mae", "simmim", "dino", "moco", "moco-v1", "moco-v2", "simclr", "supervised", *SEGMENTERS)
ARCHS = ("vit_nano_patch8_32", "vit_micro_patch8_32", "vit_micro_patch4_32", "vit_micro_patch8_64", "resnet_wide_32")
ARCHS += ("vit_mini_patch8_32", "vit_small_patch8_32", "vit_small_patch8_64", "swin_thin_32", "resnet_thin_32")
ARCHS += ("resnet18_32", "mobilenet_v2", "resnet18", "resnet34", "resnet50")  # the usual ones; any of timm will do
AUGMENTATIONS = ("none", "flip", "crop", "crop-weak", "simclr", "simclr-weak", "dino")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
# Defenses a model is trained with, and the option that says how strong (scsr: the range of its crops). Early stopping
# has no row: it is a checkpoint of an undefended one. Defenses of the output have none either: defenses.perturb.
STRENGTHS = {
    "none": None, "scsr": None, "dp-sgd": "privacy", "weight-decay": "weight_decay", "dropout": "dropout",
    "drop-path": "drop_path", "label-smoothing": "label_smoothing", "crop-mixup": "mixup", "distillation": "distill",
    "min-max": "minmax",
}  # fmt: skip
PRIVATE_METHODS = ("mae", "simmim", "unet")  # whose per-example gradients are exact; others are refused
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)  # unknown keys and wrong types are errors

# Options of a row: keyword arguments of pretrain.fit, of a method's class and, for segmenters, of the network.
# Written down so that a plan needs no torch; a test compares the names with the signatures.
Count = Annotated[int, Field(gt=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
_COLORS = {kind: Annotated[list[kind], Field(min_length=3, max_length=3)] for kind in (Rate, Weight)}


class Privacy(TypedDict, total=False):
    """Of ``pretrain.fit(privacy=...)``: one of epsilon and noise_multiplier."""

    __pydantic_config__ = STRICT
    epsilon: Rate
    noise_multiplier: Weight
    delta: Annotated[float, Field(gt=0, lt=1)]
    max_grad_norm: Rate


FIT_OPTIONS = {"batch_size": Count, "lr": Rate, "weight_decay": Weight, "warmup": Share}
FIT_OPTIONS |= {"checkpoints": list[Annotated[int, Field(ge=0)]], "precision": Literal[PRECISIONS], "privacy": Privacy}
Few = Annotated[int, Field(ge=0, le=64)]
_ENCODER = {"dropout": Share, "drop_path": Share, "input_size": Annotated[int, Field(gt=0, le=1024)]}
_MASKED = _ENCODER | {"mask_ratio": Annotated[float, Field(gt=0, lt=1)], "mean": _COLORS[Weight], "std": _COLORS[Rate]}
_CONTRAST = _ENCODER | {"temperature": Rate, "momentum": Annotated[float, Field(ge=0, le=1)], "output_dim": Count}
_SEGMENT = {"dropout": Share, "label_smoothing": Share, "mixup": Weight, "distill": Weight, "minmax": Weight}
_SEGMENT |= {"norm": Literal["batch", "group"], "encoder_depth": Annotated[int, Field(ge=3, le=5)]}
_DECODER = {  # of the networks of segmentation-models-pytorch
    "decoder_use_norm": bool | Literal["batchnorm", "identity", "layernorm", "instancenorm"],
    "decoder_channels": Count | list[Count], "decoder_attention_type": Literal["scse"],
    "decoder_interpolation": Literal["nearest", "bilinear", "bicubic", "area", "nearest-exact"], "upsampling": Count,
    "psp_out_channels": Count, "psp_dropout": Share, "encoder_output_stride": Literal[8, 16],
    "decoder_atrous_rates": Annotated[list[Count], Field(min_length=3, max_length=3)], "decoder_aspp_separable": bool,
    "decoder_aspp_dropout": Share,
}  # fmt: skip
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "mae": _MASKED | {"decoder_dim": Count, "decoder_depth": Few, "decoder_heads": Count, "norm_pix_loss": bool},
    "simmim": _MASKED,
    "dino": {key: value for key, value in _CONTRAST.items() if key != "temperature"}
    | {"n_local": Few, "teacher_temperature": Rate, "student_temperature": Rate}
    | {"hidden_dim": Count, "bottleneck_dim": Count, "keep": Literal["teacher", "student"]},
    "moco": _CONTRAST | {"hidden_dim": Count},
    "moco-v1": _CONTRAST | {"queue_size": Count, "bn_splits": Count},
    "moco-v2": _CONTRAST | {"queue_size": Count, "bn_splits": Count},
    "simclr": {key: value for key, value in _CONTRAST.items() if key != "momentum"} | {"hidden_dim": Count},
    "supervised": _ENCODER,
    **{
        method: _SEGMENT | {name: _DECODER[name] for name in names.split()}
        for method, names in {
            "unet": "decoder_use_norm decoder_channels decoder_attention_type decoder_interpolation",
            "upernet": "decoder_use_norm decoder_channels upsampling",
            "pspnet": "decoder_use_norm psp_out_channels psp_dropout upsampling",
            "deeplabv3plus": "decoder_channels upsampling encoder_output_stride decoder_atrous_rates "
            "decoder_aspp_separable decoder_aspp_dropout",
        }.items()
    },
}  # fmt: skip


# Options that no network can refuse, and from where to where; a row with others is tried on four images by the plan.
_ANY = (0.0, math.inf)
PLAIN = {"batch_size": (2, math.inf), "mask_ratio": (0.1, 0.9), "epsilon": (1, 1e4), "delta": (1e-9, 0.1)}
PLAIN |= dict.fromkeys(("noise_multiplier", "max_grad_norm"), (0.01, 100))
PLAIN |= dict.fromkeys(("lr", "weight_decay", "warmup", "momentum", "queue_size", "n_local"), _ANY)
PLAIN |= dict.fromkeys(("dropout", "drop_path", "label_smoothing", "mixup", "distill", "minmax"), _ANY)
_TREATED = ("privacy", "dropout", "drop_path")  # plain for these families, others lack what it needs
_FAMILIES = {"mae": "vit_", "dino": "vit_", "moco": "vit_", "simmim": "vit_|swin_"}
_FAMILIES |= dict.fromkeys(SEGMENTERS, r"(?!.*_(32|64)$)")  # those of the book are no encoders of theirs


@functools.cache
def _get_adapter(method: str, option: str) -> TypeAdapter:
    return TypeAdapter((FIT_OPTIONS | METHOD_OPTIONS[method])[option])


def is_plain(row: Row) -> bool:
    """Whether a row needs no trial: its network is a usual one, and its options fit every one of these."""
    options = {key: value for key, value in row.options.items() if key not in ("checkpoints", "precision", "privacy")}
    options |= row.options.get("privacy", {})
    treated = any(key in row.options for key in _TREATED)
    fits = row.arch in ARCHS and (not treated or row.arch.startswith(("vit_", "mobilenet")))
    return fits and all(key in PLAIN and PLAIN[key][0] <= value <= PLAIN[key][1] for key, value in options.items())


def find_wrong_option(row: Row) -> str | None:
    """Say which option of a row its method does not take, or not with this value."""
    known, options = FIT_OPTIONS | METHOD_OPTIONS[row.method], row.options
    for key, value in options.items():
        if key not in known:
            return f"options: {row.method} takes no {key!r}{suggest(key, known)}"
        try:
            _get_adapter(row.method, key).validate_python(value, strict=True)
        except ValidationError as error:
            where = ": ".join(["options", key, *map(str, error.errors()[0]["loc"])])
            return f"{where}: {explain(error)}"
    if row.arch in ARCHS and not re.match(_FAMILIES.get(row.method, ""), row.arch):
        return f"arch: {row.method} does not fit {row.arch}"
    dim, heads = options.get("decoder_dim", 64), options.get("decoder_heads", 4)
    if row.method == "mae" and dim % math.lcm(heads, 4):
        return f"options: decoder_dim: expected a multiple of 4 and of decoder_heads ({heads}), got {dim}"
    if late := [epoch for epoch in options.get("checkpoints", []) if epoch > row.epochs]:
        return f"options: checkpoints: expected epochs up to {row.epochs}, got {late[0]}"
    batch = min(options.get("batch_size", 64), row.n_train)
    if batch % (parts := options.get("bn_splits", 1)):
        return f"options: bn_splits: expected a divisor of the batch ({batch} images), got {parts}"
    if batch < 2 and row.method in ("simclr", "moco"):
        return f"options: batch_size: {row.method} compares the images of a batch, expected at least 2, got {batch}"
    if "queue_size" in known and (size := options.get("queue_size", 64)) > row.n_train // 2:
        return f"options: queue_size: expected up to half of n_train, got {size}"
    if row.method in SEGMENTERS and row.augmentation not in ("none", "flip") and "crop" not in row.augmentation:
        return f"augmentation: expected none, flip, or a crop for {row.method}, got {row.augmentation!r}"
    if len(both := [key for key in ("privacy", "mixup", "distill", "minmax") if options.get(key)]) > 1:
        return f"options: expected one of privacy, mixup, distill, minmax, got {' and '.join(both)}"
    return None


def find_wrong_defense(row: Row) -> str | None:
    """Say what is wrong with a row's defense: options that are missing, out of range, or of another method."""
    name, options, segments, method = row.defense, row.options, row.method in SEGMENTERS, f"got method {row.method!r}"
    option, privacy = STRENGTHS[name], options.get("privacy")
    sizes = privacy.keys() & {"epsilon", "noise_multiplier"} if isinstance(privacy, dict) else ()
    if privacy is not None and options.get("precision", PRECISIONS[0]) != PRECISIONS[0]:
        return f"options: precision: private training needs {PRECISIONS[0]}, got {options['precision']!r}"
    if privacy is not None and name != "dp-sgd":
        return f"defense: expected dp-sgd for a row with options: privacy, got {name!r}"
    if name in ("scsr", "crop-mixup") and not row.augmentation.startswith("crop"):
        return f"augmentation: expected crop:LOW-HIGH for defense {name}, got {row.augmentation!r}"
    if name in ("label-smoothing", "crop-mixup", "distillation", "min-max") and not segments:
        return f"defense: {name} fits segmenters ({', '.join(SEGMENTERS)}), {method}"
    if name == "drop-path" and segments:
        return f"defense: drop-path fits encoders, {method}"
    if name == "dp-sgd" and row.method not in PRIVATE_METHODS:
        return f"defense: dp-sgd fits {', '.join(PRIVATE_METHODS)} (others couple images), {method}"
    if name == "dp-sgd" and len(sizes) != 1:
        return f"options: privacy: expected epsilon or noise_multiplier, and delta, max_grad_norm, got {privacy!r}"
    if option and option not in options:
        return f"options: {option}: defense {name} expects a number of at least 0, got None"
    return None


def explain(error: ValidationError) -> str:
    """Return the first complaint of pydantic as "expected ..., got ..."."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
    message = "no such key" if first["type"] == "extra_forbidden" else message
    return f"expected {message}, got {shorten(first['input'])}"


def find_close(key: object, known: Iterable[str], n: int = 1) -> list[str]:
    """Return the ``n`` known names that look most like a key."""
    return difflib.get_close_matches(str(key), [*known], n=n, cutoff=0.4 if n > 1 else 0.6)


def suggest(key: object, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)", or what is known."""
    close = find_close(key, known)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def reject(key: object, known: Iterable[str]) -> str:
    """Return "unknown key ..." with what is known."""
    return f"unknown key {key!r}{suggest(key, known)}"


def shorten(value: object, limit: int = 60) -> str:
    """Return how a value is written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
