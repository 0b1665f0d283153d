"""Who is a member, who is a stranger, and which of them the attacker may learn from.

``draw`` deals one pool into target members, target non-members, shadow members and shadow non-members: i.i.d.,
stratified by label, whole groups kept together, exact duplicates dropped first. ``Split.roles`` says for an
attacker's knowledge which images fit it, which choose its epoch and which report.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia_utils import seeds
from mia_utils.datasets.folders import ImageFiles, join_images

if TYPE_CHECKING:
    from mia_utils.datasets import Pool

ROLES = ("target_members", "target_nonmembers", "shadow_members", "shadow_nonmembers")
N_FOLDS = 5
RULES = ("iid", "official")


@dataclass(frozen=True, eq=False, repr=False)
class Roles:
    """What an attacker with some knowledge does with each image of a split.

    Attributes:
        knowledge: ``partial`` or ``shadow...``, as asked.
        index: (n,) int64 positions in the pool.
        is_member: (n,) bool, of the model named by ``source``.
        source: (n,) str, ``target`` or ``shadow``.
        fold: (n,) int64, the fold in which an image is reported: 0..4 for partial knowledge; for shadow knowledge 0
            for target images and -1 for shadow images, which are never reported.
        folds: list of (fit, validation, report), each int64 positions into ``index``: five for partial knowledge, one
            for shadow. Within one entry the three are disjoint; over all entries each target image is reported once.
        strata: (n,) int64 label (for pools with groups: drive) by which the folds are stratified.
        groups: (n,) str group of each image, or None.
    """

    knowledge: str
    index: np.ndarray
    is_member: np.ndarray
    source: np.ndarray
    fold: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    strata: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        fit, validation, _ = self.folds[0]
        n_report = sum(len(report) for _, _, report in self.folds)
        return (
            f"Roles({self.knowledge!r}: {n_report} images reported in {len(self.folds)} fold(s), "
            f"{len(fit)} fit and {len(validation)} validate the first attacker)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """A pool dealt into four disjoint roles; the rest of it measures utility.

    Attributes:
        target_members, target_nonmembers, shadow_members, shadow_nonmembers: int64 positions in the pool, sorted.
        utility: int64 positions of all other images: no duplicate of any image and, for pools with groups, no frame
            of a group that plays a role. May be empty.
        seed: seed of the draw.
        pool_name, pool_hash: the pool it was drawn from.
        strata: (N,) int64 what the draw was stratified by, for every image of the pool.
        groups: (N,) str groups of the pool, or None.
        rule: ``iid``, or ``official`` for the flaw of drawing members and strangers from different official splits.
    """

    target_members: np.ndarray
    target_nonmembers: np.ndarray
    shadow_members: np.ndarray
    shadow_nonmembers: np.ndarray
    utility: np.ndarray
    seed: int
    pool_name: str
    pool_hash: str
    strata: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups: np.ndarray | None = None
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
            raise ValueError(
                f"expected the pool this split was drawn from ({self.pool_name!r}, hash {self.pool_hash}), got "
                f"{pool.name!r} with hash {pool.hash}: draw the split again"
            )

    def roles(
        self, knowledge: str, *, seed: int | None = None, by_block: bool = True, known_share: float = 1.0
    ) -> Roles:
        """Say which images fit, validate and report an attacker.

        Everything is stratified by (label, membership): in each such cell the counts of two folds differ by at most
        one image (for pools with groups: cells are (drive, membership) and whole groups are dealt).

        With partial knowledge a fold that reports one member more of a class knows one member fewer of it, so an
        attacker who reads nothing but the class would score *below* 0.5 (0.48 with 128 members of 8 classes, 0.4
        with CamVid's blocks). Therefore the few known images that make a class's share of members differ from the
        split's are left out of fit and validation; under ``rule="official"`` they stay, the difference is the flaw.

        Args:
            knowledge: ``partial`` (the attacker knows four fifths of the target's images and is reported on the rest,
                five times: 5-fold cross-fitting) or ``shadow...`` (it learns from the shadow and is reported on all
                target images; what follows ``shadow`` does not change the roles).
            seed: seed of the folds; None: the split's.
            by_block: keep groups together. False deals single frames, so that near twins of a reported frame fit the
                attacker: the flaw that the blind ladder shows. No effect on pools without groups.
            known_share: share of the fit and validation images that the attacker knows, in (0, 1].

        Returns:
            Roles. Validation is 20 % of what the attacker knows.

        Raises:
            ValueError: unknown knowledge, or too few images for five folds of members and non-members.
        """
        if knowledge != "partial" and not str(knowledge).startswith("shadow"):
            raise ValueError(f"expected knowledge 'partial' or 'shadow...', got {knowledge!r}")
        if not 0 < known_share <= 1:
            raise ValueError(f"expected known_share in (0, 1], got {known_share}")
        kind = "partial" if knowledge == "partial" else "shadow"
        rng = seeds.rng(self.seed if seed is None else seed, "splits.roles", kind, int(by_block))

        parts = [self.target_members, self.target_nonmembers]
        if kind == "shadow":
            parts += [self.shadow_members, self.shadow_nonmembers]
        lengths = [len(part) for part in parts]
        names = ("target members", "target non-members", "shadow members", "shadow non-members")
        for name, length in zip(names, lengths, strict=False):
            if length == 0:
                raise ValueError(f"knowledge {knowledge!r} needs {name}, this split has none: draw it with some")
        index = np.concatenate(parts)
        is_member = np.repeat([i % 2 == 0 for i in range(len(parts))], lengths)
        source = np.repeat(["target", "target", "shadow", "shadow"][: len(parts)], lengths)
        # where targets and shadows meet (official rule on tiny pools) a cell is still one model's
        cells = np.stack([self.strata[index], is_member, source == "shadow"], axis=1)
        groups = None if self.groups is None else self.groups[index]
        units = groups if by_block else None

        fold = np.full(len(index), -1, dtype=np.int64)
        target = np.flatnonzero(source == "target")
        if kind == "partial":
            fold[target] = _deal(cells[target], None if units is None else units[target], N_FOLDS, rng)
            known = [np.flatnonzero(fold != f) for f in range(N_FOLDS)]
        else:
            fold[target] = 0
            known = [np.flatnonzero(source == "shadow")]

        folds = []
        for f, positions in enumerate(known):
            if kind == "partial" and self.rule == "iid":
                positions = _balance(positions, self.strata[index], is_member, target, rng)
            positions = _thin(positions, cells[positions], known_share, rng)
            part = _deal(cells[positions], None if units is None else units[positions], N_FOLDS, rng)
            fit, validation = positions[part != 0], positions[part == 0]
            report = np.flatnonzero(fold == f)
            for name, some in (("fit", fit), ("validation", validation), ("report", report)):
                if len(np.unique(is_member[some])) < 2:
                    raise ValueError(
                        f"expected members and non-members in every role, {name} of fold {f} has "
                        f"{int(is_member[some].sum())} members and {int((~is_member[some]).sum())} non-members: draw "
                        "more images (or more groups)"
                    )
            folds.append((fit, validation, report))
        roles = Roles(
            knowledge=knowledge,
            index=index,
            is_member=is_member,
            source=source,
            fold=fold,
            folds=folds,
            strata=self.strata[index],
            groups=groups,
        )
        _assert_disjoint(roles, by_block=by_block)
        return roles

    def reference(self, n: int) -> np.ndarray:
        """Draw images outside all four roles: the attacker's own data, for reference models and decoders of his.

        Args:
            n: number of images; smaller draws are contained in larger ones.

        Returns:
            (n,) int64 positions in the pool, a part of ``utility``.

        Raises:
            ValueError: fewer images are left.
        """
        if not 0 < n <= len(self.utility):
            raise ValueError(f"expected 1 to {len(self.utility)} reference images (those in no role), got {n}")
        return seeds.rng(self.seed, "splits.reference").permutation(self.utility)[:n]

    def save(self, path: str | Path) -> None:
        """Write the split as npz, under a temporary name first.

        Raises:
            ValueError: no right or no space to write. One line.
        """
        path = Path(path)
        arrays = {key: getattr(self, key) for key in (*ROLES, "utility", "strata")}
        text = {"pool_name": self.pool_name, "pool_hash": self.pool_hash, "rule": self.rule, "hash": self.hash}
        arrays |= {key: np.array(value) for key, value in text.items()} | {"seed": np.array(self.seed)}
        if self.groups is not None:
            arrays["groups"] = self.groups
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.chmod(temporary, 0o644)  # mkstemp makes files private
            os.replace(temporary, path)
        except OSError as error:
            raise ValueError(
                f"can not write {path}: {error.strerror or error}: free some space or get the right to write there"
            ) from error
        finally:
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a split and verify its hash.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a split, damaged or edited. One line.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such split: draw it with splits.draw and save it")
        try:
            with np.load(path, allow_pickle=False) as file:
                read = {key: file[key] for key in file.files}
            stored = str(read.pop("hash"))
            for key in ("pool_name", "pool_hash", "rule"):
                read[key] = str(read[key])
            read["seed"] = int(read["seed"])
            split = cls(**read)
            found = split.hash
        except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a saved split, or damaged: delete it and draw it again") from error
        if found != stored:
            raise ValueError(f"{path}: its hash is {found}, expected {stored}: the file was changed, draw it again")
        return split


def join(pool: Pool, split: Split, other: Pool, other_split: Split) -> tuple[Pool, Split]:
    """Join a target's images with a shadow's from another data set, for an attacker who does not know the first.

    Args:
        pool, split: of the target; its target roles are kept, its shadow roles dropped.
        other, other_split: of the shadow; its shadow roles are kept. Ids get the other pool's name in front.

    Returns:
        pool of the images in use, split of it (without utility images).

    Raises:
        ValueError: the two have images of different sizes. One line.
    """
    if pool.images.shape[1:] != other.images.shape[1:]:
        raise ValueError(
            f"expected both data sets with images of one size, got {pool.name!r} {pool.images.shape[1:3]} and "
            f"{other.name!r} {other.images.shape[1:3]}: load one of them at the other's size"
        )
    parts = [split.target_members, split.target_nonmembers, other_split.shadow_members, other_split.shadow_nonmembers]
    ends = np.cumsum([len(part) for part in parts])
    mine, theirs = np.concatenate(parts[:2]), np.concatenate(parts[2:])
    labels = np.concatenate([pool.labels[mine], other.labels[theirs] + len(pool.class_names)])
    strata = np.concatenate([split.strata[mine], other_split.strata[theirs] + split.strata.max() + 1])
    groups = None
    if pool.groups is not None or other.groups is not None:  # single images are groups of their own
        sides = [p.image_ids if p.groups is None else p.groups for p in (pool, other)]
        groups = np.concatenate([sides[0][mine], np.strings.add(f"{other.name}:", sides[1][theirs])])
    joint = dataclasses.replace(
        pool,
        name=f"{pool.name}+{other.name}",
        images=join_images([pool.images[mine], other.images[theirs]]),
        labels=labels,
        image_ids=np.concatenate([pool.image_ids[mine], np.strings.add(f"{other.name}:", other.image_ids[theirs])]),
        official_split=None,
        class_names=(*pool.class_names, *(f"{other.name}:{name}" for name in other.class_names)),
        masks=None
        if pool.masks is None or other.masks is None
        else np.concatenate([pool.masks[mine], other.masks[theirs]]),
        groups=groups,
        part_boxes=None,
        part_names=None,
    )
    roles = dict(zip(ROLES, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    return joint, Split(
        **roles,
        utility=np.zeros(0, np.int64),
        seed=split.seed,
        pool_name=joint.name,
        pool_hash=joint.hash,
        strata=strata,
        groups=groups,
    )


def draw(
    pool: Pool,
    *,
    n_members: int = 256,
    n_nonmembers: int = 3000,
    n_shadow_members: int | None = None,
    n_shadow_nonmembers: int | None = None,
    seed: int = 0,
    rule: str = "iid",
) -> Split:
    """Deal a pool into the roles of an experiment.

    Exact duplicates (identical pixels; in a streamed pool, identical files) are dropped first, all but the first.
    Without groups every role has of each label exactly its proportion of the pool, rounded down or up, and every image
    is as likely as any other of its label to play any role. With groups whole groups are dealt, stratified by drive
    (the text before ``/``; without one by the group's most frequent label); a group whose last frames are not needed
    lends them to nobody.

    Args:
        pool: the pool; the draw does not depend on the order of its images.
        n_members: images that train the target.
        n_nonmembers: strangers of the target. They cost no training: at least 1,000 make an estimate sharp.
        n_shadow_members: images that train the shadow; None: as many as ``n_members``.
        n_shadow_nonmembers: strangers of the shadow; None: twice ``n_members``, or as many as are left.
        seed: seed of the draw.
        rule: ``iid``: all roles from the whole pool. ``official``: members from the official train split and strangers
            from the official test (or else val) split, as much published code does. This is a flaw: the two differ in
            more than membership, so an attacker may succeed without ever seeing the model. For comparison only.

    Returns:
        Split

    Raises:
        ValueError: fewer images than the roles need, or an impossible number. One line.
    """
    if rule not in RULES:
        raise ValueError(f"expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    default_shadow = n_shadow_members is None
    n_shadow_members = n_members if default_shadow else n_shadow_members
    wanted = {
        "n_members": n_members,
        "n_nonmembers": n_nonmembers,
        "n_shadow_members": n_shadow_members,
        "n_shadow_nonmembers": 0 if n_shadow_nonmembers is None else n_shadow_nonmembers,
    }
    for i, (key, value) in enumerate(wanted.items()):
        least = 1 if i < 2 else 0
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"expected {key} to be a number of images, at least {least}, got {value!r}")
        wanted[key] = int(value)
    seed = int(seed)

    unique = _find_unique(pool.images)
    strata = _make_strata(pool)
    ordered = np.argsort(pool.image_ids, kind="stable")
    ordered = ordered[unique[ordered]]  # in the order of the ids: the same pool in another order is drawn alike

    names = list(wanted)
    if rule == "iid":
        tables = [(ordered, names, "all")]
    else:
        train, test = _find_official(pool, ordered)
        tables = [(train, names[0::2], "train"), (test, names[1::2], "test")]

    picked: dict[str, np.ndarray] = {}
    for candidates, keys, where in tables:
        if n_shadow_nonmembers is None and "n_shadow_nonmembers" in keys:
            others = sum(wanted[key] for key in keys if key != "n_shadow_nonmembers")
            # at least one, so that a pool without room for them is an error rather than a shadow without strangers
            room = max(len(candidates) - others, 1)
            wanted["n_shadow_nonmembers"] = min(2 * wanted["n_members"], room) if n_shadow_members else 0
        sizes = [wanted[key] for key in keys]
        _check_enough(pool, sizes, keys, candidates, where, n_duplicates=int((~unique).sum()))
        rng = seeds.rng(seed, "splits.draw", where)
        if pool.groups is None:
            parts = _draw_images(candidates, strata, sizes, rng)
        else:
            fixed = not (n_shadow_nonmembers is None and "n_shadow_nonmembers" in keys)
            parts = _draw_groups(pool.name, candidates, strata, pool.groups, sizes, rng, cap_last=not fixed)
        picked |= dict(zip(keys, parts, strict=True))

    roles = {role: np.sort(picked[key]).astype(np.int64) for role, key in zip(ROLES, names, strict=True)}
    used = np.zeros(len(pool), dtype=bool)
    for part in roles.values():
        assert not used[part].any(), "an image has two roles"
        used[part] = True
    free = unique & ~used
    if pool.groups is not None:
        free &= ~np.isin(pool.groups, np.unique(pool.groups[used]))
    return Split(
        **roles,
        utility=np.flatnonzero(free).astype(np.int64),
        seed=seed,
        pool_name=pool.name,
        pool_hash=pool.hash,
        strata=strata,
        groups=pool.groups,
        rule=rule,
    )


# ---------------------------------------------------------------------------------------------- parts of draw


def _find_unique(images: np.ndarray | ImageFiles) -> np.ndarray:
    """Mark every image but the repetitions of an earlier one. (N, H, W, 3) -> (N,) bool."""
    if isinstance(images, ImageFiles):  # files are compared, nothing is decoded
        keys = (digest.tobytes() for digest in images.digests)
    else:
        keys = (hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in images)
    seen: set[bytes] = set()
    keep = np.zeros(len(images), dtype=bool)
    for i, key in enumerate(keys):
        keep[i] = key not in seen
        seen.add(key)
    return keep


def _make_strata(pool: Pool) -> np.ndarray:
    """Return what the draw is stratified by. -> (N,) int64"""
    if pool.groups is None:
        return pool.labels.astype(np.int64)
    drives = [group.rpartition("/")[0] for group in pool.groups.tolist()]
    if all(drives):
        return np.unique(drives, return_inverse=True)[1].astype(np.int64)
    strata = np.empty(len(pool), dtype=np.int64)
    for here in _gather(pool.groups).values():
        strata[here] = np.bincount(pool.labels[here]).argmax()
    return strata


def _gather(names: np.ndarray) -> dict[str, np.ndarray]:
    """Return the positions of every name, in one pass. (n,) str -> {name: (k,) int64 ascending}"""
    values, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    parts = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    return dict(zip(values.tolist(), parts, strict=True))


def _find_official(pool: Pool, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pool.official_split is None:
        raise ValueError(f"rule 'official' needs an official_split, {pool.name!r} has none: use rule='iid'")
    official = pool.official_split[ordered]
    test = "test" if (official == "test").any() else "val"
    if not (official == "train").any() or not (official == test).any():
        found = ", ".join(np.unique(pool.official_split).tolist())
        raise ValueError(f"rule 'official' needs the splits train and test (or val), {pool.name!r} has {found}")
    return ordered[official == "train"], ordered[official == test]


def _check_enough(
    pool: Pool, sizes: list[int], keys: list[str], candidates: np.ndarray, where: str, *, n_duplicates: int
) -> None:
    if sum(sizes) <= len(candidates):
        return
    terms = " + ".join(f"{key} {size}" for key, size in zip(keys, sizes, strict=True))
    kind = "" if where == "all" else f" in its official {where} split"
    dropped = f" after {n_duplicates} exact duplicates were dropped" if n_duplicates else ""
    raise ValueError(
        f"the split needs {sum(sizes)} images ({terms}) but {pool.name!r} has {len(candidates)}{kind}{dropped}: "
        "ask for fewer"
    )


def _draw_images(
    candidates: np.ndarray, strata: np.ndarray, sizes: list[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal single images, stratified exactly. Returns one array of pool positions per role."""
    values, counts = np.unique(strata[candidates], return_counts=True)
    table = _round_table([*sizes, len(candidates) - sum(sizes)], counts, rng)
    parts: list[list[np.ndarray]] = [[] for _ in sizes]
    for column, value in enumerate(values):
        shuffled = rng.permutation(candidates[strata[candidates] == value])
        ends = np.cumsum(table[:, column])
        for role in range(len(sizes)):
            parts[role].append(shuffled[ends[role] - table[role, column] : ends[role]])
    return [np.concatenate(part) for part in parts]


def _round_table(sizes: list[int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round the table size x count / total to integers, keeping both margins.

    Every entry becomes its floor or ceiling, at random with the right expectation (dependent rounding on the
    bipartite graph of fractional entries: along a cycle of them add and subtract alternately until one is whole).
    Integers throughout, so nothing hangs on floating point.

    Args:
        sizes: R role sizes; their sum is the sum of ``counts``.
        counts: (C,) images per label.

    Returns:
        (R, C) int64 with row sums ``sizes`` and column sums ``counts``.
    """
    total = int(np.sum(counts))
    product = np.outer(np.asarray(sizes, dtype=np.int64), np.asarray(counts, dtype=np.int64))
    table, rest = np.divmod(product, total)  # entry = table + rest / total

    def pick(choices: np.ndarray) -> int:
        return int(choices[rng.integers(len(choices))])

    while rest.any():
        row = pick(np.flatnonzero(rest.any(axis=1)))
        edges: list[tuple[int, int]] = []
        visited = {row: 0}
        column = -1
        while True:
            # margins are whole, so a line with one fractional entry has another
            choices = np.flatnonzero(rest[row])
            column = pick(choices[choices != column])
            choices = np.flatnonzero(rest[:, column])
            after = pick(choices[choices != row])
            edges += [(row, column), (after, column)]
            row = after
            if row in visited:
                edges = edges[visited[row] :]
                break
            visited[row] = len(edges)
        if edges[0] == edges[-1]:  # the cycle closed through the entry it began with: that one is not part of it
            edges = edges[1:-1]
        up, down = tuple(np.array(edges[0::2]).T), tuple(np.array(edges[1::2]).T)
        most = int(min((total - rest[up]).min(), rest[down].min()))
        least = int(min(rest[up].min(), (total - rest[down]).min()))
        step = most if rng.integers(most + least) < least else -least
        rest[up] += step
        rest[down] -= step
        full = rest == total
        table[full] += 1
        rest[full] = 0
    return table


def _draw_groups(
    name: str,
    candidates: np.ndarray,
    strata: np.ndarray,
    groups: np.ndarray,
    sizes: list[int],
    rng: np.random.Generator,
    *,
    cap_last: bool,
) -> list[np.ndarray]:
    """Deal whole groups, in proportion within each drive. Returns one array of pool positions per role.

    Groups can not be cut to measure, so a role first gets at least its size and then drops the last frames of one of
    its groups. Some deals of the last few groups do not add up: another one is tried then.

    Args:
        cap_last: the last size is a wish: it shrinks, down to half, where the groups do not add up to all of it.
    """
    members = {group: candidates[here] for group, here in _gather(groups[candidates]).items()}
    drives: dict[int, list[str]] = {}
    for group, positions in members.items():
        drives.setdefault(int(strata[positions[0]]), []).append(group)
    weight = {group: len(positions) for group, positions in members.items()}

    sizes = list(sizes)
    least = sizes[-1] // 2 if cap_last else sizes[-1]
    while True:
        for _ in range(20):
            dealt = _deal_groups(drives, weight, sizes, rng)
            if dealt is not None:
                return [_trim(part, members, size, rng) for part, size in zip(dealt, sizes, strict=True)]
        if sizes[-1] <= least:
            break
        sizes[-1] = max(least, sizes[-1] - max(weight.values()))
    raise ValueError(
        f"the split needs {' + '.join(map(str, sizes))} images in whole groups, {name!r} has {len(candidates)} images "
        f"in {len(members)} groups of up to {max(weight.values())}, which do not add up to that: ask for fewer"
    )


def _deal_groups(
    drives: dict[int, list[str]], weight: dict[str, int], sizes: list[int], rng: np.random.Generator
) -> list[list[str]] | None:
    """Try one deal of whole groups to the roles; the last list, of groups left over, is not returned."""
    total = sum(weight.values())
    need = np.array([*sizes, total - sum(sizes)], dtype=float)
    dealt: list[list[tuple[int, str]]] = [[] for _ in need]
    got = np.zeros(len(need))
    due = np.zeros(len(need))
    for drive in rng.permutation(list(drives)):
        names = rng.permutation(drives[int(drive)])
        # what a role missed in one drive it is due in the next, so errors do not add up over drives
        due += need * sum(weight[name] for name in names) / total
        for group in map(str, names):
            order = rng.permutation(len(need))  # ties between roles are broken at random
            role = int(order[np.argmax((due - got)[order])])
            dealt[role].append((int(drive), group))
            got[role] += weight[group]

    # a few frames are missing where groups did not add up: move or exchange groups while that helps
    goal = np.array([*sizes, 0], dtype=float)

    def missing(amounts: np.ndarray) -> float:
        return float(np.maximum(goal - amounts, 0).sum())

    def sample(part: list[tuple[int, str]]) -> list[tuple[int, str]]:
        # with thousands of groups any few dozen hold a fitting one
        return part if len(part) <= 40 else [part[i] for i in rng.choice(len(part), size=40, replace=False)]

    while missing(got) > 0:
        short = int(np.argmax(goal - got))
        best = None
        for other in range(len(need)):
            if other == short:
                continue
            takes = sample(dealt[other])
            for give in [*sample(dealt[short]), None]:
                for take in takes:
                    change = weight[take[1]] - (weight[give[1]] if give else 0)
                    if change <= 0:
                        continue
                    after = got.copy()
                    after[short] += change
                    after[other] -= change
                    # the same drive first, then the smallest change
                    moved = give is None or give[0] != take[0]
                    key = (missing(after), moved, change, rng.random())
                    if best is None or key < best[0]:
                        best = (key, other, give, take, after)
        if best is None or best[0][0] >= missing(got):
            return None
        _, other, give, take, got = best
        dealt[other].remove(take)
        dealt[short].append(take)
        if give:
            dealt[short].remove(give)
            dealt[other].append(give)
    return [[group for _, group in part] for part in dealt[:-1]]


def _trim(part: list[str], members: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Join the groups of a role and drop what is more than its size from the end of groups picked at random."""
    kept = [members[group] for group in rng.permutation(part)] if part else []
    surplus = sum(len(positions) for positions in kept) - size
    out = []
    for positions in kept:
        drop = min(surplus, len(positions))
        surplus -= drop
        out.append(positions[: len(positions) - drop])
    return np.concatenate(out) if out else np.zeros(0, dtype=np.int64)


# ---------------------------------------------------------------------------------------------- parts of roles


def _deal(cells: np.ndarray, units: np.ndarray | None, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal images to folds: counts per cell differ by at most one unit, totals too.

    Args:
        cells: (n, k) int; rows that are equal form one cell, such as (label, membership).
        units: (n,) str images of one unit go to one fold; None: every image is a unit.

    Returns:
        (n,) int64 fold.
    """
    fold = np.empty(len(cells), dtype=np.int64)
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    cell = cell.ravel()
    # members and strangers have totals of their own: a fold's share of members is then even too
    totals: dict[tuple[int, ...], np.ndarray] = {}
    for c in rng.permutation(cell.max() + 1):
        here = np.flatnonzero(cell == c)
        total = totals.setdefault(tuple(cells[here[0], 1:].tolist()), np.zeros(n_folds))
        count = np.zeros(n_folds)
        if units is None:
            parts = list(rng.permutation(here)[:, None])
        else:
            parts = [here[part] for part in _gather(units[here]).values()]
            parts = [parts[i] for i in rng.permutation(len(parts))]
            parts.sort(key=len, reverse=True)  # short blocks last: they even out
        luck = rng.permutation(n_folds)  # ties between folds are broken at random
        for part in parts:
            f = np.lexsort((luck, total, count))[0]  # fewest of this cell, then fewest in all
            fold[part] = f
            count[f] += len(part)
            total[f] += len(part)
    return fold


def _balance(
    positions: np.ndarray, strata: np.ndarray, is_member: np.ndarray, target: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Leave out known images until every stratum has the split's ratio of members to strangers.

    Strata with fewer members or strangers than folds are too small to have a ratio and count as one.

    Args:
        positions: (k,) what the attacker knows in a fold.
        strata, is_member: (n,) of all images of the split.
        target: positions of the target images, whose ratio is kept.
    """
    n_members, n_others = int(is_member[target].sum()), int((~is_member[target]).sum())
    is_rare = is_member if n_members <= n_others else ~is_member
    ratio = min(n_members, n_others) / max(n_members, n_others)
    values, inverse = np.unique(strata, return_inverse=True)
    sizes = np.stack([np.bincount(inverse[target][is_rare[target] == r], minlength=len(values)) for r in (True, False)])
    merged = np.where(sizes.min(axis=0) < N_FOLDS, -1, np.arange(len(values)))[inverse]
    kept = []
    for value in np.unique(merged[positions]):
        here = positions[merged[positions] == value]
        rare, common = rng.permutation(here[is_rare[here]]), rng.permutation(here[~is_rare[here]])
        # the small addend undoes rounding below a whole number, as in 0.1 * 30
        rare = rare[: int(len(common) * ratio + 1e-9)]
        kept += [rare, common[: round(len(rare) / ratio)]]
    return np.sort(np.concatenate(kept))


def _thin(positions: np.ndarray, cells: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Keep a share of the positions, of each cell alike: counts are the exact share, rounded down or up."""
    if share == 1:
        return positions
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    cell = cell.ravel()
    n_keep = round(share * len(positions))
    table = _round_table([n_keep, len(positions) - n_keep], np.bincount(cell), rng)
    keep = [rng.permutation(positions[cell == c])[: table[0, c]] for c in range(table.shape[1])]
    return np.sort(np.concatenate(keep))


def _assert_disjoint(roles: Roles, *, by_block: bool) -> None:
    """Fit, validation and report never share an image, nor, by block, a group."""
    times = np.zeros(len(roles), dtype=int)
    for parts in roles.folds:
        together = np.concatenate(parts)
        assert len(np.unique(together)) == len(together), "fit, validation and report share an image"
        times[parts[2]] += 1
        if roles.groups is not None and by_block and roles.knowledge == "partial":
            held = [set(roles.groups[part].tolist()) for part in parts]
            assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2]), "a group has two roles"
    assert (times[roles.source == "target"] == 1).all(), "a target image is not reported exactly once"
    assert (times[roles.source == "shadow"] == 0).all(), "a shadow image is reported"
