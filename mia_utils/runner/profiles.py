"""Profiles: which models are trained on which data, and what the notebooks are run with.

A profile is one file ``profiles/<name>.yaml``; every trained model is one row of its ``models:``. Nothing here
imports torch, so that ``--plan`` and every complaint about a profile come at once.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator
from typing_extensions import TypedDict

from mia_utils import paths
from mia_utils.runner import choices
from mia_utils.runner.choices import CONTRASTIVE, PRECISIONS, PRIVATE_METHODS, SEGMENTERS, STRENGTHS, Count

__all__ = ["CONTRASTIVE", "PRECISIONS", "PRIVATE_METHODS", "SEGMENTERS", "STRENGTHS", "Profile", "Row", "load", "parse"]


def _check_size(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if all(type(side) is int and 0 < side < 10_000 for side in sides):
        return value
    raise ValueError("expected a number of pixels or [height, width]")


class DataArguments(TypedDict, total=False):
    """Arguments of ``datasets.load``."""

    __pydantic_config__ = choices.STRICT
    size: Annotated[Any, AfterValidator(_check_size)]
    n: Count
    seed: Annotated[int, Field(ge=0)]
    stream: bool


class SplitArguments(TypedDict, total=False):
    """Arguments of ``splits.draw`` (number of members and seed are the row's)."""

    __pydantic_config__ = choices.STRICT
    n_nonmembers: Count
    n_shadow_members: Annotated[int, Field(ge=0)]
    n_shadow_nonmembers: Annotated[int, Field(ge=0)]
    rule: Literal["iid", "official"]


class Row(BaseModel):
    """One trained model.

    Attributes:
        role: ``target``, ``shadow`` or ``reference``; a target and its shadow share the split (n_train and seed).
        study: which question asks for the row: ``main`` rows are attacked throughout the book, others by one notebook.
            No part of what the model is.
        n_train: number of members, the only images the model is trained on.
        defense: what it is trained with against membership inference, a key of ``STRENGTHS``.
    """

    model_config = choices.STRICT
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    role: Literal["target", "shadow", "reference"]
    method: Literal[choices.METHODS]
    arch: str
    dataset: str
    n_train: int = Field(gt=1)
    epochs: int = Field(gt=0)
    augmentation: str = "none"
    defense: Literal[choices.DEFENSES] = "none"
    seed: int = Field(default=0, ge=0)
    study: str = "main"
    options: dict[str, Any] = {}

    @property
    def strength(self) -> float | str:
        """How strong the defense is: a number (epsilon, weight decay ...), ``"0.2-0.6"`` for scsr, ``""`` for none."""
        if self.defense == "scsr":
            return self.augmentation.removeprefix("crop:")
        value = self.options.get(STRENGTHS[self.defense], "")
        if isinstance(value, dict):  # privacy
            return float(value["epsilon"]) if "epsilon" in value else f"sigma {value.get('noise_multiplier'):g}"
        return value if value == "" else float(value)

    @field_validator("augmentation")
    @classmethod
    def _check_augmentation(cls, value: str) -> str:
        match = re.fullmatch(r"crop:(\d*\.?\d+)-(\d*\.?\d+)", value, re.ASCII)
        if value in choices.AUGMENTATIONS or (match and 0 < float(match[1]) <= float(match[2]) <= 1):
            return value
        raise ValueError(
            f"expected one of {', '.join(choices.AUGMENTATIONS)} or crop:LOW-HIGH with 0 < LOW <= HIGH <= 1"
        )


class Profile(BaseModel):
    """What one run trains and executes; ``profiles/quick.yaml`` has every key with a comment.

    Attributes:
        first: model that is trained before all others, so that notebook 00 can start.
        train_jobs: pack all rows into at most this many processes; ``None`` gives each row a process of its own.
        splits: what differs from ``split`` for single data sets, data set -> argument -> value.
        models: the rows, complete: ``defaults:`` of the file is filled in (see ``parse``).
        notebooks: parameter overrides, notebook name -> parameter -> value.
        needs: rows that a notebook waits for, notebook name -> row field -> accepted values; not named: all rows
            (notebook 00: ``first`` only).
        gpu_tflops: for a GPU: 1e12 operations a second that it is assumed to do (bfloat16, training), for ``--plan``.
    """

    model_config = choices.STRICT
    name: str
    first: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    threads: int = Field(default=1, gt=0, le=1024)
    workers: int = Field(default=2, gt=0, le=1024)
    train_jobs: int | None = Field(default=None, gt=0)
    datasets: dict[str, DataArguments] = {}
    split: SplitArguments = {}
    splits: dict[str, SplitArguments] = {}
    models: list[Row] = []
    notebooks: dict[str, dict[str, Any]] = {}
    needs: dict[str, dict[str, list[str | int]]] = {}
    notebook_seconds: dict[str, choices.Weight] = {}
    gpu_tflops: float | None = Field(default=None, gt=0)

    def row(self, model_id: str) -> Row:
        """Return the row of a model; the error for an unknown one lists close matches."""
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
    """Read and check ``profiles/<name>.yaml``; a wrong entry is a ValueError of one line: file, section, key."""
    names = list_names()
    if name not in names:
        raise ValueError(f"unknown profile {name!r}: expected one of {', '.join(names)}")
    source = f"profiles/{name}.yaml"
    try:
        text = (find_source("profiles") / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: expected text in UTF-8, got {error}") from None
    return parse(text, source=source, name=name)


def parse(text: str, *, source: str, name: str | None = None) -> Profile:
    """Check the text of a profile; a wrong entry is a ValueError of one line ``<source>: <section>: <key>: ...``.

    ``defaults:`` holds fields that every row inherits, and under the name of a method fields of that method's rows; the
    nearest wins, ``options`` as a whole. A row is complete afterwards: what a model is does not depend on how it was
    written. ``name`` is the name that the profile must carry.
    """
    values: Any = None
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
        if not isinstance(values, dict):
            raise ValueError(f"expected keys such as models: and seeds:, got {type(values).__name__}")
        _fill_rows(values)
        profile = Profile.model_validate(values)
        _check_whole(profile, name)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ValueError(f"{source}:{line} {' '.join(problem.split())}") from None
    except RecursionError:
        raise ValueError(f"{source}: expected at most a few levels of nesting, got hundreds") from None
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, values)}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    return profile


def _fill_rows(values: dict) -> None:
    """Write ``defaults:`` into the rows."""
    defaults, rows = values.pop("defaults", {}), values.get("models")
    if not isinstance(defaults, dict):
        raise ValueError(f"defaults: expected fields of rows, got {choices.shorten(defaults)}")
    inner = {f"defaults: {key}": value for key, value in defaults.items() if key in choices.METHODS}
    for section, fields in {"defaults": defaults, **inner}.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{section}: expected fields of rows, got {choices.shorten(fields)}")
        for key in fields:
            if key not in Row.model_fields and not (section == "defaults" and key in choices.METHODS):
                raise ValueError(f"{section}: unknown key {key!r}{choices.suggest(key, Row.model_fields)}")
    shared = {key: value for key, value in defaults.items() if key not in choices.METHODS}
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, dict):
            method = row.get("method", shared.get("method"))
            rows[i] = {**shared, **(defaults.get(method, {}) if method in choices.METHODS else {}), **row}


def _check_whole(profile: Profile, name: str | None) -> None:
    """Check what concerns several entries at once: names, references, options, and that the data suffices."""
    if name is not None and profile.name != name:
        raise ValueError(f"name: expected {name!r} (the file's name), got {profile.name!r}")
    seen: set[str] = set()
    for row in profile.models:
        if row.id in seen:
            raise ValueError(f"models: two rows have the id {row.id!r}; give each its own")
        seen.add(row.id)
        if row.dataset not in profile.datasets:
            known = ", ".join(profile.datasets) or "none"
            raise ValueError(f"models: {row.id}: dataset: expected one of datasets: ({known}), got {row.dataset!r}")
        _check_enough_images(profile, row)
        if problem := choices.find_wrong_defense(row) or choices.find_wrong_option(row):
            raise ValueError(f"models: {row.id}: {problem}")
    if unknown := [dataset for dataset in profile.splits if dataset not in profile.datasets]:
        raise ValueError(f"splits: unknown data set {unknown[0]!r}{choices.suggest(unknown[0], profile.datasets)}")
    if profile.first is not None and profile.first not in seen:
        raise ValueError(f"first: no model has the id {profile.first!r}")
    for notebook, wanted in profile.needs.items():
        if unknown := [key for key in wanted if key not in Row.model_fields]:
            raise ValueError(
                f"needs: {notebook}: unknown key {unknown[0]!r}{choices.suggest(unknown[0], Row.model_fields)}"
            )
        if lost := [model_id for model_id in wanted.get("id", []) if model_id not in seen]:
            raise ValueError(f"needs: {notebook}: no model has the id {lost[0]!r}")


def _check_enough_images(profile: Profile, row: Row) -> None:
    """Refuse a split that the named number of images cannot fill (sizes fixed in the profile only)."""
    available, split = profile.datasets[row.dataset].get("n"), profile.get_split(row.dataset)
    needed = row.n_train + split.get("n_nonmembers", 3000)
    needed += split.get("n_shadow_members", row.n_train) + split.get("n_shadow_nonmembers", 0)
    if available is not None and needed > available:
        raise ValueError(
            f"datasets: {row.dataset}: n: model {row.id} needs {needed} images "
            f"(members, non-members and their shadow's), got {available}"
        )


def _describe(error: ValidationError, values: dict) -> str:
    """Turn pydantic's first complaint into one line with section, key, expectation and what came."""
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "[key]"]
    names = [str(part) for part in where]
    if len(where) > 1 and where[0] == "models" and isinstance(where[1], int):
        row = values["models"][where[1]]
        names[1] = str(row["id"]) if isinstance(row, dict) and row.get("id") else f"row {where[1] + 1}"
    kind, section = first["type"], "".join(f"{name}: " for name in names[:-1])
    if kind == "extra_forbidden":
        owners = {"models": Row.model_fields, "datasets": DataArguments.__annotations__}
        owners |= dict.fromkeys(("split", "splits"), SplitArguments.__annotations__)
        known = owners.get(where[0], Profile.model_fields)
        return f"{section}unknown key {names[-1]!r}{choices.suggest(names[-1], known)}"
    if kind == "missing":
        return f"{section}key {names[-1]!r} is missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{': '.join(names)[:120]}: {message}, got {choices.shorten(first['input'])}"


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (a few lines of them make gigabytes), keys given twice, or numbers without an end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*) are refused: use defaults:", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            problem = "a key must be text or a number" if not isinstance(key, yaml.ScalarNode) else None
            if problem is None and key.value in seen:
                problem = f"key {choices.shorten(key.value)} is given twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        plain = node.tag.endswith(":int")
        try:
            value = self.construct_yaml_int(node) if plain else self.construct_yaml_float(node)
            if abs(value) < 2**63:  # not so for infinity, NaN and 10^400
                return value
        except (ValueError, OverflowError):
            pass
        problem = f"expected a finite number, got {choices.shorten(node.value)}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
# 1e-3 is a number (YAML 1.1 makes it text)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
