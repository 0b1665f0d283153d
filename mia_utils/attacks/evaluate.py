"""One ``evaluate`` that runs any registered attack with its roles, thresholds, protocols and three controls."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mia_utils import seeds
from mia_utils.attacks import network
from mia_utils.attacks.reference import KINDS, calibrate
from mia_utils.attacks.registry import SPEED_ONLY, Attack, find_missing, get_attack, split_params, take_column
from mia_utils.models import views
from mia_utils.protocol import splits
from mia_utils.protocol.controls import extract_statistics, permute_labels, score_without_model
from mia_utils.protocol.result import Result

PROTOCOLS = ("controlled", "released-view", "released-split", "released-selection")
CONTROLS = ("no-model", "untrained", "permuted")
BLIND_RUNGS = ("released-view", "released-split", "frame-thirds", "iid-frames", "controlled")
# Parameters that features did not have when the first were cached: at these values they are no part of the identity.
_ADDED_LATER = {"probes": "parts"}

# (positions to score -> scores, positions on which the threshold is chosen)
Scorer = tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]


def evaluate(
    name: str,
    model: object,
    pool,
    split,
    *,
    knowledge: str = "partial",
    shadow: object | None = None,
    reference: object | Sequence[object] | None = None,
    calibration: str = "log-ratio",
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
        knowledge: ``"partial"`` (members and non-members of the target are known for the folds that are not scored;
            five-fold cross-fitting) or ``"shadow"``, ``"shadow:PET"``, ``"shadow:P--"`` ... (attacker and threshold
            from ``shadow``; P, E, T = its distribution, encoder, training are those of the target).
        shadow: model trained on the split's shadow members; needed with shadow knowledge, and only then.
        reference: reference models, trained like the target on none of the evaluated images and taken at the target's
            epoch: a list, or one. One for ``mim`` is subtracted as ``alpha`` says; all else is calibrated.
        calibration: an offline kind of :func:`mia_utils.attacks.reference.calibrate`.
        untrained: the target's architecture with fresh weights, for the control; None leaves that row empty.
        protocol: ``"controlled"``, or one flaw of released code on purpose: ``"released-view"`` (members are queried
            with random crops, non-members whole), ``"released-split"`` (non-members from the official test split; goes
            with a split drawn with ``rule="official"``), ``"released-selection"`` (the attacker's epoch is chosen on
            the evaluation set).
        seed: seed of queries and attackers.
        cache: ``cache(key, make) -> features``, for example on disk.
        controls: False leaves the controls out (sweeps that are drawn beside a controlled row).
        known_share: share of the attack-training and -validation images whose membership is known, in (0, 1].
        learned_from: (model, shadow or None) as they were before a defense: a *static* attacker, whose network and
            threshold come from their outputs and who then meets ``model``. None: an *adaptive* attacker, who learned
            from ``model`` (or ``shadow``) itself.
        params: parameters of the attack's ``extract`` and ``fit``.

    Returns:
        Result, ``.controls["no-model" | "untrained" | "permuted"]`` beside it. What does not fit together is a
        one-line ValueError before anything runs.
    """
    attack = get_attack(name)
    extract_params, fit_params = split_params(attack, params)
    handed_reference, references = _sort_references(attack, reference, calibration)
    targets = [(model, shadow)] + ([] if learned_from is None else [learned_from])
    for target, other in targets:
        _check(attack, target, pool, split, knowledge, other, references, protocol)

    roles = split.roles(knowledge, known_share=known_share)
    index, is_member = np.asarray(roles.index), np.asarray(roles.is_member, bool)
    is_target = np.asarray(roles.source) == "target"
    image_ids = pool.image_ids[index]
    groups = None if pool.groups is None else np.asarray(pool.groups)[index]
    released_view = protocol == "released-view"
    view = np.where(is_member & released_view, "random_resized_crop", "resize")

    def extract(target: object, from_shadow: object | None, subtracted: object | None = None) -> np.ndarray:
        """Features of all images of the roles, each from the model that it plays against."""
        parts = [(target, is_target)] + ([(from_shadow, ~is_target)] if (~is_target).any() else [])
        features = None
        for queried, rows in parts:
            handed = {"image_ids": image_ids[rows], "seed": seed, "reference": subtracted}
            handed["view"] = view[rows] if released_view else "resize"
            handed["masks"] = None if pool.masks is None else pool.masks[index[rows]]
            got = _extract(attack, queried, pool, index[rows], handed, extract_params, cache)
            features = np.empty((len(index), *got.shape[1:]), got.dtype) if features is None else features
            if got.shape[1:] != features.shape[1:]:
                sizes = f"the target gives features {features.shape[1:]} an image, the shadow {got.shape[1:]}"
                way = "give both the same classes (datasets.map_labels) and sizes"
                raise ValueError(f"attack {name!r}: {sizes}: {way}")
            features[rows] = got
        return features

    def measure(target: object, from_shadow: object | None) -> np.ndarray:
        """Features, calibrated where there are references: then they are scores (n, 1)."""
        features = extract(target, from_shadow, handed_reference)
        return features if not references else calibrate(attack.statistic(features), theirs, kind=calibration)[:, None]

    if references:
        theirs = np.stack([attack.statistic(extract(one, one)) for one in references])
    meta = dict(paper=attack.paper, dataset=pool.name, model=str(getattr(model, "name", type(model).__name__)))
    meta |= dict(protocol=protocol, knowledge=knowledge, known_share=known_share, seed=seed, split=split.hash)
    meta |= dict(queries=attack.count_queries(extract_params), params=_identify(extract_params | fit_params))
    meta["fitted"] = attack.fitted
    if references:
        meta |= {"n_references": len(references), "calibration": calibration}
    if "reconstruct" in attack.needs:  # the target's decoder leaks far more than one the attacker trains
        meta["decoder"] = getattr(model, "decoder_of", "target")
    run = functools.partial(_cross_fit, name, roles, image_ids, groups, meta=meta, seed=seed)
    # an attack that trains nothing scores all folds alike, so they share one ROC; its thresholds stay out-of-fold
    run_attack = functools.partial(run, one_ranking=not attack.fitted)
    scorer = functools.partial(
        _fit_attack,
        attack if not references else dataclasses.replace(attack, score=take_column),
        image_ids,
        fit_params=fit_params,
        select_on_report=protocol == "released-selection",
    )
    features, learned = measure(model, shadow), None if learned_from is None else measure(*learned_from)
    make_scorer = functools.partial(scorer, features, learned)
    result = run_attack(is_member, make_scorer)
    if not controls:
        return result
    blind = _make_blind(pool, index, view, getattr(model, "input_size", None), seed)
    result.controls["no-model"] = run(is_member, blind, control="no-model")
    if untrained is None:
        reason = {"reason": "no untrained model was given"}
        result.controls["untrained"] = Result(name, "untrained", meta=meta | reason)
    else:
        # it plays target and shadow, so the attacker gets every chance to find what the data alone leak
        on_untrained = functools.partial(scorer, measure(untrained, untrained), None)
        result.controls["untrained"] = run_attack(is_member, on_untrained, control="untrained")
    # within each role, the evaluated ones included: does the harness alone find a signal? Every fold permutes anew:
    # one label per image for all folds would tie the folds together and widen the AUC beyond its p-value
    labels = [
        permute_labels(is_member, [fold], seed=seeds.derive(seed, "permuted", f), groups=groups)
        for f, fold in enumerate(roles.folds)
    ]
    result.controls["permuted"] = run_attack(labels, make_scorer, control="permuted")
    return result


def evaluate_blind(pool, rung: str, *, n_members: int, seed: int = 0) -> Result:
    """Measure how well members are told from non-members without any model, under one protocol.

    Nothing is trained on the members, so every AUC above 0.5 is a flaw of the protocol and no leak of any model.

    Args:
        rung: one of ``BLIND_RUNGS``; ``"frame-thirds"``: video split by blocks, but the attacker knows frames of the
            blocks it is scored on; ``"iid-frames"``: video split frame by frame, as if frames were independent.
        n_members: members, and three times as many non-members, or two times or as many where the pool has no more.

    Returns:
        Result of an attack called ``no-model``, without controls.
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
    # the images as they are, but where the views of the two sides differ: then both pass the same resampling
    size = min(pool.images.shape[1:3]) if rung == "released-view" else None
    meta = {"paper": "", "dataset": pool.name, "protocol": rung, "knowledge": "partial", "seed": seed, "queries": 0}
    meta |= {"split": split.hash, "params": {}}
    blind, ids = _make_blind(pool, roles.index, view, size, seed), pool.image_ids[roles.index]
    groups = None if pool.groups is None else pool.groups[roles.index]
    return _cross_fit("no-model", roles, ids, groups, roles.is_member, blind, meta=meta, seed=seed)


def _sort_references(attack: Attack, reference: object, calibration: str) -> tuple[object | None, list]:
    """The reference that the attack's own extract takes, or the list that its statistic is calibrated by."""
    if reference is None:
        return None, []
    if not isinstance(reference, (list, tuple)) and "reference" in inspect.signature(attack.extract).parameters:
        return reference, []
    if attack.statistic is None:
        raise ValueError(f"attack {attack.name!r} takes no reference model: leave reference out")
    references = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if not references or calibration not in KINDS or calibration == "midpoint":
        kinds = ", ".join(kind for kind in KINDS if kind != "midpoint")
        got = f"{len(references)} and {calibration!r}"
        raise ValueError(f"expected reference models and an offline calibration ({kinds}), got {got}")
    return None, references


def _check(attack: Attack, model, pool, split, knowledge, shadow, references, protocol) -> None:
    """Refuse what does not fit together, before anything is computed."""
    for role, queried in (("model", model), ("shadow", shadow), *(("reference", one) for one in references)):
        if queried is not None and (missing := find_missing(attack, queried)):
            raise ValueError(f"attack {attack.name!r} needs {', '.join(sorted(missing))}, which the {role} lacks")
    if "labels" in attack.needs and pool.masks is None:
        raise ValueError(f"attack {attack.name!r} needs label maps, and data set {pool.name!r} has none")
    if not re.fullmatch(r"partial|shadow(:[P-][E-][T-])?", knowledge):
        raise ValueError(f"expected knowledge 'partial', 'shadow' or 'shadow:PET' (- = unknown), got {knowledge!r}")
    if knowledge.startswith("shadow") != (shadow is not None):
        have = "none" if shadow is None else "one"
        raise ValueError(f"knowledge={knowledge!r} and {have} given as shadow: pass shadow=model with 'shadow' only")
    if protocol not in PROTOCOLS:
        raise ValueError(f"expected protocol {', '.join(PROTOCOLS)}, got {protocol!r}")
    if protocol == "released-view" and "view" not in inspect.signature(attack.extract).parameters:
        raise ValueError(f"attack {attack.name!r} has one query transform: it has no protocol 'released-view'")
    if protocol == "released-selection" and not attack.fitted:
        raise ValueError(f"attack {attack.name!r} trains no attacker: it has no protocol 'released-selection'")
    split.check_pool(pool)
    if (split.rule == "official") != (protocol == "released-split"):
        way = "splits.draw(rule='official') and protocol='released-split' go together"
        raise ValueError(f"protocol {protocol!r} does not fit a split of rule {split.rule!r}: {way}")


def _cross_fit(
    name: str,
    roles,
    image_ids: np.ndarray,
    groups: np.ndarray | None,
    is_member: np.ndarray | list[np.ndarray],
    make_scorer: Callable[..., Scorer],
    *,
    meta: dict,
    seed: int,
    control: str = "",
    one_ranking: bool = False,
) -> Result:
    """Fit an attacker per fold, choose its threshold on images it knows, score the fold's evaluation images.

    ``is_member`` is (n,), or one such array per fold.
    """
    labels = is_member if isinstance(is_member, list) else [is_member] * len(roles.folds)
    score, threshold = np.full((2, len(roles.index)), np.nan)
    fold, evaluated = np.full(len(roles.index), -1), np.zeros(len(roles.index), bool)
    for f, (fit, validation, report) in enumerate(roles.folds):
        assert not (set(fit) & set(validation) or set(report) & (set(fit) | set(validation))), "roles overlap"
        fold_seed = seeds.derive(seed, "attacker", f) % 2**31
        scorer, deciding = make_scorer(labels[f], fit, validation, report, fold_seed)
        threshold[report] = network.pick_threshold(scorer(deciding), labels[f][deciding])
        score[report], fold[report], evaluated[report] = scorer(report), 0 if one_ranking else f, labels[f][report]
    rows = fold >= 0
    if wrong := int((~np.isfinite(score[rows])).sum()):
        raise ValueError(f"attack {name!r} gave {wrong} scores that are not finite")
    kept = dict(score=score[rows], is_member=evaluated[rows], image_ids=np.asarray(image_ids)[rows].astype(str))
    kept |= dict(fold=fold[rows], groups=None if groups is None else groups[rows], threshold=threshold[rows])
    return Result(name, control, role=np.full(rows.sum(), "report"), meta=meta, **kept)


def _fit_attack(
    attack: Attack,
    image_ids: np.ndarray,
    features: np.ndarray,
    learned: np.ndarray | None,
    known: np.ndarray,
    fit: np.ndarray,
    validation: np.ndarray,
    report: np.ndarray,
    seed: int,
    *,
    fit_params: dict,
    select_on_report: bool,
) -> Scorer:
    """Fit one fold's attacker. ``learned``: features of the same images from the models a static attacker knew."""
    if learned is not None:
        features, met = learned.copy(), features
        features[report] = met[report]
    if attack.score is not None:  # nothing is trained, so all images of known membership may set the threshold
        scores = np.asarray(attack.score(features), np.float64)
        return scores.__getitem__, np.concatenate([fit, validation])
    select = report if select_on_report else validation
    judge = features[select], known[select]
    attacker = attack.fit(features[fit], known[fit], validation=judge, seed=seed, **fit_params)
    keyed = "image_ids" in inspect.signature(attacker.score).parameters  # it draws per image

    def score(rows: np.ndarray) -> np.ndarray:
        extra = {"image_ids": image_ids[rows]} if keyed else {}
        return np.asarray(attacker.score(features[rows], **extra), np.float64)

    return score, validation


def _make_blind(pool, index: np.ndarray, view: np.ndarray, size: int | None, seed: int) -> Callable[..., Scorer]:
    """The no-model attacker: sees the very views that the attack queries with, never the model."""
    statistics = [np.empty(0)] * len(index)
    for kind in np.unique(view):
        for rows in np.array_split(np.flatnonzero(view == kind), 1 + (view == kind).sum() // 512):
            seen = views.read_pixels(pool.images, index[rows])
            if size is not None:  # None: the model takes images of any size, and the attack sends them as they are
                ids = list(pool.image_ids[index[rows]])
                seen = views.make_views(seen, ids, view=str(kind), size=size, seed=seed)
            for row, numbers in zip(rows, extract_statistics(seen), strict=True):
                statistics[row] = numbers
    statistics = np.stack(statistics)

    def make_scorer(is_member, fit, validation, report, fold_seed) -> Scorer:
        return score_without_model(statistics, is_member, [(fit, validation, report)]).__getitem__, validation

    return make_scorer


def _extract(attack: Attack, model, pool, rows: np.ndarray, handed: dict, params: dict, cache) -> np.ndarray:
    """Query one model about the images ``rows`` of the pool, through the cache where that is safe."""
    accepted = inspect.signature(attack.extract).parameters
    call = params | {k: v for k, v in handed.items() if k in accepted or k in ("image_ids", "seed")}

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
        "params": _identify(params),
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
    settings += [defense] if (defense := getattr(model, "defense", None)) else []  # how its outputs are perturbed
    seen = [getattr(model, key, None) for key in ("mean", "std")]
    settings += [v.flatten().tolist() for v in seen if isinstance(v, torch.Tensor) and (v != 0.5).any()]
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for key, value in modules[0].state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def _identify(params: dict) -> dict:
    """Parameters that change numbers, as JSON holds them (so a loaded meta equals the saved one)."""
    kept = {k: v for k, v in params.items() if k not in SPEED_ONLY and (k not in _ADDED_LATER or v != _ADDED_LATER[k])}
    return json.loads(json.dumps(kept, default=str, sort_keys=True))
