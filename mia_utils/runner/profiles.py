"""Profiles: which models are trained on which data, and what the notebooks are run with.

A profile is one file ``profiles/<name>.yaml``; every trained model is one row of its ``models:``. Nothing here
imports torch, so that ``--plan`` and every complaint about a profile come at once.
"""

import functools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from mia_utils import paths
from mia_utils.runner import choices
from mia_utils.runner.choices import STRENGTHS, Count

MOST_TEXT, MOST_SAID = 1_000_000, 400  # characters of a profile (paper has 12,000), and of a complaint about one


def _check_size(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if all(type(side) is int and 0 < side < 10_000 for side in sides):
        return value
    raise ValueError("expected a number of pixels or [height, width]")


def _check_augmentation(value: str) -> str:
    match = re.fullmatch(r"crop:(\d{0,20}\.?\d{1,20})-(\d{0,20}\.?\d{1,20})", value, re.ASCII)  # else quadratic
    if value in choices.AUGMENTATIONS or (match and 0 < float(match[1]) <= float(match[2]) <= 1):
        return value
    known = ", ".join(choices.AUGMENTATIONS)
    raise ValueError(f"expected one of {known} or crop:LOW-HIGH with 0 < LOW <= HIGH <= 1")


Whole = Annotated[int, Field(ge=0)]


class DataArguments(TypedDict, total=False):
    """Arguments of ``datasets.load``."""

    __pydantic_config__ = choices.STRICT
    size: Annotated[Any, AfterValidator(_check_size)]
    n: Annotated[int, Field(gt=0, le=100_000_000)]
    seed: Whole
    stream: bool


class SplitArguments(TypedDict, total=False):
    """Arguments of ``splits.draw`` (number of members and seed are the row's)."""

    __pydantic_config__ = choices.STRICT
    n_nonmembers: Count
    n_shadow_members: Whole
    n_shadow_nonmembers: Whole
    rule: Literal["iid", "official"]


class Row(BaseModel):
    """One trained model.

    Attributes:
        role: a target and its shadow share the split (n_train and seed).
        study: which question asks for the row: ``main`` rows are attacked throughout the book, others by one notebook.
        n_train: number of members, the only images the model is trained on.
    """

    model_config = choices.STRICT
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    role: Literal["target", "shadow", "reference"]
    method: Literal[choices.METHODS]
    arch: str
    dataset: str
    n_train: int = Field(gt=1)
    epochs: Count
    augmentation: Annotated[str, AfterValidator(_check_augmentation)] = "none"
    defense: Literal[tuple(STRENGTHS)] = "none"
    seed: Whole = 0
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


class Profile(BaseModel):
    """What one run trains and executes; ``profiles/quick.yaml`` has every key with a comment.

    Attributes:
        first: model that is trained before all others, so that notebook 00 can start.
        splits: what differs from ``split`` for single data sets, data set -> argument -> value.
        models: the rows, complete: ``defaults:`` of the file is filled in (see ``parse``).
        notebooks: parameter overrides, notebook name -> parameter -> value.
        needs: rows that a notebook waits for, notebook name -> row field -> accepted values; not named: all rows
            (notebook 00: ``first`` only).
        notebook_seconds: what each notebook takes on the reference machine of ``estimates``.
        gpu_tflops: for a GPU: 1e12 operations a second that it is assumed to do (bfloat16, training), for ``--plan``.
    """

    model_config = choices.STRICT
    name: str
    first: str | None = None
    seeds: list[Whole] = Field(default=[0], min_length=1)
    threads: int = Field(default=1, gt=0, le=1024)
    workers: int = Field(default=2, gt=0, le=1024)
    datasets: dict[str, DataArguments] = {}
    split: SplitArguments = {}
    splits: dict[str, SplitArguments] = {}
    models: list[Row] = []
    notebooks: dict[str, dict[str, Any]] = {}
    needs: dict[str, dict[Literal[tuple(Row.model_fields)], list[str | int]]] = {}
    notebook_seconds: dict[str, choices.Weight] = {}
    gpu_tflops: choices.Rate | None = None

    def row(self, model_id: str) -> Row:
        """Return the row of a model; the error for an unknown one lists close matches."""
        rows = {row.id: row for row in self.models}
        if model_id not in rows:
            close = choices.find_close(model_id, rows, n=3) or [*rows][:3] or ["it has none"]
            raise ValueError(f"profile {self.name} has no model {model_id!r}; close: {', '.join(close)}")
        return rows[model_id]

    def get_split(self, dataset: str) -> dict[str, int | str]:
        """Return the arguments of ``splits.draw`` for a data set (the number of members is the row's)."""
        return {**self.split, **self.splits.get(dataset, {})}

    def rows_needed(self, notebook: str) -> list[Row]:
        """Return the rows a notebook (``"03_partcrop"``) waits for."""
        first = {"id": [self.first]} if notebook.startswith("00") and self.first else {}
        wanted = self.needs.get(notebook, first)
        return [row for row in self.models if all(getattr(row, key) in values for key, values in wanted.items())]


def find_source(*parts: str) -> Path:
    """Return a file or folder of the project: in ``MIA_HOME`` when it has one, else in the checkout."""
    moved = paths.get_home().joinpath(*parts)
    return moved if moved.exists() else paths.PACKAGE_ROOT.joinpath(*parts)


def list_names() -> list[str]:
    """Return the names of all profiles, the built-in four in order of size first."""
    order = ["smoke", "quick", "photos", "paper"]
    names = {path.stem for path in find_source("profiles").glob("*.yaml") if path.is_file()}  # no pipe, no folder
    return sorted(names, key=lambda name: (order.index(name) if name in order else 4, name))


def load(name: str) -> Profile:
    """Read and check ``profiles/<name>.yaml``; a wrong entry is a ValueError of one line: file, section, key."""
    names, source = list_names(), f"profiles/{name}.yaml"
    if name not in names:
        raise ValueError(f"unknown profile {name!r}: expected one of {', '.join(names)}")
    try:
        return parse((find_source("profiles") / f"{name}.yaml").read_text("utf-8"), source=source, name=name)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: expected text in UTF-8, got {error}") from None


@functools.lru_cache(8)  # what reads 300 rows takes .15 s, and a replay reads them in every notebook
def parse(text: str, *, source: str, name: str | None = None) -> Profile:
    """Check the text of a profile, which must carry ``name``; a wrong entry is ``<source>: <section>: <key>: ...``.

    ``defaults:`` holds fields that every row inherits, and under the name of a method fields of that method's rows; the
    nearest wins, ``options`` as a whole. A row with ``seeds: N`` is N rows, ``<id>-s0`` and so on.
    """
    values: Any = None
    if len(text) > MOST_TEXT:
        raise ValueError(f"{source}: expected at most {MOST_TEXT:,} characters, got {len(text):,}")
    try:
        _refuse_structure(text)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
        if not isinstance(values, dict):
            raise ValueError(f"expected keys such as models: and seeds:, got {type(values).__name__}")
        _fill_rows(values)
        profile = Profile.model_validate(values)
        if problem := _find_wrong_name(profile, name or profile.name) or _find_wrong_row(profile):
            raise ValueError(problem)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        problem = " ".join((getattr(error, "problem", None) or "not YAML").split())
        raise ValueError(f"{source}:{f' line {where.line + 1}' if where else ''} {problem}"[:MOST_SAID]) from None
    except RecursionError:
        raise ValueError(f"{source}: expected at most a few levels of nesting, got hundreds") from None
    except ValidationError as error:
        raise ValueError(f"{source}: {_describe(error, values)}"[:MOST_SAID]) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}"[:MOST_SAID]) from None
    return profile


def _fill_rows(values: dict) -> None:
    """Write ``defaults:`` into the rows; what is wrong in them is found there."""
    defaults, rows = values.pop("defaults", {}), values.get("models")
    of_method = {key: defaults[key] for key in choices.METHODS if isinstance(defaults, dict) and key in defaults}
    for fields in (defaults, *of_method.values()):
        if not isinstance(fields, dict):
            raise ValueError(f"defaults: expected fields of rows, got {choices.shorten(fields)}")
    shared, filled = {key: value for key, value in defaults.items() if key not in of_method}, []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            row = shared | of_method.get(str(row.get("method", shared.get("method"))), {}) | row
        if not isinstance(row, dict) or "seeds" not in row:
            filled.append(row)
            continue
        if not (type(n := row.pop("seeds")) is int and 0 < n <= 1000):
            raise ValueError(f"models: {row.get('id')}: seeds: expected 1 to 1000 trainings, got {choices.shorten(n)}")
        filled += [row | {"id": f"{row.get('id')}-s{seed}", "seed": seed} for seed in range(n)]
    values |= {"models": filled} if isinstance(rows, list) else {}


def _find_wrong_name(profile: Profile, name: str) -> str | None:
    """Say which name in a profile refers to nothing, or stands twice."""
    ids = [row.id for row in profile.models]
    if profile.name != name:
        return f"name: expected {name!r} (the file's name), got {profile.name!r}"
    if twice := [model_id for model_id, count in Counter(ids).items() if count > 1]:
        return f"models: two rows have the id {twice[0]!r}; give each its own"
    if len(set(profile.seeds)) < len(profile.seeds):
        return f"seeds: expected different ones, got {profile.seeds}"
    for name, given in profile.datasets.items():
        if name.startswith("scenes") and not (type(size := given.get("size", 32)) is int and 16 <= size <= 512):
            return f"datasets: {name}: size: expected a number from 16 to 512, got {size}"
        if given.get("stream") and not name.startswith("folder:"):
            return f"datasets: {name}: stream: goes with folder:PATH"
    if unknown := [dataset for dataset in profile.splits if dataset not in profile.datasets]:
        return f"splits: unknown data set {unknown[0]!r}{choices.suggest(unknown[0], profile.datasets)}"
    if profile.first is not None and profile.first not in ids:
        return f"first: no model has the id {profile.first!r}"
    for notebook, wanted in profile.needs.items():
        for key, values in wanted.items():
            known = {getattr(row, key) for row in profile.models}
            if lost := [value for value in values if value not in known]:
                return f"needs: {notebook}: no model has the {key} {lost[0]!r}"
    return None


def _find_wrong_row(profile: Profile) -> str | None:
    """Say which row has options or a defense that can't be, or a split that its data set can't fill."""
    for row in profile.models:
        if row.dataset not in profile.datasets:
            known = ", ".join(profile.datasets) or "none"
            return f"models: {row.id}: dataset: expected one of datasets: ({known}), got {row.dataset!r}"
        if problem := choices.find_wrong_defense(row) or choices.find_wrong_option(row):
            return f"models: {row.id}: {problem}"
        default = 3000 if row.dataset.startswith("scenes") else math.inf
        split, available = profile.get_split(row.dataset), profile.datasets[row.dataset].get("n", default)
        asking = "a shadow" if row.role == "shadow" else "minmax" if row.options.get("minmax") else ""
        if asking and not split.get("n_shadow_members", row.n_train):
            return f"models: {row.id}: expected n_shadow_members of at least 1 for {asking}, got 0"
        needed = row.n_train + split.get("n_nonmembers", 3000)
        needed += split.get("n_shadow_members", row.n_train) + split.get("n_shadow_nonmembers", 0)
        needed += row.n_train if row.role == "reference" else 0
        if needed > available:
            needs = f"needs {needed} images (members, non-members and their shadow's), got {available}"
            return f"datasets: {row.dataset}: n: model {row.id} {needs}"
    return None


def _describe(error: ValidationError, values: dict) -> str:
    """Turn pydantic's first complaint into one line with section, key, expectation and what came."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part != "[key]"]
    if len(names) > 1 and names[0] == "models" and names[1].isdigit():
        row = values["models"][int(names[1])]
        names[1] = str(row["id"]) if isinstance(row, dict) and row.get("id") else f"row {int(names[1]) + 1}"
    kind, section = first["type"], "".join(f"{name}: " for name in names[:-1])
    if kind == "extra_forbidden":
        owners = {"models": Row.model_fields, "datasets": DataArguments.__annotations__}
        owners |= dict.fromkeys(("split", "splits"), SplitArguments.__annotations__)
        return section + choices.reject(names[-1], owners.get(names[0], Profile.model_fields))
    if kind == "missing":
        return f"{section}key {names[-1]!r} is missing"
    return f"{': '.join(names)[:120]}: {choices.explain(error)}"


def _refuse_structure(text: str) -> None:
    """Refuse aliases (a few lines of them make gigabytes) and nesting without an end, before either is followed."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            _refuse("aliases (*) are refused: use defaults:", event)
        if depth > 100:
            raise RecursionError


def _refuse(problem: str, where: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # the one in C is 20 times faster
    """SafeLoader without keys given twice, or numbers without an end."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key must be text or a number", key)
            if key.value in seen:
                _refuse(f"key {choices.shorten(key.value)} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# 010 would be 8 and 1:30 ninety: a whole number is decimal, all else is text
_Loader.yaml_implicit_resolvers = {
    key: [(tag, rule) for tag, rule in found if tag != "tag:yaml.org,2002:int"]
    for key, found in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
# 1e-3 is a number (YAML 1.1 makes it text)
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
