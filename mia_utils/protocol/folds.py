"""Which images train an attacker, choose its epoch and evaluate it: five cross-fitting folds, or shadow and target.

scikit-learn's folds balance classes on average and, with groups, greedily; here counts of every (label, membership)
differ by at most one image, because what the class alone tells would enter the AUC.
"""

from dataclasses import dataclass

import numpy as np

from mia_utils.protocol.stratify import gather

N_FOLDS = 5
SETS = ("attack-training", "attack-validation", "evaluation")


@dataclass(frozen=True, eq=False, repr=False)
class Roles:
    """What an attacker with some knowledge does with each image of a split, arrays (n,).

    ``folds``: (attack-training, attack-validation, evaluation), disjoint int64 positions into ``index``: five such
    triples for partial knowledge, one for shadow; each target image is evaluated exactly once.
    """

    index: np.ndarray  # int64 positions in the pool
    is_member: np.ndarray  # bool, of the model named by source
    source: np.ndarray  # target or shadow
    folds: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    groups: np.ndarray | None = None  # str

    def check(self, *, by_block: bool) -> None:
        """Assert that the sets of a fold share no image and, by block, no group; refuse one without both classes."""
        for f, sets in enumerate(self.folds):
            for name, here in zip(SETS, sets, strict=True):
                n_members = int(self.is_member[here].sum())
                if n_members in (0, len(here)):
                    has = f"the {name} set of fold {f} has {n_members} members and {len(here) - n_members} non-members"
                    expected = "expected members and non-members in every set"
                    raise ValueError(f"{expected}, {has}: draw more images (or more groups)")
            together = np.concatenate(sets)
            assert len(np.unique(together)) == len(together), "the sets of a fold share an image"
            if self.groups is not None and by_block and len(self.folds) > 1:
                a, b, c = (set(self.groups[here].tolist()) for here in sets)
                assert not (a & b or a & c or b & c), "the sets of a fold share a group"
        evaluated = np.sort(np.concatenate([evaluation for _, _, evaluation in self.folds]))
        assert np.array_equal(evaluated, np.flatnonzero(self.source == "target")), "each target image once"


def assign_folds(cells: np.ndarray, units: np.ndarray | None, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Assign images to folds at random so that counts per cell, and totals, differ by at most one unit: (n,) int64.

    Args:
        cells: (n, k) int; equal rows form one cell, such as (label, membership).
        units: (n,) str, images of one unit share a fold; None: every image is a unit.
    """
    fold = np.empty(len(cells), dtype=np.int64)
    values, cell = np.unique(cells, axis=0, return_inverse=True)
    totals: dict[tuple[int, ...], np.ndarray] = {}  # of members and of non-members: their ratio is even too
    for c in rng.permutation(len(values)):
        here = np.flatnonzero(cell == c)
        total = totals.setdefault(tuple(cells[here[0], 1:].tolist()), np.zeros(n_folds))
        parts = list(here[:, None]) if units is None else [here[part] for part in gather(units[here]).values()]
        parts = [parts[i] for i in rng.permutation(len(parts))]
        luck = rng.permutation(n_folds)  # breaks ties between folds
        if units is None:  # what the loop below does with units of one image: rounds in the order of the totals
            fold[np.concatenate(parts)] = np.lexsort((luck, total))[np.arange(len(parts)) % n_folds]
            total += np.bincount(fold[here], minlength=n_folds)
            continue
        count = np.zeros(n_folds)
        for part in sorted(parts, key=len, reverse=True):  # short blocks last: they even out
            f = np.lexsort((luck, total, count))[0]  # fewest of this cell, then fewest in all
            fold[part] = f
            count[f] += len(part)
            total[f] += len(part)
    return fold


def balance(
    known: np.ndarray, strata: np.ndarray, is_member: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Leave out some of the known positions (k,) until every stratum has the target's ratio of members to non-members.

    A fold that evaluates one member more of a class knows one fewer of it: an attacker who reads only the class would
    score *below* 0.5 (0.48 with 128 members of 8 classes, 0.4 with CamVid's blocks). Strata with fewer members or
    non-members than folds are too small to have a ratio and count as one. ``strata`` and ``is_member`` are (n,) of all
    images of the split, ``target`` the positions of the target's.
    """
    n_members = int(is_member[target].sum())
    n_rare, n_common = sorted((n_members, len(target) - n_members))
    is_rare = is_member if n_members == n_rare else ~is_member
    ratio = n_rare / n_common
    values, stratum = np.unique(strata, return_inverse=True)
    sizes = [np.bincount(stratum[target][is_rare[target] == r], minlength=len(values)) for r in (True, False)]
    merged = np.where(np.min(sizes, axis=0) < N_FOLDS, -1, np.arange(len(values)))[stratum]
    kept = []
    for value in np.unique(merged[known]):
        here = known[merged[known] == value]
        rare, common = rng.permutation(here[is_rare[here]]), rng.permutation(here[~is_rare[here]])
        # the small addend undoes rounding below a whole number, as in 0.1 * 30
        rare = rare[: int(len(common) * ratio + 1e-9)]
        kept += [rare, common[: round(len(rare) / ratio)]]
    return np.sort(np.concatenate(kept))
