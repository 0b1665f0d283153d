"""What a row may say: methods, defenses, and the options of each method with type and range."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from mia_utils.runner.profiles import Row

METHODS = ("mae", "simmim", "dino", "moco", "moco-v1", "moco-v2", "simclr", "supervised")
SEGMENTERS = ("unet", "upernet", "pspnet", "deeplabv3plus")  # their arch is the encoder
METHODS += SEGMENTERS
CONTRASTIVE = ("dino", "moco", "moco-v1", "moco-v2", "simclr")  # they compare views of an image, which are crops
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
DEFENSES = tuple(STRENGTHS)
PRIVATE_METHODS = ("mae", "simmim", "unet")  # whose per-example gradients are exact; others are refused

# Options of a row: keyword arguments of pretrain.fit, of a method's class and, for segmenters, of the network.
# Written down so that a plan needs no torch; a test compares the names with the signatures.
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
FIT_OPTIONS = {"batch_size": Count, "lr": Rate, "weight_decay": Weight, "warmup": Share}
FIT_OPTIONS |= {"checkpoints": list[Annotated[int, Field(ge=0)]], "precision": str, "privacy": dict}
_ENCODER = {"dropout": Share, "drop_path": Share, "input_size": Count}
_MASKED = _ENCODER | {"mask_ratio": Annotated[float, Field(gt=0, lt=1)], "mean": list[float], "std": list[float]}
_CONTRAST = _ENCODER | {"temperature": Rate, "momentum": Annotated[float, Field(ge=0, le=1)], "output_dim": Count}
_SEGMENT = {"dropout": Share, "label_smoothing": Share, "mixup": Weight, "distill": Weight, "minmax": Weight}
_SEGMENT |= {"norm": Literal["batch", "group"], "encoder_depth": Any}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "mae": _MASKED | dict.fromkeys(("decoder_dim", "decoder_depth", "decoder_heads"), Count) | {"norm_pix_loss": bool},
    "simmim": _MASKED,
    "dino": {key: value for key, value in _CONTRAST.items() if key != "temperature"}
    | {"n_local": Annotated[int, Field(ge=0)], "teacher_temperature": Rate, "student_temperature": Rate}
    | {"hidden_dim": Count, "bottleneck_dim": Count},
    "moco": _CONTRAST | {"hidden_dim": Count},
    "moco-v1": _CONTRAST | {"queue_size": Count, "bn_splits": Count},
    "moco-v2": _CONTRAST | {"queue_size": Count, "bn_splits": Count},
    "simclr": {key: value for key, value in _CONTRAST.items() if key != "momentum"} | {"hidden_dim": Count},
    "supervised": _ENCODER,
    **{
        method: _SEGMENT | dict.fromkeys(names.split(), Any)  # the library checks their values
        for method, names in {
            "unet": "decoder_use_norm decoder_channels decoder_attention_type decoder_interpolation",
            "upernet": "decoder_use_norm decoder_channels upsampling",
            "pspnet": "decoder_use_norm psp_out_channels psp_dropout upsampling",
            "deeplabv3plus": "decoder_channels upsampling encoder_output_stride decoder_atrous_rates "
            "decoder_aspp_separable decoder_aspp_dropout",
        }.items()
    },
}  # fmt: skip
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)  # unknown keys and wrong types are errors


def find_wrong_option(row: Row) -> str | None:
    """Say which option of a row its method does not take, or not with this value."""
    known = FIT_OPTIONS | METHOD_OPTIONS[row.method]
    for key, value in row.options.items():
        if key not in known:
            return f"options: {row.method} takes no {key!r}{suggest(key, known)}"
        try:
            TypeAdapter(known[key]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Input should be ")
            return f"options: {key}: expected {message}, got {shorten(value)}"
    if late := [epoch for epoch in row.options.get("checkpoints", []) if epoch > row.epochs]:
        return f"options: checkpoints: expected epochs up to {row.epochs}, got {late[0]}"
    if row.options.get("queue_size", 0) > row.n_train // 2:
        return f"options: queue_size: expected up to half of n_train, got {row.options['queue_size']}"
    return None


def find_wrong_defense(row: Row) -> str | None:
    """Say what is wrong with a row's defense: options that are missing, out of range, or of another method."""
    option, segments = STRENGTHS[row.defense], row.method in SEGMENTERS
    precision = row.options.get("precision", PRECISIONS[0])
    if precision not in PRECISIONS:
        return f"options: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}"
    if "privacy" in row.options and precision != PRECISIONS[0]:
        return f"options: precision: private training needs {PRECISIONS[0]}, got {precision!r}"
    if "privacy" in row.options and row.defense != "dp-sgd":
        return f"defense: expected dp-sgd for a row with options: privacy, got {row.defense!r}"
    if row.defense in ("scsr", "crop-mixup") and not row.augmentation.startswith("crop"):
        return f"augmentation: expected crop:LOW-HIGH for defense {row.defense}, got {row.augmentation!r}"
    if row.defense in ("label-smoothing", "crop-mixup", "distillation", "min-max") and not segments:
        return f"defense: {row.defense} fits segmenters ({', '.join(SEGMENTERS)}), got method {row.method!r}"
    if row.defense == "drop-path" and segments:
        return f"defense: drop-path fits encoders, got method {row.method!r}"
    if option is None:
        return None
    if option != "privacy":
        value = row.options.get(option)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            return f"options: {option}: defense {row.defense} expects a number of at least 0, got {value!r}"
        return None
    if row.method not in PRIVATE_METHODS:
        return f"defense: dp-sgd fits {', '.join(PRIVATE_METHODS)} (others couple images), got method {row.method!r}"
    known, privacy = ("epsilon", "noise_multiplier", "delta", "max_grad_norm"), row.options.get("privacy")
    if not isinstance(privacy, dict) or set(privacy) - set(known) or ("epsilon" in privacy) == (known[1] in privacy):
        return f"options: privacy: expected epsilon or noise_multiplier, and delta, max_grad_norm, got {privacy!r}"
    for key, value in privacy.items():
        least = value > 0 or (key == "noise_multiplier" and value == 0) if isinstance(value, (int, float)) else False
        if isinstance(value, bool) or not least:
            return f"options: privacy: {key}: expected a number above 0, got {value!r}"
    return None


def suggest(key: object, known: Any) -> str:
    """Return " (did you mean ...?)", or what is known."""
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def shorten(value: object, limit: int = 60) -> str:
    """Return how a value is written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
