"""The attacks of an audit, and one p-value for all of them.

Sides are assigned anew at random, every attack runs again on every assignment, and the *largest* standardized AUC is
compared (Westfall and Young 1993). Exact whatever the attacks are, if suspected and reference images are exchangeable
where nothing leaks, and a score depends on the pixels alone, never on side, name or place. Attackers that train are
trained anew every time: kernel ridge regression is linear in the labels, so 10,000 trainings are one matrix product.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.attacks.reference import calibrate
from mia_utils.attacks.registry import find_missing, get_attack, get_parameters, split_params
from mia_utils.models import views

N_PERMUTATIONS, N_FOLDS = 9_999, 5
FEWEST_TO_FIT = 40  # independent images a side: fewer train no attacker
RIDGE = 1.0
POWER = float(stats.norm.ppf(0.8))
GRID = (12, 16)  # loss maps are averaged to this many cells before a kernel sees them
AUGMENTATIONS = ("crop-weak", "crop", "simclr")  # of queries; how the model was trained is rarely known
ENCODER = ("lpla", "token-spread", "mim", "encodermi-t", "partcrop")
SEGMENTER = ("seg-global-loss", "seg-label-only", "seg-loss-map")
CROPS = 32  # of PartCrop in the battery, a quarter of the paper's: it has half a minute


def name_by_pixels(images: np.ndarray) -> list[str]:
    """Names that key the random views of images (N, H, W, 3): no draw knows a file name or a side."""
    return [hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).hexdigest() for image in images]


@contextlib.contextmanager
def asking(name: str) -> Iterator[None]:
    """Say in one line what a model raises in here; a plain ValueError, as this package raises, stays as it is."""
    try:
        yield
    except Exception as error:  # theirs
        if type(error) is ValueError:
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"{name}: the model failed: {type(error).__name__}: {said}") from error


@dataclass(frozen=True)
class Attempt:
    """One attack as it is tried: the model it queries, its parameters, and the models that calibrate its scores."""

    attack: str
    model: Any = field(repr=False)
    params: dict[str, Any] = field(default_factory=dict)
    references: Sequence[Any] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """For example ``"encodermi-t, augmentation crop"``."""
        parts = [self.attack, *(f"{key} {value}" for key, value in self.params.items() if key != "n_crops")]
        return ", ".join(parts) + " with reference" * bool(self.references)

    def query(self, pool, seed: int) -> np.ndarray:
        """Query the model about all images: scores (N,), higher = more likely a member, or features (N, F) to fit."""
        attack = get_attack(self.attack)
        call, _ = split_params(attack, self.params)
        call |= {"masks": pool.masks} if "labels" in attack.needs else {}
        call |= {"image_ids": name_by_pixels(pool.images), "seed": seed}

        def ask(model: Any) -> np.ndarray:
            with asking(self.label):
                x = attack.extract(model, pool.images, **call)
            x = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
            if not np.isfinite(x).all():
                raise ValueError(f"{self.label}: the model gave values that are not finite")
            return x

        x = ask(self.model)
        if self.references:
            return calibrate(attack.statistic(x), [attack.statistic(ask(one)) for one in self.references])
        return _arrange(self.attack, x) if attack.fitted else np.asarray(attack.score(x), np.float64)


def _arrange(name: str, x: np.ndarray) -> np.ndarray:
    """Features (N, ...) as a kernel compares them: crops and views have no order, loss maps too many pixels."""
    if x.ndim == 4:
        maps = torch.from_numpy(x.astype(np.float32))
        grid = [min(a, b) for a, b in zip(maps.shape[2:], GRID, strict=True)]
        return F.adaptive_avg_pool2d(maps, grid).flatten(1).numpy()
    if name.startswith("partcrop"):
        return np.concatenate([np.sort(part, axis=1) for part in np.split(x, 2, axis=1)], axis=1)
    return np.sort(x, axis=1) if name.startswith("encodermi") else x


def choose(
    model: Any, decoder: Any, pool, *, names: Sequence[str], augmentations: Sequence[str], settings: Mapping[str, Any],
    n_units: int, references: Sequence[tuple[Any, Any]] = (),
) -> tuple[list[Attempt], list[str]]:  # fmt: skip
    """Choose what is tried (``names``, else the battery), and say in lines what is not and why.

    Each of ``settings`` goes to the attacks that take it; ``n_units``: independent units of the smaller side. What
    trains no attacker is tried again, calibrated by ``references`` (model, decoder).
    """
    skipped, made, used, asked = [], [], set(), [(model, decoder), *references]
    wanted = names or (SEGMENTER if "posteriors" in getattr(model, "offers", ()) else ENCODER)
    for name in wanted:
        attack = get_attack(name)
        queried, *others = [d if "reconstruct" in attack.needs and d is not None else m for m, d in asked]
        reason = ""
        if missing := find_missing(attack, queried):
            reason = f"needs {', '.join(sorted(missing))}, which the model lacks"
        elif "labels" in attack.needs and pool.masks is None:
            reason = "needs label maps"
        elif attack.fitted and n_units < FEWEST_TO_FIT:
            reason = f"trains an attacker, which needs {FEWEST_TO_FIT} independent images a side, there are {n_units}"
        if reason and names:
            raise ValueError(f"attack {name!r} {reason}")
        if reason:
            skipped.append(f"{name}: {reason}")
            continue
        own = get_parameters(attack.extract)
        takes = {key: value for key, value in settings.items() if key in own}
        used |= set(takes)
        if name == "partcrop" and not names:
            takes.setdefault("n_crops", CROPS)
        swept = augmentations if "augmentation" in own and "augmentation" not in takes else ()
        ways = [takes | {"augmentation": a} for a in swept] or [takes]
        made += [Attempt(name, queried, way) for way in ways]
        if attack.statistic and not any(find_missing(attack, other) for other in others):
            made += [Attempt(name, queried, way, others) for way in ways if others]
    if unknown := sorted(set(settings) - used):
        raise ValueError(f"none of {', '.join(wanted)} takes a parameter {unknown[0]!r}")
    if not references:
        skipped.append("calibration: no reference model (same recipe, trained on neither folder) was given")
    elif not any(attempt.references for attempt in made):
        raise ValueError(f"no attack tried takes a reference model: {', '.join(wanted)}")
    if not made:
        raise ValueError(f"no attack fits this model: {'; '.join(skipped)}")
    return made, skipped


def order_augmentations(own: str | None, given: Sequence[str]) -> list[str]:
    """Query augmentations to try: those given, else that of the training and the usual ones; names are checked."""
    names = list(dict.fromkeys(given or [*([own] if own not in (None, "", "none") else []), *AUGMENTATIONS]))
    for name in names:
        views.parse_augmentation(name)
    return names


def measure_seconds(attempt: Attempt, pool, n: int = 4) -> float:
    """Estimate the seconds of an attempt from n images, after a first call, which pays for tables."""
    few = pool.take(np.linspace(0, len(pool) - 1, min(n, len(pool))).astype(int))
    attempt.query(few.take(np.arange(1)), 0)
    start = time.perf_counter()
    attempt.query(few, 0)
    return (time.perf_counter() - start) * len(pool) / len(few)


class Found(NamedTuple):
    """What a search over K attacks found; arrays are (K,), in the order of the attacks.

    auc: of the sides as they are; z: standardized by the AUCs of random sides; p_single: two-sided p of each attack
    alone; p: of the largest abs(z) of all; detectable: AUC of each that is seen with 80 % power at the level asked.
    """

    auc: np.ndarray
    z: np.ndarray
    p_single: np.ndarray
    p: float
    detectable: np.ndarray

    @property
    def strongest(self) -> int:
        """Position of the attack that stands out most, on either side."""
        return int(np.argmax(np.abs(self.z)))


def assign_folds(is_member: np.ndarray, units: np.ndarray, seed: int) -> np.ndarray:
    """Assign units to five folds, every side evenly: (N,) int; one fold where a side has fewer than ten units."""
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    fold, rng = np.zeros(len(first), int), seeds.rng(seed, "audit.folds")
    for side in (True, False) if np.bincount(is_member[first], minlength=2).min() >= 2 * N_FOLDS else ():
        here = np.flatnonzero(is_member[first] == side)
        fold[rng.permutation(here)] = np.arange(len(here)) % N_FOLDS
    return fold[unit]


def make_smoother(features: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Kernel ridge regression, cross-fitted, as the matrix that turns labels into scores: (N, F) -> (N, N).

    The kernel is the mean of a linear and a Gaussian one on standardized features; nothing in it depends on labels.
    """
    x = np.asarray(features, np.float64)
    sd = x.std(axis=0)
    x = np.clip((x - x.mean(axis=0))[:, sd > 1e-12] / sd[sd > 1e-12], -5, 5)
    if not x.shape[1]:
        return np.zeros((len(x), len(x)))
    distance = squareform(pdist(x, "sqeuclidean"))
    kernel = (np.exp(-distance / max(2 * np.median(distance), 1e-12)) + x @ x.T / x.shape[1]) / 2
    smoother = np.zeros_like(kernel)
    for f in range(N_FOLDS):
        own, rest = np.flatnonzero(fold == f), np.flatnonzero(fold != f)
        inverse = np.linalg.inv(kernel[np.ix_(rest, rest)] + RIDGE * np.eye(len(rest)))
        smoother[np.ix_(own, rest)] = kernel[np.ix_(own, rest)] @ inverse
    return smoother


def score_fitted(smoother: np.ndarray, is_member: np.ndarray) -> np.ndarray:
    """Out-of-fold scores (N,) of the attacker that :func:`make_smoother` describes, higher = more likely a member."""
    return smoother @ (is_member - is_member.mean())


def search(
    entries: Mapping[str, np.ndarray], is_member: np.ndarray, units: np.ndarray, fold: np.ndarray, *, seed: int,
    level: float = 0.01,
) -> Found:  # fmt: skip
    """Compare the largest standardized AUC of all attacks, on either side of its mean, with that of random sides.

    Args:
        entries: label -> scores (N,), or the smoother (N, N) of an attacker that is trained anew for every assignment.
        is_member, units: (N,) side, and what is independent (the image or its group, which is on one side).
        fold: (N,) of :func:`assign_folds`; sides are permuted within folds, so that the folds stay balanced.
    """
    ranks = {label: stats.rankdata(x) for label, x in entries.items() if x.ndim == 1}
    parts = []
    for side in _draw_sides(is_member, units, fold, seed):
        m, n = side.sum(axis=1), side.shape[1]
        centered = side - m[:, None] / n
        auc = [
            (side @ ranks[label] - m * (m + 1) / 2) / (m * (n - m))
            if label in ranks
            else _average_folds(centered @ x.T, side, fold)
            for label, x in entries.items()
        ]
        parts.append(np.stack(auc, axis=1))
    auc = np.concatenate(parts)  # (B + 1, K), the observed assignment first
    mean, sd = auc.mean(axis=0), np.maximum(auc.std(axis=0), 1e-9)  # over all, the observed one included: exact
    z = (auc - mean) / sd
    far = np.abs(z).max(axis=1)
    tiny = 1e-6  # rounding must not tell equal statistics apart
    alone = (np.abs(z) >= np.abs(z[0]) - tiny).mean(axis=0)
    detectable = np.minimum(mean + (np.quantile(far, 1 - level) + POWER) * sd, 1.0)
    return Found(auc[0], z[0], alone, float((far >= far[0] - tiny).mean()), detectable)


def _draw_sides(is_member: np.ndarray, units: np.ndarray, fold: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield assignments of sides (b, N) float64 in chunks, the observed one first."""
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    rng, left = seeds.rng(seed, "audit.sides"), N_PERMUTATIONS
    yield is_member[None].astype(np.float64)
    while left:
        side = np.empty((min(left, max(1, int(2e7 / len(is_member)))), len(first)))
        for f in np.unique(fold):
            here = np.flatnonzero(fold[first] == f)
            order = rng.random((len(side), len(here))).argsort(axis=1)
            side[:, here] = is_member[first][here][order]
        yield side[:, unit]
        left -= len(side)


def _average_folds(score: np.ndarray, side: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Mean over folds of the AUC within a fold: scores and sides (b, N) -> (b,)."""
    total, folds = 0.0, np.unique(fold)
    for f in folds:
        s, y = score[:, fold == f], side[:, fold == f]
        m, rank = y.sum(axis=1), stats.rankdata(s, axis=1)
        total = total + ((rank * y).sum(axis=1) - m * (m + 1) / 2) / (m * (y.shape[1] - m))
    return total / len(folds)
