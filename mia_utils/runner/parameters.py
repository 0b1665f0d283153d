"""Parameters of notebooks: the literals of the tagged cell are the defaults, a profile replaces some of them."""

import ast
import json
from pathlib import Path
from typing import Any

from mia_utils.runner import choices
from mia_utils.runner.profiles import Profile, find_source


def find_notebooks() -> dict[str, Path]:
    """Return the numbered notebooks, ``{"00_start_here": path, ...}``, in order."""
    return {path.stem: path for path in sorted(find_source("notebooks").glob("[0-9][0-9]_*.ipynb"))}


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the defaults of a notebook's ``parameters`` cell (plain literals) without running it, name -> default.

    Papermill's own reader drops annotated lines and stumbles over ``#``.
    """
    where, defaults = f"notebooks/{path.name}:", {}
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} expected a notebook, got {type(error).__name__}: {error}") from None
    if len(tagged) != 1:
        raise ValueError(f"{where} expected one cell tagged 'parameters', got {len(tagged)}")
    try:
        lines = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise ValueError(f"{where} parameters: line {error.lineno}: {error.msg}") from None
    for line in lines:
        try:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            defaults[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            got = ast.unparse(line).splitlines()[0]
            raise ValueError(f"{where} parameters: expected name = literal, got {got!r}") from None
    return defaults


def merge_parameters(profile: Profile, notebook: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters a notebook is run with: its defaults (they decide names and types) and the overrides.

    A model that the profile does not have is a ValueError, too.
    """
    section = f"profiles/{profile.name}.yaml: notebooks: {notebook}"
    merged = defaults | ({"profile": profile.name} if "profile" in defaults else {})
    for key, value in profile.notebooks.get(notebook, {}).items():
        if key not in defaults or key == "profile":
            raise ValueError(f"{section}: {choices.reject(key, defaults)}")
        if not _is_like(defaults[key], value):
            raise ValueError(f"{section}: {key}: expected a value like {defaults[key]!r}, got {value!r}")
        merged[key] = value
    for key, value in merged.items():
        if key.endswith(("model_id", "model_ids")) and value is not None:
            try:
                _ = [profile.row(model_id) for model_id in (value if isinstance(value, list) else [value])]
            except ValueError as error:
                raise ValueError(f"{section}: {key}: {error}") from None
    return merged


def _is_like(default: Any, value: Any) -> bool:
    """Whether a value may replace a default: same type, int for float, elements alike; ``None`` takes anything."""
    if default is None or value is None:
        return default is None
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(any(_is_like(d, v) for d in default) for v in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)
