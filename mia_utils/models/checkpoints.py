"""Checkpoints as people have them: read tensors only, take one encoder of them, say what was read or assumed.

No code of a file is ever run. What its keys mean is told in ``layouts``.
"""

import argparse
import json
import re
import warnings
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
    """A file or folder as read."""

    name: str
    tensors: dict[str, Tensor]  # under dotted names
    header: dict[str, str] = field(default_factory=dict)  # of safetensors
    config: dict[str, Any] = field(default_factory=dict)  # JSON of a folder
    settings: dict[str, Any] = field(default_factory=dict)  # beside the weights of a .pth: training arguments


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
        parts = [read(path.parent / shard).tensors for shard in shards]
        return Checkpoint(path.name, {key: value for part in parts for key, value in part.items()})
    if path.suffix == ".safetensors":
        return Checkpoint(path.name, *read_safetensors(path))
    values = dict(_flatten(_read_pickle(path)))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path.name} holds no tensors: expected a state_dict")
    return Checkpoint(path.name, tensors, settings={k: v for k, v in values.items() if k not in tensors})


_FOLDER = ["encoder.safetensors"]
_FOLDER += [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]


def _read_folder(path: Path) -> Checkpoint:
    """Read an artifact, a checkpoint of transformers or timm with its config.json, or sharded files."""
    found = [path / name for name in _FOLDER if (path / name).is_file()][:1]
    found = found or sorted(p for p in path.glob("*") if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:4]) or "none"
        raise FileNotFoundError(f"no weights file in {path}: expected {' or '.join(_FOLDER[:2])}, found {names}")
    checkpoint = read(found[0])
    checkpoint.name = path.name
    for name in ("preprocessor_config.json", "config.json"):
        if (path / name).is_file():
            checkpoint.config |= _read_json(path / name)
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
    refused = "refused, only tensors are read and no code is run"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        message = f"{path.name} can't be read: {refused}"
        if "TorchScript" in str(error):
            way = f"model = torch.jit.load({path.name!r}), then encoders.wrap(model, size=...)"
            message = f"{path.name} is a TorchScript archive: {refused}; if you trust it: {way}"
        elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            way = "save its model.state_dict() with torch.save and open that, or use encoders.wrap(model, size=...)"
            message = f"{path.name} holds {found[1]}: {refused}; if you trust it, {way}"
    raise ValueError(message)


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Walk nested dicts and Namespaces: yields (dotted name, tensor or plain value)."""
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else str(key))


# role -> how people name it
ROLES: dict[str, str] = {
    "ema": r"(^|[._])(ema|averaged)([._]|$)",
    "teacher": r"teacher",
    "online": r"online",
    "target": r"target",
    "momentum": r"momentum|encoder_k|key_encoder|encoder_key",
    "student": r"student|base_encoder|encoder_q|query_encoder|encoder_query",
}
_ORDERS = {  # weights= -> roles, best first; auto: what the method hands on, of MoCo the encoder that gets gradients
    "auto": ("ema", "teacher", "online", "target", "", "student", "momentum"),
    "ema": ("ema", "teacher", "target", "momentum"),
    "teacher": ("teacher", "target", "momentum", "ema"),
    "student": ("student", "online", ""),
}


def _tell_role(prefix: str) -> str:
    return next((role for role, pattern in ROLES.items() if re.search(pattern, prefix)), "")


def pick(checkpoint: Checkpoint, prefixes: list[str], weights: str, facts: Facts) -> tuple[str, dict[str, Tensor]]:
    """Take one of the encoders that begin at ``prefixes``; returns its prefix, and float32 tensors under names without.

    ``weights`` is a key of ``_ORDERS`` or the beginning of a name.
    """
    shown = {prefix: prefix.rstrip(".") or "the file itself" for prefix in prefixes}
    named = [p for p in prefixes if p == weights or p.startswith(weights.rstrip(".") + ".")]
    order = _ORDERS["auto"] if named else _ORDERS.get(weights, ())
    ranked = [[p for p in named or prefixes if _tell_role(p) == role] for role in order]
    best, there = next(filter(None, ranked), []), ", ".join(shown.values())
    if not best:
        raise ValueError(f"{checkpoint.name} holds no weights {weights!r}: expected auto, or one of {there}")
    if len(best) > 1:
        raise ValueError(f"{checkpoint.name} holds {len(best)} encoders ({there}): give weights= one of them")
    prefix, others = best[0], [p for p in prefixes if p != best[0]]
    note = f" (also there: {', '.join(shown[p] for p in others)})" if others else ""
    source = GIVEN if weights != "auto" else ASSUMED if others else READ
    facts.add("weights", f"{_tell_role(prefix) or 'encoder'} at {shown[prefix]}{note}", source)
    inner = tuple(p for p in others if len(p) > len(prefix))
    state = {k[len(prefix) :]: v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not (prefix + k).startswith(inner)}
    kinds = sorted({str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point()})
    if kinds != ["float32"]:
        facts.add("precision", f"{', '.join(kinds)}, computed in float32", READ)
    return prefix, {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
