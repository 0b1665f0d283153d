"""The registry of attacks: what each needs, how it queries a model, and who turns its features into scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mia_utils.attacks import network

NEEDS = ("tokens", "embed", "reconstruct", "posteriors", "labels")  # labels: the attacker's label maps (Pool.masks)
# what evaluate hands to an extract that names it; the rest of its keyword arguments are its parameters
HANDED = {"image_ids", "seed", "view", "masks", "reference"}
SPEED_ONLY = {"batch_size", "progress"}  # change no number, so they are no part of a feature's identity


@dataclass(frozen=True)
class Attack:
    """A registered attack; see :func:`register` for the fields."""

    name: str
    needs: frozenset[str]
    queries: int | Callable[[dict], int]
    extract: Callable
    score: Callable | None
    fit: Callable | None
    statistic: Callable | None
    paper: str
    recipe: int

    @property
    def fitted(self) -> bool:
        """Whether an attacker is trained, so that scores of different folds never share one ROC."""
        return self.fit is not None

    def count_queries(self, params: dict | None = None) -> int:
        """Views of one image the model sees, with these parameters of ``extract`` or with its defaults."""
        defaults = {key: p.default for key, p in get_parameters(self.extract).items()}
        return int(self.queries({**defaults, **(params or {})}) if callable(self.queries) else self.queries)


ATTACKS: dict[str, Attack] = {}


def register(
    name: str,
    *,
    needs: set[str],
    queries: int | Callable[[dict], int],
    extract: Callable,
    score: Callable | None = None,
    fit: Callable | None = None,
    statistic: Callable | None = None,
    paper: str = "",
    recipe: int = 1,
    replace: bool = False,
) -> Attack:
    """Add an attack; from then on tables, figures and tests that loop over ``ATTACKS`` know it.

    Args:
        name: what tables call it.
        needs: subset of ``NEEDS``, the methods a model must offer.
        queries: views of one image that the model sees: a number, or a function of the parameters of ``extract``.
        extract: ``extract(model, images (N, H, W, 3) uint8, *, image_ids, seed, **parameters) -> (N, F)``; it may
            also name ``view`` (protocol released-view), ``masks`` or ``reference``, and is then handed them.
        score: ``score(features) -> (N,)``, higher = more likely a member: an attack without training.
        fit: ``fit(features, is_member, *, validation, seed, **parameters) -> attacker`` with ``.score(features)``,
            or ``.score(features, *, image_ids)`` where scoring draws per image.
            Neither ``score`` nor ``fit``: the shared network, :func:`mia_utils.attacks.network.fit`.
        statistic: ``statistic(features) -> s (N,)``, higher = more likely a member: what reference models calibrate
            (``evaluate(..., reference=[...])``), on a scale where a difference means a ratio of likelihoods. None: the
            attack takes no references.
        paper: where it comes from.
        recipe: raised whenever ``extract`` gives other numbers, so that no cached feature is mistaken for a new one.
        replace: overwrite an attack of that name.
    """
    if name in ATTACKS and not replace:
        raise ValueError(f"attack {name!r} is registered already: choose another name or pass replace=True")
    if not set(needs) <= set(NEEDS):
        raise ValueError(f"expected needs among {', '.join(NEEDS)}, got {', '.join(sorted(needs))}")
    if score is not None and fit is not None:
        raise ValueError(f"attack {name!r}: expected score (no training) or fit (an attacker), got both")
    if statistic is not None and score is None:
        raise ValueError(f"attack {name!r}: references calibrate scores without training, statistic goes with score")
    missing = {"image_ids", "seed"} - set(inspect.signature(extract).parameters)
    if missing and not takes_anything(extract):
        raise ValueError(f"attack {name!r}: extract must take the keywords image_ids and seed, it lacks {missing}")
    fit = None if score is not None else fit or network.fit
    ATTACKS[name] = Attack(name, frozenset(needs), queries, extract, score, fit, statistic, paper, recipe)
    return ATTACKS[name]


def get_attack(name: str) -> Attack:
    """Look an attack up."""
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def table(model: object | None = None) -> pd.DataFrame:
    """List the registered attacks: which one can I run with what I have?

    Args:
        model: given, a column ``runs`` says whether this model offers what the attack needs.

    Returns:
        DataFrame[attack, needs, queries, knowledge, references, paper(, runs)].
    """
    rows = []
    for attack in ATTACKS.values():
        knowledge = "partial or shadow" if attack.fitted else "none (partial or shadow for a threshold)"
        row = dict(attack=attack.name, needs=", ".join(n for n in NEEDS if n in attack.needs))
        row |= dict(queries=attack.count_queries(), knowledge=knowledge)
        row |= dict(references=attack.statistic is not None, paper=attack.paper)
        rows.append(row if model is None else row | {"runs": not find_missing(attack, model)})
    return pd.DataFrame(rows)


def find_missing(attack: Attack, model: object) -> set[str]:
    """What the attack needs and the model does not offer."""
    offers = getattr(model, "offers", None)
    offers = {need for need in NEEDS if callable(getattr(model, need, None))} if offers is None else set(offers)
    return attack.needs - {"labels"} - offers


def takes_anything(function: Callable) -> bool:
    """Whether a function has ``**parameters``."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def get_parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters of an extract or fit that a caller of ``evaluate`` may set."""
    parameters = inspect.signature(function).parameters
    return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY and k not in HANDED | {"validation"}}


def split_params(attack: Attack, params: dict) -> tuple[dict, dict]:
    """Sort the parameters of ``evaluate`` into those of ``extract`` (with its defaults) and those of ``fit``.

    A name that both know (``batch_size``) goes to ``extract``.
    """
    of_extract = get_parameters(attack.extract)
    of_fit = get_parameters(attack.fit) if attack.fit else {}
    for key in params:
        if key not in of_extract and key not in of_fit and (key in HANDED or not takes_anything(attack.extract)):
            allowed = ", ".join(sorted(of_extract | of_fit)) or "none"
            raise ValueError(f"attack {attack.name!r} takes no parameter {key!r}; allowed: {allowed}")
    defaults = {key: p.default for key, p in of_extract.items() if p.default is not p.empty}
    if "progress" in of_extract:
        defaults["progress"] = True  # a bar, shown only when it takes long
    fit_params = {key: value for key, value in params.items() if key in of_fit and key not in of_extract}
    return defaults | {key: value for key, value in params.items() if key not in fit_params}, fit_params


def take_column(features: np.ndarray) -> np.ndarray:
    """Features that are scores already: (N, 1) -> (N,)."""
    return np.asarray(features, np.float64)[:, 0]
