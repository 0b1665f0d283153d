"""Who is a member, who is a non-member (``draw``), and which of them an attacker may learn from (``Split.roles``)."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mia_utils import paths, seeds
from mia_utils.datasets import Pool
from mia_utils.datasets.cache import join_images
from mia_utils.protocol.folds import N_FOLDS, Roles, assign_folds, balance
from mia_utils.protocol.stratify import draw_groups, draw_images, gather

ROLES = ("target_members", "target_nonmembers", "shadow_members", "shadow_nonmembers")
RULES = ("iid", "official")


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Four disjoint roles of a pool's images, int64 positions in it, sorted; the rest of it measures utility."""

    target_members: np.ndarray
    target_nonmembers: np.ndarray
    shadow_members: np.ndarray
    shadow_nonmembers: np.ndarray
    utility: np.ndarray  # may be empty: no duplicate of any image, no frame of a group that plays a role
    seed: int
    pool_name: str
    pool_hash: str
    strata: np.ndarray  # (N,) int64 what the draw was stratified by, for every image of the pool
    groups: np.ndarray | None = None  # (N,) str of the pool
    rule: str = "iid"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, role))} {role.replace('_', ' ')}" for role in (*ROLES, "utility"))
        return f"Split(of {self.pool_name!r}, seed {self.seed}, {self.rule}: {sizes})"

    @cached_property
    def hash(self) -> str:
        """blake2b of roles, seed, rule and pool, 16 hex digits."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(f"{self.pool_name}\x1f{self.pool_hash}\x1f{self.seed}\x1f{self.rule}".encode())
        for key in (*ROLES, "utility", "strata"):
            value = np.ascontiguousarray(getattr(self, key), dtype="<i8")
            digest.update(f";{key} {len(value)};".encode())
            digest.update(value)
        if self.groups is not None:
            digest.update("\x1f".join(self.groups.tolist()).encode())
        return digest.hexdigest()

    def check_pool(self, pool: Pool) -> None:
        """Raise a one-line ``ValueError`` unless this split was drawn from exactly this pool."""
        if pool.hash != self.pool_hash:
            own, got = f"{self.pool_name!r}, hash {self.pool_hash}", f"{pool.name!r} with hash {pool.hash}"
            raise ValueError(f"expected the pool this split was drawn from ({own}), got {got}: draw the split again")

    def roles(
        self, knowledge: str, *, seed: int | None = None, by_block: bool = True, known_share: float = 1.0
    ) -> Roles:
        """Cut the images into attack-training, attack-validation (20 % of what is known) and evaluation sets.

        In each (label, membership) the counts of two folds differ by at most one image, in each (drive, membership) by
        about one group.

        Args:
            knowledge: ``partial`` (4/5 of the target's images are known and the rest is evaluated, five times:
                cross-fitting) or ``shadow...`` (the shadow's images are known and all target images evaluated).
            seed: seed of the folds; None: the split's.
            by_block: keep groups together; False: the flaw of single frames, whose near twins train the attacker.
            known_share: share of the known images that the attacker really has, in (0, 1].
        """
        kind = "partial" if knowledge == "partial" else "shadow"
        if not str(knowledge).startswith(kind):
            raise ValueError(f"expected knowledge 'partial' or 'shadow...', got {knowledge!r}")
        if not isinstance(known_share, (int, float, np.number)) or not 0 < known_share <= 1:
            raise ValueError(f"expected known_share in (0, 1], got {known_share!r}")
        seed = self.seed if seed is None else _check_int("seed", seed)
        rng = seeds.rng(seed, "splits.roles", kind, int(by_block))

        names = ROLES[:2] if kind == "partial" else ROLES
        lengths = [len(getattr(self, name)) for name in names]
        if 0 in lengths:
            missing = names[lengths.index(0)].replace("_", " ").replace("non", "non-")
            raise ValueError(f"knowledge {knowledge!r} needs {missing}, this split has none: draw it with some")
        index = np.concatenate([getattr(self, name) for name in names])
        source = np.repeat([name.split("_")[0] for name in names], lengths)
        is_member = np.repeat([not name.endswith("nonmembers") for name in names], lengths)
        strata, groups = self.strata[index], None if self.groups is None else self.groups[index]
        units = groups if by_block else None
        # where targets and shadows meet (official rule on tiny pools) a cell is still one model's
        cells = np.stack([strata, is_member, source == "shadow"], axis=1)
        _, cell = np.unique(cells, axis=0, return_inverse=True)

        def assign(positions: np.ndarray) -> np.ndarray:
            return assign_folds(cells[positions], None if units is None else units[positions], N_FOLDS, rng)

        target = np.flatnonzero(source == "target")
        fold = np.where(source == "target", 0, -1)
        if kind == "partial":
            fold[target] = assign(target)
        folds = []
        for f in range(fold.max() + 1):
            known = np.flatnonzero(fold != f)
            if kind == "partial" and self.rule == "iid":  # else the difference is the flaw
                known = balance(known, strata, is_member, target, rng)
            if known_share < 1 and len(known):
                known = np.sort(draw_images(known, cell, [round(known_share * len(known))], rng)[0])
            part = assign(known)
            folds.append((known[part != 0], known[part == 0], np.flatnonzero(fold == f)))
        roles = Roles(index, is_member, source, folds, groups)
        roles.check(by_block=by_block)
        return roles

    def reference(self, n: int) -> np.ndarray:
        """Draw n of ``utility`` as the attacker's own images: (n,) int64, the first ones of any larger draw."""
        if _check_int("n", n, least=1) > len(self.utility):
            raise ValueError(f"expected 1 to {len(self.utility)} reference images (those in no role), got {n}")
        return seeds.rng(self.seed, "splits.reference").permutation(self.utility)[:n]

    def save(self, path: str | Path) -> None:
        """Write the split as npz, whole or not at all."""
        arrays = {key: value for key, value in vars(self).items() if value is not None} | {"hash": self.hash}
        paths.write_atomic(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Read a split; a one-line error if there is none or its content does not have the hash stored in it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such split: draw it with splits.draw and save it")
        try:
            with np.load(path, allow_pickle=False) as file:
                read: dict[str, Any] = dict(file)
            if any(read[key].ndim != 1 or read[key].dtype != np.int64 for key in (*ROLES, "utility", "strata")):
                raise ValueError("expected int64 (n,)")
            read |= {key: str(read[key]) for key in ("pool_name", "pool_hash", "rule")} | {"seed": int(read["seed"])}
            stored = str(read.pop("hash"))
            found = (split := cls(**read)).hash
        except Exception as error:  # numpy and zipfile raise a dozen types on damaged files, MemoryError among them
            raise ValueError(f"{path}: not a saved split, or damaged: delete it and draw it again") from error
        if found != stored:
            raise ValueError(f"{path}: its hash is {found}, expected {stored}: the file was changed, draw it again")
        return split


def join(pool: Pool, split: Split, other: Pool, other_split: Split) -> tuple[Pool, Split]:
    """Join the target's images of one split with the shadow's of another, for an attacker who does not know the first.

    Returns:
        pool of the images in use (ids, classes and groups of ``other`` get its name in front), and a split of it
        without utility images. Images of different sizes are a one-line ``ValueError``.
    """
    split.check_pool(pool)
    other_split.check_pool(other)
    if pool.images.shape[1:] != other.images.shape[1:]:
        sizes = " and ".join(f"{p.name!r} {p.images.shape[1:3]}" for p in (pool, other))
        raise ValueError(f"expected images of one size, got {sizes}: load one data set at the other's size")
    parts = [getattr(split, role) for role in ROLES[:2]] + [getattr(other_split, role) for role in ROLES[2:]]
    mine, theirs = np.concatenate(parts[:2]), np.concatenate(parts[2:])

    def merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        theirs_named = np.strings.add(f"{other.name}:", b[theirs]) if b.dtype.kind == "U" else b[theirs]
        return np.concatenate([a[mine], theirs_named])

    groups = None
    if pool.groups is not None or other.groups is not None:  # single images are groups of their own
        groups = merge(*(p.image_ids if p.groups is None else p.groups for p in (pool, other)))
    joint = replace(
        pool,
        name=f"{pool.name}+{other.name}",
        images=join_images([pool.images[mine], other.images[theirs]]),
        labels=merge(pool.labels, other.labels + len(pool.class_names)),
        image_ids=merge(pool.image_ids, other.image_ids),
        class_names=(*pool.class_names, *(f"{other.name}:{name}" for name in other.class_names)),
        masks=None if pool.masks is None or other.masks is None else merge(pool.masks, other.masks),
        groups=groups,
        **dict.fromkeys(("official_split", "part_boxes", "part_names")),
    )
    roles = np.split(np.arange(len(joint)), np.cumsum([len(part) for part in parts])[:-1])
    strata = merge(split.strata, other_split.strata + split.strata.max() + 1)
    return joint, Split(*roles, np.zeros(0, np.int64), split.seed, joint.name, joint.hash, strata, groups)


def draw(
    pool: Pool, *, n_members: int = 256, n_nonmembers: int = 3000, n_shadow_members: int | None = None,
    n_shadow_nonmembers: int | None = None, seed: int = 0, rule: str = "iid",
) -> Split:  # fmt: skip
    """Assign the images of a pool at random to the roles of an experiment; of exact duplicates only the first has one.

    Every role has of each label exactly its proportion of the pool, rounded down or up, each image as likely as any
    other of its label. Groups stay whole, stratified by drive (the text before ``/``; without one by their most
    frequent label); frames beyond a role's size play none.

    Args:
        pool: the images, in any order.
        n_members, n_shadow_members: images that train the target, the shadow (None: as many as the target).
        n_nonmembers: non-members of the target. They cost no training: at least 1,000 make an estimate sharp.
        n_shadow_nonmembers: non-members of the shadow; None: twice ``n_members``, or as many as are left.
        seed: seed of the draw.
        rule: ``iid``: all roles from the whole pool. ``official``: members from the official train split, non-members
            from the test (or else val) split, as in much published code. A flaw, for comparison only: the two differ
            in more than membership, so an attacker may succeed without the model.
    """
    if not isinstance(pool, Pool):
        raise ValueError(f"expected a Pool, such as datasets.load returns, got {type(pool).__name__}")
    if rule not in RULES:
        raise ValueError(f"expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    names = ("n_members", "n_nonmembers", "n_shadow_members", "n_shadow_nonmembers")
    n_shadow_members = n_members if n_shadow_members is None else n_shadow_members
    given = (n_members, n_nonmembers, n_shadow_members, 0 if n_shadow_nonmembers is None else n_shadow_nonmembers)
    sizes = {name: _check_int(name, n, least=least) for name, n, least in zip(names, given, (1, 1, 0, 0), strict=True)}
    seed = _check_int("seed", seed)

    unique = _find_unique(pool.images)
    strata = _make_strata(pool)
    ordered = np.argsort(pool.image_ids, kind="stable")
    ordered = ordered[unique[ordered]]  # in the order of the ids: the same pool in another order is drawn alike
    if rule == "iid":
        draws = [("all", ordered, names)]
    else:
        draws = list(zip(("train", "test"), _find_official(pool, ordered), (names[0::2], names[1::2]), strict=True))
    picked: dict[str, np.ndarray] = {}
    for where, candidates, keys in draws:
        capped = n_shadow_nonmembers is None and keys[-1] == "n_shadow_nonmembers"
        if capped and sizes["n_shadow_members"]:
            # at least one, so that a pool without room is an error rather than a shadow without non-members
            room = max(len(candidates) - sum(sizes[key] for key in keys), 1)
            sizes["n_shadow_nonmembers"] = min(2 * sizes["n_members"], room)
        wanted = [sizes[key] for key in keys]
        if sum(wanted) > len(candidates):
            terms = " + ".join(f"{key} {sizes[key]}" for key in keys)
            kind = "" if where == "all" else f" in its official {where} split"
            dropped = f" after {(~unique).sum()} exact duplicates were dropped" if not unique.all() else ""
            needs, has = f"{sum(wanted)} images ({terms})", f"{pool.name!r} has {len(candidates)}{kind}{dropped}"
            raise ValueError(f"the split needs {needs} but {has}: ask for fewer")
        rng = seeds.rng(seed, "splits.draw", where)
        if pool.groups is None:
            parts = draw_images(candidates, strata, wanted, rng)
        else:
            parts = draw_groups(candidates, strata, pool.groups, wanted, rng, capped=capped)
        picked |= dict(zip(keys, parts, strict=True))

    roles = [np.sort(picked[name]) for name in names]
    n_roles = np.bincount(np.concatenate(roles), minlength=len(pool))
    assert n_roles.max() == 1, "an image has two roles"
    free = unique & (n_roles == 0)
    if pool.groups is not None:
        free &= ~np.isin(pool.groups, pool.groups[n_roles > 0])
    return Split(*roles, np.flatnonzero(free), seed, pool.name, pool.hash, strata, pool.groups, rule)


def _check_int(name: str, value: object, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"expected {name} to be a whole number, at least {least}, got {value!r}")
    return int(value)


def _find_unique(images: np.ndarray) -> np.ndarray:
    """Mark every image but the repetitions of an earlier one. (N, H, W, 3) -> (N,) bool"""
    first: dict[bytes, int] = {}
    keys = (hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in images)
    return np.array([first.setdefault(key, i) == i for i, key in enumerate(keys)], dtype=bool)


def _make_strata(pool: Pool) -> np.ndarray:
    """What the draw is stratified by: (N,) int64."""
    if pool.groups is None:
        return pool.labels.astype(np.int64)
    drives = [group.rpartition("/")[0] for group in pool.groups.tolist()]
    if all(drives):
        return np.unique(drives, return_inverse=True)[1].astype(np.int64)
    strata = np.empty(len(pool), dtype=np.int64)
    for here in gather(pool.groups).values():
        strata[here] = np.bincount(pool.labels[here]).argmax()
    return strata


def _find_official(pool: Pool, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the official train split and of test, or else val."""
    if pool.official_split is None:
        raise ValueError(f"rule 'official' needs an official_split, {pool.name!r} has none: use rule='iid'")
    official = pool.official_split[ordered]
    test = "test" if (official == "test").any() else "val"
    if not (official == "train").any() or not (official == test).any():
        found = ", ".join(np.unique(pool.official_split).tolist())
        raise ValueError(f"rule 'official' needs the splits train and test (or val), {pool.name!r} has {found}")
    sides = ordered[official == "train"], ordered[official == test]
    if pool.groups is not None and len(cut := np.intersect1d(*(pool.groups[side] for side in sides))):
        where = f"group {str(cut[0])!r} of {pool.name!r} has images in train and {test}"
        raise ValueError(f"rule 'official': {where}: make it two groups, as camvid@official does")
    return sides
