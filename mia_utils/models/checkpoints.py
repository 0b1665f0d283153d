"""Checkpoints as people have them: read tensors only, find the encoder in them, say what was read or assumed.

No code of a file is ever run. What its keys mean is told in ``layouts``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

READ, ASSUMED, GIVEN = "read", "assumed", "given"


class Facts(dict):
    """What is known of a model: fact -> (value, ``"read"``, ``"assumed"`` or ``"given"``); prints as a table."""

    def add(self, fact: str, value: Any, source: str) -> None:
        """Note one fact, or replace it."""
        self[fact] = (str(value), source)

    @property
    def assumed(self) -> list[str]:
        """Lines of what was neither read nor given: a wrong one changes every score."""
        return [f"{fact}: {value}" for fact, (value, source) in self.items() if source == ASSUMED]

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{fact:<{width}}  {source:<7}  {value}" for fact, (value, source) in self.items())


@dataclass
class Checkpoint:
    """A file or folder as read: ``tensors`` under dotted names, the safetensors ``header``, the ``config`` and
    ``preprocessor`` JSON of a folder, and ``settings`` stored beside the weights (training arguments)."""

    name: str
    tensors: dict[str, Tensor]
    header: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Checkpoint:
    """Read a ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` file, an index of shards, or a folder of these.

    A file that is missing, damaged or holds more than tensors raises one line with the way out.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.name.endswith(".index.json"):
        named = _read_json(path).get("weight_map")
        shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
        if not shards or any(Path(shard).name != shard or shard.endswith(".index.json") for shard in shards):
            raise ValueError(f"{path.name} names no shards in its own folder: expected weight_map, name -> file")
        parts = [read(path.parent / shard) for shard in shards]
        return Checkpoint(path.name, {key: value for part in parts for key, value in part.tensors.items()})
    if path.suffix == ".safetensors":
        tensors, header = read_safetensors(path)
        return Checkpoint(path.name, tensors, header)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, value in _flatten(_read_pickle(path)):
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            settings[name] = value
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors: expected a state_dict")
    return Checkpoint(path.name, tensors, settings=settings)


_FOLDER = (
    "encoder.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip


def _read_folder(path: Path) -> Checkpoint:
    """Read an artifact, a checkpoint of transformers or timm with its config.json, or sharded files."""
    found = next((path / name for name in _FOLDER if (path / name).is_file()), None)
    if found is None:
        others = sorted(p for pattern in ("*.safetensors", "*.pth", "*.pt", "*.bin") for p in path.glob(pattern))
        if len(others) != 1:
            names = ", ".join(p.name for p in others[:4]) or "none"
            raise FileNotFoundError(f"no weights file in {path}: expected {_FOLDER[0]} or {_FOLDER[1]}, found {names}")
        found = others[0]
    checkpoint = read(found)
    checkpoint.name = path.name
    for attribute, name in (("config", "config.json"), ("preprocessor", "preprocessor_config.json")):
        if (path / name).is_file():
            setattr(checkpoint, attribute, _read_json(path / name))
    return checkpoint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is no readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the header of one file."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is no readable safetensors file ({error})") from None


def _read_pickle(path: Path) -> Any:
    """Read a released checkpoint: tensors and plain values, argparse.Namespace allowed, nothing else."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist()):
                raise ValueError(
                    f"{path.name} is a TorchScript archive: refused, only tensors are read and no code is run; if you "
                    f"trust it: model = torch.jit.load({path.name!r}), then encoders.wrap(model, size=...)"
                )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ValueError(f"{path.name} can't be read: refused, only tensors are read and no code is run") from None
        raise ValueError(
            f"{path.name} holds {found.group(1)}: refused, only tensors are read and no code is run; if you trust it, "
            "save its model.state_dict() with torch.save and open that, or use encoders.wrap(model, size=...)"
        ) from None


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Walk nested dicts and Namespaces: yields (dotted name, tensor or plain value)."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else str(key))


# ------------------------------------------------------------------------------------------ which encoder of a file

# role -> how people name it; which one the method hands on, first to last. MoCo hands on the one that gets gradients.
ROLES: dict[str, str] = {
    "ema": r"(^|[._])(ema|averaged)([._]|$)",
    "teacher": r"teacher",
    "online": r"online",
    "target": r"target",
    "momentum": r"momentum|encoder_k|key_encoder|encoder_key",
    "student": r"student|base_encoder|encoder_q|query_encoder|encoder_query",
}
_ORDER = ("ema", "teacher", "online", "target", "", "student", "momentum")
_ASKED = {  # what ``weights=`` may say beside "auto" and a key
    "ema": ("ema", "teacher", "target", "momentum"),
    "teacher": ("teacher", "target", "momentum", "ema"),
    "student": ("student", "online", ""),
}


def _tell_role(prefix: str) -> str:
    return next((role for role, pattern in ROLES.items() if re.search(pattern, prefix)), "")


def pick(checkpoint: Checkpoint, prefixes: list[str], weights: str, facts: Facts) -> tuple[str, dict]:
    """Take one of the encoders that a file holds.

    Args:
        checkpoint: the file; the part that was taken is noted in ``facts``.
        prefixes: where an encoder begins in its names, for example ``"student.backbone."``.
        weights: ``"auto"`` (what the method hands on: EMA, teacher, target encoder; of MoCo the trained one),
            ``"ema"``, ``"teacher"``, ``"student"``, or the beginning of a name.

    Returns:
        The prefix of the one taken, and its tensors as float32 under names without it.
    """
    shown = {prefix: prefix.rstrip(".") or "the file itself" for prefix in prefixes}
    asked = [p for p in prefixes if p == weights or p.startswith(weights.rstrip(".") + ".")]
    if weights == "auto":
        asked = prefixes
    order = _ORDER if weights == "auto" or asked else _ASKED.get(weights, ())
    if not asked and order:
        asked = prefixes
    ranked = [[p for p in asked if _tell_role(p) == role] for role in order]
    best = next((group for group in ranked if group), [])
    there = ", ".join(shown.values())
    if not best:
        raise ValueError(f"{checkpoint.name} holds no weights {weights!r}: expected auto, or one of {there}")
    if len(best) > 1:
        raise ValueError(f"{checkpoint.name} holds {len(best)} encoders ({there}): give weights= one of them")
    prefix = best[0]
    others = [p for p in prefixes if p != prefix]
    note = f" (also there: {', '.join(shown[p] for p in others)})" if others else ""
    source = GIVEN if weights != "auto" else ASSUMED if others else READ
    facts.add("weights", f"{_tell_role(prefix) or 'encoder'} at {shown[prefix]}{note}", source)
    state = {}
    for key, value in checkpoint.tensors.items():
        inner_of_other = any(len(p) > len(prefix) and key.startswith(p) for p in others)
        if key.startswith(prefix) and not inner_of_other:
            state[key[len(prefix) :]] = value
    kinds = sorted({str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point()})
    if kinds != ["float32"]:
        facts.add("precision", f"{', '.join(kinds)}, computed in float32", READ)
    return prefix, {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
