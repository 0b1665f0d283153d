"""The attack room: a registry of attacks, and one ``evaluate`` that runs any of them with its three controls.

An attack is an ``extract`` (what the model answers about each image) and one of ``score`` (a fixed rule) or ``fit`` (an
attacker trained on images whose membership is known; the shared network by default). Whoever registers one gets the
roles, the threshold, the protocols and the controls from here::

    attacks.register("norm", needs={"embed"}, queries=1, extract=extract_norm, score=lambda features: features[:, 0])
    attacks.evaluate("norm", encoder, pool, split, knowledge="partial").auc
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from mia_utils import seeds
from mia_utils.attacks import encodermi, lpla, mim, network, partcrop, segmentation
from mia_utils.attacks.result import SUMMARY_COLUMNS, Result
from mia_utils.models import views
from mia_utils.protocol import controls, splits
from mia_utils.protocol.controls import extract_statistics, permute_labels, score_without_model

__all__ = [
    "ATTACKS",
    "BLIND_RUNGS",
    "CONTROLS",
    "NEEDS",
    "PROTOCOLS",
    "SUMMARY_COLUMNS",
    "Attack",
    "Result",
    "classifier",
    "controls",
    "encodermi",
    "evaluate",
    "evaluate_blind",
    "fingerprint",
    "lpla",
    "mim",
    "partcrop",
    "register",
    "segmentation",
    "table",
]

NEEDS = ("tokens", "embed", "reconstruct", "posteriors", "labels")  # labels: the attacker's label maps (Pool.masks)
PROTOCOLS = ("controlled", "released-view", "released-split", "released-selection")
CONTROLS = ("no-model", "untrained", "permuted")
BLIND_RUNGS = ("released-view", "released-split", "frame-thirds", "iid-frames", "controlled")
# what evaluate hands to an extract that asks for it by name; the rest of its keyword arguments are its parameters
_HANDED = {"image_ids", "seed", "view", "masks", "reference"}
_SPEED_ONLY = {"batch_size", "progress"}  # change no number, so they are no part of a feature's identity


# ------------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Attack:
    """A registered attack; see :func:`register` for the fields."""

    name: str
    needs: frozenset[str]
    queries: int | Callable[[dict], int]
    extract: Callable
    score: Callable | None
    fit: Callable | None
    paper: str
    recipe: int

    def count_queries(self, params: dict | None = None) -> int:
        """Views of one image the model sees, with these parameters of ``extract`` or with its defaults."""
        defaults = {key: p.default for key, p in _get_parameters(self.extract).items()}
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
        paper: where it comes from.
        recipe: raised whenever ``extract`` gives other numbers, so that no cached feature is mistaken for a new one.
        replace: overwrite an attack of that name.

    Raises:
        ValueError: the name is taken, a need is unknown, or both ``score`` and ``fit`` are given.
    """
    if name in ATTACKS and not replace:
        raise ValueError(f"attack {name!r} is registered already: choose another name or pass replace=True")
    if not set(needs) <= set(NEEDS):
        raise ValueError(f"expected needs among {', '.join(NEEDS)}, got {', '.join(sorted(needs))}")
    if score is not None and fit is not None:
        raise ValueError(f"attack {name!r}: expected score (no training) or fit (an attacker), got both")
    missing = {"image_ids", "seed"} - set(inspect.signature(extract).parameters)
    if missing and not _takes_anything(extract):
        raise ValueError(f"attack {name!r}: extract must take the keywords image_ids and seed, it lacks {missing}")
    fit = None if score is not None else fit or network.fit
    ATTACKS[name] = Attack(name, frozenset(needs), queries, extract, score, fit, paper, recipe)
    return ATTACKS[name]


def table(model: object | None = None) -> pd.DataFrame:
    """List the registered attacks: which one can I run with what I have?

    Args:
        model: given, a column ``runs`` says whether this model offers what the attack needs.

    Returns:
        DataFrame[attack, needs, queries, knowledge, paper(, runs)].
    """
    rows = []
    for attack in ATTACKS.values():
        row = {
            "attack": attack.name,
            "needs": ", ".join(n for n in NEEDS if n in attack.needs),
            "queries": attack.count_queries(),
            "knowledge": "partial or shadow" if attack.fit else "none (partial or shadow for a threshold)",
            "paper": attack.paper,
        }
        rows.append(row if model is None else row | {"runs": not attack.needs - {"labels"} - _get_offers(model)})
    return pd.DataFrame(rows)


def _takes_anything(function: Callable) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _get_parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Keyword-only parameters of an extract or fit that a caller of ``evaluate`` may set."""
    handed = _HANDED | {"validation"}
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in handed}


def _split_params(attack: Attack, params: dict) -> tuple[dict, dict]:
    """Sort the parameters of ``evaluate`` into those of ``extract`` (with its defaults) and those of ``fit``.

    A name that both know (``batch_size``) goes to ``extract``.
    """
    of_extract = _get_parameters(attack.extract)
    of_fit = _get_parameters(attack.fit) if attack.fit else {}
    for key in params:
        if key not in of_extract and key not in of_fit and (key in _HANDED or not _takes_anything(attack.extract)):
            allowed = ", ".join(sorted(of_extract | of_fit)) or "none"
            raise ValueError(f"attack {attack.name!r} takes no parameter {key!r}; allowed: {allowed}")
    defaults = {key: p.default for key, p in of_extract.items() if p.default is not p.empty}
    if "progress" in of_extract:
        defaults["progress"] = True  # a bar, shown only when it takes long
    fit_params = {key: value for key, value in params.items() if key in of_fit and key not in of_extract}
    return defaults | {key: value for key, value in params.items() if key not in fit_params}, fit_params


def _get_offers(model: object) -> set[str]:
    offers = getattr(model, "offers", None)
    return set(offers) if offers is not None else {need for need in NEEDS if callable(getattr(model, need, None))}


# ------------------------------------------------------------------------------------------------------ evaluate


def evaluate(
    name: str,
    model: object,
    pool,
    split,
    *,
    knowledge: str = "partial",
    shadow: object | None = None,
    reference: object | None = None,
    untrained: object | None = None,
    protocol: str = "controlled",
    seed: int = 0,
    cache: Callable[[dict, Callable[[], np.ndarray]], np.ndarray] | None = None,
    controls: bool = True,
    known_share: float = 1.0,
    learned_from: tuple[object, object | None] | None = None,
    **params: object,
) -> Result:
    """Run an attack on the images of a split, its three controls beside it.

    Args:
        name: a registered attack (``attacks.table()`` lists them).
        model: the target, an encoder or whatever the attack needs.
        pool, split: the data set and the roles of its images.
        knowledge: ``"partial"`` (members and strangers of the target are known for the folds that are not scored;
            five-fold cross-fitting) or ``"shadow"``, ``"shadow:PET"``, ``"shadow:P--"`` ... (fit and threshold on
            ``shadow``; P, E, T = its distribution, encoder, training are those of the target).
        shadow: model trained on the split's shadow members; needed with shadow knowledge, and only then.
        reference: model for difficulty calibration, for attacks that take one.
        untrained: the target's architecture with fresh weights, for the control; None leaves that row empty.
        protocol: ``"controlled"``, or one flaw of released code on purpose: ``"released-view"`` (members are queried
            with random crops, strangers whole), ``"released-split"`` (strangers from the official test split; goes
            with a split drawn with ``rule="official"``), ``"released-selection"`` (the attacker's epoch is chosen on
            the report set).
        seed: seed of queries and attackers.
        cache: ``cache(key, make) -> features``, for example on disk.
        controls: False leaves the controls out (sweeps that are drawn beside a controlled row).
        known_share: share of the fit and validation images whose membership the attacker knows, in (0, 1].
        learned_from: (model, shadow or None) as they were before a defense: a *static* attacker, whose network and
            threshold come from their answers and who then meets ``model``. None: an *adaptive* one, who learned from
            ``model`` (or ``shadow``) itself.
        params: parameters of the attack's ``extract`` and ``fit``.

    Returns:
        Result, ``.controls["no-model" | "untrained" | "permuted"]`` beside it.

    Raises:
        ValueError: one line on what does not fit together.
    """
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}: expected one of {', '.join(ATTACKS)}")
    attack = ATTACKS[name]
    extract_params, fit_params = _split_params(attack, params)
    _check(attack, model, pool, split, knowledge, shadow, reference, protocol)
    if learned_from is not None:
        _check(attack, learned_from[0], pool, split, knowledge, learned_from[1], reference, protocol)

    roles = split.roles(knowledge, known_share=known_share)
    index, is_member = np.asarray(roles.index), np.asarray(roles.is_member, bool)
    is_target = np.asarray(roles.source) == "target"
    groups = None if pool.groups is None else np.asarray(pool.groups)[index]
    released_view = protocol == "released-view"
    view = np.where(is_member & released_view, "random_resized_crop", "resize")

    def extract(target: object, from_shadow: object | None) -> np.ndarray:
        """Features of all images of the roles, each from the model that it plays against."""
        parts = [(target, is_target)] + ([(from_shadow, ~is_target)] if (~is_target).any() else [])
        features = None
        for queried, rows in parts:
            handed = {"image_ids": pool.image_ids[index[rows]], "seed": seed, "reference": reference}
            handed["view"] = view[rows] if released_view else "resize"
            handed["masks"] = None if pool.masks is None else pool.masks[index[rows]]
            got = _extract(attack, queried, pool, index[rows], handed, extract_params, cache)
            features = np.empty((len(index), *got.shape[1:]), got.dtype) if features is None else features
            if got.shape[1:] != features.shape[1:]:
                raise ValueError(
                    f"attack {name!r}: the target gives features {features.shape[1:]} an image, the shadow "
                    f"{got.shape[1:]}: give both the same classes (datasets.map_labels) and sizes"
                )
            features[rows] = got
        return features

    meta = {
        "paper": attack.paper,
        "dataset": pool.name,
        "model": str(getattr(model, "name", type(model).__name__)),
        "protocol": protocol,
        "knowledge": knowledge,
        "known_share": known_share,
        "seed": seed,
        "split": split.hash,
        "queries": attack.count_queries(extract_params),
        "params": _make_plain({k: v for k, v in (extract_params | fit_params).items() if k not in _SPEED_ONLY}),
    }
    # an attack that trains nothing scores all folds alike, so they share one ROC; its thresholds stay out-of-fold
    one_ranking = attack.score is not None
    run = functools.partial(_cross_fit, roles, pool.image_ids[index], groups, name=name, seed=seed)

    def make_scorer(features: np.ndarray, learned: np.ndarray | None = None) -> Callable:
        return functools.partial(
            _fit_attack,
            attack,
            features,
            pool.image_ids[index],
            learned=learned,
            fit_params=fit_params,
            select_on_report=protocol == "released-selection",
        )

    features = extract(model, shadow)
    learned = None if learned_from is None else extract(*learned_from)
    result = run(is_member, make_scorer(features, learned), control="", meta=meta, one_ranking=one_ranking)
    if controls:
        blind = _make_blind(pool, index, view, getattr(model, "input_size", None), seed)
        result.controls["no-model"] = run(is_member, blind, control="no-model", meta=meta)
        if untrained is None:
            reason = {"reason": "no untrained twin of the model was given"}
            result.controls["untrained"] = Result(name, "untrained", meta=meta | reason)
        else:
            # the twin plays target and shadow, so the attacker gets every chance to find what the data alone betray
            scorer = make_scorer(extract(untrained, untrained))
            result.controls["untrained"] = run(
                is_member, scorer, control="untrained", meta=meta, one_ranking=one_ranking
            )
        # within each role, the reported ones included: does the harness alone find a signal? Every fold permutes anew:
        # one label per image for all folds would tie the folds together and widen the AUC beyond its p-value
        labels = [
            permute_labels(is_member, [fold], seed=seeds.derive(seed, "permuted", f), groups=groups)
            for f, fold in enumerate(roles.folds)
        ]
        result.controls["permuted"] = run(
            labels, make_scorer(features, learned), control="permuted", meta=meta, one_ranking=one_ranking
        )
    return result


def evaluate_blind(pool, rung: str, *, n_members: int, seed: int = 0) -> Result:
    """Measure how well members are told from strangers by an attacker who never sees a model: one rung of the ladder.

    Nothing is trained on the members, so every AUC above 0.5 is a flaw of the protocol and no leak of any model.

    Args:
        pool: the data set.
        rung: one of ``BLIND_RUNGS``: ``"controlled"``, ``"released-view"``, ``"released-split"``, ``"frame-thirds"``
            (video split by blocks, but the attacker knows frames of the blocks it is scored on) or ``"iid-frames"``
            (video split frame by frame, as if frames were independent).
        n_members: members, and three times as many strangers, or two times or as many where the pool has no more.
        seed: seed of the split and the views.

    Returns:
        Result of an attack called ``no-model``, without controls.

    Raises:
        ValueError: an unknown rung, a rung about video on a pool without groups, too few images.
    """
    if rung not in BLIND_RUNGS:
        raise ValueError(f"expected rung {', '.join(BLIND_RUNGS)}, got {rung!r}")
    if rung in ("frame-thirds", "iid-frames") and pool.groups is None:
        raise ValueError(f"rung {rung!r} is about frames of one drive: data set {pool.name!r} has no groups")
    if rung == "iid-frames":
        pool = dataclasses.replace(pool, groups=None)
    if rung == "released-split" and pool.groups is not None and pool.official_split is not None:
        # the official border may cut a block: its two sides are different groups here
        pool = dataclasses.replace(pool, groups=np.strings.add(pool.groups, np.strings.add("-", pool.official_split)))
    options = {"n_members": n_members, "n_shadow_members": 0, "n_shadow_nonmembers": 0, "seed": seed}
    options["rule"] = "official" if rung == "released-split" else "iid"
    for times in (3, 2, 1):
        try:
            split = splits.draw(pool, n_nonmembers=times * n_members, **options)
            break
        except ValueError:
            if times == 1:
                raise
    roles = split.roles("partial", by_block=rung != "frame-thirds")
    view = np.where(roles.is_member & (rung == "released-view"), "random_resized_crop", "resize")
    height, width = pool.images.shape[1:3]
    # the pictures as they are, but where the views of the two sides differ: then both pass the same resampling
    size = min(height, width) if rung == "released-view" else None
    meta = {"paper": "", "dataset": pool.name, "protocol": rung, "knowledge": "partial", "seed": seed, "queries": 0}
    return _cross_fit(
        roles,
        pool.image_ids[roles.index],
        None if pool.groups is None else pool.groups[roles.index],
        roles.is_member,
        _make_blind(pool, roles.index, view, size, seed),
        name="no-model",
        control="",
        meta=meta | {"split": split.hash, "params": {}},
        seed=seed,
    )


def _check(attack: Attack, model, pool, split, knowledge, shadow, reference, protocol) -> None:
    """Raise a one-line error for what does not fit together, before anything is computed."""
    for role, queried in (("model", model), ("shadow", shadow)):
        if queried is not None and (missing := attack.needs - {"labels"} - _get_offers(queried)):
            raise ValueError(f"attack {attack.name!r} needs {', '.join(sorted(missing))}, which the {role} lacks")
    if "labels" in attack.needs and pool.masks is None:
        raise ValueError(f"attack {attack.name!r} needs label maps, and data set {pool.name!r} has none")
    if not re.fullmatch(r"partial|shadow(:[P-][E-][T-])?", knowledge):
        raise ValueError(f"expected knowledge 'partial', 'shadow' or 'shadow:PET' (- = unknown), got {knowledge!r}")
    if knowledge.startswith("shadow") != (shadow is not None):
        have = "none" if shadow is None else "one"
        raise ValueError(f"knowledge={knowledge!r} and {have} given as shadow: pass shadow=model with 'shadow' only")
    if reference is not None and "reference" not in inspect.signature(attack.extract).parameters:
        raise ValueError(f"attack {attack.name!r} takes no reference model: leave reference out")
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected protocol {', '.join(PROTOCOLS)}, got {protocol!r}")
    if protocol == "released-view" and "view" not in inspect.signature(attack.extract).parameters:
        raise ValueError(f"attack {attack.name!r} has one query transform: it has no protocol 'released-view'")
    if protocol == "released-selection" and attack.fit is None:
        raise ValueError(f"attack {attack.name!r} trains no attacker: it has no protocol 'released-selection'")
    split.check_pool(pool)
    if (split.rule == "official") != (protocol == "released-split"):
        raise ValueError(
            f"protocol {protocol!r} does not fit a split of rule {split.rule!r}: "
            "splits.draw(rule='official') and protocol='released-split' go together"
        )


def _cross_fit(
    roles,
    image_ids: np.ndarray,
    groups: np.ndarray | None,
    is_member: np.ndarray | list[np.ndarray],
    make_scorer: Callable,
    *,
    name: str,
    control: str,
    meta: dict,
    seed: int,
    one_ranking: bool = False,
) -> Result:
    """Fit an attacker per fold, choose its threshold on images it knows, score the fold's report images.

    ``is_member`` is (n,), or one such array per fold.
    """
    labels = is_member if isinstance(is_member, list) else [is_member] * len(roles.folds)
    score, threshold = np.full((2, len(roles.index)), np.nan)
    fold, reported = np.full(len(roles.index), -1), np.zeros(len(roles.index), bool)
    for f, (fit, validation, report) in enumerate(roles.folds):
        assert not (set(fit) & set(validation) or set(report) & (set(fit) | set(validation))), "roles overlap"
        fold_seed = seeds.derive(seed, "attacker", f) % 2**31
        scorer, deciding = make_scorer(labels[f], fit, validation, report, fold_seed)
        threshold[report] = network.pick_threshold(scorer(deciding), labels[f][deciding])
        score[report], fold[report], reported[report] = scorer(report), 0 if one_ranking else f, labels[f][report]
    rows = fold >= 0
    if not np.isfinite(score[rows]).all():
        raise ValueError(f"attack {name!r} gave {int((~np.isfinite(score[rows])).sum())} scores that are not finite")
    return Result(
        name,
        control,
        score=score[rows],
        is_member=reported[rows],
        image_ids=np.asarray(image_ids)[rows].astype(str),
        role=np.full(rows.sum(), "report"),
        fold=fold[rows],
        groups=None if groups is None else groups[rows],
        threshold=threshold[rows],
        meta=meta,
    )


def _fit_attack(
    attack: Attack,
    features: np.ndarray,
    image_ids: np.ndarray,
    known: np.ndarray,
    fit: np.ndarray,
    validation: np.ndarray,
    report: np.ndarray,
    seed: int,
    *,
    fit_params: dict,
    select_on_report: bool,
    learned: np.ndarray | None = None,
) -> tuple[Callable, np.ndarray]:
    """Return positions -> scores, and the positions the threshold is chosen on.

    ``learned``: features of the same images from the models a static attacker learned from.
    """
    if learned is not None:
        features, asked = learned.copy(), features
        features[report] = asked[report]
    if attack.score is not None:  # nothing is trained, so all images of known membership may set the threshold
        scores = np.asarray(attack.score(features), np.float64)
        return scores.__getitem__, np.concatenate([fit, validation])
    select = report if select_on_report else validation
    attacker = attack.fit(
        features[fit], known[fit], validation=(features[select], known[select]), seed=seed, **fit_params
    )
    keyed = "image_ids" in inspect.signature(attacker.score).parameters  # it draws per image, so it asks whose features

    def score(rows: np.ndarray) -> np.ndarray:
        extra = {"image_ids": image_ids[rows]} if keyed else {}
        return np.asarray(attacker.score(features[rows], **extra), np.float64)

    return score, validation


def _make_blind(pool, index: np.ndarray, view: np.ndarray, size: int | None, seed: int) -> Callable:
    """The no-model attacker: sees the very views that the attack queries with, never the model."""
    statistics = [np.empty(0)] * len(index)
    for kind in np.unique(view):
        for rows in np.array_split(np.flatnonzero(view == kind), 1 + (view == kind).sum() // 512):
            seen = views.read_pixels(pool.images, index[rows])
            if size is not None:  # None: the model takes pictures of any size, and the attack sends them as they are
                ids = list(pool.image_ids[index[rows]])
                seen = views.make_views(seen, ids, view=str(kind), size=size, seed=seed)
            for row, numbers in zip(rows, extract_statistics(seen), strict=True):
                statistics[row] = numbers
    statistics = np.stack(statistics)

    def make_scorer(is_member, fit, validation, report, fold_seed):
        role = np.full(len(index), "unused", dtype="<U10")
        role[fit], role[validation], role[report] = "fit", "validation", "report"
        scores = score_without_model(statistics, is_member, role, seed=fold_seed)
        return scores.__getitem__, validation

    return make_scorer


def _extract(attack: Attack, model, pool, rows: np.ndarray, handed: dict, params: dict, cache) -> np.ndarray:
    """Query one model about the images ``rows`` of the pool, through the cache where that is safe."""
    accepted = inspect.signature(attack.extract).parameters
    call = params | {k: v for k, v in handed.items() if k in accepted or (k in ("image_ids", "seed"))}

    def make() -> np.ndarray:
        features = attack.extract(model, pool.images[rows], **call)
        features = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
        if len(features) != len(rows):
            raise ValueError(f"attack {attack.name!r}: expected {len(rows)} rows of features, got {len(features)}")
        if not np.isfinite(features).all():
            raise ValueError(f"attack {attack.name!r} extracted features that are not finite")
        return features

    identity = [fingerprint(m) for m in (model, handed["reference"]) if m is not None]
    # an attack from outside the package may change its code under an unchanged name: its features are never cached
    ours = getattr(attack.extract, "__module__", "").startswith(__name__.split(".")[0] + ".")
    if cache is None or None in identity or not ours:
        return make()
    key = {
        "extract": f"{attack.extract.__module__}.{attack.extract.__qualname__}",
        "recipe": attack.recipe,
        "models": identity,
        "pool": pool.hash,
        "rows": _hash(np.asarray(rows, np.int64)),
        "view": _hash(handed["view"]) if isinstance(handed["view"], np.ndarray) else handed["view"],
        "params": _make_plain({k: v for k, v in params.items() if k not in _SPEED_ONLY}),
        "seed": handed["seed"],
    }
    return cache(key, make)


def fingerprint(model: object) -> str | None:
    """Hash a model's weights and preprocessing: the identity of its features. None for a bare callable."""
    modules = [m for m in (getattr(model, "module", None), model) if isinstance(m, torch.nn.Module)]
    if not modules:
        return None
    settings = [getattr(model, key, None) for key in ("arch", "pooling", "input_size", "min_size", "_mean", "_std")]
    # what an autoencoder holds outside its weights
    settings += ["norm_pix_loss"] if getattr(model, "norm_pix_loss", False) else []
    settings += [defense] if (defense := getattr(model, "defense", None)) else []  # how its answers are disturbed
    seen = [getattr(model, key, None) for key in ("mean", "std")]
    settings += [v.flatten().tolist() for v in seen if isinstance(v, torch.Tensor) and (v != 0.5).any()]
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for key, value in modules[0].state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def _make_plain(params: dict) -> dict:
    """Parameters as JSON holds them, so that a saved and loaded meta equals the original."""
    return json.loads(json.dumps(params, default=str, sort_keys=True))


# ----------------------------------------------------------------------------------------- the attacks on board

_PARTCROP = {
    "needs": {"tokens", "embed"},
    "queries": lambda params: params["n_crops"] + 1,
    "extract": partcrop.extract_features,
}
register("partcrop", **_PARTCROP, paper="PartCrop (arXiv 2404.02462)")
register(
    "partcrop-v2",
    **_PARTCROP,
    fit=functools.partial(network.fit, version="v2"),
    paper="PartCrop-v2 (arXiv 2505.10351)",
)
register(
    "mim",
    needs={"reconstruct"},
    queries=lambda params: params["n_masks"],
    extract=mim.extract_distances,
    score=mim.score_distances,
    paper="MIM attack (arXiv 2408.06825)",
)
_ENCODERMI = {
    "needs": {"embed"},
    "queries": lambda params: params["n_views"],
    "extract": encodermi.extract_features,
    "paper": "EncoderMI (arXiv 2108.11023)",
}
register("encodermi-v", **_ENCODERMI, fit=encodermi.fit_vector)
register("encodermi-s", **_ENCODERMI, fit=encodermi.fit_set)
register("encodermi-t", **_ENCODERMI, score=encodermi.score_threshold)
_LPLA = {"needs": {"embed"}, "queries": 1, "paper": "LpLA (arXiv 2506.05743)"}
register("lpla", **_LPLA, extract=lpla.extract_norms, fit=lpla.fit_ratio)

_SEGMENTATION = {"queries": 1, "paper": "Segmentations-Leak (arXiv 1912.09685)"}
_WITH_LABELS = _SEGMENTATION | {"needs": {"posteriors", "labels"}}
register("seg-loss-map", **_WITH_LABELS, extract=segmentation.extract_loss_map, fit=segmentation.fit)
register(
    "seg-concat",
    **_WITH_LABELS,
    extract=segmentation.extract_posteriors_and_labels,
    fit=functools.partial(segmentation.fit, labels_last=True),
)
register(
    "seg-full-image",
    **_WITH_LABELS,
    extract=segmentation.extract_loss_map,
    fit=functools.partial(segmentation.fit, whole=True),
)
register("seg-global-loss", **_WITH_LABELS, extract=segmentation.extract_mean_loss, score=segmentation.score_mean_loss)
register("seg-label-only", **_WITH_LABELS, extract=segmentation.extract_label_only, fit=segmentation.fit)
register(
    "seg-type1",
    needs={"posteriors"},
    queries=1,
    extract=segmentation.extract_posteriors,
    fit=segmentation.fit,
    paper="Type-I of Chobola et al. (arXiv 2212.01082)",
)
