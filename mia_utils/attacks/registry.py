"""The registry of attacks: what each needs, how it queries a model, and what makes scores of its features."""

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from typing import Any

from mia_utils.attacks import network

NEEDS = ("tokens", "embed", "reconstruct", "posteriors", "labels")  # labels: the attacker's label maps (Pool.masks)
# what evaluate hands to an extract that names it; the rest of its keyword arguments are its parameters
HANDED = {"image_ids", "seed", "view", "masks", "reference"}
SPEED_ONLY = {"batch_size", "progress"}  # change no number, so they are no part of a feature's identity


@dataclasses.dataclass(frozen=True)
class Attack:
    """A registered attack.

    Attributes:
        needs: subset of ``NEEDS``, the methods a model must offer.
        queries: views of one image that the model sees: a number, or a function of the parameters of ``extract``.
        extract: ``extract(model, images (N, H, W, 3) uint8, *, image_ids, seed, **parameters) -> (N, F)``; it may
            also name ``view`` (protocol released-view), ``masks`` or ``reference``, and is then handed them.
        score: ``score(features) -> (N,)``, higher = more likely a member: an attack without training.
        fit: ``fit(features, is_member, *, validation, seed, **parameters) -> attacker`` with ``.score(features)``,
            which may name ``image_ids``. Neither ``score`` nor ``fit``: the shared network.
        statistic: like ``score``, on a scale where a difference means a ratio of likelihoods: what reference models
            calibrate.
    """

    name: str
    _: dataclasses.KW_ONLY
    needs: set[str]
    queries: int | Callable[[dict], int]
    extract: Callable
    score: Callable | None = None
    fit: Callable | None = None
    statistic: Callable | None = None
    paper: str = ""

    @property
    def fitted(self) -> bool:
        """Whether an attacker is trained, so that scores of different folds never share one ROC."""
        return self.fit is not None

    def count_queries(self, params: dict | None = None) -> int:
        """Views of one image the model sees, with these parameters of ``extract`` or with its defaults."""
        params = get_parameters(self.extract) | (params or {})
        return int(self.queries(params) if callable(self.queries) else self.queries)


ATTACKS: dict[str, Attack] = {}


def refuse(*cases: tuple[object, str]) -> None:
    """Raise ValueError with the message of the first case that holds."""
    for wrong, message in cases:
        if wrong:
            raise ValueError(message)


def register(name: str, *, replace: bool = False, **fields) -> Attack:
    """Add an attack (fields of :class:`Attack`), or overwrite one; tables, figures and tests then know it."""
    attack = Attack(name, **fields)
    lacking = {"image_ids", "seed"} - set(inspect.signature(attack.extract).parameters)
    refuse(
        (name in ATTACKS and not replace, f"attack {name!r} is registered already: take another name or replace=True"),
        (not set(attack.needs) <= set(NEEDS), f"expected needs among {', '.join(NEEDS)}, got {attack.needs}"),
        (attack.score and attack.fit, f"attack {name!r}: expected score (no training) or fit, got both"),
        (attack.statistic and not attack.score, f"attack {name!r}: statistic goes with score, which it calibrates"),
        (lacking, f"attack {name!r}: extract must take the keywords image_ids and seed, it lacks {lacking}"),
    )
    if attack.score is None and attack.fit is None:
        attack = dataclasses.replace(attack, fit=network.fit)
    ATTACKS[name] = attack
    return attack


def get_attack(name: str) -> Attack:
    """Look an attack up."""
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
    return ATTACKS[name]


def table(model: object | None = None) -> Any:
    """List the registered attacks as a DataFrame; ``runs`` says whether a model offers what the attack needs."""
    rows = []
    for attack in ATTACKS.values():
        knowledge = "partial or shadow" if attack.fitted else "none (partial or shadow for a threshold)"
        row = dict(attack=attack.name, needs=", ".join(n for n in NEEDS if n in attack.needs))
        row |= dict(queries=attack.count_queries(), knowledge=knowledge, references=attack.statistic is not None)
        runs = {} if model is None else {"runs": not find_missing(attack, model)}
        rows.append(row | dict(paper=attack.paper) | runs)
    import pandas as pd  # of the book: audits run without it

    return pd.DataFrame(rows)


def find_missing(attack: Attack, model: object) -> set[str]:
    """What the attack needs and the model does not offer."""
    offers = getattr(model, "offers", None)
    offers = {need for need in NEEDS if callable(getattr(model, need, None))} if offers is None else set(offers)
    return set(attack.needs) - {"labels"} - offers


def get_parameters(function: Callable) -> dict[str, object]:
    """Defaults of the keyword-only parameters of an extract or fit that a caller of ``evaluate`` may set."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: p.default for p in parameters if p.name not in HANDED | {"validation", "make"}}


def split_params(attack: Attack, params: dict) -> tuple[dict, dict]:
    """Parameters of ``extract`` (with its defaults; it gets a name that both know) and of ``fit``."""
    of_extract, of_fit = get_parameters(attack.extract), get_parameters(attack.fit) if attack.fit else {}
    if unknown := [key for key in params if key not in of_extract | of_fit]:
        allowed = ", ".join(sorted(of_extract | of_fit)) or "none"
        raise ValueError(f"attack {attack.name!r} takes no parameter {unknown[0]!r}; allowed: {allowed}")
    for key, value in params.items():
        _check_parameter(attack.name, key, value, (of_extract if key in of_extract else of_fit)[key])
    defaults = {key: default for key, default in of_extract.items() if default is not inspect.Parameter.empty}
    if "progress" in of_extract:
        defaults["progress"] = True  # a bar, shown only when it takes long
    fit_params = {key: value for key, value in params.items() if key not in of_extract}
    return defaults | {key: value for key, value in params.items() if key in of_extract}, fit_params


def _check_parameter(attack: str, key: str, value: object, default: object) -> None:
    """Refuse a value that is not of its default's kind: a whole number (``n_...``: at least 1), a number, a list ..."""
    is_list, counts = isinstance(default, tuple), key.startswith("n_")
    one = default[0] if is_list else default
    kind = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}.get(type(one))
    if kind is None or (value is None and not counts):
        return
    values = value if is_list and isinstance(value, list | tuple) else [value]
    wrong = is_list != isinstance(value, list | tuple)
    wrong = wrong or any(not isinstance(v, kind) or v != v or (type(v) is bool) > (kind is bool) for v in values)
    if wrong or (counts and value < 1):
        raise ValueError(f"attack {attack!r}: expected {key} like {default!r}{' (at least 1)' * counts}, got {value!r}")
