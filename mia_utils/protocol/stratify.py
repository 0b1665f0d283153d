"""Stratified random assignment to roles: of single images exactly, of whole groups as well as they add up."""

import numpy as np


def gather(names: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of every name: (n,) str -> {name, sorted: (k,) int64 ascending}."""
    values, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    parts = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    return dict(zip(values.tolist(), parts, strict=True))


def round_table(sizes: list[int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round sizes (R) x counts (C,) / total at random to int64 (R, C), keeping margins and expectation.

    Source: dependent rounding (Gandhi et al., J. ACM 2006): along a cycle of fractional entries add and subtract
    alternately until one is whole. Integers throughout, so nothing hangs on floating point.
    """
    total = int(np.sum(counts))
    table, rest = np.divmod(np.outer(np.asarray(sizes, np.int64), counts), total)  # entry = table + rest / total

    def pick(choices: np.ndarray) -> int:
        return int(choices[rng.integers(len(choices))])

    while rest.any():
        row, column = pick(np.flatnonzero(rest.any(axis=1))), -1
        edges: list[tuple[int, int]] = []
        visited: dict[int, int] = {}  # row -> number of edges before it
        while row not in visited:
            visited[row] = len(edges)
            # margins are whole, so a row or column with one fractional entry has another
            choices = np.flatnonzero(rest[row])
            column = pick(choices[choices != column])
            choices = np.flatnonzero(rest[:, column])
            after = pick(choices[choices != row])
            edges += [(row, column), (after, column)]
            row = after
        edges = edges[visited[row] :]
        if edges[0] == edges[-1]:  # the cycle closed through the entry it began with, which is not part of it
            edges = edges[1:-1]
        up, down = tuple(np.array(edges[0::2]).T), tuple(np.array(edges[1::2]).T)
        most = int(min((total - rest[up]).min(), rest[down].min()))
        least = int(min(rest[up].min(), (total - rest[down]).min()))
        step = most if rng.integers(most + least) < least else -least  # zero on average
        rest[up] += step
        rest[down] -= step
        table[rest == total] += 1
        rest[rest == total] = 0
    return table


def draw_images(
    candidates: np.ndarray, strata: np.ndarray, sizes: list[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Assign candidates (n,) to roles so that each has of each stratum its proportion, rounded down or up.

    Args:
        candidates: int64 positions in the pool; so are the arrays returned, one per role.
        strata: (N,) int64 of the whole pool.
        sizes: images per role, at most n in all.
    """
    values, counts = np.unique(strata[candidates], return_counts=True)
    table = round_table([*sizes, len(candidates) - sum(sizes)], counts, rng)
    drawn = []
    for value, column in zip(values, table.T, strict=True):
        shuffled = rng.permutation(candidates[strata[candidates] == value])
        drawn.append(np.split(shuffled, np.cumsum(column)[:-1]))
    return [np.concatenate(parts) for parts in zip(*drawn, strict=True)][:-1]


def draw_groups(
    candidates: np.ndarray, strata: np.ndarray, groups: np.ndarray, sizes: list[int], rng: np.random.Generator,
    *, capped: bool,
) -> list[np.ndarray]:  # fmt: skip
    """Assign whole groups, in proportion within each drive; a role drops the last frames of some of its groups.

    ``capped``: where groups do not add up to the last size, it shrinks, down to half; the rest as in ``draw_images``.
    Sizes that they do not add up to in 20 attempts are a one-line ``ValueError``.
    """
    frames = {group: candidates[here] for group, here in gather(groups[candidates]).items()}
    longest = max(map(len, frames.values()))
    least = sizes[-1] // 2 if capped else sizes[-1]
    for last in (*range(sizes[-1], least, -longest), least):
        sizes = [*sizes[:-1], last]
        for _ in range(20):
            if assigned := _assign_groups(frames, strata, sizes, rng):
                return [_trim(part, frames, size, rng) for part, size in zip(assigned, sizes, strict=True)]
    needs, has = " + ".join(map(str, sizes)), f"{len(candidates)} in {len(frames)} groups of up to {longest}"
    raise ValueError(f"the split needs {needs} images in whole groups, the pool has {has}: ask for fewer")


def _assign_groups(
    frames: dict[str, np.ndarray], strata: np.ndarray, sizes: list[int], rng: np.random.Generator
) -> list[list[str]] | None:
    """Try one assignment: group names per role, each with at least its size of images; None: no success."""
    weight = {group: len(positions) for group, positions in frames.items()}
    drive = {group: int(strata[positions[0]]) for group, positions in frames.items()}
    total = sum(weight.values())
    need = np.array([*sizes, total - sum(sizes)], dtype=float)  # the last: groups in no role
    assigned: list[list[str]] = [[] for _ in need]
    got, due = np.zeros(len(need)), np.zeros(len(need))
    for one in rng.permutation(list(dict.fromkeys(drive.values()))):
        names = rng.permutation([group for group in frames if drive[group] == one]).tolist()
        # what a role missed in one drive it is due in the next, so errors do not add up over drives
        due += need * sum(weight[name] for name in names) / total
        for name in names:
            order = rng.permutation(len(need))  # breaks ties between roles
            role = order[np.argmax((due - got)[order])]
            assigned[role].append(name)
            got[role] += weight[name]

    # a few frames are missing where groups did not add up: move or exchange groups while that helps
    goal, unit = np.array([*sizes, 0], dtype=float), np.eye(len(need))

    def count_missing(got: np.ndarray) -> float:
        return np.maximum(goal - got, 0).sum()

    def sample(part: list[str]) -> list[str]:  # with thousands of groups any few dozen hold a fitting one
        return part if len(part) <= 40 else [part[i] for i in rng.choice(len(part), size=40, replace=False)]

    while missing := count_missing(got):
        short = int(np.argmax(goal - got))
        moves = []
        for other in np.flatnonzero(np.arange(len(need)) != short):
            takes = sample(assigned[other])
            for give in [*sample(assigned[short]), None]:
                for take in takes:
                    change = weight[take] - weight.get(give, 0)
                    if change > 0:
                        after = got + change * (unit[short] - unit[other])
                        # what helps most, then within one drive, then the smallest change
                        key = count_missing(after), drive.get(give) != drive[take], change, rng.random()
                        moves.append((key, other, give, take, after))
        if not moves or (best := min(moves, key=lambda move: move[0]))[0][0] >= missing:
            return None
        _, other, give, take, got = best
        for source, sink, group in ((other, short, take), (short, other, give)):
            if group is not None:
                assigned[source].remove(group)
                assigned[sink].append(group)
    return assigned[:-1]


def _trim(part: list[str], frames: dict[str, np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Join the frames of a role's groups and drop what exceeds its size from the end of groups picked at random."""
    kept = [np.zeros(0, dtype=np.int64)]
    surplus = sum(len(frames[group]) for group in part) - size
    for group in rng.permutation(part):
        drop = min(surplus, len(frames[group]))
        kept.append(frames[group][: len(frames[group]) - drop])
        surplus -= drop
    return np.concatenate(kept)
