"""Profiles: which models are trained on which data, and what the notebooks are run with.

A profile is one file ``profiles/<name>.yaml``; every trained model is one row of its ``models:``. Nothing here
imports torch, so that ``--plan`` and every complaint about a profile come at once.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mia_utils import paths

METHODS = ("mae", "simmim", "dino", "moco", "moco-v1", "moco-v2", "simclr", "supervised")
SEGMENTERS = ("unet", "upernet", "pspnet", "deeplabv3plus")  # their arch is the encoder
METHODS += SEGMENTERS
CONTRASTIVE = ("dino", "moco", "moco-v1", "moco-v2", "simclr")  # they compare views of a picture, which are crops
AUGMENTATIONS = ("none", "flip", "crop", "crop-weak", "simclr", "simclr-weak", "dino")
# Defenses a model is trained with, and the option that says how strong (scsr: the range of its crops). Early stopping
# has no row: it is a checkpoint of an undefended one. Defenses of the output have none either: defenses.perturb.
STRENGTHS = {
    "none": None,
    "scsr": None,
    "dp-sgd": "privacy",
    "weight-decay": "weight_decay",
    "dropout": "dropout",
    "drop-path": "drop_path",
    "label-smoothing": "label_smoothing",
    "crop-mixup": "mixup",
    "distillation": "distill",
    "min-max": "minmax",
}
DEFENSES = tuple(STRENGTHS)
PRIVATE_METHODS = ("mae", "simmim", "unet")  # whose per-example gradients are exact; others are refused

# Training images per second of one CPU thread with vit_micro_patch8_32, to tell a newcomer the minutes before they
# start. Measured seconds replace the estimate as soon as an artifact exists.
IMAGES_PER_SECOND = {
    "mae": 1400.0,
    "simmim": 700.0,
    "simclr": 350.0,
    "dino": 230.0,
    "moco": 350.0,
    "supervised": 1100.0,
}
IMAGES_PER_SECOND |= {"moco-v1": 450.0, "moco-v2": 450.0}
IMAGES_PER_SECOND |= {"unet": 110.0, "upernet": 55.0, "pspnet": 220.0, "deeplabv3plus": 110.0}  # at 32 x 32
# A private step measured against a plain one (vit_micro, batch 64: 4.1 to 4.9; unet, 96 x 128, batch 8: 2.7); with
# distillation there is a second network, the teacher.
PRIVATE_COST = {"mae": 4.5, "simmim": 4.5, "unet": 3.0}
DISTILL_COST = 2.0
# Cost of one image relative to vit_micro_patch8_32, and millions of parameters (weights on disk, per checkpoint).
ARCH_COST = {
    "vit_nano_patch8_32": (0.35, 0.12),
    "vit_micro_patch8_32": (1.0, 0.82),
    "vit_micro_patch4_32": (4.0, 0.82),
    "vit_micro_patch8_64": (4.0, 0.82),
    "resnet_thin_32": (1.4, 0.4),
    "swin_thin_32": (2.0, 0.5),
    "vit_small_patch8_32": (20.0, 21.4),
    "resnet18_32": (35.0, 11.2),
    "mobilenet_v2": (1.0, 6.6),
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Cost(NamedTuple):
    """What one image costs in one training step, all views, forward and backward.

    Attributes:
        gflop: 1e9 floating point operations (a multiplication and an addition are two).
        megabytes: values kept for the backward pass, in float32.
        trained, held: millions of parameters that are trained, and that are on the device (momentum twins too).
    """

    gflop: float
    megabytes: float
    trained: float
    held: float


# Counted on a CPU, and again by tests/test_plan.py. Encoders at their own size; segmenters for 64 x 128 pixels.
GPU_COST = {
    ("mae", "vit_small_patch8_32"): Cost(0.651, 1.62, 21.5, 21.5),
    ("simmim", "vit_small_patch8_32"): Cost(2.197, 5.10, 21.4, 21.5),
    ("dino", "vit_small_patch8_32"): Cost(7.125, 13.21, 21.6, 43.2),
    ("moco", "vit_small_patch8_32"): Cost(5.844, 10.19, 22.0, 43.9),
    ("moco-v2", "vit_small_patch8_32"): Cost(2.921, 5.07, 21.6, 43.2),
    ("simclr", "vit_small_patch8_32"): Cost(4.381, 10.13, 21.5, 21.5),
    ("simclr", "resnet18_32"): Cost(6.661, 9.43, 11.3, 11.3),
    ("moco-v2", "resnet18_32"): Cost(4.443, 4.73, 11.5, 23.0),
    ("mae", "vit_small_patch8_64"): Cost(2.237, 5.57, 21.5, 21.5),
    ("dino", "vit_small_patch8_64"): Cost(27.235, 49.00, 21.6, 43.3),
    ("moco", "vit_small_patch8_64"): Cost(22.838, 38.85, 22.0, 44.0),
    ("upernet", "resnet50"): Cost(4.762, 18.08, 25.7, 25.8),
    ("pspnet", "resnet50"): Cost(2.228, 12.79, 24.4, 24.4),
    ("deeplabv3plus", "resnet50"): Cost(14.965, 20.75, 26.7, 26.7),
}
SEGMENTER_PIXELS = 64 * 128
BATCH_SIZE, SEGMENTER_BATCH_SIZE = 64, 8  # of a row that names none: pretrain.METHODS
# What a GPU is assumed to do beside the rate of the profile (gpu_tflops, in bfloat16). Never measured.
STEP_SECONDS = 0.02  # launching the kernels of one step, however small the batch
FLOAT32_SHARE = 1 / 8  # of that rate in float32
HALF_SHARE = 0.55  # of the bytes kept for the backward pass in bf16-mixed: norms and sums stay float32
CONTEXT_GB = 0.7  # CUDA itself
PRIVATE_CHUNK_BYTES = 8e9  # per-example gradients held at a time on a GPU: pretrain.private
# Data sets as their caches hold them: images, height, width, bytes a pixel (a mask is the fourth).
DATA_SHAPES = {
    "cifar10": (60_000, 32, 32, 3),
    "cifar100": (60_000, 32, 32, 3),
    "stl10": (13_000, 96, 96, 3),
    "tiny_imagenet": (110_000, 64, 64, 3),
    "camvid": (701, 360, 480, 4),
    "oxford_pets": (7_349, 128, 128, 4),
    "cityscapes": (3_475, 128, 256, 4),
    "bdd100k": (8_000, 128, 256, 4),
    "mapillary": (20_000, 128, 256, 4),
}
START_SECONDS = 6.0  # imports of one process
CHECKPOINTS = 8  # kept along one training, the decoder and the resume state included


class _Strict(BaseModel):
    """Unknown keys and wrong types are errors, and nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Row(_Strict):
    """One trained model.

    Attributes:
        id: name of the model, unique in its profile.
        role: ``target``, ``shadow`` or ``reference``; a target and its shadow share the split (n_train and seed).
        study: which question asks for the row: ``main`` rows are attacked throughout the book, the others by the
            notebook of their study (``mim``, ``encodermi`` ...). No part of what the model is.
        n_train: number of members, the only images the model is trained on.
        defense: what it is trained with against membership inference, a key of ``STRENGTHS``; a shadow that an adaptive
            attacker trains has the same.
        options: keyword arguments of the training method.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    role: Literal["target", "shadow", "reference"]
    method: Literal[METHODS]
    arch: str
    dataset: str
    n_train: int = Field(gt=0)
    epochs: int = Field(gt=0)
    augmentation: str = "none"
    defense: Literal[DEFENSES] = "none"
    seed: int = Field(default=0, ge=0)
    study: str = "main"
    options: dict[str, Any] = {}

    @property
    def strength(self) -> float | str:
        """How strong the defense is: a number (epsilon, weight decay ...), ``"0.2-0.6"`` for scsr, ``""`` for none."""
        if self.defense == "scsr":
            return self.augmentation.removeprefix("crop:")
        option = STRENGTHS[self.defense]
        value = self.options.get(option, "") if option else ""
        if isinstance(value, dict):  # privacy
            sigma = value.get("noise_multiplier")
            return float(value["epsilon"]) if "epsilon" in value else f"sigma {sigma:g}"
        return value if value == "" else float(value)

    @field_validator("augmentation")
    @classmethod
    def _check_augmentation(cls, value: str) -> str:
        match = re.fullmatch(r"crop:(\d*\.?\d+)-(\d*\.?\d+)", value)
        if value in AUGMENTATIONS or (match and 0 < float(match[1]) <= float(match[2]) <= 1):
            return value
        raise ValueError(f"expected one of {', '.join(AUGMENTATIONS)} or crop:LOW-HIGH with 0 < LOW <= HIGH <= 1")


class Profile(_Strict):
    """What one run trains and executes; see ``profiles/quick.yaml`` for every key with a comment.

    Attributes:
        first: model that is trained before all others, so that notebook 00 can start.
        seeds: seeds of the main rows; notebooks average over them.
        threads: OMP threads of each job.
        workers: jobs side by side.
        train_jobs: pack all rows into at most this many processes; ``None`` gives each row a process of its own.
        datasets: arguments of ``datasets.load`` for each data set.
        split: arguments of ``splits.draw``.
        splits: what differs from them for single data sets, data set -> argument -> value.
        models: the rows.
        notebooks: parameter overrides, notebook name -> parameter -> value.
        needs: rows that a notebook waits for, notebook name -> row field -> accepted values; not named: all rows
            (notebook 00: ``first`` only).
        notebook_seconds: estimated seconds of the notebooks, until measured.
        gpu_tflops: of a profile that is meant for a GPU: 1e12 operations that it is assumed to do in a second, in
            bfloat16 and while training; ``--plan`` then estimates GPU hours and memory. ``None``: for CPUs.
    """

    name: str
    first: str | None = None
    seeds: list[int] = Field(default=[0], min_length=1)
    threads: int = Field(default=1, gt=0)
    workers: int = Field(default=2, gt=0)
    train_jobs: int | None = Field(default=None, gt=0)
    datasets: dict[str, dict[str, Any]] = {}
    split: dict[str, int] = {}
    splits: dict[str, dict[str, int | str]] = {}  # text: the rule of splits.draw
    models: list[Row] = []
    notebooks: dict[str, dict[str, Any]] = {}
    needs: dict[str, dict[str, list[str | int]]] = {}
    notebook_seconds: dict[str, float] = {}
    gpu_tflops: float | None = Field(default=None, gt=0)

    def row(self, model_id: str) -> Row:
        """Return the row of a model.

        Raises:
            ValueError: no such model; the message lists close matches.
        """
        for row in self.models:
            if row.id == model_id:
                return row
        ids = [row.id for row in self.models]
        close = difflib.get_close_matches(str(model_id), ids, n=3, cutoff=0.4) or ids[:3]
        raise ValueError(f"profile {self.name} has no model {model_id!r}; close: {', '.join(close) or 'it has none'}")

    def get_split(self, dataset: str) -> dict[str, int | str]:
        """Return the arguments of ``splits.draw`` for a data set (the number of members is the row's)."""
        return {**self.split, **self.splits.get(dataset, {})}

    def rows_needed(self, notebook: str) -> list[Row]:
        """Return the rows a notebook (``"03_partcrop"``) waits for."""
        wanted = self.needs.get(notebook)
        if wanted is None and notebook.startswith("00") and self.first:
            wanted = {"id": [self.first]}
        return [row for row in self.models if all(getattr(row, k) in v for k, v in (wanted or {}).items())]


def find_source(*parts: str) -> Path:
    """Return a file or folder of the project: in ``MIA_HOME`` when it has one, else in the checkout."""
    moved = paths.get_home().joinpath(*parts)
    return moved if moved.exists() else paths.PACKAGE_ROOT.joinpath(*parts)


def list_names() -> list[str]:
    """Return the names of all profiles, the built-in four in order of size first."""
    names = {path.stem for path in find_source("profiles").glob("*.yaml")}
    order = ["smoke", "quick", "photos", "paper"]
    return [n for n in order if n in names] + sorted(names - set(order))


def load(name: str) -> Profile:
    """Read and check ``profiles/<name>.yaml``.

    Args:
        name: profile name, for example ``"quick"``.

    Returns:
        Profile: frozen, every value checked.

    Raises:
        ValueError: unknown profile, or a wrong entry; one line naming file, section and key.
    """
    names = list_names()
    if name not in names:
        raise ValueError(f"unknown profile {name!r}: expected one of {', '.join(names)}")
    path = find_source("profiles") / f"{name}.yaml"
    return parse(path.read_text(encoding="utf-8"), source=f"profiles/{name}.yaml", name=name)


def parse(text: str, *, source: str, name: str | None = None) -> Profile:
    """Check the text of a profile.

    Args:
        text: YAML.
        source: file name for error messages.
        name: the name the profile must carry.

    Raises:
        ValueError: one line ``<file>: <section>.<key>: expected ..., got ...``.
    """
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ValueError(f"{source}:{line} {getattr(error, 'problem', None) or 'not YAML'}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected keys such as models: and seeds:, got {type(values).__name__}")
    try:
        profile = Profile.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, values)}") from None
    _check_whole(profile, source, name)
    return profile


def _check_whole(profile: Profile, source: str, name: str | None) -> None:
    """Check what concerns several entries at once: names, references, and that the data suffices."""
    if name is not None and profile.name != name:
        raise ValueError(f"{source}: name: expected {name!r} (the file's name), got {profile.name!r}")
    seen: set[str] = set()
    for row in profile.models:
        if row.id in seen:
            raise ValueError(f"{source}: models: two rows have the id {row.id!r}; give each its own")
        seen.add(row.id)
        if row.dataset not in profile.datasets:
            known = ", ".join(profile.datasets) or "none"
            raise ValueError(
                f"{source}: models: {row.id}: dataset: expected one of datasets: ({known}), got {row.dataset!r}"
            )
        _check_enough_images(profile, row, source)
        if problem := _find_wrong_defense(row):
            raise ValueError(f"{source}: models: {row.id}: {problem}")
    if profile.first is not None and profile.first not in seen:
        raise ValueError(f"{source}: first: no model has the id {profile.first!r}")
    for notebook, wanted in profile.needs.items():
        unknown = [key for key in wanted if key not in Row.model_fields]
        if unknown:
            raise ValueError(f"{source}: needs: {notebook}: unknown key {unknown[0]!r}{_suggest(unknown[0], Row)}")
        for model_id in wanted.get("id", []):
            if model_id not in seen:
                raise ValueError(f"{source}: needs: {notebook}: no model has the id {model_id!r}")


def _find_wrong_defense(row: Row) -> str | None:
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


def _check_enough_images(profile: Profile, row: Row, source: str) -> None:
    """Refuse a split that the named number of images cannot fill (sizes fixed in the profile only)."""
    available = profile.datasets[row.dataset].get("n")
    if not isinstance(available, int):
        return
    split = profile.get_split(row.dataset)
    needed = row.n_train + split.get("n_nonmembers", 3000)
    needed += split.get("n_shadow_members", row.n_train) + split.get("n_shadow_nonmembers", 0)
    if needed > available:
        raise ValueError(
            f"{source}: datasets: {row.dataset}: n: model {row.id} needs {needed} images "
            f"(members, strangers and their shadow's), got {available}"
        )


def _describe(error: ValidationError, values: dict) -> str:
    """Turn pydantic's first complaint into one line with section, key, expectation and what came."""
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "[key]"]
    names = [str(part) for part in where]
    if len(where) > 1 and where[0] == "models" and isinstance(where[1], int):
        row = values["models"][where[1]]
        names[1] = str(row["id"]) if isinstance(row, dict) and row.get("id") else f"row {where[1] + 1}"
    kind, section = first["type"], ": ".join(names[:-1])
    if kind == "extra_forbidden":
        owner = Row if where[0] == "models" else Profile
        section = f"{section}: " if section else ""
        return f"{section}unknown key {names[-1]!r}{_suggest(names[-1], owner)}"
    if kind == "missing":
        return f"{section + ': ' if section else ''}key {names[-1]!r} is missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{': '.join(names)}: {message}, got {first['input']!r}"


def _suggest(key: object, owner: type[BaseModel]) -> str:
    close = difflib.get_close_matches(str(key), list(owner.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(owner.model_fields)})"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads ``1e-3`` as a number (YAML 1.1 makes it text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


# --- notebooks and their parameters ---------------------------------------------------------------------------------


def find_notebooks() -> dict[str, Path]:
    """Return the numbered notebooks, ``{"00_start_here": path, ...}``, in order."""
    return {path.stem: path for path in sorted(find_source("notebooks").glob("[0-9][0-9]_*.ipynb"))}


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the defaults of a notebook's ``parameters`` cell without running it.

    Args:
        path: notebook file.

    Returns:
        dict: name -> default, in the order of the cell. Plain literals only (FACTS: papermill's own reader drops
        annotated lines and stumbles over ``#``).

    Raises:
        ValueError: no tagged cell, or a line that is not ``name = literal``.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"notebooks/{path.name}: expected one cell tagged 'parameters', got {len(tagged)}")
    defaults = {}
    for line in ast.parse("".join(tagged[0]["source"])).body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        try:
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            got = ast.unparse(line).splitlines()[0]
            raise ValueError(f"notebooks/{path.name}: parameters: expected name = literal, got {got!r}") from None
    return defaults


def merge_parameters(profile: Profile, notebook: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters a notebook is run with: its defaults, the profile's name and the profile's overrides.

    Args:
        profile: checked profile.
        notebook: ``"03_partcrop"``.
        defaults: of ``read_parameters``; they decide names and types.

    Raises:
        ValueError: a parameter the notebook does not have, another type, or a model the profile does not have.
    """
    section = f"profiles/{profile.name}.yaml: notebooks: {notebook}"
    merged = dict(defaults)
    if "profile" in defaults:
        merged["profile"] = profile.name
    for key, value in profile.notebooks.get(notebook, {}).items():
        if key not in defaults or key == "profile":
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(defaults)}"
            raise ValueError(f"{section}: unknown key {key!r} ({hint})")
        if not _same_type(defaults[key], value):
            raise ValueError(f"{section}: {key}: expected {_name_type(defaults[key])}, got {value!r}")
        merged[key] = value
    for key, value in merged.items():
        if key in ("model_id", "model_ids") or key.endswith(("_model_id", "_model_ids")):
            for model_id in value if isinstance(value, list) else [value] if value is not None else []:
                try:
                    profile.row(model_id)
                except ValueError as error:
                    raise ValueError(f"{section}: {key}: {error}") from None
    return merged


def _same_type(default: Any, value: Any) -> bool:
    """Whether a value may replace a default: same type, int for float, elements alike; ``None`` takes anything."""
    if default is None or value is None:
        return default is None
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, list) and isinstance(value, list):
        return all(any(_same_type(d, v) for d in default) for v in value) if default else True
    return type(default) is type(value)


def _name_type(default: Any) -> str:
    if isinstance(default, list) and default:
        return "a list of " + " or ".join(sorted({type(d).__name__ for d in default}))
    return {
        "int": "an int",
        "float": "a number",
        "str": "text",
        "bool": "true or false",
        "list": "a list",
        "dict": "a mapping",
    }.get(type(default).__name__, type(default).__name__)


# --- what it will cost ----------------------------------------------------------------------------------------------


def estimate_seconds(row: Row, profile: Profile | None = None) -> float:
    """Estimate the seconds of one CPU thread that a row's training takes (imports apart); of a GPU where the profile
    is meant for one.

    Encoders see pictures at their own size; a segmenter at the size that the profile loads them with.
    """
    if profile is not None and profile.gpu_tflops is not None:
        return estimate_gpu_seconds(row, profile)
    cost, _ = ARCH_COST.get(row.arch, (20.0, 20.0))
    if row.method in SEGMENTERS and profile is not None:
        height, width = _get_size(profile, row.dataset, default=32)
        cost *= height * width / 32**2
    if row.defense == "dp-sgd":
        cost *= PRIVATE_COST[row.method]
    elif row.defense in ("distillation", "min-max"):
        cost *= DISTILL_COST
    return row.n_train * row.epochs * cost / IMAGES_PER_SECOND[row.method]


def estimate_bytes(row: Row) -> float:
    """Estimate the bytes of a row's artifact: float32 weights times the checkpoints kept."""
    _, millions = ARCH_COST.get(row.arch, (20.0, 20.0))
    if (row.method, row.arch) in GPU_COST:
        millions = GPU_COST[row.method, row.arch].trained
    return millions * 1e6 * 4 * CHECKPOINTS


def estimate_gpu_seconds(row: Row, profile: Profile) -> float:
    """Estimate the seconds of one GPU that a row's training takes: arithmetic at the assumed rate, and its steps.

    NaN for a method on an architecture that is not in ``GPU_COST``.
    """
    cost, batch = _get_cost(row, profile), _get_batch(row)
    steps = row.epochs * max(row.n_train // batch, 1)
    images = steps * batch
    rate = profile.gpu_tflops * 1e12
    if row.defense == "dp-sgd":
        steps *= _count_private_parts(cost, batch)
        images *= PRIVATE_COST[row.method]
    elif row.defense == "distillation":
        steps, images = steps * DISTILL_COST, images * DISTILL_COST
    if row.options.get("precision", PRECISIONS[0]) == PRECISIONS[0]:
        rate *= FLOAT32_SHARE
    return steps * STEP_SECONDS + images * cost.gflop * 1e9 / rate


def estimate_gpu_bytes(row: Row, profile: Profile) -> float:
    """Estimate the peak memory of a GPU that trains a row, in bytes.

    Weights (4 bytes each, momentum twins too), gradients and AdamW (12 more where trained; 2 more for the copies of
    mixed precision), what the backward pass needs of a batch, the members as uint8 (unless streamed), and CUDA itself.
    NaN as above.
    """
    cost, batch = _get_cost(row, profile), _get_batch(row)
    height, width = _get_size(profile, row.dataset, default=32)
    private = PRIVATE_CHUNK_BYTES if row.defense == "dp-sgd" else 0.0
    if private:
        batch = -(-batch // _count_private_parts(cost, batch))
    mixed = row.options.get("precision", PRECISIONS[0]) != PRECISIONS[0]
    weights = 4e6 * cost.held + (14e6 if mixed else 12e6) * cost.trained
    kept = 1e6 * cost.megabytes * batch * (HALF_SHARE if mixed else 1.0)
    members = 0 if profile.datasets[row.dataset].get("stream") else row.n_train * height * width * 3
    return weights + kept + private + members + CONTEXT_GB * 1e9


def estimate_data_bytes(profile: Profile, dataset: str) -> float:
    """Estimate the bytes of a data set as it lies in its cache, and in memory; 0 where it is generated or a folder."""
    if dataset.partition("@")[0] not in DATA_SHAPES or profile.datasets[dataset].get("stream"):
        return 0.0
    n, _, _, per_pixel = DATA_SHAPES[dataset.partition("@")[0]]
    height, width = _get_size(profile, dataset)
    return profile.datasets[dataset].get("n", n) * height * width * per_pixel


def _get_cost(row: Row, profile: Profile) -> Cost:
    """Cost of one image, at the size and with the mask ratio that a row is trained with."""
    cost, scale = GPU_COST.get((row.method, row.arch), Cost(*[math.nan] * 4)), 1.0
    if row.method in SEGMENTERS:
        height, width = _get_size(profile, row.dataset, default=32)
        scale = height * width / SEGMENTER_PIXELS
    elif row.method == "mae":  # its encoder sees the patches that are not masked
        scale = (1 - row.options.get("mask_ratio", 0.75)) / 0.25
    return cost._replace(gflop=cost.gflop * scale, megabytes=cost.megabytes * scale)


def _get_batch(row: Row) -> int:
    default = SEGMENTER_BATCH_SIZE if row.method in SEGMENTERS else BATCH_SIZE
    return min(row.options.get("batch_size", default), row.n_train)


def _count_private_parts(cost: Cost, batch: int) -> int:
    """Parts that a private step is done in, so that their per-example gradients fit."""
    if math.isnan(cost.trained):
        return 1
    chunk = max(1, int(PRIVATE_CHUNK_BYTES / (4e6 * cost.trained)))
    return -(-batch // chunk)


def _get_size(profile: Profile, dataset: str, default: int | None = None) -> tuple[int, int]:
    """Height and width that a profile loads a data set with: as it says, else as the cache holds it."""
    known = DATA_SHAPES.get(dataset.partition("@")[0])
    size = profile.datasets[dataset].get("size") or (known[1:3] if known else default)
    return (size, size) if isinstance(size, int) else tuple(size)
