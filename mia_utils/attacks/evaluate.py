"""One ``evaluate`` that runs any registered attack with its roles, thresholds, protocols and three controls."""

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
from mia_utils.attacks.framing import FRAMINGS, reframe
from mia_utils.attacks.reference import OFFLINE, calibrate
from mia_utils.attacks.registry import SPEED_ONLY, Attack, find_missing, get_attack, refuse, split_params
from mia_utils.models import views
from mia_utils.protocol import splits
from mia_utils.protocol.controls import extract_statistics, permute_labels, score_without_model
from mia_utils.protocol.result import Result

PROTOCOLS = ("controlled", "released-view", "released-split", "released-selection")
CONTROLS = ("no-model", "untrained", "permuted")
BLIND_RUNGS = ("released-view", "released-split", "frame-thirds", "iid-frames", "controlled")
RECIPE = 1  # raised when an extract gives other numbers, so that no cached feature is mistaken for a new one
_ADDED_LATER = {"probes": "parts"}  # came after the first features were cached: no part of the identity at this value
# fits one fold's attacker: (labels, fit, validation, report, seed) -> (scores (n,), where to set a threshold)
FitFold = Callable[..., tuple[np.ndarray, np.ndarray]]


def evaluate(
    name: str, model: object, pool, split, *, knowledge: str = "partial", shadow: object | None = None,
    reference: object | Sequence[object] | None = None, calibration: str = "log-ratio", untrained: object | None = None,
    protocol: str = "controlled", seed: int = 0, cache: Callable | None = None, controls: bool = True,
    known_share: float = 1.0, learned_from: tuple[object, object | None] | None = None, framing: str | None = None,
    **params: object,
) -> Result:  # fmt: skip
    """Run a registered attack on the images of a split; ``Result.controls`` holds its three controls.

    Args:
        model: the target; ``params`` go to the attack's ``extract`` and ``fit``.
        knowledge: ``"partial"`` (membership is known for the folds that are not scored; five-fold cross-fitting) or
            ``"shadow"``, ``"shadow:PET"``, ``"shadow:P--"`` ... (attacker and threshold from ``shadow``, trained on the
            split's shadow members; P, E, T = its distribution, encoder, training are those of the target).
        reference: models trained like the target on none of the evaluated images, to the target's epoch. One for
            ``mim`` is subtracted as ``alpha`` says; all else is calibrated (:func:`reference.calibrate`).
        untrained: the target's architecture with fresh weights, for the control; None leaves that row empty.
        protocol: ``"controlled"``, or one flaw of released code on purpose: ``"released-view"`` (members are queried
            with random crops, non-members whole), ``"released-split"`` (non-members from the official test split; goes
            with ``splits.draw(rule="official")``), ``"released-selection"`` (epoch chosen on the evaluation set).
        cache: ``cache(key, make) -> features``, for example on disk.
        known_share: share of the attack-training and -validation images whose membership is known.
        learned_from: (model, shadow or None) before a defense: the outputs that a *static* attacker learned from. None:
            an *adaptive* attacker, who learned from ``model`` or ``shadow`` itself.
        framing: how all queries differ from the images as they were trained on (:func:`framing.reframe`); not the
            pixels that the no-model control sees.
    """
    attack, framed = get_attack(name), framing is None or framing in FRAMINGS
    refuse((not framed, f"expected framing {', '.join(map(repr, FRAMINGS))}, got {framing!r}"))
    extract_params, fit_params = split_params(attack, params)
    subtracted, references = _sort_references(attack, reference, calibration)
    for target, other in [(model, shadow)] + ([] if learned_from is None else [learned_from]):
        _check(attack, target, pool, split, knowledge, other, references, protocol)

    roles = split.roles(knowledge, known_share=known_share)
    index, is_target, image_ids = roles.index, roles.source == "target", pool.image_ids[roles.index]
    view = _choose_views(roles.is_member, protocol)

    def extract(target: object, from_shadow: object | None, subtracted: object | None = None) -> np.ndarray:
        """Features of all images of the roles, each from the model that it plays against."""
        features = np.empty(0)
        for queried, rows in ((target, is_target), (from_shadow, ~is_target)):
            if not rows.any():
                continue
            handed = {"image_ids": image_ids[rows], "seed": seed, "reference": subtracted, "framing": framing}
            handed["view"] = view[rows] if protocol == "released-view" else "resize"
            handed["masks"] = None if pool.masks is None else pool.masks[index[rows]]
            got = _extract(attack, queried, pool, index[rows], handed, extract_params, cache)
            features = features if len(features) else np.empty((len(index), *got.shape[1:]), got.dtype)
            if got.shape[1:] != features.shape[1:]:
                sizes = f"features {features.shape[1:]} of the target, {got.shape[1:]} of the shadow"
                raise ValueError(f"{name}: {sizes}: give both the same classes (datasets.map_labels) and sizes")
            features[rows] = got
        return features

    theirs = [attack.statistic(extract(one, one)) for one in references]

    def measure(target: object, from_shadow: object | None) -> np.ndarray:
        """Features (n, ...), or scores (n,) calibrated by references."""
        features = extract(target, from_shadow, subtracted)
        return calibrate(attack.statistic(features), theirs, kind=calibration) if references else features

    meta = dict(paper=attack.paper, dataset=pool.name, model=str(getattr(model, "name", type(model).__name__)))
    meta |= dict(protocol=protocol, knowledge=knowledge, known_share=known_share, seed=seed, split=split.hash)
    meta |= dict(queries=attack.count_queries(extract_params), params=_identify(extract_params | fit_params))
    meta["params"] |= {"framing": framing} if framing else {}
    meta |= dict(fitted=attack.fitted)
    meta |= dict(n_references=len(references), calibration=calibration) if references else {}
    score = np.asarray if references else attack.score
    learn = functools.partial(_learn, attack, score, image_ids, fit_params, protocol == "released-selection")
    run = functools.partial(_cross_fit, name, roles, image_ids, meta=meta, seed=seed)
    labels = [roles.is_member] * len(roles.folds)
    fit_fold = learn(measure(model, shadow), None if learned_from is None else measure(*learned_from))
    result = run(labels, fit_fold)
    if not controls:
        return result
    blind = _look_at(pool, index, view, getattr(model, "input_size", None), seed)
    result.controls["no-model"] = run(labels, blind, control="no-model")
    if untrained is None:
        reason = {"reason": "no untrained model was given"}
        result.controls["untrained"] = Result(name, "untrained", meta=meta | reason)
    else:  # it plays target and shadow, so the attacker gets every chance to find what the data alone leak
        result.controls["untrained"] = run(labels, learn(measure(untrained, untrained)), control="untrained")
    # within each role, the evaluated ones included: does the harness alone find a signal? Every fold permutes anew:
    # one label per image for all folds would tie the folds together and widen the AUC beyond its p-value
    labels = [
        permute_labels(roles.is_member, fold, seed=seeds.derive(seed, "permuted", f), groups=roles.groups)
        for f, fold in enumerate(roles.folds)
    ]
    result.controls["permuted"] = run(labels, fit_fold, control="permuted")
    return result


def evaluate_blind(pool, rung: str, *, n_members: int, seed: int = 0) -> Result:
    """Measure how well members are told from non-members without any model: an AUC above 0.5 is the protocol's flaw.

    ``"frame-thirds"``: a video is split by blocks, but the attacker knows frames of the blocks they are scored on;
    ``"iid-frames"``: frame by frame. Non-members are 3, 2 or 1 times the members, as many as the pool has.
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
    options = dict(n_shadow_members=0, n_shadow_nonmembers=0, rule="official" if rung == "released-split" else "iid")
    for times in (3, 2, 1):
        try:
            split = splits.draw(pool, n_members=n_members, n_nonmembers=times * n_members, seed=seed, **options)
            break
        except ValueError:
            if times == 1:
                raise
    roles = split.roles("partial", by_block=rung != "frame-thirds")
    # the images as they are, but where the views of the two sides differ: then both pass the same resampling
    size = min(pool.images.shape[1:3]) if rung == "released-view" else None
    blind = _look_at(pool, roles.index, _choose_views(roles.is_member, rung), size, seed)
    meta = dict(paper="", dataset=pool.name, protocol=rung, knowledge="partial", seed=seed, queries=0, split=split.hash)
    labels, meta["params"] = [roles.is_member] * len(roles.folds), {}
    return _cross_fit("no-model", roles, pool.image_ids[roles.index], labels, blind, meta=meta, seed=seed)


def _sort_references(attack: Attack, reference: object, calibration: str) -> tuple[object | None, list]:
    """The reference that the attack's own extract takes, or the list that its statistic is calibrated by."""
    several = isinstance(reference, (list, tuple))
    if reference is None or (not several and "reference" in inspect.signature(attack.extract).parameters):
        return reference, []
    references = list(reference) if several else [reference]
    expected = f"expected reference models and an offline calibration ({', '.join(OFFLINE)})"
    refuse(
        (attack.statistic is None, f"attack {attack.name!r} takes no reference model: leave reference out"),
        (not references or calibration not in OFFLINE, f"{expected}, got {len(references)} and {calibration!r}"),
    )
    return None, references


def _check(attack: Attack, model, pool, split, knowledge, shadow, references, protocol) -> None:
    """Refuse what does not fit together, before anything is computed."""
    split.check_pool(pool)
    this, takes = f"attack {attack.name!r}", inspect.signature(attack.extract).parameters
    for role, one in (("model", model), ("shadow", shadow), *(("reference", one) for one in references)):
        missing = find_missing(attack, one) if one is not None else set()
        refuse((missing, f"{this} needs {', '.join(sorted(missing))}, which the {role} lacks"))
    kinds, given = "'partial', 'shadow' or 'shadow:PET' (- = unknown)", "none" if shadow is None else "one"
    known = re.fullmatch(r"partial|shadow(:[P-][E-][T-])?", knowledge)
    apart = (split.rule == "official") != (protocol == "released-split")
    refuse(
        ("labels" in attack.needs and pool.masks is None, f"{this} needs label maps, {pool.name!r} has none"),
        (not known, f"expected knowledge {kinds}, got {knowledge!r}"),
        (knowledge.startswith("shadow") != (given == "one"), f"knowledge={knowledge!r} and {given} given as shadow"),
        (protocol not in PROTOCOLS, f"expected protocol {', '.join(PROTOCOLS)}, got {protocol!r}"),
        (protocol == "released-view" and "view" not in takes, f"{this} has one view: no protocol {protocol!r}"),
        (protocol == "released-selection" and not attack.fitted, f"{this} trains nothing: no protocol {protocol!r}"),
        (apart, f"split of rule {split.rule!r}, protocol {protocol!r}: 'official' and 'released-split' go together"),
    )


def _choose_views(is_member: np.ndarray, protocol: str) -> np.ndarray:
    return np.where(is_member & (protocol == "released-view"), "random_resized_crop", "resize")


def _cross_fit(
    name: str, roles, image_ids: np.ndarray, labels: list[np.ndarray], fit_fold: FitFold, *, meta: dict, seed: int,
    control: str = "",
) -> Result:  # fmt: skip
    """Fit an attacker per fold on its labels, choose its threshold on images it knows, score its evaluation set."""
    score, threshold = np.full((2, len(roles.index)), np.nan)
    fold, is_member = np.full(len(roles.index), -1), np.zeros(len(roles.index), bool)
    # an attack that trains nothing scores all folds alike, so they share one ROC; its thresholds stay out-of-fold
    fitted = control == "no-model" or meta.get("fitted", True)
    for f, (known, (fit, validation, report)) in enumerate(zip(labels, roles.folds, strict=True)):
        fold_seed = seeds.derive(seed, "attacker", f) % 2**31
        scores, deciding = fit_fold(known, fit, validation, report, seed=fold_seed)
        threshold[report] = network.pick_threshold(scores[deciding], known[deciding])
        score[report], fold[report], is_member[report] = scores[report], f if fitted else 0, known[report]
    rows = fold >= 0
    if wrong := int((~np.isfinite(score[rows])).sum()):
        raise ValueError(f"attack {name!r} gave {wrong} scores that are not finite")
    kept = dict(score=score[rows], is_member=is_member[rows], image_ids=image_ids[rows].astype(str), fold=fold[rows])
    kept |= dict(groups=None if roles.groups is None else roles.groups[rows], threshold=threshold[rows])
    return Result(name, control, meta=meta, **kept)


def _learn(
    attack: Attack, score: Callable | None, image_ids: np.ndarray, params: dict, released: bool, features: np.ndarray,
    learned: np.ndarray | None = None,
) -> FitFold:  # fmt: skip
    """An attack's own fold; ``learned`` are features of the same images from the models a static attacker knew."""

    def fit_fold(known, fit, validation, report, seed):
        x = features
        if learned is not None:
            x = learned.copy()
            x[report] = features[report]
        if score is not None:  # nothing is trained, so all images of known membership may set the threshold
            return np.asarray(score(x), np.float64), np.concatenate([fit, validation])
        select, scores = report if released else validation, np.full(len(x), np.nan)
        attacker = attack.fit(x[fit], known[fit], validation=(x[select], known[select]), seed=seed, **params)
        keyed = "image_ids" in inspect.signature(attacker.score).parameters  # it draws per image
        for rows in (validation, report):
            scores[rows] = attacker.score(x[rows], **({"image_ids": image_ids[rows]} if keyed else {}))
        return scores, validation

    return fit_fold


def _look_at(pool, index: np.ndarray, view: np.ndarray, size: int | None, seed: int) -> FitFold:
    """The no-model attacker: sees the very views that the attack queries with, never the model."""
    chunks, seen = [], []
    for kind in np.unique(view):
        for rows in np.array_split(np.flatnonzero(view == kind), 1 + (view == kind).sum() // 512):
            x, ids = views.read_pixels(pool.images, index[rows]), list(pool.image_ids[index[rows]])
            if size is not None:  # None: the model takes images of any size, and the attack sends them as they are
                x = views.make_views(x, ids, view=str(kind), size=size, seed=seed)
            chunks.append(rows)
            seen.append(extract_statistics(x))
    statistics = np.concatenate(seen)[np.argsort(np.concatenate(chunks))]

    def fit_fold(known, fit, validation, report, seed):
        return score_without_model(statistics, known, (fit, validation, report)), validation

    return fit_fold


def _extract(attack: Attack, model, pool, rows: np.ndarray, handed: dict, params: dict, cache) -> np.ndarray:
    """Query one model about the images ``rows`` of the pool, through the cache where that is safe."""
    accepted, framing = inspect.signature(attack.extract).parameters, handed.pop("framing")
    call = params | {k: v for k, v in handed.items() if k in accepted}

    def make() -> np.ndarray:
        images = pool.images[rows]
        if framing:
            images = reframe(images, framing, image_ids=handed["image_ids"], seed=handed["seed"])
        features = attack.extract(model, images, **call)
        features = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
        if not np.isfinite(features).all():
            raise ValueError(f"attack {attack.name!r} extracted features that are not finite")
        return features

    identity = [fingerprint(m) for m in (model, handed["reference"]) if m is not None]
    # an attack from outside the package may change its code under an unchanged name: its features are never cached
    ours = getattr(attack.extract, "__module__", "").startswith(__name__.split(".")[0] + ".")
    if cache is None or None in identity or not ours:
        return make()
    key = dict(extract=f"{attack.extract.__module__}.{attack.extract.__qualname__}", recipe=RECIPE, models=identity)
    key |= dict(pool=pool.hash, rows=_hash(rows.astype(np.int64)))
    key["view"] = _hash(handed["view"]) if isinstance(handed["view"], np.ndarray) else handed["view"]
    key |= {"framing": framing} if framing else {}
    return cache(key | dict(params=_identify(params), seed=handed["seed"]), make)


def fingerprint(model: object) -> str | None:
    """Hash a model's weights and preprocessing: the identity of its features. None for a bare callable."""
    modules = [m for m in (getattr(model, "module", None), model) if isinstance(m, torch.nn.Module)]
    if not modules:
        return None
    settings = [getattr(model, key, None) for key in ("arch", "pooling", "input_size", "min_size", "_mean", "_std")]
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
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def _identify(params: dict) -> dict:
    """Parameters that change numbers, as JSON holds them (so a loaded meta equals the saved one)."""
    kept = {k: v for k, v in params.items() if k not in SPEED_ONLY and (k not in _ADDED_LATER or v != _ADDED_LATER[k])}
    return json.loads(json.dumps(kept, default=str, sort_keys=True))
